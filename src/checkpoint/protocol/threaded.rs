//! `threaded`: scan memory once, harvest what is dirtied meanwhile, pause for the rest.
//!
//! The image is the moment of the pause at the end. Time is bounded by the size of memory: there
//! is no test for convergence before the scan ends, and a capped number of harvests after it.
//!
//! A page's copy in the image is the one with the highest epoch: the scan's is 0, each harvest
//! counts one up. A page that the scan copied while the guest was writing it may be torn; it is
//! dirty then, since it was re-armed before, and a later harvest copies it whole.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Sender, bounded};

use crate::checkpoint::capture::{LastSet, Staging};
use crate::checkpoint::error::Halt;
use crate::checkpoint::phase::Phase;
use crate::checkpoint::protocol::harvest::Harvester;
use crate::checkpoint::protocol::scan::start_scan;
use crate::checkpoint::protocol::{Captured, end_log_after_resume};
use crate::checkpoint::session::{Session, Work};
use crate::checkpoint::stats::{micros, per_second};
use crate::checkpoint::writer::{Buffers, WriteQueue};
use crate::page::PAGE_BYTES;

pub(super) fn capture(session: &mut Session) -> Result<Captured, Halt> {
    session.statistics.mechanism = "kvm-dirty-log";
    session.statistics.capture_threads = session.policy.scan_threads() as u64;
    let staging = make_staging(session)?;
    let buffers = Buffers::alike(session.options.workspace.buffers(session.policy.buffers)?);
    let (queue, returned) = session.start_writers(buffers)?;
    let logging = session.start_log()?;
    session.job.enter(Phase::Live)?;
    let (helpers, mut harvester) = live(session, queue, staging)?;
    if let (Some(limit), false) = (session.options.max_downtime, harvester.is_small()) {
        return Err(harvester.not_converged(limit).into());
    }
    let lease = session.lease.clone();
    let pause = session.in_pause(|_| harvester.capture_last(&lease, &helpers))?;
    let resumed = Instant::now();
    session.job.enter(Phase::Draining)?;
    // The scanning threads end; the guest pays for its log no longer than it must.
    drop(helpers);
    end_log_after_resume(session, logging)?;
    session.statistics.log_stop_us = micros(resumed.elapsed());
    harvester.drain()?;
    report(session, &harvester);
    let Harvester { queue, staging, .. } = harvester;
    drop(queue);
    session.writers.join()?;
    session.capture.join()?;
    session.statistics.drain_us = micros(resumed.elapsed());
    let kept = Some(staging.into_memory());
    session.options.workspace.keep(returned.buffers(), kept);
    Ok(Captured {
        sections: pause.sections,
        moment: pause.moment,
    })
}

fn make_staging(session: &mut Session) -> Result<Staging, Halt> {
    let slots = session.policy.staging_slots;
    let kept = session.options.workspace.staging();
    let mut staging = Staging::new(slots, session.layout.page_count(), kept)?;
    // As much as the first harvest may take; each harvest populates for the next.
    let first = 2 * session.policy.reserved_slots;
    let control = session.control.clone();
    session.offload(Work::Cpu, "lvp-staging", move || {
        staging.populate(first, || control.check().is_ok())?;
        Ok(staging)
    })
}

/// Scans and harvests; returns what the pause needs when the last set is as small as it gets.
fn live(
    session: &mut Session,
    queue: WriteQueue,
    staging: Staging,
) -> Result<(Sender<Arc<LastSet>>, Harvester), Halt> {
    let tracker = session.tracker.clone();
    let (helpers, scanning) = start_scan(session, &tracker, &queue)?;
    let mut harvester = Harvester::new(
        session.layout.clone(),
        tracker,
        session.control.clone(),
        queue,
        staging,
        session.policy.clone(),
        session.chain_goes_on(),
    );
    let (done, harvested) = bounded(1);
    session.capture.spawn_polite("lvp-harvest", move || {
        harvester.live(&scanning)?;
        done.send(harvester).map_err(|_| Halt::Stopped)
    })?;
    let harvester = session.control.wait(&harvested)?;
    Ok((helpers, harvester))
}

/// Takes over what the harvester counted.
fn report(session: &mut Session, harvester: &Harvester) {
    let harvested = &harvester.statistics;
    let statistics = &mut session.statistics;
    statistics.rounds.clone_from(&harvested.rounds);
    statistics.round_count = harvested.round_count;
    statistics.dirty_pages = harvested.dirty_pages;
    statistics.closing = harvested.closing;
    statistics.staging = harvested.staging;
    statistics.staging.capacity_bytes = (harvester.staging.capacity() * PAGE_BYTES) as u64;
    statistics.staging.peak_bytes = (harvester.staging.peak() * PAGE_BYTES) as u64;
    statistics.staging.replaced_pages = harvester.staging.replaced_pages;
    let live = std::time::Duration::from_micros(statistics.live_us);
    statistics.dirty_pages_per_s = per_second(statistics.dirty_pages, live);
}
