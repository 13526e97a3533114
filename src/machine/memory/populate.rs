//! Guest memory that is allocated before the guest runs.

use std::io;
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::MemoryError;
use crate::page::PAGE_BYTES;
use crate::sys::anon;
use crate::sys::mapping::GuestMapping;

/// What one thread populates at a time.
const POPULATE_CHUNK_BYTES: usize = 256 << 20;

/// The most threads that populate memory: more do not make the kernel clear pages faster.
const POPULATE_THREADS_MAX: usize = 8;

/// Allocates every page, by several threads.
pub(super) fn populate(mapping: &GuestMapping) -> Result<(), MemoryError> {
    let threads = thread::available_parallelism()
        .map_or(1, NonZeroUsize::get)
        .min(POPULATE_THREADS_MAX);
    let next = AtomicUsize::new(0);
    let work = || -> io::Result<()> {
        loop {
            let at = next.fetch_add(POPULATE_CHUNK_BYTES, Ordering::Relaxed);
            if at >= mapping.len() {
                return Ok(());
            }
            populate_part(mapping, at, POPULATE_CHUNK_BYTES.min(mapping.len() - at))?;
        }
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
            .fold(Ok(()), Result::and)
    })
    .map_err(|source| MemoryError::Call {
        what: "allocate",
        bytes: mapping.len(),
        hint: "",
        source,
    })
}

fn populate_part(mapping: &GuestMapping, at: usize, bytes: usize) -> io::Result<()> {
    match anon::populate(mapping, at, bytes) {
        // A kernel before 5.14: touch each page. The memory is new, so a zero changes nothing.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            for page in (at..at + bytes).step_by(PAGE_BYTES) {
                mapping.copy_in(page, &[0]);
            }
            Ok(())
        }
        result => result,
    }
}
