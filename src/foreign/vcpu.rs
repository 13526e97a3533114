//! vCPU threads that another VMM runs: its loops call the gate before each `KVM_RUN`.
//!
//! They are kicked as ours are: by a signal that is blocked in the thread and let through only
//! inside `KVM_RUN`, so that no handler is needed. The thread's own mask holds there otherwise, so
//! that signals of the VMM's own end `KVM_RUN` as before.

use std::io::ErrorKind;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuFd, VmFd};

use super::{ForeignError, KvmHandle};
use crate::guest::{GateTimeout, VcpuGate};
use crate::sys::kvm_run::{Exit, VcpuRun};
use crate::sys::{kvm, signal};

/// The most vCPUs: what KVM allows on x86-64.
pub const VCPUS_MAX: usize = 4096;

/// How long vCPUs may take to stop. On a busy host 0.4 s were seen.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What a vCPU's thread does after the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// Enter the guest.
    Enter,
    /// Handle the exit that is in the shared page, and come back.
    HandleExit,
}

/// The vCPUs of one guest.
#[derive(Debug)]
pub(super) struct Vcpus {
    gate: VcpuGate,
    places: Vec<Place>,
    /// `None` where the VMM kicks its vCPUs itself.
    kick_signal: Option<i32>,
}

#[derive(Debug, Default)]
struct Place {
    /// The thread that entered; 0 while none has.
    tid: AtomicI32,
    /// A kick was sent. Set **after** the sending, so that whoever finds it set finds the signal.
    kicked: AtomicBool,
    entered: Mutex<Option<Entered>>,
}

/// What a thread that entered has.
#[derive(Debug)]
struct Entered {
    run: VcpuRun,
    fd: VcpuFd,
    /// The thread's mask before it entered.
    mask_before: Option<u64>,
}

/// Returns whether vCPUs can be kicked by `signal`.
pub(super) fn can_kick(signal: i32) -> bool {
    // The C library keeps 32 and 33 for itself; a blocked fault ends the process.
    const NEVER: [i32; 9] = [
        libc::SIGKILL,
        libc::SIGSTOP,
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        32,
        33,
    ];
    (1..=64).contains(&signal) && !NEVER.contains(&signal)
}

fn this_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

impl Vcpus {
    pub(super) fn new(count: usize, kick_signal: Option<i32>) -> Self {
        Self {
            gate: VcpuGate::new(count),
            places: (0..count).map(|_| Place::default()).collect(),
            kick_signal,
        }
    }

    pub(super) fn count(&self) -> usize {
        self.places.len()
    }

    fn place(&self, vcpu: usize) -> Result<&Place, ForeignError> {
        self.places.get(vcpu).ok_or_else(|| {
            let count = self.places.len();
            ForeignError::Invalid(format!("there is no vCPU {vcpu}: the guest has {count}"))
        })
    }

    /// Makes the calling thread the one that runs `vcpu`.
    pub(super) fn enter(
        &self,
        vcpu: usize,
        fd: BorrowedFd<'_>,
        kvm: &KvmHandle,
        vm: &VmFd,
    ) -> Result<(), ForeignError> {
        let place = self.place(vcpu)?;
        let mut entered = lock(place);
        if entered.is_some() {
            return Err(ForeignError::OtherThread { vcpu });
        }
        let fd = kvm::borrow_vcpu(vm, fd).map_err(ForeignError::kvm("use a vCPU's descriptor"))?;
        let run = VcpuRun::new(&fd, kvm.run_page_bytes()?)
            .map_err(ForeignError::kvm("map a vCPU's page"))?;
        // Now rather than in the first pause.
        kvm.msrs(&fd)?;
        let mask_before = self
            .kick_signal
            .map(|kick| prepare_signal(&fd, kick))
            .transpose()
            .map_err(ForeignError::kvm("set a vCPU's signal mask"))?;
        *entered = Some(Entered {
            run,
            fd,
            mask_before,
        });
        place.tid.store(this_thread(), Ordering::Release);
        self.gate.enter(vcpu);
        Ok(())
    }

    /// Returns at once while no pause is wanted; else completes the pending exit and waits.
    pub(super) fn pass(&self, vcpu: usize) -> Result<Passage, ForeignError> {
        let place = self.place(vcpu)?;
        if place.tid.load(Ordering::Acquire) == 0 {
            return Err(ForeignError::NotEntered { vcpu });
        }
        if !self.gate.is_closed() && !place.kicked.load(Ordering::Acquire) {
            return Ok(Passage::Enter);
        }
        let mut entered = self.own(vcpu, place)?;
        loop {
            self.take_kicks(place);
            if !self.gate.is_closed() {
                return Ok(Passage::Enter);
            }
            if settle(&mut entered)? == Passage::HandleExit {
                return Ok(Passage::HandleExit);
            }
            // Nothing is pending: it was settled, and the guest was not entered since.
            self.gate.pass(vcpu, || ());
        }
    }

    /// Ends what [`Vcpus::enter`] began, unless an exit is to be handled first.
    pub(super) fn leave(&self, vcpu: usize) -> Result<Passage, ForeignError> {
        let place = self.place(vcpu)?;
        if place.tid.load(Ordering::Acquire) == 0 {
            return Err(ForeignError::NotEntered { vcpu });
        }
        let mut entered = self.own(vcpu, place)?;
        if settle(&mut entered)? == Passage::HandleExit {
            return Ok(Passage::HandleExit);
        }
        // From here on nobody kicks this thread: that is done under the gate's lock.
        self.gate.leave(vcpu);
        place.tid.store(0, Ordering::Release);
        self.take_kicks(place);
        if let (
            Some(kick),
            Some(Entered {
                fd, mask_before, ..
            }),
        ) = (self.kick_signal, entered.take())
        {
            signal::consume(kick);
            let was_blocked = mask_before.is_none_or(|mask| mask & !signal::all_but(kick) != 0);
            let undone = kvm::keep_mask_during_run(&fd).and_then(|()| match was_blocked {
                true => Ok(()),
                false => signal::unblock(kick),
            });
            undone.map_err(ForeignError::kvm("give a vCPU its signal mask back"))?;
        }
        Ok(Passage::Enter)
    }

    /// Locks the place of a vCPU for the thread that entered it.
    fn own<'a>(
        &self,
        vcpu: usize,
        place: &'a Place,
    ) -> Result<MutexGuard<'a, Option<Entered>>, ForeignError> {
        if place.tid.load(Ordering::Acquire) == this_thread() {
            Ok(lock(place))
        } else {
            Err(ForeignError::OtherThread { vcpu })
        }
    }

    /// Takes pending kicks off the calling thread's queue: each would end a `KVM_RUN` at once.
    fn take_kicks(&self, place: &Place) {
        if let Some(kick) = self.kick_signal
            && place.kicked.swap(false, Ordering::AcqRel)
        {
            signal::consume(kick);
        }
    }

    /// Stops all vCPUs that entered; `kick` where the VMM does that itself.
    pub(super) fn close(&self, kick: impl Fn(usize)) -> Result<(), GateTimeout> {
        self.gate.close(STOP_TIMEOUT, |vcpu| {
            let (Some(place), Some(signal)) = (self.places.get(vcpu), self.kick_signal) else {
                return kick(vcpu);
            };
            let tid = place.tid.load(Ordering::Acquire);
            if tid == 0 {
                return;
            }
            if let Err(error) = signal::send_to_thread(tid, signal) {
                log::warn!("could not kick vCPU {vcpu}: {error}");
            }
            place.kicked.store(true, Ordering::Release);
        })
    }

    /// Undoes one [`Vcpus::close`].
    pub(super) fn open(&self) {
        self.gate.open();
    }

    pub(super) fn last_left(&self) -> Option<Instant> {
        self.gate.last_left()
    }
}

fn lock(place: &Place) -> MutexGuard<'_, Option<Entered>> {
    // Replaced as a whole, never left half-changed.
    place.entered.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Blocks the kick in the calling thread, but for inside `KVM_RUN`.
fn prepare_signal(fd: &VcpuFd, kick: i32) -> std::io::Result<u64> {
    let before = signal::block(kick)?;
    let only_kick = !signal::all_but(kick);
    let set = kvm::block_during_run(fd, before & !only_kick);
    if set.is_err() && before & only_kick == 0 {
        signal::unblock(kick)?;
    }
    set.map(|()| before)
}

/// Completes the pending exit without running the guest: what an IN or an MMIO read brought is
/// only then in the registers, and what a store crossed pages for only then in memory.
fn settle(entered: &mut Option<Entered>) -> Result<Passage, ForeignError> {
    let Some(Entered { run, .. }) = entered else {
        return Ok(Passage::Enter);
    };
    let before = run.immediate_exit();
    run.set_immediate_exit(true);
    let exit = run.run();
    run.set_immediate_exit(before);
    match exit {
        Ok(Exit::Interrupted) => Ok(Passage::Enter),
        Ok(_) => Ok(Passage::HandleExit),
        Err(error) if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) => {
            Ok(Passage::Enter)
        }
        Err(source) => Err(ForeignError::Kvm {
            what: "complete an exit of a vCPU",
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_cannot_kick_are_known() {
        for signal in [0, 65, -1, libc::SIGKILL, libc::SIGSEGV, 33] {
            assert!(!can_kick(signal), "{signal}");
        }
        assert!(can_kick(libc::SIGUSR1) && can_kick(signal::default_kick()) && can_kick(64));
    }

    #[test]
    fn a_gate_that_nobody_entered_tells_so() {
        let vcpus = Vcpus::new(1, Some(signal::default_kick()));
        assert!(matches!(
            vcpus.pass(0),
            Err(ForeignError::NotEntered { vcpu: 0 })
        ));
        assert!(matches!(vcpus.pass(1), Err(ForeignError::Invalid(_))));
        assert!(vcpus.leave(0).is_err());
        vcpus.close(|_| panic!("nobody runs")).unwrap();
        vcpus.open();
    }
}
