//! Persistent domains: one XML file each, named after the UUID, so that a rename is one change.

use std::fs;
use std::os::unix::fs::symlink;

use uuid::Uuid;

use super::error::DaemonError;
use super::paths::{Paths, remove, write_whole};
use crate::host::{DomainConfig, XmlView};

/// A definition that was found on disk.
#[derive(Debug)]
pub(super) struct Definition {
    pub(super) config: DomainConfig,
    pub(super) autostart: bool,
}

/// Reads all definitions. One that cannot be read is named in the log, and left as it is.
pub(super) fn load(paths: &Paths) -> Result<Vec<Definition>, DaemonError> {
    let dir = paths.definitions();
    let entries = fs::read_dir(&dir).map_err(|source| DaemonError::path("list", &dir, source))?;
    let mut found = Vec::new();
    for entry in entries.filter_map(Result::ok) {
        let path = entry.path();
        if path.extension().is_none_or(|ending| ending != "xml") {
            continue;
        }
        let config = fs::read(&path)
            .map_err(|error| error.to_string())
            .and_then(|xml| DomainConfig::parse_bytes(&xml).map_err(|error| error.to_string()));
        match config {
            Ok(config) if path == paths.definitions().join(file_of(config.uuid)) => {
                let autostart = paths.autostart().join(file_of(config.uuid)).is_symlink();
                found.push(Definition { config, autostart });
            }
            Ok(config) => log::error!("{} has the UUID {}: not used", path.display(), config.uuid),
            Err(error) => log::error!("{}: {error}: not used", path.display()),
        }
    }
    found.sort_by(|a, b| a.config.name.cmp(&b.config.name));
    Ok(found)
}

fn file_of(uuid: Uuid) -> String {
    format!("{uuid}.xml")
}

/// Keeps a definition.
pub(super) fn save(paths: &Paths, config: &DomainConfig) -> Result<(), DaemonError> {
    let file = paths.definitions().join(file_of(config.uuid));
    write_whole(&file, config.to_xml(XmlView::Inactive).as_bytes())
}

/// Forgets a definition.
pub(super) fn forget(paths: &Paths, uuid: Uuid) -> Result<(), DaemonError> {
    remove(&paths.autostart().join(file_of(uuid)))?;
    remove(&paths.definitions().join(file_of(uuid)))
}

/// Sets whether a domain starts with the daemon.
pub(super) fn set_autostart(paths: &Paths, uuid: Uuid, on: bool) -> Result<(), DaemonError> {
    let link = paths.autostart().join(file_of(uuid));
    if !on {
        return remove(&link);
    }
    if link.is_symlink() {
        return Ok(());
    }
    symlink(paths.definitions().join(file_of(uuid)), &link)
        .map_err(|source| DaemonError::path("make the link", &link, source))
}
