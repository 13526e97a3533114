//! The manifest: what an image is, in JSON that `jq` reads.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

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
    // Not written by format 0.1; a reader refuses an image that has one.
    pub(crate) parent: Option<serde_json::Value>,
    /// Figures of the checkpoint, for people.
    pub statistics: serde_json::Value,
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
