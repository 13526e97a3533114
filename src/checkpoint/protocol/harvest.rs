//! Harvests: collecting what the guest dirtied into the staging table, newest copy wins.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, select};

use crate::checkpoint::capture::{LastSet, PageCopy, Staged, Staging, slot_offset};
use crate::checkpoint::control::Control;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::{Layout, PIECE};
use crate::checkpoint::policy::{Closing, ClosingReason, PageCost, Policy};
use crate::checkpoint::stats::{Round, Statistics, micros, per_second};
use crate::checkpoint::tracker::{DirtySet, Tracker};
use crate::checkpoint::watchdog::PauseLease;
use crate::checkpoint::writer::{Buffer, WriteQueue};
use crate::page::PAGE_BYTES;
use crate::store::EPOCH_MAX;

/// Pages that are spilled at a time: enough for full chunks, few enough to wait for.
const SPILL_PAGES: usize = 8 * PIECE;

/// What a harvest does with pages that staging has no room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum WhenFull {
    /// Leaves them in the log, for the harvests after the scan: pages that are written all the
    /// time would only be spilled again and again, on a disk that the scan keeps busy.
    Defer,
    /// Makes room by writing staged pages to the image.
    Spill,
}

/// Collects dirty pages: on its own thread while the guest runs, on the session's in the pause.
pub(super) struct Harvester {
    pub(super) layout: Arc<Layout>,
    pub(super) tracker: Arc<Tracker>,
    pub(super) control: Arc<Control>,
    pub(super) queue: WriteQueue,
    pub(super) staging: Staging,
    pub(super) policy: Policy,
    /// Whether the log runs on after the pause, for the next image of a chain.
    pub(super) goes_on: bool,
    /// Rounds are added as they end.
    pub(super) statistics: Statistics,
    dirty: DirtySet,
    epoch: u32,
    cost: PageCost,
    last_round: Instant,
}

impl Harvester {
    pub(super) fn new(
        layout: Arc<Layout>,
        tracker: Arc<Tracker>,
        control: Arc<Control>,
        queue: WriteQueue,
        staging: Staging,
        policy: Policy,
        goes_on: bool,
    ) -> Self {
        Self {
            dirty: DirtySet::new(&layout),
            layout,
            tracker,
            control,
            queue,
            staging,
            policy,
            goes_on,
            statistics: Statistics::default(),
            epoch: 0,
            cost: PageCost::of_copying(),
            last_round: Instant::now(),
        }
    }

    /// Harvests every interval until the scan is over, then back to back until the rest can be
    /// copied in the pause.
    pub(super) fn live(&mut self, scanning: &Receiver<Infallible>) -> Result<(), Halt> {
        loop {
            let over = select! {
                recv(scanning) -> _ => true,
                recv(self.control.stop_signal()) -> _ => return Err(Halt::Stopped),
                default(self.policy.interval) => false,
            };
            if over {
                return self.close();
            }
            self.round(WhenFull::Defer)?;
        }
    }

    /// Returns whether the last set can be copied within the downtime budget.
    pub(super) fn is_small(&self) -> bool {
        self.statistics.closing == Some(ClosingReason::FitsBudget)
    }

    pub(super) fn not_converged(&self, limit: Duration) -> CheckpointError {
        CheckpointError::not_converged(limit, &self.statistics)
    }

    /// Harvests without a pause between, as long as the last set shrinks and is too large.
    fn close(&mut self) -> Result<(), Halt> {
        let mut closing = Closing::of_threaded();
        if self.tracker.is_since_parent() {
            // What was written since the last image: there was no scan.
            self.round(WhenFull::Spill)?;
        }
        loop {
            let dirty = self.tracker.peek(&mut self.dirty)?;
            // Most pages of the last set are staged already, and replace their older copies.
            let new_pages = self.staging.without_slot(
                self.dirty
                    .windows()
                    .flat_map(|window| self.dirty.pages(window)),
            );
            // What staging cannot hold waits for the disk.
            let cost = if new_pages <= self.staging.free_slots() {
                self.cost.of(dirty)
            } else {
                Duration::MAX
            };
            if let Some(reason) = closing.next(dirty, cost, self.policy.downtime_budget) {
                self.statistics.closing = Some(reason);
                return self.make_room(new_pages);
            }
            self.round(WhenFull::Spill)?;
        }
    }

    /// Captures what was dirtied since the last round.
    ///
    /// The epoch is the round's own, taken before its first re-arm: a page that comes again in a
    /// later round has a higher one, whatever order the copies are made and written in.
    fn round(&mut self, when_full: WhenFull) -> Result<(), Halt> {
        let began = Instant::now();
        let spilled_before = self.statistics.staging.spilled_pages;
        self.next_epoch();
        self.tracker.collect(&mut self.dirty)?;
        let dirty = std::mem::take(&mut self.dirty);
        let copied = self.copy_windows(&dirty, when_full);
        self.dirty = dirty;
        let pages = copied?;
        let spilled_pages = self.statistics.staging.spilled_pages - spilled_before;
        if spilled_pages == 0 {
            self.cost.learn(pages, began.elapsed());
        }
        self.record_round(began, pages, spilled_pages);
        // The next round, and the pause, must not fault in slots for as much as this one took.
        let ahead = usize::try_from(pages).unwrap_or(usize::MAX);
        let control = &self.control;
        self.staging
            .populate(ahead.max(self.policy.reserved_slots), || {
                control.check().is_ok()
            })?;
        Ok(())
    }

    fn copy_windows(&mut self, dirty: &DirtySet, when_full: WhenFull) -> Result<u64, Halt> {
        let mut pages = 0;
        for window in dirty.windows() {
            self.control.check()?;
            let reserved = self.policy.reserved_slots;
            if when_full == WhenFull::Defer && !self.staging.has_room(dirty.pages(window), reserved)
            {
                let deferred = self.tracker.put_back(dirty, &window);
                self.statistics.staging.deferred_pages += deferred;
                continue;
            }
            // Re-arm first, copy second: a store that races a copy is reported again.
            self.tracker.rearm_window(dirty, &window)?;
            for page in dirty.pages(window) {
                self.stage(page)?;
                pages += 1;
            }
        }
        Ok(pages)
    }

    fn stage(&mut self, page: usize) -> Result<(), Halt> {
        // The reserve is kept by whoever defers; what is not deferred may take it.
        let slot = match self.staging.place(page, self.epoch, 0) {
            Some(slot) => slot,
            None => {
                self.spill(SPILL_PAGES)?;
                let placed = self.staging.place(page, self.epoch, 0);
                placed.expect("the spill freed slots")
            }
        };
        self.layout
            .copy_page(page, self.staging.memory(), slot_offset(slot));
        Ok(())
    }

    /// Spills `pages` copies or fewer: the oldest of earlier rounds, or of this one where there
    /// are none.
    ///
    /// Each goes to the image with its own epoch. Slots are free as soon as their bytes are in a
    /// buffer; the wait for a buffer is a wait for the disk, and ends with the order to stop.
    fn spill(&mut self, pages: usize) -> Result<(), Halt> {
        let mut staged = self.staging.older_than(self.epoch);
        if staged.is_empty() {
            staged = self.staging.older_than(u32::MAX);
        }
        staged.truncate(pages);
        self.statistics.staging.spilled_pages += staged.len() as u64;
        self.write_out(&staged, |staged| staged.epoch)
    }

    /// Sends staged pages to the writers and gives their slots back; a chunk is of one epoch.
    fn write_out(&mut self, staged: &[Staged], epoch: impl Fn(&Staged) -> u32) -> Result<(), Halt> {
        let mut open: Option<Buffer> = None;
        for page in staged {
            if let Some(buffer) = open.take_if(|open| open.is_full() || open.epoch != epoch(page)) {
                self.queue.submit(buffer)?;
            }
            let buffer = match &mut open {
                Some(buffer) => buffer,
                None => open.insert(self.queue.buffer(epoch(page))?),
            };
            let room = buffer.push(self.layout.frame(page.page));
            self.staging.memory().copy_out(slot_offset(page.slot), room);
            self.staging.release(*page);
        }
        open.map_or(Ok(()), |buffer| self.queue.submit(buffer))
    }

    /// Spills ahead of the pause, so that a last set with some more than `expected` pages that
    /// are not staged has room.
    fn make_room(&mut self, expected: usize) -> Result<(), Halt> {
        let wanted = expected.saturating_add(expected / 2).saturating_add(64);
        let missing = wanted
            .min(self.staging.capacity())
            .saturating_sub(self.staging.free_slots());
        if missing > 0 {
            self.next_epoch();
            self.spill(missing)?;
        }
        let control = &self.control;
        self.staging.populate(wanted, || control.check().is_ok())?;
        Ok(())
    }

    /// Captures the last set. Called in the pause, after the state was saved: saving it, and
    /// completing the vCPUs' exits, may write guest memory.
    ///
    /// No store can race these copies: pages are re-armed only where a chain goes on from here.
    /// Those that find no slot go to the writers at once, so that the pause may wait for the disk;
    /// that is counted.
    pub(super) fn capture_last(
        &mut self,
        lease: &Arc<PauseLease>,
        helpers: &Sender<Arc<LastSet>>,
    ) -> Result<(), Halt> {
        let began = Instant::now();
        self.next_epoch();
        self.tracker.collect(&mut self.dirty)?;
        if self.goes_on {
            self.tracker.rearm_all(&self.dirty)?;
        }
        lease.beat();
        let (copies, homeless) = self.place_last();
        let pages = (copies.len() + homeless.len()) as u64;
        let (set, finished) = LastSet::new(
            self.layout.clone(),
            self.staging.memory().clone(),
            self.control.clone(),
            lease.clone(),
            copies,
        );
        let set = Arc::new(set);
        if set.is_worth_sharing() {
            while helpers.try_send(set.clone()).is_ok() {}
        }
        set.run()?;
        self.control.wait(&finished)?;
        self.write_homeless(&homeless, lease)?;
        self.record_round(began, pages, homeless.len() as u64);
        Ok(())
    }

    /// Finds a slot for each page of the last set; returns also the pages that have none.
    fn place_last(&mut self) -> (Vec<PageCopy>, Vec<usize>) {
        let mut copies = Vec::with_capacity(self.staging.capacity());
        let mut homeless = Vec::new();
        for window in self.dirty.windows() {
            for page in self.dirty.pages(window) {
                match self.staging.place(page, self.epoch, 0) {
                    Some(slot) => copies.push(PageCopy { page, slot }),
                    None => homeless.push(page),
                }
            }
        }
        (copies, homeless)
    }

    fn write_homeless(&mut self, pages: &[usize], lease: &PauseLease) -> Result<(), Halt> {
        if pages.is_empty() {
            return Ok(());
        }
        lease.beat_before("pages that staging has no room for are written");
        for chunk in pages.chunks(PIECE) {
            let mut buffer = self.queue.buffer(self.epoch)?;
            for &page in chunk {
                self.layout
                    .read_page(page, buffer.push(self.layout.frame(page)));
            }
            self.queue.submit(buffer)?;
            lease.beat();
        }
        let spilled = pages.len() as u64;
        self.statistics.staging.spilled_pages += spilled;
        self.statistics.staging.spilled_in_pause_pages += spilled;
        Ok(())
    }

    /// Sends everything that is staged to the writers, after the resume.
    ///
    /// Each staged copy is its page's newest by now, so that all may carry the last epoch: the
    /// chunks are then full and in page order.
    pub(super) fn drain(&mut self) -> Result<(), Halt> {
        let mut staged = self.staging.older_than(u32::MAX);
        staged.sort_unstable_by_key(|staged| staged.page);
        self.control
            .pages_to_drain
            .store(staged.len() as u64, Ordering::Relaxed);
        let epoch = self.epoch;
        for part in staged.chunks(PIECE) {
            self.write_out(part, |_| epoch)?;
            self.control
                .pages_drained
                .fetch_add(part.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    fn next_epoch(&mut self) {
        self.epoch += 1;
        assert!(self.epoch <= EPOCH_MAX, "24 days of harvests a millisecond");
    }

    fn record_round(&mut self, began: Instant, pages: u64, spilled_pages: u64) {
        let round = Round {
            epoch: self.epoch,
            at_us: micros(began - self.control.started),
            took_us: micros(began.elapsed()),
            pages,
            bytes: pages * PAGE_BYTES as u64,
            spilled_pages,
            dirty_pages_per_s: per_second(pages, began - self.last_round),
        };
        self.last_round = began;
        self.statistics.add_round(round);
    }
}
