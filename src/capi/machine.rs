//! Machines: domain XML in, a virtual machine out.

use std::ffi::c_char;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::job::lvp_job;
use super::options::{checkpoint_arguments, lvp_checkpoint_options, lvp_machine_options, read};
use super::status::{Failure, guard, lvp_status};
use super::{check_out, handle, str_argument, write_out};
use crate::host::{Domain, DomainOptions, EndReason, MachineState, RuntimeDir};

symbol_versions!("0.1":
    lvp_machine_new,
    lvp_machine_restore,
    lvp_machine_start,
    lvp_machine_pause,
    lvp_machine_resume,
    lvp_machine_shutdown,
    lvp_machine_destroy,
    lvp_machine_get_state,
    lvp_machine_wait,
    lvp_machine_checkpoint,
    lvp_machine_free,
);

/// A virtual machine. Opaque; made by lvp_machine_new() or lvp_machine_restore(), released by
/// lvp_machine_free(). Every function may be called from any thread at any time, but none after
/// or while the handle is freed.
#[derive(Debug)]
pub struct lvp_machine {
    pub(super) domain: Arc<Domain>,
}

/// What a machine is doing. A program must expect values that it does not know.
pub type lvp_machine_state = u32;
/// Defined, and never started.
pub const LVP_MACHINE_CREATED: lvp_machine_state = 1;
/// Its vCPUs run.
pub const LVP_MACHINE_RUNNING: lvp_machine_state = 2;
/// Its vCPUs are held by lvp_machine_pause().
pub const LVP_MACHINE_PAUSED: lvp_machine_state = 3;
/// It has ended: by itself, or by lvp_machine_destroy().
pub const LVP_MACHINE_SHUTOFF: lvp_machine_state = 4;
/// It has ended by a fault of the guest that nothing handled.
pub const LVP_MACHINE_CRASHED: lvp_machine_state = 5;

pub(super) fn state_number(state: MachineState) -> lvp_machine_state {
    match state {
        MachineState::Created => LVP_MACHINE_CREATED,
        MachineState::Running => LVP_MACHINE_RUNNING,
        MachineState::Paused => LVP_MACHINE_PAUSED,
        MachineState::Shutoff => LVP_MACHINE_SHUTOFF,
        MachineState::Crashed => LVP_MACHINE_CRASHED,
    }
}

/// Makes a machine from libvirt domain XML. Nothing runs yet.
///
/// @param xml          zero-terminated UTF-8, borrowed for the call; docs/domain-xml.md says what
///                     is honoured
/// @param options      NULL for the defaults
/// @param machine_out  receives the machine; release it with lvp_machine_free()
///
/// Returns LVP_OK; LVP_E_INVALID (NULL, or the XML is refused: the message names line and
/// element), LVP_E_UNSUPPORTED, LVP_E_IO (the runtime directory). Does not block on I/O but for
/// that directory. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_new(
    xml: *const c_char,
    options: *const lvp_machine_options,
    machine_out: *mut *mut lvp_machine,
) -> lvp_status {
    guard(|| {
        check_out(machine_out, "machine_out")?;
        // SAFETY: the caller's contract.
        let xml = unsafe { str_argument(xml, "xml") }?;
        // SAFETY: the caller's contract.
        let options = unsafe { read(options) }?;
        options.check_new()?;
        // SAFETY: the caller's contract.
        let options = unsafe { domain_options(&options) }?;
        let domain = Arc::new(Domain::define(xml, options)?);
        let machine = Box::into_raw(Box::new(lvp_machine { domain }));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(machine_out, machine, "machine_out") }
    })
}

/// Makes a machine from an image, with its memory filled and every digest checked. It does not
/// run until lvp_machine_start().
///
/// @param image        path of an image file, or of a directory: then its newest image
/// @param options      NULL for the defaults
/// @param machine_out  receives the machine; release it with lvp_machine_free()
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND (no such image), LVP_E_CORRUPT,
/// LVP_E_INCOMPATIBLE (the message lists what this host lacks), LVP_E_BUSY (the machine runs
/// already; the message names the holder), LVP_E_HOST (/dev/kvm), LVP_E_IO. Blocks while the
/// image is read. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_restore(
    image: *const c_char,
    options: *const lvp_machine_options,
    machine_out: *mut *mut lvp_machine,
) -> lvp_status {
    guard(|| {
        check_out(machine_out, "machine_out")?;
        // SAFETY: the caller's contract.
        let image = unsafe { str_argument(image, "image") }?;
        // SAFETY: the caller's contract.
        let options = unsafe { read(options) }?;
        // SAFETY: the caller's contract.
        let restore = unsafe { options.to_restore() }?;
        // SAFETY: the caller's contract.
        let options = unsafe { domain_options(&options) }?;
        let domain = Domain::restore(Path::new(image), &restore, options)?;
        let machine = Box::into_raw(Box::new(lvp_machine {
            domain: Arc::new(domain),
        }));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(machine_out, machine, "machine_out") }
    })
}

/// Reads the options of a new machine.
///
/// # Safety
/// The strings and arrays of `options` are valid.
unsafe fn domain_options(options: &lvp_machine_options) -> Result<DomainOptions, Failure> {
    // SAFETY: by the function's contract.
    let path = unsafe { options.runtime_path() }?;
    let runtime = path.map_or_else(RuntimeDir::of_this_user, RuntimeDir::at)?;
    let mut known = DomainOptions::new(runtime);
    // SAFETY: by the function's contract.
    known.consoles = unsafe { options.consoles() }?;
    Ok(known)
}

/// Builds the machine and lets its vCPUs run. After lvp_machine_restore() they go on where the
/// image has them. A machine that has ended may be started again, from the beginning.
///
/// Returns LVP_OK; LVP_E_STATE (it runs), LVP_E_BUSY (another process runs it: the message names
/// it), LVP_E_HOST (/dev/kvm or memory), LVP_E_INVALID or LVP_E_IO (the kernel file). Blocks
/// while memory is allocated and the kernel read. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_start(machine: *mut lvp_machine) -> lvp_status {
    // SAFETY: the caller's contract.
    guard(|| Ok(unsafe { handle(machine, "machine") }?.domain.start(false)?))
}

/// Stops the vCPUs until lvp_machine_resume(). On return none runs. Checkpoints work meanwhile.
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run, or is paused), LVP_E_TIMEOUT.
/// Blocks until the vCPUs have stopped: well under a millisecond, most often. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_pause(machine: *mut lvp_machine) -> lvp_status {
    // SAFETY: the caller's contract.
    guard(|| Ok(unsafe { handle(machine, "machine") }?.domain.pause()?))
}

/// Undoes lvp_machine_pause().
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it is not paused). Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_resume(machine: *mut lvp_machine) -> lvp_status {
    // SAFETY: the caller's contract.
    guard(|| Ok(unsafe { handle(machine, "machine") }?.domain.resume()?))
}

/// Presses the machine's power button: a guest that listens shuts down, any other runs on.
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run). Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_shutdown(machine: *mut lvp_machine) -> lvp_status {
    // SAFETY: the caller's contract.
    guard(|| Ok(unsafe { handle(machine, "machine") }?.domain.shutdown()?))
}

/// Ends the machine at once, as pulling its plug would. A checkpoint that runs fails.
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run). Blocks until the vCPU threads
/// have ended. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_destroy(machine: *mut lvp_machine) -> lvp_status {
    // SAFETY: the caller's contract.
    guard(|| Ok(unsafe { handle(machine, "machine") }?.domain.destroy()?))
}

/// Tells what the machine is doing.
///
/// @param state_out  receives an LVP_MACHINE_ value
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle; `state_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_get_state(
    machine: *const lvp_machine,
    state_out: *mut lvp_machine_state,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let state = unsafe { handle(machine, "machine") }?.domain.state();
        // SAFETY: the caller's contract.
        unsafe { write_out(state_out, state_number(state), "state_out") }
    })
}

/// Waits until the machine has ended.
///
/// @param timeout_ms  most milliseconds to wait; negative: for ever
/// @param state_out   receives LVP_MACHINE_SHUTOFF or LVP_MACHINE_CRASHED; may be NULL
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it was never started), LVP_E_TIMEOUT.
/// Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle; `state_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_wait(
    machine: *const lvp_machine,
    timeout_ms: i64,
    state_out: *mut lvp_machine_state,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let domain = &unsafe { handle(machine, "machine") }?.domain;
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        let end = domain
            .wait_timeout(timeout)?
            .ok_or_else(|| Failure::timeout("the machine still runs"))?;
        let state = match end {
            EndReason::Crashed(_) => LVP_MACHINE_CRASHED,
            EndReason::Shutoff(_) => LVP_MACHINE_SHUTOFF,
        };
        if state_out.is_null() {
            return Ok(());
        }
        // SAFETY: not null; writable by the caller's contract.
        unsafe { write_out(state_out, state, "state_out") }
    })
}

/// Starts a checkpoint; the machine runs on (LVP_PROTOCOL_STOP: is paused for a while).
///
/// @param machine  running or paused
/// @param out      path of the image file to write, or of an existing directory to add an image
///                 to; borrowed for the call. An image that is there stays whole until the new
///                 one is complete.
/// @param options  NULL for the defaults
/// @param job_out  receives the job; release it with lvp_job_free()
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run), LVP_E_BUSY (a checkpoint of it
/// runs already), LVP_E_IO. What goes wrong later is told by lvp_job_wait(). Does not block while
/// memory is copied. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_checkpoint(
    machine: *mut lvp_machine,
    out: *const c_char,
    options: *const lvp_checkpoint_options,
    job_out: *mut *mut lvp_job,
) -> lvp_status {
    guard(|| {
        check_out(job_out, "job_out")?;
        // SAFETY: the caller's contract.
        let machine = unsafe { handle(machine, "machine") }?;
        // SAFETY: the caller's contract.
        let (path, mut request) = unsafe { checkpoint_arguments(out, options) }?;
        request.out = Some(path);
        let job = lvp_job::new(machine.domain.start_checkpoint(&request)?);
        let job = Box::into_raw(Box::new(job));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(job_out, job, "job_out") }
    })
}

/// Releases a machine; one that runs is destroyed first. NULL is ignored.
///
/// Jobs of it stay valid; a checkpoint that still runs fails. Blocks until the vCPU threads have
/// ended. No other call on this handle may run or follow.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle that nothing else uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_free(machine: *mut lvp_machine) {
    if machine.is_null() {
        return;
    }
    // A panic has been reported as far as it can be: there is no status to return.
    let _status = guard(|| {
        // SAFETY: it came from `Box::into_raw` above, and the caller gives it up.
        let machine = unsafe { Box::from_raw(machine) };
        // An error means that it does not run.
        drop(machine.domain.destroy());
        drop(machine);
        Ok(())
    });
}
