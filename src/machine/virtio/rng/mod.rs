//! A virtio entropy device: random numbers of the host for the guest.

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use rustix::event::PollFlags;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

use super::timer::Timer;
use super::{Backend, Fault, Kind, Work};
use crate::machine::spec::{RngRate, RngSpec};

/// Descriptors of the queue.
const QUEUE_SIZE: u16 = 64;
/// The most bytes of one request: a driver that wants more asks again.
const REQUEST_BYTES_MAX: usize = 4096;

/// How much the guest may still have, where that is limited.
#[derive(Debug)]
struct Allowance {
    left: u32,
    /// When the period began; `None` before the first request.
    since: Option<Instant>,
    /// Requests wait for the next period.
    waits: bool,
}

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    source: File,
    rate: Option<RngRate>,
    allowance: Mutex<Allowance>,
    /// Expires when the next period begins.
    timer: Timer,
}

impl Rng {
    /// Opens the source of numbers.
    pub fn open(spec: &RngSpec) -> io::Result<Self> {
        Ok(Self {
            source: File::open(&spec.source)?,
            rate: spec.rate,
            allowance: Mutex::new(Allowance {
                left: 0,
                since: None,
                waits: false,
            }),
            timer: Timer::new()?,
        })
    }

    fn allowance(&self) -> MutexGuard<'_, Allowance> {
        self.allowance
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many of `wanted` bytes the guest may have now; 0 until the timer expires.
    fn take(&self, allowance: &mut Allowance, wanted: usize) -> usize {
        let Some(rate) = self.rate else {
            return wanted;
        };
        let now = Instant::now();
        let passed = allowance.since.map(|since| now.duration_since(since));
        if passed.is_none_or(|passed| passed >= rate.period) {
            allowance.since = Some(now);
            allowance.left = rate.bytes;
        }
        let left = usize::try_from(allowance.left).unwrap_or(usize::MAX);
        let taken = wanted.min(left);
        allowance.left -= u32::try_from(taken).expect("no more than is left");
        if taken == 0 {
            let passed = passed.unwrap_or_default();
            self.timer.set(Some(rate.period.saturating_sub(passed)));
        }
        taken
    }
}

impl Backend for Rng {
    fn kind(&self) -> Kind {
        Kind {
            device_type: u16::try_from(VIRTIO_ID_RNG).expect("a small number"),
            class: 0x00_ff00,
            name: "rng",
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn process(&self, work: &mut Work<'_>) -> Result<(), Fault> {
        let mut allowance = self.allowance();
        allowance.waits = false;
        let Some(Some(queue)) = work.queues.first_mut() else {
            return Ok(());
        };
        let mut numbers = [0; REQUEST_BYTES_MAX];
        while !work.stop.is_set()
            && let Some(chain) = queue.pop(work.memory)?
        {
            let wanted = chain.writable.len().min(REQUEST_BYTES_MAX);
            if wanted == 0 {
                return Err(queue.fault("a request has no room for a number"));
            }
            let count = self.take(&mut allowance, wanted);
            if count == 0 {
                queue.put_back();
                allowance.waits = true;
                return Ok(());
            }
            let numbers = &mut numbers[..count];
            let written = match (&self.source).read_exact(numbers) {
                Ok(()) => chain.writable.clone().write(numbers),
                Err(error) => {
                    log::warn!("could not read random numbers: {error}");
                    0
                }
            };
            let written = u32::try_from(written).expect("at most 4096");
            queue.complete(work.memory, &chain, written)?;
        }
        Ok(())
    }

    fn poll_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let waits = self.allowance().waits;
        waits.then(|| (self.timer.as_fd(), PollFlags::IN))
    }
}
