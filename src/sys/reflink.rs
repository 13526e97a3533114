//! Files that share their blocks with others, on file systems that have that (XFS, btrfs).
#![expect(unsafe_code, reason = "FICLONERANGE has no safe wrapper in rustix")]

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{Mode, OFlags, fstatvfs, ioctl_ficlone};

/// `struct file_clone_range` of linux/fs.h.
#[repr(C)]
struct CloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

/// `_IOW(0x94, 13, struct file_clone_range)`.
const FICLONERANGE: libc::c_ulong = 0x4020_940d;
const _: () = assert!(size_of::<CloneRange>() == 32);

/// The file that snapshots of another are made in, while there is none.
type Spare = Arc<Mutex<Option<File>>>;

/// Makes snapshots of a file, one at a time. What they are made in is open from the start: a process
/// that gives up its rights later still has it.
#[derive(Debug)]
pub struct Snapshots {
    spare: Spare,
}

impl Snapshots {
    /// Makes ready for snapshots of the regular file at `path`. Where its file system has none, none is
    /// ever made.
    pub fn of(path: &Path) -> Self {
        let spare = Arc::new(Mutex::new(nameless_beside(path)));
        Self { spare }
    }

    /// Makes a file that is `file`, which is that of [`Snapshots::of`], as it is now: they share all
    /// blocks, and what is written to one is not in the other. `None` where the file system cannot,
    /// might not have the room for `file` to be written all over while both are there, or where the last
    /// snapshot is still there.
    ///
    /// Blocks while what was written to `file` goes to the disk.
    pub fn take(&self, file: &File) -> Option<Snapshot> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        let metadata = file.metadata().ok()?;
        let room = fstatvfs(file).ok()?;
        if room.f_bavail.saturating_mul(room.f_frsize) < metadata.blocks() * 512 {
            return None;
        }
        ioctl_ficlone(spare.as_ref()?, file).ok()?;
        let file = spare.take();
        drop(spare);
        let spare = self.spare.clone();
        Some(Snapshot { file, spare })
    }
}

/// A file as it was; it is in the way of no other than the next.
#[derive(Debug)]
pub struct Snapshot {
    /// `None` only while it is dropped.
    file: Option<File>,
    spare: Spare,
}

impl Snapshot {
    /// Returns it for as long as it is there: what is read from it after that means nothing.
    pub fn file(&self) -> io::Result<File> {
        self.file
            .as_ref()
            .expect("there until it is dropped")
            .try_clone()
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        let file = self.file.take();
        // It keeps no room.
        if let Some(Err(error)) = file.as_ref().map(|file| file.set_len(0)) {
            log::warn!("a snapshot keeps its room until the next: {error}");
        }
        *self.spare.lock().unwrap_or_else(PoisonError::into_inner) = file;
    }
}

/// Makes a file without a name, open for reading and writing, in the directory of `path`. `None` where
/// there can be none, or none that shares blocks.
fn nameless_beside(path: &Path) -> Option<File> {
    let path = fs::canonicalize(path).ok()?;
    if !fs::metadata(&path).ok()?.is_file() {
        return None;
    }
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let made = rustix::fs::open(path.parent()?, flags, Mode::RUSR | Mode::WUSR).ok()?;
    // It is empty: nothing is shared, and the file system says whether it would be.
    ioctl_ficlone(&made, &made).ok()?;
    Some(made.into())
}

/// Has `bytes` bytes of `to` from `at` on share blocks with those of `from` from `offset` on, whole
/// blocks both. An error says that the file system cannot.
pub fn share(from: &File, offset: u64, bytes: u64, to: &File, at: u64) -> io::Result<()> {
    let range = CloneRange {
        src_fd: from.as_raw_fd().into(),
        src_offset: offset,
        src_length: bytes,
        dest_offset: at,
    };
    // SAFETY: the kernel reads the struct, which outlives the call; both files are borrowed and open.
    let rc = unsafe { libc::ioctl(to.as_raw_fd(), FICLONERANGE, &raw const range) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
