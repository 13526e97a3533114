//! Every pause is followed by exactly one resume, whoever ends it.
//!
//! The limit is zero, so that the watchdog ends a pause as soon as it sees one. Each of these
//! makes a model here fail: ending the lease without the compare-and-swap, or not at all in a
//! drop; telling the holder that all is well where the watchdog was first; a pause that does not
//! take the lock before it wakes the watchdog, or does not wake it.

use std::sync::Arc;
use std::sync::Mutex as Plain;
use std::sync::atomic::Ordering;
use std::time::Duration;

use loom::thread;

use crate::checkpoint::control::Control;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::job::JobShared;
use crate::checkpoint::watchdog::PauseLease;
use crate::world::ModelGuest;

struct Watched {
    guest: Arc<ModelGuest>,
    job: Arc<JobShared>,
    lease: Arc<PauseLease>,
    watchdog: thread::JoinHandle<()>,
}

impl Watched {
    fn new() -> Self {
        let guest = ModelGuest::new(1);
        let job = Arc::new(JobShared {
            control: Arc::new(Control::new()),
            ends: Plain::default(),
        });
        let lease = PauseLease::new(guest.clone(), job.clone(), Duration::ZERO, None);
        let lease = Arc::new(lease);
        let watch = lease.clone();
        let watchdog = thread::spawn(move || watch.watch());
        Self {
            guest,
            job,
            lease,
            watchdog,
        }
    }

    /// Ends the session, whose pause ended well or not.
    fn end(self, ended_well: bool) {
        self.lease.end_watch();
        self.watchdog.join().unwrap();
        assert_eq!(self.guest.resumes.load(Ordering::Relaxed), 1);
        self.guest.wait_for_resume();
        let reason = self.job.control.reason();
        let expired = matches!(reason, Some(CheckpointError::PauseExpired { .. }));
        assert_eq!(ended_well, !expired, "the holder was told wrong");
        assert!(self.job.ends.lock().unwrap().len() <= 1);
    }
}

pub(crate) fn a_pause_is_ended_once() {
    let watched = Watched::new();
    let ended = match watched.lease.pause() {
        Ok(pause) => pause.end().is_ok(),
        // The watchdog was so quick that the pause was over when it began.
        Err(Halt::Stopped) => false,
        Err(halt) => panic!("{halt:?}"),
    };
    watched.end(ended);
}

/// A panic drops the pause.
pub(crate) fn a_pause_that_is_dropped_is_ended_once() {
    let watched = Watched::new();
    drop(watched.lease.pause());
    watched.lease.end_watch();
    watched.watchdog.join().unwrap();
    assert_eq!(watched.guest.resumes.load(Ordering::Relaxed), 1);
}

/// The session hangs in its pause. The watchdog sees it, whatever the two were just doing, and
/// ends the job in its place.
pub(crate) fn a_session_that_hangs_is_resumed() {
    let watched = Watched::new();
    let pause = watched.lease.pause();
    watched.guest.wait_for_resume();
    if let Ok(pause) = pause {
        assert!(pause.end().is_err());
    }
    watched.watchdog.join().unwrap();
    assert_eq!(watched.guest.resumes.load(Ordering::Relaxed), 1);
    assert_eq!(watched.guest.log_stops(), 1);
    let ends = watched.job.ends.lock().unwrap();
    assert!(matches!(ends[..], [CheckpointError::PauseExpired { .. }]));
}
