//! The C ABI; `include/livepoint.h` is generated from here by cbindgen.
//!
//! Rules: opaque handles; out-parameters are written only on success; every option struct starts
//! with `struct_size`; no panic crosses; nothing global is installed (no handler, no environment
//! variable is read; a logger only by lvp_log_set()); threads that the library starts have every
//! signal blocked.
#![expect(
    unsafe_code,
    reason = "C hands us raw pointers, whose contracts the header states"
)]
#![expect(non_camel_case_types, reason = "the names are C's")]

#[macro_use]
mod symbols;

mod callbacks;
mod chain;
mod domain;
mod events;
mod guest;
mod guest_vcpu;
mod image;
mod job;
mod log;
mod machine;
mod machine_query;
mod options;
mod out;
mod state;
mod status;
mod version;

pub use callbacks::*;
pub use chain::*;
pub use domain::*;
pub use events::*;
pub use guest::*;
pub use guest_vcpu::*;
pub use image::*;
pub use job::*;
pub use log::*;
pub use machine::*;
pub use machine_query::*;
pub use options::*;
pub use state::*;
pub use status::*;
pub use version::*;

use std::ffi::{CStr, c_char, c_void};

use status::Failure;

/// Reads a C string argument.
///
/// # Safety
/// `text` is null or points to a zero-terminated string that stays unchanged for `'a`.
unsafe fn str_argument<'a>(text: *const c_char, name: &str) -> Result<&'a str, Failure> {
    if text.is_null() {
        return Err(Failure::invalid(format!("{name} is NULL")));
    }
    // SAFETY: not null, so by the contract a zero-terminated string.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str()
        .map_err(|_| Failure::invalid(format!("{name} is not UTF-8")))
}

/// Longest array that a caller may pass: far beyond any use, and far below what pointer
/// arithmetic allows.
const ARRAY_BYTES_MAX: usize = 1 << 46;

/// Reads an array argument.
///
/// # Safety
/// `start` is null or has `count` readable members that stay unchanged for `'a`.
unsafe fn slice_argument<'a, T: Copy>(
    start: *const T,
    count: usize,
    name: &str,
) -> Result<&'a [T], Failure> {
    if count == 0 {
        return Ok(&[]);
    }
    if start.is_null() {
        return Err(Failure::invalid(format!("{name} is NULL")));
    }
    if count > ARRAY_BYTES_MAX / size_of::<T>() {
        return Err(Failure::invalid(format!("{name} has {count} members")));
    }
    if !start.is_aligned() {
        return Err(Failure::invalid(format!("{name} is not aligned")));
    }
    // SAFETY: not null, aligned and not too long; readable by the contract.
    Ok(unsafe { std::slice::from_raw_parts(start, count) })
}

/// Reads an argument of bytes.
///
/// # Safety
/// `start` is null or has `count` readable bytes that stay unchanged for `'a`.
unsafe fn bytes_argument<'a>(
    start: *const c_void,
    count: usize,
    name: &str,
) -> Result<&'a [u8], Failure> {
    // SAFETY: by the contract.
    unsafe { slice_argument(start.cast::<u8>(), count, name) }
}

/// Borrows what a handle points to.
///
/// # Safety
/// `handle` is null or came from this library and has not been freed.
unsafe fn handle<'a, T>(handle: *const T, name: &str) -> Result<&'a T, Failure> {
    // SAFETY: by the contract; handles are shared, never exclusively borrowed.
    unsafe { handle.as_ref() }.ok_or_else(|| Failure::invalid(format!("{name} is NULL")))
}

/// Writes an out-parameter.
///
/// # Safety
/// `out` is null or valid for one write.
unsafe fn write_out<T>(out: *mut T, value: T, name: &str) -> Result<(), Failure> {
    if out.is_null() {
        return Err(Failure::invalid(format!("{name} is NULL")));
    }
    // SAFETY: not null, so by the contract writable; `write` drops nothing that was there.
    unsafe { out.write(value) };
    Ok(())
}

/// Fails when an out-parameter is NULL, before anything is done that it should receive.
fn check_out<T>(out: *const T, name: &str) -> Result<(), Failure> {
    if out.is_null() {
        Err(Failure::invalid(format!("{name} is NULL")))
    } else {
        Ok(())
    }
}
