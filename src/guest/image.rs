//! Disks in files of a format of their own, such as qcow2.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::FrozenDisk;
use crate::sys::lock::Holder;

/// A file with a disk, or with an image of one, that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A file cannot be opened, examined, read or written.
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
    /// The file is damaged, or has what is not supported.
    #[error("{} is no {format} image that can be used: {why}", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Name of the format.
        format: &'static str,
        /// Why not.
        why: String,
    },
    /// Somebody writes to a file that is only to be read.
    #[error("{} is in use{}", path.display(), holder.as_ref().map_or_else(String::new, |holder| format!(" by {holder}")))]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who, where that is known.
        holder: Option<Holder>,
    },
}

impl ImageError {
    /// Returns what makes an error of an I/O error.
    pub fn io(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            path: path.to_owned(),
            source,
        }
    }
}

/// The disk in an open image. Every method may be called from any thread, and may block for
/// storage. Dropping it writes out what it keeps in memory, not to stable storage.
pub trait DiskImage: Send + Sync + fmt::Debug {
    /// Returns the length of the disk.
    fn bytes(&self) -> u64;

    /// Returns when the content was changed last, the files below it included, in nanoseconds
    /// since 1970; 0 where that is not known.
    fn modified_ns(&self) -> u64;

    /// Fills `out` from `offset` on.
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes `data` to `offset`.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a range read as zeros, and frees its room where `may_unmap` says so.
    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;

    /// Writes what is in memory to the file: what was written before outlives this process. With
    /// `durable`, it is on stable storage after.
    fn flush(&self, durable: bool) -> io::Result<()>;

    /// Returns the disk as it is now, made without copying; `None` where the file system cannot.
    /// Later writes do not change it; it is of one moment only where nobody writes meanwhile.
    fn freeze(&self) -> io::Result<Option<Box<dyn FrozenDisk>>>;

    /// Returns the first range from `offset` on that may hold something else than zeros; `None`
    /// where the rest of the disk is zeros.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
}

/// A format of images.
pub trait ImageFormat: Send + Sync + fmt::Debug {
    /// Returns its name, as domain XML has it.
    fn name(&self) -> &'static str;

    /// Opens the image in `file`, and the files that it needs besides. The caller has locked
    /// `file`, which is at `path` and open for reading, and for writing where `writable`.
    fn open(
        &self,
        file: File,
        path: &Path,
        writable: bool,
    ) -> Result<Box<dyn DiskImage>, ImageError>;

    /// Makes an image of a disk of `bytes` zeros in `file`, which is empty, open for reading and
    /// writing, and at `path`. Where there is a usable image at `like` that is based on another
    /// file, the new one is based on the same, and reads as that until it is written.
    fn create(
        &self,
        file: File,
        path: &Path,
        bytes: u64,
        like: Option<&Path>,
    ) -> Result<Box<dyn DiskImage>, ImageError>;
}
