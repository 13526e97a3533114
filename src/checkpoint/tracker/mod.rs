//! Which pages must be copied: the guest's dirty log, the VMM's own writes, and the scan's mask.
//!
//! Every copy follows one rule, **re-arm first, copy second**. A store that races a copy then
//! sets the page's bit again, and a later harvest copies the page whole.

mod dirty_set;
mod protection;

use std::sync::Arc;

use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::{Layout, PIECE, Piece, WINDOW_PIECES, Window};
use crate::guest::Guest;
use crate::page::{AtomicPageBitmap, Gfn, PageRun, bitmap_words, runs_of_set_bits};
use crate::sync::atomic::{Ordering, fence};

pub(crate) use dirty_set::{DirtySet, DirtyWindow};
pub(crate) use protection::{Unprotectable, WriteProtection};

/// Dirty logging of a guest, from its start until this is dropped at the latest, unless a chain
/// of increments has it.
pub(crate) struct Logging {
    guest: Arc<dyn Guest>,
    /// Whether the end of this ends the log.
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

    /// Takes part in a log that runs already, for a chain, and goes on.
    pub(crate) fn of_chain(guest: Arc<dyn Guest>) -> Self {
        Self { guest, on: false }
    }

    /// Leaves the log running, for a chain.
    pub(crate) fn leave_on(mut self) {
        self.on = false;
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
    /// One bit a page of each region, where the log goes on after a checkpoint that fails: what
    /// was taken from it and must be given back then.
    taken: Option<Vec<AtomicPageBitmap>>,
}

impl Tracker {
    pub(crate) fn new(guest: Arc<dyn Guest>, layout: Arc<Layout>) -> Self {
        Self {
            guest,
            scanned: AtomicPageBitmap::new(layout.piece_count() as u64),
            taken: None,
            layout,
        }
    }

    /// Continues a log that has run since an earlier image: whatever it has, in any piece, was
    /// written since then.
    pub(crate) fn since_parent(guest: Arc<dyn Guest>, layout: &Arc<Layout>) -> Self {
        let regions = layout.regions().iter();
        let taken = regions.map(|place| AtomicPageBitmap::new(place.page_count as u64));
        let mut tracker = Self::new(guest, layout.clone());
        tracker.taken = Some(taken.collect());
        tracker.scanned.set_run(0, layout.piece_count() as u64);
        tracker
    }

    /// Returns whether there is nothing to scan, since the log has run since an earlier image.
    pub(crate) fn is_since_parent(&self) -> bool {
        self.taken.is_some()
    }

    /// Gives back what was taken for a checkpoint that came to nothing. Called when no thread of
    /// it takes any more.
    pub(crate) fn give_back(&self) {
        let regions = self.layout.regions().iter();
        for (place, taken) in regions.zip(self.taken.iter().flatten()) {
            let mut bits = vec![0; bitmap_words(place.page_count as u64)];
            taken.take_into(&mut bits);
            self.mark(place.run.start, &bits);
        }
    }

    /// Re-arms all memory and forgets what the VMM wrote up to now: a chain starts at this moment.
    /// Called while nobody writes.
    pub(crate) fn arm_all(&self) -> Result<(), Halt> {
        self.guest.host_writes().clear();
        let mut windows = self.layout.windows().iter();
        windows.try_for_each(|window| self.arm_for_scan(window))
    }

    /// Re-arms pages of a piece, one bit each.
    pub(crate) fn arm_piece(&self, piece: &Piece, bits: &[u64]) -> Result<(), Halt> {
        let words = piece.page_count.div_ceil(64);
        let (region, first) = (piece.region, piece.first_page);
        self.rearm(region, first, piece.page_count, &bits[..words])
    }

    /// Has the next harvest, or increment, take pages of a piece as written, one bit each.
    pub(crate) fn mark_piece(&self, piece: &Piece, bits: &[u64]) {
        let start = self.layout.regions()[piece.region].run.start;
        let inside = piece.page_count.div_ceil(64);
        self.mark(Gfn(start.0 + piece.first_page as u64), &bits[..inside]);
    }

    fn mark(&self, start: Gfn, bits: &[u64]) {
        for (first, count) in runs_of_set_bits(bits) {
            let run = PageRun {
                start: Gfn(start.0 + first),
                page_count: count,
            };
            self.guest
                .host_writes()
                .mark_dirty(run.start.gpa(), run.bytes());
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
        if let Some(taken) = &self.taken {
            into.note_in(taken);
        }
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

    /// Re-arms all logged pages, in a pause.
    pub(crate) fn rearm_all(&self, set: &DirtySet) -> Result<(), Halt> {
        let mut windows = set.windows();
        windows.try_for_each(|window| self.rearm_window(set, &window))
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
        self.mark(Gfn(start), set.host(window));
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
