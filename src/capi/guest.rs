//! Guests of other VMMs: live checkpoints of a VM that the caller made and runs.

use std::ffi::{c_char, c_int, c_void};
use std::mem::size_of;
use std::ptr;
use std::sync::Arc;

use super::callbacks::{Callbacks, lvp_guest_callbacks};
use super::image::lvp_image;
use super::job::lvp_job;
use super::options::{Options, checkpoint_arguments, lvp_checkpoint_options, read};
use super::state::fd_argument;
use super::status::{Failure, guard, lvp_status};
use super::{check_out, handle, str_argument, write_out};
use crate::host::{
    ForeignGuest, ForeignVm, GuestIdentity, HostError, Kick, KvmHandle, RegionSpec, ThreadCount,
};
use crate::sys::mapping::GuestMapping;

symbol_versions!("0.1":
    lvp_guest_new,
    lvp_guest_add_region,
    lvp_guest_remove_region,
    lvp_guest_checkpoint,
    lvp_guest_fill,
    lvp_guest_free,
);

/// A VM on KVM that the caller made and runs, registered for live checkpoints. Opaque; made by
/// lvp_guest_new(), released by lvp_guest_free(). Every function may be called from any thread at
/// any time, but none after or while the handle is freed.
#[derive(Debug)]
pub struct lvp_guest {
    pub(super) vm: ForeignVm,
}

/// What a guest is registered with. Zero the struct, set struct_size, then the rest.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_guest_options {
    /// sizeof(lvp_guest_options), as the caller was compiled.
    pub struct_size: usize,
    /// Descriptor of the VM (KVM_CREATE_VM). Duplicated; the caller keeps its own.
    pub vm_fd: c_int,
    /// Descriptor of /dev/kvm, above 0; duplicated. 0: the library opens it.
    pub kvm_fd: c_int,
    /// How many vCPUs pass lvp_guest_vcpu_gate(): their numbers are below it. 0 where the pause
    /// callback stops all vCPUs in its own way.
    pub vcpu_count: u32,
    /// Signal that kicks vCPUs out of KVM_RUN; 0: SIGRTMIN. Not used where callbacks->kick is set.
    /// No handler is needed, none is called, and none is replaced.
    pub kick_signal: c_int,
    /// The guest's name in its images; UTF-8, borrowed for the call. NULL: "guest".
    pub name: *const c_char,
    /// The guest's UUID as text; borrowed for the call. NULL: a new one.
    pub uuid: *const c_char,
    /// Text of the VMM's own, in every image: what it needs to make the same VM again. UTF-8, 1 MiB
    /// at most, borrowed for the call. NULL: none.
    pub description: *const c_char,
}

// SAFETY: `repr(C)`, integers and pointers; `struct_size` is first; 4 * 4 + 3 * 8 bytes follow it
// with no padding.
unsafe impl Options for lvp_guest_options {
    const SIZE_FIRST: usize = 48;
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        vm_fd: 0,
        kvm_fd: 0,
        vcpu_count: 0,
        kick_signal: 0,
        name: ptr::null(),
        uuid: ptr::null(),
        description: ptr::null(),
    };
}

/// Longest description: the manifest that holds it has 4 MiB.
const DESCRIPTION_BYTES_MAX: usize = 1 << 20;
/// Longest name, as for domains.
const NAME_BYTES_MAX: usize = 255;

impl lvp_guest_options {
    /// # Safety
    /// The strings are null or zero-terminated.
    unsafe fn identity(&self) -> Result<GuestIdentity, Failure> {
        let text = |text: *const c_char, name: &str, most: usize| {
            if text.is_null() {
                return Ok(None);
            }
            // SAFETY: by the function's contract.
            let text = unsafe { str_argument(text, name) }?;
            if text.len() > most {
                return Err(Failure::invalid(format!(
                    "{name} has {} bytes; {most} are the most",
                    text.len()
                )));
            }
            Ok(Some(text))
        };
        let uuid = match text(self.uuid, "uuid", 64)? {
            Some(uuid) => uuid
                .parse()
                .map_err(|error| Failure::invalid(format!("uuid: {error}")))?,
            None => GuestIdentity::new_uuid(),
        };
        let name = text(self.name, "name", NAME_BYTES_MAX)?.unwrap_or("guest");
        if name.is_empty() || name.chars().any(char::is_control) {
            return Err(Failure::invalid(format!("name: {name:?} is not a name")));
        }
        let description = text(self.description, "description", DESCRIPTION_BYTES_MAX)?;
        Ok(GuestIdentity {
            name: name.to_owned(),
            uuid,
            description: description.unwrap_or_default().to_owned(),
        })
    }
}

/// Registers a VM that the caller made on KVM and runs itself.
///
/// The dirty logs of the registered memory slots, and userfaultfd on their memory, belong to the
/// library while a checkpoint runs. Nothing of the VM is changed otherwise.
///
/// @param options    borrowed for the call
/// @param callbacks  copied; the functions and user_data stay valid until lvp_guest_free() returns
/// @param guest_out  receives the guest; release it with lvp_guest_free()
///
/// Returns LVP_OK; LVP_E_INVALID; LVP_E_HOST (vm_fd or kvm_fd is not KVM's, or /dev/kvm cannot be
/// opened). Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_new(
    options: *const lvp_guest_options,
    callbacks: *const lvp_guest_callbacks,
    guest_out: *mut *mut lvp_guest,
) -> lvp_status {
    guard(|| {
        check_out(guest_out, "guest_out")?;
        check_out(options, "options")?;
        // SAFETY: the caller's contract.
        let options = unsafe { read(options) }?;
        // SAFETY: the caller's contract.
        let callbacks = unsafe { read(callbacks) }?;
        // SAFETY: the caller's contract.
        let identity = unsafe { options.identity() }?;
        // SAFETY: the caller's contract.
        let vm_fd = unsafe { fd_argument(options.vm_fd, "vm_fd") }?;
        let kvm_fd = match options.kvm_fd {
            0 => None,
            // SAFETY: the caller's contract.
            fd => Some(unsafe { fd_argument(fd, "kvm_fd") }?),
        };
        let kick = match (callbacks.kick, options.kick_signal) {
            (Some(_), _) => Kick::Vmm,
            (None, 0) => Kick::Signal(None),
            (None, signal) => Kick::Signal(Some(signal)),
        };
        let vcpu_count = options.vcpu_count as usize;
        let vmm = Arc::new(Callbacks(callbacks));
        let kvm = KvmHandle::open(kvm_fd).map_err(HostError::from)?;
        let guest = ForeignGuest::new(identity, vm_fd, kvm, vcpu_count, kick, vmm)
            .map_err(HostError::from)?;
        let vm = ForeignVm::new(guest);
        let guest = Box::into_raw(Box::new(lvp_guest { vm }));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(guest_out, guest, "guest_out") }
    })
}

/// A memory slot of the caller's VM. Zero the struct, set struct_size, then the rest.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_guest_region {
    /// sizeof(lvp_guest_region), as the caller was compiled.
    pub struct_size: usize,
    /// Guest physical address of the first byte; a multiple of 4096.
    pub gpa: u64,
    /// Where this process has it mapped, readable and writable; a multiple of 4096.
    pub hva: *mut c_void,
    /// Length in bytes; a multiple of 4096.
    pub bytes: u64,
    /// Number of the memory slot.
    pub slot: u32,
    /// Flags that the slot was set with; KVM_MEM_LOG_DIRTY_PAGES is refused.
    pub flags: u32,
    /// The file that is mapped there (memfd, hugetlbfs), above 0; borrowed for the call. 0: none.
    pub fd: c_int,
    /// Must be 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)`, integers and a pointer; `struct_size` is first; 3 * 8 + 4 * 4 bytes follow it
// with no padding.
unsafe impl Options for lvp_guest_region {
    const SIZE_FIRST: usize = 48;
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        gpa: 0,
        hva: ptr::null_mut(),
        bytes: 0,
        slot: 0,
        flags: 0,
        fd: 0,
        reserved: 0,
    };
}

/// Registers a memory slot that the VM has, at first or later (hotplug).
///
/// The memory stays mapped where it is, by this one writable mapping, until
/// lvp_guest_remove_region() or lvp_guest_free() returns. No other process writes it (vhost-user,
/// VFIO): such a guest cannot be checkpointed.
///
/// @param region  borrowed for the call
///
/// Returns LVP_OK; LVP_E_INVALID (not whole pages, not mapped writable, or overlapping a region);
/// LVP_E_BUSY (a checkpoint runs: wait for its job, or cancel it; or the slot's dirty log is in
/// use). Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_add_region(
    guest: *mut lvp_guest,
    region: *const lvp_guest_region,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?.vm.guest();
        check_out(region, "region")?;
        // SAFETY: the caller's contract.
        let region = unsafe { read(region) }?;
        if region.reserved != 0 {
            return Err(Failure::invalid("reserved must be 0"));
        }
        let bytes = usize::try_from(region.bytes).map_err(|_| Failure::invalid("bytes"))?;
        let hva = region.hva.expose_provenance();
        let spec = RegionSpec {
            slot: region.slot,
            flags: region.flags,
            gpa: region.gpa,
            hva,
            bytes,
            fd: match region.fd {
                0 => None,
                // SAFETY: the caller's contract.
                fd => Some(unsafe { fd_argument(fd, "fd") }?),
            },
        };
        guest
            .add_region(&spec, |owner| {
                // SAFETY: `add_region` has found the range mapped readable and writable; the
                // header makes the caller keep it so until the region is removed or the guest
                // freed, both of which wait for `owner` to go; C memory has no Rust reference.
                unsafe { GuestMapping::new(hva, bytes, owner) }
            })
            .map_err(HostError::from)?;
        Ok(())
    })
}

/// Takes a memory slot off. On return the library touches its memory no more, and the caller may
/// take it from the VM and unmap it.
///
/// Returns LVP_OK; LVP_E_INVALID (no such slot); LVP_E_BUSY (a checkpoint runs: wait for its job,
/// or cancel it). Blocks until the last thread of an earlier checkpoint has ended: at once, unless
/// storage hangs. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `guest` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_remove_region(guest: *mut lvp_guest, slot: u32) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?.vm.guest();
        guest.remove_region(slot).map_err(HostError::from)?;
        Ok(())
    })
}

/// Starts a live checkpoint; the guest runs on, but for the pause that the protocol needs.
///
/// @param out      path of the image file to write, or of an existing directory to add an image
///                 to; borrowed for the call. An image that is there stays whole until the new
///                 one is complete.
/// @param options  NULL for the defaults
/// @param job_out  receives the job; release it with lvp_job_free()
///
/// Returns LVP_OK; LVP_E_INVALID; LVP_E_UNSUPPORTED (no region is registered); LVP_E_BUSY (a
/// checkpoint of it runs already); LVP_E_HOST. What goes wrong later is told by lvp_job_wait(),
/// LVP_E_CALLBACK among it. Does not block while memory is copied. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_checkpoint(
    guest: *mut lvp_guest,
    out: *const c_char,
    options: *const lvp_checkpoint_options,
    job_out: *mut *mut lvp_job,
) -> lvp_status {
    guard(|| {
        check_out(job_out, "job_out")?;
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?;
        // SAFETY: the caller's contract.
        let (path, request) = unsafe { checkpoint_arguments(out, options) }?;
        if request.incremental || request.keep.is_some() {
            return Err(Failure::invalid("incremental and keep are for machines"));
        }
        let job = lvp_job::new(guest.vm.start_checkpoint(&path, &request)?);
        let job = Box::into_raw(Box::new(job));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(job_out, job, "job_out") }
    })
}

/// Options of lvp_guest_fill(). Zero the struct, set struct_size, then what you care about.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_fill_options {
    /// sizeof(lvp_fill_options), as the caller was compiled.
    pub struct_size: usize,
    /// Threads that read, check and copy; 0: one a core, 8 at most.
    pub threads: u32,
    /// Not 0: all of the memory is still zeros, as after mapping it: zeros are not written then,
    /// and take no memory of the host's.
    pub memory_is_fresh: u32,
}

// SAFETY: `repr(C)` integers, `struct_size` first; no padding.
unsafe impl Options for lvp_fill_options {
    const SIZE_FIRST: usize = 16;
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        threads: 0,
        memory_is_fresh: 0,
    };
}

/// Fills the registered memory from an image. No vCPU runs yet.
///
/// No byte enters memory before its digest was checked. The state is brought back apart:
/// lvp_image_state(), lvp_kvm_state_restore(), lvp_state_find().
///
/// @param image    has the very regions that are registered: slots, addresses, lengths
/// @param options  NULL for the defaults
///
/// Returns LVP_OK; LVP_E_INVALID (also: other regions; the message has the first difference);
/// LVP_E_CORRUPT and LVP_E_IO (memory is half filled then). Blocks while the image is read.
/// Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_fill(
    guest: *mut lvp_guest,
    image: *const lvp_image,
    options: *const lvp_fill_options,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let guest = unsafe { handle(guest, "guest") }?;
        // SAFETY: the caller's contract.
        let image = unsafe { handle(image, "image") }?;
        // SAFETY: the caller's contract.
        let options = unsafe { read(options) }?;
        let threads = match options.threads {
            0 => None,
            count => Some(ThreadCount::new(count as usize)?.get()),
        };
        Ok(guest
            .vm
            .fill(&image.image, threads, options.memory_is_fresh != 0)?)
    })
}

/// Releases a guest. A checkpoint that runs is cancelled; its job stays valid. NULL is ignored.
///
/// On return the library calls no callback and touches no memory of the guest any more. Blocks for
/// as long as that takes: 100 ms, unless storage hangs. vCPU threads have left before. Not called
/// from a callback. No other call on this handle may run or follow.
///
/// Since: 0.1
///
/// # Safety
/// `guest` is NULL or a live handle that nothing else uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_guest_free(guest: *mut lvp_guest) {
    if guest.is_null() {
        return;
    }
    let _status = guard(|| {
        // SAFETY: it came from `Box::into_raw`, and the caller gives it up.
        let guest = unsafe { Box::from_raw(guest) };
        guest.vm.close();
        drop(guest);
        Ok(())
    });
}
