//! Storage whose reads stop after so many bytes, until they are let go on.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};

use livepoint::store::{EntryKind, FileStorage, LockKind, Storage, StorageFile};
use livepoint::sys::lock::Holder;

/// How much may still be read; `None` where nothing is held up.
#[derive(Debug, Default)]
pub struct Gate {
    left: Mutex<Option<u64>>,
    changed: Condvar,
}

impl Gate {
    /// Lets `bytes` more be read, and holds up who reads on.
    pub fn close_after(&self, bytes: u64) {
        *self.left.lock().unwrap() = Some(bytes);
    }

    /// Lets everybody read.
    pub fn open(&self) {
        *self.left.lock().unwrap() = None;
        self.changed.notify_all();
    }

    /// Returns whether all that may be read was.
    pub fn is_used(&self) -> bool {
        *self.left.lock().unwrap() == Some(0)
    }

    fn pass(&self, bytes: u64) {
        let mut left = self.left.lock().unwrap();
        while *left == Some(0) {
            left = self.changed.wait(left).unwrap();
        }
        if let Some(left) = &mut *left {
            *left = left.saturating_sub(bytes);
        }
    }
}

/// Files of the host, read through a gate.
#[derive(Debug)]
pub struct GatedStorage(pub Arc<Gate>);

#[derive(Debug)]
struct GatedFile {
    file: Box<dyn StorageFile>,
    gate: Arc<Gate>,
}

impl Storage for GatedStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        FileStorage.create_new(path)
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let (file, gate) = (FileStorage.open(path)?, self.0.clone());
        Ok(Box::new(GatedFile { file, gate }))
    }

    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        FileStorage.kind(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        FileStorage.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        FileStorage.remove(path)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        FileStorage.sync_dir(dir)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        FileStorage.list(dir)
    }

    fn free_bytes(&self, dir: &Path) -> io::Result<u64> {
        FileStorage.free_bytes(dir)
    }
}

impl StorageFile for GatedFile {
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        self.file.write_at(data, offset)
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        self.gate.pass(out.len() as u64);
        self.file.read_at(out, offset)
    }

    fn byte_len(&self) -> io::Result<u64> {
        self.file.byte_len()
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.file.reserve(offset, bytes)
    }

    fn trim(&self, bytes: u64) -> io::Result<()> {
        self.file.trim(bytes)
    }

    fn start_writeback(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.file.start_writeback(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn try_lock(&self, kind: LockKind) -> io::Result<bool> {
        self.file.try_lock(kind)
    }

    fn holder(&self) -> Option<Holder> {
        self.file.holder()
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        self.file.is_at(path)
    }
}
