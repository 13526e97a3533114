//! Nobody waits long for a piece, whatever becomes of the threads that should capture it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::capture::CopyOnWrite;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::stats::micros;

/// How often the watch looks.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};

const IDLE: u64 = 0;

/// Watches over the fault handlers: where a writer waits too long, it lets all of them go and
/// fails the checkpoint.
pub(super) struct StallWatch {
    cow: Arc<CopyOnWrite>,
    limit: Duration,
    base: Instant,
    /// By handler: microseconds from `base` to the begin of what it does now.
    busy_since: Box<[AtomicU64]>,
    served: AtomicU64,
}

impl StallWatch {
    /// `pause_limit` is how long a guest may be held up at all: three quarters of it are for the
    /// stall, the rest for noticing it.
    pub(super) fn new(cow: Arc<CopyOnWrite>, handlers: usize, pause_limit: Duration) -> Self {
        Self {
            cow,
            limit: pause_limit / 4 * 3,
            base: Instant::now(),
            busy_since: (0..handlers).map(|_| AtomicU64::new(IDLE)).collect(),
            served: AtomicU64::new(0),
        }
    }

    /// A handler begins to serve faults.
    pub(super) fn begin(&self, handler: usize) {
        let now = micros(self.base.elapsed()).max(1);
        self.busy_since[handler].store(now, Ordering::Relaxed);
    }

    /// A handler has served one writer and goes on with the next.
    pub(super) fn served(&self, handler: usize) {
        self.served.fetch_add(1, Ordering::Relaxed);
        self.begin(handler);
    }

    /// A handler has served all that it was told.
    pub(super) fn end(&self, handler: usize) {
        self.busy_since[handler].store(IDLE, Ordering::Relaxed);
    }

    /// Watches until memory is released, or the checkpoint is stopped.
    pub(super) fn run(&self) {
        let mut unread_since: Option<(Instant, u64)> = None;
        loop {
            let mut fds = [
                PollFd::new(self.cow.wake_up(), PollFlags::IN),
                PollFd::new(self.cow.protection().userfault(), PollFlags::IN),
            ];
            // The first alone: the other is looked at, not waited for.
            poll(&mut fds[..1], Some(&LOOK)).ok();
            if self.cow.is_released() {
                return;
            }
            if self.cow.control().check().is_err() {
                self.cow.protection().end();
                return;
            }
            poll(&mut fds[1..], Some(&Timespec::default())).ok();
            let served = self.served.load(Ordering::Relaxed);
            let unread = fds[1].revents().contains(PollFlags::IN);
            unread_since = match unread_since {
                Some((since, before)) if unread && before == served => Some((since, before)),
                _ => unread.then(|| (Instant::now(), served)),
            };
            let unread_too_long =
                unread_since.is_some_and(|(since, _)| since.elapsed() > self.limit);
            if unread_too_long || self.longest() > self.limit {
                self.expire();
                return;
            }
        }
    }

    /// Returns how long the writer waits whom a handler is serving.
    fn longest(&self) -> Duration {
        let now = micros(self.base.elapsed());
        let busy = self
            .busy_since
            .iter()
            .map(|since| since.load(Ordering::Relaxed));
        let longest = busy
            .filter(|&since| since != IDLE)
            .map(|since| now.saturating_sub(since))
            .max();
        Duration::from_micros(longest.unwrap_or(0))
    }

    /// Lets everybody go first, and only then does anything else.
    fn expire(&self) {
        self.cow.protection().end();
        self.cow.control().fail(CheckpointError::StallExpired {
            limit_ms: micros(self.limit) / 1000,
        });
    }
}
