//! Saving and restoring what KVM keeps of a virtual machine, in the order that works.
//!
//! For our own machines and for those of other VMMs, which hand over their handles (see
//! [`crate::sys::kvm::borrow_vm`]). All vCPUs are stopped and their pending exits complete when
//! anything here is called.
//!
//! The order of a restore, after the VM has its memory, its irqchip (before the vCPUs) and its
//! vCPUs: [`restore_board`] (clock, interrupt controllers, timer), then [`restore_vcpu`] for each
//! vCPU. [`restore`] does both.

mod any_vm;
mod board;
mod dirty_log;
mod facts;
mod msrs;
mod tsc;
mod vcpu;

use std::io;

use kvm_ioctls::{VcpuFd, VmFd};

use crate::state::board::{ClockV1, IrqchipV1, PitV1};
use crate::state::vcpu::VcpuV1;
use crate::state::{StateError, StateSection, StateSet};

pub use any_vm::{restore_any, save_any};
pub use board::{Board, restore_board, restore_chips, save_board, save_clock, set_clock};
pub use dirty_log::KvmDirtyLog;
pub use facts::{cpuid_entries, cpuid_table, guest_facts, host_facts, supported_cpuid};
pub use msrs::MsrSet;
pub use tsc::TscTarget;
pub use vcpu::{VcpuRestore, restore_vcpu, save_vcpu};

/// KVM state that could not be read or set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmStateError {
    /// A call on one vCPU failed.
    #[error("could not {what} of vCPU {vcpu}")]
    Vcpu {
        /// What was tried, as in "set the LAPIC".
        what: &'static str,
        /// Number of the vCPU.
        vcpu: u32,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
    /// A call on the VM or on /dev/kvm failed.
    #[error("could not {what}")]
    Vm {
        /// What was tried.
        what: &'static str,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
    /// KVM refused to read an MSR.
    #[error("could not read MSR {index:#x} of vCPU {vcpu}")]
    GetMsr {
        /// Number of the vCPU.
        vcpu: u32,
        /// Number of the MSR.
        index: u32,
    },
    /// KVM refused to set an MSR to the saved value.
    #[error("could not set MSR {index:#x} of vCPU {vcpu} to {value:#x}")]
    SetMsr {
        /// Number of the vCPU.
        vcpu: u32,
        /// Number of the MSR.
        index: u32,
        /// The value that was saved.
        value: u64,
    },
    /// The guest's counter cannot run at the rate that it was saved with.
    #[error(
        "the guest's TSC runs at {saved_khz} kHz, this host's at {host_khz} kHz, and KVM cannot scale it"
    )]
    TscRate {
        /// The rate in the saved state.
        saved_khz: u32,
        /// The rate of this host.
        host_khz: u32,
    },
    /// A feature that the work needs is missing in the kernel.
    #[error("this kernel's KVM lacks {capability}")]
    Missing {
        /// Name of the capability.
        capability: &'static str,
    },
    /// The guest may run guests of its own, whose state is not saved.
    #[error("vCPU {vcpu} offers nested virtualization ({feature}), whose state is not saved")]
    Nested {
        /// Number of the vCPU.
        vcpu: u32,
        /// `VMX` or `SVM`.
        feature: &'static str,
    },
    /// A section is missing or does not decode.
    #[error(transparent)]
    State(#[from] StateError),
}

impl KvmStateError {
    fn vm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Vm {
            what,
            source: os_error(error),
        }
    }

    fn vcpu(what: &'static str, vcpu: u32) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Vcpu {
            what,
            vcpu,
            source: os_error(error),
        }
    }
}

/// Returns kvm-ioctls' error as the standard library's.
fn os_error(error: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(error.errno())
}

/// How a restore treats time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ClockPolicy {
    /// The guest's clocks go on where they stopped.
    #[default]
    Continue,
    /// The guest's clocks are moved on by the time that has passed since.
    Realtime,
}

/// Saves the whole VM: one section for each vCPU, and those of the board.
pub fn save(
    vm: &VmFd,
    vcpus: &[&VcpuFd],
    msrs: &MsrSet,
) -> Result<Vec<StateSection>, KvmStateError> {
    let mut sections = Vec::with_capacity(vcpus.len() + 3);
    // The clock first: it runs on while the rest is read, and belongs to the moment of the pause.
    let board = save_board(vm)?;
    for (number, vcpu) in (0..).zip(vcpus) {
        let state = save_vcpu(vm, vcpu, number, msrs)?;
        sections.push(StateSection::encode(number, &state));
    }
    sections.push(StateSection::encode(0, &board.irqchip));
    sections.push(StateSection::encode(0, &board.pit));
    sections.push(StateSection::encode(0, &board.clock));
    Ok(sections)
}

/// Restores what [`save`] saved into a VM with as many new vCPUs, and takes its sections.
///
/// Writes guest memory: KVM stores the wall clock where the guest asked for it. A lazily filled
/// memory has its fault handler running by then.
pub fn restore(
    vm: &VmFd,
    vcpus: &[&VcpuFd],
    state: &mut StateSet,
    policy: ClockPolicy,
) -> Result<(), KvmStateError> {
    let saved = take_vcpus(state, vcpus.len())?;
    let board = take_board(state)?;
    restore_taken(vm, vcpus, &board, &saved, policy)
}

/// Takes the sections of `count` vCPUs.
pub fn take_vcpus(state: &mut StateSet, count: usize) -> Result<Vec<VcpuV1>, StateError> {
    (0..).take(count).map(|number| state.take(number)).collect()
}

/// Takes the sections of what the VM has once.
pub fn take_board(state: &mut StateSet) -> Result<Board, StateError> {
    Ok(Board {
        irqchip: state.take::<IrqchipV1>(0)?,
        pit: state.take::<PitV1>(0)?,
        clock: state.take::<ClockV1>(0)?,
    })
}

/// Restores what [`restore`] takes; the same holds.
pub fn restore_taken(
    vm: &VmFd,
    vcpus: &[&VcpuFd],
    board: &Board,
    saved: &[VcpuV1],
    policy: ClockPolicy,
) -> Result<(), KvmStateError> {
    restore_all(vm, vcpus, board, saved, policy, true)
}

/// Restores what [`restore`] takes into a VM that has run, whose vCPUs are stopped and were shown the
/// same CPU as is saved: KVM takes no other one any more.
pub fn put_back(
    vm: &VmFd,
    vcpus: &[&VcpuFd],
    board: &Board,
    saved: &[VcpuV1],
    policy: ClockPolicy,
) -> Result<(), KvmStateError> {
    restore_all(vm, vcpus, board, saved, policy, false)
}

fn restore_all(
    vm: &VmFd,
    vcpus: &[&VcpuFd],
    board: &Board,
    saved: &[VcpuV1],
    policy: ClockPolicy,
    cpuid: bool,
) -> Result<(), KvmStateError> {
    let passed = board::passed_since(&board.clock, policy);
    restore_board(vm, board, passed)?;
    let Some(first) = saved.first() else {
        return Ok(());
    };
    let target = TscTarget::now(&first.tsc, passed);
    for ((number, vcpu), saved) in (0..).zip(vcpus).zip(saved) {
        let how = VcpuRestore {
            cpuid,
            tsc: Some(target),
        };
        restore_vcpu(vm, vcpu, number, saved, how)?;
    }
    Ok(())
}
