//! How fast a guest writes memory: its dirty log, over a time.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};
use serde::{Deserialize, Serialize};

use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::sample::{arm, look_at_writes, sample_windows};
use crate::checkpoint::session::Claim;
use crate::checkpoint::stats::per_second;
use crate::checkpoint::tracker::{DirtySet, Logging, Tracker};
use crate::guest::Guest;
use crate::page::PAGE_BYTES;

/// Which pages are looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DirtyRateMode {
    /// Some hundred, spread over memory: it costs the guest next to nothing. What its devices write
    /// is not seen.
    #[default]
    PageSampling,
    /// All, those that devices write included: the first write to each costs the guest a fault.
    DirtyBitmap,
}

/// How much a guest wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirtyRate {
    /// Pages that were written, however often; of all memory, where some were looked at.
    pub pages: u64,
    /// In which time.
    pub took: Duration,
}

impl DirtyRate {
    /// Returns the bytes of the pages a second.
    pub fn bytes_per_second(&self) -> u64 {
        per_second(self.pages, self.took).saturating_mul(PAGE_BYTES as u64)
    }
}

/// Watches a guest's writes for `period`; `None` where the other end of `stop` was dropped before.
///
/// Blocks meanwhile, and has the guest's dirty log for itself: no checkpoint of it can be taken until
/// this returns. No [`Chain`] may have that log.
///
/// [`Chain`]: crate::checkpoint::Chain
///
/// # Errors
///
/// A checkpoint has the guest's dirty log, or that fails.
pub fn measure_dirty_rate(
    guest: &Arc<dyn Guest>,
    mode: DirtyRateMode,
    period: Duration,
    stop: &Receiver<Infallible>,
) -> Result<Option<DirtyRate>, CheckpointError> {
    let _claim = Claim::new(guest.clone())?;
    let watched = match mode {
        DirtyRateMode::PageSampling => sample(guest, period, stop),
        DirtyRateMode::DirtyBitmap => count(guest, period, stop),
    };
    match watched {
        Ok(rate) => Ok(Some(rate)),
        Err(Halt::Stopped) => Ok(None),
        Err(Halt::Failed(error)) => Err(error),
    }
}

/// Waits for `period`, and returns how long it was.
fn wait(period: Duration, stop: &Receiver<Infallible>) -> Result<Duration, Halt> {
    let began = Instant::now();
    match stop.recv_timeout(period) {
        Err(RecvTimeoutError::Timeout) => Ok(began.elapsed()),
        Err(RecvTimeoutError::Disconnected) => Err(Halt::Stopped),
    }
}

fn sample(
    guest: &Arc<dyn Guest>,
    period: Duration,
    stop: &Receiver<Infallible>,
) -> Result<DirtyRate, Halt> {
    let layout = Layout::new(guest.regions());
    let windows = sample_windows(&layout);
    let logging = Logging::start(guest.clone())?;
    let log = guest.dirty_log();
    arm(log, &windows)?;
    let took = wait(period, stop)?;
    let (written, _, seen) = look_at_writes(&layout, log, &windows)?;
    logging.stop()?;
    // The windows are spread evenly: of those pages, so of all.
    let all = layout.page_count() as u64;
    let pages = (written * all).checked_div(seen).unwrap_or(0);
    Ok(DirtyRate { pages, took })
}

fn count(
    guest: &Arc<dyn Guest>,
    period: Duration,
    stop: &Receiver<Infallible>,
) -> Result<DirtyRate, Halt> {
    let layout = Arc::new(Layout::new(guest.regions()));
    let logging = Logging::start(guest.clone())?;
    let tracker = Tracker::new(guest.clone(), layout.clone());
    tracker.arm_all()?;
    let took = wait(period, stop)?;
    let mut dirty = DirtySet::new(&layout);
    tracker.collect(&mut dirty)?;
    logging.stop()?;
    let pages = dirty.page_count();
    Ok(DirtyRate { pages, took })
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;

    use super::*;
    use crate::checkpoint::fake::{Call, FakeGuest};

    const PAGES: u64 = 4096;

    fn measure(guest: &Arc<FakeGuest>, mode: DirtyRateMode) -> DirtyRate {
        let guest: Arc<dyn Guest> = guest.clone();
        let (_stop, stopped) = bounded(0);
        let period = Duration::from_millis(5);
        let measured = measure_dirty_rate(&guest, mode, period, &stopped).unwrap();
        let rate = measured.expect("nobody stopped it");
        assert!(rate.took >= period);
        rate
    }

    /// A guest that writes some pages before its log is looked at.
    fn writing(pages: std::ops::Range<u64>) -> Arc<FakeGuest> {
        let guest = FakeGuest::new(&[PAGES], 0);
        guest.fill();
        guest.on(Call::Fetch, move |guest| {
            for page in pages.clone() {
                guest.write_page(page, 7);
                guest.write_page(page, 8);
            }
        });
        guest
    }

    #[test]
    fn each_page_counts_once_and_those_from_before_do_not() {
        let rate = measure(&writing(100..300), DirtyRateMode::DirtyBitmap);
        assert_eq!(rate.pages, 200);
        let most = 200 * PAGE_BYTES as u64 * 200;
        assert!((1..=most).contains(&rate.bytes_per_second()), "{rate:?}");
        let none = measure(&writing(0..0), DirtyRateMode::DirtyBitmap);
        assert_eq!((none.pages, none.bytes_per_second()), (0, 0));
    }

    #[test]
    fn pages_that_devices_write_count_where_all_are_looked_at() {
        let guest = FakeGuest::new(&[PAGES], 0);
        guest.fill();
        guest.on(Call::Rearm, |guest| guest.device_write(7, 1));
        assert_eq!(measure(&guest, DirtyRateMode::DirtyBitmap).pages, 1);
        assert_eq!(measure(&guest, DirtyRateMode::PageSampling).pages, 0);
    }

    #[test]
    fn samples_stand_for_all_of_memory() {
        let all = measure(&writing(0..PAGES), DirtyRateMode::PageSampling);
        assert_eq!(all.pages, PAGES);
        let none = measure(&writing(0..0), DirtyRateMode::PageSampling);
        assert_eq!(none.pages, 0);
        // Half of the memory, in one piece, is about half of the samples.
        let half = measure(&writing(0..PAGES / 2), DirtyRateMode::PageSampling);
        assert!(
            (PAGES / 4..=PAGES * 3 / 4).contains(&half.pages),
            "{half:?}"
        );
    }

    #[test]
    fn a_measurement_that_is_stopped_says_nothing_and_frees_the_log() {
        for mode in [DirtyRateMode::PageSampling, DirtyRateMode::DirtyBitmap] {
            let guest: Arc<dyn Guest> = writing(0..10);
            let (stop, stopped) = bounded(0);
            drop(stop);
            let period = Duration::from_secs(3600);
            let measured = measure_dirty_rate(&guest, mode, period, &stopped).unwrap();
            assert_eq!(measured, None);
            assert!(guest.dirty_log().fetch(0, &mut [0; 64]).is_err());
        }
    }
}
