//! Memory that a guest writes while we read it.
#![expect(
    unsafe_code,
    reason = "guest memory is reached by raw address; see `GuestMapping::new`"
)]

use std::any::Any;
use std::arch::asm;
use std::fmt;
use std::sync::Arc;

/// A range of this process's address space that backs guest memory.
///
/// Never a `&[u8]`: vCPUs write it while we read. Bytes are copied out and looked at only then;
/// a copy that races a store may be torn, and dirty tracking then reports the page again.
/// Cloning shares the memory and keeps it mapped.
#[derive(Clone)]
pub struct GuestMapping {
    hva: usize,
    len: usize,
    // Dropped last: whatever keeps the range mapped.
    _owner: Arc<dyn Any + Send + Sync>,
}

impl fmt::Debug for GuestMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GuestMapping({:#x}, {:#x} bytes)", self.hva, self.len)
    }
}

impl GuestMapping {
    /// Wraps `len` bytes at `hva`.
    ///
    /// # Safety
    /// The range is mapped readable and writable for as long as `owner` lives, and no Rust
    /// reference to any of its bytes exists meanwhile.
    pub unsafe fn new(hva: usize, len: usize, owner: Arc<dyn Any + Send + Sync>) -> Self {
        Self {
            hva,
            len,
            _owner: owner,
        }
    }

    /// Returns the host virtual address of the first byte.
    pub fn hva(&self) -> usize {
        self.hva
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns whether the mapping holds no byte.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Returns a part of it, which keeps the whole mapped.
    ///
    /// # Panics
    /// When the range is not inside the mapping.
    #[must_use]
    pub fn part(&self, offset: usize, len: usize) -> Self {
        self.check(offset, len);
        Self {
            hva: self.hva + offset,
            len,
            _owner: self._owner.clone(),
        }
    }

    /// Copies bytes from `offset` on into `out`.
    ///
    /// # Panics
    /// When the range is not inside the mapping: callers bound it by the region's length.
    pub fn copy_out(&self, offset: usize, out: &mut [u8]) {
        self.check(offset, out.len());
        // SAFETY: the source is inside the mapping by the check above and mapped by the contract
        // of `new`; the destination is a live exclusive slice, which cannot overlap guest memory.
        unsafe { copy_bytes(self.hva + offset, out.as_mut_ptr() as usize, out.len()) }
    }

    /// Copies `data` to `offset`.
    ///
    /// # Panics
    /// When the range is not inside the mapping.
    pub fn copy_in(&self, offset: usize, data: &[u8]) {
        self.check(offset, data.len());
        // SAFETY: the destination is inside the mapping by the check above and mapped by the
        // contract of `new`; no reference to it exists, so the store invalidates none.
        unsafe { copy_bytes(data.as_ptr() as usize, self.hva + offset, data.len()) }
    }

    /// Copies `len` bytes from `offset` to `to_offset` of `to`, another mapping.
    ///
    /// Several threads may fill different parts of one mapping so, which a slice would not allow.
    ///
    /// # Panics
    /// When a range is not inside its mapping, or the two overlap.
    pub fn copy_to(&self, offset: usize, to: &Self, to_offset: usize, len: usize) {
        self.check(offset, len);
        to.check(to_offset, len);
        let (source, target) = (self.hva + offset, to.hva + to_offset);
        assert!(
            source.abs_diff(target) >= len,
            "a copy within {self:?} overlaps itself"
        );
        // SAFETY: both ranges are inside their mappings, which the contract of `new` keeps mapped
        // and free of references, and they do not overlap by the assertion above.
        unsafe { copy_bytes(source, target, len) }
    }

    fn check(&self, offset: usize, len: usize) {
        let end = offset.checked_add(len);
        assert!(
            end.is_some_and(|end| end <= self.len),
            "{len:#x} bytes at {offset:#x} are not inside {self:?}"
        );
    }
}

/// Copies `len` bytes by `rep movsb`, whose racing accesses the compiler cannot reason about.
///
/// A library `memcpy` on memory that another thread writes is undefined behaviour in Rust; an
/// opaque instruction is not. All x86-64 CPUs of the last decade copy pages at memory speed so.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, and the two do not overlap.
unsafe fn copy_bytes(from: usize, to: usize, len: usize) {
    // SAFETY: by the function's contract; the direction flag is clear by the ABI.
    unsafe {
        asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            options(nostack, preserves_flags),
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(len: usize) -> GuestMapping {
        let mut memory = vec![0_u8; len].into_boxed_slice();
        let hva = memory.as_mut_ptr() as usize;
        // SAFETY: the boxed slice lives in the owner and is reached only by the mapping.
        unsafe { GuestMapping::new(hva, len, Arc::new(memory)) }
    }

    #[test]
    fn bytes_copied_in_come_out_again() {
        let mapping = mapping(8192);
        mapping.copy_in(100, b"livepoint");
        let mut out = [0; 9];
        mapping.copy_out(100, &mut out);
        assert_eq!(&out, b"livepoint");
    }

    #[test]
    fn bytes_go_from_one_mapping_to_another() {
        let (from, to) = (mapping(4096), mapping(8192));
        from.copy_in(10, b"page");
        from.copy_to(10, &to, 8000, 4);
        let mut out = [0; 4];
        to.copy_out(8000, &mut out);
        assert_eq!(&out, b"page");
    }

    #[test]
    #[should_panic(expected = "overlaps")]
    fn a_copy_onto_itself_is_refused() {
        let memory = mapping(4096);
        memory.copy_to(0, &memory, 5, 10);
    }

    #[test]
    #[should_panic(expected = "not inside")]
    fn a_range_past_the_end_is_refused() {
        mapping(4096).copy_out(4090, &mut [0; 10]);
    }

    #[test]
    #[should_panic(expected = "not inside")]
    fn an_offset_that_overflows_is_refused() {
        mapping(4096).copy_out(usize::MAX, &mut [0; 10]);
    }
}
