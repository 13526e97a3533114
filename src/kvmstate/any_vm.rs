//! Saving and restoring VMs that other VMMs made: a chip that KVM does not have there is left out.

use kvm_ioctls::{VcpuFd, VmFd};

use super::board::{self, Chips};
use super::tsc::TscTarget;
use super::{ClockPolicy, KvmStateError, MsrSet, VcpuRestore, restore_vcpu, save_vcpu, take_vcpus};
use crate::state::board::{ClockV1, IrqchipV1, PitV1};
use crate::state::vcpu::VcpuV1;
use crate::state::{StateSection, StateSet};

/// Saves what KVM has of a VM; as [`super::save`], but chips may be missing.
///
/// Returns the first vCPU too, for what an image says about the guest.
pub fn save_any(
    vm: &VmFd,
    vcpus: &[&VcpuFd],
    msrs: &MsrSet,
) -> Result<(Vec<StateSection>, Option<VcpuV1>), KvmStateError> {
    let mut sections = Vec::with_capacity(vcpus.len() + 3);
    // The clock first: it runs on while the rest is read, and belongs to the moment of the pause.
    let clock = board::save_clock(vm)?;
    let chips = Chips::save(vm)?;
    let mut first = None;
    for (number, vcpu) in (0..).zip(vcpus) {
        let state = save_vcpu(vm, vcpu, number, msrs)?;
        sections.push(StateSection::encode(number, &state));
        first.get_or_insert(state);
    }
    sections.extend(
        chips
            .irqchip
            .map(|irqchip| StateSection::encode(0, &irqchip)),
    );
    sections.extend(chips.pit.map(|pit| StateSection::encode(0, &pit)));
    sections.push(StateSection::encode(0, &clock));
    Ok((sections, first))
}

/// Restores what [`save_any`] saved into a VM with as many new vCPUs, and takes its sections.
///
/// A chip that the saved VM had and this one lacks is KVM's error. Writes guest memory, as
/// [`super::restore`] does.
pub fn restore_any(
    vm: &VmFd,
    vcpus: &[&VcpuFd],
    state: &mut StateSet,
    policy: ClockPolicy,
) -> Result<(), KvmStateError> {
    let saved = take_vcpus(state, vcpus.len())?;
    let clock = state.take::<ClockV1>(0)?;
    let chips = Chips {
        irqchip: match state.has::<IrqchipV1>(0) {
            true => Some(state.take(0)?),
            false => None,
        },
        pit: match state.has::<PitV1>(0) {
            true => Some(state.take(0)?),
            false => None,
        },
    };
    let passed = board::passed_since(&clock, policy);
    let passed_ns = u64::try_from(passed.as_nanos()).unwrap_or(u64::MAX);
    board::set_clock(vm, clock.guest_ns.saturating_add(passed_ns))?;
    chips.restore(vm)?;
    let Some(first) = saved.first() else {
        return Ok(());
    };
    let target = TscTarget::now(&first.tsc, passed);
    for ((number, vcpu), saved) in (0..).zip(vcpus).zip(&saved) {
        let how = VcpuRestore {
            cpuid: true,
            tsc: Some(target),
        };
        restore_vcpu(vm, vcpu, number, saved, how)?;
    }
    Ok(())
}
