//! What the document of a snapshot asks for: where its image goes, how the checkpoint is taken, and
//! which disks it has.

use std::path::{Path, PathBuf};

use super::Answer;
use crate::daemon::texts;
use crate::daemon::xml::{self, Element};
use crate::host::{CheckpointRequest, DomainConfig, Protocol};
use crate::rpc::{Code, RpcError};

/// The namespace of what a document says of how to take a checkpoint.
const NAMESPACE: &str = "urn:livepoint:1";

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
        element.attribute(&key) == Some(NAMESPACE)
    };
    let in_document = document.children.iter().find(is_ours).cloned();
    let in_metadata = || {
        let xml = texts::element(config, NAMESPACE).ok()?;
        xml::read(&xml, "checkpoint").ok()
    };
    let mut request = serde_json::json!({ "protocol": Protocol::Auto });
    if let Some(element) = in_document.or_else(in_metadata)
        && let Some(members) = request.as_object_mut()
    {
        for (key, value) in &element.attributes {
            if key == "xmlns" || key.starts_with("xmlns:") {
                continue;
            }
            let number = value.parse::<u64>().map(serde_json::Value::from);
            let value = match value.as_str() {
                "true" | "yes" => true.into(),
                "false" | "no" => false.into(),
                text => number.unwrap_or_else(|_| text.into()),
            };
            if !CONTRACT.contains(&key.as_str()) {
                return Err(RpcError::new(
                    Code::XmlError,
                    format!(
                        "<checkpoint> has no attribute {key}; there are {}",
                        CONTRACT.join(", ")
                    ),
                ));
            }
            members.insert(key.clone(), value);
        }
    }
    serde_json::from_value(request)
        .map_err(|error| RpcError::new(Code::XmlError, format!("<checkpoint>: {error}")))
}

/// Attributes of `<checkpoint>`: members of the control protocol's method of that name.
const CONTRACT: [&str; 10] = [
    "protocol",
    "codec",
    "threads",
    "interval_ms",
    "max_staging_bytes",
    "max_downtime_us",
    "deadline_ms",
    "max_bandwidth",
    "pause_limit_ms",
    "durable",
];

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
