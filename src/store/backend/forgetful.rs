//! A disk that forgets what was not synced: the model under crash tests.
//!
//! Files and names each have a live state and a durable one. Syncing a file makes its bytes
//! durable, syncing a directory its names; nothing else does. [`ForgetfulStorage::crash`] returns
//! the disk as it may be after a power cut: what was durable, and any part of the rest, torn at
//! sectors. It is harsher than any file system, so what survives here survives there.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub use crate::store::backend::noise::Noise;
use crate::store::backend::{EntryKind, LockKind, Storage, StorageFile};
use crate::sys::lock::Holder;

/// A disk writes at least this much at once.
const SECTOR_BYTES: usize = 512;

/// What is to go wrong, by the number of the operation that changes something, from 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct Faults {
    /// The power fails during this operation: it and all later ones fail.
    pub cut_at: Option<u64>,
    /// This operation alone fails so.
    pub fail_at: Option<(u64, io::ErrorKind)>,
    /// Most bytes that one write takes.
    pub write_bytes_max: Option<usize>,
    /// Bytes that all files together may have.
    pub capacity: Option<u64>,
}

/// What survives a power cut of what was not synced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// Nothing.
    Nothing,
    /// Everything.
    Everything,
    /// An arbitrary part, by this seed.
    Some(u64),
}

/// Storage in memory with power cuts and faults. Cloning shares the disk.
#[derive(Clone, Debug)]
pub struct ForgetfulStorage {
    disk: Arc<Mutex<Disk>>,
}

#[derive(Debug, Default)]
struct Disk {
    inodes: Vec<Inode>,
    dirs: Vec<PathBuf>,
    live: BTreeMap<PathBuf, usize>,
    durable: BTreeMap<PathBuf, usize>,
    pending: Vec<NameChange>,
    faults: Faults,
    operations: Vec<String>,
    opens: u64,
}

#[derive(Clone, Debug, Default)]
struct Inode {
    live: Vec<u8>,
    durable: Vec<u8>,
    pending: Vec<(usize, Vec<u8>)>,
    locks: Vec<(u64, LockKind)>,
}

/// A change of names that no directory sync has made durable.
#[derive(Clone, Debug)]
enum NameChange {
    Create {
        path: PathBuf,
        inode: usize,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
        inode: usize,
    },
    Remove {
        path: PathBuf,
    },
}

#[derive(Debug)]
struct OpenedInode {
    disk: Arc<Mutex<Disk>>,
    inode: usize,
    open: u64,
}

impl ForgetfulStorage {
    /// Makes an empty disk with the directories `dirs`.
    pub fn new(dirs: &[&Path]) -> Self {
        Self::of(Disk {
            dirs: dirs.iter().map(|dir| dir.to_path_buf()).collect(),
            ..Disk::default()
        })
    }

    fn of(disk: Disk) -> Self {
        Self {
            disk: Arc::new(Mutex::new(disk)),
        }
    }

    /// Sets what is to go wrong from now on, and counts operations from 0 again.
    pub fn set_faults(&self, faults: Faults) {
        let mut disk = lock(&self.disk);
        disk.faults = faults;
        disk.operations.clear();
    }

    /// Returns the operations that changed something, in order, each as `verb name`.
    pub fn operations(&self) -> Vec<String> {
        lock(&self.disk).operations.clone()
    }

    /// Returns a disk as this one may be after a power cut now. Locks are gone.
    pub fn crash(&self, survival: Survival) -> Self {
        let disk = lock(&self.disk);
        let mut noise = Noise::new(match survival {
            Survival::Some(seed) => seed,
            Survival::Nothing | Survival::Everything => 0,
        });
        let mut survives = |odds: u64| match survival {
            Survival::Nothing => false,
            Survival::Everything => true,
            Survival::Some(_) => !noise.one_in(odds),
        };
        let mut names = disk.durable.clone();
        for change in &disk.pending {
            if survives(2) {
                change.apply(&mut names);
            }
        }
        let inodes = disk.inodes.iter().map(|inode| {
            let bytes = inode.after_crash(&mut survives);
            Inode {
                live: bytes.clone(),
                durable: bytes,
                ..Inode::default()
            }
        });
        Self::of(Disk {
            inodes: inodes.collect(),
            dirs: disk.dirs.clone(),
            live: names.clone(),
            durable: names,
            ..Disk::default()
        })
    }

    /// Puts a file with these durable bytes at `path`.
    pub fn put(&self, path: &Path, bytes: &[u8]) {
        let mut disk = lock(&self.disk);
        let inode = disk.inodes.len();
        disk.inodes.push(Inode {
            live: bytes.to_vec(),
            durable: bytes.to_vec(),
            ..Inode::default()
        });
        disk.live.insert(path.to_owned(), inode);
        disk.durable.insert(path.to_owned(), inode);
    }

    /// Returns the live bytes of the file at `path`.
    pub fn bytes(&self, path: &Path) -> Option<Vec<u8>> {
        let disk = lock(&self.disk);
        let inode = disk.inodes.get(*disk.live.get(path)?)?;
        Some(inode.live.clone())
    }
}

fn lock(disk: &Mutex<Disk>) -> MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

impl NameChange {
    fn apply(&self, names: &mut BTreeMap<PathBuf, usize>) {
        match self {
            Self::Create { path, inode } => {
                names.insert(path.clone(), *inode);
            }
            Self::Rename { from, to, inode } => {
                names.remove(from);
                names.insert(to.clone(), *inode);
            }
            Self::Remove { path } => {
                names.remove(path);
            }
        }
    }

    fn is_in(&self, dir: &Path) -> bool {
        let (Self::Create { path, .. } | Self::Rename { to: path, .. } | Self::Remove { path }) =
            self;
        path.parent() == Some(dir)
    }
}

impl Inode {
    fn write(bytes: &mut Vec<u8>, offset: usize, data: &[u8]) {
        let end = offset + data.len();
        if bytes.len() < end {
            bytes.resize(end, 0);
        }
        if let Some(part) = bytes.get_mut(offset..end) {
            part.copy_from_slice(data);
        }
    }

    /// Returns the bytes after a power cut; `survives` decides sector by sector.
    fn after_crash(&self, survives: &mut impl FnMut(u64) -> bool) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for (offset, data) in &self.pending {
            // Whole writes are lost as often as sectors of them.
            if !survives(3) {
                continue;
            }
            let mut at = *offset;
            for sector in data.chunks(SECTOR_BYTES) {
                if survives(4) {
                    Self::write(&mut bytes, at, sector);
                }
                at += sector.len();
            }
        }
        // File systems may write the new length and not the bytes.
        if survives(2) && bytes.len() < self.live.len() {
            bytes.resize(self.live.len(), 0);
        }
        bytes
    }
}

/// Whether an operation is done, or only begun when the power fails.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Cut,
}

impl Disk {
    fn power_failed() -> io::Error {
        io::Error::other("the power has failed")
    }

    /// Counts an operation and decides its fate. After a cut it may still have reached the disk
    /// in part, so the caller records it as not synced, and then fails.
    fn begin(&mut self, verb: &str, path: &Path) -> io::Result<Outcome> {
        let number = self.operations.len() as u64;
        let name = path.file_name().unwrap_or(path.as_os_str());
        self.operations
            .push(format!("{verb} {}", name.to_string_lossy()));
        if let Some((fail_at, kind)) = self.faults.fail_at
            && fail_at == number
        {
            return Err(kind.into());
        }
        match self.faults.cut_at {
            Some(cut_at) if number > cut_at => Err(Self::power_failed()),
            Some(cut_at) if number == cut_at => Ok(Outcome::Cut),
            _ => Ok(Outcome::Done),
        }
    }

    /// Fails once the power has.
    fn alive(&self) -> io::Result<()> {
        match self.faults.cut_at {
            Some(cut_at) if self.operations.len() as u64 > cut_at => Err(Self::power_failed()),
            _ => Ok(()),
        }
    }

    fn find(&self, path: &Path) -> io::Result<usize> {
        let inode = self.live.get(path).copied();
        inode.ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn change(&mut self, change: NameChange, outcome: Outcome) -> io::Result<()> {
        if outcome == Outcome::Done {
            change.apply(&mut self.live);
        }
        self.pending.push(change);
        end(outcome)
    }

    fn inode(&mut self, inode: usize) -> &mut Inode {
        self.inodes
            .get_mut(inode)
            .expect("inodes are never removed")
    }

    fn name_of(&self, inode: usize) -> PathBuf {
        let named = self.live.iter().find(|(_, other)| **other == inode);
        named.map_or_else(|| PathBuf::from("(removed)"), |(path, _)| path.clone())
    }
}

fn end(outcome: Outcome) -> io::Result<()> {
    match outcome {
        Outcome::Done => Ok(()),
        Outcome::Cut => Err(Disk::power_failed()),
    }
}

impl ForgetfulStorage {
    fn opened(&self, disk: &mut Disk, inode: usize) -> Box<dyn StorageFile> {
        disk.opens += 1;
        Box::new(OpenedInode {
            disk: Arc::clone(&self.disk),
            inode,
            open: disk.opens,
        })
    }
}

impl Storage for ForgetfulStorage {
    fn create_new(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let mut disk = lock(&self.disk);
        if disk.live.contains_key(path) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let outcome = disk.begin("create", path)?;
        let inode = disk.inodes.len();
        disk.inodes.push(Inode::default());
        let change = NameChange::Create {
            path: path.to_owned(),
            inode,
        };
        disk.change(change, outcome)?;
        Ok(self.opened(&mut disk, inode))
    }

    fn open(&self, path: &Path) -> io::Result<Box<dyn StorageFile>> {
        let mut disk = lock(&self.disk);
        disk.alive()?;
        let inode = disk.find(path)?;
        Ok(self.opened(&mut disk, inode))
    }

    fn kind(&self, path: &Path) -> io::Result<Option<EntryKind>> {
        let disk = lock(&self.disk);
        disk.alive()?;
        if disk.dirs.iter().any(|dir| dir == path) {
            return Ok(Some(EntryKind::Directory));
        }
        Ok(disk.live.contains_key(path).then_some(EntryKind::File))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        let inode = disk.find(from)?;
        let outcome = disk.begin("rename to", to)?;
        let change = NameChange::Rename {
            from: from.to_owned(),
            to: to.to_owned(),
            inode,
        };
        disk.change(change, outcome)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        disk.find(path)?;
        let outcome = disk.begin("remove", path)?;
        let change = NameChange::Remove {
            path: path.to_owned(),
        };
        disk.change(change, outcome)
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        let outcome = disk.begin("sync-dir", dir)?;
        if outcome == Outcome::Done {
            let pending = std::mem::take(&mut disk.pending);
            let (synced, rest): (Vec<_>, Vec<_>) =
                pending.into_iter().partition(|change| change.is_in(dir));
            disk.pending = rest;
            for change in synced {
                change.apply(&mut disk.durable);
            }
        }
        end(outcome)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<OsString>> {
        let disk = lock(&self.disk);
        disk.alive()?;
        let inside = disk.live.keys().filter(|path| path.parent() == Some(dir));
        Ok(inside
            .filter_map(|path| path.file_name().map(OsString::from))
            .collect())
    }

    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        let disk = lock(&self.disk);
        disk.alive()?;
        let used: u64 = disk
            .inodes
            .iter()
            .map(|inode| inode.live.len() as u64)
            .sum();
        let capacity = disk.faults.capacity.unwrap_or(u64::MAX);
        Ok(capacity.saturating_sub(used))
    }
}

impl StorageFile for OpenedInode {
    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<usize> {
        let mut disk = lock(&self.disk);
        let name = disk.name_of(self.inode);
        let outcome = disk.begin("write", &name)?;
        let most = disk.faults.write_bytes_max.unwrap_or(usize::MAX);
        let data = data.get(..most).unwrap_or(data);
        let offset = usize::try_from(offset).map_err(|_| io::ErrorKind::FileTooLarge)?;
        let end_of_write = (offset + data.len()) as u64;
        if disk.faults.capacity.is_some_and(|most| end_of_write > most) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let inode = disk.inode(self.inode);
        if outcome == Outcome::Done {
            Inode::write(&mut inode.live, offset, data);
        }
        inode.pending.push((offset, data.to_vec()));
        end(outcome)?;
        Ok(data.len())
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut disk = lock(&self.disk);
        disk.alive()?;
        let inode = disk.inode(self.inode);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let rest = inode.live.get(start..).unwrap_or_default();
        let bytes = rest.len().min(out.len());
        for (to, from) in out.iter_mut().zip(rest) {
            *to = *from;
        }
        Ok(bytes)
    }

    fn byte_len(&self) -> io::Result<u64> {
        let mut disk = lock(&self.disk);
        disk.alive()?;
        Ok(disk.inode(self.inode).live.len() as u64)
    }

    // Hints: they change neither bytes nor what survives, so they are no operations.
    fn reserve(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        lock(&self.disk).alive()
    }

    fn trim(&self, bytes: u64) -> io::Result<()> {
        assert_eq!(self.byte_len()?, bytes, "a trim keeps the length");
        Ok(())
    }

    fn start_writeback(&self, _offset: u64, _bytes: u64) -> io::Result<()> {
        lock(&self.disk).alive()
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = lock(&self.disk);
        let name = disk.name_of(self.inode);
        let outcome = disk.begin("sync", &name)?;
        let inode = disk.inode(self.inode);
        if outcome == Outcome::Done {
            inode.durable.clone_from(&inode.live);
            inode.pending.clear();
        }
        end(outcome)
    }

    fn try_lock(&self, kind: LockKind) -> io::Result<bool> {
        let mut disk = lock(&self.disk);
        disk.alive()?;
        let locks = &mut disk.inode(self.inode).locks;
        let conflict = locks.iter().any(|&(open, other)| {
            open != self.open && (kind, other) != (LockKind::Shared, LockKind::Shared)
        });
        if !conflict {
            locks.retain(|&(open, _)| open != self.open);
            locks.push((self.open, kind));
        }
        Ok(!conflict)
    }

    fn holder(&self) -> Option<Holder> {
        Some(Holder::current())
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        let disk = lock(&self.disk);
        disk.alive()?;
        Ok(disk.live.get(path) == Some(&self.inode))
    }
}

impl Drop for OpenedInode {
    fn drop(&mut self) {
        let open = self.open;
        let mut disk = lock(&self.disk);
        disk.inode(self.inode).locks.retain(|lock| lock.0 != open);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DIR: &str = "/disk";

    fn disk() -> ForgetfulStorage {
        ForgetfulStorage::new(&[Path::new(DIR)])
    }

    fn path(name: &str) -> PathBuf {
        Path::new(DIR).join(name)
    }

    #[test]
    fn unsynced_bytes_and_names_are_lost_and_synced_ones_are_not() {
        let disk = disk();
        let file = disk.create_new(&path("a")).unwrap();
        file.write_all_at(b"first", 0).unwrap();
        assert_eq!(disk.crash(Survival::Nothing).bytes(&path("a")), None);
        disk.sync_dir(Path::new(DIR)).unwrap();
        let crashed = disk.crash(Survival::Nothing);
        assert_eq!(crashed.bytes(&path("a")).unwrap(), b"");
        file.sync().unwrap();
        file.write_all_at(b"F", 0).unwrap();
        let crashed = disk.crash(Survival::Nothing);
        assert_eq!(crashed.bytes(&path("a")).unwrap(), b"first");
        let kept = disk.crash(Survival::Everything);
        assert_eq!(kept.bytes(&path("a")).unwrap(), b"First");
    }

    #[test]
    fn a_crash_is_repeatable_by_its_seed_and_seeds_differ() {
        let disk = disk();
        let file = disk.create_new(&path("a")).unwrap();
        disk.sync_dir(Path::new(DIR)).unwrap();
        file.write_all_at(&[7; 64 * SECTOR_BYTES], 0).unwrap();
        let bytes = |seed| disk.crash(Survival::Some(seed)).bytes(&path("a"));
        assert_eq!(bytes(3), bytes(3));
        assert!((0..20).any(|seed| bytes(seed) != bytes(seed + 1)));
    }

    #[test]
    fn after_a_cut_everything_fails() {
        let disk = disk();
        disk.set_faults(Faults {
            cut_at: Some(1),
            ..Faults::default()
        });
        let file = disk.create_new(&path("a")).unwrap();
        file.write_all_at(b"x", 0).unwrap_err();
        file.sync().unwrap_err();
        disk.open(&path("a")).unwrap_err();
        assert_eq!(disk.operations(), ["create a", "write a", "sync a"]);
    }

    #[test]
    fn locks_are_shared_or_alone_and_end_with_the_open_file() {
        let disk = disk();
        disk.put(&path("a"), b"");
        let one = disk.open(&path("a")).unwrap();
        let two = disk.open(&path("a")).unwrap();
        assert!(one.try_lock(LockKind::Shared).unwrap());
        assert!(two.try_lock(LockKind::Shared).unwrap());
        assert!(!two.try_lock(LockKind::Exclusive).unwrap());
        drop(one);
        assert!(two.try_lock(LockKind::Exclusive).unwrap());
    }
}
