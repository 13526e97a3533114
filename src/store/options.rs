//! What the caller of a writer chooses.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::page::{Gfn, PageRun};
use crate::store::codec::Codec;
use crate::store::disks::{DiskLayout, ReadOnlyDisk};
use crate::store::error::StoreError;
use crate::store::format::{PAGES_MAX, REGION_COUNT_MAX};

/// How an image is written.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// Compression of chunks; what does not shrink is stored as it is.
    pub codec: Codec,
    /// Whether the image survives a power cut once committed. Without it nothing is synced.
    pub durable: bool,
    /// Whether the guest stands still while chunks are written, as in `stop`. Then only what must
    /// be done now is done: digests are made from the file at commit (a checksum taken now guards
    /// the bytes meanwhile), and write-back waits for the sync. Otherwise the commit is short.
    pub guest_waits: bool,
    /// A file of the caller's own, in the image's directory, that is given up: the image is written
    /// over it, which is two to three times as fast as into new room. It is gone whatever becomes
    /// of the image. `None`, or one that is not there, for a new file.
    pub spare: Option<PathBuf>,
    /// Fails the start where the file system has fewer bytes free than this.
    pub expected_bytes: Option<u64>,
    /// Disks whose content goes into the image too.
    pub disks: Vec<DiskLayout>,
    /// Disks that are only named in it.
    pub read_only_disks: Vec<ReadOnlyDisk>,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            codec: Codec::None,
            durable: true,
            guest_waits: false,
            spare: None,
            expected_bytes: None,
            disks: Vec::new(),
            read_only_disks: Vec::new(),
        }
    }
}

/// A region of guest memory, as the image describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionLayout {
    /// KVM memslot.
    pub slot: u32,
    /// First guest frame.
    pub start: Gfn,
    /// Length in pages.
    pub page_count: u64,
}

impl RegionLayout {
    /// Returns the region's frames.
    pub fn run(&self) -> PageRun {
        PageRun {
            start: self.start,
            page_count: self.page_count,
        }
    }
}

/// Returns what is wrong with `regions`: they must be sorted, apart, not empty and not too many.
pub(crate) fn check_regions(regions: &[RegionLayout]) -> Result<(), String> {
    if regions.is_empty() || regions.len() > REGION_COUNT_MAX {
        return Err(format!("{} regions of memory", regions.len()));
    }
    let mut end = 0_u64;
    let mut total = 0_u64;
    for region in regions {
        let fits = region.page_count > 0 && region.page_count <= PAGES_MAX;
        let region_end = region.start.0.checked_add(region.page_count);
        match region_end.filter(|&last| fits && region.start.0 >= end && last <= GFN_END) {
            Some(next) => end = next,
            None => {
                return Err(format!(
                    "region of slot {} at page {} with {} pages is empty, too long or overlaps",
                    region.slot, region.start, region.page_count
                ));
            }
        }
        // Cannot overflow: the regions are apart and end below `GFN_END`.
        total += region.page_count;
    }
    let mut slots: Vec<u32> = regions.iter().map(|region| region.slot).collect();
    slots.sort_unstable();
    slots.dedup();
    if slots.len() != regions.len() {
        return Err("two regions have the same slot".to_owned());
    }
    if total > PAGES_MAX {
        return Err(format!("{total} pages of memory"));
    }
    Ok(())
}

/// Guest physical addresses have at most 52 bits on x86-64.
const GFN_END: u64 = 1 << 40;

/// Like [`check_regions`], for a writer's caller.
pub(crate) fn check_writable(regions: &[RegionLayout]) -> Result<(), StoreError> {
    check_regions(regions).map_err(|reason| StoreError::Unwritable { reason })
}
