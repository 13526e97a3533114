//! Copying a piece, without reading in pages that were never touched.

use crate::checkpoint::layout::{Layout, PIECE, Piece};
use crate::checkpoint::tracker::WORDS_PER_PIECE;
use crate::checkpoint::writer::Buffer;
use crate::guest::Backing;
use crate::page::{Gfn, PAGE_BYTES, PageRun, runs_of_set_bits};
use crate::sys::pagemap::PagemapReader;

/// Copies pieces; one for each capturing thread.
#[derive(Debug)]
pub(crate) struct PieceReader {
    /// `None` where `/proc` cannot be read: every page then counts as touched.
    pagemap: Option<PagemapReader>,
    untouched: [u64; WORDS_PER_PIECE],
}

impl PieceReader {
    pub(crate) fn new() -> Self {
        let pagemap = PagemapReader::open()
            .inspect_err(|error| log::warn!("untouched pages will be read in: {error}"));
        Self {
            pagemap: pagemap.ok(),
            untouched: [0; WORDS_PER_PIECE],
        }
    }

    /// Copies the touched pages of `piece` into `buffer`, and notes the others as zeros.
    ///
    /// The page map is read after the piece was re-armed, as the copies are: a page that the guest
    /// touches first between the two is reported dirty.
    pub(crate) fn capture(&mut self, layout: &Layout, piece: &Piece, buffer: &mut Buffer) {
        self.find_untouched(layout, piece);
        copy_piece(layout, piece, &self.untouched, None, buffer);
    }

    /// Sets the bits of the piece's untouched pages; returns how many there are.
    fn find_untouched(&mut self, layout: &Layout, piece: &Piece) -> usize {
        let place = &layout.regions()[piece.region];
        self.untouched.fill(0);
        // A page of a memfd or of hugetlb that is in no page table may be in the page cache.
        let (Backing::Anonymous { .. }, Some(pagemap)) = (place.backing, &self.pagemap) else {
            return 0;
        };
        let hva = place.mapping.hva() + piece.first_page * PAGE_BYTES;
        pagemap
            .untouched(hva, piece.page_count, &mut self.untouched)
            .unwrap_or_else(|error| {
                log::warn!("untouched pages will be read in: {error}");
                self.untouched.fill(0);
                self.pagemap = None;
                0
            })
    }
}

/// Copies a piece into `buffer`, but for the pages that are `untouched`, which are noted as zeros.
/// Where there is `wanted`, other pages are passed over.
pub(crate) fn copy_piece(
    layout: &Layout,
    piece: &Piece,
    untouched: &[u64],
    wanted: Option<&[u64]>,
    buffer: &mut Buffer,
) {
    let place = &layout.regions()[piece.region];
    let run_at = |first: usize, count: usize| PageRun {
        start: Gfn(place.run.start.0 + (piece.first_page + first) as u64),
        page_count: count as u64,
    };
    let copy = |first: usize, count: usize, buffer: &mut Buffer| {
        let room = buffer.push_run(run_at(first, count));
        let from = (piece.first_page + first) * PAGE_BYTES;
        place.mapping.copy_out(from, room);
    };
    if let Some(wanted) = wanted {
        let of = |pick: fn(u64, u64) -> u64| {
            let words = wanted.iter().zip(untouched);
            let words: Vec<u64> = words
                .map(|(&wanted, &untouched)| pick(wanted, untouched))
                .collect();
            words
        };
        for (first, count) in bit_runs(&of(|wanted, untouched| wanted & !untouched)) {
            copy(first, count, buffer);
        }
        for (first, count) in bit_runs(&of(|wanted, untouched| wanted & untouched)) {
            buffer.push_untouched(run_at(first, count));
        }
        return;
    }
    let mut next = 0;
    for (first, count) in bit_runs(untouched) {
        if next < first {
            copy(next, first - next, buffer);
        }
        buffer.push_untouched(run_at(first, count));
        next = first + count;
    }
    if next < piece.page_count {
        copy(next, piece.page_count - next, buffer);
    }
}

fn bit_runs(words: &[u64]) -> impl Iterator<Item = (usize, usize)> + '_ {
    let narrow = |pages: u64| usize::try_from(pages).expect("a piece has few pages");
    runs_of_set_bits(words).map(move |(first, count)| (narrow(first), narrow(count)))
}

/// Counts the pages that may hold something other than zeros; `wanted` false ends the count.
pub(crate) fn touched_pages(layout: &Layout, mut wanted: impl FnMut() -> bool) -> u64 {
    let mut reader = PieceReader::new();
    let mut touched = layout.page_count();
    for piece in layout.pieces() {
        if !wanted() {
            break;
        }
        touched -= reader.find_untouched(layout, &piece);
    }
    touched as u64
}

const _: () = assert!(PIECE == WORDS_PER_PIECE * 64, "a piece is whole words");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::MemoryRegion;
    use crate::sys::anon::map_anonymous;

    fn region(pages: usize, backing: Backing) -> MemoryRegion {
        MemoryRegion {
            slot: 0,
            start: Gfn(0x100),
            page_count: pages as u64,
            mapping: map_anonymous(pages * PAGE_BYTES, false).unwrap(),
            backing,
        }
    }

    #[test]
    fn untouched_pages_are_noted_and_stay_untouched() {
        let region = region(600, Backing::Anonymous { huge: false });
        for page in [0, 5, 6, 511, 599] {
            region.mapping.copy_in(page * PAGE_BYTES, &[1]);
        }
        let layout = Layout::new(std::slice::from_ref(&region));
        assert_eq!(touched_pages(&layout, || true), 5);
        let mut reader = PieceReader::new();
        let mut frames = Vec::new();
        let mut zeros = 0;
        for piece in layout.windows()[0].pieces() {
            let mut buffer = Buffer::new().unwrap();
            buffer.clear(0);
            reader.capture(&layout, &piece, &mut buffer);
            frames.extend(buffer.frames().iter().map(|frame| frame.0 - 0x100));
            zeros += buffer
                .zero_runs()
                .iter()
                .map(|run| run.page_count)
                .sum::<u64>();
        }
        assert_eq!(frames, [0, 5, 6, 511, 599]);
        assert_eq!(zeros, 595);
        assert_eq!(
            touched_pages(&layout, || true),
            5,
            "the capture read none in"
        );
    }

    #[test]
    fn pages_of_a_memfd_count_as_touched_wherever_they_are() {
        let layout = Layout::new(&[region(10, Backing::Memfd)]);
        assert_eq!(touched_pages(&layout, || true), 10);
    }
}
