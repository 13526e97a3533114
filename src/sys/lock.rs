//! Locks between processes, and who holds them.
//!
//! The locks are `flock` locks: they belong to the open file, so that two opens in one process
//! exclude each other too, and they end with the process however it ends.

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{major, minor};

/// Bytes of a lock file that are read to name its holder.
const HOLDER_BYTES_MAX: u64 = 256;

/// How often a lock file that moves away under us is opened again: only a directory that
/// somebody keeps rewriting needs more.
const ATTEMPTS_MAX: u32 = 8;

/// A process that holds a lock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Its process id in our namespace.
    pub pid: u32,
    /// Its command name; empty where it cannot be read.
    pub command: String,
}

impl Holder {
    /// Returns this process.
    pub fn current() -> Self {
        Self::of_pid(std::process::id())
    }

    fn of_pid(pid: u32) -> Self {
        let command = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        Self {
            pid,
            command: command.trim_end().to_owned(),
        }
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.command.is_empty() {
            write!(f, "process {}", self.pid)
        } else {
            write!(f, "process {} ({})", self.pid, self.command)
        }
    }
}

/// Returns a process that holds a lock on `file`, as the kernel tells; `None` where it does not,
/// such as for a process in another container.
pub fn holder_of(file: &File) -> Option<Holder> {
    let metadata = file.metadata().ok()?;
    let locks = fs::read_to_string("/proc/locks").ok()?;
    let device = metadata.dev();
    let wanted = format!(
        "{:02x}:{:02x}:{}",
        major(device),
        minor(device),
        metadata.ino()
    );
    locks.lines().find_map(|line| {
        // `1: FLOCK  ADVISORY  WRITE 1234 fe:00:5678 0 EOF`; a waiter has `->` as second word.
        let mut words = line.split_ascii_whitespace().skip(1);
        let kind = words.next()?;
        let pid = words.nth(2)?;
        let inode = words.next()?;
        if kind != "FLOCK" || inode != wanted {
            return None;
        }
        pid.parse().ok().filter(|&pid| pid > 0).map(Holder::of_pid)
    })
}

/// A lock that somebody else holds, or that cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another open file holds it.
    #[error("{what} is in use{}", by(holder.as_ref()))]
    Held {
        /// What the lock protects.
        what: String,
        /// Who holds it, where that is known.
        holder: Option<Holder>,
    },
    /// The lock file cannot be made, locked or written.
    #[error("could not lock {what} by {}", path.display())]
    Io {
        /// What the lock protects.
        what: String,
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn by(holder: Option<&Holder>) -> String {
    holder.map_or_else(String::new, |holder| format!(" by {holder}"))
}

/// An exclusive lock by way of a file, for things that are no file themselves: a VM's uuid, a
/// name. Ends when dropped.
///
/// The file is left behind: removing it would let two processes lock two files of one name.
#[derive(Debug)]
pub struct LockFile {
    // Closing it ends the lock.
    _file: File,
    path: PathBuf,
}

impl LockFile {
    /// Takes the lock at `path`, which protects `what`, without waiting, and writes this
    /// process's id and command into the file.
    pub fn acquire(path: &Path, what: &str) -> Result<Self, LockError> {
        Self::try_acquire(path).map_err(|failure| match failure {
            Failure::Held(holder) => LockError::Held {
                what: what.to_owned(),
                holder,
            },
            Failure::Io(source) => LockError::Io {
                what: what.to_owned(),
                path: path.to_owned(),
                source,
            },
        })
    }

    /// Returns the path of the lock file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn try_acquire(path: &Path) -> Result<Self, Failure> {
        for _ in 0..ATTEMPTS_MAX {
            let mut file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
                .open(path)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    let holder = holder_of(&file).or_else(|| written_holder(&mut file));
                    return Err(Failure::Held(holder));
                }
                Err(TryLockError::Error(source)) => return Err(source.into()),
            }
            // Somebody may have removed the file between our open and our lock.
            if is_at(&file, path)? {
                let holder = Holder::current();
                file.set_len(0)?;
                file.seek(SeekFrom::Start(0))?;
                writeln!(file, "{} {}", holder.pid, holder.command)?;
                return Ok(Self {
                    _file: file,
                    path: path.to_owned(),
                });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(Failure::Io(io::Error::other("it keeps being replaced")))
    }
}

enum Failure {
    Held(Option<Holder>),
    Io(io::Error),
}

impl From<io::Error> for Failure {
    fn from(source: io::Error) -> Self {
        Self::Io(source)
    }
}

/// Returns whether `path` names the open `file`.
pub fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let open = file.metadata()?;
    match fs::symlink_metadata(path) {
        Ok(named) => Ok((open.dev(), open.ino()) == (named.dev(), named.ino())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads who wrote itself into a lock file.
fn written_holder(file: &mut File) -> Option<Holder> {
    let mut text = String::new();
    file.take(HOLDER_BYTES_MAX).read_to_string(&mut text).ok()?;
    let (pid, command) = text.trim_end().split_once(' ')?;
    Some(Holder {
        pid: pid.parse().ok()?,
        command: command.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_held_lock_is_refused_by_the_name_of_its_holder_until_it_is_dropped() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.lock");
        let first = LockFile::acquire(&path, "domain a").unwrap();
        let refused = LockFile::acquire(&path, "domain a").unwrap_err();
        match &refused {
            LockError::Held { what, holder } => {
                assert_eq!(what, "domain a");
                assert_eq!(holder.as_ref(), Some(&Holder::current()));
            }
            LockError::Io { .. } => panic!("{refused}"),
        }
        assert!(
            refused
                .to_string()
                .contains(&std::process::id().to_string())
        );
        drop(first);
        LockFile::acquire(&path, "domain a").unwrap();
    }

    #[test]
    fn the_lock_file_names_its_holder_for_people() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.lock");
        let lock = LockFile::acquire(&path, "domain a").unwrap();
        let text = fs::read_to_string(lock.path()).unwrap();
        assert!(text.starts_with(&std::process::id().to_string()), "{text}");
        let mut file = File::open(&path).unwrap();
        assert_eq!(written_holder(&mut file), Some(Holder::current()));
    }

    #[test]
    fn a_directory_that_does_not_exist_is_an_error_with_the_path() {
        let error = LockFile::acquire(Path::new("/nowhere/at/all"), "domain a").unwrap_err();
        assert!(error.to_string().contains("/nowhere/at/all"));
    }
}
