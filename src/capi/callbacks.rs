//! The callbacks by which the engine reaches another VMM.

use std::ffi::c_void;
use std::mem::size_of;
use std::ptr;
use std::time::Duration;

use super::options::Options;
use super::state::lvp_state;
use super::status::{LVP_OK, lvp_status};
use crate::host::{SavedState, Vmm};

/// What the engine asks of a VMM. Zero the struct, set struct_size, then what you have; NULL
/// stands for "nothing to do".
///
/// Called from threads of the library's, which have every signal blocked; one at a time, but
/// host_dirty, which may be called beside any other. A callback that returns something other than
/// LVP_OK fails the checkpoint, and the number is in the error text. None may unwind or call
/// longjmp() out, call lvp_guest_free(), or wait for the job. All may take locks of their own, if
/// no vCPU or device thread holds one of those across lvp_guest_vcpu_gate().
///
/// The order is: pause; the vCPUs stop at their gates; quiesce; save_state; the engine copies what
/// is left; resume; the vCPUs go on. A watchdog ends a pause in which nothing happens for a
/// second, and calls resume itself.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_guest_callbacks {
    /// sizeof(lvp_guest_callbacks), as the caller was compiled.
    pub struct_size: usize,
    /// Handed to every callback; not looked at.
    pub user_data: *mut c_void,
    /// A pause begins. vCPUs that do not pass lvp_guest_vcpu_gate() stop before this returns.
    pub pause: Option<unsafe extern "C" fn(user_data: *mut c_void) -> lvp_status>,
    /// Every vCPU has stopped. Devices finish what they have begun, within timeout_ms; after this
    /// returns nothing of the VMM's writes guest memory or a backend until resume.
    pub quiesce:
        Option<unsafe extern "C" fn(user_data: *mut c_void, timeout_ms: u32) -> lvp_status>,
    /// Adds the guest's state: lvp_kvm_state_save() and lvp_state_add(). `state` is the library's
    /// and valid during the call.
    pub save_state:
        Option<unsafe extern "C" fn(user_data: *mut c_void, state: *mut lvp_state) -> lvp_status>,
    /// Ends a pause, once for each call of `pause` that returned LVP_OK, whatever came between.
    pub resume: Option<unsafe extern "C" fn(user_data: *mut c_void)>,
    /// Makes vCPU number `vcpu` leave KVM_RUN, or not enter it. If set, the library sends no
    /// signal and changes no signal mask. May be called again until the vCPU is at its gate.
    pub kick: Option<unsafe extern "C" fn(user_data: *mut c_void, vcpu: u32)>,
    /// Takes the VMM's own log of the pages it wrote in memory slot `slot`: sets their bits (bit
    /// n % 64 of word n / 64 for page n of the slot) in `bitmap`, which has `words` words and may
    /// have bits set already, and forgets them. Instead of lvp_guest_mark_dirty(), or beside it.
    pub host_dirty: Option<
        unsafe extern "C" fn(user_data: *mut c_void, slot: u32, bitmap: *mut u64, words: usize),
    >,
}

// SAFETY: `repr(C)`, an integer and nullable pointers of 8 bytes each; `struct_size` is first.
unsafe impl Options for lvp_guest_callbacks {
    const SIZE_FIRST: usize = 64;
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        user_data: ptr::null_mut(),
        pause: None,
        quiesce: None,
        save_state: None,
        resume: None,
        kick: None,
        host_dirty: None,
    };
}

/// The caller's functions as the engine calls them.
#[derive(Debug)]
pub(super) struct Callbacks(pub(super) lvp_guest_callbacks);

// SAFETY: the header says that the functions are called, with `user_data`, from threads of the
// library's; whoever registers them promises that they may be.
unsafe impl Send for Callbacks {}
// SAFETY: as above; `host_dirty` is said to be called beside any other.
unsafe impl Sync for Callbacks {}

fn check(status: lvp_status) -> Result<(), i32> {
    if status == LVP_OK {
        Ok(())
    } else {
        Err(status)
    }
}

impl Vmm for Callbacks {
    fn pause(&self) -> Result<(), i32> {
        let Some(pause) = self.0.pause else {
            return Ok(());
        };
        // SAFETY: the caller's function and data, valid until lvp_guest_free() by the header.
        check(unsafe { pause(self.0.user_data) })
    }

    fn quiesce(&self, timeout: Duration) -> Result<(), i32> {
        let Some(quiesce) = self.0.quiesce else {
            return Ok(());
        };
        let timeout_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        // SAFETY: as in `pause`.
        check(unsafe { quiesce(self.0.user_data, timeout_ms) })
    }

    fn resume(&self) {
        if let Some(resume) = self.0.resume {
            // SAFETY: as in `pause`.
            unsafe { resume(self.0.user_data) }
        }
    }

    fn save(&self, state: &mut SavedState) -> Result<(), i32> {
        let Some(save_state) = self.0.save_state else {
            return Ok(());
        };
        let mut lent = lvp_state::new(std::mem::take(state));
        // SAFETY: as in `pause`; `lent` lives over the call.
        let status = unsafe { save_state(self.0.user_data, &raw mut lent) };
        *state = lent.into_inner();
        check(status)
    }

    fn kick(&self, vcpu: usize) {
        if let Some(kick) = self.0.kick {
            let vcpu = u32::try_from(vcpu).expect("vCPU numbers are small");
            // SAFETY: as in `pause`.
            unsafe { kick(self.0.user_data, vcpu) }
        }
    }

    fn take_host_writes(&self, slot: u32, into: &mut [u64]) {
        if let Some(host_dirty) = self.0.host_dirty {
            // SAFETY: as in `pause`; the bitmap is ours, as long as is said, and lent for the call.
            unsafe { host_dirty(self.0.user_data, slot, into.as_mut_ptr(), into.len()) }
        }
    }
}
