//! Option structs: extensible by `struct_size`.

use std::ffi::{c_char, c_int};
use std::mem::size_of;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::ptr;
use std::slice;
use std::sync::Arc;

use super::chain::lvp_shared_memory;
use super::state::fd_argument;
use super::status::Failure;
use super::{handle, slice_argument, str_argument};
use crate::host::{
    CheckpointRequest, Codec, Protocol, RestoreOptions, ThreadCount, duplicate_descriptor,
};

/// Longest options struct that a caller may pass: far beyond any this library will have, so that
/// an uninitialised size is refused rather than read.
const OPTIONS_BYTES_MAX: usize = 4096;

/// A plain struct whose first member is its size, and whose zero bytes mean "default".
///
/// # Safety
/// `repr(C)`, every bit pattern is valid, the first member is `struct_size: usize`, and there is
/// no padding after the members of the first release.
pub(super) unsafe trait Options: Copy {
    /// The struct's size in the first release that had it.
    const SIZE_FIRST: usize;
    /// Every member at its default.
    const DEFAULT: Self;
}

/// Reads the caller's options; members that it does not know keep their defaults.
///
/// # Safety
/// `options` is null or points to `options->struct_size` readable bytes.
pub(super) unsafe fn read<T: Options>(options: *const T) -> Result<T, Failure> {
    let mut known = T::DEFAULT;
    if options.is_null() {
        return Ok(known);
    }
    // SAFETY: not null; the size member is first and readable by the contract.
    let size = unsafe { options.cast::<usize>().read_unaligned() };
    if size < T::SIZE_FIRST || size > OPTIONS_BYTES_MAX {
        return Err(Failure::invalid(format!(
            "struct_size is {size}: set it to sizeof the options struct before the call"
        )));
    }
    let shared = size.min(size_of::<T>());
    // SAFETY: both sides are valid for `shared` bytes; `known` is ours, so they do not overlap.
    unsafe {
        ptr::copy_nonoverlapping(
            options.cast::<u8>(),
            ptr::from_mut(&mut known).cast(),
            shared,
        );
    }
    // SAFETY: `shared` is at most `size`, and `size` bytes are readable by the contract.
    let tail_start = unsafe { options.cast::<u8>().add(shared) };
    // SAFETY: the rest of the caller's `size` bytes.
    let tail = unsafe { slice::from_raw_parts(tail_start, size - shared) };
    // A newer caller may pass members that we do not know only if it leaves them zero.
    if tail.iter().any(|&byte| byte != 0) {
        return Err(Failure::invalid(
            "an option is set that this version of the library does not know",
        ));
    }
    Ok(known)
}

/// How memory is captured. 0 stands for the default.
pub type lvp_protocol = u32;
/// The default: LVP_PROTOCOL_THREADED.
pub const LVP_PROTOCOL_DEFAULT: lvp_protocol = 0;
/// Pause, write everything, resume: the traditional way.
pub const LVP_PROTOCOL_STOP: lvp_protocol = 1;
/// Copy while the guest runs; pause only for the last dirty pages.
pub const LVP_PROTOCOL_THREADED: lvp_protocol = 2;
/// Copy in rounds until the rest fits the downtime: live migration to a file.
pub const LVP_PROTOCOL_PRECOPY: lvp_protocol = 4;
/// LVP_PROTOCOL_THREADED or LVP_PROTOCOL_COW, whichever is expected to cost the guest less.
pub const LVP_PROTOCOL_AUTO: lvp_protocol = 5;
/// Pause to write-protect memory; copy each part of it before its first write.
pub const LVP_PROTOCOL_COW: lvp_protocol = 3;

/// How memory is compressed. 0 stands for the default.
pub type lvp_codec = u32;
/// The default: LVP_CODEC_LZ4.
pub const LVP_CODEC_DEFAULT: lvp_codec = 0;
/// Not at all.
pub const LVP_CODEC_NONE: lvp_codec = 1;
/// By lz4: fast.
pub const LVP_CODEC_LZ4: lvp_codec = 2;
/// By zstd at level 1: smaller.
pub const LVP_CODEC_ZSTD: lvp_codec = 3;

/// Options of a checkpoint. Zero the struct, set struct_size, then what you care about.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_checkpoint_options {
    /// sizeof(lvp_checkpoint_options), as the caller was compiled.
    pub struct_size: usize,
    /// How to capture memory.
    pub protocol: lvp_protocol,
    /// How to compress it.
    pub codec: lvp_codec,
    /// Threads that copy and write memory; 0: one a core, 8 at most.
    pub threads: u32,
    /// Milliseconds between two harvests of dirty pages; 0: the default, 100.
    pub interval_ms: u32,
    /// Most bytes of memory for staged copies; 0: 10 % of the guest's, 64 MiB at least.
    pub max_staging_bytes: u64,
    /// Microseconds that the last copy in the pause should take at most; 0: the default.
    pub downtime_budget_us: u64,
    /// Not 0: do not wait until the image is on stable storage; a power cut may lose it.
    pub no_sync: u32,
    /// Must be 0.
    pub reserved: u32,
    /// Most bytes a second that are written to the image; 0: no limit. At least 1 MiB.
    pub max_bandwidth: u64,
    /// Longest acceptable downtime in microseconds; 0: any. The checkpoint is refused, or fails
    /// with the machine running on, where it cannot be kept.
    pub max_downtime_us: u64,
    /// Milliseconds that the checkpoint may take; 0: any. It is refused where more are expected.
    pub deadline_ms: u64,
    /// Milliseconds without a sign of life after which a pause is ended, and the checkpoint fails;
    /// from 10 to 60000; 0: 1000. A pause that makes progress is not ended by it.
    pub pause_limit_ms: u32,
    /// Level of LVP_CODEC_ZSTD, from 1 to 19; 0: 1. Must be 0 with other codecs.
    pub codec_level: u32,
    /// Path of a file in the image's directory that is given up and written over, which is faster
    /// than new room; borrowed for the call. It is gone whatever comes of the checkpoint. NULL:
    /// none.
    pub spare: *const c_char,
    /// Not 0: the image has only what was written since the machine's last such image in the same
    /// directory, where there is one, and needs the images before it. The guest's writes are tracked
    /// from then on, which costs it a fault for each page that it writes between two images. Of
    /// machines only: must be 0 in lvp_guest_checkpoint().
    pub incremental: u32,
    /// How many of the machine's images to keep in the directory; older ones are removed once the
    /// new one is whole, as far as no kept one needs them. 0: all.
    pub keep: u32,
}

// SAFETY: `repr(C)` integers and a pointer, `struct_size` first; 4 + 4 + 4 + 4 + 8 + 8 + 4 + 4 +
// 3 * 8 + 4 + 4 + 8 + 4 + 4 bytes follow it with no padding.
unsafe impl Options for lvp_checkpoint_options {
    const SIZE_FIRST: usize = 48;
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        protocol: LVP_PROTOCOL_DEFAULT,
        codec: LVP_CODEC_DEFAULT,
        threads: 0,
        interval_ms: 0,
        max_staging_bytes: 0,
        downtime_budget_us: 0,
        no_sync: 0,
        reserved: 0,
        max_bandwidth: 0,
        max_downtime_us: 0,
        deadline_ms: 0,
        pause_limit_ms: 0,
        codec_level: 0,
        spare: ptr::null(),
        incremental: 0,
        keep: 0,
    };
}

/// Reads what a call asks for: the image's path, absolute now, and the options.
///
/// # Safety
/// `out` is null or a zero-terminated string; `options` is null or as [`read`] and
/// [`lvp_checkpoint_options::to_request`] want it.
pub(super) unsafe fn checkpoint_arguments(
    out: *const c_char,
    options: *const lvp_checkpoint_options,
) -> Result<(PathBuf, CheckpointRequest), Failure> {
    // SAFETY: the function's contract.
    let out = unsafe { str_argument(out, "out") }?;
    // SAFETY: the function's contract.
    let options = unsafe { read(options) }?;
    // SAFETY: the function's contract.
    let request = unsafe { options.to_request() }?;
    let path =
        std::path::absolute(out).map_err(|error| Failure::invalid(format!("out: {error}")))?;
    Ok((path, request))
}

impl lvp_checkpoint_options {
    /// Checks the options.
    ///
    /// # Safety
    /// `spare` is null or a zero-terminated string.
    pub(super) unsafe fn to_request(self) -> Result<CheckpointRequest, Failure> {
        let protocol = match self.protocol {
            LVP_PROTOCOL_DEFAULT | LVP_PROTOCOL_THREADED => Protocol::Threaded,
            LVP_PROTOCOL_STOP => Protocol::Stop,
            LVP_PROTOCOL_COW => Protocol::Cow,
            LVP_PROTOCOL_PRECOPY => Protocol::Precopy,
            LVP_PROTOCOL_AUTO => Protocol::Auto,
            other => return Err(Failure::invalid(format!("there is no protocol {other}"))),
        };
        if self.reserved != 0 {
            return Err(Failure::invalid("reserved must be 0"));
        }
        let mut request = CheckpointRequest::new(protocol);
        request.codec = codec(self.codec, self.codec_level)?;
        if !self.spare.is_null() {
            // SAFETY: by the function's contract.
            let spare = unsafe { str_argument(self.spare, "spare") }?;
            let spare = std::path::absolute(spare)
                .map_err(|error| Failure::invalid(format!("spare: {error}")))?;
            request.spare = Some(spare);
        }
        request.pause_limit_ms =
            (self.pause_limit_ms != 0).then_some(u64::from(self.pause_limit_ms));
        if self.threads != 0 {
            request.threads = Some(ThreadCount::new(self.threads as usize)?);
        }
        request.interval_ms = (self.interval_ms != 0).then_some(u64::from(self.interval_ms));
        request.max_staging_bytes = (self.max_staging_bytes != 0).then_some(self.max_staging_bytes);
        request.max_downtime_us = (self.max_downtime_us != 0).then_some(self.max_downtime_us);
        request.deadline_ms = (self.deadline_ms != 0).then_some(self.deadline_ms);
        request.max_bandwidth = (self.max_bandwidth != 0).then_some(self.max_bandwidth);
        request.downtime_budget_us =
            (self.downtime_budget_us != 0).then_some(self.downtime_budget_us);
        request.durable = self.no_sync == 0;
        request.incremental = self.incremental != 0;
        request.keep = (self.keep != 0).then_some(self.keep);
        Ok(request)
    }
}

/// Returns the codec that was asked for, at its level.
pub(super) fn codec(codec: lvp_codec, level: u32) -> Result<Codec, Failure> {
    if level != 0 && codec != LVP_CODEC_ZSTD {
        return Err(Failure::invalid("codec_level is for LVP_CODEC_ZSTD"));
    }
    match codec {
        LVP_CODEC_DEFAULT | LVP_CODEC_LZ4 => Ok(Codec::Lz4),
        LVP_CODEC_NONE => Ok(Codec::None),
        LVP_CODEC_ZSTD => {
            let level = level.max(1);
            format!("zstd:{level}")
                .parse()
                .map_err(|_| Failure::invalid(format!("codec_level is {level}")))
        }
        other => Err(Failure::invalid(format!("there is no codec {other}"))),
    }
}

/// Options of a machine. Zero the struct, set struct_size, then what you care about.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_machine_options {
    /// sizeof(lvp_machine_options), as the caller was compiled.
    pub struct_size: usize,
    /// Directory of the locks that keep two processes from running one machine; NULL: the
    /// default, which the livepoint command uses too. Borrowed for the call.
    pub runtime_dir: *const c_char,
    /// Connected stream sockets, as of socketpair(2), at which the first serial ports are served
    /// in place of what the domain XML says of them: from the guest's first byte on, and over
    /// restarts. Duplicated; the caller keeps its own. Output that is not read is lost after 64 KiB
    /// and 100 ms. NULL: none. Borrowed for the call.
    pub console_fds: *const c_int,
    /// How many; at most as many as the machine has serial ports.
    pub console_count: usize,
    /// lvp_machine_restore(): another name, and with it a new UUID, so that several machines can run
    /// from one image; NULL: those that were saved. Borrowed for the call.
    pub new_name: *const c_char,
    /// lvp_machine_restore(): memory of the same image, which the machine shares with others until
    /// it writes it; NULL: memory of its own. It may be released once the call has returned.
    pub shared_memory: *const lvp_shared_memory,
    /// lvp_machine_restore(), not 0: the machine can run at once, and its memory comes as it is
    /// touched. A damaged part of the image, found late, ends the machine with an error that names
    /// it.
    pub lazy: u32,
    /// lvp_machine_restore(), not 0: the guest's writes are tracked from the first one on, so that
    /// the first incremental checkpoint has only what was written since the image.
    pub track: u32,
}

// SAFETY: `repr(C)`, integers and pointers of 8 bytes each and two of 4; `struct_size` is first; no
// padding.
unsafe impl Options for lvp_machine_options {
    const SIZE_FIRST: usize = 16;
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        runtime_dir: ptr::null(),
        console_fds: ptr::null(),
        console_count: 0,
        new_name: ptr::null(),
        shared_memory: ptr::null(),
        lazy: 0,
        track: 0,
    };
}

impl lvp_machine_options {
    /// Returns copies of the sockets for the consoles.
    ///
    /// # Safety
    /// `console_fds` is null or has `console_count` members.
    pub(super) unsafe fn consoles(&self) -> Result<Vec<Arc<OwnedFd>>, Failure> {
        // SAFETY: by the function's contract.
        let fds = unsafe { slice_argument(self.console_fds, self.console_count, "console_fds") }?;
        let copies = fds.iter().map(|&fd| {
            // SAFETY: by the function's contract.
            let fd = unsafe { fd_argument(fd, "a member of console_fds") }?;
            Ok(Arc::new(duplicate_descriptor(fd)?))
        });
        copies.collect()
    }

    /// Fails where something is asked of a new machine that only a restored one can have.
    pub(super) fn check_new(&self) -> Result<(), Failure> {
        let given = !self.new_name.is_null() || !self.shared_memory.is_null();
        if given || self.lazy != 0 || self.track != 0 {
            let why = "new_name, shared_memory, lazy and track are for lvp_machine_restore()";
            return Err(Failure::invalid(why));
        }
        Ok(())
    }

    /// Returns how an image is restored.
    ///
    /// # Safety
    /// `new_name` is null or a zero-terminated string, `shared_memory` null or a live handle.
    pub(super) unsafe fn to_restore(self) -> Result<RestoreOptions, Failure> {
        let mut restore = RestoreOptions::default();
        if !self.new_name.is_null() {
            // SAFETY: by the function's contract.
            let name = unsafe { str_argument(self.new_name, "new_name") }?;
            restore.new_name = Some(name.to_owned());
        }
        if !self.shared_memory.is_null() {
            // SAFETY: by the function's contract.
            let shared = unsafe { handle(self.shared_memory, "shared_memory") }?;
            restore.shared = Some(shared.memory.clone());
        }
        restore.lazy = self.lazy != 0;
        restore.track = self.track != 0;
        Ok(restore)
    }

    /// Returns the runtime directory asked for.
    ///
    /// # Safety
    /// `runtime_dir` is null or a zero-terminated string.
    pub(super) unsafe fn runtime_path(&self) -> Result<Option<PathBuf>, Failure> {
        if self.runtime_dir.is_null() {
            return Ok(None);
        }
        // SAFETY: by the function's contract.
        let path = unsafe { str_argument(self.runtime_dir, "runtime_dir") }?;
        Ok(Some(PathBuf::from(path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const _: () = assert!(size_of::<lvp_checkpoint_options>() >= 48);

    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Newer {
        known: lvp_checkpoint_options,
        added: u64,
    }

    fn newer(added: u64) -> Newer {
        let mut known = lvp_checkpoint_options::DEFAULT;
        known.struct_size = size_of::<Newer>();
        known.threads = 3;
        Newer { known, added }
    }

    #[test]
    fn a_newer_caller_is_understood_if_it_sets_nothing_new() {
        let old = newer(0);
        // SAFETY: `struct_size` is the size of the whole `Newer`.
        let read_old = unsafe { read(ptr::from_ref(&old).cast::<lvp_checkpoint_options>()) };
        assert_eq!(read_old.unwrap().threads, 3);
        let new = newer(1);
        // SAFETY: as above.
        let read_new = unsafe { read(ptr::from_ref(&new).cast::<lvp_checkpoint_options>()) };
        assert!(read_new.is_err());
    }

    #[test]
    fn a_size_that_was_never_set_is_refused() {
        for size in [0, 1, 40, usize::MAX] {
            let mut options = lvp_checkpoint_options::DEFAULT;
            options.struct_size = size;
            // SAFETY: a size that is too large is refused before anything behind it is read.
            assert!(unsafe { read(&raw const options) }.is_err(), "{size}");
        }
    }

    #[test]
    fn unknown_values_are_refused() {
        let mut options = lvp_checkpoint_options::DEFAULT;
        options.protocol = 99;
        // SAFETY: no string is set, here and below.
        assert!(unsafe { options.to_request() }.is_err());
        let mut options = lvp_checkpoint_options::DEFAULT;
        options.codec = 99;
        // SAFETY: as above.
        assert!(unsafe { options.to_request() }.is_err());
        let mut options = lvp_checkpoint_options::DEFAULT;
        options.codec = LVP_CODEC_ZSTD;
        options.codec_level = 1000;
        // SAFETY: as above.
        assert!(unsafe { options.to_request() }.is_err());
    }
}
