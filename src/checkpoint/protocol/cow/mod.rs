//! `cow`: a short pause at the start, then each piece is copied before its first write.
//!
//! The image is the moment of the pause. In it, memory is write-protected and nothing is copied.
//! Then the guest runs on, and pieces of 2 MiB are captured: in order, by threads that write each
//! before the next; and by *fault handlers*, for a vCPU that wants to write a piece that they have
//! not come to. With the first such vCPU there is hurry: from then on the *sweep* copies pieces
//! into bounded staging, ahead of the guest and of the disk. Each un-protects the piece once it is
//! copied; what then happens to the copy (compression, digests, the disk) concerns the guest no
//! more. A piece is captured once, so that time and space are bounded by the size of memory.
//!
//! **The pause does not depend on the size of memory.** Protecting huge pages that the guest maps
//! as such takes 0.2 to 0.3 ms per GiB. Where it takes longer (pages of 4 KiB, or a guest that
//! maps such), which a sample tells, memory is protected *ahead* of the pause, piece by piece,
//! while the guest runs: who writes meanwhile is let through and remembered, and only what was
//! written is protected again in the pause.
//!
//! Pages that were never touched are known from the page map, are zeros in the image, and are
//! neither protected nor read.

mod ahead;
mod capture;
mod faults;
mod increment;
mod watch;

pub use ahead::ArmingStatistics;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use crossbeam_channel::{Receiver, bounded};

use crate::checkpoint::capture::UntouchedPages;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::phase::Phase;
use crate::checkpoint::protocol::Captured;
use crate::checkpoint::session::{Session, Work};
use crate::checkpoint::stalls::StallCounter;
use crate::checkpoint::stats::micros;
use crate::checkpoint::tracker::{DirtySet, Unprotectable, WriteProtection};
use crate::checkpoint::writer::{Buffers, Returned};
use crate::guest::Guest;
use crate::page::PIECE_BYTES;
use ahead::Ahead;
use capture::{CopyOnWrite, Parts};
use faults::FaultHandler;
use watch::StallWatch;

/// vCPUs that one fault handler serves.
const VCPUS_PER_HANDLER: usize = 4;

/// Takes charge of the guest's memory; fails where `cow` is not possible here.
pub(super) fn prepare(session: &Session) -> Result<WriteProtection, Unprotectable> {
    WriteProtection::new(session.layout.clone())
}

pub(super) fn capture(
    session: &mut Session,
    protection: WriteProtection,
) -> Result<Captured, Halt> {
    session.statistics.mechanism = "userfaultfd-wp";
    let (cow, returned) = make(session, protection)?;
    // Whatever happens from here on: everybody is let go at the end of this function.
    let release = Release(cow.clone());
    let handlers = start_handlers(session, &cow)?;
    let (go, start) = bounded(session.policy.write_threads);
    start_capture(session, &cow, &start)?;
    session.job.enter(Phase::Live)?;
    let observer = DiscardsAnnounced::new(session.guest.clone(), &cow);
    // After the observer is set: from this look on every discard is known.
    let untouched = UntouchedPages::look(&session.layout).map_err(page_map_failed)?;
    let mut ahead = Ahead::new(cow.clone(), untouched, session.policy.arming_budget);
    ahead.arm()?;
    let pause = session.in_pause(|session| {
        session.lease.beat_before("memory is write-protected");
        begin_chain(session)?;
        ahead.finish_in_pause(take_written(session)?)
    })?;
    let resumed = Instant::now();
    let downtime = &mut session.statistics.downtime;
    downtime.arm_us = std::mem::take(&mut downtime.last_pages_us);
    session.job.enter(Phase::Draining)?;
    session.statistics.arming = Some(ahead.statistics());
    drop(ahead);
    for _ in 0..session.policy.write_threads {
        go.send(()).map_err(|_| Halt::Stopped)?;
    }
    session.control.wait(cow.all_captured())?;
    session.statistics.capture_us = micros(resumed.elapsed());
    cow.complete_log()?;
    drop(observer);
    drop(release);
    session.capture.join()?;
    session.statistics.stalls = stalls(&handlers);
    report_staging(session, &cow);
    drop(cow);
    // The last thread's handle on the queue went with it: the writers end when all is written.
    session.join_writers(&returned, resumed)?;
    Ok(Captured {
        sections: pause.sections,
        moment: pause.moment,
    })
}

/// Starts the log of a chain that begins here. Called in the pause: what was written before it is
/// in the image, and nothing is armed yet, so that it costs next to nothing.
fn begin_chain(session: &mut Session) -> Result<(), Halt> {
    if session.chain_goes_on() && !session.tracker.is_since_parent() {
        let logging = session.start_log()?;
        session.keep_log(logging);
    }
    Ok(())
}

/// Takes what was written since the chain's last image, by piece. Called in the pause.
fn take_written(session: &mut Session) -> Result<Option<Vec<u64>>, Halt> {
    if !session.tracker.is_since_parent() {
        return Ok(None);
    }
    let mut dirty = DirtySet::new(&session.layout);
    session.tracker.collect(&mut dirty)?;
    session.tracker.rearm_all(&dirty)?;
    session.statistics.dirty_pages = dirty.page_count();
    Ok(Some(dirty.by_piece()))
}

/// Captures an increment for which memory need not be protected; `None` where it must be.
///
/// With the chain's log on, KVM has to protect page by page: what can be copied instead is.
pub(super) fn small_increment(session: &mut Session) -> Result<Option<Captured>, Halt> {
    let small = increment::small(session)?;
    small
        .map(|dirty| increment::capture(session, dirty))
        .transpose()
}

/// Makes staging and starts the writers.
fn make(
    session: &mut Session,
    protection: WriteProtection,
) -> Result<(Arc<CopyOnWrite>, Returned), Halt> {
    let untouched = UntouchedPages::look(&session.layout).map_err(page_map_failed)?;
    let pieces = session.layout.pieces().enumerate();
    let touched = pieces
        .filter(|(number, piece)| untouched.count(*number) < piece.page_count)
        .count();
    let (count, reserve) = session.policy.piece_buffers(touched);
    let (workspace, control) = (session.options.workspace.clone(), session.control.clone());
    let all = session.offload(Work::Cpu, "lvp-staging", move || {
        workspace.buffers_while(count, || control.check().is_ok())
    })?;
    session.control.check()?;
    session.statistics.staging.capacity_bytes = (count * PIECE_BYTES) as u64;
    let (queue, returned) = session.start_writers(Buffers { all, reserve })?;
    let cow = CopyOnWrite::new(Parts {
        layout: session.layout.clone(),
        control: session.control.clone(),
        protection,
        queue,
        image: session.image(),
        tally: session.tally.clone(),
        staging_pieces: count,
        log: (session.chain_goes_on() && !session.tracker.is_since_parent())
            .then(|| session.tracker.clone()),
    })?;
    Ok((Arc::new(cow), returned))
}

/// Starts the fault handlers and the watch over them; the receiver gets what each counted.
fn start_handlers(
    session: &mut Session,
    cow: &Arc<CopyOnWrite>,
) -> Result<Receiver<StallCounter>, Halt> {
    let vcpus = session.guest.describe().vcpu_count as usize;
    let threads = vcpus.div_ceil(VCPUS_PER_HANDLER).max(1);
    let (counted, handlers) = bounded(threads);
    let watch = Arc::new(StallWatch::new(
        cow.clone(),
        threads,
        session.options.pause_limit,
    ));
    for number in 0..threads {
        let handler = FaultHandler::new(cow.clone(), watch.clone(), number);
        let counted = counted.clone();
        session
            .capture
            .spawn(&format!("lvp-fault-{number}"), move || {
                counted.send(handler.run()?).ok();
                Ok(())
            })?;
    }
    session.capture.spawn("lvp-stalls", move || {
        watch.run();
        Ok(())
    })?;
    Ok(handlers)
}

/// Starts the threads that write what they capture, from the resume on, and those that take over
/// when somebody has to wait.
fn start_capture(
    session: &mut Session,
    cow: &Arc<CopyOnWrite>,
    start: &Receiver<()>,
) -> Result<(), Halt> {
    session.statistics.capture_threads = session.policy.sweep_threads() as u64;
    for number in 0..session.policy.write_threads {
        let (cow, start) = (cow.clone(), start.clone());
        let control = session.control.clone();
        let name = format!("lvp-through-{number}");
        session.capture.spawn_polite(&name, move || {
            control.wait(&start)?;
            cow.write_through()
        })?;
    }
    for number in 0..session.policy.sweep_threads() {
        let cow = cow.clone();
        let name = format!("lvp-scan-{number}");
        session.capture.spawn_polite(&name, move || {
            cow.wait_for_hurry()?;
            cow.sweep()
        })?;
    }
    Ok(())
}

fn stalls(handlers: &Receiver<StallCounter>) -> crate::checkpoint::StallStatistics {
    let mut all = StallCounter::new();
    handlers.try_iter().for_each(|counter| all.merge(&counter));
    all.statistics()
}

fn report_staging(session: &mut Session, cow: &CopyOnWrite) {
    let pieces = cow.staged_peak.load(Ordering::Relaxed);
    session.statistics.staging.peak_bytes = (pieces * PIECE_BYTES) as u64;
}

/// Lets everybody write all memory when it is dropped, and the handlers end.
struct Release(Arc<CopyOnWrite>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.release();
    }
}

/// The guest's discards are announced to the capture until this is dropped.
struct DiscardsAnnounced(Arc<dyn Guest>);

impl DiscardsAnnounced {
    fn new(guest: Arc<dyn Guest>, cow: &Arc<CopyOnWrite>) -> Self {
        guest.host_writes().set_discard_observer(Some(cow.clone()));
        Self(guest)
    }
}

impl Drop for DiscardsAnnounced {
    fn drop(&mut self) {
        self.0.host_writes().set_discard_observer(None);
    }
}

fn page_map_failed(error: std::io::Error) -> CheckpointError {
    CheckpointError::resource("this process's page map")(error)
}

fn protection_failed(error: std::io::Error) -> CheckpointError {
    CheckpointError::Protection {
        source: Arc::new(error),
    }
}
