//! Snapshots of a domain: a tree of names, each with its document and, where the domain ran, an
//! image. On disk one JSON file each, so that they outlive the daemon.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::DaemonError;
use super::paths::{Paths, file_name, make_dir, remove, write_whole};
use super::xml::escape;
use crate::rpc::{Code, RpcError};

/// Snapshots of one domain, at most: what a list of the protocol holds.
const SNAPSHOTS_MAX: usize = 16_384;

/// What the domain was doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) enum SnapshotState {
    Running,
    Paused,
    Shutoff,
}

impl SnapshotState {
    pub(super) fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutoff => "shutoff",
        }
    }

    pub(super) fn from_word(word: &str) -> Option<Self> {
        [Self::Running, Self::Paused, Self::Shutoff]
            .into_iter()
            .find(|state| state.word() == word)
    }
}

/// A snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Snapshot {
    pub(super) name: String,
    pub(super) description: Option<String>,
    pub(super) parent: Option<String>,
    /// Seconds since 1970.
    pub(super) created: i64,
    pub(super) state: SnapshotState,
    /// The image with the memory; none for a domain that did not run.
    pub(super) image: Option<PathBuf>,
    /// Whether the user named the image's file.
    pub(super) is_external: bool,
    /// The disks whose content is in the image.
    #[serde(default)]
    pub(super) disks: Vec<String>,
    /// The domain's document at that moment.
    pub(super) domain_xml: String,
    /// Whether the image is still being written.
    #[serde(default)]
    pub(super) is_pending: bool,
}

impl Snapshot {
    /// Returns its document.
    pub(super) fn to_xml(&self) -> String {
        let mut xml = format!("<domainsnapshot>\n  <name>{}</name>\n", escape(&self.name));
        if let Some(description) = &self.description {
            xml += &format!("  <description>{}</description>\n", escape(description));
        }
        xml += &format!("  <state>{}</state>\n", self.state.word());
        if let Some(parent) = &self.parent {
            xml += &format!(
                "  <parent>\n    <name>{}</name>\n  </parent>\n",
                escape(parent)
            );
        }
        xml += &format!("  <creationTime>{}</creationTime>\n", self.created);
        xml += &match &self.image {
            None => "  <memory snapshot='no'/>\n".to_owned(),
            Some(image) if self.is_external => {
                let file = escape(&image.to_string_lossy());
                format!("  <memory snapshot='external' file='{file}'/>\n")
            }
            Some(_) => "  <memory snapshot='internal'/>\n".to_owned(),
        };
        if !self.disks.is_empty() {
            xml += "  <disks>\n";
            for name in &self.disks {
                let name = escape(name);
                xml += &format!("    <disk name='{name}' snapshot='internal'/>\n");
            }
            xml += "  </disks>\n";
        }
        for line in self.domain_xml.lines() {
            xml += &format!("  {line}\n");
        }
        xml + "</domainsnapshot>\n"
    }
}

/// The snapshots of a domain.
#[derive(Debug)]
pub(super) struct Snapshots {
    dir: PathBuf,
    by_name: BTreeMap<String, Snapshot>,
    current: Option<String>,
}

impl Snapshots {
    /// Makes those of a domain that has none.
    pub(super) fn none(paths: &Paths, uuid: Uuid) -> Self {
        Self {
            dir: paths.snapshots(uuid),
            by_name: BTreeMap::new(),
            current: None,
        }
    }

    /// Reads those that are on disk. One that cannot be read is named in the log and left.
    pub(super) fn load(paths: &Paths, uuid: Uuid) -> Self {
        let mut loaded = Self::none(paths, uuid);
        let entries = fs::read_dir(&loaded.dir).into_iter().flatten();
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if path.extension().is_none_or(|ending| ending != "json") {
                continue;
            }
            let read = fs::read(&path).map_err(|error| error.to_string());
            let read = read.and_then(|json| {
                serde_json::from_slice::<Snapshot>(&json).map_err(|error| error.to_string())
            });
            match read {
                Ok(snapshot) => {
                    loaded.by_name.insert(snapshot.name.clone(), snapshot);
                }
                Err(error) => log::error!("{}: {error}: not used", path.display()),
            }
        }
        let current = fs::read_to_string(loaded.current_file()).ok();
        loaded.current = current.filter(|name| loaded.by_name.contains_key(name));
        loaded
    }

    fn current_file(&self) -> PathBuf {
        self.dir.join("current")
    }

    fn file(&self, name: &str, ending: &str) -> Result<PathBuf, RpcError> {
        let file = file_name(name).ok_or_else(|| {
            RpcError::new(
                Code::InvalidArg,
                format!("the snapshot name '{name}' is empty or too long"),
            )
        })?;
        Ok(self.dir.join(format!("{file}.{ending}")))
    }

    /// Returns where the image of a snapshot goes that names no file.
    pub(super) fn image_file(&self, name: &str) -> Result<PathBuf, RpcError> {
        self.file(name, "lpi")
    }

    /// Returns the snapshots that are complete, by name.
    pub(super) fn iter(&self) -> impl Iterator<Item = &Snapshot> {
        self.by_name
            .values()
            .filter(|snapshot| !snapshot.is_pending)
    }

    pub(super) fn count(&self) -> usize {
        self.iter().count()
    }

    pub(super) fn pending(&self) -> Vec<Snapshot> {
        let pending = self.by_name.values().filter(|snapshot| snapshot.is_pending);
        pending.cloned().collect()
    }

    /// Returns a snapshot by its name.
    pub(super) fn get(&self, name: &str) -> Result<&Snapshot, RpcError> {
        let found = self
            .by_name
            .get(name)
            .filter(|snapshot| !snapshot.is_pending);
        found.ok_or_else(|| {
            RpcError::new(
                Code::NoDomainSnapshot,
                format!("no domain snapshot with matching name '{name}'"),
            )
        })
    }

    /// Returns whether the name is taken, also by one that is not complete.
    pub(super) fn is_taken(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// Returns the name of the one that the domain is, or was last, at.
    pub(super) fn current(&self) -> Option<&str> {
        self.current.as_deref()
    }

    /// Keeps a snapshot, new or changed.
    pub(super) fn put(&mut self, snapshot: Snapshot) -> Result<(), RpcError> {
        if !self.is_taken(&snapshot.name) && self.by_name.len() >= SNAPSHOTS_MAX {
            return Err(RpcError::new(
                Code::OperationFailed,
                format!("the domain has {SNAPSHOTS_MAX} snapshots"),
            ));
        }
        make_dir(&self.dir)?;
        let json = serde_json::to_vec_pretty(&snapshot)
            .expect("a snapshot is plain data with string keys");
        write_whole(&self.file(&snapshot.name, "json")?, &json)?;
        self.by_name.insert(snapshot.name.clone(), snapshot);
        Ok(())
    }

    pub(super) fn set_current(&mut self, name: Option<&str>) -> Result<(), DaemonError> {
        match name {
            Some(name) => write_whole(&self.current_file(), name.as_bytes())?,
            None => remove(&self.current_file())?,
        }
        self.current = name.map(str::to_owned);
        Ok(())
    }

    /// Forgets a snapshot, and its image unless `keep_image`. Its children become those of its
    /// parent.
    pub(super) fn remove(&mut self, name: &str, keep_image: bool) -> Result<(), RpcError> {
        let Some(gone) = self.by_name.get(name).cloned() else {
            return Ok(());
        };
        let children: Vec<_> = self.children(name).cloned().collect();
        for mut child in children {
            child.parent = gone.parent.clone();
            self.put(child)?;
        }
        if self.current() == Some(name) {
            let parent = gone.parent.clone().filter(|parent| self.is_taken(parent));
            self.set_current(parent.as_deref())?;
        }
        // The image last: what names no image any more is only garbage, not a broken snapshot.
        remove(&self.file(name, "json")?)?;
        self.by_name.remove(name);
        if let Some(image) = gone.image.filter(|_| !keep_image) {
            remove(&image)?;
        }
        Ok(())
    }

    /// Forgets all of them, and keeps their images where they are.
    pub(super) fn forget_all(&mut self) -> Result<(), RpcError> {
        let names: Vec<_> = self.by_name.keys().cloned().collect();
        for name in names {
            self.remove(&name, true)?;
        }
        remove_dir_if_empty(&self.dir);
        Ok(())
    }

    /// Returns the children of a snapshot.
    pub(super) fn children<'a, 'n: 'a>(
        &'a self,
        name: &'n str,
    ) -> impl Iterator<Item = &'a Snapshot> + use<'a, 'n> {
        self.iter()
            .filter(move |snapshot| snapshot.parent.as_deref() == Some(name))
    }

    /// Returns a snapshot's descendants, parents before children.
    pub(super) fn descendants<'a>(&'a self, name: &str) -> Vec<&'a Snapshot> {
        let is_child = |snapshot: &&Snapshot| snapshot.parent.as_deref() == Some(name);
        let mut found: Vec<&'a Snapshot> = self.iter().filter(is_child).collect();
        let mut at = 0;
        // A file that was tampered with could hold a circle.
        while let Some(next) = found.get(at).filter(|_| found.len() <= SNAPSHOTS_MAX) {
            let below: Vec<_> = self.children(&next.name).collect();
            found.extend(below);
            at += 1;
        }
        found
    }
}

fn remove_dir_if_empty(dir: &Path) {
    if let Err(error) = fs::remove_dir(dir) {
        log::debug!("{}: {error}", dir.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::RuntimeDir;

    fn snapshot(name: &str, parent: Option<&str>) -> Snapshot {
        Snapshot {
            name: name.to_owned(),
            description: None,
            parent: parent.map(str::to_owned),
            created: 1,
            state: SnapshotState::Shutoff,
            image: None,
            is_external: false,
            disks: Vec::new(),
            domain_xml: "<domain/>".to_owned(),
            is_pending: false,
        }
    }

    #[test]
    fn the_tree_outlives_the_daemon_and_children_of_what_is_deleted_move_up() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths {
            config: dir.path().join("c"),
            state: dir.path().join("s"),
            runtime: RuntimeDir::at(dir.path().join("r")).unwrap(),
        };
        let uuid = Uuid::new_v4();
        let mut snapshots = Snapshots::load(&paths, uuid);
        for (name, parent) in [
            ("a", None),
            ("b", Some("a")),
            ("c/d", Some("b")),
            ("e", Some("b")),
        ] {
            snapshots.put(snapshot(name, parent)).unwrap();
        }
        snapshots.set_current(Some("b")).unwrap();
        assert_eq!(snapshots.descendants("a").len(), 3);
        snapshots.remove("b", false).unwrap();
        let again = Snapshots::load(&paths, uuid);
        assert_eq!(again.current(), Some("a"));
        assert_eq!(again.children("a").count(), 2);
        assert!(again.get("b").is_err());
        assert!(
            again
                .get("c/d")
                .unwrap()
                .to_xml()
                .contains("<name>c/d</name>")
        );
    }
}
