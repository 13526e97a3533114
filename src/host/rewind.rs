//! A running domain back to an image, in place.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::checkpoint::{Chain, Rewind, micros};
use crate::guest::Guest;
use crate::host::image::check_host_for;
use crate::host::{HostError, Image};
use crate::machine::{Machine, MemoryFailure, MemoryRewind, Reuse};
use crate::page::PageRun;
use crate::restore::eager::{self, FillOptions};
use crate::restore::patch::{self, Patch};
use crate::store::ImageReader;

/// How a domain was put back to an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RewindSummary {
    /// The image.
    pub image: PathBuf,
    /// Its UUID.
    pub image_uuid: Uuid,
    /// Pages that were put back.
    pub pages: u64,
    /// Pages of the domain's memory.
    pub memory_pages: u64,
    /// Chunks of the image that hold them.
    pub chunks: u64,
    /// From the call to the domain's going on, in microseconds.
    pub total_us: u64,
    /// Of it, finding out what to put back, reading and checking it.
    pub prepare_us: u64,
    /// Of it, writing it into memory.
    pub memory_us: u64,
}

/// Fails where `image` is not of a machine like this one, or of another domain than those of `uuids`.
pub(super) fn check(image: &ImageReader, uuids: &[Uuid]) -> Result<(), HostError> {
    let manifest = image.manifest();
    let path = image.path().display();
    if !uuids.contains(&manifest.guest.uuid) {
        return Err(HostError::Invalid(format!(
            "{path} is of another domain, {} with UUID {}",
            manifest.guest.name, manifest.guest.uuid
        )));
    }
    if let Some(disk) = manifest.disks.first() {
        return Err(HostError::Unsupported(format!(
            "{path} has a disk, {}, which cannot be put back under a running domain: restore the \
             image",
            disk.name
        )));
    }
    check_host_for(image)
}

/// Puts `machine` back to `image`, which was checked.
pub(super) fn rewind(
    machine: &Arc<Machine>,
    chain: &Chain,
    image: &Arc<ImageReader>,
    threads: usize,
) -> Result<RewindSummary, HostError> {
    let began = Instant::now();
    let guest: Arc<dyn Guest> = machine.clone();
    let writes = |disk: &Arc<dyn crate::guest::GuestDisk>| !disk.facts().read_only;
    if let Some(disk) = guest.disks().iter().find(|disk| writes(disk)) {
        return Err(HostError::Unsupported(format!(
            "the domain writes to disk {}, which cannot be put back under it: restore the image",
            disk.facts().name
        )));
    }
    wait_for_memory(machine, guest.as_ref())?;
    let state = image.sections()?;
    let mut memory = Memory {
        machine,
        image,
        threads,
        rewind: Rewind::begin(&guest, chain)?,
        patch: None,
        prepare: Duration::ZERO,
        put_back: Duration::ZERO,
    };
    machine.rewind(state, &mut memory)?;
    let memory_pages = guest.regions().iter().map(|region| region.page_count).sum();
    let (pages, chunks) = match &memory.patch {
        Some(patch) => (patch.page_count(), patch.chunk_count()),
        None => (memory_pages, image.live_chunks().len() as u64),
    };
    let summary = RewindSummary {
        image: image.path().to_owned(),
        image_uuid: image.image_uuid(),
        pages,
        memory_pages,
        chunks,
        total_us: micros(began.elapsed()),
        prepare_us: micros(memory.prepare),
        memory_us: micros(memory.put_back),
    };
    memory.rewind.finish(image.clone());
    Ok(summary)
}

/// Waits until a lazy restore has filled memory: what is missing would come over what is put back.
fn wait_for_memory(machine: &Machine, guest: &dyn Guest) -> Result<(), HostError> {
    /// How often the machine is looked at: a fill that fails ends it.
    const LOOK: Duration = Duration::from_millis(50);
    while let Some(fill) = guest.filling() {
        if !fill.wait(LOOK) && machine.state().has_ended() {
            return Err(HostError::State {
                state: machine.state().to_string(),
                wanted: "it must run to be put back to an image",
            });
        }
    }
    Ok(())
}

/// The domain's memory on its way back.
struct Memory<'a> {
    machine: &'a Machine,
    image: &'a ImageReader,
    threads: usize,
    rewind: Rewind,
    /// What is put back; `None` where that is all.
    patch: Option<Patch<'a>>,
    prepare: Duration,
    put_back: Duration,
}

impl MemoryRewind for Memory<'_> {
    fn prepare(&mut self) -> Result<Reuse, MemoryFailure> {
        let began = Instant::now();
        eager::check_layout(&self.image.manifest().regions, self.machine.regions())?;
        let reuse = if let Some((last, written)) = self.rewind.written()? {
            let other: Vec<PageRun> = self.image.differing_runs(&last)?;
            let wanted = patch::union(&written, &other);
            self.patch = Some(Patch::read(self.image, wanted, self.threads)?);
            Reuse::Rest
        } else {
            let chunks = self.image.live_chunks();
            self.image
                .for_each_chunk(&chunks, self.threads, |_, _| {})?;
            Reuse::Nothing
        };
        self.prepare = began.elapsed();
        Ok(reuse)
    }

    fn put_back(&mut self) -> Result<(), MemoryFailure> {
        let began = Instant::now();
        let regions = self.machine.regions();
        if let Some(patch) = &self.patch {
            patch.apply(regions)?;
        } else {
            let options = FillOptions {
                threads: self.threads,
                memory_is_fresh: true,
            };
            eager::fill(self.image, regions, &options)?;
        }
        self.put_back = began.elapsed();
        Ok(())
    }
}

/// Opens the image that `guest` is put back to: the one at `to`, or the last of its chain.
pub(super) fn find(
    to: Option<&Path>,
    chain: &Chain,
    guest: &Arc<dyn Guest>,
) -> Result<Arc<ImageReader>, HostError> {
    match (to, chain.parent_of(guest)) {
        (Some(path), _) if !path.is_absolute() => Err(HostError::Invalid(format!(
            "{} is not an absolute path",
            path.display()
        ))),
        (Some(path), last) => {
            let mut image = Image::open(path)?;
            if last.is_some() {
                image.keep_leaves(chain.leaves());
            }
            Ok(Arc::new(image.into_reader()))
        }
        (None, Some(last)) => Ok(last),
        (None, None) => Err(HostError::Invalid(
            "the domain has no incremental checkpoint to go back to: say which image".to_owned(),
        )),
    }
}
