//! Jobs: checkpoints that go on after the call that started them.

use std::ffi::{CString, c_char, c_int};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::sync::OnceLock;
use std::time::Duration;

use super::image::give_text;
use super::out::{SizedOut, fill};
use super::status::{Failure, LVP_OK, guard, lvp_status};
use super::{handle, write_out};
use crate::host::{CheckpointSummary, HostError, Job};

symbol_versions!("0.1":
    lvp_job_fd,
    lvp_job_number,
    lvp_job_wait,
    lvp_job_cancel,
    lvp_job_progress,
    lvp_job_statistics,
    lvp_job_image,
    lvp_job_inspect,
    lvp_job_error,
    lvp_job_free,
);

/// A checkpoint under way or done. Opaque; made by lvp_machine_checkpoint(), released by
/// lvp_job_free(). Every function may be called from any thread at any time, but none after or
/// while the handle is freed.
#[derive(Debug)]
pub struct lvp_job {
    job: Job,
    // Text that C may keep a pointer to for as long as the handle lives.
    error: OnceLock<CString>,
    image: OnceLock<CString>,
}

impl lvp_job {
    pub(super) fn new(job: Job) -> Self {
        Self {
            job,
            error: OnceLock::new(),
            image: OnceLock::new(),
        }
    }

    /// Returns how the job ended, if it has.
    fn result(&self) -> Option<Result<CheckpointSummary, HostError>> {
        self.job.wait_timeout(Duration::ZERO)
    }
}

/// How far a job is. Set struct_size before the call.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct lvp_progress {
    /// sizeof(lvp_progress), as the caller was compiled.
    pub struct_size: usize,
    /// Bytes of guest memory that the scan has passed.
    pub scanned_bytes: u64,
    /// Bytes of guest memory in all.
    pub total_bytes: u64,
    /// Bytes written to the image so far.
    pub bytes_written: u64,
    /// Expected milliseconds to the end; UINT64_MAX where unknown.
    pub eta_ms: u64,
}

/// What a checkpoint cost. Set struct_size before the call.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct lvp_statistics {
    /// sizeof(lvp_statistics), as the caller was compiled.
    pub struct_size: usize,
    /// Microseconds in which no vCPU ran, from the first kick to the last resume.
    pub downtime_us: u64,
    /// Microseconds from the start until the image was committed.
    pub total_us: u64,
    /// Size of the image in bytes.
    pub image_bytes: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Most bytes of memory that staged copies took.
    pub staging_peak_bytes: u64,
    /// Staged pages that had to be written early, since staging was full.
    pub spilled_pages: u64,
    /// Pages that were all zeros, and take no room.
    pub zero_pages: u64,
}

impl SizedOut for lvp_progress {
    const SIZE_FIRST: usize = 40;
    fn set_size(&mut self, size: usize) {
        self.struct_size = size;
    }
}

impl SizedOut for lvp_statistics {
    const SIZE_FIRST: usize = 64;
    fn set_size(&mut self, size: usize) {
        self.struct_size = size;
    }
}

/// Returns a descriptor that becomes readable when the job has ended, for poll(2) and the like.
///
/// Owned by the job: do not read, write or close it; it is closed by lvp_job_free(). Returns -1
/// when `job` is NULL. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_fd(job: *const lvp_job) -> c_int {
    let mut fd = -1;
    let _status = guard(|| {
        // SAFETY: the caller's contract.
        fd = unsafe { handle(job, "job") }?.job.as_fd().as_raw_fd();
        Ok(())
    });
    fd
}

/// Returns the job's number among those of its machine or guest, from 1: the one that events have.
/// Returns 0 when `job` is NULL. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_number(job: *const lvp_job) -> u64 {
    let mut number = 0;
    let _status = guard(|| {
        // SAFETY: the caller's contract.
        number = unsafe { handle(job, "job") }?.job.id();
        Ok(())
    });
    number
}

/// Waits until the job has ended and tells how.
///
/// @param timeout_ms  most milliseconds to wait; 0: only look; negative: for ever
///
/// Returns LVP_OK once the image is complete; LVP_E_TIMEOUT while the job runs; else the job's
/// own error: LVP_E_CANCELLED, LVP_E_IO, LVP_E_STATE (the machine ended) and others, with text
/// from lvp_job_error(). After an error there is no image, an older one at the same path is
/// whole, and the machine runs on. May be called again, and from several threads. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_wait(job: *const lvp_job, timeout_ms: i64) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let job = &unsafe { handle(job, "job") }?.job;
        match u64::try_from(timeout_ms) {
            Ok(timeout) => job
                .wait_timeout(Duration::from_millis(timeout))
                .ok_or_else(|| Failure::timeout("the job still runs"))?,
            Err(_) => job.wait(),
        }?;
        Ok(())
    })
}

/// Asks the job to end. It ends within 100 ms, unless it is complete by then; lvp_job_wait()
/// tells which. A job that has ended stays as it is.
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_cancel(job: *mut lvp_job) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        unsafe { handle(job, "job") }?.job.cancel();
        Ok(())
    })
}

/// Tells how far the job is.
///
/// @param progress_out  set progress_out->struct_size first
///
/// Returns LVP_OK; LVP_E_INVALID. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle; `progress_out` is NULL or has `struct_size` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_progress(
    job: *const lvp_job,
    progress_out: *mut lvp_progress,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let progress = unsafe { handle(job, "job") }?.job.progress();
        let value = lvp_progress {
            struct_size: 0,
            scanned_bytes: progress.scanned_bytes,
            total_bytes: progress.total_bytes,
            bytes_written: progress.bytes_written,
            eta_ms: progress.eta_ms.unwrap_or(u64::MAX),
        };
        // SAFETY: the caller's contract.
        unsafe { fill(progress_out, value, "progress_out") }
    })
}

/// Tells what a checkpoint cost, once it is complete.
///
/// @param statistics_out  set statistics_out->struct_size first
///
/// Returns LVP_OK; LVP_E_INVALID; LVP_E_TIMEOUT while the job runs; the job's own error if it
/// failed. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle; `statistics_out` is NULL or has `struct_size` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_statistics(
    job: *const lvp_job,
    statistics_out: *mut lvp_statistics,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let result = unsafe { handle(job, "job") }?.result();
        let summary = result.ok_or_else(|| Failure::timeout("the job still runs"))??;
        let value = lvp_statistics {
            struct_size: 0,
            downtime_us: summary.figures.downtime_us,
            total_us: summary.figures.total_us,
            image_bytes: summary.image_bytes,
            memory_bytes: summary.figures.memory_bytes,
            staging_peak_bytes: summary.figures.staging_peak_bytes,
            spilled_pages: summary.figures.spilled_pages,
            zero_pages: summary.figures.zero_pages,
        };
        // SAFETY: the caller's contract.
        unsafe { fill(statistics_out, value, "statistics_out") }
    })
}

/// Returns the path of the image, once the job is complete.
///
/// @param path_out  receives the path; owned by the job, valid until lvp_job_free()
///
/// Returns LVP_OK; LVP_E_INVALID; LVP_E_TIMEOUT while the job runs; the job's own error if it
/// failed. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle; `path_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_image(
    job: *const lvp_job,
    path_out: *mut *const c_char,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let job = unsafe { handle(job, "job") }?;
        let summary = job
            .result()
            .ok_or_else(|| Failure::timeout("the job still runs"))??;
        let path = job.image.get_or_init(|| {
            CString::new(summary.image.as_os_str().as_bytes())
                .expect("a path that the system has used holds no zero byte")
        });
        // SAFETY: the caller's contract.
        unsafe { write_out(path_out, path.as_ptr(), "path_out") }
    })
}

/// Returns everything that was measured of a checkpoint, once it is complete, as JSON: what
/// `livepoint checkpoint --json` prints, with the protocol that was taken and why, the parts of the
/// downtime, and by how much a promise was missed.
///
/// @param json_out  receives the text; release it with lvp_string_free()
///
/// Returns LVP_OK; LVP_E_INVALID; LVP_E_TIMEOUT while the job runs; the job's own error if it
/// failed. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle; `json_out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_inspect(
    job: *const lvp_job,
    json_out: *mut *mut c_char,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let result = unsafe { handle(job, "job") }?.result();
        let summary = result.ok_or_else(|| Failure::timeout("the job still runs"))??;
        // SAFETY: the caller's contract.
        unsafe { give_text(json_out, summary.to_json(), "json_out") }
    })
}

/// Returns why the job failed, in English, on one line.
///
/// Owned by the job; valid until lvp_job_free(). Empty while the job runs and when it succeeded;
/// never NULL unless `job` is. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_error(job: *const lvp_job) -> *const c_char {
    let mut text = std::ptr::null();
    let status = guard(|| {
        // SAFETY: the caller's contract.
        let job = unsafe { handle(job, "job") }?;
        text = match job.result() {
            Some(Err(error)) => job
                .error
                .get_or_init(|| {
                    CString::new(error.full_message().replace('\0', "?"))
                        .expect("every zero byte has just been replaced")
                })
                .as_ptr(),
            _ => c"".as_ptr(),
        };
        Ok(())
    });
    if status == LVP_OK {
        text
    } else {
        std::ptr::null()
    }
}

/// Releases a job. NULL is ignored. A checkpoint that still runs goes on to its end.
///
/// Does not block. No other call on this handle may run or follow.
///
/// Since: 0.1
///
/// # Safety
/// `job` is NULL or a live handle that nothing else uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_job_free(job: *mut lvp_job) {
    if job.is_null() {
        return;
    }
    let _status = guard(|| {
        // SAFETY: it came from `Box::into_raw`, and the caller gives it up.
        drop(unsafe { Box::from_raw(job) });
        Ok(())
    });
}
