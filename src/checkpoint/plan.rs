//! Before the start: what a checkpoint will cost, which protocol takes it, and what cannot be
//! promised.
//!
//! Nothing of the guest is paused here: its writes are [sampled](super::sample).

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

use crate::checkpoint::capture::touched_pages;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::PIECE;
use crate::checkpoint::options::{CheckpointOptions, Protocol};
use crate::checkpoint::policy::Policy;
use crate::checkpoint::sample::{Look, sample_writes};
use crate::checkpoint::session::{Session, Work};
use crate::checkpoint::stats::micros;
use crate::checkpoint::tracker::{DirtySet, WriteProtection};
use crate::page::{PAGE_BYTES, PIECE_BYTES};
use crate::store::{Storage, probe_rate};

/// Bytes a second that a harvest copies (`threaded`).
const HARVEST_BYTES_PER_S: u64 = 2_000_000_000;

/// What stopping vCPUs and saving their state takes at least, with some room for a busy host.
const DOWNTIME_FLOOR: Duration = Duration::from_micros(1000);

/// What each vCPU adds to it.
const DOWNTIME_FLOOR_VCPU: Duration = Duration::from_micros(200);

/// What a checkpoint takes beside capturing and writing memory.
const FIXED_TIME: Duration = Duration::from_millis(300);

/// Estimated times of writing are taken this much longer, in quarters: disks waver.
const CAUTION_QUARTERS: u32 = 6;

/// What a write fault costs the guest that is answered by copying a piece (`cow`), of which a
/// third never happen because the sweep comes first.
const PIECE_FAULT: Duration = Duration::from_micros(170);

/// What a write to a page costs that the dirty log has re-armed (`threaded`).
const PAGE_FAULT: Duration = Duration::from_nanos(2600);

/// Bytes a second that the sweep copies, and the share of its speed that the guest loses then.
const SWEEP_BYTES_PER_S: u64 = 8_000_000_000;
const SWEEP_SLOWDOWN_PERCENT: u32 = 35;

/// Harvests that follow the scan of `threaded` in the mean.
const CLOSING_ROUNDS: u64 = 3;

/// What was found out and chosen before the start.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Plan {
    /// Why the protocol was chosen, where the choice was left to us.
    pub reason: Option<&'static str>,
    /// Pages that hold anything; of an increment, those written since the image before it.
    pub touched_pages: u64,
    /// Pages that the guest wrote a second, by the sample; `None` where it was not taken.
    pub dirty_pages_per_s: Option<u64>,
    /// Of a thousand stretches of 256 KiB, in how many the guest wrote during the sample.
    pub written_stretches_permille: Option<u64>,
    /// Pages that the guest writes again and again, by the sample; all that hold anything where
    /// the sample was too short to see them all. `None` where nothing depends on it.
    pub working_set_pages: Option<u64>,
    /// Bytes a second that the storage is expected to take; `None` where nothing depends on it.
    pub write_bytes_per_s: Option<u64>,
    /// Work that the guest is expected to lose to `threaded`.
    pub threaded_lost_us: Option<u64>,
    /// Work that the guest is expected to lose to `cow`; `None` where `cow` is not possible.
    pub cow_lost_us: Option<u64>,
    /// How long the checkpoint is expected to take; `None` without a deadline.
    pub expected_us: Option<u64>,
}

/// What was promised and what came of it.
#[derive(Clone, Copy, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Contract {
    /// The longest downtime.
    pub max_downtime_us: Option<u64>,
    /// The longest time until the image is whole.
    pub deadline_us: Option<u64>,
    /// The most memory for staged copies.
    pub max_staging_bytes: Option<u64>,
    /// The most bytes a second written.
    pub max_bandwidth: Option<u64>,
    /// Whether all of it was kept. 0 of the figures below where it was.
    pub kept: bool,
    /// By how much the downtime was longer.
    pub downtime_missed_us: u64,
    /// By how much the deadline was missed.
    pub deadline_missed_us: u64,
}

impl Contract {
    pub(crate) fn new(options: &CheckpointOptions) -> Self {
        Self {
            max_downtime_us: options.max_downtime.map(micros),
            deadline_us: options.deadline.map(micros),
            max_staging_bytes: options.max_staging_bytes,
            max_bandwidth: options.max_bandwidth,
            ..Self::default()
        }
    }

    /// Compares what was promised with what came out. Staging and bandwidth are kept by what
    /// they are made of.
    pub(crate) fn settle(&mut self, downtime_us: u64, total_us: u64) {
        let missed = |took: u64, promised: Option<u64>| {
            promised.map_or(0, |promised| took.saturating_sub(promised))
        };
        self.downtime_missed_us = missed(downtime_us, self.max_downtime_us);
        self.deadline_missed_us = missed(total_us, self.deadline_us);
        self.kept = self.downtime_missed_us == 0 && self.deadline_missed_us == 0;
    }
}

/// Chooses the protocol, and refuses what cannot be promised.
pub(crate) fn make(
    session: &mut Session,
    storage: &Arc<dyn Storage>,
    path: &Path,
) -> Result<(), Halt> {
    let options = &session.options;
    let chooses = options.protocol == Protocol::Auto;
    if !chooses && options.max_downtime.is_none() && options.deadline.is_none() {
        return Ok(());
    }
    refuse_short_downtime(session)?;
    if session.tracker.is_since_parent() {
        return of_increment(session, storage, path);
    }
    let control = session.control.clone();
    let mut plan = Plan {
        touched_pages: touched_pages(&session.layout, || control.check().is_ok()),
        ..Plan::default()
    };
    control.check()?;
    // Whether harvests shrink the last set decides whether `threaded` keeps a downtime.
    let look = match (options.protocol, options.max_downtime) {
        (Protocol::Auto | Protocol::Threaded, Some(_)) => Some(Look::ForAll),
        (Protocol::Auto | Protocol::Precopy, _) => Some(Look::Short),
        _ => None,
    };
    if let Some(look) = look {
        let writes = sample_writes(session, look)?;
        plan.dirty_pages_per_s = Some(writes.pages_per_s);
        plan.written_stretches_permille = Some(writes.stretches_permille);
        if look == Look::ForAll {
            let seen = plan.touched_pages * writes.stretches_permille / 1000;
            let all = plan.touched_pages;
            plan.working_set_pages = Some(if writes.seen_whole { seen } else { all });
        }
    }
    let depends_on_disk =
        look.is_some() || options.deadline.is_some() || options.protocol == Protocol::Stop;
    if depends_on_disk {
        plan.write_bytes_per_s = Some(write_rate(session, storage, path)?);
    }
    if chooses {
        session.options.protocol = choose(session, &mut plan);
        session.statistics.protocol = session.options.protocol;
        session.policy = Policy::new(&session.options, session.layout.page_count());
    }
    refuse(session, &mut plan)?;
    session.statistics.plan = Some(plan);
    Ok(())
}

/// An increment: what is to be copied is known, and so is where the guest writes.
fn of_increment(
    session: &mut Session,
    storage: &Arc<dyn Storage>,
    path: &Path,
) -> Result<(), Halt> {
    let mut plan = Plan {
        touched_pages: session.tracker.peek(&mut DirtySet::new(&session.layout))?,
        ..Plan::default()
    };
    if session.options.deadline.is_some() || session.options.protocol == Protocol::Stop {
        plan.write_bytes_per_s = Some(write_rate(session, storage, path)?);
    }
    if session.options.protocol == Protocol::Auto {
        session.options.protocol = Protocol::Threaded;
        session.statistics.protocol = Protocol::Threaded;
        session.policy = Policy::new(&session.options, session.layout.page_count());
        plan.reason = Some("the log of the guest's writes is on for its chain");
    }
    refuse(session, &mut plan)?;
    session.statistics.plan = Some(plan);
    Ok(())
}

/// Refuses a downtime that stopping the vCPUs alone may exceed.
fn refuse_short_downtime(session: &Session) -> Result<(), CheckpointError> {
    let vcpus = session.guest.describe().vcpu_count;
    let floor = DOWNTIME_FLOOR + DOWNTIME_FLOOR_VCPU * vcpus;
    match session.options.max_downtime {
        Some(most) if most < floor => Err(refused("max_downtime", most, floor)),
        _ => Ok(()),
    }
}

/// Refuses what the protocol will not keep, by what is known of guest and disk.
fn refuse(session: &Session, plan: &mut Plan) -> Result<(), CheckpointError> {
    let options = &session.options;
    let bytes = plan.touched_pages * PAGE_BYTES as u64;
    let rate = plan.write_bytes_per_s.unwrap_or(u64::MAX);
    let writing = time_for(bytes, rate) * CAUTION_QUARTERS / 4;
    if let Some(deadline) = options.deadline {
        let expected = FIXED_TIME + writing;
        plan.expected_us = Some(micros(expected));
        if expected > deadline {
            return Err(refused("deadline", deadline, expected));
        }
    }
    let Some(most) = options.max_downtime else {
        return Ok(());
    };
    match options.protocol {
        Protocol::Stop if writing > most => Err(refused("max_downtime", most, writing)),
        Protocol::Precopy => {
            let dirtied = plan.dirty_pages_per_s.unwrap_or(0) * PAGE_BYTES as u64;
            // What is dirty when memory has been sent once never becomes less.
            let rest = time_for(dirtied.min(bytes), rate);
            if dirtied >= rate && rest > most {
                return Err(refused("max_downtime", most, rest));
            }
            Ok(())
        }
        Protocol::Threaded if !threaded_keeps(session, plan, most) => {
            let needed = harvest_time(session, plan);
            Err(refused("max_downtime", most, needed))
        }
        _ => Ok(()),
    }
}

/// How long a harvest of the whole working set takes: what staging holds is copied, the rest goes
/// to the disk.
fn harvest_time(session: &Session, plan: &Plan) -> Duration {
    let bytes = plan.working_set_pages.unwrap_or(0) * PAGE_BYTES as u64;
    let staging = (session.policy.staging_slots * PAGE_BYTES) as u64;
    let rate = plan.write_bytes_per_s.unwrap_or(u64::MAX);
    let spilling = time_for(bytes.saturating_sub(staging), rate) * CAUTION_QUARTERS / 4;
    time_for(bytes.min(staging), HARVEST_BYTES_PER_S) + spilling
}

/// Returns whether `threaded` keeps a downtime of `most`: the whole working set can be harvested in
/// it, or harvests shrink the last set until it fits. They do where the guest writes less during a
/// harvest than was harvested.
fn threaded_keeps(session: &Session, plan: &Plan, most: Duration) -> bool {
    let Some(working_set) = plan.working_set_pages else {
        return true;
    };
    let harvest = harvest_time(session, plan);
    let written = u128::from(plan.dirty_pages_per_s.unwrap_or(0));
    let meanwhile = written * harvest.as_micros() / 1_000_000;
    harvest <= most || meanwhile * 4 <= u128::from(working_set) * 3
}

fn refused(promise: &'static str, wanted: Duration, needed: Duration) -> CheckpointError {
    CheckpointError::Refused {
        promise,
        wanted_ms: micros(wanted) / 1000,
        needed_ms: micros(needed).div_ceil(1000),
    }
}

/// Takes what is expected to cost the guest least.
fn choose(session: &Session, plan: &mut Plan) -> Protocol {
    let threaded = threaded_lost(plan);
    plan.threaded_lost_us = Some(micros(threaded));
    // Takes charge of memory and gives it up again: tells whether `cow` is possible.
    if WriteProtection::new(session.layout.clone()).is_err() {
        plan.reason = Some("write protection is not possible here");
        return Protocol::Threaded;
    }
    let cow = cow_lost(session, plan);
    plan.cow_lost_us = Some(micros(cow));
    let most = session.options.max_downtime;
    if most.is_some_and(|most| !threaded_keeps(session, plan, most)) {
        plan.reason = Some("the guest writes faster than its writes can be harvested");
        Protocol::Cow
    } else if cow <= threaded {
        plan.reason = Some("the guest loses less work to copies before its writes");
        Protocol::Cow
    } else {
        plan.reason = Some("the guest loses less work to a log of its writes");
        Protocol::Threaded
    }
}

/// Faults at re-armed pages: in each interval of the scan, and in the harvests that follow.
fn threaded_lost(plan: &Plan) -> Duration {
    const INTERVALS_PER_S: u64 = 10;
    let rate = plan.write_bytes_per_s.unwrap_or(u64::MAX);
    let writing = time_for(plan.touched_pages * PAGE_BYTES as u64, rate);
    let intervals = micros(writing) * INTERVALS_PER_S / 1_000_000 + CLOSING_ROUNDS;
    let in_interval = plan.dirty_pages_per_s.unwrap_or(0) / INTERVALS_PER_S;
    let pages = in_interval
        .min(plan.touched_pages)
        .saturating_mul(intervals);
    scaled(PAGE_FAULT, pages)
}

/// Faults at protected pieces, the sweep's share of memory, and waits for the disk where staging
/// is too small for what is written.
fn cow_lost(session: &Session, plan: &Plan) -> Duration {
    let touched_bytes = plan.touched_pages * PAGE_BYTES as u64;
    let pieces = plan.touched_pages.div_ceil(PIECE as u64);
    let written = pieces * plan.written_stretches_permille.unwrap_or(0) / 1000;
    let faults = scaled(PIECE_FAULT, written * 2 / 3);
    let sweep = time_for(touched_bytes, SWEEP_BYTES_PER_S) * SWEEP_SLOWDOWN_PERCENT / 100;
    let staging = (session.policy.staging_slots * PAGE_BYTES) as u64;
    let beyond = if staging >= touched_bytes {
        0
    } else {
        (written * PIECE_BYTES as u64).saturating_sub(staging)
    };
    let rate = plan.write_bytes_per_s.unwrap_or(u64::MAX);
    faults + sweep + time_for(beyond, rate)
}

fn scaled(each: Duration, count: u64) -> Duration {
    let ns = each.as_nanos() * u128::from(count);
    Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
}

fn time_for(bytes: u64, bytes_per_s: u64) -> Duration {
    let ns = u128::from(bytes) * 1_000_000_000 / u128::from(bytes_per_s.max(1));
    Duration::from_nanos(u64::try_from(ns).unwrap_or(u64::MAX))
}

/// Measures what the storage takes, up to the cap on bandwidth.
fn write_rate(session: &mut Session, storage: &Arc<dyn Storage>, path: &Path) -> Result<u64, Halt> {
    let durable = session.options.durable;
    let cap = session.options.max_bandwidth.unwrap_or(u64::MAX);
    let (storage, path) = (storage.clone(), path.to_owned());
    // On a thread that can be abandoned: the disk may not answer.
    let measured = session.offload(Work::Storage, "lvp-probe", move || {
        probe_rate(storage.as_ref(), &path, durable).map_err(CheckpointError::store("begin"))
    })?;
    Ok(measured.min(cap))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_no_rate_and_of_any_size_are_finite() {
        assert_eq!(time_for(1_000_000, 1_000_000), Duration::from_secs(1));
        assert!(time_for(u64::MAX, 0) > Duration::from_secs(1 << 30));
        assert_eq!(time_for(0, 0), Duration::ZERO);
    }

    #[test]
    fn what_was_missed_is_told() {
        let options = CheckpointOptions {
            max_downtime: Some(Duration::from_millis(2)),
            deadline: Some(Duration::from_secs(1)),
            ..CheckpointOptions::default()
        };
        let mut contract = Contract::new(&options);
        contract.settle(2000, 1_000_000);
        assert!(contract.kept);
        contract.settle(2001, 1_500_000);
        assert!(!contract.kept);
        assert_eq!(contract.downtime_missed_us, 1);
        assert_eq!(contract.deadline_missed_us, 500_000);
    }
}
