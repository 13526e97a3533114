//! What a machine tells of itself.

use std::ffi::{c_char, c_int};
use std::os::fd::IntoRawFd;

use super::image::give_text;
use super::machine::lvp_machine;
use super::status::{guard, lvp_status};
use super::{check_out, handle, write_out};

symbol_versions!("0.1":
    lvp_machine_reset,
    lvp_machine_xml,
    lvp_machine_inspect,
    lvp_machine_console,
);

/// Resets the machine, as its reset button would: it starts from the beginning.
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it does not run). Blocks until the vCPUs have
/// stopped and the kernel is read again. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_reset(machine: *mut lvp_machine) -> lvp_status {
    // SAFETY: the caller's contract.
    guard(|| Ok(unsafe { handle(machine, "machine") }?.domain.reset()?))
}

/// Returns the machine's domain XML; while it runs, with its id and the paths of its consoles.
///
/// @param xml_out  receives the text; release it with lvp_string_free()
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle; `xml_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_xml(
    machine: *const lvp_machine,
    xml_out: *mut *mut c_char,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let xml = unsafe { handle(machine, "machine") }?.domain.xml();
        // SAFETY: the caller's contract.
        unsafe { give_text(xml_out, xml, "xml_out") }
    })
}

/// Describes the machine in figures, as JSON: name, UUID, state, vCPUs, memory, consoles and the
/// checkpoint that runs, as `livepoint list --json` does. A console's path can be opened to read
/// and write what the guest's serial port does.
///
/// @param json_out  receives the text; release it with lvp_string_free()
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle; `json_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_inspect(
    machine: *const lvp_machine,
    json_out: *mut *mut c_char,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let json = unsafe { handle(machine, "machine") }?.domain.status_json();
        // SAFETY: the caller's contract.
        unsafe { give_text(json_out, json, "json_out") }
    })
}

/// Opens a serial console of a machine that runs, for reading and writing: its terminal
/// (`<serial type='pty'>`), or a connection to its socket (`<serial type='unix'>`).
///
/// What the guest wrote while nobody had the console open is gone; console_fds of
/// lvp_machine_options miss nothing.
///
/// @param number  of the serial port, from 0
/// @param fd_out  receives a descriptor, blocking and with FD_CLOEXEC set, which the caller closes
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_STATE (it was never started), LVP_E_NOT_FOUND (no such
/// console, or the machine has ended), LVP_E_UNSUPPORTED (it goes elsewhere), LVP_E_IO. Does not
/// block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle; `fd_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_console(
    machine: *mut lvp_machine,
    number: u32,
    fd_out: *mut c_int,
) -> lvp_status {
    guard(|| {
        check_out(fd_out, "fd_out")?;
        // SAFETY: the caller's contract.
        let domain = &unsafe { handle(machine, "machine") }?.domain;
        let console = domain.open_console(number as usize)?;
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(fd_out, console.into_raw_fd(), "fd_out") }
    })
}
