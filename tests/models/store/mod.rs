//! The image: its page index is the real one; what goes into it is noted.

#[path = "../../../src/store/disks.rs"]
pub(crate) mod disks;
#[path = "../../../src/store/error.rs"]
pub(crate) mod error;
#[path = "../../../src/store/format.rs"]
pub(crate) mod format;
#[path = "../../../src/store/index.rs"]
mod index;
#[path = "../../../src/store/options.rs"]
pub(crate) mod options;

pub(crate) mod newest_wins;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Mutex as Plain;

use crate::page::{Gfn, PAGE_BYTES, PageRun};

pub use error::StoreError;
pub use index::EPOCH_MAX;
pub use options::RegionLayout;

pub(crate) mod codec {
    #[derive(Clone, Debug)]
    pub enum Codec {
        None,
    }
}

pub(crate) mod reader {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct ChunkRun {
        pub run: crate::page::PageRun,
        pub first_page: usize,
    }
}

pub(crate) mod backend {
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum EntryKind {
        File,
    }
}

/// Storage, as the gate before its renames sees it. Models do nothing else with it.
pub(crate) trait Storage: Send + Sync + fmt::Debug {
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    fn create_new(&self, _path: &Path) -> io::Result<Box<dyn StorageFile>> {
        unreachable!("no model makes a file")
    }
    fn take_over(&self, _spare: &Path, _path: &Path) -> io::Result<Box<dyn StorageFile>> {
        unreachable!("no model writes over a file")
    }
    fn open(&self, _path: &Path) -> io::Result<Box<dyn StorageFile>> {
        unreachable!("no model opens a file")
    }
    fn kind(&self, _path: &Path) -> io::Result<Option<backend::EntryKind>> {
        unreachable!("no model asks what a file is")
    }
    fn remove(&self, _path: &Path) -> io::Result<()> {
        unreachable!("no model removes a file")
    }
    fn sync_dir(&self, _dir: &Path) -> io::Result<()> {
        unreachable!("no model syncs a directory")
    }
    fn list(&self, _dir: &Path) -> io::Result<Vec<OsString>> {
        unreachable!("no model lists a directory")
    }
    fn free_bytes(&self, _dir: &Path) -> io::Result<u64> {
        unreachable!("no model asks for room")
    }
}

pub(crate) trait StorageFile {}

/// What no model commits.
#[derive(Clone, Debug)]
pub(crate) struct CommittedImage;

/// For the imports of unit tests that are not run here.
pub(crate) struct FileStorage;

#[derive(Clone, Copy)]
pub(crate) struct ChunkPages<'a> {
    pub(crate) epoch: u32,
    pub(crate) frames: &'a [Gfn],
    pub(crate) data: &'a [u8],
}

#[derive(Debug, Default)]
pub(crate) struct ChunkScratch(());

#[derive(Default)]
pub(crate) struct ChunkStats {
    pub(crate) zero_pages: u64,
    pub(crate) raw_bytes: u64,
    pub(crate) stored_bytes: u64,
}

/// A page that came to the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) frame: Gfn,
    pub(crate) value: u8,
    /// Which copy of the page it is.
    pub(crate) copy: usize,
}

/// An image that notes what is written to it.
#[derive(Debug, Default)]
pub(crate) struct ImageWriter {
    pub(crate) written: Plain<Vec<Written>>,
}

impl ImageWriter {
    pub(crate) fn write_chunk(
        &self,
        pages: ChunkPages<'_>,
        _: &mut ChunkScratch,
    ) -> Result<ChunkStats, StoreError> {
        let each = pages.frames.iter().zip(pages.data.chunks(PAGE_BYTES));
        let each = each.map(|(&frame, data)| Written {
            frame,
            value: data[0],
            copy: data[1].into(),
        });
        self.written.lock().unwrap().extend(each);
        Ok(ChunkStats::default())
    }

    pub(crate) fn record_zero(&self, _epoch: u32, run: PageRun) -> Result<(), StoreError> {
        panic!("{run:?} was touched");
    }

    pub(crate) fn bytes_written(&self) -> u64 {
        0
    }
}
