//! Chains of images, machines that go back in place, and memory that several machines share.

use std::ffi::c_char;
use std::path::Path;

use super::machine::lvp_machine;
use super::options::{codec, lvp_codec};
use super::status::{Failure, guard, lvp_status};
use super::{check_out, handle, str_argument, write_out};
use crate::host::{Image, RestoreOptions, SharedMemory, collect_garbage};

symbol_versions!("0.1":
    lvp_image_rebase,
    lvp_images_collect,
    lvp_machine_rewind,
    lvp_shared_memory_free,
    lvp_shared_memory_load,
);

/// The memory of an image, for machines that share it until they write it. Opaque; made by
/// lvp_shared_memory_load(), released by lvp_shared_memory_free(). May be used by any thread.
#[derive(Debug)]
pub struct lvp_shared_memory {
    pub(super) memory: SharedMemory,
}

/// Puts a machine back to an image of it, in place: the same process, VM and memory, of which what
/// has not changed since is kept where the guest's writes are tracked (`incremental` and `track` of
/// the options). A machine that is paused stays paused. The guest is told by a new generation id.
///
/// @param machine  running or paused
/// @param image    path of an image file, or of a directory: then its newest image. NULL: the last
///                 incremental checkpoint of the machine. Borrowed for the call.
///
/// Returns LVP_OK; LVP_E_INVALID (of another domain, or there is no last checkpoint), LVP_E_NOT_FOUND,
/// LVP_E_CORRUPT, LVP_E_INCOMPATIBLE, LVP_E_UNSUPPORTED (the guest writes to a disk), LVP_E_STATE (it
/// does not run), LVP_E_BUSY (a checkpoint of it runs), LVP_E_IO. After each of these the machine is
/// as it was; where memory fails to be written after that, it ends. Blocks until the machine goes on.
/// Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `machine` is NULL or a live handle; `image` is NULL or a zero-terminated string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_rewind(
    machine: *mut lvp_machine,
    image: *const c_char,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let domain = &unsafe { handle(machine, "machine") }?.domain;
        if image.is_null() {
            domain.rewind(None)?;
            return Ok(());
        }
        // SAFETY: the caller's contract.
        let image = unsafe { str_argument(image, "image") }?;
        let path = std::path::absolute(image)
            .map_err(|error| Failure::invalid(format!("image: {error}")))?;
        domain.rewind(Some(&path))?;
        Ok(())
    })
}

/// Reads the memory of an image once, checks every byte of it, and keeps it for machines that start
/// from that image (`shared_memory` of lvp_machine_options) and share its pages until they write
/// them. Nobody can change it, in this process or another.
///
/// @param image       path of an image file, or of a directory: then its newest image
/// @param memory_out  receives the memory; release it with lvp_shared_memory_free()
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND, LVP_E_CORRUPT, LVP_E_UNSUPPORTED (memory that is
/// locked or in hugetlb pages), LVP_E_HOST, LVP_E_IO. Blocks while the image is read. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` is NULL or a zero-terminated string; `memory_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_shared_memory_load(
    image: *const c_char,
    memory_out: *mut *mut lvp_shared_memory,
) -> lvp_status {
    guard(|| {
        check_out(memory_out, "memory_out")?;
        // SAFETY: the caller's contract.
        let image = Image::open(Path::new(unsafe { str_argument(image, "image") }?))?;
        let memory = SharedMemory::load(&image, RestoreOptions::default().threads)?;
        let memory = Box::into_raw(Box::new(lvp_shared_memory { memory }));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(memory_out, memory, "memory_out") }
    })
}

/// Releases shared memory; machines that use it keep it. NULL is ignored. Does not block.
///
/// Since: 0.1
///
/// # Safety
/// `memory` is NULL or a live handle that nothing else uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_shared_memory_free(memory: *mut lvp_shared_memory) {
    if memory.is_null() {
        return;
    }
    // A panic has been reported as far as it can be: there is no status to return.
    let _status = guard(|| {
        // SAFETY: it came from `Box::into_raw` above, and the caller gives it up.
        drop(unsafe { Box::from_raw(memory) });
        Ok(())
    });
}

/// Writes an image that holds the same as another and needs no other one.
///
/// @param image        path of an image file, or of a directory: then its newest image
/// @param out          path of the image file to write, or of a directory to add the image to
/// @param out_codec    an LVP_CODEC_ value
/// @param codec_level  level of LVP_CODEC_ZSTD, from 1 to 19, or 0; 0 with other codecs
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND, LVP_E_CORRUPT, LVP_E_BUSY (what is at `out` is in
/// use or needed by another image), LVP_E_IO. Blocks while it is written. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `image` and `out` are NULL or zero-terminated strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_image_rebase(
    image: *const c_char,
    out: *const c_char,
    out_codec: lvp_codec,
    codec_level: u32,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let image = unsafe { str_argument(image, "image") }?;
        // SAFETY: the caller's contract.
        let out = unsafe { str_argument(out, "out") }?;
        let codec = codec(out_codec, codec_level)?;
        Image::open(Path::new(image))?.fold(Path::new(out), codec)?;
        Ok(())
    })
}

/// Removes images from a directory that are older than the newest `keep` of their domain, as far as
/// no kept one needs them and nobody reads them.
///
/// @param directory    directory of images
/// @param keep         how many images of each domain to keep, at least 1
/// @param removed_out  receives how many were removed; may be NULL
///
/// Returns LVP_OK; LVP_E_INVALID, LVP_E_NOT_FOUND, LVP_E_IO. Blocks while files are removed.
/// Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `directory` is NULL or a zero-terminated string; `removed_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_images_collect(
    directory: *const c_char,
    keep: u32,
    removed_out: *mut u64,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let directory = unsafe { str_argument(directory, "directory") }?;
        let garbage = collect_garbage(Path::new(directory), keep)?;
        if removed_out.is_null() {
            return Ok(());
        }
        let removed = garbage.removed.len() as u64;
        // SAFETY: not null; writable by the caller's contract.
        unsafe { write_out(removed_out, removed, "removed_out") }
    })
}
