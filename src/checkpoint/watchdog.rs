//! The pause lease: the guest never stays paused because of an engine that is dead or stuck.
//!
//! Whoever pauses the guest holds a lease and shows signs of life while the pause makes progress.
//! The watchdog takes the lease away when they stop: it resumes the guest by itself and fails the
//! checkpoint. It does so as well when the pause as a whole becomes longer than the caller allowed.
//! A lease is ended once, by its holder or by the watchdog, so that every pause is
//! followed by exactly one resume.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::job::JobShared;
use crate::guest::{Guest, PauseTiming};
use crate::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};

const IDLE: u8 = 0;
const HELD: u8 = 1;
const REVOKED: u8 = 2;

/// The shortest wait of the watchdog, so that it never spins.
const LOOK_MIN: Duration = Duration::from_millis(1);

/// The right to keep the guest paused.
pub(crate) struct PauseLease {
    guest: Arc<dyn Guest>,
    job: Arc<JobShared>,
    limit: Duration,
    /// The longest pause, whatever it does; `None` for any.
    longest: Option<Duration>,
    state: AtomicU8,
    base: Instant,
    /// Microseconds from `base` to the last sign of life.
    beat_us: AtomicU64,
    /// Microseconds from `base` to the beginning of the pause.
    paused_us: AtomicU64,
    watch: Mutex<Watch>,
    changed: Condvar,
}

/// What the session tells the watchdog. Never locked by the data plane.
struct Watch {
    waiting: &'static str,
    session_ended: bool,
}

impl PauseLease {
    /// `limit` is for silence, `longest` for the pause as a whole.
    pub(crate) fn new(
        guest: Arc<dyn Guest>,
        job: Arc<JobShared>,
        limit: Duration,
        longest: Option<Duration>,
    ) -> Self {
        Self {
            guest,
            job,
            limit,
            longest,
            state: AtomicU8::new(IDLE),
            base: Instant::now(),
            beat_us: AtomicU64::new(0),
            paused_us: AtomicU64::new(0),
            watch: Mutex::new(Watch {
                waiting: "",
                session_ended: false,
            }),
            changed: Condvar::new(),
        }
    }

    /// Pauses the guest, and resumes it again when the returned value is dropped.
    pub(crate) fn pause(self: &Arc<Self>) -> Result<Pause, Halt> {
        let started = Instant::now();
        self.paused_us.store(self.now_us(), Ordering::Relaxed);
        let timing = self
            .guest
            .pause()
            .map_err(CheckpointError::guest("pause the guest"))?;
        self.beat();
        self.state.store(HELD, Ordering::Release);
        let pause = Pause {
            lease: self.clone(),
            timing,
            started,
            ended: false,
        };
        // Under the lock, so that the watchdog is either before its look or in its wait.
        drop(self.lock());
        self.changed.notify_all();
        self.job.control.check()?;
        Ok(pause)
    }

    /// Shows a sign of life: something of the pause's work was done.
    pub(crate) fn beat(&self) {
        self.beat_us.fetch_max(self.now_us(), Ordering::Relaxed);
    }

    /// Shows a sign of life, and says what the pause waits for from now on.
    pub(crate) fn beat_before(&self, waiting: &'static str) {
        self.lock().waiting = waiting;
        self.beat();
    }

    /// Ends the watch: the session pauses nothing any more.
    pub(crate) fn end_watch(&self) {
        self.lock().session_ended = true;
        self.changed.notify_all();
    }

    /// The watchdog's thread; ends with the session.
    pub(crate) fn watch(&self) {
        let mut watch = self.lock();
        while !watch.session_ended {
            watch = match self.state.load(Ordering::Acquire) {
                IDLE => self
                    .changed
                    .wait(watch)
                    .unwrap_or_else(PoisonError::into_inner),
                HELD => match self.time_left() {
                    Some(rest) => self.wait(watch, rest.max(LOOK_MIN)),
                    None => {
                        let waiting = watch.waiting;
                        drop(watch);
                        self.revoke(waiting);
                        self.wait(self.lock(), self.limit)
                    }
                },
                // Revoked a limit ago, and the session has not ended: it is stuck itself.
                _ => {
                    drop(watch);
                    self.end_for_the_session();
                    return;
                }
            };
        }
    }

    fn wait<'a>(&self, watch: MutexGuard<'a, Watch>, time: Duration) -> MutexGuard<'a, Watch> {
        self.changed
            .wait_timeout_while(watch, time, |watch| !watch.session_ended)
            .unwrap_or_else(PoisonError::into_inner)
            .0
    }

    /// Returns how long the pause may go on without a sign of life; `None` where it must end.
    fn time_left(&self) -> Option<Duration> {
        let since = |us: &AtomicU64| {
            let then = us.load(Ordering::Relaxed);
            Duration::from_micros(self.now_us().saturating_sub(then))
        };
        let silence = self.limit.checked_sub(since(&self.beat_us));
        let whole = match self.longest {
            Some(longest) => longest.checked_sub(since(&self.paused_us)),
            None => Some(Duration::MAX),
        };
        Some(silence?.min(whole?)).filter(|left| !left.is_zero())
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.base.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    /// Resumes the guest first, and only then does anything else.
    fn revoke(&self, waiting: &'static str) {
        if self.end(REVOKED) {
            let paused = self.now_us() - self.paused_us.load(Ordering::Relaxed);
            let too_long = self
                .longest
                .filter(|longest| paused >= u64::try_from(longest.as_micros()).unwrap_or(u64::MAX));
            let limit = too_long.unwrap_or(self.limit);
            let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
            self.job.control.fail(if too_long.is_some() {
                CheckpointError::DowntimeExceeded { limit_ms, waiting }
            } else {
                CheckpointError::PauseExpired { limit_ms, waiting }
            });
        }
    }

    /// Does what a session that hangs inside the guest's own code cannot do any more.
    fn end_for_the_session(&self) {
        if let Err(error) = self.guest.dirty_log().stop() {
            log::error!("could not end the dirty log of an abandoned checkpoint: {error}");
        }
        let reason = self.job.control.reason();
        let reason = reason.expect("a lease is revoked with a reason");
        self.job.finish(Err(reason), false);
    }

    /// Ends the lease and resumes the guest, unless somebody else did.
    fn end(&self, next: u8) -> bool {
        let ours = self
            .state
            .compare_exchange(HELD, next, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if ours {
            self.guest.resume();
        }
        ours
    }

    fn lock(&self) -> MutexGuard<'_, Watch> {
        self.watch.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A pause of the guest, ended by a drop at the latest: also by one that a panic causes.
pub(crate) struct Pause {
    lease: Arc<PauseLease>,
    /// How long its beginning took.
    pub(crate) timing: PauseTiming,
    /// Just before the first kick.
    pub(crate) started: Instant,
    ended: bool,
}

impl Pause {
    /// Resumes the guest. Fails where the watchdog did before: whatever was captured since is not
    /// of one moment.
    pub(crate) fn end(mut self) -> Result<(), Halt> {
        self.ended = true;
        if self.lease.end(IDLE) {
            Ok(())
        } else {
            Err(Halt::Stopped)
        }
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        if !self.ended {
            self.lease.end(IDLE);
        }
    }
}
