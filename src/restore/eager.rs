//! Eager restore: all of memory is read and checked before the guest runs.

use std::time::{Duration, Instant};

use crate::guest::MemoryRegion;
use crate::page::{Gfn, PAGE_BYTES, PAGE_SHIFT, PIECE_BYTES, PageRun};
use crate::store::{ChunkRun, ImageReader, RegionLayout, StoreError};

/// How memory is filled.
#[derive(Clone, Copy, Debug)]
pub struct FillOptions {
    /// Threads that read, check and copy.
    pub threads: usize,
    /// Whether every byte of the regions is still zero, as after mapping anonymous memory. Pages
    /// of zeros are then left untouched and take no host memory.
    pub memory_is_fresh: bool,
}

impl Default for FillOptions {
    fn default() -> Self {
        Self {
            threads: 2,
            memory_is_fresh: true,
        }
    }
}

/// What a fill did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreStats {
    /// Pages copied from the image.
    pub data_pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Chunks read.
    pub chunk_count: u64,
    /// How long it took.
    pub elapsed: Duration,
}

/// Memory that could not be filled; some of it may be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FillError {
    /// The regions are not those of the image.
    #[error("the machine's memory is not that of the image: {difference}")]
    Layout {
        /// The first difference.
        difference: String,
    },
    /// Memory cannot be filled while the guest runs.
    #[error("the image cannot be restored lazily: {reason}")]
    NotLazy {
        /// Why not.
        reason: String,
    },
    /// What was to come while the guest ran did not.
    #[error("memory could not be filled")]
    Late(#[source] std::sync::Arc<StoreError>),
    /// The image could not be read, or is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Fills `regions` from the image, and returns once all of it is there.
///
/// A chunk enters memory only after its digest was checked. On an error the regions hold an
/// unfinished guest, which must not run.
pub fn fill(
    reader: &ImageReader,
    regions: &[MemoryRegion],
    options: &FillOptions,
) -> Result<RestoreStats, FillError> {
    let started = Instant::now();
    check_layout(&reader.manifest().regions, regions)?;
    let chunks = reader.live_chunks();
    let mut stats = RestoreStats {
        chunk_count: chunks.len() as u64,
        ..RestoreStats::default()
    };
    for run in reader.zero_runs() {
        stats.zero_pages += run.page_count;
        if !options.memory_is_fresh {
            clear(regions, run);
        }
    }
    reader.for_each_chunk(&chunks, options.threads, |chunk, raw| {
        let memory = |part: &ChunkRun| {
            regions
                .iter()
                .any(|it| it.run().intersection(part.run).is_some())
        };
        for part in reader.runs_of_chunk(chunk).filter(memory) {
            copy_in(regions, part.run, part.bytes_in(raw));
        }
    })?;
    let total: u64 = regions.iter().map(|region| region.page_count).sum();
    stats.data_pages = total - stats.zero_pages;
    stats.elapsed = started.elapsed();
    Ok(stats)
}

/// Fails where the machine's memory is not that of an image.
pub fn check_layout(saved: &[RegionLayout], regions: &[MemoryRegion]) -> Result<(), FillError> {
    let differ = |difference: String| Err(FillError::Layout { difference });
    if saved.len() != regions.len() {
        return differ(format!(
            "{} regions instead of {}",
            regions.len(),
            saved.len()
        ));
    }
    for (saved, region) in saved.iter().zip(regions) {
        let layout = RegionLayout {
            slot: region.slot,
            start: region.start,
            page_count: region.page_count,
        };
        if layout != *saved {
            return differ(format!(
                "slot {} has {} pages at {} instead of slot {} with {} at {}",
                layout.slot,
                layout.page_count,
                layout.start,
                saved.slot,
                saved.page_count,
                saved.start
            ));
        }
        if region.mapping.len() as u64 != region.run().bytes() {
            return differ(format!(
                "slot {} maps {} bytes for {} pages",
                layout.slot,
                region.mapping.len(),
                layout.page_count
            ));
        }
    }
    Ok(())
}

/// Returns the region of `run` and the run's offset in it. The image's runs were checked to be
/// inside its regions, and those to be the machine's.
fn place(regions: &[MemoryRegion], run: PageRun) -> (&MemoryRegion, usize) {
    let region = regions
        .iter()
        .find(|region| region.start <= run.start && run.end() <= region.run().end())
        .expect("runs are inside regions");
    (region, byte_offset(region, run.start))
}

fn byte_offset(region: &MemoryRegion, gfn: Gfn) -> usize {
    usize::try_from((gfn.0 - region.start.0) << PAGE_SHIFT)
        .expect("the region is mapped, so its offsets fit")
}

pub(super) fn copy_in(regions: &[MemoryRegion], run: PageRun, bytes: &[u8]) {
    let (region, offset) = place(regions, run);
    region.mapping.copy_in(offset, bytes);
}

pub(super) fn clear(regions: &[MemoryRegion], run: PageRun) {
    static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];
    let (region, mut offset) = place(regions, run);
    let end = offset + byte_offset(region, run.end()) - byte_offset(region, run.start);
    while offset < end {
        let bytes = (end - offset).min(ZEROS.len());
        region.mapping.copy_in(offset, &ZEROS[..bytes]);
        offset += bytes;
    }
}

const _: () = assert!(PAGE_BYTES == 1 << PAGE_SHIFT);
