//! Checkpoints at an interval while a domain runs, as its document asks for them.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use serde::{Deserialize, Serialize};

use crate::host::files::{images_directory, make_images_directory};
use crate::host::{
    CheckpointRequest, CheckpointSummary, Domain, ErrorCode, HostError, Job, MachineState,
};
use crate::sys::sigmask::SignalsBlocked;

/// Later than this part of the interval, a checkpoint began late.
const LATE_PARTS: u32 = 10;

/// How often it is looked whether another checkpoint, or a rewind, is done at last.
const BUSY_LOOK: Duration = Duration::from_millis(20);

/// How often a checkpoint under way is looked at, in case that the domain is given up.
const JOB_LOOK: Duration = Duration::from_millis(50);

/// Times that follow one another at an interval. Nothing is taken before the one before is done: a
/// time that passes meanwhile is missed, and the next one is taken at its own time.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    start: Instant,
    every: Duration,
    turn: u32,
}

impl Schedule {
    /// Makes a schedule whose first time is `start`. `every` is not zero.
    pub fn new(start: Instant, every: Duration) -> Self {
        Self {
            start,
            every,
            turn: 0,
        }
    }

    /// Returns the next time.
    pub fn due(&self) -> Instant {
        self.start + self.every.saturating_mul(self.turn)
    }

    /// Returns whether what began `late` after its time is to be said to be late.
    pub fn is_late(&self, late: Duration) -> bool {
        late > self.every / LATE_PARTS
    }

    /// Goes on to the first time after `now`; returns how many passed by.
    pub fn advance(&mut self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.start).as_nanos() / self.every.as_nanos();
        let next = u32::try_from(passed + 1).unwrap_or(u32::MAX);
        let next = next.max(self.turn.saturating_add(1));
        let missed = next - self.turn - 1;
        self.turn = next;
        u64::from(missed)
    }
}

/// A series of checkpoints in figures.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// Images that were made.
    pub taken: u64,
    /// Checkpoints that came to nothing.
    pub failed: u64,
    /// Times at which none began, since the one before, or another checkpoint, was not done.
    pub missed: u64,
    /// Those that began later than a tenth of the interval after their time.
    pub late: u64,
}

/// Checkpoints that a domain's document asks for, and what came of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeriodicStatus {
    /// From one to the next, in milliseconds.
    pub every_ms: u64,
    /// How many.
    #[serde(flatten)]
    pub series: Series,
    /// The last image.
    pub last_image: Option<PathBuf>,
    /// Why the last one that failed did, or was missed.
    pub last_error: Option<String>,
}

/// Takes the checkpoints until it is dropped, or the domain ends. One under way is cancelled then.
#[derive(Debug)]
pub struct PeriodicCheckpoints {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What a domain asks for, checked.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    every: Duration,
    request: CheckpointRequest,
    directory: PathBuf,
}

impl Plan {
    /// Returns the directory of the images.
    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads what the document of a domain asks for. Changes nothing. The directory of images is
    /// that of whom the process runs as now.
    pub(super) fn of(config: &crate::domain::DomainConfig) -> Result<Option<Self>, HostError> {
        let invalid = |error: &dyn std::fmt::Display| {
            HostError::Invalid(format!("<checkpoint> in <metadata>: {error}"))
        };
        let Some(periodic) = config.periodic().map_err(|error| invalid(&error))? else {
            return Ok(None);
        };
        let mut request = CheckpointRequest::from_attributes(&periodic.how)?;
        request.incremental = true;
        request.keep = periodic.keep;
        let directory = match &periodic.directory {
            Some(directory) => directory.as_path().to_owned(),
            None => images_directory(config.name.as_str())?,
        };
        request.out = Some(directory.clone());
        Ok(Some(Self {
            every: periodic.every,
            request,
            directory,
        }))
    }
}

impl PeriodicCheckpoints {
    /// Begins what the domain's document asks for, an interval after now; `None` where it asks for
    /// nothing. Makes the directory of the images. A domain that was restored with another identity
    /// takes none: the images would be among those of the one that was saved.
    pub fn start(domain: &Arc<Domain>) -> Result<Option<Self>, HostError> {
        let Some(plan) = domain.periodic_plan().cloned() else {
            return Ok(None);
        };
        make_images_directory(plan.directory())?;
        let reports = domain.periodic_reports().clone();
        *lock(&reports) = Some(PeriodicStatus {
            every_ms: u64::try_from(plan.every.as_millis()).unwrap_or(u64::MAX),
            ..PeriodicStatus::default()
        });
        let (stop, stopped) = bounded(0);
        let taker = Taker {
            domain: Arc::downgrade(domain),
            name: domain.name().to_owned(),
            schedule: Schedule::new(Instant::now() + plan.every, plan.every),
            plan,
            stopped,
            reports,
        };
        let _blocked = SignalsBlocked::new();
        let thread = thread::Builder::new()
            .name("lvp-periodic".to_owned())
            .spawn(move || taker.run())
            .map_err(|source| HostError::Resource {
                what: "thread lvp-periodic",
                source,
            })?;
        Ok(Some(Self {
            stop: Some(stop),
            thread: Some(thread),
        }))
    }
}

impl Drop for PeriodicCheckpoints {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread of periodic checkpoints panicked");
        }
    }
}

/// Where the domain says what came of its periodic checkpoints.
pub(super) type Reports = Arc<Mutex<Option<PeriodicStatus>>>;

fn lock(reports: &Reports) -> MutexGuard<'_, Option<PeriodicStatus>> {
    reports.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Returns what came of a domain's periodic checkpoints so far.
pub(super) fn read(reports: &Reports) -> Option<PeriodicStatus> {
    lock(reports).clone()
}

/// The thread that takes them.
struct Taker {
    domain: Weak<Domain>,
    name: String,
    plan: Plan,
    schedule: Schedule,
    stopped: Receiver<()>,
    reports: Reports,
}

/// What became of one time.
enum Turn {
    Taken(Box<CheckpointSummary>),
    Failed(HostError),
    /// Something else was under way until the next time.
    Busy(HostError),
    /// The guest is paused, so that there is nothing new.
    Paused,
    /// The domain is no more.
    Over,
}

impl Taker {
    fn run(mut self) {
        while !self.is_stopped_at(self.schedule.due()) {
            let (turn, late) = self.take();
            if matches!(turn, Turn::Over) {
                return;
            }
            let paused = matches!(turn, Turn::Paused);
            let busy = matches!(turn, Turn::Busy(_));
            self.report(turn, late);
            let passed = self.schedule.advance(Instant::now());
            // The time of a turn that found no room is missed itself.
            let missed = if paused { 0 } else { passed + u64::from(busy) };
            if missed > 0 {
                log::warn!(
                    "domain {}: {missed} periodic checkpoints missed: not done within {:?}",
                    self.name,
                    self.plan.every
                );
                self.update(|status| status.series.missed += missed);
            }
        }
    }

    /// Waits until `time`; true where it was told to stop before.
    fn is_stopped_at(&self, time: Instant) -> bool {
        use crossbeam_channel::RecvTimeoutError::Disconnected;
        matches!(self.stopped.recv_deadline(time), Err(Disconnected))
    }

    /// Takes one, as soon as nothing else is under way; returns how long after its time it began.
    fn take(&self) -> (Turn, Duration) {
        let due = self.schedule.due();
        loop {
            let late = due.elapsed();
            let Some(domain) = self.domain.upgrade() else {
                return (Turn::Over, late);
            };
            match domain.state() {
                MachineState::Running => {}
                MachineState::Paused => return (Turn::Paused, late),
                _ => return (Turn::Over, late),
            }
            let error = match domain.start_checkpoint(&self.plan.request) {
                Ok(job) => {
                    // The domain may be given up meanwhile.
                    drop(domain);
                    let turn = self.finish(&job);
                    let over = matches!(turn, Turn::Failed(_)) && self.has_ended();
                    return (if over { Turn::Over } else { turn }, late);
                }
                Err(error) => error,
            };
            drop(domain);
            if error.code() != ErrorCode::Busy {
                return (Turn::Failed(error), late);
            }
            let look = Instant::now() + BUSY_LOOK;
            if look > due + self.plan.every {
                return (Turn::Busy(error), late);
            }
            if self.is_stopped_at(look) {
                return (Turn::Over, late);
            }
        }
    }

    fn has_ended(&self) -> bool {
        use MachineState::{Paused, Running};
        let domain = self.domain.upgrade();
        !domain.is_some_and(|domain| matches!(domain.state(), Running | Paused))
    }

    fn finish(&self, job: &Job) -> Turn {
        let result = loop {
            if let Some(result) = job.wait_timeout(JOB_LOOK) {
                break result;
            }
            if self.is_stopped_at(Instant::now()) {
                job.cancel();
                break job.wait();
            }
        };
        match result {
            Ok(summary) => Turn::Taken(Box::new(summary)),
            Err(error) => Turn::Failed(error),
        }
    }

    fn report(&self, turn: Turn, late: Duration) {
        let name = &self.name;
        let is_late = self.schedule.is_late(late);
        match turn {
            Turn::Taken(summary) => {
                if is_late {
                    log::warn!("domain {name}: a periodic checkpoint began {late:?} late");
                }
                log::info!("domain {name}: {}", summary.image.display());
                self.update(|status| {
                    status.series.taken += 1;
                    status.series.late += u64::from(is_late);
                    status.last_image = Some(summary.image);
                });
            }
            Turn::Failed(error) => {
                let said = error.full_message();
                log::warn!("domain {name}: a periodic checkpoint failed: {said}");
                self.update(|status| {
                    status.series.failed += 1;
                    status.last_error = Some(said);
                });
            }
            Turn::Busy(error) => {
                self.update(|status| status.last_error = Some(error.full_message()));
            }
            Turn::Paused | Turn::Over => {}
        }
    }

    fn update(&self, change: impl FnOnce(&mut PeriodicStatus)) {
        if let Some(status) = &mut *lock(&self.reports) {
            change(status);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_that_pass_are_missed_and_the_next_is_at_its_own_time() {
        let start = Instant::now();
        let second = Duration::from_secs(1);
        let mut schedule = Schedule::new(start, second);
        assert_eq!(schedule.due(), start);
        // Done early, late in its interval, and after more than two others.
        for (now_ms, missed, due) in [(100, 0, 1), (1900, 0, 2), (4500, 2, 5), (5000, 0, 6)] {
            let now = start + Duration::from_millis(now_ms);
            assert_eq!(schedule.advance(now), missed, "at {now_ms} ms");
            assert_eq!(schedule.due(), start + second * due, "at {now_ms} ms");
        }
        assert!(!schedule.is_late(second / 10));
        assert!(schedule.is_late(second / 9));
    }

    #[test]
    fn a_turn_before_its_time_goes_on_to_the_next() {
        let start = Instant::now() + Duration::from_secs(5);
        let mut schedule = Schedule::new(start, Duration::from_secs(1));
        assert_eq!(schedule.advance(Instant::now()), 0);
        assert_eq!(schedule.due(), start + Duration::from_secs(1));
    }
}
