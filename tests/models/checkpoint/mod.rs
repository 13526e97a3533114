//! The engine: the real files of what is modelled, and what little else they need.

#[path = "../../../src/checkpoint/capture/mod.rs"]
pub(crate) mod capture;
#[path = "../../../src/checkpoint/commit.rs"]
pub(crate) mod commit;
#[path = "../../../src/checkpoint/control.rs"]
pub(crate) mod control;
#[path = "../../../src/checkpoint/error.rs"]
pub(crate) mod error;
#[path = "../../../src/checkpoint/layout.rs"]
pub(crate) mod layout;
#[path = "../../../src/checkpoint/phase.rs"]
pub(crate) mod phase;
#[path = "../../../src/checkpoint/job.rs"]
pub(crate) mod real_job;
#[path = "../../../src/checkpoint/tracker/mod.rs"]
pub(crate) mod tracker;
#[path = "../../../src/checkpoint/watchdog.rs"]
pub(crate) mod watchdog;
#[path = "../../../src/checkpoint/writer/mod.rs"]
pub(crate) mod writer;

pub(crate) mod commit_point;
pub(crate) mod completion;
pub(crate) mod cow;
pub(crate) mod last_set;
pub(crate) mod lease;
pub(crate) mod pool;
pub(crate) mod tracking;

pub(crate) mod crew {
    use super::error::{CheckpointError, Halt};

    type Work = Box<dyn FnOnce() -> Result<(), Halt> + Send>;

    /// Threads that are still to be started, by the model.
    #[derive(Default)]
    pub(crate) struct Crew(Vec<Work>);

    impl Crew {
        pub(crate) fn spawn_polite(
            &mut self,
            _name: &str,
            work: impl FnOnce() -> Result<(), Halt> + Send + 'static,
        ) -> Result<(), CheckpointError> {
            self.0.push(Box::new(work));
            Ok(())
        }

        /// Takes the work of the thread that was spawned last.
        pub(crate) fn take(&mut self) -> Work {
            self.0.pop().unwrap()
        }
    }
}

pub(crate) mod job {
    use std::sync::Arc;
    use std::sync::Mutex as Plain;

    use super::control::Control;
    use super::error::CheckpointError;

    /// A job that notes how it was ended. The real one is [`super::real_job`].
    pub(crate) struct JobShared {
        pub(crate) control: Arc<Control>,
        pub(crate) ends: Plain<Vec<CheckpointError>>,
    }

    impl JobShared {
        pub(crate) fn finish(&self, outcome: Result<(), CheckpointError>, _session_ends: bool) {
            self.ends.lock().unwrap().extend(outcome.err());
        }
    }
}

pub(crate) mod stats {
    use std::time::Duration;

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct WriteStatistics {
        pub(crate) pages: u64,
        pub(crate) zero_pages: u64,
        pub(crate) duplicate_pages: u64,
        pub(crate) raw_bytes: u64,
        pub(crate) stored_bytes: u64,
    }

    /// For errors that no model makes.
    #[derive(Debug)]
    pub(crate) struct Statistics {
        pub(crate) rounds: Vec<Round>,
        pub(crate) round_count: u64,
    }

    #[derive(Debug)]
    pub(crate) struct Round {
        pub(crate) dirty_pages_per_s: u64,
    }

    pub(crate) fn micros(duration: Duration) -> u64 {
        u64::try_from(duration.as_micros()).unwrap()
    }
}

/// For the imports of unit tests that are not run here.
pub(crate) mod fake {
    pub(crate) struct FakeGuest;
}
