//! The registers with which the first vCPU enters the kernel.

use kvm_bindings::{Msrs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;

use crate::machine::boot::{
    BOOT_PARAMS_GPA, Entry, GDT_GPA, IDT_GPA, PAGE_TABLES_GPA, Protocol, STACK_GPA, START_INFO_GPA,
};

/// Protected mode, paging, numeric errors as exceptions.
const CR0: u64 = 1 << 31 | 1 << 5 | 1 << 4 | 1;
/// Protected mode; bit 4 is always one.
const PROTECTED: u64 = 1 << 4 | 1;
/// Physical address extension.
const CR4: u64 = 1 << 5;
/// Long mode, enabled and active.
const EFER: u64 = 1 << 8 | 1 << 10;

/// Memory types: enabled, write-back by default. Without firmware nobody else says so.
const MTRR_DEFAULT: (u32, u64) = (0x2ff, 1 << 11 | 6);
/// Fast strings are on, as firmware leaves them.
const MISC_ENABLE: (u32, u64) = (0x1a0, 1);

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;

/// Returns the flat segment of the boot protocol's descriptor tables.
fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Sets what firmware would set on every vCPU.
pub(super) fn set_firmware_msrs(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    let read = |index| -> Result<u64, kvm_ioctls::Error> {
        let mut msrs = one_msr(index, 0);
        vcpu.get_msrs(&mut msrs)?;
        Ok(msrs.as_slice()[0].data)
    };
    for (index, bits) in [MTRR_DEFAULT, MISC_ENABLE] {
        if vcpu.set_msrs(&one_msr(index, read(index)? | bits))? != 1 {
            return Err(kvm_ioctls::Error::new(libc::EINVAL));
        }
    }
    Ok(())
}

fn one_msr(index: u32, data: u64) -> Msrs {
    let entry = kvm_msr_entry {
        index,
        data,
        ..Default::default()
    };
    Msrs::from_entries(&[entry]).expect("one MSR is not too many")
}

/// Sets the registers of the first vCPU as the kernel's boot protocol wants them.
pub(super) fn set_entry(vcpu: &VcpuFd, entry: Entry) -> Result<(), kvm_ioctls::Error> {
    match entry.protocol {
        Protocol::Linux64 => enter_linux(vcpu, entry.rip),
        Protocol::Pvh => enter_pvh(vcpu, entry.rip),
    }
}

fn enter_linux(vcpu: &VcpuFd, rip: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = flat_segments(vcpu, true)?;
    sregs.gdt = kvm_dtable {
        base: GDT_GPA,
        limit: 4 * 8 - 1,
        ..Default::default()
    };
    sregs.cr0 = CR0;
    sregs.cr3 = PAGE_TABLES_GPA;
    sregs.cr4 = CR4;
    sregs.efer = EFER;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip,
        rsi: BOOT_PARAMS_GPA,
        rsp: STACK_GPA,
        rflags: 2,
        ..Default::default()
    })
}

/// Protected mode without paging; the kernel loads descriptors of its own.
fn enter_pvh(vcpu: &VcpuFd, rip: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = flat_segments(vcpu, false)?;
    sregs.tr = kvm_segment {
        limit: 0x67,
        type_: 11,
        present: 1,
        ..Default::default()
    };
    sregs.cr0 = PROTECTED;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip,
        rbx: START_INFO_GPA,
        rflags: 2,
        ..Default::default()
    })
}

/// Returns the special registers with segments that cover all memory, and no interrupts.
fn flat_segments(vcpu: &VcpuFd, long: bool) -> Result<kvm_sregs, kvm_ioctls::Error> {
    let data = segment(DATA_SELECTOR, 3, false);
    Ok(kvm_sregs {
        cs: segment(CODE_SELECTOR, 11, long),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        idt: kvm_dtable {
            base: IDT_GPA,
            limit: 0,
            ..Default::default()
        },
        ..vcpu.get_sregs()?
    })
}
