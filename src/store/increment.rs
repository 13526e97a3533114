//! Increments: an image that has only the memory written since another, and names the rest of it
//! where that other image has it.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::page::{Gfn, PAGE_BYTES};
use crate::store::backend::Storage;
use crate::store::error::StoreError;
use crate::store::format::{CHUNK_PAGES_MAX, IndexRun, LAYER_COUNT_MAX, RunSource, narrow, wide};
use crate::store::index::Inherited;
use crate::store::layer::{self, file_name};
use crate::store::manifest::{LayerRef, ManifestFacts, ParentRef};
use crate::store::options::WriteOptions;
use crate::store::reader::{ImageReader, ReadScratch};
use crate::store::writer::{ChunkScratch, CommittedImage, ImageWriter};

/// How much of the memory that an image need not write again it writes all the same, so that
/// images before it are not needed for ever.
///
/// The pages in the oldest layers come first. With a part of all memory in each image of a chain,
/// an image is needed only by as many after it as there are parts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CarryOver {
    /// Pages to write at least.
    pub pages: u64,
    /// Most layers that may be left.
    pub layers_max: usize,
}

impl CarryOver {
    /// No more than an image has to, so that it can be read.
    pub const LEAST: Self = Self {
        pages: 0,
        layers_max: LAYER_COUNT_MAX,
    };

    /// Everything: the image then needs no other.
    pub const ALL: Self = Self {
        pages: u64::MAX,
        layers_max: 0,
    };
}

/// Writes an image that holds what `image` does, and needs no other, to `path` or into the directory
/// there. The image itself is left as it is.
pub fn fold(
    storage: &Arc<dyn Storage>,
    image: &Arc<ImageReader>,
    path: &Path,
    options: &WriteOptions,
) -> Result<CommittedImage, StoreError> {
    let manifest = image.manifest();
    let options = WriteOptions {
        disks: manifest.disks.clone(),
        read_only_disks: manifest.read_only_disks.clone(),
        ..options.clone()
    };
    let mut writer = ImageWriter::create(storage.clone(), path, &manifest.regions, &options)?;
    writer.parent = Some(image.clone());
    writer.carry_over(CarryOver::ALL, || true)?;
    for number in 0..manifest.sections.len() {
        writer.add_section(image.section(number)?)?;
    }
    writer.is_whole = true;
    let guest = &manifest.guest;
    writer.commit(ManifestFacts {
        name: guest.name.clone(),
        uuid: guest.uuid,
        domain_xml: guest.domain_xml.clone(),
        vcpu_count: guest.vcpu_count,
        facts: guest.facts.clone(),
        protocol: manifest.protocol.clone(),
        statistics: manifest.statistics.clone(),
        created: manifest.created,
    })
}

pub(crate) fn parent_ref(parent: &ImageReader) -> ParentRef {
    ParentRef {
        image_uuid: parent.image_uuid(),
        root_digest: parent.file().header.root,
        file: file_name(parent.path()),
    }
}

impl ImageWriter {
    /// Makes the image an increment of `parent`: pages that are never given to it are those of the
    /// parent, which stays leased until the commit.
    ///
    /// Fails where the parent has other memory, or is not in the image's directory: an image names
    /// others beside it only.
    pub fn inherit(&mut self, parent: Arc<ImageReader>) -> Result<(), StoreError> {
        let refuse = |reason: String| Err(StoreError::Unwritable { reason });
        let path = parent.path();
        if parent.manifest().regions != self.regions {
            return refuse(format!("{} has other regions of memory", path.display()));
        }
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            return refuse(format!("{} has a name that is not UTF-8", path.display()));
        };
        let beside = self.target.dir().join(name);
        if !parent.file().is_at(&beside)? {
            return refuse(format!(
                "{} is in another directory than its increment",
                path.display()
            ));
        }
        self.target.check_increment()?;
        self.parent = Some(parent);
        Ok(())
    }

    /// Copies pages of the parent that were not given to this image, as much of them as `how` says;
    /// returns how many. Ends early where `wanted` returns false.
    ///
    /// Every byte is checked by its digest on the way. Called once all captured pages are written.
    pub fn carry_over(&self, how: CarryOver, wanted: impl Fn() -> bool) -> Result<u64, StoreError> {
        let Some(parent) = &self.parent else {
            return Ok(0);
        };
        let first_kept_from = self.chunks_of_newest(parent, how.layers_max);
        let mut batch = Batch::new(self);
        let mut carried = 0;
        // From the highest number down: the oldest layers come last.
        for chunk in (0..parent.chunk_count()).rev() {
            if (carried >= how.pages && chunk < first_kept_from) || !wanted() {
                break;
            }
            carried += batch.add(parent, chunk)?;
        }
        batch.flush()?;
        Ok(carried)
    }

    /// Returns how many of the parent's chunks are in the `layers` newest layers of its child that
    /// still hold anything which this image does not.
    fn chunks_of_newest(&self, parent: &ImageReader, layers: usize) -> usize {
        if parent.layers().len() < layers {
            return usize::MAX;
        }
        let mut used = vec![false; parent.chunk_count()];
        for (chunk, used) in used.iter_mut().enumerate() {
            let mut runs = parent.runs_of_chunk(chunk);
            *used = runs.any(|run| {
                let frames = run.run.start.0..run.run.end().0;
                frames.map(Gfn).any(|gfn| !self.pages.has(gfn))
            });
        }
        let named = layer::named_by_child(parent, &used);
        if named.len() <= layers {
            return usize::MAX;
        }
        let last = layers.checked_sub(1).and_then(|at| named.get(at));
        last.map_or(0, |(_, chunks)| chunks.end)
    }

    /// Returns the index of the image, and the layers that it needs for it.
    pub(crate) fn runs_and_layers(
        &self,
        own_chunks: usize,
    ) -> Result<(Vec<IndexRun>, Vec<LayerRef>), StoreError> {
        let Some(parent) = &self.parent else {
            return Ok((self.pages.runs(None)?, Vec::new()));
        };
        let first_chunk = u32::try_from(own_chunks).expect("chunks are counted in 24 bits");
        let inherited = Inherited {
            runs: parent.index().runs(),
            first_chunk,
        };
        let mut runs = self.pages.runs(Some(inherited))?;
        let mut used = vec![false; parent.chunk_count()];
        for run in &runs {
            if let Some(used) = inherited_chunk(run, own_chunks).and_then(|at| used.get_mut(at)) {
                *used = true;
            }
        }
        let layers = layer::named_by_child(parent, &used);
        if layers.len() > LAYER_COUNT_MAX {
            return Err(StoreError::Unwritable {
                reason: format!("{} layers", layers.len()),
            });
        }
        renumber(&mut runs, own_chunks, &layers);
        Ok((runs, layers.into_iter().map(|(layer, _)| layer).collect()))
    }
}

/// Returns the number that a run's chunk has in the parent, where it is one of the parent's.
fn inherited_chunk(run: &IndexRun, own_chunks: usize) -> Option<usize> {
    match run.source {
        RunSource::Chunk { chunk, .. } => narrow(u64::from(chunk)).checked_sub(own_chunks),
        RunSource::Zero => None,
    }
}

/// Numbers the chunks of layers one after another: those of layers that are not needed are gone.
fn renumber(runs: &mut [IndexRun], own_chunks: usize, layers: &[(LayerRef, Range<usize>)]) {
    let mut first = own_chunks;
    let mut moved = Vec::with_capacity(layers.len());
    for (_, chunks) in layers {
        moved.push((chunks.clone(), first));
        first += chunks.len();
    }
    for run in runs {
        let Some(at) = inherited_chunk(run, own_chunks) else {
            continue;
        };
        let after = moved.partition_point(|(chunks, _)| chunks.start <= at);
        let (chunks, to) = after
            .checked_sub(1)
            .and_then(|last| moved.get(last))
            .expect("every chunk that is used is of a layer that is named");
        if let RunSource::Chunk { chunk, .. } = &mut run.source {
            *chunk = u32::try_from(to + (at - chunks.start)).expect("layers and chunks are few");
        }
    }
}

/// Pages on their way from chunks of the parent into full ones of the image.
struct Batch<'a> {
    writer: &'a ImageWriter,
    frames: Vec<Gfn>,
    data: Vec<u8>,
    read: ReadScratch,
    write: ChunkScratch,
}

impl<'a> Batch<'a> {
    fn new(writer: &'a ImageWriter) -> Self {
        Self {
            writer,
            frames: Vec::with_capacity(CHUNK_PAGES_MAX),
            data: Vec::with_capacity(CHUNK_PAGES_MAX * PAGE_BYTES),
            read: ReadScratch::default(),
            write: ChunkScratch::default(),
        }
    }

    /// Adds the pages of one chunk that the image does not have; returns how many.
    fn add(&mut self, parent: &ImageReader, chunk: usize) -> Result<u64, StoreError> {
        let mut wanted = Vec::new();
        for run in parent.runs_of_chunk(chunk) {
            let frames = (run.run.start.0..run.run.end().0).map(Gfn);
            let pages = frames.zip(run.first_page..);
            wanted.extend(pages.filter(|(gfn, _)| !self.writer.pages.has(*gfn)));
        }
        if wanted.is_empty() {
            return Ok(0);
        }
        let mut read = std::mem::take(&mut self.read);
        let raw = parent.read_chunk(chunk, &mut read)?;
        for &(gfn, page) in &wanted {
            if self.frames.len() == CHUNK_PAGES_MAX {
                self.flush()?;
            }
            let bytes = raw.get(page * PAGE_BYTES..(page + 1) * PAGE_BYTES);
            self.data
                .extend_from_slice(bytes.expect("the index was checked against the chunks"));
            self.frames.push(gfn);
        }
        self.read = read;
        Ok(wide(wanted.len()))
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        if self.frames.is_empty() {
            return Ok(());
        }
        self.writer.store(&self.data, &mut self.write)?;
        let copies = self.frames.iter().copied();
        let sources = self.write.sources.iter().copied();
        self.writer.pages.record_carried(copies.zip(sources));
        self.frames.clear();
        self.data.clear();
        Ok(())
    }
}
