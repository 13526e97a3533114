//! The pages of one harvest, and the windows in which they are re-armed and copied.

use crate::checkpoint::layout::Layout;
use crate::checkpoint::tracker::WORDS_PER_PIECE;
use crate::page::{AtomicPageBitmap, bitmap_words, runs_of_set_bits};

/// The longest window of a harvest: 8 MiB, as for the scan.
const WINDOW_WORDS_MAX: usize = 32;

/// Clear words inside a window that are cheaper than a second ioctl for what follows them.
const GAP_WORDS_MAX: usize = 8;

/// Dirty pages of all regions; made once and filled by every harvest.
#[derive(Debug, Default)]
pub(crate) struct DirtySet {
    regions: Vec<RegionBits>,
    /// One bit a piece, as the mask was when it was looked at.
    scanned: Vec<u64>,
}

/// One bit a page of one region.
#[derive(Debug)]
pub(crate) struct RegionBits {
    page_count: usize,
    first_index: usize,
    first_piece: usize,
    /// Written by the guest; after the mask: in scanned pieces only.
    pub(super) logged: Vec<u64>,
    /// Written by the VMM; after the mask: in scanned pieces only.
    pub(super) host: Vec<u64>,
}

/// A stretch of a region that has dirty pages; at most [`WINDOW_WORDS_MAX`] words long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DirtyWindow {
    pub(crate) region: usize,
    first_word: usize,
    words: usize,
    pub(crate) page_count: usize,
}

impl DirtyWindow {
    /// Returns the first page, counted from the region's start; a multiple of 64.
    pub(crate) fn first_page(&self) -> usize {
        self.first_word * 64
    }
}

impl DirtySet {
    pub(crate) fn new(layout: &Layout) -> Self {
        let regions = layout.regions().iter().map(|place| {
            let words = bitmap_words(place.page_count as u64);
            RegionBits {
                page_count: place.page_count,
                first_index: place.first_index,
                first_piece: place.first_piece,
                logged: vec![0; words],
                host: vec![0; words],
            }
        });
        Self {
            regions: regions.collect(),
            scanned: vec![0; bitmap_words(layout.piece_count() as u64)],
        }
    }

    pub(super) fn regions_mut(&mut self) -> impl Iterator<Item = &mut RegionBits> {
        self.regions.iter_mut()
    }

    pub(super) fn look_at_mask(&mut self, scanned: &AtomicPageBitmap) {
        self.scanned.fill(0);
        for piece in (0..scanned.pages()).filter(|&piece| scanned.get(piece)) {
            let piece = usize::try_from(piece).expect("pieces are counted in memory");
            self.scanned[piece / 64] |= 1 << (piece % 64);
        }
    }

    /// Clears the bits of pieces that the scan has not come to, and bits past a region's end.
    pub(super) fn apply_mask(&mut self) {
        for region in &mut self.regions {
            let pieces = region.first_piece..;
            let logged = region.logged.chunks_mut(WORDS_PER_PIECE);
            let host = region.host.chunks_mut(WORDS_PER_PIECE);
            for (piece, (logged, host)) in pieces.zip(logged.zip(host)) {
                if self.scanned[piece / 64] >> (piece % 64) & 1 == 0 {
                    logged.fill(0);
                    host.fill(0);
                }
            }
            let past_end = region.page_count % 64;
            if past_end != 0 {
                let inside = (1_u64 << past_end) - 1;
                let last = region.logged.len() - 1;
                region.logged[last] &= inside;
                region.host[last] &= inside;
            }
        }
    }

    /// Sets the bits of the dirty pages in bitmaps of the regions.
    pub(super) fn note_in(&self, taken: &[AtomicPageBitmap]) {
        for (region, taken) in self.regions.iter().zip(taken) {
            for (number, word) in region.words().enumerate().filter(|(_, word)| *word != 0) {
                for (first, count) in runs_of_set_bits(&[word]) {
                    taken.set_run(number as u64 * 64 + first, count);
                }
            }
        }
    }

    /// Returns one bit a page by piece, each of [`WORDS_PER_PIECE`] words.
    pub(crate) fn by_piece(&self) -> Vec<u64> {
        let pieces = self.regions.last().map_or(0, |last| {
            last.first_piece + last.logged.len().div_ceil(WORDS_PER_PIECE)
        });
        let mut bits = vec![0; pieces * WORDS_PER_PIECE];
        for region in &self.regions {
            let first = region.first_piece * WORDS_PER_PIECE;
            for (out, word) in bits[first..].iter_mut().zip(region.words()) {
                *out = word;
            }
        }
        bits
    }

    /// Returns the number of dirty pages.
    pub(crate) fn page_count(&self) -> u64 {
        let pairs = self.regions.iter().flat_map(RegionBits::words);
        pairs.map(|word| u64::from(word.count_ones())).sum()
    }

    /// Returns how many stretches of pages that follow one another they are.
    pub(crate) fn stretch_count(&self) -> u64 {
        let starts = |region: &RegionBits| {
            let words = region.words().scan(0, |last, word| {
                let starts = word & !(word << 1 | *last);
                *last = word >> 63;
                Some(u64::from(starts.count_ones()))
            });
            words.sum::<u64>()
        };
        self.regions.iter().map(starts).sum()
    }

    /// Returns the bits of the pages that the guest wrote in a window.
    pub(crate) fn logged(&self, window: &DirtyWindow) -> &[u64] {
        &self.regions[window.region].logged[window.first_word..][..window.words]
    }

    /// Returns the bits of the pages that the VMM wrote in a window.
    pub(crate) fn host(&self, window: &DirtyWindow) -> &[u64] {
        &self.regions[window.region].host[window.first_word..][..window.words]
    }

    /// Returns the windows that hold all dirty pages, in order.
    pub(crate) fn windows(&self) -> impl Iterator<Item = DirtyWindow> + '_ {
        let regions = self.regions.iter().enumerate();
        regions.flat_map(|(number, region)| region.windows(number))
    }

    /// Returns the indices of the dirty pages in a window.
    pub(crate) fn pages(&self, window: DirtyWindow) -> impl Iterator<Item = usize> + '_ {
        let region = &self.regions[window.region];
        let words = region.words().enumerate().skip(window.first_word);
        words.take(window.words).flat_map(move |(word, bits)| {
            let first = region.first_index + word * 64;
            set_bits(bits).map(move |bit| first + bit)
        })
    }
}

impl RegionBits {
    fn words(&self) -> impl Iterator<Item = u64> + '_ {
        let pairs = self.logged.iter().zip(&self.host);
        pairs.map(|(logged, host)| logged | host)
    }

    fn windows(&self, region: usize) -> impl Iterator<Item = DirtyWindow> + '_ {
        let dirty = |word: &usize| (self.logged[*word] | self.host[*word]) != 0;
        let mut next = 0;
        std::iter::from_fn(move || {
            let first_word = (next..self.logged.len()).find(dirty)?;
            let mut end = first_word + 1;
            let longest = (first_word + WINDOW_WORDS_MAX).min(self.logged.len());
            while let Some(more) = (end..longest.min(end + GAP_WORDS_MAX)).find(dirty) {
                end = more + 1;
            }
            next = end;
            let first_page = first_word * 64;
            Some(DirtyWindow {
                region,
                first_word,
                words: end - first_word,
                page_count: (end * 64).min(self.page_count) - first_page,
            })
        })
    }
}

fn set_bits(mut word: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (bit < 64).then_some(bit as usize)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Backing, MemoryRegion};
    use crate::page::{Gfn, PAGE_BYTES};
    use crate::sys::anon::map_anonymous;
    use proptest::prelude::*;

    fn layout(sizes: &[u64]) -> Layout {
        let regions: Vec<_> = (0_u32..)
            .zip(sizes)
            .map(|(slot, &page_count)| MemoryRegion {
                slot,
                start: Gfn(u64::from(slot) << 20),
                page_count,
                mapping: map_anonymous(usize::try_from(page_count).unwrap() * PAGE_BYTES, false)
                    .unwrap(),
                backing: Backing::Memfd,
            })
            .collect();
        Layout::new(&regions)
    }

    #[test]
    fn bits_of_pieces_that_were_not_scanned_are_masked_out() {
        let layout = layout(&[1024, 700]);
        let mut set = DirtySet::new(&layout);
        let scanned = AtomicPageBitmap::new(4);
        scanned.set(1);
        scanned.set(3);
        set.look_at_mask(&scanned);
        for region in set.regions_mut() {
            region.logged.fill(u64::MAX);
            region.host.fill(u64::MAX);
        }
        set.apply_mask();
        let pages: Vec<_> = set.windows().flat_map(|window| set.pages(window)).collect();
        let expected: Vec<_> = (512..1024).chain(1024 + 512..1724).collect();
        assert_eq!(pages, expected);
        assert_eq!(set.page_count(), 512 + 188);
    }

    proptest! {
        #[test]
        fn windows_hold_every_dirty_page_once_and_stay_within_their_bounds(
            pages in prop::collection::btree_set(0_usize..9000, 0..80),
            by_host in any::<bool>(),
        ) {
            let layout = layout(&[5000, 4000]);
            let mut set = DirtySet::new(&layout);
            for &page in &pages {
                let (region, page) = if page < 5000 { (0, page) } else { (1, page - 5000) };
                let bits = &mut set.regions[region];
                let words = if by_host { &mut bits.host } else { &mut bits.logged };
                words[page / 64] |= 1 << (page % 64);
            }
            let follows = |page: &usize| *page > 0 && *page != 5000 && pages.contains(&(page - 1));
            let stretches = pages.iter().filter(|page| !follows(page)).count();
            prop_assert_eq!(set.stretch_count(), stretches as u64);
            let mut seen = Vec::new();
            for window in set.windows() {
                prop_assert!(window.words <= WINDOW_WORDS_MAX);
                let end = window.first_page() + window.page_count;
                let region = &set.regions[window.region];
                prop_assert!(end % 64 == 0 || end == region.page_count);
                seen.extend(set.pages(window));
            }
            prop_assert!(seen.into_iter().eq(pages));
        }
    }
}
