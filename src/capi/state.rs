//! A guest's state: sections by name, KVM's part of it included.

use std::ffi::{c_char, c_int, c_void};
use std::os::fd::BorrowedFd;
use std::sync::{PoisonError, RwLock};

use super::out::{SizedOut, fill};
use super::status::{Failure, guard, lvp_status};
use super::{check_out, handle, str_argument, write_out};
use crate::host::{ClockPolicy, HostError, SavedState};

symbol_versions!("0.1":
    lvp_state_new,
    lvp_state_add,
    lvp_state_find,
    lvp_state_section_count,
    lvp_state_section,
    lvp_state_free,
    lvp_kvm_state_save,
    lvp_kvm_state_restore,
);

/// The state of a guest but for its memory: sections, each with a name, a number and a version.
/// Opaque; made by lvp_state_new() or lvp_image_state() and released by lvp_state_free(), or lent
/// to a save_state callback for its duration.
#[derive(Debug)]
pub struct lvp_state {
    state: RwLock<SavedState>,
}

impl lvp_state {
    pub(super) fn new(state: SavedState) -> Self {
        Self {
            state: RwLock::new(state),
        }
    }

    pub(super) fn into_inner(self) -> SavedState {
        self.state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `work` on the state; its changes are whole or not made.
    fn change<T>(&self, work: impl FnOnce(&mut SavedState) -> T) -> T {
        work(&mut self.state.write().unwrap_or_else(PoisonError::into_inner))
    }

    fn look<T>(&self, work: impl FnOnce(&SavedState) -> T) -> T {
        work(&self.state.read().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Longest name of a section, with the zero byte that ends it and room up to a multiple of 8.
pub const LVP_SECTION_KIND_SIZE: usize = 72;

/// A section of state. Set struct_size before the call.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_section {
    /// sizeof(lvp_section), as the caller was compiled.
    pub struct_size: usize,
    /// What it describes, ended by a zero byte.
    pub kind: [c_char; LVP_SECTION_KIND_SIZE],
    /// Which one of its kind.
    pub instance: u32,
    /// Version of its layout.
    pub version: u32,
    /// Length in bytes.
    pub bytes: u64,
    /// The bytes: from a state, valid until the next call that changes that state or frees it.
    /// NULL from an image.
    pub data: *const c_void,
}

impl SizedOut for lvp_section {
    const SIZE_FIRST: usize = 104;
    fn set_size(&mut self, size: usize) {
        self.struct_size = size;
    }
}

/// Makes a section's description.
pub(super) fn section(
    kind: &str,
    instance: u32,
    version: u16,
    bytes: u64,
    data: *const c_void,
) -> lvp_section {
    let mut name = [0; LVP_SECTION_KIND_SIZE];
    // Shorter by the limit on names; a hostile image has been refused before.
    for (to, &from) in name.iter_mut().zip(kind.as_bytes()) {
        *to = c_char::from_ne_bytes([from]);
    }
    lvp_section {
        struct_size: 0,
        kind: name,
        instance,
        version: version.into(),
        bytes,
        data,
    }
}

fn describe(found: &crate::host::StateSection) -> lvp_section {
    section(
        &found.kind,
        found.instance,
        found.version,
        found.payload.len() as u64,
        found.payload.as_ptr().cast(),
    )
}

/// Makes an empty state.
///
/// @param state_out  receives the state; release it with lvp_state_free()
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `state_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_state_new(state_out: *mut *mut lvp_state) -> lvp_status {
    guard(|| {
        check_out(state_out, "state_out")?;
        let state = Box::into_raw(Box::new(lvp_state::new(SavedState::default())));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(state_out, state, "state_out") }
    })
}

/// Adds a section of the VMM's own.
///
/// @param kind      what it describes: from 1 to 64 bytes of UTF-8 but for "vcpu", "irqchip",
///                  "pit" and "clock", which lvp_kvm_state_save() adds; borrowed for the call
/// @param instance  which one of its kind
/// @param version   version of the data's layout; from 0 to 65535
/// @param data      the state; copied. NULL where `bytes` is 0.
/// @param bytes     its length; 16 MiB at most
///
/// Returns LVP_OK; LVP_E_INVALID (also: this kind and instance is there already). Does not block.
/// Calls that change one state must not overlap with others on it that use its data.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_state_add(
    state: *mut lvp_state,
    kind: *const c_char,
    instance: u32,
    version: u32,
    data: *const c_void,
    bytes: usize,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let state = unsafe { handle(state, "state") }?;
        // SAFETY: the caller's contract.
        let kind = unsafe { str_argument(kind, "kind") }?;
        let version =
            u16::try_from(version).map_err(|_| Failure::invalid("version is above 65535"))?;
        // SAFETY: the caller's contract.
        let data = unsafe { super::bytes_argument(data, bytes, "data") }?;
        state
            .change(|state| state.add(kind, instance, version, data))
            .map_err(HostError::from)?;
        Ok(())
    })
}

/// Finds a section by its name and number.
///
/// @param section_out  set section_out->struct_size first
///
/// Returns LVP_OK; LVP_E_NOT_FOUND; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_state_find(
    state: *const lvp_state,
    kind: *const c_char,
    instance: u32,
    section_out: *mut lvp_section,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let state = unsafe { handle(state, "state") }?;
        // SAFETY: the caller's contract.
        let kind = unsafe { str_argument(kind, "kind") }?;
        let found = state.look(|state| state.find(kind, instance).map(describe));
        let found =
            found.ok_or_else(|| Failure::not_found(format!("no section {kind}.{instance}")))?;
        // SAFETY: the caller's contract.
        unsafe { fill(section_out, found, "section_out") }
    })
}

/// Returns how many sections a state has; 0 where `state` is NULL. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `state` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_state_section_count(state: *const lvp_state) -> usize {
    let mut count = 0;
    let _status = guard(|| {
        // SAFETY: the caller's contract.
        count = unsafe { handle(state, "state") }?.look(|state| state.sections().len());
        Ok(())
    });
    count
}

/// Tells of one section.
///
/// @param index        from 0 to lvp_state_section_count() - 1
/// @param section_out  set section_out->struct_size first
///
/// Returns LVP_OK; LVP_E_NOT_FOUND; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_state_section(
    state: *const lvp_state,
    index: usize,
    section_out: *mut lvp_section,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let state = unsafe { handle(state, "state") }?;
        let found = state.look(|state| state.sections().get(index).map(describe));
        let found = found.ok_or_else(|| Failure::not_found(format!("no section {index}")))?;
        // SAFETY: the caller's contract.
        unsafe { fill(section_out, found, "section_out") }
    })
}

/// Releases a state. NULL is ignored. Not for one that a callback was lent. Does not block.
///
/// Since: 0.1
///
/// # Safety
/// `state` is NULL or a live handle that nothing else uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_state_free(state: *mut lvp_state) {
    if state.is_null() {
        return;
    }
    let _status = guard(|| {
        // SAFETY: it came from `Box::into_raw`, and the caller gives it up.
        drop(unsafe { Box::from_raw(state) });
        Ok(())
    });
}

/// How a restore treats the guest's clocks.
pub type lvp_clock = u32;
/// They go on where they stopped.
pub const LVP_CLOCK_CONTINUE: lvp_clock = 0;
/// They are moved on by the time that has passed since.
pub const LVP_CLOCK_REALTIME: lvp_clock = 1;

/// Adds what KVM keeps of a VM: vCPUs with MSRs and local APICs, interrupt controllers and timer
/// where KVM has them, and the clock; read in the order that loses nothing.
///
/// For any VM on KVM. No vCPU may run, and no exit may be pending: in a save_state callback that
/// is so for vCPUs that stopped at their gates.
///
/// @param vm_fd       the VM's descriptor; stays the caller's
/// @param vcpu_fds    the descriptors of all vCPUs, in their order
/// @param vcpu_count  how many; at least 1
///
/// Returns LVP_OK; LVP_E_INVALID; LVP_E_HOST (a descriptor is not KVM's, or /dev/kvm cannot be
/// opened: a state that a callback was lent does not open it); LVP_E_INCOMPATIBLE (KVM refused;
/// the guest may run guests of its own). On an error nothing was added. Blocks while vCPUs are in
/// the kernel.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_kvm_state_save(
    state: *mut lvp_state,
    vm_fd: c_int,
    vcpu_fds: *const c_int,
    vcpu_count: usize,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let state = unsafe { handle(state, "state") }?;
        // SAFETY: the caller's contract.
        let (vm, vcpus) = unsafe { kvm_fds(vm_fd, vcpu_fds, vcpu_count) }?;
        state
            .change(|state| state.save_kvm(vm, &vcpus))
            .map_err(HostError::from)?;
        Ok(())
    })
}

/// Sets what lvp_kvm_state_save() saved, in the order that KVM needs, in a VM that the caller made
/// with as many vCPUs, the same chips in KVM, and its memory registered and filled.
///
/// Interrupt controllers come before vCPUs (KVM refuses it otherwise); the vCPUs have never run.
/// Their CPUID is set here too. May write guest memory.
///
/// @param clock  LVP_CLOCK_CONTINUE or LVP_CLOCK_REALTIME
///
/// Returns LVP_OK, and the sections are gone from `state`: what is left is the VMM's own;
/// LVP_E_INVALID; LVP_E_NOT_FOUND (a vCPU has no section); LVP_E_HOST; LVP_E_INCOMPATIBLE (KVM
/// refuses the state; the VM is half-set and must not run); LVP_E_CORRUPT.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_kvm_state_restore(
    state: *mut lvp_state,
    vm_fd: c_int,
    vcpu_fds: *const c_int,
    vcpu_count: usize,
    clock: lvp_clock,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let state = unsafe { handle(state, "state") }?;
        // SAFETY: the caller's contract.
        let (vm, vcpus) = unsafe { kvm_fds(vm_fd, vcpu_fds, vcpu_count) }?;
        let policy = match clock {
            LVP_CLOCK_CONTINUE => ClockPolicy::Continue,
            LVP_CLOCK_REALTIME => ClockPolicy::Realtime,
            other => return Err(Failure::invalid(format!("there is no clock {other}"))),
        };
        state
            .change(|state| state.restore_kvm(vm, &vcpus, policy))
            .map_err(HostError::from)?;
        Ok(())
    })
}

/// Borrows a descriptor of the caller's.
///
/// # Safety
/// `fd` stays open for `'a`, if it is one: a closed number makes calls fail, not worse.
pub(super) unsafe fn fd_argument<'a>(fd: c_int, name: &str) -> Result<BorrowedFd<'a>, Failure> {
    if fd < 0 {
        return Err(Failure::invalid(format!("{name} is {fd}")));
    }
    // SAFETY: not -1; open by the function's contract.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// Borrows the descriptors of a VM and its vCPUs.
///
/// # Safety
/// The descriptors stay open for `'a`; `vcpu_fds` is null or has `count` readable members.
unsafe fn kvm_fds<'a>(
    vm_fd: c_int,
    vcpu_fds: *const c_int,
    count: usize,
) -> Result<(BorrowedFd<'a>, Vec<BorrowedFd<'a>>), Failure> {
    // SAFETY: by the function's contract.
    let vm = unsafe { fd_argument(vm_fd, "vm_fd") }?;
    // SAFETY: by the function's contract.
    let fds = unsafe { super::slice_argument(vcpu_fds, count, "vcpu_fds") }?;
    if fds.is_empty() {
        return Err(Failure::invalid("vcpu_count is 0"));
    }
    let vcpus = fds.iter().map(|&fd| {
        // SAFETY: by the function's contract.
        unsafe { fd_argument(fd, "a member of vcpu_fds") }
    });
    Ok((vm, vcpus.collect::<Result<_, _>>()?))
}
