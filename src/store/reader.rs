//! Reading an image that may be damaged or hostile.

use std::fmt;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use crate::page::{Gfn, PAGE_BYTES, PageRun};
use crate::state::{StateSection, StateSet};
use crate::store::backend::Storage;
use crate::store::chain;
use crate::store::codec::Decompressor;
use crate::store::disks;
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::{CHUNK_PAGES_MAX, Chunk, ChunkCodec, RunSource, narrow, wide};
use crate::store::index::PageIndex;
use crate::store::layer::{self, Layer};
use crate::store::leaves::{LeafDigests, Split};
use crate::store::manifest::{Extent, Manifest};
use crate::store::source::LeasedFile;

/// An open image. While it lives nobody replaces or removes the image, or one of its layers.
///
/// Opening checks everything but the payloads of chunks and state sections, which are checked as
/// they are read. All methods may be called from several threads.
///
/// Chunks are numbered through the image's own and then those of its layers, in order.
#[derive(Debug)]
pub struct ImageReader {
    file: LeasedFile,
    manifest: Manifest,
    own_chunks: usize,
    layers: Vec<Layer>,
    /// The image's own, then those of its layers.
    chunks: Vec<Chunk>,
    index: PageIndex,
    /// Where the digests of the leaves of what is read are kept.
    leaves: Option<Arc<LeafDigests>>,
}

/// Reusable memory of one thread that reads chunks.
#[derive(Default)]
pub struct ReadScratch {
    stored: Vec<u8>,
    raw: Vec<u8>,
    decompressor: Decompressor,
    holds: Holds,
}

/// Where a scratch has the chunk that was read last.
#[derive(Clone, Copy, Default)]
enum Holds {
    #[default]
    Nothing,
    Stored,
    Raw,
}

impl ReadScratch {
    /// Makes memory for a chunk that is not compressed, so that the first read does not wait for it.
    pub fn prepare(&mut self) {
        if self.stored.capacity() == 0 {
            self.stored = vec![1; CHUNK_PAGES_MAX * PAGE_BYTES];
        }
    }

    /// Returns the chunk that [`ImageReader::read_chunk`] returned last; nothing where it failed.
    pub fn chunk(&self) -> &[u8] {
        match self.holds {
            Holds::Nothing => &[],
            Holds::Stored => &self.stored,
            Holds::Raw => &self.raw,
        }
    }

    /// Returns memory for bytes as they are stored.
    pub(crate) fn stored(&mut self) -> &mut Vec<u8> {
        self.holds = Holds::Nothing;
        &mut self.stored
    }
}

impl fmt::Debug for ReadScratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ReadScratch").finish_non_exhaustive()
    }
}

/// Guest pages whose bytes are in a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkRun {
    /// The guest's frames.
    pub run: PageRun,
    /// Their place in the chunk's pages.
    pub first_page: usize,
}

impl ChunkRun {
    /// Returns the run's bytes in `raw`, the pages of its chunk.
    pub fn bytes_in<'a>(&self, raw: &'a [u8]) -> &'a [u8] {
        let start = self.first_page * PAGE_BYTES;
        let end = start + narrow(self.run.bytes());
        raw.get(start..end)
            .expect("the index was checked against the chunks")
    }
}

impl ImageReader {
    /// Opens the image at `path`, or the newest one of the chain in a directory.
    pub fn open(storage: &dyn Storage, path: &Path) -> Result<Self, StoreError> {
        let file = LeasedFile::open(storage, chain::resolve(storage, path)?)?;
        let manifest = file.manifest()?;
        let mut chunks = file.source().read_chunks(&manifest)?;
        let own_chunks = chunks.len();
        let layers = layer::open_all(storage, &file.path, &manifest, &mut chunks)?;
        let index = file.source().read_index(&manifest, &chunks)?;
        Ok(Self {
            file,
            manifest,
            own_chunks,
            layers,
            chunks,
            index,
            leaves: None,
        })
    }

    /// Has the digests of the leaves of chunks that are read kept in `leaves`, and uses those that
    /// are there.
    pub fn keep_leaves(&mut self, leaves: Arc<LeafDigests>) {
        self.leaves = Some(leaves);
    }

    /// Returns the path of the image's file.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    /// Returns what the image says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the image's UUID.
    pub fn image_uuid(&self) -> Uuid {
        self.file.header.image_uuid
    }

    /// Returns the image's length in bytes.
    pub fn image_bytes(&self) -> u64 {
        self.file.header.file_bytes
    }

    /// Returns the root digest in hexadecimal.
    pub fn root_digest(&self) -> String {
        self.file.header.root.to_string()
    }

    /// Returns the number of chunks, those of layers included.
    pub fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// Returns the number of the image's own chunks: those after them are of its layers.
    pub fn own_chunk_count(&self) -> usize {
        self.own_chunks
    }

    /// Returns whether the image is where an image written to `path` could name it: in the same
    /// directory, and still under its name.
    pub fn is_beside(&self, storage: &dyn Storage, path: &Path) -> Result<bool, StoreError> {
        let dir = chain::directory_for(storage, path)?;
        let name = self.path().file_name();
        name.map_or(Ok(false), |name| self.file.is_at(&dir.join(name)))
    }

    /// Returns the paths of the images that hold a part of this one's memory.
    pub fn layer_paths(&self) -> impl Iterator<Item = &Path> {
        self.layers.iter().map(|layer| layer.file.path.as_path())
    }

    /// Returns the guest pages whose newest bytes are in chunk `chunk`, by their place in it.
    pub fn runs_of_chunk(&self, chunk: usize) -> impl Iterator<Item = ChunkRun> + '_ {
        self.index.runs_of_chunk(chunk)
    }

    /// Returns where the data of `pages` is, in their order: the chunk, and the pages in it. Pages
    /// of zeros are passed over.
    pub fn sources_in(&self, pages: PageRun) -> impl Iterator<Item = (usize, ChunkRun)> + '_ {
        self.index.sources_in(pages)
    }

    /// Returns the chunks that memory needs: not those whose every page was superseded, nor those
    /// of disks.
    pub fn live_chunks(&self) -> Vec<usize> {
        let has_memory = |chunk: &usize| {
            let mut runs = self.runs_of_chunk(*chunk);
            runs.any(|part| !disks::is_of_disk(part.run))
        };
        (0..self.chunk_count()).filter(has_memory).collect()
    }

    /// Returns how many pages have data, in the image or in a layer.
    pub fn data_pages(&self) -> u64 {
        let regions = self.manifest.regions.iter();
        let all: u64 = regions.map(|region| region.page_count).sum();
        let zeros: u64 = self.zero_runs().map(|run| run.page_count).sum();
        all - zeros
    }

    /// Returns the guest pages that are zeros.
    pub fn zero_runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        let runs = self.index.zero_runs();
        runs.filter(|run| !disks::is_of_disk(*run))
    }

    /// Returns the frames of disk `disk`, by its place in the manifest.
    ///
    /// # Panics
    /// When there is no such disk.
    pub fn disk_frames(&self, disk: usize) -> PageRun {
        let frames = disks::frames(&self.manifest.disks).expect("checked when it was opened");
        *frames.get(disk).expect("disks are counted")
    }

    /// Returns the blocks of zeros of the disk whose frames these are.
    pub fn disk_zero_runs(&self, frames: PageRun) -> impl Iterator<Item = PageRun> + '_ {
        let runs = self.index.zero_runs();
        runs.filter_map(move |run| run.intersection(frames))
    }

    /// Returns the chunks with blocks of the disk whose frames these are.
    pub fn disk_chunks(&self, frames: PageRun) -> Vec<usize> {
        let has_blocks = |chunk: &usize| {
            let mut runs = self.runs_of_chunk(*chunk);
            runs.any(|part| part.run.intersection(frames).is_some())
        };
        (0..self.chunk_count()).filter(has_blocks).collect()
    }

    /// Reads chunk `chunk` and returns its pages, checked: bytes whose digest does not hold are
    /// never returned.
    ///
    /// # Panics
    /// When there is no such chunk.
    pub fn read_chunk<'s>(
        &self,
        chunk: usize,
        scratch: &'s mut ReadScratch,
    ) -> Result<&'s [u8], StoreError> {
        let record = self.chunks.get(chunk).expect("chunks are counted");
        let (file, own_number) = self.file_of(chunk);
        let place = Place::Chunk { chunk: own_number };
        let ReadScratch {
            stored,
            raw,
            decompressor,
            holds,
        } = scratch;
        *holds = Holds::Nothing;
        let extent = Extent {
            offset: record.offset,
            bytes: u64::from(record.stored_bytes),
            digest: record.digest,
        };
        match &self.leaves {
            Some(leaves) if record.codec == ChunkCodec::None => {
                let mut split = None;
                file.source()
                    .read_checked(&extent, place, stored, |bytes| {
                        split.insert(Split::of(bytes)).digest
                    })?;
                split.into_iter().for_each(|split| leaves.keep(split));
            }
            _ => file.source().read_into(&extent, place, stored)?,
        }
        if record.codec == ChunkCodec::None {
            *holds = Holds::Stored;
        } else {
            raw.resize(record.raw_bytes(), 0);
            decompressor
                .decompress(record.codec, stored, raw)
                .map_err(|reason| Damage::new(place, reason).of(&file.path))?;
            *holds = Holds::Raw;
        }
        Ok(scratch.chunk())
    }

    /// Returns whether chunk `chunk` is in its file as its pages are.
    ///
    /// # Panics
    /// When there is no such chunk.
    pub fn is_plain(&self, chunk: usize) -> bool {
        let record = self.chunks.get(chunk).expect("chunks are counted");
        record.codec == ChunkCodec::None
    }

    /// Has `to` share a part of chunk `chunk`, which is plain, from `at` on, without copying:
    /// `bytes` bytes from `from` on, in whole pages. False where that cannot be. Checks nothing:
    /// [`ImageReader::read_chunk`] does.
    ///
    /// # Panics
    /// When there is no such chunk, or it has no such part.
    pub fn share_chunk(&self, chunk: usize, from: usize, bytes: usize, to: &File, at: u64) -> bool {
        let record = self.chunks.get(chunk).expect("chunks are counted");
        assert!(from + bytes <= record.raw_bytes(), "inside the chunk");
        let (file, _) = self.file_of(chunk);
        let offset = record.offset + wide(from);
        self.is_plain(chunk) && file.share(offset, wide(bytes), to, at).is_ok()
    }

    /// Reads one guest page into `out`; false where no region holds it.
    pub fn read_page(
        &self,
        gfn: Gfn,
        scratch: &mut ReadScratch,
        out: &mut [u8; PAGE_BYTES],
    ) -> Result<bool, StoreError> {
        let Some(run) = self.index.find(gfn) else {
            return Ok(false);
        };
        match run.source {
            RunSource::Zero => out.fill(0),
            RunSource::Chunk { chunk, first_page } => {
                let raw = self.read_chunk(narrow(u64::from(chunk)), scratch)?;
                let page = ChunkRun {
                    run: PageRun {
                        start: gfn,
                        page_count: 1,
                    },
                    first_page: usize::from(first_page) + narrow(gfn.0 - run.start.0),
                };
                out.copy_from_slice(page.bytes_in(raw));
            }
        }
        Ok(true)
    }

    /// Reads every state section, checked.
    pub fn sections(&self) -> Result<StateSet, StoreError> {
        let sections = (0..self.manifest.sections.len()).map(|number| self.section(number));
        let sections = sections.collect::<Result<Vec<_>, _>>()?;
        StateSet::new(sections).map_err(|source| StoreError::State {
            path: self.file.path.clone(),
            source,
        })
    }

    /// Reads one state section, checked.
    ///
    /// # Panics
    /// When there is no such section.
    pub(crate) fn section(&self, number: usize) -> Result<StateSection, StoreError> {
        let entry = self.manifest.sections.get(number);
        let entry = entry.expect("sections are counted");
        let mut payload = Vec::new();
        let place = Place::Section { section: number };
        self.file
            .source()
            .read_into(&entry.extent, place, &mut payload)?;
        Ok(StateSection {
            kind: entry.kind.clone(),
            instance: entry.instance,
            version: entry.version,
            payload,
        })
    }

    pub(crate) fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    pub(crate) fn index(&self) -> &PageIndex {
        &self.index
    }

    pub(crate) fn leaves(&self) -> Option<&LeafDigests> {
        self.leaves.as_deref()
    }

    pub(crate) fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(crate) fn file(&self) -> &LeasedFile {
        &self.file
    }

    /// Returns the file that holds a chunk, and the chunk's number in it.
    pub(crate) fn file_of(&self, chunk: usize) -> (&LeasedFile, usize) {
        let after = self
            .layers
            .partition_point(|layer| layer.first_chunk <= chunk);
        match after.checked_sub(1).and_then(|at| self.layers.get(at)) {
            Some(layer) => (&layer.file, chunk - layer.first_chunk),
            None => (&self.file, chunk),
        }
    }
}
