//! Write protection of guest memory by userfaultfd, for `cow`.

use std::io;
use std::sync::Arc;

use crate::checkpoint::layout::{Layout, Piece};
use crate::guest::Backing;
use crate::page::{PAGE_BYTES, PIECE_BYTES};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sys::userfault::Userfault;

/// Why memory cannot be write-protected on this host.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unprotectable {
    /// The kernel or the privileges do not suffice.
    #[error("userfaultfd cannot be used: {0}")]
    Userfaultfd(io::Error),
    /// Pages are larger than what is captured at once.
    #[error("memory is in huge pages of {} MiB", page_bytes >> 20)]
    HugePages { page_bytes: u64 },
    /// The kernel protects anonymous memory only.
    #[error("this kernel cannot write-protect a memfd or hugetlbfs (it needs Linux 5.19)")]
    Shared,
    /// Somebody else has the memory.
    #[error("a userfaultfd of somebody else has memory slot {slot}: {source}")]
    Taken { slot: u32, source: io::Error },
}

/// Guest memory in the charge of a userfaultfd: who writes protected memory waits.
///
/// [`WriteProtection::end`] lets everybody go, from any thread and at any time; the drop does too.
#[derive(Debug)]
pub(crate) struct WriteProtection {
    userfault: Userfault,
    layout: Arc<Layout>,
    ended: AtomicBool,
}

impl WriteProtection {
    /// Takes charge of all memory; nothing is protected yet.
    pub(crate) fn new(layout: Arc<Layout>) -> Result<Self, Unprotectable> {
        let userfault = Userfault::new().map_err(Unprotectable::Userfaultfd)?;
        for place in layout.regions() {
            match place.backing {
                Backing::Hugetlb { page_bytes } if page_bytes > PIECE_BYTES as u64 => {
                    return Err(Unprotectable::HugePages { page_bytes });
                }
                Backing::Hugetlb { .. } | Backing::Memfd if !userfault.has_shared_memory() => {
                    return Err(Unprotectable::Shared);
                }
                _ => {}
            }
            userfault
                .register(&place.mapping)
                .map_err(|source| Unprotectable::Taken {
                    slot: place.slot,
                    source,
                })?;
        }
        Ok(Self {
            userfault,
            layout,
            ended: AtomicBool::new(false),
        })
    }

    /// Returns the userfaultfd, to wait at.
    pub(crate) fn userfault(&self) -> &Userfault {
        &self.userfault
    }

    /// Protects all memory.
    pub(crate) fn protect_all(&self) -> io::Result<()> {
        self.layout.regions().iter().try_for_each(|place| {
            self.userfault
                .protect(&place.mapping, 0, place.mapping.len())
        })
    }

    /// Protects pieces that follow one another in one region.
    pub(crate) fn protect(&self, pieces: &[Piece]) -> io::Result<()> {
        let [first, ..] = pieces else {
            return Ok(());
        };
        let (offset, _) = bytes_of(first);
        let len = pieces.iter().map(|piece| bytes_of(piece).1).sum();
        let mapping = &self.layout.regions()[first.region].mapping;
        self.userfault.protect(mapping, offset, len)
    }

    /// Lets everybody write a piece. Always the whole of it: a huge page stays whole then.
    pub(crate) fn unprotect(&self, piece: &Piece) -> io::Result<()> {
        let (offset, len) = bytes_of(piece);
        let mapping = &self.layout.regions()[piece.region].mapping;
        match self.userfault.unprotect(mapping, offset, len) {
            // Given up meanwhile: nothing is protected any more.
            Err(_) if self.ended.load(Ordering::Acquire) => Ok(()),
            result => result,
        }
    }

    /// Gives all memory up. Never blocks for anything but the kernel's own locks.
    pub(crate) fn end(&self) {
        self.ended.store(true, Ordering::Release);
        for place in self.layout.regions() {
            if let Err(error) = self.userfault.unregister(&place.mapping) {
                log::error!("could not give up memory slot {}: {error}", place.slot);
            }
        }
    }

    /// Returns whether [`WriteProtection::end`] was called.
    pub(crate) fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

impl Drop for WriteProtection {
    fn drop(&mut self) {
        if !self.has_ended() {
            self.end();
        }
    }
}

fn bytes_of(piece: &Piece) -> (usize, usize) {
    (piece.first_page * PAGE_BYTES, piece.page_count * PAGE_BYTES)
}
