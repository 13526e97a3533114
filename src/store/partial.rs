//! Reading some pages of a chunk: only the leaves that hold them, where their digests are known.

use std::ops::Range;
use std::sync::Arc;

use blake3::hazmat::ChainingValue;

use crate::page::PAGE_BYTES;
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::narrow;
use crate::store::leaves::{LEAF_BYTES, LEAF_PAGES, digest_leaf};
use crate::store::reader::{ChunkRun, ImageReader, ReadScratch};

/// Some of the bytes of a chunk.
struct Stretch {
    /// Numbers of its leaves.
    leaves: Range<usize>,
    /// Places of the wanted runs in it.
    runs: Range<usize>,
}

impl ImageReader {
    /// Reads the pages `wanted` of each of `chunks`, by up to `threads` threads, and hands each run
    /// of them to `work` once it is checked.
    ///
    /// `wanted` gives the runs of a chunk in the order of their places in it. What else the chunk has
    /// is read and checked only where its leaves are not known. Ends early on the first error.
    pub fn for_each_run(
        &self,
        chunks: &[usize],
        threads: usize,
        wanted: impl Fn(usize) -> Vec<ChunkRun> + Sync,
        work: impl Fn(&ChunkRun, &[u8]) + Sync,
    ) -> Result<(), StoreError> {
        self.in_parallel(chunks, threads, |chunk, scratch| {
            let runs = wanted(chunk);
            match self.leaves_of(chunk) {
                Some(leaves) => self.read_leaves(chunk, &leaves, &runs, scratch, &work),
                None => {
                    let raw = self.read_chunk(chunk, scratch)?;
                    runs.iter().for_each(|run| work(run, run.bytes_in(raw)));
                    Ok(())
                }
            }
        })
    }

    /// Returns the digests of a chunk's leaves, where they are known.
    fn leaves_of(&self, chunk: usize) -> Option<Arc<[ChainingValue]>> {
        let record = self.chunks().get(chunk).expect("chunks are counted");
        self.leaves()?.of(record)
    }

    fn read_leaves(
        &self,
        chunk: usize,
        leaves: &[ChainingValue],
        runs: &[ChunkRun],
        scratch: &mut ReadScratch,
        work: &(impl Fn(&ChunkRun, &[u8]) + Sync),
    ) -> Result<(), StoreError> {
        let record = self.chunks().get(chunk).expect("chunks are counted");
        let (file, own_number) = self.file_of(chunk);
        let stored = narrow(u64::from(record.stored_bytes));
        let bytes = scratch.stored();
        for stretch in stretches(runs) {
            let start = stretch.leaves.start * LEAF_BYTES;
            let end = (stretch.leaves.end * LEAF_BYTES).min(stored);
            let offset = record.offset + start as u64;
            file.source().read_raw(offset, end - start, bytes)?;
            for (number, leaf) in stretch.leaves.clone().zip(bytes.chunks(LEAF_BYTES)) {
                if leaves.get(number) != Some(&digest_leaf(number, leaf)) {
                    let reason = format!("is not what its digest says in leaf {number}");
                    let place = Place::Chunk { chunk: own_number };
                    return Err(Damage::new(place, reason).of(&file.path));
                }
            }
            for run in runs.get(stretch.runs).unwrap_or_default() {
                let there = ChunkRun {
                    run: run.run,
                    first_page: run.first_page - stretch.leaves.start * LEAF_PAGES,
                };
                work(run, there.bytes_in(bytes));
            }
        }
        Ok(())
    }
}

/// Returns the leaves that hold `runs`, those that follow one another together.
fn stretches(runs: &[ChunkRun]) -> Vec<Stretch> {
    let mut stretches: Vec<Stretch> = Vec::new();
    for (at, run) in runs.iter().enumerate() {
        let end = run.first_page + narrow(run.run.page_count);
        let leaves = run.first_page / LEAF_PAGES..end.div_ceil(LEAF_PAGES);
        match stretches.last_mut() {
            Some(last) if leaves.start <= last.leaves.end => {
                last.leaves.end = leaves.end;
                last.runs.end = at + 1;
            }
            _ => stretches.push(Stretch {
                leaves,
                runs: at..at + 1,
            }),
        }
    }
    stretches
}

const _: () = assert!(LEAF_BYTES == LEAF_PAGES * PAGE_BYTES);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{Gfn, PageRun};

    fn run(first_page: usize, page_count: u64) -> ChunkRun {
        ChunkRun {
            run: PageRun {
                start: Gfn(9000 + first_page as u64),
                page_count,
            },
            first_page,
        }
    }

    #[test]
    fn a_leaf_is_read_once_whatever_runs_are_in_it() {
        let runs = [
            run(1, 1),
            run(3, 2),
            run(7, 1),
            run(13, 1),
            run(15, 1),
            run(40, 8),
        ];
        let found: Vec<_> = stretches(&runs)
            .into_iter()
            .map(|stretch| (stretch.leaves, stretch.runs))
            .collect();
        assert_eq!(found, [(0..2, 0..3), (3..4, 3..5), (10..12, 5..6)]);
        assert!(stretches(&[]).is_empty());
    }
}
