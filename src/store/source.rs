//! One file of images: its header, its manifest and its tables, believed only with their digests.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use zerocopy::{FromBytes, Immutable, KnownLayout, Unaligned};

use crate::state::SECTION_BYTES_MAX;
use crate::store::backend::{LockKind, Storage, StorageFile};
use crate::store::disks;
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::{
    CHUNK_COUNT_MAX, CHUNK_RECORD_BYTES, Chunk, Digest, FormatVersion, HEADER_BYTES, Header,
    IMAGE_BYTES_MAX, IndexRun, LAYER_COUNT_MAX, MANIFEST_BYTES_MAX, PAGE_BYTES_FIELD,
    RUN_COUNT_MAX, RUN_RECORD_BYTES, SECTION_COUNT_MAX, SECTION_KIND_BYTES_MAX, STATE_BYTES_MAX,
    extent_end, narrow, wide,
};
use crate::store::index::PageIndex;
use crate::store::manifest::{Extent, Manifest, is_plain_name};
use crate::store::options::check_regions;
use crate::store::working_set;

/// Records of a table that are read at once.
const BLOCK_RECORDS: usize = 8192;

/// A file that is open and leased: while this lives nobody replaces or removes it.
#[derive(Debug)]
pub(crate) struct LeasedFile {
    pub(crate) path: PathBuf,
    // Locked shared; closing it ends the lease.
    file: Box<dyn StorageFile>,
    pub(crate) header: Header,
}

impl LeasedFile {
    /// Opens and leases the file at `path`, and checks its header.
    pub(crate) fn open(storage: &dyn Storage, path: PathBuf) -> Result<Self, StoreError> {
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
        Ok(Self { path, file, header })
    }

    /// Reads the manifest and checks all that it says of the file.
    pub(crate) fn manifest(&self) -> Result<Manifest, StoreError> {
        let manifest = self.source().read_manifest(&self.header)?;
        check_manifest(&manifest, &self.header).map_err(|damage| damage.of(&self.path))?;
        Ok(manifest)
    }

    /// Returns whether `path` names this very file.
    pub(crate) fn is_at(&self, path: &Path) -> Result<bool, StoreError> {
        self.file.is_at(path).map_err(StoreError::io("find", path))
    }

    /// Has `to` share a range of the file, without copying.
    pub(crate) fn share(&self, offset: u64, bytes: u64, to: &File, at: u64) -> io::Result<()> {
        self.file.share(offset, bytes, to, at)
    }

    pub(crate) fn source(&self) -> Source<'_> {
        Source {
            file: self.file.as_ref(),
            path: &self.path,
        }
    }
}

/// Reads what the image at `path` says about itself, without leasing it.
pub(crate) fn peek_manifest(storage: &dyn Storage, path: &Path) -> Result<Manifest, StoreError> {
    let file = storage.open(path).map_err(StoreError::io("open", path))?;
    let header = read_header(file.as_ref(), path)?;
    let source = Source {
        file: file.as_ref(),
        path,
    };
    let manifest = source.read_manifest(&header)?;
    check_manifest(&manifest, &header).map_err(|damage| damage.of(path))?;
    Ok(manifest)
}

/// An image whose file the caller has locked, to be copied.
#[derive(Debug)]
pub(crate) struct RawImage {
    path: PathBuf,
    file: Box<dyn StorageFile>,
    pub(crate) header: Header,
    /// As it is in the file.
    pub(crate) manifest: Vec<u8>,
}

impl RawImage {
    /// Opens the image at `path`, and checks header and manifest.
    pub(crate) fn open(storage: &dyn Storage, path: &Path) -> Result<Self, StoreError> {
        let file = storage.open(path).map_err(StoreError::io("open", path))?;
        let header = read_header(file.as_ref(), path)?;
        let source = Source {
            file: file.as_ref(),
            path,
        };
        let mut manifest = Vec::new();
        source.read_into(&manifest_extent(&header), Place::Manifest, &mut manifest)?;
        Ok(Self {
            path: path.to_owned(),
            file,
            header,
            manifest,
        })
    }

    /// Fills `out` from `offset` on, with what nobody has checked.
    pub(crate) fn read(&self, out: &mut [u8], offset: u64) -> Result<(), StoreError> {
        self.file
            .read_exact_at(out, offset)
            .map_err(StoreError::io("read", &self.path))
    }
}

fn manifest_extent(header: &Header) -> Extent {
    Extent {
        offset: header.manifest_offset,
        bytes: header.manifest_bytes,
        digest: header.root,
    }
}

/// The file of an image, whose bytes count only with their digest.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a> {
    file: &'a dyn StorageFile,
    path: &'a Path,
}

impl Source<'_> {
    /// Reads an extent whose length the caller has compared with a limit and the file's length.
    pub(crate) fn read_into(
        self,
        extent: &Extent,
        place: Place,
        out: &mut Vec<u8>,
    ) -> Result<(), StoreError> {
        self.read_checked(extent, place, out, Digest::of)
    }

    /// Like [`Source::read_into`], with the caller's way to make the digest.
    pub(crate) fn read_checked(
        self,
        extent: &Extent,
        place: Place,
        out: &mut Vec<u8>,
        digest: impl FnOnce(&[u8]) -> Digest,
    ) -> Result<(), StoreError> {
        self.read_raw(extent.offset, narrow(extent.bytes), out)?;
        let found = digest(out);
        if found == extent.digest {
            return Ok(());
        }
        let reason = format!(
            "should have digest {}, its bytes make {found}",
            extent.digest
        );
        Err(Damage::new(place, reason).of(self.path))
    }

    /// Reads bytes that the caller checks.
    pub(crate) fn read_raw(
        self,
        offset: u64,
        bytes: usize,
        out: &mut Vec<u8>,
    ) -> Result<(), StoreError> {
        out.resize(bytes, 0);
        self.file
            .read_exact_at(out, offset)
            .map_err(StoreError::io("read", self.path))
    }

    fn read_manifest(self, header: &Header) -> Result<Manifest, StoreError> {
        let mut json = Vec::new();
        self.read_into(&manifest_extent(header), Place::Manifest, &mut json)?;
        serde_json::from_slice(&json).map_err(|error| {
            Damage::new(Place::Manifest, format!("does not decode: {error}")).of(self.path)
        })
    }

    pub(crate) fn read_chunks(self, manifest: &Manifest) -> Result<Vec<Chunk>, StoreError> {
        let chunks = self.read_records(&manifest.chunk_table, Place::ChunkTable, Chunk::decode)?;
        check_tiling(&chunks, manifest.chunk_table.offset)
            .map_err(|damage| damage.of(self.path))?;
        Ok(chunks)
    }

    pub(crate) fn read_index(
        self,
        manifest: &Manifest,
        chunks: &[Chunk],
    ) -> Result<PageIndex, StoreError> {
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
pub(crate) fn check_manifest(manifest: &Manifest, header: &Header) -> Result<(), Damage> {
    let damaged = |reason: String| Damage::new(Place::Manifest, reason);
    if manifest.format != header.format
        || manifest.page_bytes != PAGE_BYTES_FIELD
        || manifest.image_uuid != header.image_uuid
        || manifest.guest.uuid != header.guest_uuid
    {
        return Err(damaged("is not that of the header".to_owned()));
    }
    disks::frames(&manifest.disks).map_err(|reason| disks::damaged(&reason))?;
    if manifest.read_only_disks.len() > disks::DISK_COUNT_MAX {
        return Err(damaged("names too many disks".to_owned()));
    }
    check_names(manifest, header)?;
    check_regions(&manifest.regions).map_err(|what| damaged(format!("describes {what}")))?;
    working_set::check(&manifest.working_set, &manifest.regions)?;
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

/// Checks what the manifest says of other images: names in the same directory, no image twice.
fn check_names(manifest: &Manifest, header: &Header) -> Result<(), Damage> {
    let Manifest { parent, layers, .. } = manifest;
    let damaged = |reason: String| Damage::new(Place::Manifest, reason);
    if parent.is_none() && layers.is_empty() {
        return Ok(());
    }
    if header.oldest_reader < FormatVersion::FIRST_WITH_LAYERS && !layers.is_empty() {
        return Err(damaged("has layers, which its format cannot".to_owned()));
    }
    if layers.len() > LAYER_COUNT_MAX {
        return Err(damaged(format!("lists {} layers", layers.len())));
    }
    if let Some(parent) = parent
        && !is_plain_name(&parent.file)
    {
        return Err(damaged(format!("names a parent {:?}", parent.file)));
    }
    let mut seen = vec![header.image_uuid];
    for (number, layer) in layers.iter().enumerate() {
        let place = Place::Layer { layer: number };
        if !is_plain_name(&layer.file) {
            return Err(Damage::new(place, format!("is named {:?}", layer.file)));
        }
        if narrow(u64::from(layer.chunk_count)) > CHUNK_COUNT_MAX {
            let reason = format!("has {} chunks", layer.chunk_count);
            return Err(Damage::new(place, reason));
        }
        if seen.contains(&layer.image_uuid) {
            return Err(Damage::new(place, "is the image itself, or there twice"));
        }
        seen.push(layer.image_uuid);
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
