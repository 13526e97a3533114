//! Who watches a domain in this process: every change of its machine, every end of a checkpoint.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::Duration;

use crate::host::{ErrorCode, FinalState, MachineState};
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use crate::sys::event::Event;

/// Notices that a watch keeps for its reader. A machine changes its state a few times in its life;
/// a guest that resets in a loop is what fills the queue.
pub const NOTICES_MAX: usize = 1024;

/// Something that happened to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    /// Counts what happened to the domain, from 1. A gap is what the reader was too slow for.
    pub number: u64,
    /// What the machine is doing since.
    pub state: MachineState,
    /// What happened.
    pub what: Happening,
}

/// What can happen to a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Happening {
    /// Its vCPUs were started, or it was made ready paused.
    Started,
    /// Its user paused it.
    Paused,
    /// Its user resumed it.
    Resumed,
    /// It starts over.
    Reset,
    /// It was put back to an image.
    Rewound,
    /// Its machine has ended.
    Ended(FinalState),
    /// A checkpoint has begun.
    CheckpointStarted {
        /// The job's number within the domain.
        job: u64,
    },
    /// A checkpoint has ended.
    CheckpointEnded {
        /// The job's number within the domain.
        job: u64,
        /// Why there is no image, where there is none.
        failure: Option<(ErrorCode, String)>,
    },
}

/// The watches of a domain.
#[derive(Debug)]
pub(super) struct Watchers(Mutex<Told>);

#[derive(Debug)]
struct Told {
    count: u64,
    state: MachineState,
    is_over: bool,
    queues: Vec<Arc<Queue>>,
}

impl Watchers {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Told {
            count: 0,
            state: MachineState::Created,
            is_over: false,
            queues: Vec::new(),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Told> {
        // Plain values, never left half-changed.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells everybody; `state` where the machine does something else since. What comes after the
    /// domain is over is told to nobody.
    pub(super) fn tell(&self, state: Option<MachineState>, what: Happening) {
        let mut told = self.lock();
        if told.is_over {
            return;
        }
        told.count += 1;
        told.state = state.unwrap_or(told.state);
        let notice = Notice {
            number: told.count,
            state: told.state,
            what,
        };
        told.queues.retain(|queue| queue.push(&notice));
    }

    /// Says that nothing more will happen.
    pub(super) fn end(&self) {
        let mut told = self.lock();
        told.is_over = true;
        for queue in told.queues.drain(..) {
            queue.end();
        }
    }

    /// Returns a watch for what happens from now on.
    pub(super) fn watch(&self) -> io::Result<Watch> {
        let queue = Arc::new(Queue::new()?);
        let mut told = self.lock();
        if told.is_over {
            queue.end();
        } else {
            told.queues.push(queue.clone());
        }
        Ok(Watch(queue))
    }
}

/// What a wait for a notice came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Watched {
    /// The next one.
    Notice(Notice),
    /// None came in time.
    Nothing,
    /// None comes any more: the domain is gone, or the watch was closed.
    Over,
}

/// The notices of a domain from some moment on. Every method may be called from any thread.
///
/// The file descriptor ([`AsFd`]) is readable while a notice waits, and when none comes any more;
/// do not read from it. Dropping a watch ends it.
#[derive(Debug)]
pub struct Watch(Arc<Queue>);

impl Watch {
    /// Takes the next notice; waits for it, but no longer than `timeout` if there is one.
    pub fn next(&self, timeout: Option<Duration>) -> Watched {
        self.0.next(timeout)
    }

    /// Ends the watch: waits for notices return at once, and what was not taken is gone.
    pub fn close(&self) {
        self.0.close();
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.readable.as_fd()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.close();
    }
}

/// The notices on their way to one reader.
#[derive(Debug)]
struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    /// Set exactly while a notice waits or the end has come: both change under the lock.
    readable: Event,
}

#[derive(Debug)]
struct Waiting {
    notices: VecDeque<Notice>,
    is_over: bool,
    is_closed: bool,
}

impl Queue {
    fn new() -> io::Result<Self> {
        Ok(Self {
            waiting: Mutex::new(Waiting {
                notices: VecDeque::new(),
                is_over: false,
                is_closed: false,
            }),
            changed: Condvar::new(),
            readable: Event::new()?,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // Plain values, never left half-changed.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a notice; false where nobody reads any more. Room for it is made by losing the oldest:
    /// the newest says what the machine is doing.
    fn push(&self, notice: &Notice) -> bool {
        let mut waiting = self.lock();
        if waiting.is_closed {
            return false;
        }
        if waiting.notices.len() == NOTICES_MAX {
            waiting.notices.pop_front();
        }
        waiting.notices.push_back(notice.clone());
        self.readable.set();
        drop(waiting);
        self.changed.notify_all();
        true
    }

    fn end(&self) {
        let mut waiting = self.lock();
        waiting.is_over = true;
        self.readable.set();
        drop(waiting);
        self.changed.notify_all();
    }

    fn close(&self) {
        let mut waiting = self.lock();
        waiting.is_closed = true;
        waiting.notices.clear();
        self.readable.set();
        drop(waiting);
        self.changed.notify_all();
    }

    fn next(&self, timeout: Option<Duration>) -> Watched {
        let waits = |waiting: &mut Waiting| {
            waiting.notices.is_empty() && !waiting.is_over && !waiting.is_closed
        };
        let waiting = self.lock();
        let mut waiting = match timeout {
            Some(timeout) => {
                let waited = self.changed.wait_timeout_while(waiting, timeout, waits);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => self
                .changed
                .wait_while(waiting, waits)
                .unwrap_or_else(PoisonError::into_inner),
        };
        let Some(notice) = waiting.notices.pop_front() else {
            return if waiting.is_over || waiting.is_closed {
                Watched::Over
            } else {
                Watched::Nothing
            };
        };
        if waiting.notices.is_empty() && !waiting.is_over {
            self.readable.clear();
        }
        Watched::Notice(notice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn is_readable(watch: &Watch) -> bool {
        let now = Timespec::default();
        poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    fn numbers(watch: &Watch) -> Vec<u64> {
        std::iter::from_fn(|| match watch.next(Some(Duration::ZERO)) {
            Watched::Notice(notice) => Some(notice.number),
            _ => None,
        })
        .collect()
    }

    #[test]
    fn every_watch_has_what_happens_from_its_beginning_on() {
        let watchers = Watchers::new();
        let first = watchers.watch().unwrap();
        assert!(!is_readable(&first));
        watchers.tell(Some(MachineState::Running), Happening::Started);
        let second = watchers.watch().unwrap();
        watchers.tell(None, Happening::Reset);
        assert!(is_readable(&first) && is_readable(&second));
        let started = first.next(None);
        let Watched::Notice(started) = started else {
            panic!("{started:?}");
        };
        assert_eq!(
            (started.number, started.state, started.what),
            (1, MachineState::Running, Happening::Started)
        );
        assert_eq!(numbers(&first), [2]);
        assert_eq!(numbers(&second), [2]);
        assert!(!is_readable(&first) && !is_readable(&second));
    }

    #[test]
    fn a_slow_reader_loses_the_oldest_and_can_tell() {
        let watchers = Watchers::new();
        let watch = watchers.watch().unwrap();
        for _ in 0..NOTICES_MAX + 3 {
            watchers.tell(None, Happening::Reset);
        }
        let got = numbers(&watch);
        assert_eq!(got.first(), Some(&4));
        assert_eq!(got.last(), Some(&(NOTICES_MAX as u64 + 3)));
    }

    #[test]
    fn the_end_comes_after_the_last_notice_and_stays() {
        let watchers = Watchers::new();
        let watch = watchers.watch().unwrap();
        watchers.tell(None, Happening::Reset);
        watchers.end();
        watchers.tell(None, Happening::Reset);
        assert!(matches!(watch.next(None), Watched::Notice(_)));
        assert_eq!(watch.next(None), Watched::Over);
        assert!(is_readable(&watch));
        let late = watchers.watch().unwrap();
        assert_eq!(late.next(None), Watched::Over);
    }

    #[test]
    fn closing_ends_a_wait_and_forgets_what_was_not_taken() {
        let watchers = Watchers::new();
        let watch = watchers.watch().unwrap();
        std::thread::scope(|scope| {
            let waits = scope.spawn(|| watch.next(None));
            watch.close();
            assert_eq!(waits.join().unwrap(), Watched::Over);
        });
        watchers.tell(None, Happening::Reset);
        assert_eq!(watch.next(None), Watched::Over);
        assert!(watchers.lock().queues.is_empty());
    }
}
