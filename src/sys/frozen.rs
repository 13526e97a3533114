//! Memory that is written once and then mapped by many, each of whom has a copy of what it writes.
#![expect(unsafe_code, reason = "mapping and unmapping memory by address")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::ptr;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use rustix::mm::{MapFlags, ProtFlags};

use super::anon::{Unmapper, keep_private};
use super::mapping::GuestMapping;

/// What keeps everybody from changing it.
const SEALS: SealFlags = SealFlags::WRITE
    .union(SealFlags::GROW)
    .union(SealFlags::SHRINK)
    .union(SealFlags::SEAL);

/// A memfd that nobody can change any more, in this process or another (fcntl(2), "File Sealing").
#[derive(Debug)]
pub struct FrozenMemory {
    fd: OwnedFd,
    len: usize,
}

/// Memory that is still to be frozen: it reads zeros, and takes none of the host's where it is not
/// written.
#[derive(Debug)]
pub struct Freezer {
    fd: OwnedFd,
    len: usize,
}

impl Freezer {
    /// Makes `len` bytes of memory.
    pub fn new(len: usize) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let fd = memfd_create("shared-guest-memory", flags)?;
        rustix::fs::ftruncate(&fd, len as u64)?;
        Ok(Self { fd, len })
    }

    /// Maps a part of it, to be written. Every such mapping is gone before [`Freezer::freeze`].
    ///
    /// # Panics
    /// When the part is not inside it.
    pub fn map(&self, offset: usize, len: usize) -> io::Result<GuestMapping> {
        map(&self.fd, self.len, offset, len, MapFlags::SHARED)
    }

    /// Has it never change again. Fails with `ResourceBusy` where it is still mapped.
    pub fn freeze(self) -> io::Result<FrozenMemory> {
        fcntl_add_seals(&self.fd, SEALS)?;
        let Self { fd, len } = self;
        Ok(FrozenMemory { fd, len })
    }
}

impl FrozenMemory {
    /// Opens what another process has frozen, by a path such as `/proc/PID/fd/N`. Fails where it
    /// could still be changed.
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = OwnedFd::from(File::open(path)?);
        let sealed = fcntl_get_seals(&fd).is_ok_and(|seals| seals.contains(SEALS));
        let len = usize::try_from(fstat(&fd)?.st_size).ok();
        match len {
            Some(len) if sealed => Ok(Self { fd, len }),
            _ => Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is no memory that was frozen",
            )),
        }
    }

    /// Returns its length in bytes.
    #[expect(
        clippy::len_without_is_empty,
        reason = "a guest's memory is never empty"
    )]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Maps a part of it. Pages are shared with everybody until they are written; what is written is
    /// the mapping's own. Not inherited by a forked child and not part of a core dump.
    ///
    /// # Panics
    /// When the part is not inside it.
    pub fn map_private(&self, offset: usize, len: usize) -> io::Result<GuestMapping> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        map(&self.fd, self.len, offset, len, flags)
    }
}

impl AsFd for FrozenMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl PartialEq for FrozenMemory {
    /// Whether they are the same, not whether they hold the same.
    fn eq(&self, other: &Self) -> bool {
        ptr::eq(self, other)
    }
}

impl Eq for FrozenMemory {}

fn map(
    fd: &OwnedFd,
    total: usize,
    offset: usize,
    len: usize,
    flags: MapFlags,
) -> io::Result<GuestMapping> {
    let inside = offset.checked_add(len).is_some_and(|end| end <= total);
    assert!(
        inside,
        "{len:#x} bytes at {offset:#x} are not inside {total:#x}"
    );
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new mapping at an address that the kernel chooses disturbs no other.
    let base = unsafe { rustix::mm::mmap(ptr::null_mut(), len, access, flags, fd, offset as u64)? };
    let base = base.expose_provenance();
    let owner = Unmapper::new(base, len);
    keep_private(base, len)?;
    // SAFETY: the range is what was just mapped, readable and writable, and stays mapped as long as
    // `owner` lives; nobody else knows its address.
    Ok(unsafe { GuestMapping::new(base, len, Arc::new(owner)) })
}

/// Has a mapping read zeros, in private memory of its own: what it shared is given up.
///
/// Nothing may touch the mapping meanwhile: a write could be lost.
pub fn replace_by_zeros(mapping: &GuestMapping) -> io::Result<()> {
    let (hva, len) = (mapping.hva(), mapping.len());
    let access = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
    // SAFETY: the range is a mapping that lives as long as `mapping`, whose owner unmaps whatever is
    // there in the end; no Rust reference to its memory exists, so changing its content breaks none.
    unsafe {
        rustix::mm::mmap_anonymous(ptr::without_provenance_mut(hva), len, access, flags)?;
    }
    keep_private(hva, len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PAGE_BYTES;

    fn first(mapping: &GuestMapping) -> [u8; 4] {
        let mut bytes = [0; 4];
        mapping.copy_out(PAGE_BYTES, &mut bytes);
        bytes
    }

    #[test]
    fn each_mapping_has_its_own_copy_of_what_it_writes() {
        let freezer = Freezer::new(4 * PAGE_BYTES).unwrap();
        let writable = freezer.map(0, 4 * PAGE_BYTES).unwrap();
        writable.copy_in(PAGE_BYTES, b"once");
        drop(writable);
        let frozen = freezer.freeze().unwrap();
        let one = frozen.map_private(0, 4 * PAGE_BYTES).unwrap();
        let two = frozen.map_private(0, 4 * PAGE_BYTES).unwrap();
        one.copy_in(PAGE_BYTES, b"mine");
        assert_eq!((first(&one), first(&two)), (*b"mine", *b"once"));
        replace_by_zeros(&one).unwrap();
        assert_eq!((first(&one), first(&two)), ([0; 4], *b"once"));
    }

    #[test]
    fn what_could_still_change_is_refused() {
        let freezer = Freezer::new(PAGE_BYTES).unwrap();
        let writable = freezer.map(0, PAGE_BYTES).unwrap();
        let path = |fd: BorrowedFd<'_>| {
            use std::os::fd::AsRawFd as _;
            format!("/proc/self/fd/{}", fd.as_raw_fd())
        };
        FrozenMemory::open(Path::new(&path(freezer.fd.as_fd()))).unwrap_err();
        drop(writable);
        let frozen = freezer.freeze().unwrap();
        let opened = FrozenMemory::open(Path::new(&path(frozen.as_fd()))).unwrap();
        assert_eq!(opened.len(), PAGE_BYTES);
        let file = tempfile::NamedTempFile::new().unwrap();
        FrozenMemory::open(file.path()).unwrap_err();
    }

    #[test]
    fn memory_that_is_still_mapped_is_not_frozen() {
        let freezer = Freezer::new(PAGE_BYTES).unwrap();
        let _writable = freezer.map(0, PAGE_BYTES).unwrap();
        freezer.freeze().unwrap_err();
    }
}
