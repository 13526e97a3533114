//! Digests that are made after the guest runs again, from the bytes in the file.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::store::backend::StorageFile;
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::{Chunk, ChunkCodec, Digest, narrow};

/// Threads that read the file again; the digest is slower than memory, not than two threads.
const THREADS: usize = 2;

/// A written chunk, whose digest may still be to make.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PendingChunk {
    pub(crate) offset: u64,
    pub(crate) stored_bytes: u32,
    pub(crate) page_count: u16,
    pub(crate) codec: ChunkCodec,
    pub(crate) check: Check,
}

/// What is known of a chunk's bytes since they were written.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Check {
    /// Their digest.
    Digest(Digest),
    /// Their CRC32C, which the bytes in the file must have when they are digested.
    Checksum(u32),
}

impl PendingChunk {
    fn with(&self, digest: Digest) -> Chunk {
        Chunk {
            offset: self.offset,
            stored_bytes: self.stored_bytes,
            page_count: self.page_count,
            codec: self.codec,
            digest,
        }
    }

    /// Returns the chunk, digested now if it was not yet.
    fn digested(
        &self,
        number: usize,
        file: &dyn StorageFile,
        path: &Path,
        bytes: &mut Vec<u8>,
        digest: impl Fn(ChunkCodec, &[u8]) -> Digest,
    ) -> Result<Chunk, StoreError> {
        let checksum = match self.check {
            Check::Digest(digest) => return Ok(self.with(digest)),
            Check::Checksum(checksum) => checksum,
        };
        bytes.resize(narrow(u64::from(self.stored_bytes)), 0);
        file.read_exact_at(bytes, self.offset)
            .map_err(StoreError::io("read back", path))?;
        if crc32c::crc32c(bytes) != checksum {
            let place = Place::Chunk { chunk: number };
            return Err(Damage::new(place, "reads back other than it was written").of(path));
        }
        Ok(self.with(digest(self.codec, bytes)))
    }
}

/// Returns `pending` with every digest made, by `digest` where it was not yet.
pub(crate) fn digest_all(
    file: &dyn StorageFile,
    path: &Path,
    pending: &[PendingChunk],
    digest: impl Fn(ChunkCodec, &[u8]) -> Digest + Sync,
) -> Result<Vec<Chunk>, StoreError> {
    let next = AtomicUsize::new(0);
    let run = || -> Result<Vec<(usize, Chunk)>, StoreError> {
        let mut done = Vec::new();
        let mut bytes = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(chunk) = pending.get(number) else {
                return Ok(done);
            };
            let chunk = chunk.digested(number, file, path, &mut bytes, &digest)?;
            done.push((number, chunk));
        }
    };
    let waiting = pending
        .iter()
        .filter(|chunk| matches!(chunk.check, Check::Checksum(_)))
        .count();
    let mut chunks = std::thread::scope(|scope| {
        let helpers = waiting.min(THREADS).saturating_sub(1);
        let joins: Vec<_> = (0..helpers)
            .filter_map(|_| {
                std::thread::Builder::new()
                    .name("lvp-digest".to_owned())
                    .spawn_scoped(scope, run)
                    // This thread digests everything if it must.
                    .ok()
            })
            .collect();
        let mut outcome = run();
        for join in joins {
            let joined = join
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            outcome = outcome.and_then(|mut all| {
                all.append(&mut joined?);
                Ok(all)
            });
        }
        outcome
    })?;
    chunks.sort_unstable_by_key(|(number, _)| *number);
    Ok(chunks.into_iter().map(|(_, chunk)| chunk).collect())
}
