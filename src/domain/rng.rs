//! Sources of random numbers.

use super::error::ValueError;

/// Milliseconds of a period that the document does not give, as in libvirt.
pub const RNG_PERIOD_MS: u32 = 1000;

/// A device of the host that random numbers come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RngSource {
    /// `/dev/urandom`.
    #[default]
    Urandom,
    /// `/dev/random`.
    Random,
}

impl RngSource {
    /// Returns its path.
    pub fn path(self) -> &'static str {
        match self {
            RngSource::Urandom => "/dev/urandom",
            RngSource::Random => "/dev/random",
        }
    }
}

/// How many random numbers a guest may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RngRate {
    bytes: u32,
    period_ms: u32,
}

impl RngRate {
    /// Makes a rate of so many bytes in each period.
    ///
    /// # Errors
    ///
    /// One of them is 0.
    pub fn new(bytes: u32, period_ms: u32) -> Result<Self, ValueError> {
        if bytes == 0 || period_ms == 0 {
            return Err(ValueError::new("0", "at least 1"));
        }
        Ok(RngRate { bytes, period_ms })
    }

    /// Returns how many bytes.
    pub fn bytes(self) -> u32 {
        self.bytes
    }

    /// Returns in how many milliseconds.
    pub fn period_ms(self) -> u32 {
        self.period_ms
    }
}

/// A source of random numbers, as a virtio device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rng {
    /// Where they come from.
    pub source: RngSource,
    /// How many there are; `None`: as many as the guest wants.
    pub rate: Option<RngRate>,
}
