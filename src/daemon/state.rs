//! States of domains and the reasons for them, by libvirt's numbers.

use serde::{Deserialize, Serialize};

use crate::rpc::Event;

/// Why a domain runs (`virDomainRunningReason`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(i32)]
pub(super) enum Running {
    Unknown = 0,
    Booted = 1,
    Restored = 3,
    FromSnapshot = 4,
    Unpaused = 5,
    SaveCanceled = 7,
}

/// Why a domain is paused (`virDomainPausedReason`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Paused {
    User = 1,
    Save = 3,
    Dump = 4,
    FromSnapshot = 7,
}

/// Why a domain does not run (`virDomainShutoffReason`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub(super) enum Shutoff {
    Unknown = 0,
    Shutdown = 1,
    Destroyed = 2,
    Crashed = 3,
    Saved = 5,
    Failed = 6,
    FromSnapshot = 7,
}

/// What a domain is doing, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunState {
    Running(Running),
    Paused(Paused),
    Shutoff(Shutoff),
}

impl RunState {
    /// Returns the numbers of the state and of the reason.
    pub(super) fn numbers(self) -> (i32, i32) {
        match self {
            Self::Running(reason) => (1, reason as i32),
            Self::Paused(reason) => (3, reason as i32),
            Self::Shutoff(reason) => (5, reason as i32),
        }
    }

    pub(super) fn is_paused(self) -> bool {
        matches!(self, Self::Paused(_))
    }

    /// Returns the word of snapshot documents.
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Running(_) => "running",
            Self::Paused(_) => "paused",
            Self::Shutoff(_) => "shutoff",
        }
    }
}

/// A lifecycle event: its number, and the detail's.
const fn lifecycle(event: i32, detail: i32) -> Event {
    Event::Lifecycle { event, detail }
}

pub(super) const DEFINED_ADDED: Event = lifecycle(0, 0);
pub(super) const DEFINED_UPDATED: Event = lifecycle(0, 1);
pub(super) const DEFINED_RENAMED: Event = lifecycle(0, 2);
pub(super) const UNDEFINED_REMOVED: Event = lifecycle(1, 0);
pub(super) const UNDEFINED_RENAMED: Event = lifecycle(1, 1);
pub(super) const SHUTDOWN_GUEST: Event = lifecycle(6, 1);
pub(super) const CRASHED_PANICKED: Event = lifecycle(8, 0);

/// The event of a start.
pub(super) fn started(why: Running) -> Event {
    lifecycle(
        2,
        match why {
            Running::Restored => 2,
            Running::FromSnapshot => 3,
            _ => 0,
        },
    )
}

/// The event of a pause.
pub(super) fn suspended(why: Paused) -> Event {
    lifecycle(
        3,
        match why {
            Paused::FromSnapshot => 5,
            _ => 0,
        },
    )
}

/// The event of a resume.
pub(super) fn resumed(why: Running) -> Event {
    lifecycle(
        4,
        match why {
            Running::FromSnapshot => 2,
            _ => 0,
        },
    )
}

/// The event of an end.
pub(super) fn stopped(why: Shutoff) -> Event {
    lifecycle(
        5,
        match why {
            Shutoff::Shutdown | Shutoff::Unknown => 0,
            Shutoff::Destroyed => 1,
            Shutoff::Crashed => 2,
            Shutoff::Saved => 4,
            Shutoff::Failed => 5,
            Shutoff::FromSnapshot => 6,
        },
    )
}
