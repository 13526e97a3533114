//! Writing an image: chunks from many threads, then one commit.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use uuid::Uuid;
use zerocopy::IntoBytes;

use crate::page::{Gfn, PAGE_BYTES, PageRun};
use crate::state::{SECTION_BYTES_MAX, StateSection};
use crate::store::backend::{Storage, StorageFile};
use crate::store::chain::{self, Target};
use crate::store::codec::Compressor;
use crate::store::deferred::{self, Check, PendingChunk};
use crate::store::disks;
use crate::store::error::StoreError;
use crate::store::format::{
    CHUNK_COUNT_MAX, CHUNK_PAGES_MAX, Chunk, ChunkCodec, Digest, FormatVersion, HEADER_BYTES,
    Header, IMAGE_BYTES_MAX, MANIFEST_BYTES_MAX, PAGE_BYTES_FIELD, RUN_COUNT_MAX, RunSource,
    SECTION_COUNT_MAX, SECTION_KIND_BYTES_MAX, STATE_BYTES_MAX, extent_end, narrow, wide,
};
use crate::store::increment;
use crate::store::index::{EPOCH_MAX, PageTable};
use crate::store::leaves::{LeafDigests, Split};
use crate::store::manifest::{Extent, GuestFacts, Manifest, ManifestFacts, SectionEntry};
use crate::store::options::{RegionLayout, WriteOptions, check_writable};
use crate::store::reader::ImageReader;
use crate::store::space;
use crate::store::working_set;
use crate::store::zero::is_zero;

/// Room that is reserved on disk at once, ahead of the writes.
const RESERVE_BYTES: u64 = 64 << 20;

/// Captured pages, on their way into one chunk.
#[derive(Clone, Copy, Debug)]
pub struct ChunkPages<'a> {
    /// When they were captured. The copy of a page with the highest epoch is the one that
    /// counts, whichever order copies are written in.
    pub epoch: u32,
    /// From 1 to `PIECE_PAGES` frames, in any order, none twice.
    pub frames: &'a [Gfn],
    /// Their bytes, one page after another.
    pub data: &'a [u8],
}

/// Reusable memory of one thread that writes chunks.
#[derive(Debug, Default)]
pub struct ChunkScratch {
    compressor: Compressor,
    packed: Vec<u8>,
    pub(crate) sources: Vec<RunSource>,
}

/// What became of one call's pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkStats {
    /// Pages that were zeros and cost no data.
    pub zero_pages: u64,
    /// Bytes of the other pages.
    pub raw_bytes: u64,
    /// Bytes that they take in the image.
    pub stored_bytes: u64,
    /// Whether they were compressed.
    pub compressed: bool,
}

/// An image being written. Dropping it removes what was written.
#[derive(Debug)]
pub struct ImageWriter {
    storage: Arc<dyn Storage>,
    pub(crate) target: Target,
    part: PathBuf,
    // Locked exclusively; closing it ends the lock, after the name is gone or is the image's.
    file: Box<dyn StorageFile>,
    options: WriteOptions,
    pub(crate) regions: Vec<RegionLayout>,
    disk_frames: Vec<PageRun>,
    image_uuid: Uuid,
    pub(crate) pages: PageTable,
    /// Where the digests of its chunks' leaves are kept.
    leaves: Option<Arc<LeafDigests>>,
    /// What the image continues, leased until it is committed.
    pub(crate) parent: Option<Arc<ImageReader>>,
    /// Whether nothing of the parent is left to be named.
    pub(crate) is_whole: bool,
    // Held for the push of a record, never during I/O.
    chunks: Mutex<Vec<PendingChunk>>,
    /// End of the last reserved extent; moves under the lock of `chunks`.
    tail: AtomicU64,
    /// End of the room reserved on disk; `u64::MAX` where the file system cannot.
    reserved: AtomicU64,
    sections: Mutex<Vec<StateSection>>,
    failed: AtomicBool,
    committed: bool,
}

/// A committed image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommittedImage {
    /// Its file: the path asked for, or a new one in the directory asked for.
    pub path: PathBuf,
    /// Its length.
    pub image_bytes: u64,
    /// Its UUID.
    pub image_uuid: Uuid,
    /// Its root digest, in hexadecimal: names every byte that a restore uses.
    pub root_digest: String,
}

impl ImageWriter {
    /// Begins an image at `path`, or in it where it is a directory.
    ///
    /// Everything is written to a temporary file beside it; `path` itself changes in
    /// [`ImageWriter::commit`]. An image that is there already is replaced then, and locked until
    /// then; one that somebody reads, and anything that is not an image, is refused.
    pub fn create(
        storage: Arc<dyn Storage>,
        path: &Path,
        regions: &[RegionLayout],
        options: &WriteOptions,
    ) -> Result<Self, StoreError> {
        check_writable(regions)?;
        let all = disks::all_regions(regions, &options.disks).map_err(disks::unwritable)?;
        let disk_frames = disks::frames(&options.disks).map_err(disks::unwritable)?;
        let target = Target::new(storage.as_ref(), path)?;
        chain::remove_stale_parts(storage.as_ref(), target.dir());
        if let Some(needed) = options.expected_bytes {
            space::ensure_free(storage.as_ref(), target.dir(), needed)?;
        }
        let part = target.part();
        let file = match &options.spare {
            Some(spare) => chain::take_over_spare(storage.as_ref(), spare, &part)?,
            None => chain::create_part(storage.as_ref(), &part)?,
        };
        Ok(Self {
            storage,
            target,
            part,
            file,
            options: options.clone(),
            regions: regions.to_vec(),
            disk_frames,
            image_uuid: Uuid::new_v4(),
            pages: PageTable::new(&all),
            leaves: None,
            parent: None,
            is_whole: false,
            chunks: Mutex::new(Vec::new()),
            tail: AtomicU64::new(wide(HEADER_BYTES)),
            reserved: AtomicU64::new(0),
            sections: Mutex::new(Vec::new()),
            failed: AtomicBool::new(false),
            committed: false,
        })
    }

    /// Has the digests of the chunks' leaves kept in `leaves`, for who reads a few pages of one later.
    ///
    /// Called before anything is written.
    pub fn keep_leaves(&mut self, leaves: Arc<LeafDigests>) {
        self.leaves = Some(leaves);
    }

    /// Writes pages: those of zeros cost an index entry, the others become one chunk.
    ///
    /// Blocks for the write. May be called from many threads at once. A failed write makes the
    /// image one that can only be aborted. The same page twice with one epoch keeps either copy.
    ///
    /// # Panics
    /// When the lengths of `frames` and `data` do not match or are out of bounds, or the epoch is
    /// above [`EPOCH_MAX`].
    pub fn write_chunk(
        &self,
        pages: ChunkPages<'_>,
        scratch: &mut ChunkScratch,
    ) -> Result<ChunkStats, StoreError> {
        let count = pages.frames.len();
        assert!(
            (1..=CHUNK_PAGES_MAX).contains(&count),
            "{count} pages do not make a chunk"
        );
        assert_eq!(
            pages.data.len(),
            count * PAGE_BYTES,
            "each frame has a page"
        );
        assert!(
            pages.epoch <= EPOCH_MAX,
            "epoch {} is too high",
            pages.epoch
        );
        self.pages.check(pages.frames)?;
        let stats = self.store(pages.data, scratch)?;
        let copies = pages.frames.iter().copied();
        let copies = copies.zip(scratch.sources.iter().copied());
        self.pages.record(pages.epoch, copies);
        Ok(stats)
    }

    /// Writes the bytes of pages as one chunk; `scratch` has then where each page is.
    pub(crate) fn store(
        &self,
        data: &[u8],
        scratch: &mut ChunkScratch,
    ) -> Result<ChunkStats, StoreError> {
        let ChunkScratch {
            compressor,
            packed,
            sources,
        } = scratch;
        let raw = pack(data, packed, sources);
        let mut stats = ChunkStats {
            zero_pages: wide((data.len() - raw.len()) / PAGE_BYTES),
            raw_bytes: wide(raw.len()),
            ..ChunkStats::default()
        };
        if !raw.is_empty() {
            let (codec, stored) = compressor
                .compress(self.options.codec, raw)
                .unwrap_or((ChunkCodec::None, raw));
            let chunk = self.append(codec, stored, raw.len() / PAGE_BYTES)?;
            for source in sources.iter_mut() {
                if let RunSource::Chunk { chunk: number, .. } = source {
                    *number = chunk;
                }
            }
            stats.stored_bytes = wide(stored.len());
            stats.compressed = codec != ChunkCodec::None;
        }
        Ok(stats)
    }

    /// Records that the pages of `run` are zeros, without their bytes: pages never touched.
    ///
    /// # Panics
    /// When the epoch is above [`EPOCH_MAX`].
    pub fn record_zero(&self, epoch: u32, run: PageRun) -> Result<(), StoreError> {
        assert!(epoch <= EPOCH_MAX, "epoch {epoch} is too high");
        self.pages.record_zero_run(epoch, run)
    }

    /// Adds a state section; it is written at commit.
    pub fn add_section(&self, section: StateSection) -> Result<(), StoreError> {
        let mut sections = self.sections.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = sections.iter().map(|other| other.payload.len()).sum();
        let fits = section.payload.len() <= SECTION_BYTES_MAX
            && wide(total + section.payload.len()) <= STATE_BYTES_MAX
            && (1..=SECTION_KIND_BYTES_MAX).contains(&section.kind.len())
            && sections.len() < SECTION_COUNT_MAX;
        let twin = |other: &StateSection| {
            (&other.kind, other.instance) == (&section.kind, section.instance)
        };
        if !fits || sections.iter().any(twin) {
            return Err(StoreError::Unwritable {
                reason: format!(
                    "state section {}.{} of {} bytes is there twice, too long or one too many",
                    section.kind,
                    section.instance,
                    section.payload.len()
                ),
            });
        }
        sections.push(section);
        Ok(())
    }

    /// Returns the frames that stand for the blocks of disk `disk`, by its place in the options.
    ///
    /// Blocks are written as pages are. The last one of a disk that does not end with a page is
    /// filled up with zeros.
    ///
    /// # Panics
    /// When there is no such disk.
    pub fn disk_frames(&self, disk: usize) -> PageRun {
        *self.disk_frames.get(disk).expect("disks are counted")
    }

    /// Returns the bytes of the image so far.
    pub fn bytes_written(&self) -> u64 {
        self.tail.load(Ordering::Relaxed)
    }

    /// Returns the number of chunks so far.
    fn chunk_count(&self) -> usize {
        let chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
        chunks.len()
    }

    /// Returns the image's UUID.
    pub fn image_uuid(&self) -> Uuid {
        self.image_uuid
    }

    /// Finishes the image and makes it visible, durably.
    ///
    /// Order is all: the file is synced before the rename, so that the name never stands for less
    /// than the whole image, and the directory after it. On an error before the rename nothing
    /// is left; an error of the last step leaves a whole image that a power cut may undo.
    pub fn commit(mut self, facts: ManifestFacts) -> Result<CommittedImage, StoreError> {
        if self.failed.load(Ordering::Acquire) {
            return Err(StoreError::Incomplete {
                path: self.part.clone(),
            });
        }
        if self.options.durable && self.options.guest_waits {
            // The disk works while the digests are made. A hint: the sync reports what goes wrong.
            self.file.start_writeback(0, self.bytes_written()).ok();
        }
        let header = self.write_tail(facts)?;
        self.write(header.encode().as_bytes(), 0)?;
        if let Err(error) = self.file.trim(header.file_bytes) {
            log::warn!("could not trim {}: {error}", self.part.display());
        }
        if self.options.durable {
            self.file
                .sync()
                .map_err(StoreError::io("sync", &self.part))?;
        }
        let storage = self.storage.as_ref();
        let path = self.target.final_path(storage, self.image_uuid)?;
        storage
            .rename(&self.part, &path)
            .map_err(StoreError::io("commit", &path))?;
        self.committed = true;
        if self.options.durable {
            let dir = self.target.dir();
            storage
                .sync_dir(dir)
                .map_err(StoreError::io("sync directory", dir))?;
        }
        Ok(CommittedImage {
            path,
            image_bytes: header.file_bytes,
            image_uuid: self.image_uuid,
            root_digest: header.root.to_string(),
        })
    }

    /// Ends the writing and removes what was written.
    pub fn abort(self) {}

    /// Appends a chunk of `page_count` pages and returns its number.
    fn append(
        &self,
        codec: ChunkCodec,
        stored: &[u8],
        page_count: usize,
    ) -> Result<u32, StoreError> {
        let check = if self.options.guest_waits {
            Check::Checksum(crc32c::crc32c(stored))
        } else {
            Check::Digest(self.digest(codec, stored))
        };
        let (number, offset, end) = {
            let mut chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
            let offset = self.tail.load(Ordering::Relaxed);
            let end = extent_end(offset, wide(stored.len()));
            if chunks.len() >= CHUNK_COUNT_MAX || end > IMAGE_BYTES_MAX {
                return Err(StoreError::Unwritable {
                    reason: format!("more than {} chunks or {end} bytes", chunks.len()),
                });
            }
            // Under the lock, so that records are in the order of their offsets without a gap.
            self.tail.store(end, Ordering::Relaxed);
            chunks.push(PendingChunk {
                offset,
                stored_bytes: u32::try_from(stored.len()).expect("chunks are short"),
                page_count: u16::try_from(page_count).expect("chunks are short"),
                codec,
                check,
            });
            (chunks.len() - 1, offset, end)
        };
        self.reserve(end);
        self.write(stored, offset)?;
        if self.options.durable && !self.options.guest_waits {
            // A hint: the sync reports what goes wrong.
            self.file.start_writeback(offset, wide(stored.len())).ok();
        }
        Ok(u32::try_from(number).expect("chunks are counted in 24 bits"))
    }

    /// Digests a chunk as it is stored.
    fn digest(&self, codec: ChunkCodec, stored: &[u8]) -> Digest {
        match &self.leaves {
            Some(leaves) if codec == ChunkCodec::None => {
                let split = Split::of(stored);
                let digest = split.digest;
                leaves.keep(split);
                digest
            }
            _ => Digest::of(stored),
        }
    }

    /// Reserves room on disk up to `end` and some more, ahead of the writes: it makes them a third
    /// faster on ext4. Whoever moves the mark reserves; others need not wait for that.
    fn reserve(&self, end: u64) {
        let reserved = self.reserved.load(Ordering::Relaxed);
        if end <= reserved {
            return;
        }
        let next = end + RESERVE_BYTES;
        let won =
            self.reserved
                .compare_exchange(reserved, next, Ordering::Relaxed, Ordering::Relaxed);
        if won.is_ok() && self.file.reserve(reserved, next - reserved).is_err() {
            // Not possible here, or the disk is nearly full: the writes will tell.
            self.reserved.store(u64::MAX, Ordering::Relaxed);
        }
    }

    fn write(&self, data: &[u8], offset: u64) -> Result<(), StoreError> {
        self.file.write_all_at(data, offset).map_err(|error| {
            self.failed.store(true, Ordering::Release);
            StoreError::io("write", &self.part)(error)
        })
    }

    /// Writes `data` at the tail.
    fn write_extent(&self, data: &[u8]) -> Result<Extent, StoreError> {
        let offset = self.tail.load(Ordering::Relaxed);
        self.write(data, offset)?;
        self.tail
            .store(extent_end(offset, wide(data.len())), Ordering::Relaxed);
        Ok(Extent {
            offset,
            bytes: wide(data.len()),
            digest: Digest::of(data),
        })
    }

    /// Writes everything after the chunks; returns the header that names it.
    fn write_tail(&self, facts: ManifestFacts) -> Result<Header, StoreError> {
        let own_chunks = self.chunk_count();
        let (runs, layers) = self.runs_and_layers(own_chunks)?;
        if runs.len() > RUN_COUNT_MAX {
            return Err(StoreError::Unwritable {
                reason: format!("{} runs of pages", runs.len()),
            });
        }
        let chunk_table = {
            let chunks = self.chunks.lock().unwrap_or_else(PoisonError::into_inner);
            let chunks =
                deferred::digest_all(self.file.as_ref(), &self.part, &chunks, |codec, stored| {
                    self.digest(codec, stored)
                })?;
            let records: Vec<_> = chunks.iter().map(Chunk::encode).collect();
            self.write_extent(records.as_bytes())?
        };
        let records: Vec<_> = runs.iter().map(|run| run.encode()).collect();
        let page_index = self.write_extent(records.as_bytes())?;
        let sections = self.write_sections()?;
        let guest_uuid = facts.uuid;
        let manifest = Manifest {
            format: FormatVersion::CURRENT,
            writer: concat!("livepoint ", env!("CARGO_PKG_VERSION")).to_owned(),
            image_uuid: self.image_uuid,
            created: facts.created,
            protocol: facts.protocol,
            guest: GuestFacts {
                name: facts.name,
                uuid: facts.uuid,
                vcpu_count: facts.vcpu_count,
                facts: facts.facts,
                domain_xml: facts.domain_xml,
            },
            page_bytes: PAGE_BYTES_FIELD,
            regions: self.regions.clone(),
            chunk_table,
            page_index,
            sections,
            disks: self.options.disks.clone(),
            read_only_disks: self.options.read_only_disks.clone(),
            parent: self
                .parent
                .as_deref()
                .filter(|_| !self.is_whole)
                .map(increment::parent_ref),
            layers,
            working_set: self.working_set(),
            statistics: facts.statistics,
        };
        let json = serde_json::to_vec(&manifest).map_err(|error| StoreError::Unwritable {
            reason: format!("the manifest does not encode: {error}"),
        })?;
        if wide(json.len()) > MANIFEST_BYTES_MAX {
            return Err(StoreError::Unwritable {
                reason: format!("a manifest of {} bytes", json.len()),
            });
        }
        let extent = self.write_extent(&json)?;
        let oldest_reader = if manifest.parent.is_none() {
            FormatVersion::FIRST
        } else {
            FormatVersion::FIRST_WITH_LAYERS
        };
        Ok(Header {
            format: FormatVersion::CURRENT,
            oldest_reader,
            image_uuid: self.image_uuid,
            guest_uuid,
            file_bytes: extent.offset + extent.bytes,
            manifest_offset: extent.offset,
            manifest_bytes: extent.bytes,
            root: extent.digest,
        })
    }

    /// Returns the memory that the guest wrote last: all that an increment captured, and of a whole
    /// image what was captured again, or for somebody who waited to write it.
    fn working_set(&self) -> Vec<PageRun> {
        if let Some(folded) = self.parent.as_ref().filter(|_| self.is_whole) {
            return folded.manifest().working_set.clone();
        }
        let since = u32::from(self.parent.is_none());
        working_set::newest_first(self.pages.pieces(self.regions.len()), since, &self.regions)
    }

    fn write_sections(&self) -> Result<Vec<SectionEntry>, StoreError> {
        let sections = self.sections.lock().unwrap_or_else(PoisonError::into_inner);
        sections
            .iter()
            .map(|section| {
                Ok(SectionEntry {
                    kind: section.kind.clone(),
                    instance: section.instance,
                    version: section.version,
                    extent: self.write_extent(&section.payload)?,
                })
            })
            .collect()
    }
}

impl Drop for ImageWriter {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // The lock is still held, so the name is still ours.
        if let Err(error) = self.storage.remove(&self.part) {
            log::warn!("could not remove {}: {error}", self.part.display());
        }
    }
}

/// Finds the pages of zeros and brings the others together: in place where there are no zeros.
///
/// `sources` gets one entry a page, with chunk number 0 for pages that have data.
fn pack<'a>(data: &'a [u8], packed: &'a mut Vec<u8>, sources: &mut Vec<RunSource>) -> &'a [u8] {
    sources.clear();
    let mut first_page = 0;
    for page in data.chunks_exact(PAGE_BYTES) {
        if is_zero(page) {
            sources.push(RunSource::Zero);
        } else {
            sources.push(RunSource::Chunk {
                chunk: 0,
                first_page,
            });
            first_page += 1;
        }
    }
    if narrow(u64::from(first_page)) == sources.len() {
        return data;
    }
    packed.clear();
    for (page, source) in data.chunks_exact(PAGE_BYTES).zip(sources.iter()) {
        if *source != RunSource::Zero {
            packed.extend_from_slice(page);
        }
    }
    packed
}
