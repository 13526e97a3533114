//! The numbers of one checkpoint: threads, buffers, staging, and when to pause.

use std::thread;
use std::time::Duration;

use crate::checkpoint::layout::PIECE;
use crate::checkpoint::options::{CheckpointOptions, Protocol};
use crate::page::PAGE_BYTES;

/// The most threads of a kind that are taken without being asked for.
const THREADS_DEFAULT_MAX: usize = 4;

/// The least staging that is taken without being asked for less.
const STAGING_BYTES_DEFAULT_MIN: u64 = 64 << 20;

/// The least buffers of `cow`: for a writer that waits, the sweep, and the disk.
const PIECE_BUFFERS_MIN: usize = 4;

/// How long write-protecting memory takes in the pause at most, by estimate: beyond it most of it
/// is done ahead.
const ARMING_BUDGET: Duration = Duration::from_micros(1500);

/// Part of the guest's memory that staging takes by default.
const STAGING_FRACTION: u64 = 10;

/// The most of staging that is kept for the harvests after the scan.
const RESERVE_FRACTION: usize = 8;

/// What copying a page into staging costs before it has been measured: 4 KiB at 8 GB/s, half of
/// what one thread reaches on a quiet machine.
const PAGE_COPY_NS_GUESS: u64 = 500;

/// What re-arming and copying a page takes in the pause, where it follows one that is taken as well,
/// and what is added where it does not: another line of the log, and memory that no cache has. By
/// some 50 increments of 1 GiB (docs/measurements.md).
const PAUSE_PAGE_NS: u64 = 350;
const PAUSE_STRETCH_NS: u64 = 1100;

/// What a page costs on its way to the image before it has been measured: 4 KiB at 1 GB/s.
const PAGE_WRITE_NS_GUESS: u64 = 4000;

/// What the last copy of `threaded` may take without being told.
const DOWNTIME_BUDGET: Duration = Duration::from_millis(3);

/// The same for `precopy`: the default downtime of QEMU's and Cloud Hypervisor's live migration.
const PRECOPY_DOWNTIME_BUDGET: Duration = Duration::from_millis(300);

/// The most rounds of `precopy` after the first (as Xen's live migration has it).
const PRECOPY_ROUNDS_MAX: u32 = 29;

/// The most harvests after the scan: each costs the guest its write-protect faults again.
pub(crate) const CLOSING_ROUNDS_MAX: u32 = 24;

/// A harvest that leaves more than this many parts in eight of the pages before it did not help.
const SHRINK_EIGHTHS: u64 = 7;

/// How many harvests in a row may fail to help before the guest is paused regardless.
const FUTILE_ROUNDS_MAX: u32 = 2;

/// How one checkpoint is run.
#[derive(Clone, Debug)]
pub(crate) struct Policy {
    pub(crate) capture_threads: usize,
    pub(crate) write_threads: usize,
    /// Chunk buffers between capture and disk.
    pub(crate) buffers: usize,
    pub(crate) interval: Duration,
    pub(crate) downtime_budget: Duration,
    /// How long write-protecting memory may take in the pause.
    pub(crate) arming_budget: Duration,
    /// Slots of the staging table.
    pub(crate) staging_slots: usize,
    /// Slots that harvests during the scan leave free, so that those after it need not wait for a
    /// spill.
    pub(crate) reserved_slots: usize,
}

impl Policy {
    /// Fixes the numbers for a guest of `page_count` pages.
    pub(crate) fn new(options: &CheckpointOptions, page_count: usize) -> Self {
        let cpus = thread::available_parallelism().map_or(1, usize::from);
        let threads = options.threads.unwrap_or(cpus.min(THREADS_DEFAULT_MAX));
        let staging_slots = staging_slots(options.max_staging_bytes, page_count);
        let downtime_budget = options.downtime_budget.unwrap_or(match options.protocol {
            Protocol::Precopy => PRECOPY_DOWNTIME_BUDGET,
            _ => DOWNTIME_BUDGET,
        });
        let downtime_budget = options
            .max_downtime
            .map_or(downtime_budget, |most| downtime_budget.min(most / 2));
        let budget_pages = downtime_budget.as_nanos() / u128::from(PAGE_COPY_NS_GUESS);
        let budget_pages = usize::try_from(budget_pages).unwrap_or(usize::MAX);
        Self {
            // Copying is several times faster than hashing and writing: one scanning thread
            // feeds many writers. `stop` takes as many as there are, since each also writes.
            capture_threads: threads,
            write_threads: threads,
            // One in the hands of each thread, and one on its way to each writer.
            buffers: 3 * threads + 1,
            interval: options.interval,
            downtime_budget,
            arming_budget: ARMING_BUDGET.min(downtime_budget / 2),
            staging_slots,
            reserved_slots: budget_pages
                .saturating_mul(4)
                .clamp(1, (staging_slots / RESERVE_FRACTION).max(1)),
        }
    }

    /// Threads that copy memory ahead of the guest (`cow`). They copy and nothing else, at half
    /// the speed of memory each.
    pub(crate) fn sweep_threads(&self) -> usize {
        self.capture_threads.div_ceil(2)
    }

    /// Returns the number of buffers of one piece each that staging is (`cow`), where `touched`
    /// pieces have anything in them, and how many of them are kept for writers that wait.
    pub(crate) fn piece_buffers(&self, touched: usize) -> (usize, usize) {
        let pieces = (self.staging_slots / PIECE).max(PIECE_BUFFERS_MIN);
        // One more in the hands of each thread that copies, so that the last piece has one too.
        let wanted = touched + self.write_threads + self.sweep_threads() + 1;
        if pieces >= wanted {
            return (wanted, 0);
        }
        // The sweep copies what the guest may never write: it takes what keeps the disk busy.
        let reserve = pieces - (pieces / 4).max(self.buffers.min(pieces / 2));
        (pieces, reserve)
    }

    /// Threads that scan while the guest runs.
    pub(crate) fn scan_threads(&self) -> usize {
        self.capture_threads.div_ceil(2)
    }
}

fn staging_slots(max_bytes: Option<u64>, page_count: usize) -> usize {
    let memory_bytes = (page_count * PAGE_BYTES) as u64;
    let bytes = max_bytes
        .unwrap_or_else(|| (memory_bytes / STAGING_FRACTION).max(STAGING_BYTES_DEFAULT_MIN));
    let slots = usize::try_from(bytes / PAGE_BYTES as u64).unwrap_or(usize::MAX);
    // A page has one slot at most. Two at least, so that half may be reserved.
    slots.min(page_count).max(2)
}

/// What a page costs to copy into staging, or to send to the image, measured as it happens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PageCost {
    page_ns: u64,
}

impl PageCost {
    /// The cost of copying, before it is measured.
    pub(crate) fn of_copying() -> Self {
        Self {
            page_ns: PAGE_COPY_NS_GUESS,
        }
    }

    /// The cost of copying and writing, before it is measured.
    pub(crate) fn of_writing() -> Self {
        Self {
            page_ns: PAGE_WRITE_NS_GUESS,
        }
    }

    /// Learns from a harvest; one of few pages says more about its fixed costs than about copying.
    pub(crate) fn learn(&mut self, pages: u64, took: Duration) {
        const PAGES_MIN: u64 = 256;
        if pages >= PAGES_MIN {
            let seen = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX) / pages;
            self.page_ns = (self.page_ns.saturating_mul(3).saturating_add(seen) / 4).max(1);
        }
    }

    /// Returns how long the copy of `pages` pages will take.
    pub(crate) fn of(&self, pages: u64) -> Duration {
        Duration::from_nanos(self.page_ns.saturating_mul(pages))
    }
}

/// Returns what copying `pages` pages, in so many stretches, takes in the pause.
pub(crate) fn cost_in_pause(pages: u64, stretches: u64) -> Duration {
    let pages = pages.saturating_mul(PAUSE_PAGE_NS);
    Duration::from_nanos(pages.saturating_add(stretches.saturating_mul(PAUSE_STRETCH_NS)))
}

/// Decides when harvesting after the scan has done what it can.
#[derive(Debug)]
pub(crate) struct Closing {
    rounds_max: u32,
    rounds: u32,
    futile: u32,
    before: Option<u64>,
}

/// Why harvesting ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ClosingReason {
    /// The last set can be copied within the downtime budget.
    FitsBudget,
    /// The last set no longer shrinks.
    NoLongerShrinks,
    /// The cap on rounds was reached.
    RoundCap,
}

impl Closing {
    pub(crate) fn of_threaded() -> Self {
        Self::new(CLOSING_ROUNDS_MAX)
    }

    pub(crate) fn of_precopy() -> Self {
        Self::new(PRECOPY_ROUNDS_MAX)
    }

    fn new(rounds_max: u32) -> Self {
        Self {
            rounds_max,
            rounds: 0,
            futile: 0,
            before: None,
        }
    }

    /// Told how many pages are dirty now; returns why to pause, or `None` for another harvest.
    pub(crate) fn next(
        &mut self,
        dirty: u64,
        cost: Duration,
        budget: Duration,
    ) -> Option<ClosingReason> {
        if cost <= budget {
            return Some(ClosingReason::FitsBudget);
        }
        if self.rounds == self.rounds_max {
            return Some(ClosingReason::RoundCap);
        }
        if let Some(before) = self.before {
            let helped = dirty <= before / 8 * SHRINK_EIGHTHS;
            self.futile = if helped { 0 } else { self.futile + 1 };
        }
        if self.futile == FUTILE_ROUNDS_MAX {
            return Some(ClosingReason::NoLongerShrinks);
        }
        self.rounds += 1;
        self.before = Some(dirty);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Duration = Duration::from_millis(3);

    fn close(dirty: impl Fn(u32) -> u64) -> (ClosingReason, u32) {
        let mut closing = Closing::of_threaded();
        let cost = PageCost::of_copying();
        for round in 0.. {
            let pages = dirty(round);
            if let Some(reason) = closing.next(pages, cost.of(pages), BUDGET) {
                return (reason, round);
            }
        }
        unreachable!("rounds are capped")
    }

    #[test]
    fn a_set_that_fits_the_budget_is_paused_for_at_once() {
        assert_eq!(close(|_| 100), (ClosingReason::FitsBudget, 0));
    }

    #[test]
    fn a_set_that_shrinks_is_harvested_until_it_fits() {
        let (reason, rounds) = close(|round| 1_000_000 >> round);
        assert_eq!(reason, ClosingReason::FitsBudget);
        assert!(rounds > 3);
    }

    #[test]
    fn a_set_that_does_not_shrink_ends_the_harvests() {
        assert_eq!(close(|_| 1_000_000), (ClosingReason::NoLongerShrinks, 2));
    }

    #[test]
    fn a_set_that_shrinks_for_ever_is_capped() {
        let shrinks = |round: u32| (0..round).fold(u64::MAX / 1_000_000, |pages, _| pages / 8 * 7);
        assert_eq!(
            close(shrinks),
            (ClosingReason::RoundCap, CLOSING_ROUNDS_MAX)
        );
    }

    #[test]
    fn staging_is_a_tenth_of_memory_within_its_bounds() {
        let slots = |bytes, pages| staging_slots(bytes, pages);
        assert_eq!(slots(None, 10 << 18), 1 << 18);
        assert_eq!(slots(None, 1 << 18), 26_214);
        assert_eq!(slots(None, 1 << 16), 64 << 8);
        assert_eq!(slots(None, 100), 100);
        assert_eq!(slots(Some(1 << 20), 1 << 18), 256);
        let options = CheckpointOptions {
            max_staging_bytes: Some(1 << 20),
            ..CheckpointOptions::default()
        };
        assert_eq!(Policy::new(&options, 1 << 18).reserved_slots, 32);
    }
}
