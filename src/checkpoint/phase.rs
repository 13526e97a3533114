//! How far a checkpoint is.

use std::fmt;

use serde::Serialize;

/// A checkpoint's phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Phase {
    /// Buffers are made and the image is begun; nothing of the guest is touched.
    Starting,
    /// Memory is captured while the guest runs.
    Live,
    /// The guest is being paused, or is paused.
    Pausing,
    /// The guest runs; captured pages go to the image.
    Draining,
    /// The image is synced and made visible.
    Committing,
    /// The image is whole.
    Done,
    /// The checkpoint failed; there is no image.
    Failed,
    /// The caller cancelled; there is no image.
    Cancelled,
}

impl Phase {
    /// Returns whether nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    /// Returns `next` if a checkpoint may go there from here.
    pub(crate) fn transition(self, next: Self) -> Result<Self, IllegalTransition> {
        use Phase::{Cancelled, Committing, Done, Draining, Failed, Live, Pausing, Starting};
        let legal = match (self, next) {
            (Starting, Live | Pausing)
            | (Live, Pausing)
            | (Pausing, Draining)
            | (Draining, Committing)
            | (Committing, Done) => true,
            (from, Failed | Cancelled) => !from.is_final(),
            _ => false,
        };
        if legal {
            Ok(next)
        } else {
            Err(IllegalTransition { from: self, next })
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Starting => "starting",
            Self::Live => "live",
            Self::Pausing => "pausing",
            Self::Draining => "draining",
            Self::Committing => "committing",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        })
    }
}

/// A step that no checkpoint makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IllegalTransition {
    pub(crate) from: Phase,
    pub(crate) next: Phase,
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Phase; 8] = [
        Phase::Starting,
        Phase::Live,
        Phase::Pausing,
        Phase::Draining,
        Phase::Committing,
        Phase::Done,
        Phase::Failed,
        Phase::Cancelled,
    ];

    #[test]
    fn nothing_follows_a_final_phase_and_nothing_skips_the_commit() {
        for next in ALL {
            for last in ALL.into_iter().filter(|phase| phase.is_final()) {
                assert!(last.transition(next).is_err(), "{last} to {next}");
            }
        }
        let before_done: Vec<_> = ALL
            .into_iter()
            .filter(|phase| phase.transition(Phase::Done).is_ok())
            .collect();
        assert_eq!(before_done, [Phase::Committing]);
    }

    #[test]
    fn every_phase_that_is_not_final_may_fail_or_be_cancelled() {
        for from in ALL.into_iter().filter(|phase| !phase.is_final()) {
            assert!(from.transition(Phase::Failed).is_ok());
            assert!(from.transition(Phase::Cancelled).is_ok());
            assert!(from.transition(from).is_err());
        }
    }
}
