//! A checkpoint ends once, in the same way for everybody who waits, polls or listens.
//!
//! Each of these makes a model here fail: an outcome that is set without the lock, or over another;
//! a listener that is added after a look at the outcome rather than under the lock of that look; an
//! end that wakes nobody, or wakes before the outcome is there; a session that every waiter joins.

use std::sync::Arc;
use std::sync::Mutex as Plain;

use loom::thread;

use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::real_job::{Job, JobShared};
use crate::sys::event::Event;

fn job() -> Job {
    let shared = JobShared::new(4096).unwrap();
    Job {
        shared: Arc::new(shared),
    }
}

fn finish(job: &Job, error: CheckpointError, session_ends: bool) {
    job.shared.finish(Err(error), session_ends);
}

fn was_cancelled(job: &Job) -> bool {
    job.wait().unwrap_err().is_cancelled()
}

/// The session and its watchdog end a checkpoint at the same time.
pub(crate) fn the_first_end_counts_for_everybody() {
    let job = job();
    let event = Event::last();
    let told = Arc::new(Plain::new(Vec::new()));
    let by_watchdog = job.clone();
    let watchdog = thread::spawn(move || finish(&by_watchdog, CheckpointError::Busy, false));
    let by_session = job.clone();
    let session = thread::spawn(move || finish(&by_session, CheckpointError::Cancelled, false));
    let listener = told.clone();
    job.when_ended(move |error| {
        let cancelled = error.unwrap().is_cancelled();
        listener.lock().unwrap().push(cancelled);
    });
    let cancelled = was_cancelled(&job);
    watchdog.join().unwrap();
    session.join().unwrap();
    assert!(event.is_set(), "who polls hears of it");
    assert_eq!(*told.lock().unwrap(), [cancelled], "who listens hears once");
    assert_eq!(was_cancelled(&job), cancelled, "and no later end counts");
}

/// Two wait, while the session ends whose thread one of them joins.
pub(crate) fn the_sessions_thread_is_joined_by_one_who_waits() {
    let job = job();
    drop(Event::last());
    let ended = job.clone();
    let session = thread::spawn(move || finish(&ended, CheckpointError::Busy, true));
    job.shared.set_session(session);
    let other = job.clone();
    let waits = thread::spawn(move || assert!(!was_cancelled(&other)));
    assert!(!was_cancelled(&job));
    waits.join().unwrap();
}

/// A descriptor that is readable means an outcome that is there.
pub(crate) fn who_is_woken_by_the_descriptor_finds_the_outcome() {
    let job = job();
    let event = Event::last();
    let ended = job.clone();
    let session = thread::spawn(move || finish(&ended, CheckpointError::Busy, false));
    if event.is_set() {
        assert!(job.is_finished());
    }
    session.join().unwrap();
}
