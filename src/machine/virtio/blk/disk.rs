//! The host's side of a disk: a file or block device.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::raw::RawFile;
use crate::guest::{DiskFacts, DiskImage, FrozenDisk, GuestDisk, ImageError, WriteObserver};
use crate::machine::spec::{DiskCache, DiskFormat, DiskSpec};
use crate::sys::lock::holder_of;

/// Bytes of a sector, in which virtio counts.
pub const SECTOR_BYTES: u32 = 512;

/// The most bytes of a request to an image that are copied at a time.
const PART_BYTES: usize = 1 << 20;

/// A disk that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The file is no disk.
    #[error("{} is no disk: {why}", path.display())]
    NoDisk {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
    /// The file cannot be opened or examined, another machine or program uses it, or it is an image
    /// that cannot be used.
    #[error(transparent)]
    File(#[from] ImageError),
}

impl DiskError {
    pub(super) fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| ImageError::io(what, path)(source).into()
    }
}

/// What a guest has asked of a disk since the machine was started.
#[derive(Debug, Default)]
pub struct DiskCounters {
    /// Reads, and the bytes that they brought.
    pub reads: AtomicU64,
    /// Bytes read.
    pub read_bytes: AtomicU64,
    /// Writes, discards left out.
    pub writes: AtomicU64,
    /// Bytes written.
    pub written_bytes: AtomicU64,
    /// Flushes.
    pub flushes: AtomicU64,
    /// Nanoseconds that the reads took.
    pub read_ns: AtomicU64,
    /// Nanoseconds that the writes took.
    pub write_ns: AtomicU64,
    /// Nanoseconds that the flushes took.
    pub flush_ns: AtomicU64,
    /// Requests that storage did not carry out.
    pub errors: AtomicU64,
}

impl DiskCounters {
    /// Adds to one of them.
    pub(super) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

/// What keeps a disk's bytes.
enum Storage {
    Raw(RawFile),
    Image(Box<dyn DiskImage>),
}

/// An open disk. It is locked against other machines for as long as it is open: for reading by
/// any number of them, for writing by one.
///
/// Every method may be called from any thread, and may block for storage.
pub struct Disk {
    spec: DiskSpec,
    storage: Storage,
    sectors: u64,
    counters: DiskCounters,
    observer: RwLock<Option<Arc<dyn WriteObserver>>>,
}

impl fmt::Debug for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Disk")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

impl Disk {
    /// Opens and locks the disk.
    pub fn open(spec: &DiskSpec) -> Result<Self, DiskError> {
        let path = &spec.path;
        let direct = spec.cache.is_direct();
        let synced = matches!(spec.cache, DiskCache::WriteThrough | DiskCache::DirectSync);
        let flag = |on, flag| if on { flag } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(!spec.read_only)
            .custom_flags(flag(direct, libc::O_DIRECT) | flag(synced, libc::O_DSYNC))
            .open(path)
            .map_err(DiskError::io("open", path))?;
        lock(&file, spec)?;
        let (storage, bytes) = match spec.format {
            DiskFormat::Raw => {
                let raw = RawFile::new(file, spec)?;
                let bytes = raw.bytes();
                (Storage::Raw(raw), bytes)
            }
            DiskFormat::Image(format) => {
                let image = format.open(file, path, !spec.read_only)?;
                let bytes = image.bytes();
                (Storage::Image(image), bytes)
            }
        };
        if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES.into()) {
            let why = "its size is not a multiple of 512 bytes, or is 0";
            let path = path.clone();
            return Err(DiskError::NoDisk { path, why });
        }
        Ok(Self {
            spec: spec.clone(),
            storage,
            sectors: bytes / u64::from(SECTOR_BYTES),
            observer: RwLock::new(None),
            counters: DiskCounters::default(),
        })
    }

    /// Returns what was asked of it.
    pub fn counters(&self) -> &DiskCounters {
        &self.counters
    }

    /// Returns its name in the guest, as in `vda`.
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Returns its size in sectors of [`SECTOR_BYTES`].
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Returns what every access should be a multiple of.
    pub fn block_bytes(&self) -> u32 {
        match &self.storage {
            Storage::Raw(raw) => raw.block_bytes(),
            Storage::Image(_) => SECTOR_BYTES,
        }
    }

    /// Returns its serial number; empty where it has none.
    pub fn serial(&self) -> &str {
        &self.spec.serial
    }

    /// Returns whether it refuses writes.
    pub fn is_read_only(&self) -> bool {
        self.spec.read_only
    }

    /// Returns whether discards reach the file.
    pub fn can_discard(&self) -> bool {
        self.spec.discard && !self.spec.read_only
    }

    /// Fills guest memory from `offset` on.
    pub fn read<B: BitmapSlice>(
        &self,
        offset: u64,
        into: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        match &self.storage {
            Storage::Raw(raw) => raw.read(offset, into),
            Storage::Image(image) => {
                let mut copy = Vec::new();
                for part in parts(into) {
                    copy.resize(part.len(), 0);
                    image.read_at(&mut copy, offset + part.start as u64)?;
                    overlaps(into, &part, |slice, at| slice.copy_from(&copy[at..]))?;
                }
                Ok(())
            }
        }
    }

    /// Writes guest memory to `offset`.
    pub fn write<B: BitmapSlice>(
        &self,
        offset: u64,
        from: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        self.refuse_read_only()?;
        self.announce(offset, from.iter().map(|slice| slice.len() as u64).sum());
        match &self.storage {
            Storage::Raw(raw) => raw.write(offset, from),
            Storage::Image(image) => {
                let mut copy = Vec::new();
                for part in parts(from) {
                    copy.resize(part.len(), 0);
                    overlaps(from, &part, |slice, at| {
                        slice.copy_to(&mut copy[at..]);
                    })?;
                    image.write_at(&copy, offset + part.start as u64)?;
                }
                self.flush_synced(&**image)
            }
        }
    }

    /// Makes what was written last, unless the disk is one of those whose user does not care.
    pub fn flush(&self) -> io::Result<()> {
        if self.spec.read_only {
            return Ok(());
        }
        let durable = self.spec.cache != DiskCache::Unsafe;
        match &self.storage {
            Storage::Raw(raw) if durable => raw.sync(),
            Storage::Raw(_) => Ok(()),
            // Where nothing has to outlive the host, it still outlives this process.
            Storage::Image(image) => image.flush(durable),
        }
    }

    /// Makes a range read as zeros; it may become a hole where `may_unmap` says so.
    pub fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.refuse_read_only()?;
        self.announce(offset, len);
        match &self.storage {
            Storage::Raw(raw) => raw.zero(offset, len, may_unmap),
            Storage::Image(image) => {
                image.zero(offset, len, may_unmap)?;
                self.flush_synced(&**image)
            }
        }
    }

    /// Makes a write last where each one has to: an image's own tables are kept in memory.
    fn flush_synced(&self, image: &dyn DiskImage) -> io::Result<()> {
        match self.spec.cache {
            DiskCache::WriteThrough | DiskCache::DirectSync => image.flush(true),
            _ => Ok(()),
        }
    }

    /// Lets a checkpoint keep what is about to be changed.
    fn announce(&self, offset: u64, bytes: u64) {
        let observer = self.observer.read();
        let observer = observer.unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(observer) = observer {
            observer.before_write(offset, bytes);
        }
    }

    fn refuse_read_only(&self) -> io::Result<()> {
        if self.spec.read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        Ok(())
    }
}

impl GuestDisk for Disk {
    fn facts(&self) -> DiskFacts {
        DiskFacts {
            name: self.spec.name.clone(),
            path: self.spec.path.clone(),
            bytes: self.sectors * u64::from(SECTOR_BYTES),
            read_only: self.spec.read_only,
            modified_ns: match &self.storage {
                Storage::Raw(raw) => raw.modified_ns(),
                Storage::Image(image) => image.modified_ns(),
            },
        }
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.storage {
            Storage::Raw(raw) => raw.read_at(out, offset),
            Storage::Image(image) => image.read_at(out, offset),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        match &self.storage {
            Storage::Raw(raw) => raw.next_data(offset),
            Storage::Image(image) => image.next_data(offset),
        }
    }

    fn freeze(&self) -> io::Result<Option<Box<dyn FrozenDisk>>> {
        match &self.storage {
            Storage::Raw(raw) => raw.freeze(),
            Storage::Image(image) => image.freeze(),
        }
    }

    fn set_write_observer(&self, observer: Option<Arc<dyn WriteObserver>>) {
        let place = self.observer.write();
        *place.unwrap_or_else(PoisonError::into_inner) = observer;
    }
}

/// Returns the ranges of a request, [`PART_BYTES`] at most each.
fn parts<B: BitmapSlice>(
    slices: &[VolatileSlice<'_, B>],
) -> impl Iterator<Item = Range<usize>> + use<B> {
    let bytes: usize = slices.iter().map(VolatileSlice::len).sum();
    let starts = (0..bytes).step_by(PART_BYTES);
    starts.map(move |start| start..bytes.min(start + PART_BYTES))
}

/// Calls `each` with the pieces of guest memory that a range of a request is made of, and where
/// they are in it.
fn overlaps<B: BitmapSlice>(
    slices: &[VolatileSlice<'_, B>],
    range: &Range<usize>,
    mut each: impl FnMut(VolatileSlice<'_, B>, usize),
) -> io::Result<()> {
    let mut start = 0;
    for slice in slices {
        let (from, to) = (range.start.max(start), range.end.min(start + slice.len()));
        if from < to {
            let piece = slice.subslice(from - start, to - from);
            each(piece.map_err(io::Error::other)?, from - range.start);
        }
        start += slice.len();
    }
    Ok(())
}

/// Locks the file; two machines that write one disk destroy it.
fn lock(file: &File, spec: &DiskSpec) -> Result<(), DiskError> {
    let locked = if spec.read_only {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => ImageError::InUse {
            path: spec.path.clone(),
            holder: holder_of(file),
        },
        TryLockError::Error(source) => ImageError::io("lock", &spec.path)(source),
    })?;
    Ok(())
}
