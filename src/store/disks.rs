//! Disks in an image: blocks of a page's size, in frames that no guest memory can have.
//!
//! So a disk has all that memory has: chunks with digests, holes that cost nothing, one index, and
//! the one commit.

use serde::{Deserialize, Serialize};

use crate::page::{Gfn, PAGE_BYTES, PIECE_PAGES, PageRun};
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::{PAGES_MAX, wide};
use crate::store::options::RegionLayout;

/// The first frame of disks: guest physical addresses end below.
pub(crate) const DISK_FRAMES_START: u64 = 1 << 40;

/// Most disks: a machine has 31 slots for all its devices.
pub const DISK_COUNT_MAX: usize = 256;

/// Longest name of a disk.
pub const DISK_NAME_BYTES_MAX: usize = 64;

/// A disk whose content is in an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskLayout {
    /// Its name in the domain, as in `vda`.
    pub name: String,
    /// Where it was on the host that wrote the image.
    pub path: String,
    /// Its length.
    pub bytes: u64,
}

/// A disk that the guest can only read: named in an image, and not copied.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadOnlyDisk {
    /// Its name in the domain.
    pub name: String,
    /// Where it was.
    pub path: String,
    /// Its length.
    pub bytes: u64,
    /// When its content was changed last, in nanoseconds since 1970; 0 for a block device.
    pub modified_ns: u64,
}

impl DiskLayout {
    fn page_count(&self) -> u64 {
        self.bytes.div_ceil(wide(PAGE_BYTES))
    }
}

/// Returns the frames of each disk: one after another, each from a whole piece on.
///
/// An error says what is wrong with them.
pub(crate) fn frames(disks: &[DiskLayout]) -> Result<Vec<PageRun>, String> {
    if disks.len() > DISK_COUNT_MAX {
        return Err(format!("{} disks", disks.len()));
    }
    let mut next = DISK_FRAMES_START;
    let mut runs = Vec::new();
    for (at, disk) in disks.iter().enumerate() {
        let named = (1..=DISK_NAME_BYTES_MAX).contains(&disk.name.len());
        let twice = disks.iter().take(at).any(|other| other.name == disk.name);
        let pages = disk.page_count();
        if !named || twice || pages == 0 || pages > PAGES_MAX {
            return Err(format!(
                "disk {:?} of {} bytes: empty, too long, or there twice",
                disk.name, disk.bytes
            ));
        }
        runs.push(PageRun {
            start: Gfn(next),
            page_count: pages,
        });
        // At most 2^8 disks of 2^32 pages: far from an overflow.
        next = (next + pages).next_multiple_of(PIECE_PAGES);
    }
    let total: u64 = runs.iter().map(|run| run.page_count).sum();
    if total > PAGES_MAX {
        return Err(format!("{total} pages of disks"));
    }
    Ok(runs)
}

/// Returns the regions of memory, and behind them those of disks, as the index sees both.
pub(crate) fn all_regions(
    memory: &[RegionLayout],
    disks: &[DiskLayout],
) -> Result<Vec<RegionLayout>, String> {
    let slots = memory.iter().map(|region| region.slot).max();
    let first = slots.map_or(0, |slot| slot.saturating_add(1));
    let disks = frames(disks)?;
    let regions = (first..).zip(disks).map(|(slot, run)| RegionLayout {
        slot,
        start: run.start,
        page_count: run.page_count,
    });
    Ok(memory.iter().copied().chain(regions).collect())
}

pub(crate) fn is_of_disk(run: PageRun) -> bool {
    run.start.0 >= DISK_FRAMES_START
}

pub(crate) fn unwritable(reason: String) -> StoreError {
    StoreError::Unwritable { reason }
}

pub(crate) fn damaged(reason: &str) -> Damage {
    Damage::new(Place::Manifest, format!("describes {reason}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(name: &str, bytes: u64) -> DiskLayout {
        DiskLayout {
            name: name.to_owned(),
            path: "/x".to_owned(),
            bytes,
        }
    }

    #[test]
    fn disks_are_apart_and_from_whole_pieces_on() {
        let runs = frames(&[disk("vda", 4097), disk("vdb", 4096)]).unwrap();
        assert_eq!(runs[0].page_count, 2);
        assert_eq!(runs[1].start.0, DISK_FRAMES_START + 512);
        for wrong in [
            vec![disk("", 4096)],
            vec![disk("vda", 0)],
            vec![disk("vda", 4096), disk("vda", 4096)],
            vec![disk("vda", u64::MAX)],
            vec![disk(&"x".repeat(65), 4096)],
        ] {
            frames(&wrong).unwrap_err();
        }
    }
}
