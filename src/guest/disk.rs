//! A guest's disks, as the engine sees them.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

/// What an image says of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFacts {
    /// Its name in the domain, as in `vda`.
    pub name: String,
    /// Where it is on the host.
    pub path: PathBuf,
    /// Its length.
    pub bytes: u64,
    /// Whether the guest can only read it.
    pub read_only: bool,
    /// When its content was changed last, in nanoseconds since 1970; 0 where that is not known.
    pub modified_ns: u64,
}

/// Told of what a disk is about to lose.
pub trait WriteObserver: Send + Sync {
    /// Called before `bytes` bytes from `offset` on are changed. Blocks until what is there is
    /// kept, or is needed no more. Never fails: what goes wrong is the observer's affair, and not
    /// the guest's.
    fn before_write(&self, offset: u64, bytes: u64);
}

/// A disk as it was at a moment, for as long as this is kept. Every method may be called from any
/// thread, and blocks for storage.
pub trait FrozenDisk: Send + Sync + fmt::Debug {
    /// As [`GuestDisk::read_at`].
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;

    /// As [`GuestDisk::next_data`].
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;
}

/// A disk of a guest. Every method may be called from any thread.
pub trait GuestDisk: Send + Sync + fmt::Debug {
    /// Returns what it is.
    fn facts(&self) -> DiskFacts;

    /// Fills `out` from `offset` on. Blocks for storage.
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()>;

    /// Returns the first range from `offset` on that may hold something else than zeros; `None`
    /// where the rest of the disk is zeros.
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>>;

    /// Returns the disk as it is now, made without copying; `None` where its file system cannot.
    /// Later writes do not change it; it is of one moment only where nobody writes meanwhile.
    /// Blocks for storage, until what was written is there: the second of two calls is quick.
    fn freeze(&self) -> io::Result<Option<Box<dyn FrozenDisk>>> {
        Ok(None)
    }

    /// Sets or takes away who is told of writes. Set only between a guest's pause and its resume:
    /// then no write is on its way.
    fn set_write_observer(&self, observer: Option<Arc<dyn WriteObserver>>);
}
