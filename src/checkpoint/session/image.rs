//! The image of a checkpoint: begun before anything is captured, committed at the end.

use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use super::lineage::read_back;
use super::{Session, Work};
use crate::checkpoint::capture::touched_pages;
use crate::checkpoint::commit::GatedStorage;
use crate::checkpoint::disks;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::options::Protocol;
use crate::checkpoint::protocol::Captured;
use crate::checkpoint::stats::micros;
use crate::checkpoint::tracker::DirtySet;
use crate::store::{
    CommittedImage, Garbage, ImageWriter, ManifestFacts, Storage, StoreError, WriteOptions,
    collect_garbage, estimate_bytes,
};

/// How long the image may still be in use by this process: a checkpoint that was just given up may
/// have threads left that are in the middle of a write.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(1);
const HANDOVER_LOOK: Duration = Duration::from_millis(5);

impl Session {
    pub(super) fn begin_image(
        &mut self,
        storage: Arc<dyn Storage>,
        path: PathBuf,
    ) -> Result<ImageWriter, Halt> {
        let storage = Arc::new(GatedStorage::new(storage, self.control.gate.clone()));
        let regions = self.layout.for_image();
        // What a spare file frees is as much as it is likely to need.
        let check_space = self.options.check_space && self.options.spare.is_none();
        let expected_bytes = if check_space {
            Some(estimate_bytes(self.expected_pages()?))
        } else {
            None
        };
        self.control.check()?;
        let (copied, named) = disks::describe(&self.guest.disks());
        let options = WriteOptions {
            codec: self.options.codec,
            durable: self.options.durable,
            spare: self.options.spare.clone(),
            guest_waits: self.options.protocol == Protocol::Stop,
            expected_bytes,
            disks: copied,
            read_only_disks: named,
        };
        let parent = self.parent.clone();
        let leaves = self.options.chain.as_ref().map(|it| it.leaves().clone());
        self.offload(Work::Storage, "lvp-create", move || {
            let began = Instant::now();
            let begun = loop {
                match ImageWriter::create(storage.clone(), &path, &regions, &options) {
                    Err(StoreError::InUse {
                        holder: Some(holder),
                        ..
                    }) if holder.pid == process::id() && began.elapsed() < HANDOVER_PATIENCE => {
                        thread::sleep(HANDOVER_LOOK);
                    }
                    begun => break begun,
                }
            };
            let begun = begun.and_then(|mut image| {
                leaves.into_iter().for_each(|it| image.keep_leaves(it));
                match parent {
                    Some(parent) => image.inherit(parent).map(|()| image),
                    None => Ok(image),
                }
            });
            begun.map_err(CheckpointError::store("begin"))
        })
    }

    /// Returns the pages that the image will hold at most, by what is known now.
    fn expected_pages(&self) -> Result<u64, Halt> {
        if self.parent.is_none() {
            return Ok(touched_pages(&self.layout, || self.control.check().is_ok()));
        }
        let dirty = self.tracker.peek(&mut DirtySet::new(&self.layout))?;
        let carried = self.carry_over().pages;
        Ok((dirty + carried).min(self.layout.page_count() as u64))
    }

    pub(super) fn commit(
        &mut self,
        captured: Captured,
        storage: Arc<dyn Storage>,
    ) -> Result<CommittedImage, Halt> {
        let Captured { sections, moment } = captured;
        let image = self.image.take().and_then(Arc::into_inner);
        let image = image.expect("the protocol ended all who held it");
        let image = self.carry(image)?;
        let pages = self.layout.page_count() as u64;
        self.statistics.written = self.tally.totals(pages);
        self.statistics.untouched_pages = self.tally.untouched_pages();
        self.ask_vcpus();
        self.finish_statistics();
        let statistics =
            serde_json::to_value(&self.statistics).expect("numbers and names encode as JSON");
        let description = self.guest.describe();
        let facts = ManifestFacts {
            name: description.name,
            uuid: description.uuid,
            domain_xml: description.domain_xml,
            vcpu_count: description.vcpu_count,
            facts: description.facts,
            protocol: self.options.protocol.name().to_owned(),
            statistics,
            created: moment,
        };
        let began = Instant::now();
        let chain = self.options.chain.clone();
        let keep = self.options.keep;
        let (committed, next, retention) =
            self.offload(Work::Storage, "lvp-commit", move || {
                for section in sections {
                    image
                        .add_section(section)
                        .map_err(CheckpointError::store("add state to"))?;
                }
                let committed = image
                    .commit(facts)
                    .map_err(CheckpointError::store("commit"))?;
                let next = chain.and_then(|chain| read_back(storage.as_ref(), &committed, &chain));
                let retention = keep.and_then(|keep| retain(storage.as_ref(), &committed, keep));
                Ok((committed, next, retention))
            })?;
        self.statistics.retention = retention;
        self.advance_chain(next);
        self.statistics.commit_us = micros(began.elapsed());
        let bytes = committed.image_bytes;
        self.control
            .bytes_written
            .fetch_max(bytes, Ordering::Relaxed);
        Ok(committed)
    }
}

/// Removes images that are older than the newest `keep`. The new one is whole whatever comes of it.
fn retain(storage: &dyn Storage, committed: &CommittedImage, keep: u32) -> Option<Garbage> {
    let dir = committed.path.parent()?;
    let keep = usize::try_from(keep.max(1)).unwrap_or(usize::MAX);
    let collected = collect_garbage(storage, dir, keep);
    let collected = collected.inspect_err(|error| {
        log::warn!("could not remove old images: {error}");
    });
    collected.ok()
}
