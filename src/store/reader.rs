//! Reading an image that may be damaged or hostile.

use std::fmt;
use std::path::{Path, PathBuf};

use uuid::Uuid;
use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::page::{Gfn, PAGE_BYTES, PageRun};
use crate::state::{SECTION_BYTES_MAX, StateSection, StateSet};
use crate::store::backend::{LockKind, Storage, StorageFile};
use crate::store::chain;
use crate::store::codec::Decompressor;
use crate::store::disks;
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::{
    CHUNK_COUNT_MAX, CHUNK_RECORD_BYTES, Chunk, ChunkCodec, Digest, HEADER_BYTES, Header,
    IMAGE_BYTES_MAX, IndexRun, MANIFEST_BYTES_MAX, PAGE_BYTES_FIELD, RUN_COUNT_MAX,
    RUN_RECORD_BYTES, RunSource, SECTION_COUNT_MAX, SECTION_KIND_BYTES_MAX, STATE_BYTES_MAX,
    extent_end, narrow, wide,
};
use crate::store::index::PageIndex;
use crate::store::manifest::{Extent, Manifest};
use crate::store::options::check_regions;

/// Records of a table that are read at once.
const BLOCK_RECORDS: usize = 8192;

/// An open image. While it lives nobody replaces or removes the image.
///
/// Opening checks everything but the payloads of chunks and state sections, which are checked as
/// they are read. All methods may be called from several threads.
#[derive(Debug)]
pub struct ImageReader {
    path: PathBuf,
    // Locked shared; closing it ends the lease.
    file: Box<dyn StorageFile>,
    header: Header,
    manifest: Manifest,
    chunks: Vec<Chunk>,
    index: PageIndex,
}

/// Reusable memory of one thread that reads chunks.
#[derive(Default)]
pub struct ReadScratch {
    stored: Vec<u8>,
    raw: Vec<u8>,
    decompressor: Decompressor,
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
        let path = chain::resolve(storage, path)?;
        let file = storage.open(&path).map_err(StoreError::io("open", &path))?;
        if !file
            .try_lock(LockKind::Shared)
            .map_err(StoreError::io("lock", &path))?
        {
            return Err(StoreError::InUse {
                holder: file.holder(),
                path,
            });
        }
        let header = read_header(file.as_ref(), &path)?;
        let source = Source {
            file: file.as_ref(),
            path: &path,
        };
        let manifest = source.read_manifest(&header)?;
        check_manifest(&manifest, &header).map_err(|damage| damage.of(&path))?;
        let chunks = source.read_chunks(&manifest)?;
        let index = source.read_index(&manifest, &chunks)?;
        Ok(Self {
            path,
            file,
            header,
            manifest,
            chunks,
            index,
        })
    }

    /// Returns the path of the image's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns what the image says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the image's UUID.
    pub fn image_uuid(&self) -> Uuid {
        self.header.image_uuid
    }

    /// Returns the image's length in bytes.
    pub fn image_bytes(&self) -> u64 {
        self.header.file_bytes
    }

    /// Returns the root digest in hexadecimal.
    pub fn root_digest(&self) -> String {
        self.header.root.to_string()
    }

    /// Returns the number of chunks.
    pub fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// Returns the guest pages whose newest bytes are in chunk `chunk`, by their place in it.
    pub fn runs_of_chunk(&self, chunk: usize) -> impl Iterator<Item = ChunkRun> + '_ {
        self.index.runs_of_chunk(chunk)
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
        let place = Place::Chunk { chunk };
        let ReadScratch {
            stored,
            raw,
            decompressor,
        } = scratch;
        let extent = Extent {
            offset: record.offset,
            bytes: u64::from(record.stored_bytes),
            digest: record.digest,
        };
        self.source().read_into(&extent, place, stored)?;
        if record.codec == ChunkCodec::None {
            return Ok(stored);
        }
        raw.resize(record.raw_bytes(), 0);
        decompressor
            .decompress(record.codec, stored, raw)
            .map_err(|reason| Damage::new(place, reason).of(&self.path))?;
        Ok(raw)
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
        let mut sections = Vec::with_capacity(self.manifest.sections.len());
        for (section, entry) in self.manifest.sections.iter().enumerate() {
            let mut payload = Vec::new();
            self.source()
                .read_into(&entry.extent, Place::Section { section }, &mut payload)?;
            sections.push(StateSection {
                kind: entry.kind.clone(),
                instance: entry.instance,
                version: entry.version,
                payload,
            });
        }
        StateSet::new(sections).map_err(|source| StoreError::State {
            path: self.path.clone(),
            source,
        })
    }

    pub(crate) fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    pub(crate) fn index(&self) -> &PageIndex {
        &self.index
    }

    fn source(&self) -> Source<'_> {
        Source {
            file: self.file.as_ref(),
            path: &self.path,
        }
    }
}

/// The file of an image, whose bytes count only with their digest.
#[derive(Clone, Copy)]
struct Source<'a> {
    file: &'a dyn StorageFile,
    path: &'a Path,
}

impl Source<'_> {
    /// Reads an extent whose length the caller has compared with a limit and the file's length.
    fn read_into(self, extent: &Extent, place: Place, out: &mut Vec<u8>) -> Result<(), StoreError> {
        out.resize(narrow(extent.bytes), 0);
        self.file
            .read_exact_at(out, extent.offset)
            .map_err(StoreError::io("read", self.path))?;
        let found = Digest::of(out);
        if found == extent.digest {
            return Ok(());
        }
        let reason = format!(
            "should have digest {}, its bytes make {found}",
            extent.digest
        );
        Err(Damage::new(place, reason).of(self.path))
    }

    fn read_manifest(self, header: &Header) -> Result<Manifest, StoreError> {
        let extent = Extent {
            offset: header.manifest_offset,
            bytes: header.manifest_bytes,
            digest: header.root,
        };
        let mut json = Vec::new();
        self.read_into(&extent, Place::Manifest, &mut json)?;
        serde_json::from_slice(&json).map_err(|error| {
            Damage::new(Place::Manifest, format!("does not decode: {error}")).of(self.path)
        })
    }

    fn read_chunks(self, manifest: &Manifest) -> Result<Vec<Chunk>, StoreError> {
        let chunks = self.read_records(&manifest.chunk_table, Place::ChunkTable, Chunk::decode)?;
        check_tiling(&chunks, manifest.chunk_table.offset)
            .map_err(|damage| damage.of(self.path))?;
        Ok(chunks)
    }

    fn read_index(self, manifest: &Manifest, chunks: &[Chunk]) -> Result<PageIndex, StoreError> {
        let runs = self.read_records(&manifest.page_index, Place::PageIndex, IndexRun::decode)?;
        let regions = disks::all_regions(&manifest.regions, &manifest.disks)
            .map_err(|reason| disks::damaged(&reason).of(self.path))?;
        PageIndex::new(runs, &regions, chunks).map_err(|damage| damage.of(self.path))
    }

    /// Reads and decodes a table, block by block: memory is taken only for records that are
    /// valid, so that a hole in the file, however long, costs none.
    fn read_records<R, T>(
        self,
        extent: &Extent,
        place: Place,
        decode: impl Fn(&R, usize) -> Result<T, Damage>,
    ) -> Result<Vec<T>, StoreError>
    where
        R: FromBytes + Immutable + KnownLayout + Unaligned,
    {
        let damaged = |reason: String| Damage::new(place, reason).of(self.path);
        let block_bytes = wide(size_of::<R>() * BLOCK_RECORDS);
        let mut block = Vec::new();
        let mut hasher = blake3::Hasher::new();
        let mut decoded = Vec::new();
        let mut done = 0;
        while done < extent.bytes {
            let bytes = block_bytes.min(extent.bytes - done);
            block.resize(narrow(bytes), 0);
            self.file
                .read_exact_at(&mut block, extent.offset + done)
                .map_err(StoreError::io("read", self.path))?;
            hasher.update(&block);
            let records = <[R]>::ref_from_bytes(&block)
                .map_err(|_| damaged("is no whole number of records".to_owned()))?;
            for record in records {
                let next = decode(record, decoded.len()).map_err(|damage| damage.of(self.path))?;
                decoded.push(next);
            }
            done += bytes;
        }
        let found = Digest(*hasher.finalize().as_bytes());
        if found == extent.digest {
            Ok(decoded)
        } else {
            Err(damaged(format!(
                "should have digest {}, its bytes make {found}",
                extent.digest
            )))
        }
    }
}

/// Reads and checks the header, and where it says that the manifest is.
fn read_header(file: &dyn StorageFile, path: &Path) -> Result<Header, StoreError> {
    let damaged = |reason: String| Damage::new(Place::Header, reason).of(path);
    let bytes = file
        .byte_len()
        .map_err(StoreError::io("read the length of", path))?;
    let mut page = [0; HEADER_BYTES];
    if bytes < wide(HEADER_BYTES) {
        return Err(damaged(format!(
            "needs {HEADER_BYTES} bytes, the file has {bytes}"
        )));
    }
    file.read_exact_at(&mut page, 0)
        .map_err(StoreError::io("read", path))?;
    let header = Header::decode(&page).map_err(|damage| damage.of(path))?;
    if header.file_bytes != bytes || bytes > IMAGE_BYTES_MAX {
        return Err(damaged(format!(
            "says that the file has {} bytes, it has {bytes}",
            header.file_bytes
        )));
    }
    let ends = header.manifest_offset.checked_add(header.manifest_bytes);
    if ends != Some(bytes)
        || header.manifest_offset < wide(HEADER_BYTES)
        || !(1..=MANIFEST_BYTES_MAX).contains(&header.manifest_bytes)
    {
        return Err(damaged(format!(
            "says that the manifest has {} bytes at {}, of {bytes}",
            header.manifest_bytes, header.manifest_offset
        )));
    }
    Ok(header)
}

/// Checks that the manifest agrees with the header and describes what this build restores, and
/// that every extent after the chunks follows the one before it.
fn check_manifest(manifest: &Manifest, header: &Header) -> Result<(), Damage> {
    let damaged = |reason: String| Damage::new(Place::Manifest, reason);
    if manifest.format != header.format
        || manifest.page_bytes != PAGE_BYTES_FIELD
        || manifest.image_uuid != header.image_uuid
        || manifest.guest.uuid != header.guest_uuid
    {
        return Err(damaged("is not that of the header".to_owned()));
    }
    if manifest.parent.is_some() {
        return Err(damaged(
            "names a parent, which format 0.1 cannot have".to_owned(),
        ));
    }
    disks::frames(&manifest.disks).map_err(|reason| disks::damaged(&reason))?;
    if manifest.read_only_disks.len() > disks::DISK_COUNT_MAX {
        return Err(damaged("names too many disks".to_owned()));
    }
    check_regions(&manifest.regions).map_err(|what| damaged(format!("describes {what}")))?;
    if manifest.sections.len() > SECTION_COUNT_MAX {
        return Err(damaged(format!(
            "lists {} sections",
            manifest.sections.len()
        )));
    }
    let end = header.manifest_offset;
    let table_max = wide(CHUNK_COUNT_MAX * CHUNK_RECORD_BYTES);
    let index_max = wide(RUN_COUNT_MAX * RUN_RECORD_BYTES);
    let mut tail = manifest.chunk_table.offset;
    tail = follow(
        tail,
        &manifest.chunk_table,
        table_max,
        end,
        Place::ChunkTable,
    )?;
    tail = follow(tail, &manifest.page_index, index_max, end, Place::PageIndex)?;
    for (section, entry) in manifest.sections.iter().enumerate() {
        let place = Place::Section { section };
        if !(1..=SECTION_KIND_BYTES_MAX).contains(&entry.kind.len()) {
            return Err(Damage::new(place, "has a kind that is empty or too long"));
        }
        tail = follow(tail, &entry.extent, wide(SECTION_BYTES_MAX), end, place)?;
    }
    let state_bytes: u64 = manifest
        .sections
        .iter()
        .map(|entry| entry.extent.bytes)
        .sum();
    if state_bytes > STATE_BYTES_MAX {
        return Err(damaged(format!("lists {state_bytes} bytes of state")));
    }
    if tail != end {
        return Err(damaged(format!(
            "is at {end}, what it lists ends at {tail}"
        )));
    }
    Ok(())
}

/// Checks that `extent` is at `tail`, and returns where the next one must be. Extents that follow
/// one another up to the file's end cannot overlap, and none can be larger than the file.
fn follow(tail: u64, extent: &Extent, max: u64, end: u64, place: Place) -> Result<u64, Damage> {
    let room = end.saturating_sub(extent.offset);
    if extent.offset != tail || extent.bytes > max || extent.bytes > room {
        return Err(Damage::new(
            place,
            format!(
                "has {} bytes at {}, where at most {} at {tail} are possible",
                extent.bytes,
                extent.offset,
                max.min(room)
            ),
        ));
    }
    Ok(extent_end(extent.offset, extent.bytes))
}

/// Checks that the chunks follow one another from the header to the chunk table.
fn check_tiling(chunks: &[Chunk], table_offset: u64) -> Result<(), Damage> {
    let mut tail = wide(HEADER_BYTES);
    for (chunk, record) in chunks.iter().enumerate() {
        // `tail` stays below the table's offset, itself below the file's end.
        if record.offset != tail || record.offset >= table_offset {
            return Err(Damage::new(
                Place::ChunkRecord { chunk },
                format!("says offset {}, the chunk must be at {tail}", record.offset),
            ));
        }
        tail = extent_end(tail, u64::from(record.stored_bytes));
    }
    if tail != table_offset {
        return Err(Damage::new(
            Place::ChunkTable,
            format!("is at {table_offset}, the chunks end at {tail}"),
        ));
    }
    Ok(())
}
