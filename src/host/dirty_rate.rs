//! Measuring how fast a running domain writes its memory.

use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::checkpoint::{CheckpointError, DirtyRate, DirtyRateMode, measure_dirty_rate};
use crate::guest::Guest;
use crate::host::HostError;
use crate::sys::sigmask::SignalsBlocked;

/// How long a measurement takes, in seconds: as long as with QEMU.
pub const DIRTY_RATE_SECONDS: std::ops::RangeInclusive<u32> = 1..=60;

/// How to measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRateRequest {
    /// How long, in seconds, one of [`DIRTY_RATE_SECONDS`].
    pub seconds: u32,
    /// Which pages are looked at.
    #[serde(default)]
    pub mode: DirtyRateMode,
}

/// A measurement, under way or done.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirtyRateStatus {
    /// What was asked for.
    #[serde(flatten)]
    pub request: DirtyRateRequest,
    /// When it began, in seconds of the host's monotonic clock.
    pub started_seconds: i64,
    /// What came of it; none while it is under way.
    #[serde(default)]
    pub measured: Option<Measured>,
}

/// What came of a measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measured {
    /// Pages that were written, however often.
    pub pages: u64,
    /// Their bytes a second.
    pub bytes_per_second: u64,
}

/// The measurements of a domain, one at a time. A thread of its own makes each; dropping this ends it.
#[derive(Debug, Default)]
pub(super) struct DirtyRateMeter(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    last: Option<DirtyRateStatus>,
    running: Option<Running>,
}

type Outcome = Result<Option<DirtyRate>, CheckpointError>;

#[derive(Debug)]
struct Running {
    /// Dropped to end it early.
    stop: Sender<Infallible>,
    thread: JoinHandle<Outcome>,
}

impl State {
    /// Takes in what a thread that has ended found.
    fn settle(&mut self) {
        let Some(running) = self.running.take_if(|one| one.thread.is_finished()) else {
            return;
        };
        let outcome = running.thread.join();
        let rate = outcome.unwrap_or_else(|_| {
            log::error!("a measurement of the dirty rate panicked");
            Ok(None)
        });
        let rate = rate.unwrap_or_else(|error| {
            log::warn!("the dirty rate was not measured: {error}");
            None
        });
        match (rate, &mut self.last) {
            (Some(rate), Some(last)) => {
                last.measured = Some(Measured {
                    pages: rate.pages,
                    bytes_per_second: rate.bytes_per_second(),
                });
            }
            _ => self.last = None,
        }
    }
}

impl DirtyRateMeter {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to measure; the guest's dirty log must be free.
    pub(super) fn start(
        &self,
        guest: Arc<dyn Guest>,
        request: DirtyRateRequest,
    ) -> Result<(), HostError> {
        if !DIRTY_RATE_SECONDS.contains(&request.seconds) {
            let (min, max) = DIRTY_RATE_SECONDS.into_inner();
            return Err(HostError::Invalid(format!(
                "a dirty rate is measured for {min} to {max} seconds, not {}",
                request.seconds
            )));
        }
        let mut state = self.lock();
        state.settle();
        if state.running.is_some() {
            return Err(HostError::MeasuringDirtyRate);
        }
        let period = Duration::from_secs(request.seconds.into());
        let (stop, stopped) = bounded(0);
        let _blocked = SignalsBlocked::new();
        let thread = thread::Builder::new()
            .name("lvp-dirty-rate".to_owned())
            .spawn(move || measure_dirty_rate(&guest, request.mode, period, &stopped))
            .map_err(|source| HostError::Resource {
                what: "a thread that measures",
                source,
            })?;
        state.last = Some(DirtyRateStatus {
            request,
            started_seconds: clock_gettime(ClockId::Monotonic).tv_sec,
            measured: None,
        });
        state.running = Some(Running { stop, thread });
        Ok(())
    }

    /// Returns the last measurement, or the one that is under way.
    pub(super) fn status(&self) -> Option<DirtyRateStatus> {
        let mut state = self.lock();
        state.settle();
        state.last.clone()
    }

    /// Ends a measurement that is under way, which then never was; returns once the guest's dirty log
    /// is free, in some milliseconds.
    pub(super) fn stop(&self) {
        let mut state = self.lock();
        state.settle();
        if let Some(Running { stop, thread }) = state.running.take() {
            drop(stop);
            state.last = None;
            if let Ok(Err(error)) = thread.join() {
                log::warn!("the dirty rate was not measured: {error}");
            }
        }
    }
}

impl Drop for DirtyRateMeter {
    fn drop(&mut self) {
        self.stop();
    }
}
