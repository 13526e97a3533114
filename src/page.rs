//! Pages, frames and runs of them: the only page arithmetic in the project.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::sync::atomic::{AtomicU64, Ordering};

/// Bytes in a page: the unit of dirty tracking and of the page index.
pub const PAGE_BYTES: usize = 4096;

/// log2 of [`PAGE_BYTES`].
pub const PAGE_SHIFT: u32 = 12;

/// Pages in a piece: 2 MiB, the size of an x86-64 huge page.
///
/// Memory is scanned, captured and un-protected in pieces, so that huge pages stay whole.
pub const PIECE_PAGES: u64 = 512;

/// Bytes in a piece.
pub const PIECE_BYTES: usize = 2 << 20;
const _: () = assert!(PIECE_BYTES as u64 == PIECE_PAGES << PAGE_SHIFT);

/// KVM's dirty log is read and cleared in windows of this many pages (one `u64` of bitmap).
pub const WINDOW_PAGES: u64 = 64;

/// A guest frame number: a guest physical address divided by the page size.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Gfn(pub u64);

impl Gfn {
    /// Returns the frame that holds guest physical address `gpa`.
    pub const fn containing(gpa: u64) -> Self {
        Self(gpa >> PAGE_SHIFT)
    }

    /// Returns the guest physical address of the frame's first byte.
    pub const fn gpa(self) -> u64 {
        self.0 << PAGE_SHIFT
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// A run of consecutive guest frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PageRun {
    /// First frame.
    pub start: Gfn,
    /// Number of frames.
    pub page_count: u64,
}

impl PageRun {
    /// Returns the run of the frames that `len` bytes at `gpa` touch; empty when `len` is 0.
    pub const fn touching(gpa: u64, len: u64) -> Self {
        let start = Gfn::containing(gpa);
        if len == 0 {
            return Self {
                start,
                page_count: 0,
            };
        }
        let last = Gfn::containing(gpa + (len - 1));
        Self {
            start,
            page_count: last.0 - start.0 + 1,
        }
    }

    /// Returns the frame after the last one.
    pub const fn end(self) -> Gfn {
        Gfn(self.start.0 + self.page_count)
    }

    /// Returns the run's length in bytes.
    pub const fn bytes(self) -> u64 {
        self.page_count << PAGE_SHIFT
    }

    /// Returns the frames that both runs hold, or `None` where they hold none in common.
    pub fn intersection(self, other: Self) -> Option<Self> {
        let start = self.start.max(other.start);
        let end = self.end().min(other.end());
        (start < end).then(|| Self {
            start,
            page_count: end.0 - start.0,
        })
    }

    /// Adds the run to `sorted` ones, none of which starts behind it: to the last where they touch
    /// or overlap.
    pub fn append_to(self, sorted: &mut Vec<Self>) {
        match sorted.last_mut() {
            Some(last) if self.start <= last.end() => {
                last.page_count = last.end().max(self.end()).0 - last.start.0;
            }
            _ => sorted.push(self),
        }
    }
}

/// Iterates over the runs of set bits in a bitmap's words, as page numbers from 0.
///
/// # Examples
/// ```
/// let runs: Vec<_> = livepoint::page::runs_of_set_bits(&[0b0110, 1]).collect();
/// assert_eq!(runs, [(1, 2), (64, 1)]);
/// ```
pub fn runs_of_set_bits(words: &[u64]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let mut next = 0_u64;
    let total = words.len() as u64 * 64;
    std::iter::from_fn(move || {
        let start = find_bit(words, next, total, true)?;
        let end = find_bit(words, start, total, false).unwrap_or(total);
        next = end;
        Some((start, end - start))
    })
}

/// Returns the first bit at or after `from` whose value is `wanted`.
fn find_bit(words: &[u64], from: u64, total: u64, wanted: bool) -> Option<u64> {
    let mut at = from;
    while at < total {
        let word = words[word_of(at)];
        let seen = if wanted { word } else { !word } >> (at % 64);
        if seen != 0 {
            return Some(at + u64::from(seen.trailing_zeros()));
        }
        at = (at / 64 + 1) * 64;
    }
    None
}

/// Returns the index of the word that holds `bit`.
fn word_of(bit: u64) -> usize {
    usize::try_from(bit / 64).expect("bitmaps are in memory, so their indices fit usize")
}

/// Returns the number of `u64` words that hold one bit for each of `pages` pages.
pub fn bitmap_words(pages: u64) -> usize {
    word_of(pages + 63)
}

/// One bit a page, set and taken by any thread.
///
/// Used for pages that the VMM itself writes, which KVM's dirty log never sees.
#[derive(Debug)]
pub struct AtomicPageBitmap {
    words: Box<[AtomicU64]>,
    pages: u64,
}

impl AtomicPageBitmap {
    /// Makes a bitmap of `pages` clear bits.
    pub fn new(pages: u64) -> Self {
        Self {
            words: (0..bitmap_words(pages))
                .map(|_| AtomicU64::new(0))
                .collect(),
            pages,
        }
    }

    /// Returns the number of pages that the bitmap covers.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Sets the bit of one page; pages past the end are ignored.
    ///
    /// The store is a release, so that whoever takes the bit sees the write that it announces.
    pub fn set(&self, page: u64) {
        if page < self.pages {
            self.words[word_of(page)].fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    /// Sets the bits of `count` pages from `first` on; pages past the end are ignored.
    pub fn set_run(&self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(self.pages);
        let mut page = first;
        while page < end {
            let in_word = (64 - page % 64).min(end - page);
            let mask = if in_word == 64 {
                u64::MAX
            } else {
                ((1 << in_word) - 1) << (page % 64)
            };
            self.words[word_of(page)].fetch_or(mask, Ordering::AcqRel);
            page += in_word;
        }
    }

    /// Returns whether the bit of `page` is set.
    pub fn get(&self, page: u64) -> bool {
        page < self.pages
            && self.words[word_of(page)].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// Clears every bit and adds those that were set to `into`, which must be as long.
    pub fn take_into(&self, into: &mut [u64]) {
        assert_eq!(
            into.len(),
            self.words.len(),
            "the bitmaps cover different memory"
        );
        for (word, out) in self.words.iter().zip(into) {
            // Most words are clear: a load keeps their cache lines shared.
            if word.load(Ordering::Relaxed) != 0 {
                *out |= word.swap(0, Ordering::AcqRel);
            }
        }
    }

    /// Clears every bit.
    pub fn clear(&self) {
        for word in &self.words {
            word.store(0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_touches_every_page_that_one_of_its_bytes_is_in() {
        assert_eq!(
            PageRun::touching(0xfff, 2),
            PageRun {
                start: Gfn(0),
                page_count: 2
            }
        );
        assert_eq!(
            PageRun::touching(0x1000, 0x1000),
            PageRun {
                start: Gfn(1),
                page_count: 1
            }
        );
        assert_eq!(PageRun::touching(0x1000, 0).page_count, 0);
    }

    #[test]
    fn runs_that_only_meet_do_not_intersect() {
        let a = PageRun {
            start: Gfn(0),
            page_count: 4,
        };
        let b = PageRun {
            start: Gfn(4),
            page_count: 4,
        };
        assert_eq!(a.intersection(b), None);
        let c = PageRun {
            start: Gfn(3),
            page_count: 2,
        };
        assert_eq!(
            a.intersection(c),
            Some(PageRun {
                start: Gfn(3),
                page_count: 1
            })
        );
    }

    proptest! {
        #[test]
        fn runs_cover_exactly_the_set_bits(words in prop::collection::vec(any::<u64>(), 0..6)) {
            let mut seen = vec![0_u64; words.len()];
            let mut last_end = None;
            for (start, count) in runs_of_set_bits(&words) {
                prop_assert!(count > 0);
                prop_assert!(last_end.is_none_or(|end| start > end), "runs are maximal and ordered");
                last_end = Some(start + count);
                for bit in start..start + count {
                    seen[word_of(bit)] |= 1 << (bit % 64);
                }
            }
            prop_assert_eq!(seen, words);
        }

        #[test]
        fn set_run_sets_the_same_bits_as_one_set_a_page(
            pages in 1_u64..300, first in 0_u64..310, count in 0_u64..310,
        ) {
            let by_run = AtomicPageBitmap::new(pages);
            by_run.set_run(first, count);
            let by_page = AtomicPageBitmap::new(pages);
            (first..first + count).for_each(|page| by_page.set(page));
            let mut a = vec![0; bitmap_words(pages)];
            let mut b = vec![0; bitmap_words(pages)];
            by_run.take_into(&mut a);
            by_page.take_into(&mut b);
            prop_assert_eq!(a, b);
        }
    }
}
