//! How fast storage takes an image, found out by writing a little.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::store::backend::{Storage, StorageFile};
use crate::store::chain::{self, Target};
use crate::store::error::StoreError;

/// Written to find out: enough to see past a disk's latency, little enough to wait for.
const PROBE_BYTES: u64 = 16 << 20;

/// After this long what was written must do: a slow disk is seen early.
const PROBE_TIME: Duration = Duration::from_millis(100);

/// Written at once, as an image's chunks are.
const BLOCK_BYTES: usize = 1 << 20;

/// Writes and removes a temporary file beside `path` (or in it, where it is a directory); returns
/// bytes a second, the sync included if `durable`. Blocks for as long as the disk takes.
pub fn probe_rate(storage: &dyn Storage, path: &Path, durable: bool) -> Result<u64, StoreError> {
    let part = Target::new(storage, path)?.part();
    let file = chain::create_part(storage, &part)?;
    let measured = write(file.as_ref(), durable).map_err(StoreError::io("write", &part));
    storage
        .remove(&part)
        .map_err(StoreError::io("remove", &part))?;
    measured
}

fn write(file: &dyn StorageFile, durable: bool) -> std::io::Result<u64> {
    // Not zeros, which some file systems and disks do not store.
    let block: Vec<u8> = (0..=u8::MAX).cycle().take(BLOCK_BYTES).collect();
    let began = Instant::now();
    let mut written = 0;
    while written < PROBE_BYTES && began.elapsed() < PROBE_TIME {
        file.write_all_at(&block, written)?;
        written += BLOCK_BYTES as u64;
    }
    if durable {
        file.sync()?;
    }
    let us = began.elapsed().as_micros().max(1);
    let rate = u128::from(written) * 1_000_000 / us;
    Ok(u64::try_from(rate).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FileStorage;

    #[test]
    fn a_probe_tells_a_rate_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.lpi");
        assert!(probe_rate(&FileStorage, &path, false).unwrap() > 0);
        assert!(probe_rate(&FileStorage, dir.path(), true).unwrap() > 0);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
