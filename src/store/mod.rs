//! The image: one checkpoint on disk, as one container file.
//!
//! [`ImageWriter`] makes an image in a temporary file, fed by any number of threads, and commits
//! it by one rename. [`ImageReader`] opens one and believes nothing that a digest does not cover.
//! A directory of images is a *chain*: it is opened as its newest image. `docs/format.md`
//! describes every byte.
//!
//! Readers treat an image as hostile: each length is compared with a named limit and with the
//! file's length before memory is allocated for it, and an error names the place.
#![warn(clippy::indexing_slicing)]

pub mod backend;
mod chain;
mod codec;
mod deferred;
mod difference;
mod disks;
mod error;
mod format;
mod increment;
mod index;
mod layer;
mod leaves;
mod manifest;
mod options;
mod partial;
mod probe;
mod reader;
mod retention;
mod rewrite;
mod source;
mod space;
mod tripwires;
mod verify;
mod working_set;
mod writer;
mod zero;

pub use backend::file::FileStorage;
pub use backend::limited::LimitedStorage;
pub use backend::{EntryKind, LockKind, Storage, StorageFile};
pub use chain::{ChainImage, chain_images, remove_image};
pub use codec::{Codec, UnknownCodec};
pub use disks::{DISK_COUNT_MAX, DISK_NAME_BYTES_MAX, DiskLayout, ReadOnlyDisk};
pub use error::{Place, StoreError};
pub use format::{
    FORMAT_MAJOR, FORMAT_MINOR, IMAGE_BYTES_MAX, IMAGE_SUFFIX, LAYER_COUNT_MAX, MANIFEST_BYTES_MAX,
    PAGES_MAX,
};
pub use increment::{CarryOver, fold};
pub use index::EPOCH_MAX;
pub use leaves::LeafDigests;
pub use manifest::{GuestFacts, LayerRef, Manifest, ManifestFacts, ParentRef};
pub use options::{RegionLayout, WriteOptions};
pub use probe::probe_rate;
pub use reader::{ChunkRun, ImageReader, ReadScratch};
pub use retention::{Garbage, collect_garbage};
pub use rewrite::replace_domain_xml;
pub use space::{ensure_free, estimate_bytes};
pub use verify::{ChunkCounts, ImageName, ImageSummary, SectionSummary, VerifyReport};
pub use writer::{ChunkPages, ChunkScratch, ChunkStats, CommittedImage, ImageWriter};
pub use zero::is_zero;
