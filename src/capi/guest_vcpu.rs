//! What a VMM's vCPU and device threads tell the engine while the guest runs.

use std::ffi::{c_int, c_void};

use super::guest::lvp_guest;
use super::handle;
use super::state::fd_argument;
use super::status::{Failure, LVP_OK, guard, lvp_status};
use crate::host::{HostError, Passage};

symbol_versions!("0.1":
    lvp_guest_vcpu_enter,
    lvp_guest_vcpu_gate,
    lvp_guest_vcpu_leave,
    lvp_guest_mark_dirty,
    lvp_guest_discard,
);

/// What a vCPU's thread does next; negative values are LVP_E_ statuses.
pub type lvp_gate = i32;
/// Call KVM_RUN.
pub const LVP_GATE_ENTER: lvp_gate = 0;
/// kvm_run has an exit: handle it as after KVM_RUN, then call the gate again.
pub const LVP_GATE_HANDLE_EXIT: lvp_gate = 1;

fn gate(pass: impl FnOnce() -> Result<Passage, Failure>) -> lvp_gate {
    let mut next = LVP_GATE_ENTER;
    let status = guard(|| {
        next = match pass()? {
            Passage::Enter => LVP_GATE_ENTER,
            Passage::HandleExit => LVP_GATE_HANDLE_EXIT,
        };
        Ok(())
    });
    if status == LVP_OK { next } else { status }
}

/// Makes the calling thread the one that runs a vCPU. From now on a pause waits for it.
///
/// Blocks the kick signal in this thread and lets it through inside KVM_RUN only
/// (KVM_SET_SIGNAL_MASK), where the thread's other signals stay as they are now; the thread keeps
/// the kick signal blocked until lvp_guest_vcpu_leave(). With callbacks->kick neither is done.
///
/// @param vcpu     from 0 to vcpu_count - 1
/// @param vcpu_fd  the vCPU's descriptor, whose CPUID is set; duplicated
///
/// Returns LVP_OK; LVP_E_INVALID; LVP_E_STATE (a thread has entered as this vCPU); LVP_E_HOST (not
/// a vCPU's descriptor). Does not block.
///
/// Since: 0.1
///
/// # Safety
/// `guest` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_vcpu_enter(
    guest: *mut lvp_guest,
    vcpu: u32,
    vcpu_fd: c_int,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?.vm.guest();
        // SAFETY: the caller's contract.
        let fd = unsafe { fd_argument(vcpu_fd, "vcpu_fd") }?;
        guest
            .vcpu_enter(vcpu as usize, fd)
            .map_err(HostError::from)?;
        Ok(())
    })
}

/// Lets a vCPU into the guest, or holds it while the guest is paused. The first thing in each turn
/// of the vCPU's loop:
///
/// ```c
/// for (;;) {
///     lvp_gate next = lvp_guest_vcpu_gate(guest, n);
///     if (next < 0)
///         break;
///     if (next == LVP_GATE_ENTER && ioctl(vcpu_fd, KVM_RUN, 0) < 0) {
///         if (errno == EINTR || errno == EAGAIN)
///             continue;
///         break;
///     }
///     handle_exit(run);
/// }
/// ```
///
/// While a pause is wanted it completes the vCPU's pending exit first (KVM_RUN with immediate_exit,
/// which is put back to what it was). A flag of the caller's own that ends the loop is looked at
/// after the gate. The thread holds no lock that a callback takes. A thread that will not come back
/// for long, since it waits for something else, leaves first.
///
/// Returns LVP_GATE_ENTER or LVP_GATE_HANDLE_EXIT; LVP_E_INVALID; LVP_E_STATE (no thread has
/// entered as this vCPU; that it was another one is found out only while a pause is wanted);
/// LVP_E_HOST (KVM cannot complete the exit). Blocks while the guest is paused; else it costs some
/// nanoseconds.
///
/// Since: 0.1
///
/// # Safety
/// `guest` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_vcpu_gate(guest: *mut lvp_guest, vcpu: u32) -> lvp_gate {
    gate(|| {
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?.vm.guest();
        Ok(guest.vcpu_gate(vcpu as usize).map_err(HostError::from)?)
    })
}

/// Ends what lvp_guest_vcpu_enter() began, in the same thread: no pause waits for the vCPU any
/// more, and the thread has its signal mask back. The vCPU is not run until a thread enters again;
/// its state can be saved meanwhile.
///
/// Returns LVP_OK (0); LVP_GATE_HANDLE_EXIT where a pending exit led to another: handle it, then
/// call again; LVP_E_INVALID; LVP_E_STATE (this thread has not entered as this vCPU); LVP_E_HOST.
/// Does not block.
///
/// Since: 0.1
///
/// # Safety
/// `guest` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_vcpu_leave(guest: *mut lvp_guest, vcpu: u32) -> lvp_gate {
    gate(|| {
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?.vm.guest();
        Ok(guest.vcpu_leave(vcpu as usize).map_err(HostError::from)?)
    })
}

/// Tells that the VMM wrote guest memory, which KVM's dirty log does not see. Called **after** the
/// write is complete, and before anything that the guest is told about it could be saved.
///
/// Costs nothing worth mentioning; ranges outside every region are ignored. Needed for every write
/// by the process or the kernel on its behalf (read(2) into guest memory, io_uring, vhost).
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `guest` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_mark_dirty(
    guest: *mut lvp_guest,
    gpa: u64,
    bytes: u64,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?.vm.guest();
        check_range(gpa, bytes)?;
        guest.mark_dirty(gpa, bytes);
        Ok(())
    })
}

/// Fails where a range goes past the end of the address space.
fn check_range(gpa: u64, bytes: u64) -> Result<(), Failure> {
    match gpa.checked_add(bytes) {
        Some(_) => Ok(()),
        None => Err(Failure::invalid(format!(
            "{bytes:#x} bytes at gpa {gpa:#x} go past the end of the address space"
        ))),
    }
}

/// Gives memory back to the host; returns what lvp_guest_discard() returns.
pub type lvp_discard_callback = Option<unsafe extern "C" fn(user_data: *mut c_void) -> lvp_status>;

/// Gives memory back to the host (a balloon, free page reporting, unplug) at a time at which that
/// is safe: its bytes are captured first where a checkpoint still needs them, a checkpoint that
/// begins meanwhile waits, and each takes the memory as changed.
///
/// All of it is work of a device, for whose end the quiesce callback waits.
///
/// @param discard    called once, by this thread, with the range safe to discard: madvise(2),
///                   fallocate(2). Must not call lvp_guest_discard(), lvp_guest_add_region(),
///                   lvp_guest_remove_region() or lvp_guest_free(), nor unwind or longjmp() out.
/// @param user_data  handed to `discard`; not looked at
///
/// Returns what `discard` returned, which then is that function's own error; LVP_E_INVALID;
/// LVP_E_HOST; with either nothing was called. Blocks while the range is captured, never for
/// storage. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `guest` is NULL or a live handle; `discard` may be called with `user_data`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_discard(
    guest: *mut lvp_guest,
    gpa: u64,
    bytes: u64,
    discard: lvp_discard_callback,
    user_data: *mut c_void,
) -> lvp_status {
    let mut returned = LVP_OK;
    let status = guard(|| {
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?.vm.guest();
        check_range(gpa, bytes)?;
        let discard = discard.ok_or_else(|| Failure::invalid("discard is NULL"))?;
        // SAFETY: the caller's contract.
        let call = || unsafe { discard(user_data) };
        returned = guest.discard(gpa, bytes, call).map_err(HostError::from)?;
        Ok(())
    });
    if status == LVP_OK { returned } else { status }
}
