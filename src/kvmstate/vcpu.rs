//! Saving and restoring one vCPU.

use std::io;

use kvm_bindings::{
    KVM_SREGS2_FLAGS_PDPTRS_VALID, Msrs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_sregs,
    kvm_sregs2,
};
use kvm_ioctls::{VcpuFd, VmFd};

use super::msrs::{self, MsrSet};
use super::tsc::{self, TscTarget};
use super::{KvmStateError, cpuid_entries, cpuid_table, facts};
use crate::state::CpuidEntry;
use crate::state::vcpu::{LapicV1, MsrV1, VcpuV1};
use crate::sys;

/// `KVM_CAP_SREGS2`, which kvm-ioctls does not name.
const CAP_SREGS2: libc::c_ulong = 200;

/// Returns what a failed call on vCPU `number` was.
fn failed(what: &'static str, vcpu: u32) -> impl FnOnce(io::Error) -> KvmStateError {
    move |source| KvmStateError::Vcpu { what, vcpu, source }
}

/// Saves one vCPU of `vm`, which is stopped and whose pending exit is complete.
///
/// Reading is not free of effects inside KVM, hence the order:
/// - MP_STATE first: it makes KVM take a pending INIT or SIPI, which rewrites registers.
/// - VCPU_EVENTS before registers: older kernels move the payload of a pending exception to CR2
///   and DR6 here.
/// - the rest in any order, with the time stamp counter last.
pub fn save_vcpu(
    vm: &VmFd,
    vcpu: &VcpuFd,
    number: u32,
    msrs: &MsrSet,
) -> Result<VcpuV1, KvmStateError> {
    let get = |what| KvmStateError::vcpu(what, number);
    let cpuid = cpuid_entries(
        &vcpu
            .get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(get("read the CPUID"))?,
    );
    refuse_nested(&cpuid, number)?;
    let mp_state = vcpu.get_mp_state().map_err(get("read the run state"))?;
    let events = vcpu.get_vcpu_events().map_err(get("read the events"))?;
    let regs = vcpu.get_regs().map_err(get("read the registers"))?;
    let (sregs, pdptrs) = get_sregs(vm, vcpu, number)?;
    Ok(VcpuV1 {
        mp_state: mp_state.mp_state,
        regs,
        sregs,
        pdptrs,
        xcrs: vcpu.get_xcrs().map_err(get("read the XCRs"))?,
        xsave: sys::kvm::get_xsave(vm, vcpu).map_err(failed("read the XSAVE area", number))?,
        debug_regs: vcpu
            .get_debug_regs()
            .map_err(get("read the debug registers"))?,
        events,
        lapic: get_lapic(vcpu, number)?,
        msrs: msrs.save(vcpu, number)?,
        cpuid,
        tsc: tsc::save(vcpu, number)?,
    })
}

/// Reads the local APIC; all zeros, which none ever is, where the VMM emulates it and not KVM.
fn get_lapic(vcpu: &VcpuFd, number: u32) -> Result<LapicV1, KvmStateError> {
    match vcpu.get_lapic() {
        Ok(lapic) => Ok(LapicV1(lapic)),
        Err(error) if error.errno() == libc::EINVAL => Ok(LapicV1(kvm_lapic_state::default())),
        Err(error) => Err(KvmStateError::vcpu("read the local APIC", number)(error)),
    }
}

fn refuse_nested(cpuid: &[CpuidEntry], vcpu: u32) -> Result<(), KvmStateError> {
    facts::nested_feature(cpuid).map_or(Ok(()), |feature| {
        Err(KvmStateError::Nested { vcpu, feature })
    })
}

fn get_sregs(
    vm: &VmFd,
    vcpu: &VcpuFd,
    number: u32,
) -> Result<(kvm_sregs, Option<[u64; 4]>), KvmStateError> {
    if vm.check_extension_raw(CAP_SREGS2) <= 0 {
        // Without SREGS2, KVM reads the PDPTRs of a PAE guest from its memory again.
        let sregs = vcpu
            .get_sregs()
            .map_err(KvmStateError::vcpu("read the special registers", number))?;
        return Ok((sregs, None));
    }
    let new = sys::kvm::get_sregs2(vcpu).map_err(failed("read the special registers", number))?;
    let valid = new.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    let sregs = kvm_sregs {
        cs: new.cs,
        ds: new.ds,
        es: new.es,
        fs: new.fs,
        gs: new.gs,
        ss: new.ss,
        tr: new.tr,
        ldt: new.ldt,
        gdt: new.gdt,
        idt: new.idt,
        cr0: new.cr0,
        cr2: new.cr2,
        cr3: new.cr3,
        cr4: new.cr4,
        cr8: new.cr8,
        efer: new.efer,
        apic_base: new.apic_base,
        // A pending interrupt is in VCPU_EVENTS too, from where it is restored.
        interrupt_bitmap: [0; 4],
    };
    Ok((sregs, valid.then_some(new.pdptrs)))
}

fn set_sregs(vm: &VmFd, vcpu: &VcpuFd, number: u32, saved: &VcpuV1) -> Result<(), KvmStateError> {
    let sregs = &saved.sregs;
    let Some(pdptrs) = saved
        .pdptrs
        .filter(|_| vm.check_extension_raw(CAP_SREGS2) > 0)
    else {
        // The bitmap would inject the interrupt a second time, beside VCPU_EVENTS.
        let sregs = kvm_sregs {
            interrupt_bitmap: [0; 4],
            ..*sregs
        };
        return vcpu
            .set_sregs(&sregs)
            .map_err(KvmStateError::vcpu("set the special registers", number));
    };
    let sregs = kvm_sregs2 {
        cs: sregs.cs,
        ds: sregs.ds,
        es: sregs.es,
        fs: sregs.fs,
        gs: sregs.gs,
        ss: sregs.ss,
        tr: sregs.tr,
        ldt: sregs.ldt,
        gdt: sregs.gdt,
        idt: sregs.idt,
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        cr8: sregs.cr8,
        efer: sregs.efer,
        apic_base: sregs.apic_base,
        flags: u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID),
        pdptrs,
    };
    sys::kvm::set_sregs2(vcpu, &sregs).map_err(failed("set the special registers", number))
}

/// What of a vCPU is restored.
#[derive(Clone, Copy, Debug)]
pub struct VcpuRestore {
    /// Whether the CPUID is set: only a vCPU that never ran takes one.
    pub cpuid: bool,
    /// Where the time stamp counter goes on; `None` leaves it as it is.
    pub tsc: Option<TscTarget>,
}

/// Restores one vCPU of `vm`; interrupt controllers and clock are restored before.
///
/// The order is what KVM needs:
/// - CPUID before XCRS, XSAVE and MSRs, whose valid bits depend on it.
/// - XCRS before XSAVE: components that XCR0 disables would be dropped.
/// - SREGS before LAPIC: the APIC base decides between xAPIC and x2APIC.
/// - the time stamp counter and all MSRs but the deadline before LAPIC.
/// - LAPIC, and then the deadline: written before the timer is in deadline mode, KVM accepts it,
///   drops it, and the guest's timer is dead.
/// - VCPU_EVENTS after all that may clear or inject something.
/// - MP_STATE last: from here on the vCPU is what it was.
pub fn restore_vcpu(
    vm: &VmFd,
    vcpu: &VcpuFd,
    number: u32,
    saved: &VcpuV1,
    how: VcpuRestore,
) -> Result<(), KvmStateError> {
    let set = |what| KvmStateError::vcpu(what, number);
    if how.cpuid {
        vcpu.set_cpuid2(&cpuid_table(&saved.cpuid)?)
            .map_err(set("set the CPUID"))?;
        tsc::restore_rate(vm, vcpu, number, &saved.tsc)?;
    }
    vcpu.set_regs(&saved.regs)
        .map_err(set("set the registers"))?;
    vcpu.set_xcrs(&saved.xcrs).map_err(set("set the XCRs"))?;
    sys::kvm::set_xsave(vm, vcpu, &saved.xsave).map_err(failed("set the XSAVE area", number))?;
    set_sregs(vm, vcpu, number, saved)?;
    let missed = how.tsc.map_or(0, |target| {
        tsc::restore_value(vcpu, number, &saved.tsc, target)
    });
    let (deadline, others): (Vec<MsrV1>, Vec<MsrV1>) = saved
        .msrs
        .iter()
        .partition(|msr| msr.index == msrs::TSC_DEADLINE);
    msrs::write(vcpu, number, &others)?;
    // All zeros: KVM had none, see `get_lapic`.
    if saved.lapic.0.regs.iter().any(|&byte| byte != 0) {
        vcpu.set_lapic(&saved.lapic.0)
            .map_err(set("set the local APIC"))?;
    }
    if let Some(deadline) = deadline.first().filter(|msr| msr.value != 0) {
        // Where the counter could not be put back, the deadline is as far ahead as it was.
        set_deadline(vcpu, number, deadline.value.wrapping_add(missed))?;
    }
    vcpu.set_vcpu_events(&saved.events)
        .map_err(set("set the events"))?;
    vcpu.set_debug_regs(&saved.debug_regs)
        .map_err(set("set the debug registers"))?;
    vcpu.set_mp_state(kvm_mp_state {
        mp_state: saved.mp_state,
    })
    .map_err(set("set the run state"))
}

/// Arms the TSC-deadline timer. A deadline that has passed fires at once, and reads back as 0.
fn set_deadline(vcpu: &VcpuFd, number: u32, value: u64) -> Result<(), KvmStateError> {
    let entry = kvm_msr_entry {
        index: msrs::TSC_DEADLINE,
        data: value,
        ..Default::default()
    };
    let msrs = Msrs::from_entries(&[entry]).expect("one MSR is not too many");
    match vcpu.set_msrs(&msrs) {
        Ok(1) => Ok(()),
        _ => Err(KvmStateError::SetMsr {
            vcpu: number,
            index: msrs::TSC_DEADLINE,
            value,
        }),
    }
}
