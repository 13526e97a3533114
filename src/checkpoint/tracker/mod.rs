//! Which pages must be copied: the guest's dirty log, the VMM's own writes, and the scan's mask.
//!
//! Every copy follows one rule, **re-arm first, copy second**. A store that races a copy then
//! sets the page's bit again, and a later harvest copies the page whole.

mod dirty_set;
mod protection;

use std::sync::Arc;

use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::{Layout, PIECE, WINDOW_PIECES, Window};
use crate::guest::Guest;
use crate::page::{AtomicPageBitmap, Gfn, PageRun, runs_of_set_bits};
use crate::sync::atomic::{Ordering, fence};

pub(crate) use dirty_set::{DirtySet, DirtyWindow};
pub(crate) use protection::{Unprotectable, WriteProtection};

/// Dirty logging of a guest, from its start until this is dropped at the latest.
pub(crate) struct Logging {
    guest: Arc<dyn Guest>,
    on: bool,
}

impl Logging {
    /// Starts dirty logging.
    ///
    /// From here on every page reads as dirty until it is re-armed once; the mask of scanned
    /// pieces keeps harvests from taking that for dirty.
    pub(crate) fn start(guest: Arc<dyn Guest>) -> Result<Self, CheckpointError> {
        // Marks from before are of writes that the scan will see.
        guest.host_writes().clear();
        // Made first: its drop ends a log that was started only in part.
        let logging = Self { guest, on: true };
        let started = logging.guest.dirty_log().start();
        started.map_err(CheckpointError::dirty_log("start"))?;
        Ok(logging)
    }

    /// Ends dirty logging.
    pub(crate) fn stop(mut self) -> Result<(), CheckpointError> {
        self.on = false;
        let stopped = self.guest.dirty_log().stop();
        stopped.map_err(CheckpointError::dirty_log("stop"))
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        if self.on
            && let Err(error) = self.guest.dirty_log().stop()
        {
            log::error!("could not stop the dirty log: {error}");
        }
    }
}

/// Dirty tracking of one checkpoint, shared by its scan and its harvests.
pub(crate) struct Tracker {
    guest: Arc<dyn Guest>,
    layout: Arc<Layout>,
    /// One bit a piece: the scan has re-armed it, and harvests care for it from then on.
    scanned: AtomicPageBitmap,
}

impl Tracker {
    pub(crate) fn new(guest: Arc<dyn Guest>, layout: Arc<Layout>) -> Self {
        Self {
            guest,
            scanned: AtomicPageBitmap::new(layout.piece_count() as u64),
            layout,
        }
    }

    /// Prepares a window for the scan's copy, which must come after this returns.
    ///
    /// The order is: re-arm, flag, fence, copy. With the flag before the re-arm, a harvest would
    /// take the initial ones of the log for dirty pages; with the flag after the copy, a harvest
    /// between the two would drop the VMM's writes to pages that are already copied.
    pub(crate) fn arm_for_scan(&self, window: &Window) -> Result<(), Halt> {
        let bits = [u64::MAX; WINDOW_PIECES * WORDS_PER_PIECE];
        let words = window.page_count.div_ceil(64);
        self.rearm(
            window.region,
            window.first_page,
            window.page_count,
            &bits[..words],
        )?;
        self.scanned
            .set_run(window.first_piece as u64, window.piece_count() as u64);
        // Keeps the copy's loads behind the flag's store; pairs with the fence in `collect`.
        fence(Ordering::SeqCst);
        Ok(())
    }

    /// Collects the pages that must be copied, and clears or re-arms nothing in the log.
    ///
    /// The order is: take the VMM's marks, look at the mask, fetch the log.
    /// - A mark that is taken announces a write that is complete. If the mask then says that its
    ///   piece is not scanned, the scan's copy is still to come and sees the write, so that the
    ///   mark may be forgotten. Looking at the mask first would lose it: the scan could copy
    ///   before the write and flag after the look.
    /// - A piece that the mask has was re-armed before the log is fetched, so that its bits are
    ///   real stores and not the log's initial ones. Bits of other pieces stay in the log.
    pub(crate) fn collect(&self, into: &mut DirtySet) -> Result<(), Halt> {
        for (region, place) in into.regions_mut().zip(self.layout.regions()) {
            region.host.fill(0);
            self.guest
                .host_writes()
                .take_into(place.slot, &mut region.host);
        }
        // Keeps the loads of the mask behind the taken marks; pairs with `arm_for_scan`.
        fence(Ordering::SeqCst);
        into.look_at_mask(&self.scanned);
        self.fetch(into)?;
        into.apply_mask();
        Ok(())
    }

    /// Returns how many pages of scanned pieces the guest has dirtied up to now, without taking
    /// any; what the VMM wrote is not counted. Costs 10 µs per GiB.
    pub(crate) fn peek(&self, scratch: &mut DirtySet) -> Result<u64, Halt> {
        scratch.look_at_mask(&self.scanned);
        self.fetch(scratch)?;
        for region in scratch.regions_mut() {
            region.host.fill(0);
        }
        scratch.apply_mask();
        Ok(scratch.page_count())
    }

    fn fetch(&self, into: &mut DirtySet) -> Result<(), Halt> {
        for (region, place) in into.regions_mut().zip(self.layout.regions()) {
            let log = self.guest.dirty_log();
            log.fetch(place.slot, &mut region.logged)
                .map_err(CheckpointError::dirty_log("fetch"))?;
        }
        Ok(())
    }

    /// Re-arms the logged pages of a window. The copy of its pages comes after.
    pub(crate) fn rearm_window(&self, set: &DirtySet, window: &DirtyWindow) -> Result<(), Halt> {
        let logged = set.logged(window);
        // Pages that only the VMM wrote are armed already.
        if logged.iter().all(|&word| word == 0) {
            return Ok(());
        }
        self.rearm(
            window.region,
            window.first_page(),
            window.page_count,
            logged,
        )
    }

    /// Leaves a window to a later harvest, by not re-arming it; returns how many pages that are.
    ///
    /// The log keeps its bits by itself. The VMM's marks were taken and are made again: their
    /// writes are complete all the same.
    pub(crate) fn put_back(&self, set: &DirtySet, window: &DirtyWindow) -> u64 {
        let start = self.layout.regions()[window.region].run.start.0 + window.first_page() as u64;
        for (first, count) in runs_of_set_bits(set.host(window)) {
            let run = PageRun {
                start: Gfn(start + first),
                page_count: count,
            };
            self.guest
                .host_writes()
                .mark_dirty(run.start.gpa(), run.bytes());
        }
        set.pages(*window).count() as u64
    }

    fn rearm(
        &self,
        region: usize,
        first_page: usize,
        pages: usize,
        bits: &[u64],
    ) -> Result<(), Halt> {
        let slot = self.layout.regions()[region].slot;
        let log = self.guest.dirty_log();
        log.rearm(slot, first_page as u64, pages as u64, bits)
            .map_err(CheckpointError::dirty_log("re-arm"))?;
        Ok(())
    }
}

/// Words of bitmap in a piece.
pub(crate) const WORDS_PER_PIECE: usize = PIECE / 64;
