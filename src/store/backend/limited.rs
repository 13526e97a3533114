//! Storage held to a number of bytes a second: a bandwidth cap, or a slower disk in a benchmark.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::store::backend::{EntryKind, LockKind, Storage, StorageFile};
use crate::sys::lock::Holder;

/// What may be written at once after a time without writes.
const BURST: Duration = Duration::from_millis(5);

/// The longest wait of one write, so that nobody waits long for a thread that writes.
const WAIT_MAX: Duration = Duration::from_millis(25);

/// The least that one write takes.
const WRITE_BYTES_MIN: u64 = 4096;

/// Another storage whose writes, taken together, run at a limited rate.
///
/// A write returns when a disk of that rate would have taken its bytes. Reads and syncs are not
/// held up.
#[derive(Debug)]
pub struct LimitedStorage {
    inner: Arc<dyn Storage>,
    pace: Arc<Pace>,
}

#[derive(Debug)]
struct Pace {
    bytes_per_s: u64,
    /// When everything that was written so far has had its time.
    clear_at: Mutex<Instant>,
}

impl LimitedStorage {
    /// Holds writes to `inner` to `bytes_per_s` bytes a second.
    ///
    /// # Panics
    /// When `bytes_per_s` is 0.
    pub fn new(inner: Arc<dyn Storage>, bytes_per_s: u64) -> Self {
        assert!(bytes_per_s > 0, "nothing could ever be written");
        Self {
            inner,
            pace: Arc::new(Pace {
                bytes_per_s,
                clear_at: Mutex::new(Instant::now()),
            }),
        }
    }

    fn limit(&self, file: Box<dyn StorageFile>) -> Box<dyn StorageFile> {
        Box::new(LimitedFile {
            inner: file,
            pace: self.pace.clone(),
        })
    }
}

impl Pace {
    /// Returns how much of `len` bytes is written at once.
    fn part(&self, len: usize) -> usize {
        let most = self.bytes_per_s / 1000 * u64::try_from(WAIT_MAX.as_millis()).unwrap_or(1);
        let most = usize::try_from(most.max(WRITE_BYTES_MIN)).unwrap_or(usize::MAX);
        len.min(most)
    }

    /// Waits for the time that `bytes` bytes, just written, have to take.
    fn spend(&self, bytes: usize) {
        let took_ns = u128::from(bytes as u64) * 1_000_000_000 / u128::from(self.bytes_per_s);
        let took = Duration::from_nanos(u64::try_from(took_ns).unwrap_or(u64::MAX));
        let now = Instant::now();
        let done_at = {
            let mut clear_at = self.clear_at.lock().unwrap_or_else(PoisonError::into_inner);
            let start = now
                .checked_sub(BURST)
                .map_or(*clear_at, |earliest| earliest.max(*clear_at));
            *clear_at = start + took;
            *clear_at
        };
        thread::sleep(done_at.saturating_duration_since(now));
    }
}

impl Storage for LimitedStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        Ok(self.limit(self.inner.create_new(path)?))
    }

    fn take_over(&self, spare: &Path, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        Ok(self.limit(self.inner.take_over(spare, path)?))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        Ok(self.limit(self.inner.open(path)?))
    }

    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        self.inner.kind(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        self.inner.list(dir)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        self.inner.free_bytes(dir)
    }
}

#[derive(Debug)]
struct LimitedFile {
    inner: Box<dyn StorageFile>,
    pace: Arc<Pace>,
}

impl StorageFile for LimitedFile {
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        let part = data.get(..self.pace.part(data.len())).unwrap_or(data);
        let written = self.inner.write_at(part, offset)?;
        self.pace.spend(written);
        Ok(written)
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(out, offset)
    }

    fn byte_len(&self) -> io::Result<u64> {
        self.inner.byte_len()
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.inner.reserve(offset, bytes)
    }

    fn trim(&self, bytes: u64) -> io::Result<()> {
        self.inner.trim(bytes)
    }

    fn start_writeback(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.inner.start_writeback(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn try_lock(&self, kind: LockKind) -> io::Result<bool> {
        self.inner.try_lock(kind)
    }

    fn holder(&self) -> Option<Holder> {
        self.inner.holder()
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        self.inner.is_at(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FileStorage;

    const RATE: u64 = 20 << 20;

    #[test]
    fn writes_of_all_threads_together_keep_the_rate_and_arrive_whole() {
        let dir = tempfile::tempdir().unwrap();
        let storage = LimitedStorage::new(Arc::new(FileStorage), RATE);
        let file = storage.create_new(&dir.path().join("file")).unwrap();
        let data = vec![7; 1 << 20];
        let began = Instant::now();
        thread::scope(|scope| {
            for offset in [0, 1 << 20] {
                let (file, data) = (&file, &data);
                scope.spawn(move || file.write_all_at(data, offset).unwrap());
            }
        });
        // 2 MiB at 20 MiB/s. No upper bound: the machine may be busy.
        assert!(began.elapsed() >= Duration::from_millis(100) - BURST);
        let mut back = vec![0; 2 << 20];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back.iter().all(|&byte| byte == 7));
    }

    #[test]
    fn one_write_never_waits_long() {
        for bytes_per_s in [1, 1 << 20, RATE, u64::MAX] {
            let pace = Pace {
                bytes_per_s,
                clear_at: Mutex::new(Instant::now()),
            };
            let part = pace.part(2 << 20) as u64;
            let within = bytes_per_s.saturating_mul(25) / 1000;
            assert!(part <= within.max(WRITE_BYTES_MIN), "{bytes_per_s}");
            assert!(part > 0);
        }
    }
}
