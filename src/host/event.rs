//! What happens to a running domain, for whoever watches it from another process.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::host::{Happening, MachineState, Notice, Watch, Watched};
use crate::machine::{self, MachineEvent, ShutoffReason};

/// A change of a domain's machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum DomainEvent {
    /// What it is doing now: the first one that is told.
    Now {
        /// The state.
        state: MachineState,
    },
    /// Its vCPUs were started.
    Started,
    /// It was started, and waits for a resume.
    StartedPaused,
    /// Its user paused it.
    Paused,
    /// Its user resumed it.
    Resumed,
    /// It starts over.
    Reset,
    /// It was put back to an image.
    Rewound,
    /// It has ended: the last one.
    Ended(FinalState),
}

/// How a machine has ended: what the worker leaves behind for a daemon that was not there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FinalState {
    /// In which way.
    pub ending: Ending,
    /// In words.
    pub why: String,
}

/// A way for a machine to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Ending {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset itself, and the machine ends on that.
    Reset,
    /// Its user ended it.
    Destroyed,
    /// The guest crashed.
    Crashed,
    /// The machine itself could not go on.
    Failed,
}

impl FinalState {
    /// Returns how a machine in `state` has ended, if it has.
    pub(super) fn of(state: &machine::MachineState) -> Option<Self> {
        match state {
            machine::MachineState::Shutoff { reason } => Some(reason.into()),
            machine::MachineState::Crashed { reason } => Some(Self::crashed(reason)),
            _ => None,
        }
    }

    pub(super) fn crashed(why: &str) -> Self {
        Self {
            ending: Ending::Crashed,
            why: why.to_owned(),
        }
    }
}

impl From<&ShutoffReason> for FinalState {
    fn from(reason: &ShutoffReason) -> Self {
        let ending = match reason {
            ShutoffReason::PoweredOff => Ending::PoweredOff,
            ShutoffReason::Reset => Ending::Reset,
            ShutoffReason::Destroyed => Ending::Destroyed,
            ShutoffReason::Crashed(_) => Ending::Crashed,
            ShutoffReason::Failed(_) => Ending::Failed,
        };
        Self {
            ending,
            why: reason.to_string(),
        }
    }
}

impl DomainEvent {
    /// Returns what those who watch from another process are told of a notice; `None` of a
    /// checkpoint, whose job tells.
    fn of(notice: Notice) -> Option<Self> {
        Some(match notice.what {
            Happening::Started if notice.state == MachineState::Paused => Self::StartedPaused,
            Happening::Started => Self::Started,
            Happening::Paused => Self::Paused,
            Happening::Resumed => Self::Resumed,
            Happening::Reset => Self::Reset,
            Happening::Rewound => Self::Rewound,
            Happening::Ended(end) => Self::Ended(end),
            Happening::CheckpointStarted { .. } | Happening::CheckpointEnded { .. } => return None,
        })
    }
}

impl Happening {
    /// Returns what an event of the machine is to the domain, and what the machine does since, if
    /// that is something else.
    pub(super) fn of(event: &MachineEvent) -> (Option<MachineState>, Self) {
        match event {
            MachineEvent::Started => (Some(MachineState::Running), Self::Started),
            MachineEvent::StartedPaused => (Some(MachineState::Paused), Self::Started),
            MachineEvent::Paused => (Some(MachineState::Paused), Self::Paused),
            MachineEvent::Resumed => (Some(MachineState::Running), Self::Resumed),
            MachineEvent::Reset => (None, Self::Reset),
            MachineEvent::Rewound => (None, Self::Rewound),
            MachineEvent::Shutoff(reason) => {
                let state = machine::MachineState::Shutoff {
                    reason: reason.clone(),
                };
                (Some((&state).into()), Self::Ended(reason.into()))
            }
            MachineEvent::Crashed(why) => (
                Some(MachineState::Crashed),
                Self::Ended(FinalState::crashed(why)),
            ),
        }
    }
}

/// The events of a domain from some moment on.
#[derive(Debug)]
pub struct DomainEvents(pub(super) Watch);

impl DomainEvents {
    /// Waits for the next event, but no longer than `timeout`. `None`: there is none yet.
    pub fn next(&self, timeout: Duration) -> Option<DomainEvent> {
        match self.0.next(Some(timeout)) {
            Watched::Notice(notice) => DomainEvent::of(notice),
            Watched::Nothing => None,
            // A domain that is gone without a word was taken apart.
            Watched::Over => Some(DomainEvent::Ended(FinalState {
                ending: Ending::Failed,
                why: "the machine is gone".to_owned(),
            })),
        }
    }
}
