//! Room for an image, before it is begun.

use std::path::Path;

use crate::page::{PAGE_BYTES, PIECE_PAGES};
use crate::store::backend::Storage;
use crate::store::error::StoreError;
use crate::store::format::{CHUNK_RECORD_BYTES, MANIFEST_BYTES_MAX, RUN_RECORD_BYTES, wide};

/// State sections and the alignment of every part, for any number of vCPUs that we expect.
const STATE_BYTES: u64 = 4 << 20;

/// Returns the most bytes that an image of `page_count` pages takes, each captured once and none
/// compressible. A protocol that captures pages again adds the pages that it may capture.
pub fn estimate_bytes(page_count: u64) -> u64 {
    let chunks = page_count.div_ceil(PIECE_PAGES);
    let per_page = wide(PAGE_BYTES + RUN_RECORD_BYTES);
    page_count
        .saturating_mul(per_page)
        .saturating_add(chunks * wide(CHUNK_RECORD_BYTES))
        .saturating_add(STATE_BYTES + MANIFEST_BYTES_MAX)
}

/// Fails where fewer than `needed` bytes are free in `dir`.
pub fn ensure_free(storage: &dyn Storage, dir: &Path, needed: u64) -> Result<(), StoreError> {
    let available = storage
        .free_bytes(dir)
        .map_err(StoreError::io("read the free space of", dir))?;
    if available < needed {
        return Err(StoreError::NoSpace {
            path: dir.to_owned(),
            needed,
            available,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FileStorage;

    #[test]
    fn an_image_that_cannot_fit_is_refused_by_both_sizes() {
        let dir = tempfile::tempdir().unwrap();
        ensure_free(&FileStorage, dir.path(), 1).unwrap();
        let error = ensure_free(&FileStorage, dir.path(), u64::MAX).unwrap_err();
        assert!(error.is_no_space());
        assert!(error.to_string().contains(&u64::MAX.to_string()));
    }

    #[test]
    fn the_estimate_grows_with_memory_and_never_overflows() {
        assert!(estimate_bytes(1 << 18) > 1 << 30);
        assert!(estimate_bytes(1 << 18) < (1 << 30) + (16 << 20));
        assert!(estimate_bytes(u64::MAX / 8192) > 1 << 40);
    }
}
