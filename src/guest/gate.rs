//! The gate at the top of every vCPU loop.

use std::fmt;
use std::time::{Duration, Instant};

use crate::sync::atomic::{AtomicU32, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How often a vCPU that has not stopped is kicked again: a kick can be lost only to a bug in the
/// caller's loop, and a second one costs a few microseconds.
const REKICK_INTERVAL: Duration = Duration::from_millis(2);

/// A vCPU did not reach the gate in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("vCPU {vcpu} did not stop within {waited_ms} ms")]
pub struct GateTimeout {
    /// The first vCPU that was still running.
    pub vcpu: usize,
    /// How long it was waited for.
    pub waited_ms: u64,
}

/// Holds vCPU threads at the top of their loops.
///
/// Every vCPU thread calls [`VcpuGate::pass`] before each entry into the guest. Pausing by thread
/// id alone would be unsound: the owner's loop would re-enter, and its device code would run on.
///
/// Holds are counted, so that a user's pause and the engine's nest.
pub struct VcpuGate {
    // Mirrors `Inner::holds`, so that an open gate costs one load.
    holds: AtomicU32,
    inner: Mutex<Inner>,
    changed: Condvar,
}

struct Inner {
    holds: u32,
    vcpus: Vec<Place>,
    /// When a vCPU last left the gate after a hold.
    left: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Has not started, or has ended: it enters the guest no more without passing the gate.
    Away,
    Running,
    Parked,
}

impl fmt::Debug for VcpuGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuGate")
            .field("holds", &self.holds)
            .finish_non_exhaustive()
    }
}

impl VcpuGate {
    /// Makes an open gate for `vcpu_count` vCPUs.
    pub fn new(vcpu_count: usize) -> Self {
        Self {
            holds: AtomicU32::new(0),
            inner: Mutex::new(Inner {
                holds: 0,
                vcpus: vec![Place::Away; vcpu_count],
                left: None,
            }),
            changed: Condvar::new(),
        }
    }

    /// Marks `vcpu` as running: from now on a hold waits for it. Call before the first
    /// [`VcpuGate::pass`].
    pub fn enter(&self, vcpu: usize) {
        self.lock().vcpus[vcpu] = Place::Running;
    }

    /// Marks `vcpu` as ended: no hold waits for it any more.
    pub fn leave(&self, vcpu: usize) {
        self.lock().vcpus[vcpu] = Place::Away;
        self.changed.notify_all();
    }

    /// Returns at once while the gate is open; else runs `settle` and waits until it opens.
    ///
    /// `settle` completes the vCPU's pending exit (for KVM: a `KVM_RUN` with `immediate_exit`,
    /// which may write guest memory). It runs once for each time that the gate was found closed.
    pub fn pass(&self, vcpu: usize, settle: impl FnOnce()) {
        // Acquire: pairs with the release in `open`, so that the vCPU sees what was restored.
        if self.holds.load(Ordering::Acquire) == 0 {
            return;
        }
        settle();
        let mut inner = self.lock();
        inner.vcpus[vcpu] = Place::Parked;
        self.changed.notify_all();
        while inner.holds > 0 {
            inner = self
                .changed
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        inner.vcpus[vcpu] = Place::Running;
        inner.left = Some(Instant::now());
    }

    /// Returns when the last of the vCPUs that were held went on; `None` while one of them is
    /// still to go, or where none was ever held.
    ///
    /// Later than [`VcpuGate::open`] by the time that the host took to run it.
    pub fn last_left(&self) -> Option<Instant> {
        let inner = self.lock();
        inner.left.filter(|_| !inner.vcpus.contains(&Place::Parked))
    }

    /// Adds a hold and waits until every running vCPU is parked.
    ///
    /// `kick` makes a vCPU leave the guest, and must work also just before it enters (a pending
    /// signal or `immediate_exit`). On a timeout the hold is taken back.
    pub fn close(&self, timeout: Duration, kick: impl Fn(usize)) -> Result<(), GateTimeout> {
        let start = Instant::now();
        let mut inner = self.lock();
        inner.holds += 1;
        self.holds.store(inner.holds, Ordering::SeqCst);
        loop {
            let running: Vec<usize> = (0..inner.vcpus.len())
                .filter(|&vcpu| inner.vcpus[vcpu] == Place::Running)
                .collect();
            let Some(&first) = running.first() else {
                return Ok(());
            };
            if start.elapsed() >= timeout {
                drop(inner);
                self.open();
                let waited_ms = u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
                return Err(GateTimeout {
                    vcpu: first,
                    waited_ms,
                });
            }
            for vcpu in running {
                kick(vcpu);
            }
            inner = self
                .changed
                .wait_timeout_while(inner, REKICK_INTERVAL, |inner| {
                    inner.vcpus.contains(&Place::Running)
                })
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Takes one hold away; the last one lets the vCPUs go.
    ///
    /// # Panics
    /// When the gate is open already.
    pub fn open(&self) {
        let mut inner = self.lock();
        inner.holds = inner
            .holds
            .checked_sub(1)
            .expect("every open follows its own close");
        self.holds.store(inner.holds, Ordering::Release);
        self.changed.notify_all();
    }

    /// Returns whether a hold is in force.
    pub fn is_closed(&self) -> bool {
        self.holds.load(Ordering::Acquire) > 0
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // The data is a few plain values that are never left half-changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    const PATIENCE: Duration = Duration::from_secs(20);

    struct Vcpus {
        gate: Arc<VcpuGate>,
        stop: Arc<AtomicBool>,
        rounds: Arc<AtomicU32>,
        threads: Vec<thread::JoinHandle<()>>,
    }

    fn start(count: usize) -> Vcpus {
        let gate = Arc::new(VcpuGate::new(count));
        let stop = Arc::new(AtomicBool::new(false));
        let rounds = Arc::new(AtomicU32::new(0));
        let threads = (0..count)
            .map(|vcpu| {
                gate.enter(vcpu);
                let (gate, stop, rounds) = (gate.clone(), stop.clone(), rounds.clone());
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        gate.pass(vcpu, || ());
                        rounds.fetch_add(1, Ordering::Relaxed);
                    }
                    gate.leave(vcpu);
                })
            })
            .collect();
        Vcpus {
            gate,
            stop,
            rounds,
            threads,
        }
    }

    impl Vcpus {
        fn end(self) {
            self.stop.store(true, Ordering::Relaxed);
            self.threads
                .into_iter()
                .for_each(|thread| thread.join().unwrap());
        }
    }

    #[test]
    fn no_vcpu_makes_a_round_while_the_gate_is_closed() {
        let vcpus = start(3);
        for _ in 0..20 {
            vcpus.gate.close(PATIENCE, |_| ()).unwrap();
            let before = vcpus.rounds.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(1));
            assert_eq!(vcpus.rounds.load(Ordering::Relaxed), before);
            vcpus.gate.open();
        }
        vcpus.end();
    }

    #[test]
    fn the_gate_tells_when_the_last_vcpu_went_on() {
        let vcpus = start(2);
        assert_eq!(vcpus.gate.last_left(), None);
        vcpus.gate.close(PATIENCE, |_| ()).unwrap();
        assert_eq!(vcpus.gate.last_left(), None);
        let opened = Instant::now();
        vcpus.gate.open();
        let left = loop {
            if let Some(left) = vcpus.gate.last_left() {
                break left;
            }
            assert!(opened.elapsed() < PATIENCE);
            thread::yield_now();
        };
        assert!(left >= opened);
        vcpus.end();
    }

    #[test]
    fn holds_nest() {
        let vcpus = start(1);
        vcpus.gate.close(PATIENCE, |_| ()).unwrap();
        vcpus.gate.close(PATIENCE, |_| ()).unwrap();
        vcpus.gate.open();
        assert!(vcpus.gate.is_closed());
        let before = vcpus.rounds.load(Ordering::Relaxed);
        thread::sleep(Duration::from_millis(1));
        assert_eq!(vcpus.rounds.load(Ordering::Relaxed), before);
        vcpus.gate.open();
        assert!(!vcpus.gate.is_closed());
        vcpus.end();
    }

    #[test]
    fn a_vcpu_that_never_parks_is_named_and_the_gate_opens_again() {
        let gate = VcpuGate::new(2);
        gate.enter(1);
        let error = gate.close(Duration::from_millis(10), |_| ()).unwrap_err();
        assert_eq!(error.vcpu, 1);
        assert!(!gate.is_closed());
    }

    #[test]
    fn a_vcpu_that_ends_while_it_is_waited_for_does_not_hold_the_gate_up() {
        let gate = Arc::new(VcpuGate::new(1));
        gate.enter(0);
        let other = gate.clone();
        let thread = thread::spawn(move || {
            thread::sleep(Duration::from_millis(5));
            other.leave(0);
        });
        gate.close(PATIENCE, |_| ()).unwrap();
        thread.join().unwrap();
    }
}
