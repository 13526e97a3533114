//! vCPUs and their threads.

mod boot_state;
mod exit;

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use kvm_bindings::kvm_regs;
use kvm_ioctls::VcpuFd;

use super::boot::Entry;
use super::bus::GuestRequest;
use super::shared::{Request, Shared};
use crate::sys::kvm_run::{Exit, VcpuRun};
use crate::sys::{kvm, signal};
use exit::Outcome;

/// A pending exit may lead to another one when it is completed, as an access that crosses a page
/// does. KVM has at most a few in a row; more is an error of KVM's.
const SETTLE_EXITS_MAX: usize = 64;

/// One vCPU.
#[derive(Debug)]
pub(super) struct Vcpu {
    /// Its number, from 0.
    pub number: u32,
    /// Its descriptor; the thread runs it by another handle.
    pub fd: VcpuFd,
    /// The thread that runs it; 0 before it has started.
    tid: AtomicI32,
}

impl Vcpu {
    pub(super) fn new(number: u32, fd: VcpuFd) -> Self {
        Self {
            number,
            fd,
            tid: AtomicI32::new(0),
        }
    }

    /// Makes the vCPU leave the guest, or not enter it.
    ///
    /// Called by the gate for vCPUs that it counts as running: their threads live, since each
    /// tells the gate before it ends.
    pub(super) fn kick(&self, signal: i32) {
        let tid = self.tid.load(Ordering::Acquire);
        // A thread that has not started looks at the gate before it enters the guest.
        if tid != 0
            && let Err(error) = signal::send_to_thread(tid, signal)
        {
            log::warn!("could not kick vCPU {}: {error}", self.number);
        }
    }

    /// Sets what firmware would set.
    pub(super) fn set_firmware_state(&self) -> Result<(), kvm_ioctls::Error> {
        boot_state::set_firmware_msrs(&self.fd)
    }

    /// Lets the vCPU start at the kernel's entry point.
    pub(super) fn set_entry(&self, entry: Entry) -> Result<(), kvm_ioctls::Error> {
        boot_state::set_entry(&self.fd, entry)
    }

    /// Returns where the vCPU is, for messages about crashes.
    fn whereabouts(&self) -> String {
        let regs: Result<kvm_regs, _> = self.fd.get_regs();
        regs.map_or_else(
            |error| format!("registers unknown: {error}"),
            |regs| format!("rip={:#x} rsp={:#x}", regs.rip, regs.rsp),
        )
    }
}

/// Leaves the gate even when the thread panics: a pause would wait for it in vain.
struct InGate<'a> {
    shared: &'a Shared,
    place: usize,
}

impl Drop for InGate<'_> {
    fn drop(&mut self) {
        self.shared.gate.leave(self.place);
        if std::thread::panicking() {
            let why = format!("the thread of vCPU {} panicked", self.place);
            self.shared.request(Request::Fail(why));
        }
    }
}

/// The thread of one vCPU, until the machine ends. The caller has entered it at the gate.
pub(super) fn thread(shared: &Arc<Shared>, vcpu: &Vcpu, mut run: VcpuRun) {
    let place = usize::try_from(vcpu.number).expect("vCPU numbers are small");
    let in_gate = InGate { shared, place };
    if let Err(error) = prepare(shared, vcpu) {
        let why = format!("vCPU {}: {error}", vcpu.number);
        shared.request(Request::Fail(why));
        return;
    }
    let mut data = Vec::new();
    loop {
        let mut outcome = Outcome::Continue;
        shared.gate.pass(place, || {
            outcome = settle(shared, vcpu, &mut run, &mut data);
        });
        if shared.is_stopping() {
            break;
        }
        if outcome == Outcome::Continue {
            outcome = enter(shared, vcpu, &mut run, &mut data);
        }
        let request = match outcome {
            Outcome::Continue => continue,
            Outcome::Request(GuestRequest::PowerOff) => Request::PowerOff,
            Outcome::Request(GuestRequest::Reset) => Request::Reset,
            Outcome::Crash(why) => Request::Crash(why),
        };
        if !ask(shared, vcpu, &mut run, &mut data, request) {
            break;
        }
    }
    drop(in_gate);
}

fn prepare(shared: &Shared, vcpu: &Vcpu) -> std::io::Result<()> {
    kvm::set_signal_mask(&vcpu.fd, shared.kick_signal)?;
    let tid = rustix::thread::gettid().as_raw_nonzero().get();
    vcpu.tid.store(tid, Ordering::Release);
    Ok(())
}

/// Runs the guest until its next exit, and handles that.
fn enter(shared: &Shared, vcpu: &Vcpu, run: &mut VcpuRun, data: &mut Vec<u8>) -> Outcome {
    match run.run() {
        Ok(exit) => exit::dispatch(shared, vcpu, run, data, &exit),
        Err(error) => match error.kind() {
            ErrorKind::Interrupted => {
                signal::consume(shared.kick_signal);
                Outcome::Continue
            }
            // An application processor that INIT or SIPI woke is to be run again.
            ErrorKind::WouldBlock => Outcome::Continue,
            _ => Outcome::Crash(format!(
                "KVM cannot run vCPU {}: {error}, {}",
                vcpu.number,
                vcpu.whereabouts()
            )),
        },
    }
}

/// Completes the pending exit without running the guest: what an IN or an MMIO read brought is
/// only then in the registers, and what a store crossed pages for only then in memory.
fn settle(shared: &Shared, vcpu: &Vcpu, run: &mut VcpuRun, data: &mut Vec<u8>) -> Outcome {
    run.set_immediate_exit(true);
    let mut outcome = Outcome::Continue;
    for left in (0..SETTLE_EXITS_MAX).rev() {
        match run.run() {
            Err(error)
                if matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock) =>
            {
                break;
            }
            Ok(Exit::Interrupted) => break,
            Ok(exit) => {
                let next = exit::dispatch(shared, vcpu, run, data, &exit);
                if outcome == Outcome::Continue {
                    outcome = next;
                }
            }
            Err(error) => {
                outcome = Outcome::Crash(format!(
                    "KVM cannot complete an exit of vCPU {}: {error}",
                    vcpu.number
                ));
                break;
            }
        }
        if left == 0 {
            outcome = Outcome::Crash(format!("vCPU {} exits without end", vcpu.number));
        }
    }
    run.set_immediate_exit(false);
    signal::consume(shared.kick_signal);
    outcome
}

/// Passes on what the guest asked for, and waits until that is done. Returns whether to go on.
fn ask(
    shared: &Shared,
    vcpu: &Vcpu,
    run: &mut VcpuRun,
    data: &mut Vec<u8>,
    request: Request,
) -> bool {
    if !matches!(request, Request::Crash(_)) {
        // The instruction that asked is complete before anybody resets the registers: KVM would
        // complete it later, in the guest that started over.
        settle(shared, vcpu, run, data);
    }
    let place = usize::try_from(vcpu.number).expect("vCPU numbers are small");
    let before = shared.restarts();
    // Noted before the vCPU counts as stopped, so that no pause comes between.
    shared.request(request);
    shared.gate.leave(place);
    if !shared.wait_for_restart(before) {
        return false;
    }
    shared.gate.enter(place);
    // Nothing is pending in a vCPU that starts over.
    shared.gate.pass(place, || ());
    !shared.is_stopping()
}
