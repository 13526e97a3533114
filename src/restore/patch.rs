//! Some of a guest's memory back from an image: what is known to be as the image has it stays.
//!
//! In two steps, since memory that is half put back is nobody's: [`Patch::read`] reads and checks
//! all that is needed, and changes nothing; [`Patch::apply`] writes it into memory. A damaged chunk
//! is so found while the guest is still what it was.

use std::sync::{Mutex, PoisonError};

use super::eager::{FillError, clear, copy_in};
use crate::guest::MemoryRegion;
use crate::page::PageRun;
use crate::store::{ChunkRun, ImageReader, StoreError};

/// Most bytes that are kept between the two steps. More are read, and checked, a second time.
const KEPT_BYTES_MAX: u64 = 256 << 20;

/// Pages of an image, to be put into memory.
#[derive(Debug)]
pub struct Patch<'a> {
    image: &'a ImageReader,
    /// Sorted, not overlapping.
    wanted: Vec<PageRun>,
    chunks: Vec<usize>,
    threads: usize,
    kept: Option<Vec<KeptPages>>,
}

/// Checked bytes of guest pages.
#[derive(Debug)]
struct KeptPages {
    run: PageRun,
    bytes: Vec<u8>,
}

impl<'a> Patch<'a> {
    /// Reads and checks the pages `wanted`, which are sorted and do not overlap, by up to `threads`
    /// threads: of each chunk that holds one, the leaves that are needed, where their digests are
    /// known ([`LeafDigests`](crate::store::LeafDigests)), or else all of it.
    pub fn read(
        image: &'a ImageReader,
        wanted: Vec<PageRun>,
        threads: usize,
    ) -> Result<Self, StoreError> {
        let mut chunks: Vec<usize> = wanted
            .iter()
            .flat_map(|run| image.sources_in(*run))
            .map(|(chunk, _)| chunk)
            .collect();
        chunks.sort_unstable();
        chunks.dedup();
        let bytes: u64 = wanted.iter().map(|run| run.bytes()).sum();
        let kept = Mutex::new(Vec::new());
        let keeps = bytes <= KEPT_BYTES_MAX;
        let mut patch = Self {
            image,
            wanted,
            chunks,
            threads,
            kept: None,
        };
        patch.for_each_run(|part, bytes| {
            if keeps {
                let pages = KeptPages {
                    run: part.run,
                    bytes: bytes.to_vec(),
                };
                let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
                kept.push(pages);
            }
        })?;
        let kept = kept.into_inner().unwrap_or_else(PoisonError::into_inner);
        patch.kept = keeps.then_some(kept);
        Ok(patch)
    }

    /// Returns how many pages are put back.
    pub fn page_count(&self) -> u64 {
        self.wanted.iter().map(|run| run.page_count).sum()
    }

    /// Returns how many chunks hold them.
    pub fn chunk_count(&self) -> u64 {
        self.chunks.len() as u64
    }

    /// Writes the pages into `regions`, those of zeros too. Fails only where they have to be read a
    /// second time; memory is then neither what it was nor that of the image.
    pub fn apply(&self, regions: &[MemoryRegion]) -> Result<(), FillError> {
        for zeros in self.image.zero_runs() {
            for part in overlaps(&self.wanted, zeros) {
                clear(regions, part);
            }
        }
        let Some(kept) = &self.kept else {
            self.for_each_run(|part, bytes| copy_in(regions, part.run, bytes))?;
            return Ok(());
        };
        for pages in kept {
            copy_in(regions, pages.run, &pages.bytes);
        }
        Ok(())
    }

    fn for_each_run(&self, work: impl Fn(&ChunkRun, &[u8]) + Sync) -> Result<(), StoreError> {
        let wanted = |chunk| self.wanted_in(chunk).collect();
        self.image
            .for_each_run(&self.chunks, self.threads, wanted, work)
    }

    /// Returns the pages of a chunk that are wanted.
    fn wanted_in(&self, chunk: usize) -> impl Iterator<Item = ChunkRun> + '_ {
        self.image.runs_of_chunk(chunk).flat_map(|whole| {
            overlaps(&self.wanted, whole.run).map(move |run| {
                let skipped = run.start.0 - whole.run.start.0;
                let skipped = usize::try_from(skipped).expect("a chunk has few pages");
                ChunkRun {
                    run,
                    first_page: whole.first_page + skipped,
                }
            })
        })
    }
}

/// Returns the parts of `sorted` runs that are in `run`.
fn overlaps(sorted: &[PageRun], run: PageRun) -> impl Iterator<Item = PageRun> + '_ {
    let first = sorted.partition_point(|other| other.end() <= run.start);
    sorted[first..]
        .iter()
        .map_while(move |other| other.intersection(run))
}

/// Returns the pages of either of two lists of runs, each sorted and not overlapping, as one.
pub fn union(a: &[PageRun], b: &[PageRun]) -> Vec<PageRun> {
    let mut all: Vec<PageRun> = a.iter().chain(b).copied().collect();
    all.sort_unstable_by_key(|run| run.start);
    let mut merged: Vec<PageRun> = Vec::with_capacity(all.len());
    for run in all {
        run.append_to(&mut merged);
    }
    merged
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Gfn;

    fn run(start: u64, page_count: u64) -> PageRun {
        PageRun {
            start: Gfn(start),
            page_count,
        }
    }

    #[test]
    fn pages_of_either_list_are_there_once() {
        let a = [run(0, 4), run(10, 5), run(40, 1)];
        let b = [run(2, 4), run(15, 1), run(30, 2)];
        let all = [run(0, 6), run(10, 6), run(30, 2), run(40, 1)];
        assert_eq!(union(&a, &b), all);
        assert_eq!(union(&[], &b), b);
    }

    #[test]
    fn runs_are_cut_to_what_is_asked_for() {
        let sorted = [run(0, 4), run(10, 5), run(20, 5)];
        let parts: Vec<_> = overlaps(&sorted, run(12, 10)).collect();
        assert_eq!(parts, [run(12, 3), run(20, 2)]);
        assert_eq!(overlaps(&sorted, run(4, 6)).count(), 0);
    }
}
