//! The commit point: where a checkpoint and its cancellation meet.
//!
//! A commit may hang in the kernel for as long as the disk likes, and cannot be called back. So
//! its one rename goes through a gate that a cancel closes: a commit that comes to a closed gate
//! fails and removes its temporary file, whenever it wakes up.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::store::backend::EntryKind;
use crate::store::{Storage, StorageFile};
use crate::sync::atomic::{AtomicU8, Ordering};

const OPEN: u8 = 0;
const CLOSED: u8 = 1;
const PASSED: u8 = 2;

/// Let through once, by the commit, or closed for good, by a cancel or a failure.
#[derive(Debug, Default)]
pub(crate) struct CommitGate(AtomicU8);

impl CommitGate {
    /// Closes the gate; false where the commit has passed it.
    pub(crate) fn close(&self) -> bool {
        let before = self
            .0
            .compare_exchange(OPEN, CLOSED, Ordering::AcqRel, Ordering::Acquire);
        before != Err(PASSED)
    }

    /// Passes the gate; false where it is closed.
    pub(crate) fn pass(&self) -> bool {
        let before = self
            .0
            .compare_exchange(OPEN, PASSED, Ordering::AcqRel, Ordering::Acquire);
        before != Err(CLOSED)
    }
}

/// Storage whose renames pass the gate. An image is renamed once, by its commit; a spare file that
/// is taken over is not renamed by [`Storage::rename`].
#[derive(Debug)]
pub(crate) struct GatedStorage {
    inner: Arc<dyn Storage>,
    gate: Arc<CommitGate>,
}

impl GatedStorage {
    pub(crate) fn new(inner: Arc<dyn Storage>, gate: Arc<CommitGate>) -> Self {
        Self { inner, gate }
    }
}

impl Storage for GatedStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.inner.create_new(path)
    }

    fn take_over(&self, spare: &Path, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.inner.take_over(spare, path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.inner.open(path)
    }

    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        self.inner.kind(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        if !self.gate.pass() {
            return Err(io::Error::new(
                io::ErrorKind::Interrupted,
                "the checkpoint was stopped before its commit",
            ));
        }
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.inner.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.inner.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        self.inner.list(dir)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        self.inner.free_bytes(dir)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::FileStorage;
    use std::fs;

    #[test]
    fn whoever_comes_first_to_the_gate_wins() {
        let gate = CommitGate::default();
        assert!(gate.close());
        assert!(!gate.pass());
        let gate = CommitGate::default();
        assert!(gate.pass());
        assert!(!gate.close());
    }

    #[test]
    fn a_rename_after_a_cancel_changes_no_name() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("part"), dir.path().join("image"));
        fs::write(&from, "new").unwrap();
        fs::write(&to, "old").unwrap();
        let gate = Arc::new(CommitGate::default());
        gate.close();
        let storage = GatedStorage::new(Arc::new(FileStorage), gate);
        storage.rename(&from, &to).unwrap_err();
        assert_eq!(fs::read_to_string(&to).unwrap(), "old");
    }
}
