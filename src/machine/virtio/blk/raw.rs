//! A raw file or block device.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;
use std::time::UNIX_EPOCH;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use super::disk::{DiskError, SECTOR_BYTES};
use crate::guest::FrozenDisk;
use crate::machine::spec::DiskSpec;
use crate::sys::reflink::{Snapshot, Snapshots};
use crate::sys::volatile_io;

/// The alignments that direct I/O may need, smallest first.
const DIRECT_ALIGNMENTS: [u32; 2] = [512, 4096];

/// An open file whose bytes are the disk's.
#[derive(Debug)]
pub(super) struct RawFile {
    file: File,
    bytes: u64,
    /// What direct I/O has to be aligned to; `None` where it goes by the page cache.
    alignment: Option<u32>,
    /// Of the file; `None` where nobody asks for any.
    snapshots: Option<Snapshots>,
}

/// A file as it was.
#[derive(Debug)]
struct FrozenFile {
    raw: RawFile,
    _snapshot: Snapshot,
}

impl RawFile {
    /// Takes the file of a disk that is open and locked.
    pub(super) fn new(file: File, spec: &DiskSpec) -> Result<Self, DiskError> {
        let (path, direct) = (&spec.path, spec.cache.is_direct());
        let bytes = bytes_of(&file, path)?;
        let alignment = direct.then(|| direct_alignment(&file, path)).transpose()?;
        Ok(Self {
            file,
            bytes,
            alignment,
            snapshots: (!spec.read_only).then(|| Snapshots::of(path)),
        })
    }

    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Returns what every access should be a multiple of.
    pub(super) fn block_bytes(&self) -> u32 {
        self.alignment.unwrap_or(SECTOR_BYTES)
    }

    pub(super) fn read<B: BitmapSlice>(
        &self,
        offset: u64,
        into: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        let Some(alignment) = self.bounces(into) else {
            return volatile_io::read_at(&self.file, into, offset);
        };
        let mut bounce = Bounce::new(alignment, into);
        self.file.read_exact_at(bounce.bytes(), offset)?;
        let mut at = 0;
        for slice in into {
            slice.copy_from(&bounce.bytes()[at..at + slice.len()]);
            at += slice.len();
        }
        Ok(())
    }

    pub(super) fn write<B: BitmapSlice>(
        &self,
        offset: u64,
        from: &[VolatileSlice<'_, B>],
    ) -> io::Result<()> {
        let Some(alignment) = self.bounces(from) else {
            return volatile_io::write_at(&self.file, from, offset);
        };
        let mut bounce = Bounce::new(alignment, from);
        let mut at = 0;
        for slice in from {
            at += slice.copy_to(&mut bounce.bytes()[at..]);
        }
        self.file.write_all_at(bounce.bytes(), offset)
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    pub(super) fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let how = if may_unmap {
            FallocateFlags::PUNCH_HOLE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        fallocate(&self.file, how | FallocateFlags::KEEP_SIZE, offset, len)?;
        Ok(())
    }

    /// Returns when a regular file was changed last; 0 where that is not known.
    pub(super) fn modified_ns(&self) -> u64 {
        let metadata = self.file.metadata().ok();
        let metadata = metadata.filter(std::fs::Metadata::is_file);
        let modified = metadata.and_then(|metadata| metadata.modified().ok());
        let since = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
        since
            .and_then(|since| u64::try_from(since.as_nanos()).ok())
            .unwrap_or(0)
    }

    pub(super) fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(alignment) = self.alignment else {
            return self.file.read_exact_at(out, offset);
        };
        let mut bounce = Bounce::of(alignment, out.len());
        self.file.read_exact_at(bounce.bytes(), offset)?;
        out.copy_from_slice(bounce.bytes());
        Ok(())
    }

    pub(super) fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        use rustix::fs::{SeekFrom, seek};
        // Nothing here uses the file's position.
        let start = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            // A file system that does not tell.
            Err(Errno::INVAL) => return Ok(Some(offset..self.bytes)),
            Err(error) => return Err(error.into()),
        };
        let end = seek(&self.file, SeekFrom::Hole(start))?;
        Ok(Some(start..end))
    }

    /// Returns the file as it is now; `None` where its file system cannot.
    pub(super) fn freeze(&self) -> io::Result<Option<Box<dyn FrozenDisk>>> {
        let snapshots = self.snapshots.as_ref();
        let Some(snapshot) = snapshots.and_then(|snapshots| snapshots.take(&self.file)) else {
            return Ok(None);
        };
        let raw = Self {
            file: snapshot.file()?,
            bytes: self.bytes,
            alignment: None,
            snapshots: None,
        };
        Ok(Some(Box::new(FrozenFile {
            raw,
            _snapshot: snapshot,
        })))
    }

    /// Returns the alignment of direct I/O where it does not take these buffers as they are.
    fn bounces<B: BitmapSlice>(&self, slices: &[VolatileSlice<'_, B>]) -> Option<u32> {
        let alignment = self.alignment?;
        let block = alignment as usize;
        let fits = slices.iter().all(|slice| {
            let start = slice.ptr_guard().as_ptr().addr();
            start.is_multiple_of(block) && slice.len().is_multiple_of(block)
        });
        (!fits).then_some(alignment)
    }
}

impl FrozenDisk for FrozenFile {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.raw.read_at(out, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.raw.next_data(offset)
    }
}

fn bytes_of(mut file: &File, path: &Path) -> Result<u64, DiskError> {
    let metadata = file.metadata().map_err(DiskError::io("examine", path))?;
    let kind = metadata.file_type();
    if !kind.is_file() && !kind.is_block_device() {
        let why = "it is neither a regular file nor a block device";
        let path = path.to_owned();
        return Err(DiskError::NoDisk { path, why });
    }
    // Of a block device the metadata has no length.
    file.seek(SeekFrom::End(0))
        .map_err(DiskError::io("find the size of", path))
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
