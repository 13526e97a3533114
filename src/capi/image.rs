//! Images: what is in them, and whether it is whole.

use std::ffi::{CString, c_char, c_void};
use std::path::Path;

use super::out::{SizedOut, fill};
use super::state::{lvp_section, lvp_state, section};
use super::status::{Failure, guard, lvp_status};
use super::{check_out, handle, str_argument, write_out};
use crate::host::Image;

symbol_versions!("0.1":
    lvp_image_open,
    lvp_string_free,
    lvp_image_inspect,
    lvp_image_description,
    lvp_image_verify,
    lvp_image_check_host,
    lvp_image_range_count,
    lvp_image_get_range,
    lvp_image_read,
    lvp_image_export,
    lvp_image_section_count,
    lvp_image_section,
    lvp_image_state,
    lvp_image_free,
);

/// An image that is open for reading; nobody replaces or removes it meanwhile. Opaque; made by
/// lvp_image_open(), released by lvp_image_free(). Every function may be called from any thread at
/// any time, but none after or while the handle is freed.
#[derive(Debug)]
pub struct lvp_image {
    pub(super) image: Image,
}

/// A range of guest memory in an image. Set struct_size before the call.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_image_range {
    /// sizeof(lvp_image_range), as the caller was compiled.
    pub struct_size: usize,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub bytes: u64,
    /// Number of the memory slot.
    pub slot: u32,
    /// 0.
    pub reserved: u32,
}

impl SizedOut for lvp_image_range {
    const SIZE_FIRST: usize = 32;
    fn set_size(&mut self, size: usize) {
        self.struct_size = size;
    }
}

/// Opens an image. Checks its header, manifest, chunk table and page index; guest memory and state
/// are checked as they are read.
///
/// @param path       of an image file, or of a directory: then its newest image; borrowed for the
///                   call
/// @param image_out  receives the image; release it with lvp_image_free()
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND, LVP_E_CORRUPT, LVP_E_BUSY (it is being
/// replaced), LVP_E_IO. Blocks while tables are read. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_open(
    path: *const c_char,
    image_out: *mut *mut lvp_image,
) -> lvp_status {
    guard(|| {
        check_out(image_out, "image_out")?;
        // SAFETY: the caller's contract.
        let path = unsafe { str_argument(path, "path") }?;
        let image = Image::open(Path::new(path))?;
        let image = Box::into_raw(Box::new(lvp_image { image }));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(image_out, image, "image_out") }
    })
}

/// Hands text to the caller, who frees it with lvp_string_free().
///
/// # Safety
/// `out` is null or writable.
pub(super) unsafe fn give_text(
    out: *mut *mut c_char,
    text: String,
    name: &str,
) -> Result<(), Failure> {
    check_out(out, name)?;
    let text = CString::new(text).map_err(|_| Failure::invalid("text with a zero byte"))?;
    // SAFETY: by the contract.
    unsafe { write_out(out, text.into_raw(), name) }
}

/// Releases text that the library gave away. NULL is ignored. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `text` is NULL or came from a function whose text says that this one frees it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_string_free(text: *mut c_char) {
    if text.is_null() {
        return;
    }
    let _status = guard(|| {
        // SAFETY: it came from `CString::into_raw` in `give_text`, and the caller gives it up.
        drop(unsafe { CString::from_raw(text) });
        Ok(())
    });
}

/// Describes an image in figures, as JSON: what `livepoint inspect --json` prints.
///
/// @param json_out  receives the text; release it with lvp_string_free()
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a live handle; `json_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_inspect(
    image: *const lvp_image,
    json_out: *mut *mut c_char,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let image = unsafe { handle(image, "image") }?;
        // SAFETY: the caller's contract.
        unsafe { give_text(json_out, image.image.summary_json(), "json_out") }
    })
}

/// Returns what the VMM said of the guest when it was saved: the description that it gave to
/// lvp_guest_new(), or for a machine of this library its domain XML.
///
/// @param text_out  receives the text; release it with lvp_string_free()
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a live handle; `text_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_description(
    image: *const lvp_image,
    text_out: *mut *mut c_char,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let image = unsafe { handle(image, "image") }?;
        let text = image.image.description().to_owned();
        // SAFETY: the caller's contract.
        unsafe { give_text(text_out, text, "text_out") }
    })
}

/// Reads every byte that a restore would use, and checks every digest.
///
/// Returns LVP_OK where the image is whole; LVP_E_CORRUPT (the message names the first damage);
/// LVP_E_INVALID, LVP_E_IO. Blocks while the image is read. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_verify(image: *const lvp_image) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        unsafe { handle(image, "image") }?.image.verify()?;
        Ok(())
    })
}

/// Asks whether this host can restore an image.
///
/// Returns LVP_OK; LVP_E_INCOMPATIBLE (the message lists what the host lacks); LVP_E_HOST
/// (/dev/kvm cannot be used); LVP_E_INVALID. Makes and drops an empty VM. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_check_host(image: *const lvp_image) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        Ok(unsafe { handle(image, "image") }?.image.check_host()?)
    })
}

/// Returns how many ranges of guest memory an image has; 0 where `image` is NULL. Does not block.
/// Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_range_count(image: *const lvp_image) -> usize {
    let mut count = 0;
    let _status = guard(|| {
        // SAFETY: the caller's contract.
        count = unsafe { handle(image, "image") }?.image.ranges().len();
        Ok(())
    });
    count
}

/// Tells of one range of guest memory. Ranges are sorted and do not overlap.
///
/// @param index      from 0 to lvp_image_range_count() - 1
/// @param range_out  set range_out->struct_size first
///
/// Returns LVP_OK; LVP_E_NOT_FOUND; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_get_range(
    image: *const lvp_image,
    index: usize,
    range_out: *mut lvp_image_range,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let ranges = unsafe { handle(image, "image") }?.image.ranges();
        let range = ranges
            .get(index)
            .ok_or_else(|| Failure::not_found(format!("no range {index}")))?;
        let value = lvp_image_range {
            struct_size: 0,
            gpa: range.gpa,
            bytes: range.bytes,
            slot: range.slot,
            reserved: 0,
        };
        // SAFETY: the caller's contract.
        unsafe { fill(range_out, value, "range_out") }
    })
}

/// Reads guest memory as it was at the captured moment, with its digests checked.
///
/// @param gpa     guest physical address of the first byte
/// @param buffer  receives the bytes; has `bytes` of room. Its content is not told after an error.
/// @param bytes   how many; all of them must be in the image
///
/// Returns LVP_OK; LVP_E_NOT_FOUND (the image has no memory at some address of the range);
/// LVP_E_INVALID, LVP_E_CORRUPT, LVP_E_IO. Blocks while chunks of 2 MiB are read: a large range at
/// once costs less than many small ones. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_read(
    image: *const lvp_image,
    gpa: u64,
    buffer: *mut c_void,
    bytes: usize,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let image = unsafe { handle(image, "image") }?;
        check_out(buffer, "buffer")?;
        image.image.read(gpa, bytes as u64, |offset, part| {
            let to = buffer.cast::<u8>().wrapping_add(offset);
            // SAFETY: `read` hands out parts that lie in `bytes` together, which the caller has
            // room for; our own memory overlaps none of it.
            unsafe { std::ptr::copy_nonoverlapping(part.as_ptr(), to, part.len()) };
        })?;
        Ok(())
    })
}

/// Writes guest memory to a flat file: the byte at offset n is that at guest physical address n.
/// Zeros and what is between ranges become holes.
///
/// @param path  of the file; made, or emptied; borrowed for the call. Not an image.
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_CORRUPT, LVP_E_IO. After an error the file is partly
/// written. Blocks while all of it is read and written. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_export(
    image: *const lvp_image,
    path: *const c_char,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let image = unsafe { handle(image, "image") }?;
        // SAFETY: the caller's contract.
        let path = unsafe { str_argument(path, "path") }?;
        Ok(image.image.export(Path::new(path))?)
    })
}

/// Returns how many state sections an image has; 0 where `image` is NULL. Does not block.
/// Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_section_count(image: *const lvp_image) -> usize {
    let mut count = 0;
    let _status = guard(|| {
        // SAFETY: the caller's contract.
        count = unsafe { handle(image, "image") }?.image.sections().len();
        Ok(())
    });
    count
}

/// Tells of one state section, without reading it.
///
/// @param index        from 0 to lvp_image_section_count() - 1
/// @param section_out  set section_out->struct_size first; its data becomes NULL
///
/// Returns LVP_OK; LVP_E_NOT_FOUND; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_section(
    image: *const lvp_image,
    index: usize,
    section_out: *mut lvp_section,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let sections = unsafe { handle(image, "image") }?.image.sections();
        let found = sections
            .get(index)
            .ok_or_else(|| Failure::not_found(format!("no section {index}")))?;
        let data = std::ptr::null();
        let value = section(
            &found.kind,
            found.instance,
            found.version,
            found.bytes,
            data,
        );
        // SAFETY: the caller's contract.
        unsafe { fill(section_out, value, "section_out") }
    })
}

/// Reads the guest's state, with every digest checked.
///
/// @param state_out  receives the state; release it with lvp_state_free()
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_CORRUPT, LVP_E_IO. Blocks while it is read. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a live handle; `state_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_state(
    image: *const lvp_image,
    state_out: *mut *mut lvp_state,
) -> lvp_status {
    guard(|| {
        check_out(state_out, "state_out")?;
        // SAFETY: the caller's contract.
        let state = unsafe { handle(image, "image") }?.image.state()?;
        let state = Box::into_raw(Box::new(lvp_state::new(state)));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(state_out, state, "state_out") }
    })
}

/// Closes an image. NULL is ignored. Does not block.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a live handle that nothing else uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_free(image: *mut lvp_image) {
    if image.is_null() {
        return;
    }
    let _status = guard(|| {
        // SAFETY: it came from `Box::into_raw`, and the caller gives it up.
        drop(unsafe { Box::from_raw(image) });
        Ok(())
    });
}
