//! Which pages of this process's memory were ever touched.
#![expect(unsafe_code, reason = "PAGEMAP_SCAN has no wrapper")]

use std::fs::File;
use std::io;
use std::mem::size_of;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use linux_raw_sys::general::{page_region, pm_scan_arg};
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

/// Walks the page map in the kernel (Linux 6.7; Documentation/admin-guide/mm/pagemap.rst).
const PAGEMAP_SCAN: u64 = 0xC060_6610;
const _: () = assert!(PAGEMAP_SCAN == 0xC000_6610 | (size_of::<pm_scan_arg>() as u64) << 16);

/// Categories of pages, as `PAGEMAP_SCAN` has them.
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;

/// Stretches of pages that one call tells.
const REGIONS: usize = 256;

/// Reads `/proc/self/pagemap`.
///
/// Clones nothing and keeps no state but whether the kernel has `PAGEMAP_SCAN`: each thread may
/// have its own, or share one.
#[derive(Debug)]
pub struct PagemapReader {
    file: File,
    has_scan: AtomicBool,
}

impl PagemapReader {
    /// Opens this process's page map; fails where `/proc` is not mounted or not allowed.
    pub fn open() -> io::Result<Self> {
        File::open("/proc/self/pagemap").map(|file| Self {
            file,
            has_scan: AtomicBool::new(true),
        })
    }

    /// Sets the bit of each page that was never touched, or was given back, and clears the others;
    /// returns how many were set.
    ///
    /// `hva` is the address of page 0 and a multiple of the page size. Such a page of *private*
    /// memory that no file backs reads as zeros. It proves nothing about memory of any other kind,
    /// nor about memory that a userfaultfd is still to fill. Costs some 10 ns for each huge page,
    /// and nothing for memory that has no page tables; before Linux 6.7 about 5 ns a page.
    ///
    /// # Panics
    /// When `bits` is shorter than one bit a page.
    pub fn untouched(&self, hva: usize, pages: usize, bits: &mut [u64]) -> io::Result<usize> {
        assert!(bits.len() * 64 >= pages, "bitmap shorter than the range");
        assert_eq!(hva % PAGE_BYTES, 0, "a page starts at a page boundary");
        if self.has_scan.load(Ordering::Relaxed) {
            set_bits(bits, 0, pages);
            let mut touched = 0;
            let scanned = self.scan(
                hva,
                pages,
                PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                |first, count| {
                    clear_bits(bits, first, count);
                    touched += count;
                },
            );
            match scanned {
                Ok(()) => return Ok(pages - touched),
                Err(error) if is_unknown(&error) => self.has_scan.store(false, Ordering::Relaxed),
                Err(error) => return Err(error),
            }
        }
        self.untouched_by_entry(hva, pages, bits)
    }

    /// Tells the stretches of pages, as (first, count), that are in one of `categories`.
    fn scan(
        &self,
        hva: usize,
        pages: usize,
        categories: u64,
        mut tell: impl FnMut(usize, usize),
    ) -> io::Result<()> {
        const NONE: page_region = page_region {
            start: 0,
            end: 0,
            categories: 0,
        };
        let mut found = [NONE; REGIONS];
        let end = (hva + pages * PAGE_BYTES) as u64;
        let mut start = hva as u64;
        let page_of = |address: u64| {
            usize::try_from(address)
                .expect("addresses fit usize")
                .saturating_sub(hva)
                / PAGE_BYTES
        };
        while start < end {
            let mut arg = pm_scan_arg {
                size: size_of::<pm_scan_arg>() as u64,
                flags: 0,
                start,
                end,
                walk_end: 0,
                vec: found.as_mut_ptr().addr() as u64,
                vec_len: REGIONS as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: 0,
                category_anyof_mask: categories,
                return_mask: categories,
            };
            // SAFETY: the kernel reads and writes `arg`, and writes at most `vec_len` records to
            // `found`, during the call; it changes nothing of the memory that is described.
            let count = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
            for region in &found[..count] {
                let first = page_of(region.start);
                tell(first, page_of(region.end).min(pages) - first);
            }
            if arg.walk_end <= start {
                return Err(io::Error::other("PAGEMAP_SCAN makes no progress"));
            }
            start = arg.walk_end;
        }
        Ok(())
    }

    fn untouched_by_entry(&self, hva: usize, pages: usize, bits: &mut [u64]) -> io::Result<usize> {
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

/// Returns whether the kernel does not know an ioctl.
fn is_unknown(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL))
}

/// Sets the first `pages` bits from `first` on, and clears the rest of `bits`.
fn set_bits(bits: &mut [u64], first: usize, pages: usize) {
    bits.fill(0);
    change_bits(bits, first, pages, |word, mask| *word |= mask);
}

fn clear_bits(bits: &mut [u64], first: usize, pages: usize) {
    change_bits(bits, first, pages, |word, mask| *word &= !mask);
}

fn change_bits(bits: &mut [u64], first: usize, pages: usize, change: impl Fn(&mut u64, u64)) {
    let end = first + pages;
    let mut page = first;
    while page < end {
        let in_word = (64 - page % 64).min(end - page);
        let mask = (u64::MAX >> (64 - in_word)) << (page % 64);
        change(&mut bits[page / 64], mask);
        page += in_word;
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

    #[test]
    fn the_scan_and_the_entries_agree_on_scattered_pages() {
        let pages = 4 * REGIONS + 77;
        let memory = map_anonymous(pages * PAGE_BYTES, false).unwrap();
        for page in (0..pages).filter(|page| page % 2 == 0 || page % 7 == 0) {
            memory.copy_in(page * PAGE_BYTES, &[1]);
        }
        let reader = PagemapReader::open().unwrap();
        let words = pages.div_ceil(64);
        let (mut by_scan, mut by_entry) = (vec![u64::MAX; words], vec![0; words]);
        let scanned = reader.untouched(memory.hva(), pages, &mut by_scan).unwrap();
        let read = reader
            .untouched_by_entry(memory.hva(), pages, &mut by_entry)
            .unwrap();
        assert_eq!(scanned, read);
        assert_eq!(by_scan, by_entry);
    }
}
