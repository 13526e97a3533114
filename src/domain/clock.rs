//! What time the guest is told, and by which devices.

use super::error::ValueError;

/// Longest name of a time zone, in bytes. The tz database needs 32.
pub const TIMEZONE_BYTES_MAX: usize = 64;

/// A time zone by its name in the tz database, such as `Europe/Paris`.
///
/// Only the form is checked here: whether the host knows the zone is found out
/// when the machine starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimeZoneName(String);

impl TimeZoneName {
    /// Makes a name that cannot leave the tz database's directory.
    ///
    /// # Errors
    ///
    /// The name is empty, too long, absolute, or has `.` or other characters
    /// that no zone has.
    pub fn new(name: &str) -> Result<Self, ValueError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "_+-/".contains(c);
        let parts_named = name.split('/').all(|part| !part.is_empty());
        if name.len() > TIMEZONE_BYTES_MAX || !parts_named || !name.chars().all(is_allowed) {
            return Err(ValueError::new(name, "the name of a time zone"));
        }
        Ok(TimeZoneName(name.to_owned()))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What [`ClockOffset::Variable`] is relative to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockBasis {
    /// UTC.
    #[default]
    Utc,
    /// The host's local time.
    LocalTime,
}

/// What the real-time clock shows when the machine starts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ClockOffset {
    /// UTC.
    #[default]
    Utc,
    /// The host's local time.
    LocalTime,
    /// The local time of a zone.
    TimeZone(TimeZoneName),
    /// A time that differs by a number of seconds.
    Variable {
        /// How much the clock is ahead.
        adjustment_seconds: i64,
        /// Of what.
        basis: ClockBasis,
    },
}

/// What the timer chip does with ticks the guest was too slow to take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TickPolicy {
    /// Delivers them later.
    #[default]
    Delay,
    /// Drops them.
    Discard,
}

/// The guest's clocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClockConfig {
    /// What the real-time clock shows when the machine starts.
    pub offset: ClockOffset,
    /// Whether the guest is offered KVM's paravirtual clock.
    pub kvmclock: bool,
    /// What the timer chip (i8254) does with late ticks.
    pub pit: TickPolicy,
}

impl Default for ClockConfig {
    fn default() -> Self {
        ClockConfig {
            offset: ClockOffset::default(),
            kvmclock: true,
            pit: TickPolicy::default(),
        }
    }
}
