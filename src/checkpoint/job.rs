//! The caller's handle on a running checkpoint.

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::checkpoint::control::Control;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::phase::Phase;
use crate::checkpoint::stats::Statistics;
use crate::page::PAGE_BYTES;
use crate::store::CommittedImage;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::thread::JoinHandle;
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::sys::event::Event;

/// A checkpoint that was taken.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Report {
    /// The image.
    pub image: CommittedImage,
    /// What it cost.
    pub statistics: Arc<Statistics>,
}

/// How far a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Progress {
    /// Its phase.
    pub phase: Phase,
    /// Bytes of memory that the scan is done with.
    pub scanned_bytes: u64,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Bytes that still wait in the staging table, once the guest runs again.
    pub staged_bytes: u64,
    /// Bytes of the image so far.
    pub written_bytes: u64,
    /// Time since the start.
    pub elapsed: Duration,
    /// Time that the rest of the scan will take at its pace so far; `None` before it has one and
    /// after the scan.
    pub eta: Option<Duration>,
}

/// A running or finished checkpoint.
///
/// Clones name the same checkpoint. Dropping them all neither stops it nor waits for it: it goes
/// on to its end and its result is lost, except for the image. To stop it, [`Job::cancel`] it.
///
/// The file descriptor ([`AsFd`]) becomes readable when the checkpoint ends and stays so; do not
/// read from it. All methods may be called from any thread.
#[derive(Clone)]
pub struct Job {
    pub(crate) shared: Arc<JobShared>,
}

pub(crate) struct JobShared {
    pub(crate) control: Arc<Control>,
    memory_bytes: u64,
    state: Mutex<State>,
    changed: Condvar,
    event: Event,
}

/// What is done once when a checkpoint has ended, with its error.
type EndListener = Box<dyn FnOnce(Option<CheckpointError>) + Send>;

struct State {
    phase: Phase,
    listeners: Vec<EndListener>,
    outcome: Option<Result<Report, CheckpointError>>,
    /// Taken by whoever waits first after the session said that it is about to end.
    session: Option<JoinHandle<()>>,
    session_ends: bool,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job")
            .field("phase", &self.shared.lock().phase)
            .finish_non_exhaustive()
    }
}

impl AsFd for Job {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }
}

impl Job {
    /// Returns how far the checkpoint is. Does not block.
    pub fn progress(&self) -> Progress {
        let control = &self.shared.control;
        let pages = |counter: &AtomicU64| counter.load(Ordering::Relaxed) * PAGE_BYTES as u64;
        let phase = self.shared.lock().phase;
        let scanned_bytes = pages(&control.pages_scanned);
        let elapsed = control.started.elapsed();
        Progress {
            phase,
            scanned_bytes,
            memory_bytes: self.shared.memory_bytes,
            staged_bytes: pages(&control.pages_to_drain)
                .saturating_sub(pages(&control.pages_drained)),
            written_bytes: control.bytes_written.load(Ordering::Relaxed),
            elapsed,
            eta: eta(elapsed, scanned_bytes, self.shared.memory_bytes),
        }
    }

    /// Asks the checkpoint to end without an image; the guest runs on. Returns false where the
    /// image is already whole, or the checkpoint has ended: it then ends as if not asked.
    ///
    /// Does not block. The job ends within 100 ms, also in the pause and with storage that does
    /// not answer; only the guest's own `pause` and the end of its dirty log (about 20 ms per GiB
    /// of memory, while the guest runs) may make it longer.
    pub fn cancel(&self) -> bool {
        !self.is_finished() && self.shared.control.cancel()
    }

    /// Returns whether the checkpoint has ended.
    pub fn is_finished(&self) -> bool {
        self.shared.lock().outcome.is_some()
    }

    /// Waits for the end and returns the result; every caller gets it.
    pub fn wait(&self) -> Result<Report, CheckpointError> {
        let state = self.shared.lock();
        let state = self
            .shared
            .changed
            .wait_while(state, |state| state.outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        finished(state).expect("waited for it")
    }

    /// Has `listener` called with the error, if any, when the checkpoint has ended: by the thread
    /// that ends it, or at once where it has. It must neither block nor wait for this job.
    pub fn when_ended(&self, listener: impl FnOnce(Option<CheckpointError>) + Send + 'static) {
        let mut state = self.shared.lock();
        let Some(outcome) = &state.outcome else {
            state.listeners.push(Box::new(listener));
            return;
        };
        let error = outcome.as_ref().err().cloned();
        drop(state);
        listener(error);
    }

    /// Waits for the end, but no longer than `timeout`; `None` where it has not come by then.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Result<Report, CheckpointError>> {
        let state = self.shared.lock();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, timeout, |state| state.outcome.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        finished(state)
    }
}

/// Returns the outcome, after joining the session's thread if it is about to end.
fn finished(mut state: MutexGuard<'_, State>) -> Option<Result<Report, CheckpointError>> {
    let outcome = state.outcome.clone()?;
    let ends = state.session_ends;
    let session = state.session.take_if(|_| ends);
    drop(state);
    if let Some(session) = session {
        // Its panics were caught inside.
        session.join().ok();
    }
    Some(outcome)
}

fn eta(elapsed: Duration, done: u64, all: u64) -> Option<Duration> {
    /// Part of memory that must be scanned before its pace means anything.
    const PACE_PARTS: u64 = 100;
    if done >= all || done < all / PACE_PARTS || done == 0 {
        return None;
    }
    let left = u128::from(all - done);
    let ns = elapsed.as_nanos() * left / u128::from(done);
    u64::try_from(ns).ok().map(Duration::from_nanos)
}

impl JobShared {
    pub(crate) fn new(memory_bytes: u64) -> Result<Self, CheckpointError> {
        let event = Event::new().map_err(CheckpointError::resource("an eventfd"))?;
        Ok(Self {
            control: Arc::new(Control::new()),
            memory_bytes,
            state: Mutex::new(State {
                phase: Phase::Starting,
                listeners: Vec::new(),
                outcome: None,
                session: None,
                session_ends: false,
            }),
            changed: Condvar::new(),
            event,
        })
    }

    /// Keeps the session's thread, for the first waiter to join.
    pub(crate) fn set_session(&self, session: JoinHandle<()>) {
        self.lock().session = Some(session);
    }

    /// Goes on to `phase`; stops where the checkpoint has been ended meanwhile.
    pub(crate) fn enter(&self, phase: Phase) -> Result<(), Halt> {
        let mut state = self.lock();
        match state.phase.transition(phase) {
            Ok(next) => {
                state.phase = next;
                log::debug!("checkpoint is {next}");
                Ok(())
            }
            Err(illegal) => {
                assert!(
                    illegal.from.is_final(),
                    "no checkpoint goes from {} to {}",
                    illegal.from,
                    illegal.next
                );
                Err(Halt::Stopped)
            }
        }
    }

    /// Ends the job; later outcomes are ignored. `session_ends` where the caller is the session's
    /// thread, with nothing left to do.
    pub(crate) fn finish(&self, outcome: Result<Report, CheckpointError>, session_ends: bool) {
        let mut state = self.lock();
        state.session_ends |= session_ends;
        if state.outcome.is_some() {
            return;
        }
        let last = match &outcome {
            Ok(_) => Phase::Done,
            Err(error) if error.is_cancelled() => Phase::Cancelled,
            Err(_) => Phase::Failed,
        };
        state.phase = state
            .phase
            .transition(last)
            .expect("only the commit ends in success, and nothing ends twice");
        let error = outcome.as_ref().err().cloned();
        state.outcome = Some(outcome);
        let listeners = std::mem::take(&mut state.listeners);
        drop(state);
        self.changed.notify_all();
        self.event.set();
        for listener in listeners {
            listener(error.clone());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Plain values, never left half-changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_follows_the_pace_of_the_scan() {
        let second = Duration::from_secs(1);
        assert_eq!(eta(second, 25, 100), Some(3 * second));
        assert_eq!(eta(second, 0, 100), None);
        assert_eq!(eta(second, 100, 100), None);
        assert_eq!(eta(second, 1, 1000), None);
    }

    #[test]
    fn the_first_outcome_counts_and_the_descriptor_becomes_readable() {
        let job = Job {
            shared: Arc::new(JobShared::new(4096).unwrap()),
        };
        let readable = || {
            let mut fds = [rustix::event::PollFd::new(
                &job,
                rustix::event::PollFlags::IN,
            )];
            rustix::event::poll(&mut fds, Some(&rustix::event::Timespec::default())).unwrap() == 1
        };
        assert!(!readable());
        assert!(job.wait_timeout(Duration::ZERO).is_none());
        let told = Arc::new(AtomicU64::new(0));
        let tell = |number: u64| {
            let told = told.clone();
            move |error: Option<CheckpointError>| {
                assert!(matches!(error, Some(CheckpointError::Busy)));
                told.fetch_add(number, Ordering::Relaxed);
            }
        };
        job.when_ended(tell(1));
        assert_eq!(told.load(Ordering::Relaxed), 0);
        job.shared.finish(Err(CheckpointError::Busy), false);
        job.shared.finish(Err(CheckpointError::Cancelled), true);
        assert_eq!(told.load(Ordering::Relaxed), 1, "told once");
        job.when_ended(tell(10));
        assert_eq!(told.load(Ordering::Relaxed), 11, "and a late one at once");
        assert!(readable());
        assert!(matches!(job.wait(), Err(CheckpointError::Busy)));
        assert_eq!(job.progress().phase, Phase::Failed);
        assert!(!job.cancel());
        assert!(matches!(job.shared.enter(Phase::Live), Err(Halt::Stopped)));
    }
}
