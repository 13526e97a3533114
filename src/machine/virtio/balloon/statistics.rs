//! How the guest uses its memory, as its balloon's driver says (virtio specification, section
//! 5.5.6.3).
//!
//! The driver has one buffer in the statistics queue at all times, filled with figures. The device
//! gives it back when it wants new ones, and the driver fills it again. Until then the buffer stays
//! in the ring as one that was not taken: a saved state needs nothing besides the ring.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::super::timer::Timer;
use super::super::{Chain, Fault, Virtqueue};
use crate::machine::memory::GuestMemory;

/// Bytes of one figure: a tag of two, a number of eight.
const FIGURE_BYTES: usize = 10;
/// The most figures of a buffer: Linux has 16.
const FIGURES_MAX: usize = 256;

/// What a guest says of its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MemoryFigure {
    /// Bytes read from swap space since the guest's start.
    SwapInBytes,
    /// Bytes written to it.
    SwapOutBytes,
    /// Page faults that had to wait for storage.
    MajorFaults,
    /// Those that had not.
    MinorFaults,
    /// Bytes that nothing uses.
    FreeBytes,
    /// Bytes that the guest's kernel manages.
    TotalBytes,
    /// Bytes that programs could get without swapping.
    AvailableBytes,
    /// Bytes of caches that could be dropped.
    CacheBytes,
    /// Huge pages taken from the reserve.
    HugetlbAllocations,
    /// Huge pages that could not be.
    HugetlbFailures,
}

/// By the numbers of their tags.
const BY_TAG: [MemoryFigure; 10] = [
    MemoryFigure::SwapInBytes,
    MemoryFigure::SwapOutBytes,
    MemoryFigure::MajorFaults,
    MemoryFigure::MinorFaults,
    MemoryFigure::FreeBytes,
    MemoryFigure::TotalBytes,
    MemoryFigure::AvailableBytes,
    MemoryFigure::CacheBytes,
    MemoryFigure::HugetlbAllocations,
    MemoryFigure::HugetlbFailures,
];

/// How a guest used its memory at some time, by its own account.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestMemoryUse {
    /// When the host was told, in seconds since 1970.
    pub updated_s: u64,
    /// The figures that the guest knows.
    #[serde(flatten)]
    pub figures: BTreeMap<MemoryFigure, u64>,
}

#[derive(Debug)]
struct State {
    period: Duration,
    /// The guest is to be asked as soon as it has a buffer for the answer.
    asks: bool,
    /// The next buffer has figures that were not read.
    awaits: bool,
    latest: Option<GuestMemoryUse>,
}

/// The device's side of the statistics queue.
#[derive(Debug)]
pub(super) struct Statistics {
    /// Expires when the guest is to be asked.
    timer: Timer,
    state: Mutex<State>,
}

impl Statistics {
    /// Makes one that asks for nothing; what the driver says at its start is taken.
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            timer: Timer::new()?,
            state: Mutex::new(State {
                period: Duration::ZERO,
                asks: false,
                awaits: true,
                latest: None,
            }),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks at once, and then each time `period` has passed; never where it is zero.
    pub(super) fn ask_every(&self, period: Duration) {
        let mut state = self.lock();
        state.period = period;
        // Under the lock, so that timer and period are of the same call.
        self.timer.set_every(period);
    }

    /// Returns the time between two questions; zero for none.
    pub(super) fn period(&self) -> Duration {
        self.lock().period
    }

    /// Returns what the guest said last.
    pub(super) fn latest(&self) -> Option<GuestMemoryUse> {
        self.lock().latest.clone()
    }

    /// Forgets what a driver said that is gone; the next one begins anew.
    pub(super) fn forget(&self) {
        let mut state = self.lock();
        (state.awaits, state.latest) = (true, None);
    }

    /// Takes note that the driver goes on which a saved state is of: the buffer in its queue has
    /// figures of that time.
    pub(super) fn go_on(&self) {
        let mut state = self.lock();
        (state.awaits, state.latest) = (false, None);
    }

    /// Returns what wakes the device's thread when [`Statistics::look_at_timer`] has something.
    pub(super) fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Notes whether it is time to ask.
    pub(super) fn look_at_timer(&self) {
        let mut state = self.lock();
        state.asks |= self.timer.take_expired();
    }

    /// Reads what the driver says, and asks it where it is time to.
    pub(super) fn process(&self, memory: &GuestMemory, queue: &mut Virtqueue) -> Result<(), Fault> {
        let mut state = self.lock();
        while let Some(chain) = queue.pop(memory)? {
            if state.awaits {
                state.latest = Some(GuestMemoryUse {
                    updated_s: now_s(),
                    figures: read(queue, &chain)?,
                });
                state.awaits = false;
            }
            if !state.asks {
                queue.put_back();
                return Ok(());
            }
            (state.asks, state.awaits) = (false, true);
            queue.complete(memory, &chain, 0)?;
        }
        Ok(())
    }
}

fn now_s() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_secs())
}

/// Reads a buffer of figures. Those with tags that are not known, and those that the driver does
/// not know itself (all bits set), are left out.
fn read(queue: &Virtqueue, chain: &Chain<'_>) -> Result<BTreeMap<MemoryFigure, u64>, Fault> {
    let mut readable = chain.readable.clone();
    let len = readable.len();
    if !len.is_multiple_of(FIGURE_BYTES) || len > FIGURES_MAX * FIGURE_BYTES {
        return Err(queue.fault("statistics of a length that is none"));
    }
    let mut figures = BTreeMap::new();
    let (mut tag, mut value) = ([0; 2], [0; 8]);
    while !readable.is_empty() && readable.read(&mut tag) && readable.read(&mut value) {
        let known = BY_TAG.get(usize::from(u16::from_le_bytes(tag)));
        let value = u64::from_le_bytes(value);
        if let Some(&figure) = known
            && value != u64::MAX
        {
            figures.insert(figure, value);
        }
    }
    Ok(figures)
}
