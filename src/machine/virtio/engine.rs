//! The thread of a device: runs its backend while its driver wants it to and nothing pauses it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};

use super::registers::Interrupts;
use super::{Backend, Stop, Virtqueue, Work};
use crate::machine::memory::GuestRam;
use crate::sys::event::Event;
use crate::sys::sigmask::SignalsBlocked;

/// How long the thread rests after a poll that failed, so that it never spins.
const POLL_FAILURE_PAUSE: Duration = Duration::from_millis(100);

/// What the device's thread shares with vCPUs and with whoever pauses it.
struct Shared {
    backend: Arc<dyn Backend>,
    ram: Arc<GuestRam>,
    interrupts: Arc<Interrupts>,
    inner: Mutex<Inner>,
    changed: Condvar,
    stop: Stop,
    /// The device broke down over what its driver did.
    failed: AtomicBool,
    /// One for each queue: set when the driver has something for it.
    kicks: Vec<Event>,
    /// Set when something else than a queue wants the thread.
    wake: Event,
}

#[derive(Debug, Default)]
struct Inner {
    /// The queues in use, while the thread is not at work on them.
    queues: Option<Vec<Option<Virtqueue>>>,
    features: u64,
    /// The driver has set the device up.
    active: bool,
    /// The thread has the queues.
    busy: bool,
    /// How many pauses are in force.
    holds: u32,
    ended: bool,
}

/// A device's thread.
pub struct Engine {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine")
            .field("backend", &self.shared.backend)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(
        &self,
        inner: MutexGuard<'a, Inner>,
        condition: impl FnMut(&mut Inner) -> bool,
    ) -> MutexGuard<'a, Inner> {
        self.changed
            .wait_while(inner, condition)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the queues for the thread; `None` when the machine ends.
    fn begin(&self) -> Option<(Vec<Option<Virtqueue>>, u64)> {
        let waits = |inner: &mut Inner| !inner.ended && (inner.holds > 0 || !inner.active);
        let mut inner = self.wait(self.lock(), waits);
        if inner.ended {
            return None;
        }
        inner.busy = true;
        // Under the lock: whoever wants the thread after this sets it again.
        self.stop.set(false);
        let queues = inner.queues.take();
        Some((queues.expect("an active device has queues"), inner.features))
    }

    /// Gives the queues back.
    fn end(&self, queues: Vec<Option<Virtqueue>>, failed: bool) {
        let mut inner = self.lock();
        inner.queues = Some(queues);
        inner.busy = false;
        if failed {
            inner.active = false;
        }
        self.changed.notify_all();
    }

    /// Runs the backend once.
    fn run_once(&self, queues: &mut [Option<Virtqueue>], features: u64) -> bool {
        let mut work = Work {
            memory: self.ram.memory(),
            queues,
            features,
            stop: &self.stop,
        };
        match self.backend.process(&mut work) {
            Ok(()) => true,
            Err(fault) => {
                log::warn!(
                    "a virtio {} device stops: its driver broke the rules: {fault}",
                    self.backend.kind().name
                );
                false
            }
        }
    }

    fn fail(&self) {
        self.failed.store(true, Ordering::Release);
        self.interrupts.signal_config();
    }

    /// Waits until a queue, the backend or somebody else has something.
    fn wait_for_work(&self) {
        let mut polled: Vec<PollFd<'_>> = self
            .kicks
            .iter()
            .chain([&self.wake])
            .map(|event| PollFd::new(event, PollFlags::IN))
            .collect();
        if let Some((fd, flags)) = self.backend.poll_for() {
            polled.push(PollFd::from_borrowed_fd(fd, flags));
        }
        if let Err(error) = poll(&mut polled, None)
            && error != rustix::io::Errno::INTR
        {
            log::warn!("could not wait for a device's work: {error}");
            thread::sleep(POLL_FAILURE_PAUSE);
        }
        // Before the queues are looked at: what comes after that sets its event again.
        for event in self.kicks.iter().chain([&self.wake]) {
            event.clear();
        }
    }

    fn thread(&self) {
        while let Some((mut queues, features)) = self.begin() {
            let well = self.run_once(&mut queues, features);
            // The queues first: whoever resets the device holds its registers and waits for them.
            self.end(queues, !well);
            if well {
                self.wait_for_work();
            } else {
                self.fail();
            }
        }
    }
}

/// Ends the thread's work even where the backend panics: a pause would wait for it in vain.
struct Ends<'a>(&'a Shared);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let mut inner = self.0.lock();
            (inner.busy, inner.active, inner.ended) = (false, false, true);
            self.0.changed.notify_all();
            drop(inner);
            self.0.fail();
        }
    }
}

impl Engine {
    /// Starts the thread, paused, which waits for [`Engine::activate`].
    pub(super) fn new(
        backend: Arc<dyn Backend>,
        ram: Arc<GuestRam>,
        interrupts: Arc<Interrupts>,
        name: &str,
    ) -> io::Result<Self> {
        let kicks = backend
            .queue_sizes()
            .iter()
            .map(|_| Event::new())
            .collect::<io::Result<_>>()?;
        let shared = Arc::new(Shared {
            backend,
            ram,
            interrupts,
            inner: Mutex::new(Inner {
                holds: 1,
                ..Inner::default()
            }),
            changed: Condvar::new(),
            stop: Stop::new(),
            failed: AtomicBool::new(false),
            kicks,
            wake: Event::new()?,
        });
        let served = shared.clone();
        let _blocked = SignalsBlocked::new();
        let thread = thread::Builder::new()
            .name(format!("lvp-{name}"))
            .spawn(move || {
                let _ends = Ends(&served);
                served.thread();
            })?;
        Ok(Self {
            shared,
            thread: Some(thread),
        })
    }

    /// Lets the thread work on `queues`.
    pub(super) fn activate(&self, queues: Vec<Option<Virtqueue>>, features: u64) {
        let mut inner = self.shared.lock();
        inner.queues = Some(queues);
        inner.features = features;
        inner.active = true;
        self.shared.changed.notify_all();
        self.shared.wake.set();
    }

    /// Puts the device out of use. Waits until the thread has finished the request at hand.
    pub(super) fn deactivate(&self) {
        let mut inner = self.shared.lock();
        inner.active = false;
        self.shared.stop.set(true);
        inner = self.shared.wait(inner, |inner| inner.busy);
        inner.queues = None;
        self.shared.failed.store(false, Ordering::Release);
    }

    /// Has the device out of use until it is reset.
    pub(super) fn fail(&self) {
        self.shared.fail();
    }

    /// Returns whether the device needs a reset.
    pub(super) fn has_failed(&self) -> bool {
        self.shared.failed.load(Ordering::Acquire)
    }

    /// Notes that the device needed a reset when it was saved.
    pub(super) fn set_failed(&self) {
        self.shared.failed.store(true, Ordering::Release);
    }

    /// Returns the events that tell of new requests, by queue.
    pub(super) fn kicks(&self) -> &[Event] {
        &self.shared.kicks
    }

    /// Looks at the queues; `None` while the device is not in use. Called while it is drained.
    pub(super) fn with_queues<T>(&self, look: impl FnOnce(&[Option<Virtqueue>]) -> T) -> Option<T> {
        self.shared.lock().queues.as_deref().map(look)
    }

    /// Begins a pause: the thread finishes the request at hand, and takes no other. Pauses nest.
    pub(super) fn pause(&self) {
        let mut inner = self.shared.lock();
        inner.holds += 1;
        self.shared.stop.set(true);
    }

    /// Waits until the thread has stopped; false at `deadline`.
    pub(super) fn drain(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        let (inner, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), left, |inner| inner.busy)
            .unwrap_or_else(PoisonError::into_inner);
        !inner.busy
    }

    /// Ends a pause. The thread looks at all queues, whatever was told of before.
    pub(super) fn resume(&self) {
        let mut inner = self.shared.lock();
        inner.holds = inner
            .holds
            .checked_sub(1)
            .expect("a resume follows a pause");
        drop(inner);
        self.shared.changed.notify_all();
        self.shared.wake.set();
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let mut inner = self.shared.lock();
        inner.ended = true;
        self.shared.stop.set(true);
        drop(inner);
        self.shared.changed.notify_all();
        self.shared.wake.set();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of {:?} panicked", self.shared.backend);
        }
    }
}
