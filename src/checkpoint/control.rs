//! What all threads of one checkpoint share: the order to stop, its reason, and the counters.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::checkpoint::commit::CommitGate;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::channel::{Receiver, Sender, bounded, select};
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// The order to stop and the figures of progress. The data plane reads only atomics and the stop
/// channel; the mutex is taken once, by whoever stops the checkpoint.
#[derive(Debug)]
pub(crate) struct Control {
    /// Never carries a message: it is disconnected by the order to stop, which wakes every wait.
    stop: Receiver<Infallible>,
    stopped: AtomicBool,
    order: Mutex<Order>,
    pub(crate) gate: Arc<CommitGate>,
    pub(crate) started: Instant,
    /// Pages that the scan is done with.
    pub(crate) pages_scanned: AtomicU64,
    /// Pages of the staging table that went to the writers after the resume.
    pub(crate) pages_drained: AtomicU64,
    /// Pages that the staging table held at the resume.
    pub(crate) pages_to_drain: AtomicU64,
    /// Bytes of the image so far.
    pub(crate) bytes_written: AtomicU64,
}

#[derive(Debug)]
struct Order {
    trigger: Option<Sender<Infallible>>,
    reason: Option<CheckpointError>,
}

impl Control {
    pub(crate) fn new() -> Self {
        let (trigger, stop) = bounded(0);
        Self {
            stop,
            stopped: AtomicBool::new(false),
            order: Mutex::new(Order {
                trigger: Some(trigger),
                reason: None,
            }),
            gate: Arc::new(CommitGate::default()),
            started: Instant::now(),
            pages_scanned: AtomicU64::new(0),
            pages_drained: AtomicU64::new(0),
            pages_to_drain: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
        }
    }

    /// Orders every thread to stop. The first reason counts.
    ///
    /// The commit's gate is closed first: once a reason is set, no image appears any more.
    pub(crate) fn fail(&self, error: CheckpointError) {
        self.gate.close();
        self.order_stop(error);
    }

    /// Like `fail` with `Cancelled`, unless the image is already committed: returns false then.
    pub(crate) fn cancel(&self) -> bool {
        let in_time = self.gate.close();
        if in_time {
            self.order_stop(CheckpointError::Cancelled);
        }
        in_time
    }

    fn order_stop(&self, error: CheckpointError) {
        let mut order = self.lock();
        order.reason.get_or_insert(error);
        self.stopped.store(true, Ordering::Release);
        order.trigger = None;
    }

    /// Fails once the order to stop is given.
    pub(crate) fn check(&self) -> Result<(), Halt> {
        if self.stopped.load(Ordering::Acquire) {
            Err(Halt::Stopped)
        } else {
            Ok(())
        }
    }

    /// Waits for a message of another thread of the checkpoint, or for the order to stop.
    ///
    /// The sender may go away without one only by failing, which gives the order.
    pub(crate) fn wait<T>(&self, messages: &Receiver<T>) -> Result<T, Halt> {
        select! {
            recv(messages) -> message => message.map_err(|_| Halt::Stopped),
            recv(self.stop) -> _ => Err(Halt::Stopped),
        }
    }

    /// Waits until the order to stop, which is under way, has its reason.
    pub(crate) fn wait_for_reason(&self, patience: Duration) -> Option<CheckpointError> {
        self.stop.recv_timeout(patience).ok();
        self.reason()
    }

    /// Returns the channel that becomes ready with the order to stop.
    pub(crate) fn stop_signal(&self) -> &Receiver<Infallible> {
        &self.stop
    }

    /// Returns why the checkpoint was stopped.
    pub(crate) fn reason(&self) -> Option<CheckpointError> {
        self.lock().reason.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Order> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    #[test]
    fn an_order_to_stop_wakes_a_wait_and_keeps_its_first_reason() {
        let control = Arc::new(Control::new());
        let waiter = control.clone();
        let thread = thread::spawn(move || waiter.stop_signal().recv().is_err());
        assert!(control.check().is_ok());
        assert!(control.cancel());
        control.fail(CheckpointError::Busy);
        assert!(thread.join().unwrap());
        assert!(matches!(control.check(), Err(Halt::Stopped)));
        assert!(control.reason().unwrap().is_cancelled());
    }

    #[test]
    fn a_cancel_after_the_commit_point_is_refused_and_stops_nothing() {
        let control = Control::new();
        assert!(control.gate.pass());
        assert!(!control.cancel());
        assert!(control.check().is_ok());
    }
}
