//! The manifest: what an image is, in JSON that `jq` reads.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::page::PageRun;
use crate::state::HostFacts;
use crate::store::disks::{DiskLayout, ReadOnlyDisk};
use crate::store::format::{Digest, FormatVersion};
use crate::store::options::RegionLayout;

/// What the caller of a writer knows about the checkpoint once it is done.
#[derive(Clone, Debug)]
pub struct ManifestFacts {
    /// The domain's name.
    pub name: String,
    /// The domain's UUID.
    pub uuid: Uuid,
    /// The domain XML that makes the same machine again.
    pub domain_xml: String,
    /// Number of vCPUs.
    pub vcpu_count: u32,
    /// The CPU that the guest saw and the KVM features that its state needs.
    pub facts: HostFacts,
    /// The protocol that captured the image.
    pub protocol: String,
    /// Figures of the checkpoint, for people.
    pub statistics: serde_json::Value,
    /// The captured moment.
    pub created: Timestamp,
}

/// A range of the image's bytes with its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Extent {
    pub(crate) offset: u64,
    pub(crate) bytes: u64,
    pub(crate) digest: Digest,
}

/// One state section.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SectionEntry {
    pub(crate) kind: String,
    pub(crate) instance: u32,
    pub(crate) version: u16,
    #[serde(flatten)]
    pub(crate) extent: Extent,
}

/// What an image says about itself. Everything in it is covered by the header's root digest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub(crate) format: FormatVersion,
    /// The build that wrote the image.
    pub writer: String,
    /// The image's own UUID.
    pub image_uuid: Uuid,
    /// The captured moment.
    pub created: Timestamp,
    /// The protocol that captured it.
    pub protocol: String,
    /// The guest.
    pub guest: GuestFacts,
    pub(crate) page_bytes: u32,
    /// The regions of guest memory, sorted.
    pub regions: Vec<RegionLayout>,
    pub(crate) chunk_table: Extent,
    pub(crate) page_index: Extent,
    pub(crate) sections: Vec<SectionEntry>,
    /// The disks whose content is in the image.
    pub disks: Vec<DiskLayout>,
    /// The disks that are only named.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub read_only_disks: Vec<ReadOnlyDisk>,
    /// The image that this one continues; a restore does not need it unless it is a layer.
    pub parent: Option<ParentRef>,
    /// The images that hold the memory which was not written since, in the order in which their
    /// chunks are numbered after this image's own.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<LayerRef>,
    /// The memory that the guest wrote last, the latest first: what a lazy restore brings first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub working_set: Vec<PageRun>,
    /// Figures of the checkpoint, for people.
    pub statistics: serde_json::Value,
}

/// Names an image by its content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentRef {
    /// Its UUID.
    pub image_uuid: Uuid,
    pub(crate) root_digest: Digest,
    /// Its file's name, in the directory of the image that names it.
    pub file: String,
}

/// An image whose chunks another one's page index names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerRef {
    /// Its UUID.
    pub image_uuid: Uuid,
    pub(crate) root_digest: Digest,
    /// Its file's name, in the directory of the image that names it.
    pub file: String,
    /// Its own chunks.
    pub(crate) chunk_count: u32,
}

impl ParentRef {
    /// Returns the parent's root digest in hexadecimal.
    pub fn root_digest(&self) -> String {
        self.root_digest.to_string()
    }
}

/// Returns whether `name` names a file in a directory, and nothing elsewhere.
pub(crate) fn is_plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 255
        && !name.contains(['/', '\0'])
        && name != "."
        && name != ".."
}

/// The guest of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestFacts {
    /// The domain's name.
    pub name: String,
    /// The domain's UUID.
    pub uuid: Uuid,
    /// Number of vCPUs.
    pub vcpu_count: u32,
    /// The CPU that the guest saw and the KVM features that its state needs.
    pub facts: HostFacts,
    /// The domain XML that makes the same machine again.
    pub domain_xml: String,
}
