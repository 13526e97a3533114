//! What can go wrong with an image, and where.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::page::Gfn;
use crate::state::StateError;
use crate::sys::lock::Holder;

/// A part of an image, named in errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Place {
    /// The first page.
    Header,
    /// The JSON manifest.
    Manifest,
    /// The table of chunks.
    ChunkTable,
    /// One record of the table of chunks.
    ChunkRecord {
        /// Number of the chunk, from 0.
        chunk: usize,
    },
    /// The payload of one chunk.
    Chunk {
        /// Number of the chunk, from 0.
        chunk: usize,
    },
    /// The page index.
    PageIndex,
    /// One record of the page index.
    Run {
        /// Number of the record, from 0.
        run: usize,
    },
    /// One layer: another image that holds a part of the memory.
    Layer {
        /// Number of the layer in the manifest, from 0.
        layer: usize,
    },
    /// One state section.
    Section {
        /// Number of the section in the manifest, from 0.
        section: usize,
    },
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Header => f.write_str("header"),
            Self::Manifest => f.write_str("manifest"),
            Self::ChunkTable => f.write_str("chunk table"),
            Self::ChunkRecord { chunk } => write!(f, "chunk table record {chunk}"),
            Self::Chunk { chunk } => write!(f, "chunk {chunk}"),
            Self::PageIndex => f.write_str("page index"),
            Self::Run { run } => write!(f, "page index record {run}"),
            Self::Layer { layer } => write!(f, "layer {layer}"),
            Self::Section { section } => write!(f, "state section {section}"),
        }
    }
}

/// Damage found while decoding, before it is known which file the bytes came from.
#[derive(Debug)]
pub(crate) struct Damage {
    place: Place,
    reason: String,
}

impl Damage {
    pub(crate) fn new(place: Place, reason: impl Into<String>) -> Self {
        Self {
            place,
            reason: reason.into(),
        }
    }

    /// Says which image is damaged.
    pub(crate) fn of(self, path: &Path) -> StoreError {
        StoreError::Damaged {
            path: path.to_owned(),
            place: self.place,
            reason: self.reason,
        }
    }
}

/// An image that could not be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Storage failed.
    #[error("could not {action} {}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// To which file.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The image is not what its writer wrote, or was never an image.
    #[error("image {} is damaged: {place} {reason}", path.display())]
    Damaged {
        /// The image.
        path: PathBuf,
        /// The part of it.
        place: Place,
        /// What is wrong there.
        reason: String,
    },
    /// Another image, which holds a part of this one's memory, cannot be used.
    #[error("image {} needs {}, which cannot be used", path.display(), layer.display())]
    Layer {
        /// The image.
        path: PathBuf,
        /// What it needs.
        layer: PathBuf,
        /// Why that cannot be used.
        #[source]
        source: Box<StoreError>,
    },
    /// The image holds memory that other images need.
    #[error("image {} holds memory that {} needs", path.display(), by.display())]
    Named {
        /// The image.
        path: PathBuf,
        /// One that needs it.
        by: PathBuf,
    },
    /// The state sections of the image contradict one another.
    #[error("image {} holds unusable state", path.display())]
    State {
        /// The image.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: StateError,
    },
    /// Somebody else reads or writes the image.
    #[error("image {} is in use{}", path.display(), by(holder.as_ref()))]
    InUse {
        /// The image.
        path: PathBuf,
        /// Who uses it, where the kernel says so.
        holder: Option<Holder>,
    },
    /// The target exists and is not an image, so that replacing it would lose something else.
    #[error("{} exists and is {what}; refusing to replace it", path.display())]
    NotReplaceable {
        /// The target.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// The directory is a chain without a committed image.
    #[error("directory {} holds no committed image", path.display())]
    EmptyChain {
        /// The directory.
        path: PathBuf,
    },
    /// The file system has less room than the image may need.
    #[error(
        "the image needs up to {needed} bytes and {} has {available} free",
        path.display()
    )]
    NoSpace {
        /// The directory of the image.
        path: PathBuf,
        /// Estimated size.
        needed: u64,
        /// Free bytes.
        available: u64,
    },
    /// The caller's regions or sections are not ones that an image can describe.
    #[error("cannot write such an image: {reason}")]
    Unwritable {
        /// What is wrong.
        reason: String,
    },
    /// A page was given that is in no region.
    #[error("page {gfn} is in no region of the image")]
    OutsideRegions {
        /// The page.
        gfn: Gfn,
    },
    /// A page was never given to the writer.
    #[error("page {gfn} and {others} others were never captured")]
    Uncovered {
        /// The first such page.
        gfn: Gfn,
        /// How many more there are.
        others: u64,
    },
    /// An earlier write failed, so that the image can only be aborted.
    #[error("image {} is incomplete: an earlier write to it failed", path.display())]
    Incomplete {
        /// The image.
        path: PathBuf,
    },
}

impl StoreError {
    /// Makes a function that wraps an I/O error of doing `action` to `path`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// Returns whether the file system is full, or would be.
    pub fn is_no_space(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Io { source, .. } => source.kind() == io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}

fn by(holder: Option<&Holder>) -> String {
    holder.map_or_else(String::new, |holder| format!(" by {holder}"))
}
