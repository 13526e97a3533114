//! Checking a whole image, and describing it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use jiff::Timestamp;
use serde::Serialize;
use uuid::Uuid;

use crate::page::PAGE_BYTES;
use crate::store::disks::{DISK_FRAMES_START, DiskLayout, ReadOnlyDisk};
use crate::store::error::StoreError;
use crate::store::format::{ChunkCodec, wide};
use crate::store::manifest::{LayerRef, ParentRef};
use crate::store::reader::{ImageReader, ReadScratch};

/// What [`ImageReader::verify`] read; it is whole, else there is an error instead.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Length of the image.
    pub image_bytes: u64,
    /// Chunks whose digests hold and which decode, those used of layers included.
    pub chunk_count: u64,
    /// Other images that hold a part of this one's memory, and were checked with it.
    pub layer_count: u64,
    /// Bytes of guest memory in them, superseded copies included.
    pub chunk_raw_bytes: u64,
    /// State sections whose digests hold.
    pub section_count: u64,
    /// The root digest, in hexadecimal.
    pub root_digest: String,
}

/// An image in figures, for people and for `--json`.
#[derive(Clone, Debug, Serialize)]
pub struct ImageSummary {
    /// Format that the image is written in.
    pub format: String,
    /// Build that wrote it.
    pub writer: String,
    /// The image's UUID.
    pub image_uuid: Uuid,
    /// The root digest, in hexadecimal.
    pub root_digest: String,
    /// The captured moment.
    pub created: Timestamp,
    /// The protocol that captured it.
    pub protocol: String,
    /// The domain's name.
    pub name: String,
    /// The domain's UUID.
    pub guest_uuid: Uuid,
    /// Number of vCPUs.
    pub vcpu_count: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Pages of it with data.
    pub data_pages: u64,
    /// Pages of zeros.
    pub zero_pages: u64,
    /// Pages whose data is in a layer: they were not written since that image.
    pub inherited_pages: u64,
    /// Copies in the image that a later one superseded.
    pub superseded_pages: u64,
    /// The image that this one continues.
    pub parent: Option<ImageName>,
    /// The images that hold a part of this one's memory, the newest first.
    pub layers: Vec<ImageName>,
    /// Pages of memory that the guest had written last, as the image records them.
    pub working_set_pages: u64,
    /// Length of the image.
    pub image_bytes: u64,
    /// Chunks by how they are stored.
    pub chunks: ChunkCounts,
    /// Bytes of all chunks as stored.
    pub stored_bytes: u64,
    /// Records of the page index.
    pub index_runs: u64,
    /// Disks whose content is in it.
    pub disks: Vec<DiskLayout>,
    /// Disks that are only named.
    pub read_only_disks: Vec<ReadOnlyDisk>,
    /// State sections.
    pub sections: Vec<SectionSummary>,
    /// Figures of the checkpoint.
    pub statistics: serde_json::Value,
}

/// An image as another one names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageName {
    /// Its file, in the same directory.
    pub file: String,
    /// Its UUID.
    pub image_uuid: Uuid,
    /// Its root digest, in hexadecimal.
    pub root_digest: String,
}

impl From<&ParentRef> for ImageName {
    fn from(named: &ParentRef) -> Self {
        Self {
            file: named.file.clone(),
            image_uuid: named.image_uuid,
            root_digest: named.root_digest.to_string(),
        }
    }
}

impl From<&LayerRef> for ImageName {
    fn from(named: &LayerRef) -> Self {
        Self {
            file: named.file.clone(),
            image_uuid: named.image_uuid,
            root_digest: named.root_digest.to_string(),
        }
    }
}

/// Chunks by how they are stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ChunkCounts {
    /// Not compressed.
    pub none: u64,
    /// By LZ4.
    pub lz4: u64,
    /// By Zstandard.
    pub zstd: u64,
}

/// A state section in figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SectionSummary {
    /// What it describes.
    pub kind: String,
    /// Which one of its kind.
    pub instance: u32,
    /// Version of its layout.
    pub version: u16,
    /// Its length.
    pub bytes: u64,
}

impl ImageReader {
    /// Reads every byte that a restore uses and checks it, by up to `threads` threads.
    ///
    /// The first damage found is the error. Opening has checked the rest: header, manifest, chunk
    /// table and page index.
    pub fn verify(&self, threads: usize) -> Result<VerifyReport, StoreError> {
        // All of its own; of its layers what a restore uses.
        let own = 0..self.own_chunk_count();
        let layers = self.own_chunk_count()..self.chunk_count();
        let live = layers.filter(|&chunk| self.runs_of_chunk(chunk).next().is_some());
        let chunks: Vec<usize> = own.chain(live).collect();
        self.for_each_chunk(&chunks, threads, |_, _| {})?;
        // Taken and dropped: that they all decode into a set is the check.
        let _sections = self.sections()?;
        Ok(VerifyReport {
            image_bytes: self.image_bytes(),
            chunk_count: wide(chunks.len()),
            layer_count: wide(self.layers().len()),
            chunk_raw_bytes: chunks
                .iter()
                .filter_map(|&chunk| self.chunks().get(chunk))
                .map(|chunk| wide(chunk.raw_bytes()))
                .sum(),
            section_count: wide(self.manifest().sections.len()),
            root_digest: self.root_digest(),
        })
    }

    /// Reads `chunks` by up to `threads` threads, and hands each to `work` once it is checked.
    ///
    /// Ends early on the first error, which it returns.
    pub fn for_each_chunk(
        &self,
        chunks: &[usize],
        threads: usize,
        work: impl Fn(usize, &[u8]) + Sync,
    ) -> Result<(), StoreError> {
        self.in_parallel(chunks, threads, |chunk, scratch| {
            work(chunk, self.read_chunk(chunk, scratch)?);
            Ok(())
        })
    }

    /// Has up to `threads` threads do `work` for each of `chunks`. Ends early on the first error.
    pub(crate) fn in_parallel(
        &self,
        chunks: &[usize],
        threads: usize,
        work: impl Fn(usize, &mut ReadScratch) -> Result<(), StoreError> + Sync,
    ) -> Result<(), StoreError> {
        let next = AtomicUsize::new(0);
        let stop = AtomicBool::new(false);
        let run = || -> Result<(), StoreError> {
            let mut scratch = ReadScratch::default();
            while !stop.load(Ordering::Relaxed) {
                let Some(&chunk) = chunks.get(next.fetch_add(1, Ordering::Relaxed)) else {
                    break;
                };
                if let Err(error) = work(chunk, &mut scratch) {
                    stop.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            Ok(())
        };
        let helpers = threads.max(1).min(chunks.len()).saturating_sub(1);
        std::thread::scope(|scope| {
            let mut joins = Vec::with_capacity(helpers);
            for number in 1..=helpers {
                let thread = std::thread::Builder::new()
                    .name(format!("lvp-read-{number}"))
                    .spawn_scoped(scope, run);
                match thread {
                    Ok(join) => joins.push(join),
                    // This thread reads everything if it must.
                    Err(error) => log::warn!("could not start a reading thread: {error}"),
                }
            }
            let mut outcome = run();
            for join in joins {
                let joined = join
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                outcome = outcome.and(joined);
            }
            outcome
        })
    }

    /// Describes the image in figures, without reading its chunks.
    pub fn summary(&self) -> ImageSummary {
        let manifest = self.manifest();
        let memory_pages: u64 = manifest
            .regions
            .iter()
            .map(|region| region.page_count)
            .sum();
        let zero_pages: u64 = self.zero_runs().map(|run| run.page_count).sum();
        let data_pages = memory_pages - zero_pages;
        let own = || (0..self.own_chunk_count()).flat_map(|chunk| self.runs_of_chunk(chunk));
        let own_pages: u64 = own().map(|part| part.run.page_count).sum();
        let own_memory = own().filter(|part| part.run.start.0 < DISK_FRAMES_START);
        let own_memory_pages: u64 = own_memory.map(|part| part.run.page_count).sum();
        let mut chunks = ChunkCounts::default();
        let mut chunk_pages = 0;
        let mut stored_bytes = 0;
        let own = self.chunks().get(..self.own_chunk_count());
        for chunk in own.unwrap_or_default() {
            chunk_pages += u64::from(chunk.page_count);
            stored_bytes += u64::from(chunk.stored_bytes);
            match chunk.codec {
                ChunkCodec::None => chunks.none += 1,
                ChunkCodec::Lz4 => chunks.lz4 += 1,
                ChunkCodec::Zstd => chunks.zstd += 1,
            }
        }
        let sections = manifest.sections.iter().map(|entry| SectionSummary {
            kind: entry.kind.clone(),
            instance: entry.instance,
            version: entry.version,
            bytes: entry.extent.bytes,
        });
        ImageSummary {
            format: format!("{}.{}", manifest.format.major, manifest.format.minor),
            writer: manifest.writer.clone(),
            image_uuid: manifest.image_uuid,
            root_digest: self.root_digest(),
            created: manifest.created,
            protocol: manifest.protocol.clone(),
            name: manifest.guest.name.clone(),
            guest_uuid: manifest.guest.uuid,
            vcpu_count: manifest.guest.vcpu_count,
            memory_bytes: memory_pages * wide(PAGE_BYTES),
            data_pages,
            zero_pages,
            superseded_pages: chunk_pages - own_pages,
            inherited_pages: data_pages - own_memory_pages,
            parent: manifest.parent.as_ref().map(ImageName::from),
            layers: manifest.layers.iter().map(ImageName::from).collect(),
            working_set_pages: manifest.working_set.iter().map(|it| it.page_count).sum(),
            image_bytes: self.image_bytes(),
            chunks,
            stored_bytes,
            index_runs: wide(self.index().runs().len()),
            disks: manifest.disks.clone(),
            read_only_disks: manifest.read_only_disks.clone(),
            sections: sections.collect(),
            statistics: manifest.statistics.clone(),
        }
    }
}
