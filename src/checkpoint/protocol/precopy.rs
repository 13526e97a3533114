//! `precopy`: copy all memory, then again and again what was dirtied meanwhile, until the rest
//! fits the downtime budget.
//!
//! The baseline of live migration (Clark et al., "Live Migration of Virtual Machines", NSDI 2005),
//! here to a file. Everything goes straight to the image: a page that is dirtied in every round is
//! written in every round, and a guest that dirties faster than the disk writes never converges.
//! Then the rounds are ended, the guest is paused for however long the rest takes, and the
//! statistics say so; where the caller bounds the downtime the checkpoint fails instead.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, bounded, select};

use crate::checkpoint::control::Control;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::phase::Phase;
use crate::checkpoint::policy::{self, Closing, ClosingReason, PageCost};
use crate::checkpoint::protocol::scan::start_scan;
use crate::checkpoint::protocol::{Captured, end_log_after_resume};
use crate::checkpoint::session::Session;
use crate::checkpoint::stats::{Round, Statistics, micros, per_second};
use crate::checkpoint::tracker::{DirtySet, Tracker};
use crate::checkpoint::watchdog::PauseLease;
use crate::checkpoint::writer::{Buffer, Buffers, WriteQueue};
use crate::page::PAGE_BYTES;

/// The most rounds that are made before the pause of a small increment of `cow`.
const AHEAD_ROUNDS_MAX: u32 = 2;

pub(super) fn capture(session: &mut Session) -> Result<Captured, Halt> {
    session.statistics.mechanism = "kvm-dirty-log";
    session.statistics.capture_threads = session.policy.scan_threads() as u64;
    let all = session.options.workspace.buffers(session.policy.buffers)?;
    let (queue, returned) = session.start_writers(Buffers::alike(all))?;
    let logging = session.start_log()?;
    session.job.enter(Phase::Live)?;
    let mut rounds = live(session, queue)?;
    session.statistics.closing = rounds.statistics.closing;
    let converged = rounds.statistics.closing == Some(ClosingReason::FitsBudget);
    session.statistics.converged = Some(converged);
    if let (false, Some(limit)) = (converged, session.options.max_downtime) {
        return Err(CheckpointError::not_converged(limit, &rounds.statistics).into());
    }
    let lease = session.lease.clone();
    let pause = session.in_pause(|_| rounds.last(&lease))?;
    let resumed = Instant::now();
    session.job.enter(Phase::Draining)?;
    end_log_after_resume(session, logging)?;
    session.statistics.log_stop_us = micros(resumed.elapsed());
    report(session, &rounds);
    drop(rounds);
    session.writers.join()?;
    session.capture.join()?;
    session.statistics.drain_us = micros(resumed.elapsed());
    session.options.workspace.keep(returned.buffers(), None);
    Ok(Captured {
        sections: pause.sections,
        moment: pause.moment,
    })
}

/// Copies all memory and then the rounds; returns what the pause needs.
fn live(session: &mut Session, queue: WriteQueue) -> Result<Rounds, Halt> {
    let tracker = session.tracker.clone();
    // Nobody helps in the pause: the queue is filled by one thread.
    let (_, scanning) = start_scan(session, &tracker, &queue)?;
    let mut rounds = Rounds::new(session, queue);
    let (done, finished) = bounded(1);
    session.capture.spawn("lvp-rounds", move || {
        rounds.live(&scanning)?;
        done.send(rounds).map_err(|_| Halt::Stopped)
    })?;
    session.control.wait(&finished)
}

/// The rounds after the first one, which is the scan.
pub(super) struct Rounds {
    layout: Arc<Layout>,
    tracker: Arc<Tracker>,
    /// Whether the log runs on after the pause.
    goes_on: bool,
    control: Arc<Control>,
    queue: WriteQueue,
    budget: Duration,
    /// Rounds are added as they end.
    statistics: Statistics,
    dirty: DirtySet,
    epoch: u32,
    /// What a page costs on its way to the image, the disk's pace included.
    cost: PageCost,
    last_round: Instant,
}

impl Rounds {
    pub(super) fn new(session: &Session, queue: WriteQueue) -> Self {
        Self {
            dirty: DirtySet::new(&session.layout),
            layout: session.layout.clone(),
            tracker: session.tracker.clone(),
            goes_on: session.chain_goes_on(),
            control: session.control.clone(),
            queue,
            budget: session.policy.downtime_budget,
            statistics: Statistics::default(),
            epoch: 0,
            cost: PageCost::of_writing(),
            last_round: Instant::now(),
        }
    }

    fn live(&mut self, scanning: &Receiver<Infallible>) -> Result<(), Halt> {
        select! {
            recv(scanning) -> _ => {}
            recv(self.control.stop_signal()) -> _ => return Err(Halt::Stopped),
        }
        let mut closing = Closing::of_precopy();
        if self.tracker.is_since_parent() {
            // What was written since the last image: there was no scan.
            self.round(true, || ())?;
        }
        loop {
            let dirty = self.tracker.peek(&mut self.dirty)?;
            if let Some(reason) = closing.next(dirty, self.cost.of(dirty), self.budget) {
                self.statistics.closing = Some(reason);
                return Ok(());
            }
            self.round(true, || ())?;
        }
    }

    /// Copies what was written up to now while the guest runs, as long as that helps and the last
    /// round would take longer than `budget`.
    pub(super) fn ahead(&mut self, budget: Duration) -> Result<(), Halt> {
        let mut before = Duration::MAX;
        for _ in 0..AHEAD_ROUNDS_MAX {
            let pages = self.tracker.peek(&mut self.dirty)?;
            let cost = policy::cost_in_pause(pages, self.dirty.stretch_count());
            if cost <= budget || cost > before / 2 {
                break;
            }
            before = cost;
            self.round(true, || ())?;
        }
        Ok(())
    }

    /// The last round, in the pause: no store can race it, so nothing is re-armed but for the next
    /// image of a chain.
    pub(super) fn last(&mut self, lease: &PauseLease) -> Result<(), Halt> {
        lease.beat_before("the last dirty pages are written to the image");
        self.round(self.goes_on, || lease.beat())
    }

    /// Sends what was dirtied since the last round on its way to the image.
    fn round(&mut self, rearm: bool, beat: impl Fn()) -> Result<(), Halt> {
        let began = Instant::now();
        // Taken before the first re-arm: a page that comes again has a higher one.
        self.epoch += 1;
        self.tracker.collect(&mut self.dirty)?;
        beat();
        let mut pages = 0;
        let mut open: Option<Buffer> = None;
        for window in self.dirty.windows() {
            self.control.check()?;
            if rearm {
                // Re-arm first, copy second: a store that races a copy is reported again.
                self.tracker.rearm_window(&self.dirty, &window)?;
            }
            for page in self.dirty.pages(window) {
                if let Some(full) = open.take_if(|open| open.is_full()) {
                    self.queue.submit(full)?;
                    beat();
                }
                let buffer = match &mut open {
                    Some(buffer) => buffer,
                    None => open.insert(self.queue.buffer(self.epoch)?),
                };
                let room = buffer.push(self.layout.frame(page));
                self.layout.read_page(page, room);
                pages += 1;
            }
        }
        open.map_or(Ok(()), |buffer| self.queue.submit(buffer))?;
        self.cost.learn(pages, began.elapsed());
        self.statistics.add_round(Round {
            epoch: self.epoch,
            at_us: micros(began - self.control.started),
            took_us: micros(began.elapsed()),
            pages,
            bytes: pages * PAGE_BYTES as u64,
            spilled_pages: 0,
            dirty_pages_per_s: per_second(pages, began - self.last_round),
        });
        self.last_round = began;
        Ok(())
    }
}

/// Takes over what the rounds counted.
pub(super) fn report(session: &mut Session, rounds: &Rounds) {
    let counted = &rounds.statistics;
    let statistics = &mut session.statistics;
    statistics.rounds.clone_from(&counted.rounds);
    statistics.round_count = counted.round_count;
    statistics.dirty_pages = counted.dirty_pages;
    let live = Duration::from_micros(statistics.live_us);
    statistics.dirty_pages_per_s = per_second(statistics.dirty_pages, live);
}
