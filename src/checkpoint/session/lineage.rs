//! The chain that a checkpoint is part of: the image that it continues, and the log of what was
//! written since.

use std::path::Path;
use std::sync::Arc;

use super::{Session, Work};
use crate::checkpoint::chain::{Chain, IncrementStatistics};
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::tracker::{Logging, Tracker};
use crate::store::{CarryOver, CommittedImage, ImageReader, ImageWriter, Storage};

impl Session {
    /// Finds the image that this one continues, and what was written since.
    pub(super) fn find_parent(
        &mut self,
        storage: &Arc<dyn Storage>,
        path: &Path,
    ) -> Result<(), Halt> {
        let Some(chain) = self.options.chain.clone() else {
            return Ok(());
        };
        let (guest, storage, path) = (self.guest.clone(), storage.clone(), path.to_owned());
        let asked = chain.clone();
        // On a thread that can be abandoned: the disk may not answer.
        let found = self.offload(Work::Storage, "lvp-parent", move || {
            asked
                .parent_for(&guest, storage.as_ref(), &path)
                .map_err(CheckpointError::store("continue"))
        })?;
        let whole_because = found.as_ref().err().copied();
        match found {
            Ok(parent) => {
                let tracker = Tracker::since_parent(self.guest.clone(), &self.layout);
                self.tracker = Arc::new(tracker);
                self.parent = Some(parent);
            }
            // Whatever its log has is of no use: it begins anew.
            Err(_) => chain.end(),
        }
        self.statistics.increment = Some(IncrementStatistics {
            parent: self.parent.as_ref().map(|parent| parent.image_uuid()),
            whole_because,
            carried_pages: 0,
        });
        Ok(())
    }

    /// Returns whether the guest's writes are tracked after this checkpoint.
    pub(crate) fn chain_goes_on(&self) -> bool {
        self.options.chain.is_some()
    }

    /// Starts the guest's dirty log, or takes part in the chain's.
    pub(crate) fn start_log(&self) -> Result<Logging, CheckpointError> {
        if self.tracker.is_since_parent() {
            Ok(Logging::of_chain(self.guest.clone()))
        } else {
            Logging::start(self.guest.clone())
        }
    }

    /// Keeps the log until the image is committed; it ends where that fails, if it began here.
    pub(crate) fn keep_log(&mut self, logging: Logging) {
        self.log = Some(logging);
    }

    /// Returns how much of the memory that need not be written is to be written all the same.
    pub(super) fn carry_over(&self) -> CarryOver {
        let Some(span) = self.options.span else {
            return CarryOver::LEAST;
        };
        let pages = self.parent.as_ref().map_or(0, |parent| parent.data_pages());
        CarryOver {
            pages: pages.div_ceil(u64::from(span.max(1))),
            ..CarryOver::LEAST
        }
    }

    /// Gives the chain the committed image, or ends it where that cannot be read back.
    pub(super) fn advance_chain(&mut self, next: Option<Arc<ImageReader>>) {
        let Some(chain) = &self.options.chain else {
            return;
        };
        if let Some(next) = next {
            chain.advance(&self.guest, next);
        } else {
            chain.end();
        }
        if let Some(log) = self.log.take() {
            log.leave_on();
        }
    }

    /// Has the chain's log know what this checkpoint took from it, which came to nothing.
    /// `all_ended` where no thread of it takes any more.
    pub(super) fn give_back(&mut self, all_ended: bool) {
        self.log = None;
        if !self.tracker.is_since_parent() {
            return;
        }
        if all_ended {
            self.tracker.give_back();
        } else if let Some(chain) = &self.options.chain {
            log::warn!("a thread of the checkpoint is stuck: the chain of increments ends");
            chain.end();
        }
    }

    /// Writes memory of earlier images into this one, so that they are not needed for ever.
    pub(super) fn carry(&mut self, image: ImageWriter) -> Result<ImageWriter, Halt> {
        if self.parent.is_none() {
            return Ok(image);
        }
        let (how, control) = (self.carry_over(), self.control.clone());
        let (image, carried) = self.offload(Work::Storage, "lvp-carry", move || {
            let carried = image.carry_over(how, || control.check().is_ok());
            let carried = carried.map_err(CheckpointError::store("write"))?;
            Ok((image, carried))
        })?;
        self.control.check()?;
        if let Some(increment) = &mut self.statistics.increment {
            increment.carried_pages = carried;
        }
        Ok(image)
    }
}

/// Opens a committed image, to be continued.
pub(super) fn read_back(
    storage: &dyn Storage,
    committed: &CommittedImage,
    chain: &Chain,
) -> Option<Arc<ImageReader>> {
    let opened = ImageReader::open(storage, &committed.path);
    let opened = opened.map(|mut reader| {
        reader.keep_leaves(chain.leaves().clone());
        reader
    });
    let reader = opened.inspect_err(|error| {
        log::warn!("the next image will be whole, since this one cannot be read: {error}");
    });
    let same = |reader: &ImageReader| reader.image_uuid() == committed.image_uuid;
    reader.ok().filter(same).map(Arc::new)
}
