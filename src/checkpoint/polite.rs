//! Threads that neither disturb the guest nor starve.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::Pid;

use crate::checkpoint::error::CheckpointError;
use crate::sys::priority::{self, Turns};

/// How much nicer than the rest of the process such a thread is once it takes turns: at 10 a vCPU
/// gets nine tenths of a CPU that it shares (sched(7)).
const NICENESS: u8 = 10;

/// How often it is looked whether they get to run.
const LOOK: Duration = Duration::from_millis(40);

/// Looks in a row at which a thread must have hardly run to count as starved.
const LOOKS: u8 = 2;

/// The threads of one crew that run only when nobody else wants the CPU.
///
/// Where there are fewer CPUs than threads, a vCPU that waits for its turn is an outage that no
/// figure of ours would show: 4 ms at a time, where the kernel ticks at 250 Hz and does not preempt
/// in between. So these threads give way (`SCHED_IDLE`). On a host that has no CPU to spare they
/// would never end, and a writer that waits for one of their buffers neither: a watch finds those
/// that do not get to run at all, and has them take turns from there on, as nice threads at first
/// and as equals where that does not help. They could not do that themselves.
#[derive(Debug, Default)]
pub(crate) struct Polite {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    threads: HashMap<Pid, Seen>,
    watched: bool,
    ended: bool,
}

/// How long a thread has run so far, and at how many looks in a row it wanted to and did not.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    ran: Duration,
    looks: u8,
    takes_turns: bool,
}

/// Keeps a thread watched until it is dropped.
pub(crate) struct Registered<'a>(&'a Polite, Pid);

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.0.lock().threads.remove(&self.1);
    }
}

impl Polite {
    /// Starts the watch, once; it ends with [`Polite::end_watch`].
    pub(crate) fn watch(this: &Arc<Self>) -> Result<(), CheckpointError> {
        if !std::mem::replace(&mut this.lock().watched, true) {
            let watch = this.clone();
            thread::Builder::new()
                .name("lvp-courtesy".to_owned())
                .spawn(move || watch.look_until_end())
                .map_err(CheckpointError::resource("thread lvp-courtesy"))?;
        }
        Ok(())
    }

    pub(crate) fn end_watch(&self) {
        self.lock().ended = true;
        self.changed.notify_all();
    }

    /// Has the calling thread give way, for as long as that does not starve it.
    pub(crate) fn give_way(&self) -> Registered<'_> {
        // On Linux niceness is a thread's own.
        if let Err(error) = rustix::process::nice(NICENESS.into()) {
            log::debug!("could not lower a thread's priority: {error}");
        }
        let thread = priority::this_thread();
        match priority::run_when_idle(NICENESS) {
            Ok(()) => {
                let ran = priority::turns(thread).unwrap_or_default().ran;
                let seen = Seen {
                    ran,
                    ..Seen::default()
                };
                self.lock().threads.insert(thread, seen);
            }
            Err(error) => log::debug!("could not leave the CPU to others: {error}"),
        }
        Registered(self, thread)
    }

    fn look_until_end(&self) {
        let mut looked = Instant::now();
        let mut state = self.lock();
        while !state.ended {
            state = self
                .changed
                .wait_timeout_while(state, LOOK, |state| !state.ended)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
            let passed = looked.elapsed();
            looked = Instant::now();
            state.threads.retain(|&thread, seen| {
                if !seen.look(priority::turns(thread), passed) {
                    return true;
                }
                let equal = std::mem::replace(&mut seen.takes_turns, true);
                let raised = if equal {
                    priority::run_as_equal(thread)
                } else {
                    priority::run_in_turn(thread)
                };
                if let Err(error) = &raised {
                    log::warn!("a thread gets no CPU and may not ask for more: {error}");
                }
                raised.is_ok() && !equal
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends the calling thread's giving way: what it does next is waited for.
pub(crate) fn take_turns() {
    if let Err(error) = priority::run_in_turn(priority::this_thread()) {
        log::debug!("could not raise a thread's priority: {error}");
    }
}

impl Seen {
    /// Takes what the kernel tells; returns whether the thread starves. Where it does not tell, the
    /// thread is taken to starve: better that it disturbs than that it hangs.
    fn look(&mut self, now: Option<Turns>, passed: Duration) -> bool {
        let Some(now) = now else { return true };
        let ran = now.ran.saturating_sub(self.ran);
        self.ran = now.ran;
        // Threads that share one CPU between them wait for each other: that is not starving.
        let in_vain = now.wants_cpu && ran < passed / 10;
        self.looks = if in_vain { self.looks + 1 } else { 0 };
        let starves = self.looks >= LOOKS;
        if starves {
            self.looks = 0;
        }
        starves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn only_a_thread_that_wants_to_run_and_does_not_starves() {
        let turns = |wants_cpu, ran_ms: u32| {
            let ran = ran_ms * MS;
            Some(Turns { wants_cpu, ran })
        };
        let mut seen = Seen::default();
        assert!(!seen.look(turns(true, 10), 40 * MS));
        assert!(!seen.look(turns(true, 11), 40 * MS));
        assert!(!seen.look(turns(false, 11), 40 * MS), "it sleeps");
        assert!(!seen.look(turns(true, 12), 40 * MS));
        assert!(seen.look(turns(true, 13), 40 * MS));
        assert!(
            !seen.look(turns(true, 13), 40 * MS),
            "it has just been helped"
        );
        assert!(Seen::default().look(None, 40 * MS));
    }

    #[test]
    fn a_thread_is_watched_until_it_ends() {
        let polite = Arc::new(Polite::default());
        Polite::watch(&polite).unwrap();
        Polite::watch(&polite).unwrap();
        let its = polite.clone();
        thread::spawn(move || {
            let registered = its.give_way();
            assert!(its.lock().threads.len() <= 1);
            drop(registered);
            assert!(its.lock().threads.is_empty());
        })
        .join()
        .unwrap();
        polite.end_watch();
        let end = Instant::now() + Duration::from_secs(20);
        // The watch holds the last other handle.
        while Arc::strong_count(&polite) > 1 {
            assert!(Instant::now() < end, "the watch goes on");
            thread::yield_now();
        }
    }
}
