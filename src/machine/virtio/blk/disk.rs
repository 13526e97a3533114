//! The host's side of a disk: a raw file or block device.

use std::fmt;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::UNIX_EPOCH;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::guest::{DiskFacts, GuestDisk, WriteObserver};
use crate::machine::spec::{DiskCache, DiskSpec};
use crate::sys::lock::{Holder, holder_of};
use crate::sys::volatile_io;

/// Bytes of a sector, in which virtio counts.
pub const SECTOR_BYTES: u32 = 512;

/// The alignments that direct I/O may need, smallest first.
const DIRECT_ALIGNMENTS: [u32; 2] = [512, 4096];

/// A disk that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The file cannot be opened or examined.
    #[error("could not {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another machine or program uses it.
    #[error("{} is in use{}", path.display(), holder.as_ref().map_or_else(String::new, |holder| format!(" by {holder}")))]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who uses it, where that is known.
        holder: Option<Holder>,
    },
    /// The file is no disk.
    #[error("{} is no disk: {why}", path.display())]
    NoDisk {
        /// The file.
        path: PathBuf,
        /// Why not.
        why: &'static str,
    },
}

impl DiskError {
    fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
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
    /// Requests that storage did not carry out.
    pub errors: AtomicU64,
}

impl DiskCounters {
    /// Adds to one of them.
    pub(super) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}

/// An open disk. It is locked against other machines for as long as it is open: for reading by
/// any number of them, for writing by one.
///
/// Every method may be called from any thread, and may block for storage.
pub struct Disk {
    spec: DiskSpec,
    file: File,
    sectors: u64,
    block_bytes: u32,
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
        let direct = matches!(spec.cache, DiskCache::None | DiskCache::DirectSync);
        let synced = matches!(spec.cache, DiskCache::WriteThrough | DiskCache::DirectSync);
        let flag = |on, flag| if on { flag } else { 0 };
        let file = OpenOptions::new()
            .read(true)
            .write(!spec.read_only)
            .custom_flags(flag(direct, libc::O_DIRECT) | flag(synced, libc::O_DSYNC))
            .open(path)
            .map_err(DiskError::io("open", path))?;
        lock(&file, spec)?;
        let sectors = sectors(&file, path)?;
        let block_bytes = if direct {
            direct_alignment(&file, path)?
        } else {
            SECTOR_BYTES
        };
        Ok(Self {
            spec: spec.clone(),
            file,
            sectors,
            block_bytes,
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
        self.block_bytes
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

    fn is_direct(&self) -> bool {
        matches!(self.spec.cache, DiskCache::None | DiskCache::DirectSync)
    }

    /// Returns whether direct I/O takes these buffers as they are.
    fn fits_direct<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>]) -> bool {
        let block = self.block_bytes as usize;
        slices.iter().all(|slice| {
            let start = slice.ptr_guard().as_ptr().addr();
            start.is_multiple_of(block) && slice.len().is_multiple_of(block)
        })
    }

    /// Fills guest memory from `offset` on.
    pub fn read<B: BitmapSlice>(
        &self,
        offset: u64,
        into: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        if !self.is_direct() || self.fits_direct(into) {
            return volatile_io::read_at(&self.file, into, offset);
        }
        let mut bounce = Bounce::new(self.block_bytes, into);
        self.file.read_exact_at(bounce.bytes(), offset)?;
        let mut at = 0;
        for slice in into {
            slice.copy_from(&bounce.bytes()[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    /// Writes guest memory to `offset`.
    pub fn write<B: BitmapSlice>(
        &self,
        offset: u64,
        from: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        self.refuse_read_only()?;
        self.announce(offset, from.iter().map(|slice| slice.len() as u64).sum());
        if !self.is_direct() || self.fits_direct(from) {
            return volatile_io::write_at(&self.file, from, offset);
        }
        let mut bounce = Bounce::new(self.block_bytes, from);
        let mut at = 0;
        for slice in from {
            at += slice.copy_to(&mut bounce.bytes()[at..]);
        }
        self.file.write_all_at(bounce.bytes(), offset)
    }

    /// Makes what was written last, unless the disk is one of those whose user does not care.
    pub fn flush(&self) -> io::Result<()> {
        if self.spec.cache == DiskCache::Unsafe || self.spec.read_only {
            return Ok(());
        }
        self.file.sync_data()
    }

    /// Makes a range read as zeros; it may become a hole where `may_unmap` says so.
    pub fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.refuse_read_only()?;
        self.announce(offset, len);
        let how = if may_unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len)?;
        Ok(())
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
        let modified = self
            .file
            .metadata()
            .and_then(|metadata| metadata.modified());
        let since = modified
            .ok()
            .and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        let is_file = self
            .file
            .metadata()
            .is_ok_and(|metadata| metadata.is_file());
        let nanoseconds = since.and_then(|since| u64::try_from(since.as_nanos()).ok());
        DiskFacts {
            name: self.spec.name.clone(),
            path: self.spec.path.clone(),
            bytes: self.sectors * u64::from(SECTOR_BYTES),
            read_only: self.spec.read_only,
            modified_ns: nanoseconds.filter(|_| is_file).unwrap_or(0),
        }
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        if !self.is_direct() {
            return self.file.read_exact_at(out, offset);
        }
        let mut bounce = Bounce::of(self.block_bytes, out.len());
        self.file.read_exact_at(bounce.bytes(), offset)?;
        out.copy_from_slice(bounce.bytes());
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::{SeekFrom, seek};
        // Nothing here uses the file's position.
        let start = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // A file system that does not tell.
            Err(Errno::INVAL) => return Ok(Some(offset..self.sectors * u64::from(SECTOR_BYTES))),
            Err(error) => return Err(error.into()),
        };
        let end = seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..end))
    }

    fn set_write_observer(&self, observer: Option<Arc<dyn WriteObserver>>) {
        let place = self.observer.write();
        *place.unwrap_or_else(PoisonError::into_inner) = observer;
    }
}

/// Locks the file; two machines that write one disk destroy it.
fn lock(file: &File, spec: &DiskSpec) -> Result<(), DiskError> {
    let locked = if spec.read_only {
        file.try_lock_shared()
    } else {
        file.try_lock()
    };
    locked.map_err(|error| match error {
        TryLockError::WouldBlock => DiskError::InUse {
            path: spec.path.clone(),
            holder: holder_of(file),
        },
        TryLockError::Error(source) => DiskError::io("lock", &spec.path)(source),
    })
}

fn sectors(mut file: &File, path: &Path) -> Result<u64, DiskError> {
    let metadata = file.metadata().map_err(DiskError::io("examine", path))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let why = "it is neither a regular file nor a block device";
        let path = path.to_owned();
        return Err(DiskError::NoDisk { path, why });
    }
    // Of a block device the metadata has no length.
    let bytes = file
        .seek(SeekFrom::End(0))
        .map_err(DiskError::io("find the size of", path))?;
    if bytes == 0 || !bytes.is_multiple_of(SECTOR_BYTES.into()) {
        let why = "its size is not a multiple of 512 bytes, or is 0";
        let path = path.to_owned();
        return Err(DiskError::NoDisk { path, why });
    }
    Ok(bytes / u64::from(SECTOR_BYTES))
}

/// Finds by trying what direct I/O on the file must be aligned to.
fn direct_alignment(file: &File, path: &Path) -> Result<u32, DiskError> {
    let mut last = io::Error::from(io::ErrorKind::InvalidInput);
    for alignment in DIRECT_ALIGNMENTS {
        let mut bounce = Bounce::of(alignment, alignment as usize);
        match file.read_at(bounce.bytes(), 0) {
            Ok(_) => return Ok(alignment),
            Err(error) => last = error,
        }
    }
    Err(DiskError::io("read without the page cache", path)(last))
}

/// Memory that direct I/O takes, for buffers that it does not.
struct Bounce {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Bounce {
    fn new<B: BitmapSlice>(alignment: u32, slices: &[VolatileSlice<'_, B>]) -> Self {
        Self::of(alignment, slices.iter().map(VolatileSlice::len).sum())
    }

    fn of(alignment: u32, len: usize) -> Self {
        let alignment = alignment as usize;
        let memory = vec![0; len + alignment];
        let start = memory.as_ptr().align_offset(alignment);
        Self { memory, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}
