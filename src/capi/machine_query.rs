//! What a machine tells of itself.

use std::ffi::c_char;

use super::handle;
use super::image::give_text;
use super::machine::lvp_machine;
use super::status::{guard, lvp_status};

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
