//! What the same bytes cost without any virtual machine: copied, hashed, written.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;

/// Block size of the plain write.
const BLOCK_BYTES: usize = 1 << 20;

/// What is hashed at once: the largest chunk of an image.
const HASH_BYTES: usize = 2 << 20;

/// Threads that copy and hash: as many as checkpoints get on the smallest machine.
const THREADS: usize = 2;

/// How long a plain write took.
#[derive(Clone, Copy, Debug)]
pub(super) struct PlainWrite {
    /// Until the last byte was handed to the kernel.
    pub written: Duration,
    /// Until it was on stable storage.
    pub synced: Duration,
}

/// Writes incompressible bytes to a new file, as a saver does, and removes it.
pub(super) fn plain_write(path: &Path, len: u64) -> anyhow::Result<PlainWrite> {
    let mut block = vec![0_u8; BLOCK_BYTES];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut block))?;
    let what = || format!("could not write {}", path.display());
    let mut file = File::create(path).with_context(what)?;
    let start = Instant::now();
    let mut left = len;
    while left > 0 {
        let now = usize::try_from(left).map_or(BLOCK_BYTES, |left| left.min(BLOCK_BYTES));
        file.write_all(&block[..now]).with_context(what)?;
        left -= now as u64;
    }
    let written = start.elapsed();
    file.sync_all().with_context(what)?;
    let synced = start.elapsed();
    fs::remove_file(path)?;
    Ok(PlainWrite { written, synced })
}

/// Memory of a guest's size, twice: every page has been touched.
#[derive(Debug)]
pub(super) struct Memory {
    from: Vec<u8>,
    to: Vec<u8>,
}

impl Memory {
    pub fn new(len: usize) -> Self {
        Self {
            from: vec![0x5a; len],
            to: vec![0xa5; len],
        }
    }

    /// Copies all of it, by two threads.
    pub fn copy(&mut self) -> Duration {
        let part = self.from.len().div_ceil(THREADS).max(1);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for (from, to) in self.from.chunks(part).zip(self.to.chunks_mut(part)) {
                scope.spawn(move || to.copy_from_slice(from));
            }
        });
        let took = start.elapsed();
        // Nobody reads the copy: the compiler must not know that.
        std::hint::black_box(&self.to);
        took
    }

    /// Hashes all of it with BLAKE3, chunk by chunk, by two threads.
    pub fn hash(&self) -> Duration {
        let part = self.from.len().div_ceil(THREADS).max(1);
        let start = Instant::now();
        std::thread::scope(|scope| {
            for from in self.from.chunks(part) {
                scope.spawn(move || {
                    for chunk in from.chunks(HASH_BYTES) {
                        std::hint::black_box(blake3::hash(chunk));
                    }
                });
            }
        });
        start.elapsed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_whole_whatever_the_length() {
        let mut memory = Memory::new(3 * HASH_BYTES + 5);
        memory.copy();
        assert_eq!(memory.from, memory.to);
        assert!(memory.hash() > Duration::ZERO);
    }

    #[test]
    fn a_plain_write_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("plain");
        let took = plain_write(&file, 3_000_000).unwrap();
        assert!(took.written <= took.synced);
        assert!(!file.exists());
    }
}
