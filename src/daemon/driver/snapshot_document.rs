//! What the document of a snapshot asks for: where its image goes, how the checkpoint is taken, and
//! which disks it has.

use std::path::{Path, PathBuf};

use super::Answer;
use crate::daemon::texts;
use crate::daemon::xml::{self, Element};
use crate::host::{CheckpointRequest, DomainConfig, METADATA_NAMESPACE};
use crate::rpc::{Code, RpcError};

/// Attributes of `<checkpoint>` that do not say how one checkpoint is taken.
const PERIODIC: [&str; 3] = ["every", "keep", "directory"];

fn unsupported(why: impl Into<String>) -> RpcError {
    RpcError::new(Code::ConfigUnsupported, why)
}

/// Returns the file that the document names for the memory, if it names one.
pub(super) fn external_memory(document: &Element, is_live: bool) -> Answer<Option<PathBuf>> {
    let Some(memory) = document.child("memory") else {
        return Ok(None);
    };
    match memory.attribute("snapshot") {
        Some("external") => {
            let file = memory.attribute("file").unwrap_or_default();
            if !file.starts_with('/') {
                return Err(RpcError::new(
                    Code::XmlError,
                    format!("memory snapshot file path ({file}) must be absolute"),
                ));
            }
            if !is_live {
                return Err(unsupported(
                    "memory state cannot be saved with offline or disk-only snapshot",
                ));
            }
            if Path::new(file).exists() {
                return Err(RpcError::new(
                    Code::OperationFailed,
                    format!("the memory file {file} exists already"),
                ));
            }
            Ok(Some(PathBuf::from(file)))
        }
        Some("no") if is_live => Err(unsupported("a running domain's snapshot has its memory")),
        _ => Ok(None),
    }
}

/// Returns the checkpoint that the document, or the domain's metadata, asks for.
pub(super) fn request(document: &Element, config: &DomainConfig) -> Answer<CheckpointRequest> {
    let is_ours = |element: &&Element| {
        let prefix = element.name.strip_suffix("checkpoint").unwrap_or("\0");
        let key = match prefix.strip_suffix(':') {
            Some(prefix) => format!("xmlns:{prefix}"),
            None => "xmlns".to_owned(),
        };
        element.attribute(&key) == Some(METADATA_NAMESPACE)
    };
    let in_document = document.children.iter().find(is_ours).cloned();
    let in_metadata = || {
        let xml = texts::element(config, METADATA_NAMESPACE).ok()?;
        xml::read(&xml, "checkpoint").ok()
    };
    // In the domain's own, an interval and what belongs to it is for the domain's process.
    let (element, others) = match in_document {
        Some(element) => (element, [].as_slice()),
        None => (in_metadata().unwrap_or_default(), PERIODIC.as_slice()),
    };
    let is_how =
        |name: &str| name != "xmlns" && !name.starts_with("xmlns:") && !others.contains(&name);
    let attributes = element.attributes.into_iter();
    let how: Vec<_> = attributes.filter(|(name, _)| is_how(name)).collect();
    CheckpointRequest::from_attributes(&how)
        .map_err(|error| RpcError::new(Code::XmlError, error.full_message()))
}

/// Returns what the document wants done with each disk that it names.
fn wishes(document: &Element) -> Vec<(&str, &str)> {
    let disks = document.child("disks").map(|disks| &disks.children);
    let disks = disks.into_iter().flatten();
    disks
        .filter(|disk| disk.name == "disk")
        .map(|disk| {
            let name = disk.attribute("name").unwrap_or_default();
            (name, disk.attribute("snapshot").unwrap_or_default())
        })
        .collect()
}

/// Returns the disks that a document of a snapshot says are in its image.
pub(super) fn disks_listed(document: &Element) -> Vec<String> {
    let wishes = wishes(document).into_iter();
    let internal = wishes.filter(|(_, wish)| *wish == "internal");
    internal.map(|(name, _)| name.to_owned()).collect()
}

/// Returns the disks whose content is in the image of a snapshot: all that the guest can write. One
/// that is to be left out, or copied elsewhere, is refused, as are all where there is no image.
pub(super) fn disks_in_image(
    document: &Element,
    config: &DomainConfig,
    is_live: bool,
) -> Answer<Vec<String>> {
    let wishes = wishes(document);
    let disks = || config.machine.devices.pci.disks().map(|(_, disk)| disk);
    let is_of = |name: &str, target: &str, path: &Path| name == target || Path::new(name) == path;
    for (name, _) in &wishes {
        if !disks().any(|disk| is_of(name, disk.target.as_str(), disk.source.as_path())) {
            return Err(unsupported(format!("no disk named '{name}'")));
        }
    }
    let mut in_image = Vec::new();
    for disk in disks().filter(|disk| !disk.read_only) {
        let name = disk.target.as_str();
        let path = disk.source.as_path();
        let wish = wishes.iter().find(|(of, _)| is_of(of, name, path));
        match (wish.map_or("", |(_, wish)| wish), is_live) {
            ("no", false) => {}
            ("no", true) => {
                return Err(unsupported(format!(
                    "disk {name} cannot be left out: memory and disks are of one moment"
                )));
            }
            ("external" | "manual", _) => {
                return Err(unsupported(format!(
                    "disk {name}: disks are in the snapshot's image, not in files of their own"
                )));
            }
            (_, true) => in_image.push(name.to_owned()),
            (_, false) => {
                return Err(unsupported(format!(
                    "internal snapshot for disk {name} unsupported for storage type {}",
                    disk.format.name()
                )));
            }
        }
    }
    Ok(in_image)
}
