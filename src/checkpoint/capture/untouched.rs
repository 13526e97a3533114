//! Which pages were never touched, as of the captured moment.

use std::io;

use crate::checkpoint::layout::{Layout, PIECE, Place};
use crate::checkpoint::tracker::WORDS_PER_PIECE;
use crate::guest::Backing;
use crate::page::{PAGE_BYTES, PIECE_BYTES};
use crate::sys::pagemap::PagemapReader;

/// One bit a page: it is in no page table, and so holds zeros.
///
/// Such a page cannot be write-protected, and need not be: it is not read. So the bits must be
/// those of the moment, neither more nor fewer. They are found out while the guest runs, and
/// brought up to date in the pause at a cost that depends on what is untouched or was given back
/// meanwhile, not on the size of memory: any other page stays as it was.
#[derive(Debug)]
pub(crate) struct UntouchedPages {
    pagemap: PagemapReader,
    /// By piece, each of [`WORDS_PER_PIECE`] words.
    bits: Vec<u64>,
}

impl UntouchedPages {
    /// Looks at all of memory.
    pub(crate) fn look(layout: &Layout) -> io::Result<Self> {
        let mut untouched = Self {
            pagemap: PagemapReader::open()?,
            bits: vec![0; layout.piece_count() * WORDS_PER_PIECE],
        };
        for (number, place) in layout.regions().iter().enumerate() {
            // Pages of a memfd or of hugetlb can be protected even where they are in no page
            // table, and may be in the page cache then.
            if matches!(place.backing, Backing::Anonymous { .. }) {
                untouched.look_at(layout, number, 0..pieces_in(place))?;
            }
        }
        Ok(untouched)
    }

    /// Looks again at pieces that had untouched pages, and at those in which pages were
    /// `given_back` since the first look (in order). Returns the numbers of the pieces where pages
    /// were touched since. Called in the pause.
    pub(crate) fn look_again(
        &mut self,
        layout: &Layout,
        given_back: &[usize],
    ) -> io::Result<Vec<usize>> {
        let before = self.bits.clone();
        for (number, place) in layout.regions().iter().enumerate() {
            if !matches!(place.backing, Backing::Anonymous { .. }) {
                continue;
            }
            let pieces = pieces_in(place);
            let may_differ = |piece: usize| {
                let piece = place.first_piece + piece;
                has_some(&before, piece) || given_back.binary_search(&piece).is_ok()
            };
            let mut first = 0;
            while first < pieces {
                let end = (first..pieces).find(|&piece| !may_differ(piece));
                let end = end.unwrap_or(pieces);
                if first < end {
                    self.look_at(layout, number, first..end)?;
                }
                first = end + 1;
            }
        }
        let parts = before
            .chunks_exact(WORDS_PER_PIECE)
            .zip(self.bits.chunks_exact(WORDS_PER_PIECE));
        let touched = parts.enumerate().filter(|(_, (before, now))| {
            let mut words = before.iter().zip(now.iter());
            words.any(|(before, now)| before & !now != 0)
        });
        Ok(touched.map(|(piece, _)| piece).collect())
    }

    fn look_at(
        &mut self,
        layout: &Layout,
        region: usize,
        pieces: std::ops::Range<usize>,
    ) -> io::Result<()> {
        let place = &layout.regions()[region];
        let first_page = pieces.start * PIECE;
        let pages = (pieces.len() * PIECE).min(place.page_count - first_page);
        let first_word = (place.first_piece + pieces.start) * WORDS_PER_PIECE;
        let bits = &mut self.bits[first_word..][..pieces.len() * WORDS_PER_PIECE];
        let hva = place.mapping.hva() + first_page * PAGE_BYTES;
        self.pagemap.untouched(hva, pages, bits).map(|_| ())
    }

    /// Returns the bits of a piece.
    pub(crate) fn of_piece(&self, piece: usize) -> &[u64] {
        &self.bits[piece * WORDS_PER_PIECE..][..WORDS_PER_PIECE]
    }

    /// Returns how many pages of a piece are untouched.
    pub(crate) fn count(&self, piece: usize) -> usize {
        let words = self.of_piece(piece).iter();
        words.map(|word| word.count_ones() as usize).sum()
    }
}

fn pieces_in(place: &Place) -> usize {
    place.page_count.div_ceil(PIECE)
}

fn has_some(bits: &[u64], piece: usize) -> bool {
    let words = &bits[piece * WORDS_PER_PIECE..][..WORDS_PER_PIECE];
    words.iter().any(|&word| word != 0)
}

const _: () = assert!(WORDS_PER_PIECE * 64 * PAGE_BYTES == PIECE_BYTES);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::fake::FakeGuest;
    use crate::guest::Guest;

    #[test]
    fn pages_touched_between_the_looks_are_touched_and_their_pieces_told() {
        let guest = FakeGuest::new(&[1200, 512 * 3], 0);
        guest.write_page(5, 1);
        guest.write_page(1199, 1);
        (1200 + 512..1200 + 1024).for_each(|page| guest.write_page(page, 1));
        let layout = Layout::new(guest.regions());
        let mut untouched = UntouchedPages::look(&layout).unwrap();
        let counts = |untouched: &UntouchedPages| {
            (0..layout.piece_count())
                .map(|piece| untouched.count(piece))
                .collect::<Vec<_>>()
        };
        assert_eq!(counts(&untouched), [511, 512, 175, 512, 0, 512]);
        guest.write_page(600, 1);
        guest.write_page(1200, 1);
        guest.discard(1200 + 600, 3);
        let mut again = |given_back: &[usize]| untouched.look_again(&layout, given_back).unwrap();
        assert_eq!(again(&[4]), [1, 3]);
        assert!(again(&[]).is_empty());
        assert_eq!(counts(&untouched), [511, 511, 175, 511, 3, 512]);
    }
}
