//! Storage in a real directory that is slow, blocks, fails or panics when a test says so.

use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use crate::store::backend::EntryKind;
use crate::store::{FileStorage, LockKind, Storage, StorageFile};
use crate::sys::lock::Holder;

/// An operation that can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    Create,
    Write,
    Sync,
    Rename,
    Remove,
}

#[derive(Clone, Debug, Default)]
pub(crate) struct TroubledStorage {
    inner: FileStorage,
    trouble: Arc<Trouble>,
}

#[derive(Debug, Default)]
struct Trouble {
    script: Mutex<Script>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Script {
    blocked: Vec<Operation>,
    waiting: usize,
    panics: bool,
    fails: Option<io::ErrorKind>,
    /// Writes that succeed before the trouble begins.
    good_writes: usize,
    write_delay: Duration,
}

impl TroubledStorage {
    /// Blocks every `operation` from now on, until `unblock`.
    pub(crate) fn block(&self, operation: Operation) {
        self.trouble.script.lock().unwrap().blocked.push(operation);
    }

    pub(crate) fn unblock(&self) {
        self.trouble.script.lock().unwrap().blocked.clear();
        self.trouble.changed.notify_all();
    }

    /// Waits until a thread is blocked.
    pub(crate) fn wait_for_blocked(&self) {
        let script = self.trouble.script.lock().unwrap();
        let (script, _) = self
            .trouble
            .changed
            .wait_timeout_while(script, Duration::from_secs(20), |script| {
                script.waiting == 0
            })
            .unwrap();
        assert!(script.waiting > 0, "no operation came to be blocked");
    }

    /// Fails every write after `good_writes` ones.
    pub(crate) fn fail_writes(&self, good_writes: usize, kind: io::ErrorKind) {
        let mut script = self.trouble.script.lock().unwrap();
        script.good_writes = good_writes;
        script.fails = Some(kind);
    }

    /// Panics in every write after `good_writes` ones.
    pub(crate) fn panic_in_writes(&self, good_writes: usize) {
        let mut script = self.trouble.script.lock().unwrap();
        script.good_writes = good_writes;
        script.panics = true;
    }

    /// Makes every write take so much longer.
    pub(crate) fn delay_writes(&self, delay: Duration) {
        self.trouble.script.lock().unwrap().write_delay = delay;
    }
}

impl Trouble {
    fn at(&self, operation: Operation) -> io::Result<()> {
        let mut script = self.script.lock().unwrap();
        if script.blocked.contains(&operation) {
            script.waiting += 1;
            self.changed.notify_all();
            script = self
                .changed
                .wait_while(script, |script| script.blocked.contains(&operation))
                .unwrap();
            script.waiting -= 1;
        }
        if operation != Operation::Write {
            return Ok(());
        }
        if script.good_writes > 0 && (script.panics || script.fails.is_some()) {
            script.good_writes -= 1;
            return Ok(());
        }
        let (panics, fails, delay) = (script.panics, script.fails, script.write_delay);
        drop(script);
        assert!(!panics, "the storage panics on purpose");
        if !delay.is_zero() {
            thread::sleep(delay);
        }
        fails.map_or(Ok(()), |kind| Err(kind.into()))
    }
}

#[derive(Debug)]
struct TroubledFile {
    inner: Box<dyn StorageFile>,
    trouble: Arc<Trouble>,
}

impl TroubledStorage {
    fn wrap(&self, inner: Box<dyn StorageFile>) -> Box<dyn StorageFile> {
        Box::new(TroubledFile {
            inner,
            trouble: self.trouble.clone(),
        })
    }
}

impl Storage for TroubledStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.trouble.at(Operation::Create)?;
        self.inner.create_new(path).map(|file| self.wrap(file))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        self.inner.open(path)
    }

    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        self.inner.kind(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.trouble.at(Operation::Rename)?;
        self.inner.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.trouble.at(Operation::Remove)?;
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

impl StorageFile for TroubledFile {
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        self.trouble.at(Operation::Write)?;
        self.inner.write_at(data, offset)
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        self.inner.read_at(out, offset)
    }

    fn byte_len(&self) -> io::Result<u64> {
        self.inner.byte_len()
    }

    fn reserve(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.inner.reserve(offset, bytes)
    }

    fn trim(&self, bytes: u64) -> io::Result<()> {
        self.inner.trim(bytes)
    }

    fn start_writeback(&self, offset: u64, bytes: u64) -> io::Result<()> {
        self.inner.start_writeback(offset, bytes)
    }

    fn sync(&self) -> io::Result<()> {
        self.trouble.at(Operation::Sync)?;
        self.inner.sync()
    }

    fn try_lock(&self, kind: LockKind) -> io::Result<bool> {
        self.inner.try_lock(kind)
    }

    fn holder(&self) -> Option<Holder> {
        self.inner.holder()
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        self.inner.is_at(path)
    }
}
