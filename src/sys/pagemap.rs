//! Which pages of this process's memory were ever touched.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::IntoBytes;

/// The page size of x86-64, whose page map this reads.
const PAGE_BYTES: usize = 4096;

/// Entries read at once: those of 2 MiB, 4 KiB.
const BATCH: usize = 512;

/// In memory.
const PRESENT: u64 = 1 << 63;
/// In swap, or under migration: the kernel sets it for every entry that is neither empty nor
/// present.
const SWAPPED: u64 = 1 << 62;

/// Reads `/proc/self/pagemap`.
///
/// Clones nothing and keeps no state: each thread may have its own, or share one.
#[derive(Debug)]
pub struct PagemapReader {
    file: File,
}

impl PagemapReader {
    /// Opens this process's page map; fails where `/proc` is not mounted or not allowed.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(|file| Self { file })
    }

    /// Sets the bit of each page that was never touched, or was given back, and clears the others;
    /// returns how many were set.
    ///
    /// `hva` is the address of page 0 and a multiple of the page size. Such a page of *private
    /// anonymous* memory reads as zeros. It proves nothing about memory of any other kind, nor
    /// about memory that a userfaultfd is still to fill.
    ///
    /// # Panics
    /// When `bits` is shorter than one bit a page.
    pub fn untouched(&self, hva: usize, pages: usize, bits: &mut [u64]) -> io::Result<usize> {
        assert!(bits.len() * 64 >= pages, "bitmap shorter than the range");
        assert_eq!(hva % PAGE_BYTES, 0, "a page starts at a page boundary");
        bits.fill(0);
        let mut entries = [0_u64; BATCH];
        let mut count = 0;
        for first in (0..pages).step_by(BATCH) {
            let batch = &mut entries[..BATCH.min(pages - first)];
            let offset = ((hva / PAGE_BYTES + first) * size_of::<u64>()) as u64;
            self.file.read_exact_at(batch.as_mut_bytes(), offset)?;
            for (page, entry) in (first..).zip(batch) {
                if *entry & (PRESENT | SWAPPED) == 0 {
                    bits[page / 64] |= 1 << (page % 64);
                    count += 1;
                }
            }
        }
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::anon::{discard, map_anonymous};

    #[test]
    fn a_page_is_untouched_until_its_first_access_and_after_a_discard() {
        let memory = map_anonymous(700 * PAGE_BYTES, false).unwrap();
        let reader = PagemapReader::open().unwrap();
        let mut bits = [0_u64; 11];
        assert_eq!(reader.untouched(memory.hva(), 700, &mut bits).unwrap(), 700);
        assert_eq!(bits[10].count_ones(), 700 % 64);
        memory.copy_in(3 * PAGE_BYTES, &[1]);
        memory.copy_in(699 * PAGE_BYTES + 5, &[1]);
        assert_eq!(reader.untouched(memory.hva(), 700, &mut bits).unwrap(), 698);
        assert_eq!(bits[0] & 0b1111, 0b0111);
        assert_eq!(bits[10] >> (699 % 64) & 1, 0);
        discard(&memory, 3 * PAGE_BYTES, PAGE_BYTES).unwrap();
        assert_eq!(reader.untouched(memory.hva(), 700, &mut bits).unwrap(), 699);
    }
}
