//! A virtio balloon: memory that the guest gives back to the host, when it is asked to, or when it
//! finds that nobody uses it. The guest also says how it uses its memory.

mod statistics;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use rustix::event::PollFlags;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use statistics::Statistics;
pub use statistics::{GuestMemoryUse, MemoryFigure};

use super::{Backend, Chain, Fault, Kind, Virtqueue, Work};
use crate::machine::memory::GuestRam;
use crate::machine::spec::BalloonSpec;
use crate::page::{Gfn, PAGE_BYTES, PageRun};
use crate::state::virtio::VirtioBalloonV1;
use crate::state::{StateError, StateSection, StateSet};

// Features (specification, section 5.5.3); virtio-bindings does not have them.
const STATS_QUEUE: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_REPORTING: u64 = 1 << 5;

/// Descriptors of each queue.
const QUEUE_SIZES: [u16; 4] = [128; 4];
/// The most pages of one request: Linux has 256.
const PAGES_MAX: usize = 4096;
/// Where in the configuration the driver says how many pages it has given.
const ACTUAL_AT: u64 = 4;

/// A balloon.
#[derive(Debug)]
pub struct Balloon {
    spec: BalloonSpec,
    ram: Arc<GuestRam>,
    /// How many pages the guest is asked to give.
    target: AtomicU32,
    /// How many it says that it has given.
    actual: AtomicU32,
    statistics: Statistics,
}

fn pages_of(bytes: u64) -> u32 {
    u32::try_from(bytes / PAGE_BYTES as u64).unwrap_or(u32::MAX)
}

impl Balloon {
    /// Makes a balloon for the guest whose memory is `ram`.
    pub fn new(spec: BalloonSpec, ram: Arc<GuestRam>) -> io::Result<Self> {
        let statistics = Statistics::new()?;
        statistics.ask_every(spec.statistics_period);
        Ok(Self {
            spec,
            ram,
            target: AtomicU32::new(pages_of(spec.wanted_bytes)),
            actual: AtomicU32::new(0),
            statistics,
        })
    }

    /// Asks the guest to give so many bytes, altogether; its driver has to be told.
    pub(in crate::machine) fn ask_for(&self, bytes: u64) {
        self.target.store(pages_of(bytes), Ordering::Release);
    }

    /// Returns how many bytes the guest says that it has given.
    pub fn given_bytes(&self) -> u64 {
        u64::from(self.actual.load(Ordering::Acquire)) * PAGE_BYTES as u64
    }

    /// Asks the guest each time `period` has passed how it uses its memory; never where it is zero.
    pub(in crate::machine) fn ask_for_use_every(&self, period: Duration) {
        self.statistics.ask_every(period);
    }

    /// Returns how often that is; zero for never.
    pub fn asks_for_use_every(&self) -> Duration {
        self.statistics.period()
    }

    /// Returns how the guest used its memory when it was asked last; `None` until it has answered.
    pub fn memory_use(&self) -> Option<GuestMemoryUse> {
        self.statistics.latest()
    }

    /// Takes the pages whose numbers a request has.
    fn inflate(&self, queue: &Virtqueue, chain: &Chain<'_>) -> Result<(), Fault> {
        let mut readable = chain.readable.clone();
        let count = readable.len() / size_of::<u32>();
        if !readable.len().is_multiple_of(size_of::<u32>()) || !(1..=PAGES_MAX).contains(&count) {
            return Err(queue.fault("a list of pages of a length that is none"));
        }
        let mut pages = Vec::with_capacity(count);
        let mut number = [0; size_of::<u32>()];
        while !readable.is_empty() && readable.read(&mut number) {
            pages.push(u64::from(u32::from_le_bytes(number)));
        }
        pages.sort_unstable();
        let mut rest = &pages[..];
        while let [first, ..] = *rest {
            let same = |(at, page): (u64, &u64)| *page == first + at;
            let len = (0..).zip(rest).take_while(|pair| same(*pair)).count();
            self.give_up(PageRun {
                start: Gfn(first),
                page_count: len as u64,
            });
            rest = &rest[len..];
        }
        Ok(())
    }

    /// Takes free pages for as long as the guest does not use them.
    fn take_reported(&self, queue: &Virtqueue, chain: &Chain<'_>) -> Result<(), Fault> {
        let mut writable = chain.writable.clone();
        if writable.is_empty() {
            return Err(queue.fault("a report has no pages"));
        }
        for slice in writable.as_slices() {
            // Whole pages: the guest may use the rest.
            let page_bytes = PAGE_BYTES as u64;
            let start = slice.bitmap().gpa();
            let end = start + slice.len() as u64;
            let first = start.div_ceil(page_bytes);
            self.give_up(PageRun {
                start: Gfn(first),
                page_count: (end / page_bytes).saturating_sub(first),
            });
        }
        Ok(())
    }

    fn give_up(&self, run: PageRun) {
        if let Err(error) = self.ram.discard(run) {
            // The guest does without it either way.
            log::debug!("could not give memory of the balloon back: {error}");
        }
    }
}

impl Backend for Balloon {
    fn kind(&self) -> Kind {
        Kind {
            device_type: u16::try_from(VIRTIO_ID_BALLOON).expect("a small number"),
            class: 0x00_ff00,
            name: "balloon",
        }
    }

    fn features(&self) -> u64 {
        let feature = |on, feature| if on { feature } else { 0 };
        STATS_QUEUE
            | feature(self.spec.auto_deflate, DEFLATE_ON_OOM)
            | feature(self.spec.free_page_reporting, PAGE_REPORTING)
    }

    fn queue_sizes(&self) -> &[u16] {
        // Inflate, deflate, statistics, and reports where there are any: no hints.
        let reports = usize::from(self.spec.free_page_reporting);
        &QUEUE_SIZES[..3 + reports]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let numbers = [&self.target, &self.actual].map(|number| number.load(Ordering::Acquire));
        let config = numbers.map(u32::to_le_bytes).concat();
        super::read_from(&config, offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if offset == ACTUAL_AT
            && let Ok(bytes) = data.try_into()
        {
            let pages = u32::from_le_bytes(bytes);
            self.actual.store(pages, Ordering::Release);
        }
    }

    fn process(&self, work: &mut Work<'_>) -> Result<(), Fault> {
        self.statistics.look_at_timer();
        // Queues of features that the driver did not take have no number.
        let statistics_at = (work.features & STATS_QUEUE != 0).then_some(2);
        for (number, queue) in work.queues.iter_mut().enumerate() {
            let Some(queue) = queue else { continue };
            if Some(number) == statistics_at {
                self.statistics.process(work.memory, queue)?;
                continue;
            }
            while !work.stop.is_set()
                && let Some(chain) = queue.pop(work.memory)?
            {
                match number {
                    0 => self.inflate(queue, &chain)?,
                    // What the guest takes back it writes: there is nothing to do.
                    1 => {}
                    _ => self.take_reported(queue, &chain)?,
                }
                queue.complete(work.memory, &chain, 0)?;
            }
        }
        Ok(())
    }

    fn poll_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.statistics.timer(), PollFlags::IN))
    }

    fn save(&self, instance: u32) -> Option<StateSection> {
        let state = VirtioBalloonV1 {
            target_pages: self.target.load(Ordering::Acquire),
            actual_pages: self.actual.load(Ordering::Acquire),
        };
        Some(StateSection::encode(instance, &state))
    }

    fn restore(&self, instance: u32, state: &mut StateSet) -> Result<(), StateError> {
        let saved: VirtioBalloonV1 = state.take(instance)?;
        self.target.store(saved.target_pages, Ordering::Release);
        self.actual.store(saved.actual_pages, Ordering::Release);
        self.statistics.go_on();
        Ok(())
    }

    fn reset(&self) {
        self.actual.store(0, Ordering::Release);
        self.statistics.forget();
    }
}
