//! KVM ioctls that kvm-ioctls lacks, or that it wraps in a way we cannot use.
#![expect(
    unsafe_code,
    reason = "kvm-ioctls 0.25 has no KVM_CLEAR_DIRTY_LOG, SREGS2 or signal mask"
)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd};

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log,
    kvm_reinject_control, kvm_signal_mask, kvm_sregs2, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::mapping::GuestMapping;
use super::signal;

const KVMIO: u64 = 0xAE;
const WRITE: u64 = 1;
const READ: u64 = 2;

/// Returns an ioctl number; `direction` is as seen from user space.
const fn number(direction: u64, nr: u64, bytes: usize) -> u64 {
    (direction << 30) | ((bytes as u64) << 16) | (KVMIO << 8) | nr
}

const KVM_GET_DIRTY_LOG: u64 = 0x4010_AE42;
const KVM_SET_USER_MEMORY_REGION: u64 = 0x4020_AE46;
const KVM_REINJECT_CONTROL: u64 = 0xAE71;
const KVM_SET_SIGNAL_MASK: u64 = 0x4004_AE8B;
const KVM_GET_XSAVE: u64 = 0x9000_AEA4;
const KVM_SET_XSAVE: u64 = 0x5000_AEA5;
const KVM_CLEAR_DIRTY_LOG: u64 = 0xC018_AEC0;
const KVM_GET_SREGS2: u64 = 0x8140_AECC;
const KVM_SET_SREGS2: u64 = 0x4140_AECD;
const KVM_GET_XSAVE2: u64 = 0x9000_AECF;
const KVM_SET_DEVICE_ATTR: u64 = 0x4018_AEE1;
const KVM_GET_DEVICE_ATTR: u64 = 0x4018_AEE2;

// Transposed direction bits or a wrong struct size must not survive compilation.
const _: () = assert!(KVM_GET_DIRTY_LOG == number(WRITE, 0x42, size_of::<kvm_dirty_log>()));
const _: () = assert!(
    KVM_SET_USER_MEMORY_REGION == number(WRITE, 0x46, size_of::<kvm_userspace_memory_region>())
);
const _: () = assert!(KVM_REINJECT_CONTROL == number(0, 0x71, 0));
const _: () = assert!(KVM_SET_SIGNAL_MASK == number(WRITE, 0x8B, size_of::<kvm_signal_mask>()));
const _: () = assert!(KVM_GET_XSAVE == number(READ, 0xA4, size_of::<kvm_xsave>()));
const _: () = assert!(KVM_SET_XSAVE == number(WRITE, 0xA5, size_of::<kvm_xsave>()));
const _: () =
    assert!(KVM_CLEAR_DIRTY_LOG == number(READ | WRITE, 0xC0, size_of::<kvm_clear_dirty_log>()));
const _: () = assert!(KVM_GET_SREGS2 == number(READ, 0xCC, size_of::<kvm_sregs2>()));
const _: () = assert!(KVM_SET_SREGS2 == number(WRITE, 0xCD, size_of::<kvm_sregs2>()));
const _: () = assert!(KVM_GET_XSAVE2 == number(READ, 0xCF, size_of::<kvm_xsave>()));
const _: () = assert!(KVM_SET_DEVICE_ATTR == number(WRITE, 0xE1, size_of::<kvm_device_attr>()));
const _: () = assert!(KVM_GET_DEVICE_ATTR == number(WRITE, 0xE2, size_of::<kvm_device_attr>()));

/// The least that KVM copies for an XSAVE area, whatever the CPU has.
pub const XSAVE_BYTES_MIN: usize = size_of::<kvm_xsave>();

fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns a second handle of `/dev/kvm`, which the caller keeps open; not checked to be one.
pub fn borrow_kvm(kvm: BorrowedFd<'_>) -> io::Result<Kvm> {
    let own = kvm.try_clone_to_owned()?;
    // SAFETY: the descriptor is a fresh duplicate that nothing else owns.
    Ok(unsafe { Kvm::from_raw_fd(own.into_raw_fd()) })
}

/// Returns a second handle of a VM that the caller keeps.
pub fn borrow_vm(kvm: &Kvm, vm: BorrowedFd<'_>) -> io::Result<VmFd> {
    let own = vm.try_clone_to_owned()?;
    // SAFETY: the descriptor is a fresh duplicate that nothing else owns.
    let vm = unsafe { kvm.create_vmfd_from_rawfd(own.into_raw_fd()) };
    vm.map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Returns a second handle of a vCPU that the caller keeps.
pub fn borrow_vcpu(vm: &VmFd, vcpu: BorrowedFd<'_>) -> io::Result<VcpuFd> {
    let own = vcpu.try_clone_to_owned()?;
    // SAFETY: the descriptor is a fresh duplicate that nothing else owns.
    let vcpu = unsafe { vm.create_vcpu_from_rawfd(own.into_raw_fd()) };
    vcpu.map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Returns the VM's descriptor, borrowed.
pub fn vm_fd(vm: &VmFd) -> BorrowedFd<'_> {
    // SAFETY: `vm` owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(vm.as_raw_fd()) }
}

/// Returns the vCPU's descriptor, borrowed.
pub fn vcpu_fd(vcpu: &VcpuFd) -> BorrowedFd<'_> {
    // SAFETY: `vcpu` owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(vcpu.as_raw_fd()) }
}

/// Maps guest memory into a VM as `slot`, or changes the flags of a slot that maps it already.
///
/// KVM keeps using the memory until the slot or the VM is gone. The caller keeps `mapping` (which
/// keeps the range mapped) for as long.
pub fn set_memory_slot(
    vm: impl AsFd,
    slot: u32,
    flags: u32,
    gpa: u64,
    mapping: &GuestMapping,
) -> io::Result<()> {
    let arg = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: gpa,
        memory_size: mapping.len() as u64,
        userspace_addr: mapping.hva() as u64,
    };
    let fd = vm.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `arg` during the call. The range it names is guest memory, to
    // which no Rust reference exists by the contract of `GuestMapping::new`, so a guest that
    // writes it breaks no aliasing rule; how long it stays mapped is the caller's promise above.
    check(unsafe { libc::ioctl(fd, KVM_SET_USER_MEMORY_REGION, &raw const arg) })
}

/// Copies a slot's dirty log to `bitmap`, which has one bit for each of its `page_count` pages.
///
/// Clears nothing where manual protection is on; else clears the log and write-protects.
pub fn get_dirty_log(
    vm: impl AsFd,
    slot: u32,
    page_count: u64,
    bitmap: &mut [u64],
) -> io::Result<()> {
    assert!(
        bitmap.len() as u64 * 64 >= page_count,
        "bitmap shorter than the slot"
    );
    let mut arg = kvm_dirty_log {
        slot,
        ..Default::default()
    };
    arg.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    let fd = vm.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `arg` and writes one bit a page of the slot, rounded up to whole
    // words, to `bitmap`; the assertion above bounds that as long as `page_count` is the slot's
    // length, which a slot keeps for life (KVM refuses to resize one).
    check(unsafe { libc::ioctl(fd, KVM_GET_DIRTY_LOG, &raw const arg) })
}

/// Write-protects again, and takes from the log, every page whose bit is set in `bits`.
///
/// `first_page` is a multiple of 64; `page_count` is one too, or ends at the slot's end.
pub fn clear_dirty_log(
    vm: impl AsFd,
    slot: u32,
    first_page: u64,
    page_count: u32,
    bits: &[u64],
) -> io::Result<()> {
    assert_eq!(first_page % 64, 0, "KVM takes windows aligned to 64 pages");
    assert!(
        bits.len() as u64 * 64 >= u64::from(page_count),
        "bitmap shorter than the window"
    );
    let mut arg = kvm_clear_dirty_log {
        slot,
        num_pages: page_count,
        first_page,
        ..Default::default()
    };
    arg.__bindgen_anon_1.dirty_bitmap = bits.as_ptr().cast_mut().cast();
    let fd = vm.as_fd().as_raw_fd();
    // SAFETY: the kernel reads `arg` and `page_count` bits from `bits`, which holds as many by
    // the assertion above; it writes neither and keeps neither.
    check(unsafe { libc::ioctl(fd, KVM_CLEAR_DIRTY_LOG, &raw const arg) })
}

/// Makes `KVM_RUN` let `kick` through, and only it, while the thread has it blocked otherwise.
///
/// A kick that arrives outside `KVM_RUN` stays pending and ends the next one at once, so none is
/// lost between a test of a flag and the entry.
pub fn set_signal_mask(vcpu: &VcpuFd, kick: libc::c_int) -> io::Result<()> {
    block_during_run(vcpu, signal::all_but(kick))
}

/// Blocks the signals in `blocked` (signal 1 in bit 0), and no others, while `KVM_RUN` runs.
pub fn block_during_run(vcpu: &VcpuFd, blocked: u64) -> io::Result<()> {
    #[repr(C)]
    struct Mask {
        len: u32,
        // `kvm_signal_mask` is packed this way: the set follows the length without padding.
        set: [u8; signal::KERNEL_SIGSET_BYTES],
    }
    const _: () = assert!(size_of::<Mask>() == 4 + signal::KERNEL_SIGSET_BYTES);
    let arg = Mask {
        len: 8,
        set: blocked.to_ne_bytes(),
    };
    // SAFETY: the kernel reads the length and as many bytes of the set, all of them in `arg`.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const arg) })
}

/// Undoes [`block_during_run`]: `KVM_RUN` has the mask of its thread again.
pub fn keep_mask_during_run(vcpu: &VcpuFd) -> io::Result<()> {
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: a null argument takes the mask away; the kernel reads nothing.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, none) })
}

/// Says whether the timer chip delivers ticks later that the guest was too slow to take.
pub fn set_pit_reinject(vm: impl AsFd, on: bool) -> io::Result<()> {
    let arg = kvm_reinject_control {
        pit_reinject: u8::from(on),
        ..Default::default()
    };
    let fd = vm.as_fd().as_raw_fd();
    // SAFETY: the kernel reads one `kvm_reinject_control` during the call.
    check(unsafe { libc::ioctl(fd, KVM_REINJECT_CONTROL, &raw const arg) })
}

/// Returns the special registers with the PDPTRs (needs `KVM_CAP_SREGS2`).
pub fn get_sregs2(vcpu: &VcpuFd) -> io::Result<kvm_sregs2> {
    let mut sregs = kvm_sregs2::default();
    // SAFETY: the kernel writes one `kvm_sregs2`, by the size in the ioctl's number.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_SREGS2, &raw mut sregs) })?;
    Ok(sregs)
}

/// Sets the special registers with the PDPTRs (needs `KVM_CAP_SREGS2`).
pub fn set_sregs2(vcpu: &VcpuFd, sregs: &kvm_sregs2) -> io::Result<()> {
    // SAFETY: the kernel reads one `kvm_sregs2`, by the size in the ioctl's number.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SREGS2, &raw const *sregs) })
}

/// Returns how many bytes of XSAVE state this VM's vCPUs have, and whether `KVM_GET_XSAVE2` works.
pub fn xsave_bytes(vm: &VmFd) -> (usize, bool) {
    let reported = vm.check_extension_int(kvm_ioctls::Cap::Xsave2);
    // 0 where the kernel has no KVM_GET_XSAVE2; then the state is the fixed 4096 bytes.
    usize::try_from(reported)
        .ok()
        .filter(|&bytes| bytes >= XSAVE_BYTES_MIN)
        .map_or((XSAVE_BYTES_MIN, false), |bytes| (bytes, true))
}

/// Returns the XSAVE area of `vcpu`, a vCPU of `vm`.
pub fn get_xsave(vm: &VmFd, vcpu: &VcpuFd) -> io::Result<Vec<u8>> {
    let (bytes, has_xsave2) = xsave_bytes(vm);
    let mut area = vec![0_u64; bytes.div_ceil(8)];
    let request = if has_xsave2 {
        KVM_GET_XSAVE2
    } else {
        KVM_GET_XSAVE
    };
    // SAFETY: KVM_GET_XSAVE2 writes as many bytes as KVM_CAP_XSAVE2 of this VM reports, and
    // KVM_GET_XSAVE writes 4096; `area` is as long as `xsave_bytes` said for either.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), request, area.as_mut_ptr()) })?;
    let mut out: Vec<u8> = area.iter().flat_map(|word| word.to_ne_bytes()).collect();
    out.truncate(bytes);
    Ok(out)
}

/// Sets the XSAVE area of `vcpu`, a vCPU of `vm`.
///
/// An area longer than this host's is refused; a shorter one is extended by zeros, which are the
/// initial state of the components it lacks.
pub fn set_xsave(vm: &VmFd, vcpu: &VcpuFd, area: &[u8]) -> io::Result<()> {
    let (bytes, _) = xsave_bytes(vm);
    if area.len() > bytes {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "{} bytes of XSAVE state; this host's vCPUs have {bytes}",
                area.len()
            ),
        ));
    }
    let mut words = vec![0_u64; bytes.div_ceil(8)];
    for (word, chunk) in words.iter_mut().zip(area.chunks(8)) {
        let mut raw = [0; 8];
        raw[..chunk.len()].copy_from_slice(chunk);
        *word = u64::from_ne_bytes(raw);
    }
    // SAFETY: the kernel reads as many bytes as the VM's vCPUs have XSAVE state, which `words`
    // holds by its construction from `xsave_bytes`.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_XSAVE, words.as_ptr()) })
}

/// Returns what the guest's time stamp counter reads minus what the host's does.
///
/// An error where KVM lacks the attribute (before Linux 5.16).
pub fn get_tsc_offset(vcpu: &VcpuFd) -> io::Result<u64> {
    let mut offset = 0_u64;
    let attr = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: (&raw mut offset) as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads `attr` and writes the attribute's 8 bytes to `offset`.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attr) })?;
    Ok(offset)
}

/// Sets what [`get_tsc_offset`] returns. Some KVMs say yes and change nothing: read it back.
pub fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> io::Result<()> {
    let attr = kvm_device_attr {
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: (&raw const offset) as u64,
        flags: 0,
    };
    // SAFETY: the kernel reads `attr` and the attribute's 8 bytes from `offset`.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attr) })
}
