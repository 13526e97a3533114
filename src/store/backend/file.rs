//! Images as files of a local file system.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use crate::store::backend::{EntryKind, LockKind, Storage, StorageFile};
use crate::sys::lock::{self, Holder};
use crate::sys::{reflink, writeback};

/// Keeps images in files.
#[derive(Clone, Copy, Debug, Default)]
pub struct FileStorage;

#[derive(Debug)]
struct OpenedFile(File);

impl Storage for FileStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        // Guest memory holds the guest's secrets: nobody but the owner may read the file.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path)?;
        regular(file)
    }

    fn take_over(&self, spare: &Path, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
            .open(spare)?;
        let file = regular(file)?;
        if !file.try_lock(LockKind::Exclusive)? {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let flags = rustix::fs::RenameFlags::NOREPLACE;
        rustix::fs::renameat_with(rustix::fs::CWD, spare, rustix::fs::CWD, path, flags)?;
        Ok(file)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        // A pipe in the place of an image must not block the reader.
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        regular(file)
    }

    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_file() => Ok(Some(EntryKind::File)),
            Ok(metadata) if metadata.is_dir() => Ok(Some(EntryKind::Directory)),
            Ok(_) => Ok(Some(EntryKind::Other)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        File::open(dir)?.sync_all()
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        fs::read_dir(dir)?
            .map(|entry| entry.map(|entry| entry.file_name()))
            .collect()
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        let stat = rustix::fs::statvfs(dir)?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }
}

fn regular(file: File) -> io::Result<Box<dyn StorageFile>> {
    if file.metadata()?.is_file() {
        Ok(Box::new(OpenedFile(file)))
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

impl StorageFile for OpenedFile {
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(data, offset)
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(out, offset)
    }

    fn byte_len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        let flags = rustix::fs::FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.0, flags, offset, bytes)?)
    }

    fn trim(&self, bytes: u64) -> io::Result<()> {
        // File systems free blocks past the end even where the length stays as it is.
        self.0.set_len(bytes)
    }

    fn start_writeback(&self, offset: u64, bytes: u64) -> io::Result<()> {
        writeback::start(&self.0, offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn try_lock(&self, kind: LockKind) -> io::Result<bool> {
        let outcome = match kind {
            LockKind::Shared => self.0.try_lock_shared(),
            LockKind::Exclusive => self.0.try_lock(),
        };
        match outcome {
            Ok(()) => Ok(true),
            Err(TryLockError::WouldBlock) => Ok(false),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn holder(&self) -> Option<Holder> {
        lock::holder_of(&self.0)
    }

    fn share(&self, offset: u64, bytes: u64, to: &File, at: u64) -> io::Result<()> {
        reflink::share(&self.0, offset, bytes, to, at)
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        lock::is_at(&self.0, path)
    }
}
