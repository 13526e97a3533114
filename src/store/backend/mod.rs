//! Storage: the few operations on files that images need.
//!
//! [`file`] is the real one, [`limited`] holds another one to a rate. [`forgetful`] is a model of
//! a disk that loses what was not synced, for tests.

pub mod file;
#[doc(hidden)]
pub mod forgetful;
pub mod limited;
mod noise;

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

use crate::sys::lock::Holder;

/// How a file is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// Together with other readers.
    Shared,
    /// Alone.
    Exclusive,
}

/// What a path names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A device, pipe, socket and so on.
    Other,
}

/// A place where images are kept.
///
/// Nothing is durable before [`StorageFile::sync`] and, for names, [`Storage::sync_dir`].
pub trait Storage: Send + Sync + fmt::Debug {
    /// Makes a file at `path`, where nothing may be yet, for reading and writing. Only its owner
    /// may open it.
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;

    /// Gives the regular file at `spare` the name `path`, where nothing may be yet, opens it for
    /// reading and writing, and locks it alone. Fails with `WouldBlock`, and changes nothing, where
    /// somebody else has a lock on it.
    fn take_over(&self, spare: &Path, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let _ = (spare, path);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Opens the regular file at `path` for reading.
    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>>;

    /// Returns what `path` names, `None` where it names nothing.
    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>>;

    /// Renames a file within a directory, atomically; the target is replaced.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file's name.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// Makes the names in `dir` durable.
    fn sync_dir(&self, dir: &Path) -> io::Result<()>;

    /// Returns the names in `dir`, in no order.
    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>>;

    /// Returns the bytes that a process like this one may still write below `dir`.
    fn free_bytes(&self, dir: &Path) -> io::Result<u64>;
}

/// An open file. Calls may come from several threads.
pub trait StorageFile: Send + Sync + fmt::Debug {
    /// Writes a part of `data` at `offset`; returns how many bytes were written.
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize>;

    /// Reads into a part of `out` from `offset`; 0 is the end of the file.
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Returns the length of the file.
    fn byte_len(&self) -> io::Result<u64>;

    /// Takes room on the disk for `bytes` bytes at `offset`, past the file's end too, without
    /// changing its length. A hint: writes then need less time. [`StorageFile::trim`] gives back
    /// what was not used.
    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Gives back room taken past the end of the file, which is `bytes` long.
    fn trim(&self, bytes: u64) -> io::Result<()>;

    /// Starts to write a range to the disk, so that a later sync is short. A hint.
    fn start_writeback(&self, offset: u64, bytes: u64) -> io::Result<()>;

    /// Makes every write that has returned durable, and the file's length.
    fn sync(&self) -> io::Result<()>;

    /// Locks the file without waiting; false where another open file stands against it. The lock
    /// ends when the file is dropped.
    fn try_lock(&self, kind: LockKind) -> io::Result<bool>;

    /// Returns somebody who holds a lock on the file, where that can be known.
    fn holder(&self) -> Option<Holder>;

    /// Has `bytes` bytes of `to` from `at` on share blocks with this file's from `offset` on, whole
    /// blocks both, without copying. An error says that it cannot be.
    fn share(&self, offset: u64, bytes: u64, to: &File, at: u64) -> io::Result<()> {
        let _ = (offset, bytes, to, at);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Returns whether `path` still names this very file.
    fn is_at(&self, path: &Path) -> io::Result<bool>;
}

impl dyn StorageFile + '_ {
    /// Writes all of `data` at `offset`.
    pub fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        let mut rest = data;
        let mut at = offset;
        while !rest.is_empty() {
            match self.write_at(rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => {
                    rest = rest.get(written..).unwrap_or_default();
                    at += written as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Fills `out` from `offset`.
    pub fn read_exact_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        let mut rest = out;
        let mut at = offset;
        while !rest.is_empty() {
            match self.read_at(rest, at) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => {
                    rest = rest.get_mut(read..).unwrap_or_default();
                    at += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
