//! The guest's memory as one numbered row of pages, pieces and windows.

use crate::guest::{Backing, MemoryRegion};
use crate::page::{Gfn, PAGE_BYTES, PIECE_BYTES, PageRun};
use crate::store::RegionLayout;
use crate::sys::mapping::GuestMapping;

/// Pieces that one re-arm covers: 8 MiB. Below it the ioctl's fixed cost shows (2.5 µs a call);
/// above it the guest writes pages again between re-arm and copy, and KVM's lock is held longer
/// (58 µs for 8 MiB).
pub(crate) const WINDOW_PIECES: usize = 4;

/// All memory of a guest, by page index: pages counted through its regions, without the holes.
#[derive(Debug)]
pub(crate) struct Layout {
    regions: Vec<Place>,
    windows: Vec<Window>,
    page_count: usize,
    piece_count: usize,
}

/// A region and where its pages are in the row.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) slot: u32,
    pub(crate) run: PageRun,
    pub(crate) mapping: GuestMapping,
    pub(crate) backing: Backing,
    pub(crate) page_count: usize,
    /// Index of the region's first page.
    pub(crate) first_index: usize,
    /// Number of the region's first piece.
    pub(crate) first_piece: usize,
}

/// Up to [`WINDOW_PIECES`] pieces of one region, re-armed together by the scan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Window {
    pub(crate) region: usize,
    /// First page, counted from the region's start.
    pub(crate) first_page: usize,
    pub(crate) page_count: usize,
    /// Number of the first piece.
    pub(crate) first_piece: usize,
}

/// 2 MiB of one region, or what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) region: usize,
    /// First page, counted from the region's start.
    pub(crate) first_page: usize,
    pub(crate) page_count: usize,
}

/// Pages in a piece, as an index.
pub(crate) const PIECE: usize = PIECE_BYTES / PAGE_BYTES;

impl Window {
    /// Returns the number of pieces, the last of which may be short.
    pub(crate) fn piece_count(&self) -> usize {
        self.page_count.div_ceil(PIECE)
    }

    /// Returns the window's pieces.
    pub(crate) fn pieces(self) -> impl Iterator<Item = Piece> {
        (0..self.page_count).step_by(PIECE).map(move |at| Piece {
            region: self.region,
            first_page: self.first_page + at,
            page_count: PIECE.min(self.page_count - at),
        })
    }
}

fn index(pages: u64) -> usize {
    usize::try_from(pages).expect("guest memory is mapped, so its pages fit usize")
}

impl Layout {
    /// Numbers the pages of `regions`.
    pub(crate) fn new(regions: &[MemoryRegion]) -> Self {
        let mut layout = Self {
            regions: Vec::with_capacity(regions.len()),
            windows: Vec::new(),
            page_count: 0,
            piece_count: 0,
        };
        for (number, region) in regions.iter().enumerate() {
            let page_count = index(region.page_count);
            for first_page in (0..page_count).step_by(WINDOW_PIECES * PIECE) {
                layout.windows.push(Window {
                    region: number,
                    first_page,
                    page_count: (WINDOW_PIECES * PIECE).min(page_count - first_page),
                    first_piece: layout.piece_count + first_page / PIECE,
                });
            }
            layout.regions.push(Place {
                slot: region.slot,
                run: region.run(),
                mapping: region.mapping.clone(),
                backing: region.backing,
                page_count,
                first_index: layout.page_count,
                first_piece: layout.piece_count,
            });
            layout.page_count += page_count;
            layout.piece_count += page_count.div_ceil(PIECE);
        }
        layout
    }

    pub(crate) fn regions(&self) -> &[Place] {
        &self.regions
    }

    pub(crate) fn windows(&self) -> &[Window] {
        &self.windows
    }

    pub(crate) fn page_count(&self) -> usize {
        self.page_count
    }

    pub(crate) fn piece_count(&self) -> usize {
        self.piece_count
    }

    /// Returns all pieces, in the order of their numbers.
    pub(crate) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        self.windows.iter().flat_map(|window| window.pieces())
    }

    /// Returns the number of the piece that holds an address of this process.
    pub(crate) fn piece_at(&self, hva: usize) -> Option<usize> {
        let holds = |place: &&Place| {
            let start = place.mapping.hva();
            (start..start + place.mapping.len()).contains(&hva)
        };
        let place = self.regions.iter().find(holds)?;
        Some(place.first_piece + (hva - place.mapping.hva()) / PIECE_BYTES)
    }

    /// Returns the numbers of the pieces that hold a frame of `run`.
    pub(crate) fn pieces_of(&self, run: PageRun) -> impl Iterator<Item = usize> + '_ {
        self.regions.iter().flat_map(move |place| {
            let part = place.run.intersection(run);
            let pieces = part.map(|part| {
                let first = index(part.start.0 - place.run.start.0) / PIECE;
                let end = index(part.end().0 - place.run.start.0).div_ceil(PIECE);
                place.first_piece + first..place.first_piece + end
            });
            pieces.into_iter().flatten()
        })
    }

    /// Returns the regions as an image describes them.
    pub(crate) fn for_image(&self) -> Vec<RegionLayout> {
        let describe = |place: &Place| RegionLayout {
            slot: place.slot,
            start: place.run.start,
            page_count: place.run.page_count,
        };
        self.regions.iter().map(describe).collect()
    }

    /// Returns the frame of a page.
    pub(crate) fn frame(&self, page_index: usize) -> Gfn {
        let place = self.region_of(page_index);
        Gfn(place.run.start.0 + (page_index - place.first_index) as u64)
    }

    /// Copies a page to `offset` of `to`.
    pub(crate) fn copy_page(&self, page_index: usize, to: &GuestMapping, offset: usize) {
        let place = self.region_of(page_index);
        let from = (page_index - place.first_index) * PAGE_BYTES;
        place.mapping.copy_to(from, to, offset, PAGE_BYTES);
    }

    /// Copies a page into `out`.
    pub(crate) fn read_page(&self, page_index: usize, out: &mut [u8]) {
        let place = self.region_of(page_index);
        let from = (page_index - place.first_index) * PAGE_BYTES;
        place.mapping.copy_out(from, out);
    }

    fn region_of(&self, page_index: usize) -> &Place {
        // Guests have a few regions; the last that begins at or before the page has it.
        let after = self
            .regions
            .partition_point(|place| place.first_index <= page_index);
        &self.regions[after - 1]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::anon::map_anonymous;

    fn region(slot: u32, start: u64, page_count: u64) -> MemoryRegion {
        MemoryRegion {
            slot,
            start: Gfn(start),
            page_count,
            mapping: map_anonymous(index(page_count) * PAGE_BYTES, false).unwrap(),
            backing: Backing::Anonymous { huge: false },
        }
    }

    #[test]
    fn windows_and_pieces_cover_every_page_once_and_cross_no_region() {
        let layout = Layout::new(&[region(0, 0, 5), region(1, 0x1000, 512 * 9 + 1)]);
        assert_eq!(layout.page_count(), 5 + 512 * 9 + 1);
        assert_eq!(layout.piece_count(), 1 + 10);
        let mut seen = Vec::new();
        let mut pieces = 0;
        for window in layout.windows() {
            assert_eq!(window.first_piece, pieces);
            pieces += window.piece_count();
            for piece in window.pieces() {
                assert!(piece.page_count <= PIECE);
                let first = layout.regions()[piece.region].first_index + piece.first_page;
                seen.extend(first..first + piece.page_count);
            }
        }
        assert_eq!(pieces, layout.piece_count());
        assert!(seen.into_iter().eq(0..layout.page_count()));
    }

    #[test]
    fn pieces_are_found_by_address_and_by_frame() {
        let regions = [region(0, 0, 600), region(1, 0x1000, 512 * 2)];
        let layout = Layout::new(&regions);
        assert_eq!(layout.pieces().count(), 4);
        let at = |region: usize, page: usize| {
            layout.piece_at(regions[region].mapping.hva() + page * PAGE_BYTES + 7)
        };
        assert_eq!((at(0, 0), at(0, 599)), (Some(0), Some(1)));
        assert_eq!((at(1, 511), at(1, 512)), (Some(2), Some(3)));
        assert_eq!(layout.piece_at(1), None);
        let run = |start, page_count| PageRun {
            start: Gfn(start),
            page_count,
        };
        let of = |run| layout.pieces_of(run).collect::<Vec<_>>();
        assert_eq!(of(run(511, 2)), [0, 1]);
        assert_eq!(of(run(590, 0x1000)), [1, 2, 3]);
        assert!(of(run(0x900, 5)).is_empty());
    }

    #[test]
    fn a_page_index_names_the_frame_and_the_bytes_of_its_region() {
        let regions = [region(0, 0, 5), region(1, 0x1000, 3)];
        let layout = Layout::new(&regions);
        assert_eq!(layout.frame(4), Gfn(4));
        assert_eq!(layout.frame(5), Gfn(0x1000));
        assert_eq!(layout.frame(7), Gfn(0x1002));
        regions[1].mapping.copy_in(PAGE_BYTES, &[9]);
        let mut page = [0; PAGE_BYTES];
        layout.read_page(6, &mut page);
        assert_eq!(page[0], 9);
    }
}
