//! How the guest writes, by a sample of its dirty log: a few hundred pages are re-armed, and some
//! milliseconds later the log tells how many of them were written, and where.

use std::thread;
use std::time::{Duration, Instant};

use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::session::Session;
use crate::checkpoint::stats::per_second;
use crate::checkpoint::tracker::Logging;
use crate::guest::DirtyLog;
use crate::page::{WINDOW_PAGES, bitmap_words};

/// Stretches of 256 KiB of which pages are sampled. A guest that writes 3 GB/s has written 3 % of
/// 1 GiB in 10 ms: with a quarter as many, half of the samples saw nothing of it.
const SAMPLE_WINDOWS: usize = 128;

/// The pages of each that are watched: so few that their faults cost the guest a millisecond.
const SAMPLED_PAGES: u64 = 1 | 1 << 16 | 1 << 32 | 1 << 48;

/// How long the sampled pages are watched at a time.
const SAMPLE_TIME: Duration = Duration::from_millis(10);

/// How often they are looked at, at least, and at most while nothing is written: a computation may
/// read for some time before it writes all that it has.
const LOOKS_MIN: u32 = 2;
const LOOKS_MAX: u32 = 8;

/// How often at most where it matters how large the working set is: until it has been seen whole.
const LOOKS_FOR_ALL_MAX: u32 = 16;

/// A look that finds less than this part more of the working set has seen it whole.
const GROWTH_FRACTION: u64 = 16;

/// How the guest writes, by a sample.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Writes {
    /// Pages written a second.
    pub(super) pages_per_s: u64,
    /// Of a thousand stretches of 256 KiB, in how many it wrote.
    pub(super) stretches_permille: u64,
    /// Whether it no longer wrote where it had not written before.
    pub(super) seen_whole: bool,
}

/// How long to watch the guest's writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// Until some are seen.
    Short,
    /// Until the whole working set is seen.
    ForAll,
}

/// Watches some windows of the guest's memory for a moment.
pub(super) fn sample_writes(session: &Session, look: Look) -> Result<Writes, Halt> {
    let windows = sample_windows(&session.layout);
    let logging = Logging::start(session.guest.clone())?;
    let log = session.guest.dirty_log();
    arm(log, &windows)?;
    let began = Instant::now();
    let (mut looks, mut stretches_before) = (0, 0);
    let (took, written, stretches, seen, seen_whole) = loop {
        thread::sleep(SAMPLE_TIME);
        looks += 1;
        let took = began.elapsed();
        let (written, stretches, seen) = look_at_writes(&session.layout, log, &windows)?;
        let seen_whole = (stretches - stretches_before) * GROWTH_FRACTION < stretches;
        stretches_before = stretches;
        let is_enough = match look {
            Look::Short => looks == LOOKS_MAX || written > 0,
            Look::ForAll => looks == LOOKS_FOR_ALL_MAX || seen_whole,
        };
        if looks >= LOOKS_MIN && is_enough {
            break (took, written, stretches, seen, seen_whole);
        }
        session.control.check()?;
    };
    logging.stop()?;
    session.control.check()?;
    // Of those sampled, so of all: the windows are spread evenly.
    let all = session.layout.page_count() as u64;
    let written_of_all = (written * all).checked_div(seen).unwrap_or(0);
    Ok(Writes {
        pages_per_s: per_second(written_of_all, took),
        stretches_permille: (stretches * 1000)
            .checked_div(windows.len() as u64)
            .unwrap_or(0),
        seen_whole: seen_whole || written == 0,
    })
}

/// Re-arms the pages that are watched.
pub(super) fn arm(log: &dyn DirtyLog, windows: &[SampleWindow]) -> Result<(), CheckpointError> {
    for window in windows {
        let bits = [window.mask()];
        log.rearm(window.slot, window.first_page, window.pages, &bits)
            .map_err(CheckpointError::dirty_log("re-arm"))?;
    }
    Ok(())
}

/// Returns how many of the pages that are watched were written since they were re-armed, in how many
/// windows, and how many pages are watched.
pub(super) fn look_at_writes(
    layout: &Layout,
    log: &dyn DirtyLog,
    windows: &[SampleWindow],
) -> Result<(u64, u64, u64), CheckpointError> {
    let (mut written, mut stretches, mut seen) = (0, 0, 0);
    for place in layout.regions() {
        let mut bits = vec![0; bitmap_words(place.page_count as u64)];
        log.fetch(place.slot, &mut bits)
            .map_err(CheckpointError::dirty_log("fetch"))?;
        for window in windows.iter().filter(|window| window.slot == place.slot) {
            let word = usize::try_from(window.first_page / 64).expect("memory is mapped");
            let dirty = bits[word] & window.mask();
            written += u64::from(dirty.count_ones());
            stretches += u64::from(dirty != 0);
            seen += u64::from(window.mask().count_ones());
        }
    }
    Ok((written, stretches, seen))
}

/// 64 pages, or fewer at the end of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct SampleWindow {
    slot: u32,
    first_page: u64,
    pages: u64,
}

impl SampleWindow {
    /// Returns the pages that are watched.
    fn mask(&self) -> u64 {
        SAMPLED_PAGES & (u64::MAX >> (WINDOW_PAGES - self.pages))
    }
}

/// Returns windows that are spread evenly over memory, each in another piece.
pub(super) fn sample_windows(layout: &Layout) -> Vec<SampleWindow> {
    let pieces: Vec<_> = layout.pieces().collect();
    let step = pieces.len().div_ceil(SAMPLE_WINDOWS).max(1);
    let sampled = pieces.iter().enumerate().skip(step / 2).step_by(step);
    sampled
        .map(|(number, piece)| {
            let place = &layout.regions()[piece.region];
            // Not always the same part of a piece.
            let windows = piece.page_count.div_ceil(64);
            let first_page = piece.first_page + number % windows * 64;
            SampleWindow {
                slot: place.slot,
                first_page: first_page as u64,
                pages: (place.page_count - first_page).min(64) as u64,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::fake::FakeGuest;
    use crate::guest::Guest;

    #[test]
    fn sampled_windows_are_spread_and_inside_their_regions() {
        let guest = FakeGuest::new(&[100, 512 * 90 + 7, 512 * 40], 0);
        let layout = Layout::new(guest.regions());
        let windows = sample_windows(&layout);
        assert!((SAMPLE_WINDOWS / 2..=SAMPLE_WINDOWS).contains(&windows.len()));
        for window in &windows {
            let place = &layout.regions()[window.slot as usize];
            assert_eq!(window.first_page % 64, 0);
            assert!(window.first_page + window.pages <= place.page_count as u64);
            assert!(window.pages > 0 && window.mask() != 0);
        }
        let slots: Vec<_> = windows.iter().map(|window| window.slot).collect();
        assert!(slots.contains(&1) && slots.contains(&2));
    }
}
