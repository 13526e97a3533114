//! Where the daemon keeps things, and how files are written whole or not at all.

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::error::DaemonError;
use crate::host::{RuntimeDir, sync_dir_of, write_whole_file};

/// Longest file name of a domain or snapshot, less an ending.
const ENCODED_BYTES_MAX: usize = 240;

/// The daemon's directories.
#[derive(Clone, Debug)]
pub struct Paths {
    /// Definitions, and which of them start with the host.
    pub config: PathBuf,
    /// Snapshots, managed saves, logs.
    pub state: PathBuf,
    /// What ends with the host's uptime: sockets, and records of running workers.
    pub runtime: RuntimeDir,
}

impl Paths {
    /// Makes the directories that are missing.
    pub fn prepare(&self) -> Result<(), DaemonError> {
        for dir in [
            self.definitions(),
            self.autostart(),
            self.saves(),
            self.snapshots_of_all(),
            self.outboxes(),
            self.logs(),
            self.workers(),
        ] {
            make_dir(&dir)?;
        }
        Ok(())
    }

    pub(super) fn definitions(&self) -> PathBuf {
        self.config.join("domains")
    }

    pub(super) fn autostart(&self) -> PathBuf {
        self.config.join("autostart")
    }

    pub(super) fn saves(&self) -> PathBuf {
        self.state.join("save")
    }

    pub(super) fn managed_save(&self, uuid: Uuid) -> PathBuf {
        self.saves().join(format!("{uuid}.lpi"))
    }

    pub(super) fn snapshots_of_all(&self) -> PathBuf {
        self.state.join("snapshots")
    }

    pub(super) fn snapshots(&self, uuid: Uuid) -> PathBuf {
        self.snapshots_of_all().join(uuid.to_string())
    }

    /// Returns where the process of a domain puts images, for the daemon to move them.
    pub(super) fn outbox(&self, uuid: Uuid) -> PathBuf {
        self.outboxes().join(uuid.to_string())
    }

    pub(super) fn outboxes(&self) -> PathBuf {
        self.state.join("outbox")
    }

    pub(super) fn logs(&self) -> PathBuf {
        self.state.join("log")
    }

    pub(super) fn workers(&self) -> PathBuf {
        self.runtime.path().join("daemon")
    }

    /// Returns the file that says that what starts with the host has been started.
    pub(super) fn autostarted(&self) -> PathBuf {
        self.workers().join("autostarted")
    }

    /// Returns the file of a running domain with `ending`.
    pub(super) fn worker(&self, uuid: Uuid, ending: &str) -> PathBuf {
        self.workers().join(format!("{uuid}.{ending}"))
    }
}

/// Makes a directory that only its owner can use, and those above it.
pub(super) fn make_dir(dir: &Path) -> Result<(), DaemonError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(|source| DaemonError::path("make the directory", dir, source))
}

/// Replaces a file: whoever reads it, also after a crash, finds the old content or the new one.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> Result<(), DaemonError> {
    write_whole_file(path, content).map_err(|source| DaemonError::path("write", path, source))
}

/// Removes a file, if it is there, so that it stays removed.
pub(super) fn remove(path: &Path) -> Result<(), DaemonError> {
    match fs::remove_file(path).and_then(|()| sync_dir_of(path)) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DaemonError::path("remove", path, source))
        }
        _ => Ok(()),
    }
}

/// Returns a name as a file's name: what could be anything but a name is written as `%xx`. `None`
/// for a name that is too long for that.
pub(super) fn file_name(name: &str) -> Option<String> {
    let mut encoded = String::new();
    for (at, byte) in name.bytes().enumerate() {
        if byte.is_ascii_alphanumeric() || b"-_".contains(&byte) || (byte == b'.' && at > 0) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02x}"));
        }
    }
    (1..=ENCODED_BYTES_MAX)
        .contains(&encoded.len())
        .then_some(encoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_different_file_names_in_the_same_directory() {
        let names = ["a", "A", "a/b", "..", ".", "%2e", "a b", "ä", "a.b"];
        let files: std::collections::BTreeSet<_> =
            names.iter().map(|name| file_name(name).unwrap()).collect();
        assert_eq!(files.len(), names.len());
        assert!(
            files
                .iter()
                .all(|file| !file.starts_with('.') && !file.contains('/'))
        );
        assert_eq!(file_name(""), None);
        assert_eq!(file_name(&"/".repeat(100)), None);
    }

    #[test]
    fn a_file_is_removed_if_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        write_whole(&file, b"one").unwrap();
        remove(&file).unwrap();
        remove(&file).unwrap();
    }
}
