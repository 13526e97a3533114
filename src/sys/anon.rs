//! Anonymous memory outside Rust's heap: staging buffers, and guest memory in tests.
#![expect(unsafe_code, reason = "mapping and unmapping memory by address")]

use std::fmt;
use std::io;
use std::ops::{Deref, DerefMut};
use std::ptr;
use std::sync::Arc;

use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::sys::mapping::GuestMapping;

/// Unmaps its range when dropped.
pub(super) struct Unmapper {
    address: usize,
    len: usize,
}

impl Unmapper {
    /// Takes charge of a range that was just mapped and that nothing else unmaps.
    pub(super) fn new(address: usize, len: usize) -> Self {
        Self { address, len }
    }
}

impl Drop for Unmapper {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map_anonymous` and is named by nothing else: every
        // `GuestMapping` of it holds the `Arc` around this value.
        let unmapped =
            unsafe { rustix::mm::munmap(ptr::without_provenance_mut(self.address), self.len) };
        debug_assert!(unmapped.is_ok(), "munmap of our own range: {unmapped:?}");
    }
}

/// Maps `len` bytes of private anonymous memory, aligned to 2 MiB if `huge`.
///
/// The memory is not inherited by a forked child and not part of a core dump. With `huge`,
/// transparent huge pages are asked for. Nothing is touched: the first access of each page makes
/// it, or [`populate`] does so at once. The mapping ends with the last clone.
pub fn map_anonymous(len: usize, huge: bool) -> io::Result<GuestMapping> {
    const HUGE_BYTES: usize = 2 << 20;
    let slack = if huge { HUGE_BYTES } else { 0 };
    let reserved = len.checked_add(slack).ok_or(io::ErrorKind::OutOfMemory)?;
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address that the kernel chooses disturbs no other.
    let base = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), reserved, protection, flags)? };
    // Exposed: `HugeBytes` makes slices of it.
    let base = base.expose_provenance();
    let owner = Unmapper::new(base, reserved);
    let start = if huge {
        base.next_multiple_of(HUGE_BYTES)
    } else {
        base
    };
    keep_private(start, len)?;
    if huge {
        // A kernel without transparent huge pages gives small ones: slower, not wrong.
        advise(start, len, Advice::LinuxHugepage).ok();
    }
    // SAFETY: the range is inside what was just mapped, readable and writable, and stays mapped
    // as long as `owner` lives; nobody else knows its address.
    Ok(unsafe { GuestMapping::new(start, len, Arc::new(owner)) })
}

/// Makes the pages of a range present and writable, so that no later store to them faults.
pub fn populate(mapping: &GuestMapping, offset: usize, len: usize) -> io::Result<()> {
    advise_inside(mapping, offset, len, Advice::LinuxPopulateWrite)
}

/// Gives a range of private anonymous memory back to the host: it reads as zeros afterwards.
pub fn discard(mapping: &GuestMapping, offset: usize, len: usize) -> io::Result<()> {
    advise_inside(mapping, offset, len, Advice::LinuxDontNeed)
}

fn advise_inside(
    mapping: &GuestMapping,
    offset: usize,
    len: usize,
    advice: Advice,
) -> io::Result<()> {
    let end = offset.checked_add(len);
    assert!(
        end.is_some_and(|end| end <= mapping.len()),
        "{len:#x} bytes at {offset:#x} are not inside {mapping:?}"
    );
    advise(mapping.hva() + offset, len, advice)
}

/// Keeps a range from child processes and core dumps.
pub(super) fn keep_private(address: usize, len: usize) -> io::Result<()> {
    advise(address, len, Advice::LinuxDontFork)?;
    advise(address, len, Advice::LinuxDontDump)
}

fn advise(address: usize, len: usize, advice: Advice) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    // SAFETY: the callers name ranges inside a live mapping to which no Rust reference exists,
    // so that a change of its contents (by a discard) invalidates none.
    unsafe { rustix::mm::madvise(ptr::without_provenance_mut(address), len, advice)? };
    Ok(())
}

/// Memory of its own, outside the heap: in huge pages where the kernel has them, and populated.
pub struct HugeBytes {
    address: usize,
    len: usize,
    // Keeps the range mapped.
    _mapping: GuestMapping,
}

impl fmt::Debug for HugeBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HugeBytes({:#x} bytes)", self.len)
    }
}

impl HugeBytes {
    /// Maps and populates `len` bytes; all are zero. Blocks while the kernel finds the memory.
    pub fn new(len: usize) -> io::Result<Self> {
        let mapping = map_anonymous(len, true)?;
        populate(&mapping, 0, len)?;
        Ok(Self {
            address: mapping.hva(),
            len,
            _mapping: mapping,
        })
    }
}

impl Deref for HugeBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        let start = ptr::with_exposed_provenance(self.address);
        // SAFETY: `new` mapped `len` readable bytes there, which stay mapped as long as `self`,
        // and whose address nobody else has.
        unsafe { std::slice::from_raw_parts(start, self.len) }
    }
}

impl DerefMut for HugeBytes {
    fn deref_mut(&mut self) -> &mut [u8] {
        let start = ptr::with_exposed_provenance_mut(self.address);
        // SAFETY: as for `deref`; the exclusive borrow of `self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_starts_as_zeros_and_is_zeros_again_after_a_discard() {
        let memory = map_anonymous(3 << 20, true).unwrap();
        assert_eq!(memory.hva() % (2 << 20), 0);
        let mut byte = [1];
        memory.copy_out(5000, &mut byte);
        assert_eq!(byte, [0]);
        memory.copy_in(5000, &[7]);
        discard(&memory, 4096, 4096).unwrap();
        memory.copy_out(5000, &mut byte);
        assert_eq!(byte, [0]);
    }

    #[test]
    #[should_panic(expected = "not inside")]
    fn a_discard_past_the_end_is_refused() {
        let memory = map_anonymous(4096, false).unwrap();
        discard(&memory, 4096, 4096).ok();
    }
}
