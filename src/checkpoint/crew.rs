//! The threads of one checkpoint: named, guarded against panics, joined or knowingly abandoned.

use std::any::Any;
use std::convert::Infallible;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, select};
use rustix::time::{ClockId, clock_gettime};

use crate::checkpoint::control::Control;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::polite::Polite;

/// Threads that end together.
///
/// They inherit the signal mask of the session's thread, which blocks everything.
#[derive(Debug)]
pub(crate) struct Crew {
    control: Arc<Control>,
    cpu: Arc<AtomicU64>,
    handles: Vec<JoinHandle<()>>,
    polite: Arc<Polite>,
    /// A clone is held by each running thread; `ended` disconnects after the last.
    running: Option<Sender<Infallible>>,
    ended: Receiver<Infallible>,
}

impl Crew {
    /// Makes an empty crew; its threads add the nanoseconds of CPU time they took to `cpu`.
    pub(crate) fn new(control: Arc<Control>, cpu: Arc<AtomicU64>) -> Self {
        let (running, ended) = bounded(0);
        Self {
            control,
            cpu,
            handles: Vec::new(),
            polite: Arc::default(),
            running: Some(running),
            ended,
        }
    }

    /// Starts a thread. What it fails with, or its panic, stops the checkpoint.
    pub(crate) fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce() -> Result<(), Halt> + Send + 'static,
    ) -> Result<(), CheckpointError> {
        let control = self.control.clone();
        let cpu = self.cpu.clone();
        let running = self.begin();
        let thread_name = name.to_owned();
        let body = move || {
            guarded(&control, &thread_name, work);
            cpu.fetch_add(thread_cpu_ns(), Ordering::Relaxed);
            // Last: whoever waits for the crew may take apart what `work` held.
            drop(running);
        };
        let handle = thread::Builder::new()
            .name(name.to_owned())
            .spawn(body)
            .map_err(CheckpointError::resource(format!("thread {name}")))?;
        self.handles.push(handle);
        Ok(())
    }

    /// Starts a thread that works while the guest runs, and lets vCPUs go before it: see
    /// [`Polite`].
    pub(crate) fn spawn_polite(
        &mut self,
        name: &str,
        work: impl FnOnce() -> Result<(), Halt> + Send + 'static,
    ) -> Result<(), CheckpointError> {
        Polite::watch(&self.polite)?;
        let polite = self.polite.clone();
        self.spawn(name, move || {
            let _registered = polite.give_way();
            work()
        })
    }

    /// Returns what a new thread holds until its end.
    fn begin(&mut self) -> Sender<Infallible> {
        if let Some(running) = &self.running {
            return running.clone();
        }
        // The threads so far were joined; these are new ones.
        let (running, ended) = bounded(0);
        self.ended = ended;
        self.running.insert(running).clone()
    }

    /// Waits for every thread to end by itself; returns early with the order to stop.
    pub(crate) fn join(&mut self) -> Result<(), Halt> {
        self.running = None;
        select! {
            recv(self.ended) -> _ => {}
            recv(self.control.stop_signal()) -> _ => return Err(Halt::Stopped),
        }
        self.join_ended();
        self.control.check()
    }

    /// Waits until `deadline` for every thread to end, and abandons the rest: threads that are
    /// stuck in the kernel, by storage that does not answer. They hold only what is theirs, and
    /// end when the kernel lets them go. Returns whether all ended.
    pub(crate) fn join_until(&mut self, deadline: Instant) -> bool {
        self.running = None;
        let patience = deadline.saturating_duration_since(Instant::now());
        if self.ended.recv_timeout(patience) == Err(RecvTimeoutError::Disconnected) {
            self.join_ended();
            return true;
        }
        for handle in self.handles.drain(..) {
            if !handle.is_finished() {
                let name = handle.thread().name().unwrap_or_default();
                log::warn!("abandoned {name}, which is stuck");
            }
        }
        false
    }

    fn join_ended(&mut self) {
        for handle in self.handles.drain(..) {
            // Panics were caught inside.
            handle.join().ok();
        }
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.polite.end_watch();
    }
}

/// Runs `work`; its failure or panic becomes the checkpoint's.
pub(crate) fn guarded(control: &Control, thread: &str, work: impl FnOnce() -> Result<(), Halt>) {
    // Unwind safety: what a panicking thread leaves behind is never used, since the checkpoint
    // fails; guest and storage are the caller's, who must stand a panic of their own methods.
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(()) | Err(Halt::Stopped)) => {}
        Ok(Err(Halt::Failed(error))) => control.fail(error),
        Err(payload) => control.fail(CheckpointError::Panicked {
            thread: thread.to_owned(),
            message: panic_message(payload.as_ref()),
        }),
    }
}

fn panic_message(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().copied();
    text.or_else(|| payload.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

/// Returns the CPU time of the calling thread.
pub(crate) fn thread_cpu_ns() -> u64 {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    let since = Duration::try_from(time).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn crew() -> (Crew, Arc<Control>) {
        let control = Arc::new(Control::new());
        (Crew::new(control.clone(), Arc::default()), control)
    }

    #[test]
    fn a_panic_stops_the_checkpoint_and_names_its_thread() {
        let (mut crew, control) = crew();
        crew.spawn("lvp-test", || panic!("on purpose")).unwrap();
        assert!(crew.join().is_err());
        let reason = control.reason().unwrap().to_string();
        assert_eq!(reason, "thread lvp-test panicked: on purpose");
    }

    #[test]
    fn a_thread_that_is_stuck_is_abandoned_at_the_deadline() {
        let (mut crew, _control) = crew();
        let (release, held) = bounded::<()>(0);
        crew.spawn("lvp-stuck", move || {
            held.recv().ok();
            Ok(())
        })
        .unwrap();
        let start = Instant::now();
        assert!(!crew.join_until(start + Duration::from_millis(20)));
        assert!(start.elapsed() < Duration::from_secs(5));
        drop(release);
    }

    #[test]
    fn a_join_that_waits_is_woken_by_the_order_to_stop() {
        let (mut crew, control) = crew();
        let stop = control.clone();
        crew.spawn("lvp-waits", move || {
            stop.stop_signal().recv().ok();
            Err(Halt::Stopped)
        })
        .unwrap();
        control.cancel();
        assert!(matches!(crew.join(), Err(Halt::Stopped)));
        assert!(crew.join_until(Instant::now() + Duration::from_secs(20)));
    }
}
