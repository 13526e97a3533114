//! Which copy of a page is the newest, and where its bytes are.

use crate::page::{Gfn, PIECE_PAGES, PageRun};
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::{Chunk, IndexRun, PAGES_MAX, RunSource, narrow, wide};
use crate::store::options::RegionLayout;
use crate::store::reader::ChunkRun;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Bits of a slot for the page's number in its chunk.
const PAGE_BITS: u32 = 9;

/// Bits of a slot for page and chunk number.
const LOCATION_BITS: u32 = 33;

/// Location of a page of zeros; no chunk has this number.
const ZERO_LOCATION: u64 = (1 << LOCATION_BITS) - 1;

/// The highest epoch that a writer takes.
pub const EPOCH_MAX: u32 = (1 << (64 - LOCATION_BITS)) - 3;

/// Age of a copy that was carried over from an earlier image: every captured one is newer.
const CARRIED: u64 = 1;

/// Age of the copies of epoch 0.
const EPOCH_0: u64 = 2;

/// Where the newest copy of every page is; written by any number of threads without a lock.
///
/// A slot holds the copy's age in its top bits (the epoch plus two, or one where it was carried
/// over) and the location below, so that `fetch_max` keeps the newest copy whatever order copies
/// arrive in. Zero means that the page never came.
#[derive(Debug)]
pub(crate) struct PageTable {
    regions: Box<[TableRegion]>,
}

#[derive(Debug)]
struct TableRegion {
    run: PageRun,
    slots: Box<[AtomicU64]>,
}

impl PageTable {
    pub(crate) fn new(regions: &[RegionLayout]) -> Self {
        let regions = regions
            .iter()
            .map(|region| TableRegion {
                run: region.run(),
                slots: (0..region.page_count).map(|_| AtomicU64::new(0)).collect(),
            })
            .collect();
        Self { regions }
    }

    fn region_of(&self, gfn: Gfn) -> Result<&TableRegion, StoreError> {
        let after = self
            .regions
            .partition_point(|region| region.run.end() <= gfn);
        self.regions
            .get(after)
            .filter(|region| region.run.start <= gfn)
            .ok_or(StoreError::OutsideRegions { gfn })
    }

    /// Fails where a frame is in no region.
    pub(crate) fn check(&self, frames: &[Gfn]) -> Result<(), StoreError> {
        let mut last: Option<&TableRegion> = None;
        for &gfn in frames {
            if last.is_none_or(|region| !contains(region.run, gfn)) {
                last = Some(self.region_of(gfn)?);
            }
        }
        Ok(())
    }

    /// Records that the copy of epoch `epoch` of each frame is where it says.
    ///
    /// Relaxed is enough: the slots are read after every writing thread has been joined.
    pub(crate) fn record(&self, epoch: u32, copies: impl Iterator<Item = (Gfn, RunSource)>) {
        let mut last: Option<&TableRegion> = None;
        for (gfn, source) in copies {
            let region = match last {
                Some(region) if contains(region.run, gfn) => region,
                _ => self.region_of(gfn).expect("frames were checked first"),
            };
            last = Some(region);
            if let Some(slot) = region.slots.get(narrow(gfn.0 - region.run.start.0)) {
                slot.fetch_max(encode(age(epoch), source), Ordering::Relaxed);
            }
        }
    }

    /// Records copies that were carried over from an earlier image: any other is newer.
    pub(crate) fn record_carried(&self, copies: impl Iterator<Item = (Gfn, RunSource)>) {
        for (gfn, source) in copies {
            if let Some(slot) = self.slot(gfn) {
                slot.fetch_max(encode(CARRIED, source), Ordering::Relaxed);
            }
        }
    }

    /// Returns whether a copy of a page came.
    pub(crate) fn has(&self, gfn: Gfn) -> bool {
        self.slot(gfn)
            .is_some_and(|slot| slot.load(Ordering::Relaxed) != 0)
    }

    fn slot(&self, gfn: Gfn) -> Option<&AtomicU64> {
        let region = self.region_of(gfn).ok()?;
        region.slots.get(narrow(gfn.0 - region.run.start.0))
    }

    /// Records that the pages of `run` were zeros in epoch `epoch`. The run may cross regions
    /// that touch, but every page of it must be in one.
    pub(crate) fn record_zero_run(&self, epoch: u32, run: PageRun) -> Result<(), StoreError> {
        let value = encode(age(epoch), RunSource::Zero);
        let mut rest = run;
        while rest.page_count > 0 {
            let region = self.region_of(rest.start)?;
            let part = rest
                .intersection(region.run)
                .expect("the region holds the first frame of the run");
            let first = narrow(part.start.0 - region.run.start.0);
            let slots = region.slots.iter().skip(first);
            for slot in slots.take(narrow(part.page_count)) {
                slot.fetch_max(value, Ordering::Relaxed);
            }
            rest = PageRun {
                start: part.end(),
                page_count: rest.page_count - part.page_count,
            };
        }
        Ok(())
    }

    /// Returns the pieces of the first `regions` regions, each with the last epoch in which a page of
    /// it with data was captured; `None` where there is no such page.
    pub(crate) fn pieces(
        &self,
        regions: usize,
    ) -> impl Iterator<Item = (PageRun, Option<u32>)> + '_ {
        self.regions.iter().take(regions).flat_map(|region| {
            let starts = (region.run.start.0..).step_by(narrow(PIECE_PAGES));
            let pieces = starts.zip(region.slots.chunks(narrow(PIECE_PAGES)));
            pieces.map(|(start, slots)| {
                let run = PageRun {
                    start: Gfn(start),
                    page_count: wide(slots.len()),
                };
                let slots = slots.iter().map(|slot| slot.load(Ordering::Relaxed));
                (run, slots.filter_map(epoch_of_data).max())
            })
        })
    }

    /// Returns the runs of the newest copies. A page that never came is where `inherited` has it;
    /// without that it is an error.
    pub(crate) fn runs(
        &self,
        inherited: Option<Inherited<'_>>,
    ) -> Result<Vec<IndexRun>, StoreError> {
        let mut runs = Vec::new();
        let mut earlier = inherited.map(Inherited::cursor);
        let mut missing: Option<(Gfn, u64)> = None;
        for region in &self.regions {
            let mut open: Option<IndexRun> = None;
            for (gfn, slot) in (region.run.start.0..).map(Gfn).zip(&region.slots) {
                let own = decode(slot.load(Ordering::Relaxed));
                let found = own.or_else(|| earlier.as_mut()?.find(gfn));
                let Some(source) = found else {
                    missing = Some(missing.map_or((gfn, 0), |(first, others)| (first, others + 1)));
                    continue;
                };
                match &mut open {
                    Some(run) if continues(run, source) => run.page_count += 1,
                    _ => {
                        runs.extend(open.take());
                        open = Some(IndexRun {
                            start: gfn,
                            page_count: 1,
                            source,
                        });
                    }
                }
            }
            runs.extend(open);
        }
        match missing {
            Some((gfn, others)) => Err(StoreError::Uncovered { gfn, others }),
            None => Ok(runs),
        }
    }
}

/// Where an earlier image has the pages that were not captured again.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Inherited<'a> {
    /// Its runs, sorted.
    pub(crate) runs: &'a [IndexRun],
    /// What its chunk numbers are raised by, so that they come after the image's own.
    pub(crate) first_chunk: u32,
}

impl<'a> Inherited<'a> {
    fn cursor(self) -> InheritedCursor<'a> {
        InheritedCursor {
            inherited: self,
            next: 0,
        }
    }
}

/// Finds pages in ascending order.
struct InheritedCursor<'a> {
    inherited: Inherited<'a>,
    next: usize,
}

impl InheritedCursor<'_> {
    fn find(&mut self, gfn: Gfn) -> Option<RunSource> {
        let Inherited { runs, first_chunk } = self.inherited;
        while runs.get(self.next)?.end() <= gfn {
            self.next += 1;
        }
        let run = runs.get(self.next).filter(|run| run.start <= gfn)?;
        Some(match run.source {
            RunSource::Zero => RunSource::Zero,
            RunSource::Chunk { chunk, first_page } => {
                let page = u16::try_from(gfn.0 - run.start.0).expect("runs are inside chunks");
                RunSource::Chunk {
                    chunk: first_chunk + chunk,
                    first_page: first_page + page,
                }
            }
        })
    }
}

fn contains(run: PageRun, gfn: Gfn) -> bool {
    run.start <= gfn && gfn < run.end()
}

/// Returns whether a page at `source` follows the pages of `run` in the same place.
fn continues(run: &IndexRun, source: RunSource) -> bool {
    if run.page_count == u32::MAX {
        return false;
    }
    match (run.source, source) {
        (RunSource::Zero, RunSource::Zero) => true,
        (
            RunSource::Chunk { chunk, first_page },
            RunSource::Chunk {
                chunk: next_chunk,
                first_page: next_page,
            },
        ) => chunk == next_chunk && u32::from(first_page) + run.page_count == u32::from(next_page),
        _ => false,
    }
}

fn age(epoch: u32) -> u64 {
    u64::from(epoch) + EPOCH_0
}

fn encode(age: u64, source: RunSource) -> u64 {
    let location = match source {
        RunSource::Zero => ZERO_LOCATION,
        RunSource::Chunk { chunk, first_page } => {
            u64::from(chunk) << PAGE_BITS | u64::from(first_page)
        }
    };
    age << LOCATION_BITS | location
}

/// Returns the epoch of a copy that has data and was captured for this image.
fn epoch_of_data(slot: u64) -> Option<u32> {
    let has_data = slot & ZERO_LOCATION != ZERO_LOCATION;
    let age = (slot >> LOCATION_BITS).checked_sub(EPOCH_0)?;
    has_data.then(|| u32::try_from(age).expect("epochs have 31 bits"))
}

fn decode(slot: u64) -> Option<RunSource> {
    if slot == 0 {
        return None;
    }
    let location = slot & ZERO_LOCATION;
    if location == ZERO_LOCATION {
        return Some(RunSource::Zero);
    }
    let chunk = u32::try_from(location >> PAGE_BITS).expect("24 bits fit");
    let first_page = u16::try_from(location & ((1 << PAGE_BITS) - 1)).expect("9 bits fit");
    Some(RunSource::Chunk { chunk, first_page })
}

/// A checked page index: every page of every region is in exactly one run.
#[derive(Debug)]
pub(crate) struct PageIndex {
    runs: Vec<IndexRun>,
    /// Numbers of the runs that have data, by chunk and page in it.
    by_chunk: Vec<u32>,
}

impl PageIndex {
    /// Checks `runs` against the regions that they must cover and the chunks that they name.
    pub(crate) fn new(
        runs: Vec<IndexRun>,
        regions: &[RegionLayout],
        chunks: &[Chunk],
    ) -> Result<Self, Damage> {
        check_coverage(&runs, regions)?;
        let mut by_chunk = Vec::new();
        for (at, run) in (0_u32..).zip(&runs) {
            if let RunSource::Chunk { chunk, first_page } = run.source {
                let pages = chunks
                    .get(narrow(u64::from(chunk)))
                    .map_or(0, |chunk| u32::from(chunk.page_count));
                let end = u32::from(first_page).checked_add(run.page_count);
                if end.is_none_or(|end| end > pages) {
                    return Err(run_damage(
                        narrow(u64::from(at)),
                        format!(
                            "names {} pages from {first_page} of chunk {chunk}, which has {pages}",
                            run.page_count
                        ),
                    ));
                }
                by_chunk.push(at);
            }
        }
        let mut index = Self { runs, by_chunk };
        index.sort_by_chunk()?;
        Ok(index)
    }

    /// Sorts the runs by chunk; two that share a page of one are damage.
    fn sort_by_chunk(&mut self) -> Result<(), Damage> {
        let runs = &self.runs;
        let place = |at: &u32| {
            let run = runs.get(narrow(u64::from(*at)));
            run.and_then(|run| match run.source {
                RunSource::Chunk { chunk, first_page } => Some((chunk, first_page, run.page_count)),
                RunSource::Zero => None,
            })
        };
        self.by_chunk.sort_unstable_by_key(place);
        for (a, b) in self.by_chunk.iter().zip(self.by_chunk.iter().skip(1)) {
            let (Some((chunk, first, count)), Some((other, other_first, _))) = (place(a), place(b))
            else {
                continue;
            };
            if chunk == other && u32::from(first) + count > u32::from(other_first) {
                return Err(run_damage(
                    narrow(u64::from(*b)),
                    format!("names page {other_first} of chunk {chunk}, as another run does"),
                ));
            }
        }
        Ok(())
    }

    pub(crate) fn runs(&self) -> &[IndexRun] {
        &self.runs
    }

    /// Returns the runs whose bytes are in chunk `chunk`, each with its first page there.
    pub(crate) fn runs_of_chunk(&self, chunk: usize) -> impl Iterator<Item = ChunkRun> + '_ {
        let chunk_of = |at: &u32| match self.runs.get(narrow(u64::from(*at)))?.source {
            RunSource::Chunk { chunk, first_page } => Some((chunk, first_page)),
            RunSource::Zero => None,
        };
        let first = self.by_chunk.partition_point(|at| {
            chunk_of(at).is_some_and(|(other, _)| narrow(u64::from(other)) < chunk)
        });
        let from = self.by_chunk.get(first..).unwrap_or_default();
        from.iter().map_while(move |at| {
            let (other, first_page) = chunk_of(at)?;
            if narrow(u64::from(other)) != chunk {
                return None;
            }
            let run = self.runs.get(narrow(u64::from(*at)))?;
            Some(ChunkRun {
                run: page_run(run),
                first_page: usize::from(first_page),
            })
        })
    }

    /// Returns the runs of pages of zeros.
    pub(crate) fn zero_runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        self.runs
            .iter()
            .filter(|run| run.source == RunSource::Zero)
            .map(page_run)
    }

    /// Returns where the data of `pages` is: the chunk, and the pages in it.
    pub(crate) fn sources_in(
        &self,
        pages: PageRun,
    ) -> impl Iterator<Item = (usize, ChunkRun)> + '_ {
        let first = self.runs.partition_point(|run| run.end() <= pages.start);
        let runs = self.runs.get(first..).unwrap_or_default().iter();
        runs.take_while(move |run| run.start < pages.end())
            .filter_map(move |run| {
                let RunSource::Chunk { chunk, first_page } = run.source else {
                    return None;
                };
                let part = page_run(run).intersection(pages)?;
                let skipped = narrow(part.start.0 - run.start.0);
                let place = ChunkRun {
                    run: part,
                    first_page: usize::from(first_page) + skipped,
                };
                Some((narrow(u64::from(chunk)), place))
            })
    }

    /// Returns the run that holds `gfn`.
    pub(crate) fn find(&self, gfn: Gfn) -> Option<&IndexRun> {
        let at = self.runs.partition_point(|run| run.end() <= gfn);
        self.runs.get(at).filter(|run| run.start <= gfn)
    }
}

fn page_run(run: &IndexRun) -> PageRun {
    PageRun {
        start: run.start,
        page_count: u64::from(run.page_count),
    }
}

fn run_damage(run: usize, reason: String) -> Damage {
    Damage::new(Place::Run { run }, reason)
}

/// Fails unless the runs cover every page of every region once, in order, and nothing else.
fn check_coverage(runs: &[IndexRun], regions: &[RegionLayout]) -> Result<(), Damage> {
    let mut rest = runs.iter().enumerate();
    for region in regions {
        let mut expected = region.start;
        let end = region.run().end();
        while expected < end {
            let Some((at, run)) = rest.next() else {
                return Err(Damage::new(
                    Place::PageIndex,
                    format!("ends before page {expected}"),
                ));
            };
            let left = end.0 - expected.0;
            let pages = u64::from(run.page_count);
            if run.start != expected || pages == 0 || pages > left {
                return Err(run_damage(
                    at,
                    format!(
                        "covers {pages} pages from {}, where {left} from {expected} are left",
                        run.start
                    ),
                ));
            }
            expected = run.end();
        }
    }
    match rest.next() {
        Some((at, run)) => Err(run_damage(
            at,
            format!("covers page {} again, or outside memory", run.start),
        )),
        None => Ok(()),
    }
}

const _: () = assert!(PAGES_MAX <= 1 << 52, "a run's end must not overflow");
const _: () = assert!(wide(crate::store::format::CHUNK_PAGES_MAX) == 1 << PAGE_BITS);
