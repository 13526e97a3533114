//! Memory that a guest writes while we read it.
#![expect(
    unsafe_code,
    reason = "guest memory is reached by raw address; see `GuestMapping::new`"
)]

use std::any::Any;
use std::arch::asm;
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

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

/// Bytes of one turn of [`copy_by_vectors`].
const VECTOR_BYTES: usize = 128;

/// How many times as long copying by string instruction has to take to count as slow. Where it is,
/// it takes 5 to 50 times as long as vectors; elsewhere it takes no longer than they do.
const SLOW_FACTOR: u32 = 3;

/// What is copied to measure, in bytes: enough for a slow copy to take 100 us and more, and no more,
/// because somebody waits for the first copy.
const PROBE_BYTES: usize = 2048;

/// How often: the shortest counts, as the host may run somebody else meanwhile.
const PROBES: u32 = 8;

/// More than the clocks of hosts are coarse. A fast copy as a whole takes a tenth of it.
const PROBE_SLACK: Duration = Duration::from_micros(2);

/// Copies `len` bytes by instructions whose racing accesses the compiler cannot reason about.
///
/// A library `memcpy` on memory that another thread writes is undefined behaviour in Rust; an
/// opaque instruction is not. `rep movsb` copies pages at memory speed on all x86-64 CPUs of the
/// last decade, but not where a CPU is emulated, whatever it says of itself: there it takes a
/// hundred nanoseconds a byte, and a vCPU that waits for a copy of 2 MiB waits for most of a second.
///
/// # Safety
/// `from` is readable and `to` writable for `len` bytes, and the two do not overlap.
unsafe fn copy_bytes(from: usize, to: usize, len: usize) {
    static STRINGS_ARE_SLOW: OnceLock<bool> = OnceLock::new();
    let by_vectors = if *STRINGS_ARE_SLOW.get_or_init(strings_are_slow) {
        len - len % VECTOR_BYTES
    } else {
        0
    };
    if by_vectors > 0 {
        // SAFETY: a part of what the caller vouches for; the length is whole turns, and not 0.
        unsafe { copy_by_vectors(from, to, by_vectors) };
    }
    // SAFETY: the rest of what the caller vouches for.
    unsafe { copy_by_string(from + by_vectors, to + by_vectors, len - by_vectors) }
}

/// Returns whether this CPU takes many times as long for `rep movsb` as for a loop.
///
/// It takes microseconds, and a millisecond or two where strings are slow. A wrong answer would do
/// little harm: long copies by vectors are as fast as memory is, too.
fn strings_are_slow() -> bool {
    let (from, mut to) = ([1_u8; PROBE_BYTES], [0_u8; PROBE_BYTES]);
    let (from, to) = (from.as_ptr() as usize, to.as_mut_ptr() as usize);
    let shortest = |copy: unsafe fn(usize, usize, usize)| {
        let tries = (0..PROBES).map(|_| {
            let began = Instant::now();
            // SAFETY: both are arrays of this function of so many bytes, a multiple of a turn's.
            unsafe { copy(from, to, PROBE_BYTES) };
            began.elapsed()
        });
        tries.min().unwrap_or_default()
    };
    let (string, vectors) = (shortest(copy_by_string), shortest(copy_by_vectors));
    let slow = string > vectors.saturating_mul(SLOW_FACTOR) + PROBE_SLACK;
    log::debug!(
        "{PROBE_BYTES} bytes take {string:?} by a string instruction and {vectors:?} by vectors: \
         guest memory is copied by {}",
        if slow { "vectors" } else { "strings" }
    );
    slow
}

/// Copies by the string instruction.
///
/// # Safety
/// As for [`copy_bytes`].
unsafe fn copy_by_string(from: usize, to: usize, len: usize) {
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

/// Copies by a loop of vector moves.
///
/// # Safety
/// As for [`copy_bytes`], and `len` is a multiple of [`VECTOR_BYTES`], and not 0.
unsafe fn copy_by_vectors(from: usize, to: usize, len: usize) {
    // SAFETY: by the function's contract; each turn copies as much as it moves on, and the last
    // one ends at `len`.
    unsafe {
        asm!(
            "2:",
            "movups xmm0, [rsi]",
            "movups xmm1, [rsi + 16]",
            "movups xmm2, [rsi + 32]",
            "movups xmm3, [rsi + 48]",
            "movups xmm4, [rsi + 64]",
            "movups xmm5, [rsi + 80]",
            "movups xmm6, [rsi + 96]",
            "movups xmm7, [rsi + 112]",
            "movups [rdi], xmm0",
            "movups [rdi + 16], xmm1",
            "movups [rdi + 32], xmm2",
            "movups [rdi + 48], xmm3",
            "movups [rdi + 64], xmm4",
            "movups [rdi + 80], xmm5",
            "movups [rdi + 96], xmm6",
            "movups [rdi + 112], xmm7",
            "add rsi, 128",
            "add rdi, 128",
            "sub rcx, 128",
            "jnz 2b",
            inout("rcx") len => _,
            inout("rsi") from => _,
            inout("rdi") to => _,
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            options(nostack),
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
    fn either_way_copies_every_byte_and_no_other() {
        type Copy = unsafe fn(usize, usize, usize);
        let ways: [(Copy, &[usize]); 2] = [
            (copy_by_string, &[0, 1, 63, 128, 4096]),
            (copy_by_vectors, &[128, 256, 4096]),
        ];
        let from: Vec<u8> = (0..8192_u32).map(|at| (at * 7 % 251) as u8).collect();
        for (copy, lengths) in ways {
            for &len in lengths {
                for at in [0, 1, 9] {
                    let mut to = vec![0xee_u8; 8192];
                    let (source, target) = (from.as_ptr() as usize, to.as_mut_ptr() as usize);
                    // SAFETY: both have 8192 bytes, of which less than 4200 are used.
                    unsafe { copy(source + at, target + 3, len) };
                    assert_eq!(to[3..3 + len], from[at..at + len], "{len} from {at}");
                    assert!(
                        to[..3]
                            .iter()
                            .chain(&to[3 + len..])
                            .all(|&byte| byte == 0xee)
                    );
                }
            }
        }
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
