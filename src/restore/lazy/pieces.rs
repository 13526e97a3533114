//! Which pieces are there, as the threads that fill them agree on it.

use std::ops::Range;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use crate::guest::MemoryRegion;
use crate::page::{Gfn, PAGE_BYTES, PIECE_BYTES, PageRun};
use crate::store::ImageReader;

const TODO: u8 = 0;
const FILLING: u8 = 1;
const FILLED: u8 = 2;
/// Has no data: it is not watched.
const EMPTY: u8 = 3;

/// Where a piece is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) region: usize,
    /// First byte, from the region's start.
    pub(super) offset: usize,
    pub(super) len: usize,
    pub(super) run: PageRun,
}

/// What came of asking to fill a piece.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Claim {
    /// The caller fills it.
    Mine,
    /// Somebody else does, or did, or it has no data.
    NotMine,
}

/// One state a piece.
#[derive(Debug)]
pub(super) struct Pieces {
    places: Vec<Place>,
    /// Number of each region's first piece.
    first_of_region: Vec<usize>,
    states: Box<[AtomicU8]>,
    with_data: usize,
    left: AtomicUsize,
}

impl Pieces {
    pub(super) fn new(reader: &ImageReader, regions: &[MemoryRegion]) -> Self {
        let mut places = Vec::new();
        let mut first_of_region = Vec::new();
        for (number, region) in regions.iter().enumerate() {
            first_of_region.push(places.len());
            for offset in (0..region.mapping.len()).step_by(PIECE_BYTES) {
                let len = PIECE_BYTES.min(region.mapping.len() - offset);
                places.push(Place {
                    region: number,
                    offset,
                    len,
                    run: PageRun {
                        start: Gfn(region.start.0 + (offset / PAGE_BYTES) as u64),
                        page_count: (len / PAGE_BYTES) as u64,
                    },
                });
            }
        }
        let states: Box<[AtomicU8]> = places
            .iter()
            .map(|place| reader.sources_in(place.run).next().is_some())
            .map(|has_data| AtomicU8::new(if has_data { TODO } else { EMPTY }))
            .collect();
        let todo = |state: &&AtomicU8| state.load(Ordering::Relaxed) == TODO;
        let with_data = states.iter().filter(todo).count();
        Self {
            places,
            first_of_region,
            states,
            with_data,
            left: AtomicUsize::new(with_data),
        }
    }

    pub(super) fn count(&self) -> usize {
        self.places.len()
    }

    pub(super) fn with_data(&self) -> u64 {
        self.with_data as u64
    }

    /// Returns how many pieces with data are not there yet.
    pub(super) fn left(&self) -> u64 {
        self.left.load(Ordering::Acquire) as u64
    }

    pub(super) fn place(&self, piece: usize) -> Place {
        self.places[piece]
    }

    /// Returns the piece that holds an address of this process.
    pub(super) fn at(&self, hva: usize, regions: &[MemoryRegion]) -> Option<usize> {
        let holds = |region: &MemoryRegion| {
            let start = region.mapping.hva();
            (start..start + region.mapping.len()).contains(&hva)
        };
        let region = regions.iter().position(holds)?;
        let offset = hva - regions[region].mapping.hva();
        Some(self.first_of_region[region] + offset / PIECE_BYTES)
    }

    /// Returns the stretches of bytes with data, with the number of their region.
    pub(super) fn ranges_to_register(&self) -> Vec<(usize, Range<usize>)> {
        let mut ranges: Vec<(usize, Range<usize>)> = Vec::new();
        for (place, state) in self.places.iter().zip(&self.states) {
            if state.load(Ordering::Relaxed) == EMPTY {
                continue;
            }
            let end = place.offset + place.len;
            match ranges.last_mut() {
                Some((region, range)) if *region == place.region && range.end == place.offset => {
                    range.end = end;
                }
                _ => ranges.push((place.region, place.offset..end)),
            }
        }
        ranges
    }

    /// Returns the pieces with data that hold one of `pages`, in that order.
    pub(super) fn of(&self, pages: &[PageRun]) -> Vec<usize> {
        let with_data = |piece: &usize| self.states[*piece].load(Ordering::Relaxed) != EMPTY;
        let of_run = |run: &PageRun| {
            // Regions, and so pieces, are in the order of their frames.
            let first = self.places.partition_point(|it| it.run.end() <= run.start);
            let end = self.places.partition_point(|it| it.run.start < run.end());
            first..end
        };
        pages.iter().flat_map(of_run).filter(with_data).collect()
    }

    pub(super) fn is_todo(&self, piece: usize) -> bool {
        self.states[piece].load(Ordering::Relaxed) == TODO
    }

    /// Acquire: pairs with [`Pieces::finish`].
    pub(super) fn is_filled(&self, piece: usize) -> bool {
        self.states[piece].load(Ordering::Acquire) == FILLED
    }

    pub(super) fn claim(&self, piece: usize) -> Claim {
        let claimed =
            self.states[piece].compare_exchange(TODO, FILLING, Ordering::AcqRel, Ordering::Acquire);
        match claimed {
            Ok(_) => Claim::Mine,
            Err(_) => Claim::NotMine,
        }
    }

    /// Notes that a claimed piece is there; returns whether it was the last.
    pub(super) fn finish(&self, piece: usize) -> bool {
        self.states[piece].store(FILLED, Ordering::Release);
        self.left.fetch_sub(1, Ordering::AcqRel) == 1
    }
}
