//! The pause of a checkpoint, and how long it was.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use super::Session;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::phase::Phase;
use crate::checkpoint::stats::{Downtime, micros};
use crate::state::StateSection;

/// When a pause began and ended.
#[derive(Clone, Copy, Debug)]
pub(super) struct PauseTimes {
    started: Instant,
    /// Just before the resume.
    resuming: Instant,
    hook: Duration,
}

/// What a pause yields beside memory.
pub(crate) struct PauseOutcome {
    pub(crate) sections: Vec<StateSection>,
    pub(crate) moment: Timestamp,
}

impl Session {
    /// Pauses the guest, saves its state, lets `last_pages` capture the rest, and resumes it.
    ///
    /// The order is: kick, complete pending exits and drain devices (the guest's `pause`); save
    /// state; last pages; the caller's hook; resume. State comes before pages, because saving it
    /// may write guest memory. Whatever happens, the guest runs when this returns.
    pub(crate) fn in_pause(
        &mut self,
        last_pages: impl FnOnce(&mut Self) -> Result<(), Halt>,
    ) -> Result<PauseOutcome, Halt> {
        self.job.enter(Phase::Pausing)?;
        self.statistics.live_us = micros(self.control.started.elapsed());
        self.lease.beat_before("the guest's state is saved");
        let pause = self.lease.pause()?;
        let moment = Timestamp::now();
        let mut downtime = Downtime {
            kick_us: micros(pause.timing.kick),
            quiesce_us: micros(pause.timing.quiesce),
            ..Downtime::default()
        };
        let saving = Instant::now();
        let sections = self.guest.save_state();
        let sections = sections.map_err(CheckpointError::guest("save the guest's state"))?;
        downtime.state_us = micros(saving.elapsed());
        self.lease.beat_before("the last pages are captured");
        let capturing = Instant::now();
        last_pages(self)?;
        downtime.last_pages_us = micros(capturing.elapsed());
        if let Some(disks) = &self.disks {
            disks.begin();
        }
        let hook = self.run_hook();
        let times = PauseTimes {
            started: pause.started,
            resuming: Instant::now(),
            hook,
        };
        pause.end()?;
        if let Some(disks) = &mut self.disks {
            disks.go();
        }
        downtime.hook_us = micros(hook);
        self.statistics.downtime = downtime;
        self.pause = Some(times);
        self.finish_downtime(Instant::now());
        Ok(PauseOutcome { sections, moment })
    }

    /// Takes the end of the pause from the vCPUs. They know better than this thread, which may have
    /// lost its turn when they went on.
    pub(super) fn ask_vcpus(&mut self) {
        /// Later than this it was not our resume that they waited for: a user held them as well.
        const LATE: Duration = Duration::from_secs(1);
        let (Some(times), Some(resumed)) = (self.pause, self.guest.last_resumed()) else {
            return;
        };
        if (times.resuming..times.resuming + LATE).contains(&resumed) {
            self.finish_downtime(resumed);
        }
    }

    /// Computes how long the pause was that ended with `resumed`.
    fn finish_downtime(&mut self, resumed: Instant) {
        let Some(times) = self.pause else {
            return;
        };
        let downtime = &mut self.statistics.downtime;
        downtime.resume_us = micros(resumed.saturating_duration_since(times.resuming));
        let paused = resumed.saturating_duration_since(times.started);
        downtime.total_us = micros(paused.saturating_sub(times.hook));
    }

    fn run_hook(&self) -> Duration {
        let Some(hook) = &self.options.at_pause else {
            return Duration::ZERO;
        };
        self.lease.beat_before("the caller's hook runs");
        let began = Instant::now();
        hook(self.guest.as_ref());
        self.lease.beat();
        began.elapsed()
    }
}
