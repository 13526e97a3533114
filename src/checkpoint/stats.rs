//! What a checkpoint cost, and where the time went.

use std::time::Duration;

use serde::Serialize;

use crate::checkpoint::chain::IncrementStatistics;
use crate::checkpoint::options::Protocol;
use crate::checkpoint::plan::{Contract, Plan};
use crate::checkpoint::policy::ClosingReason;
use crate::checkpoint::protocol::ArmingStatistics;
use crate::checkpoint::stalls::StallStatistics;
use crate::store::Garbage;

/// Rounds that are reported one by one: 100 s of harvests at the default interval. More are
/// counted in the totals only.
const ROUNDS_REPORTED_MAX: usize = 1000;

/// Figures of one checkpoint. Times are in microseconds.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Statistics {
    /// How memory was captured.
    pub protocol: Protocol,
    /// Why it was not the protocol that was asked for.
    pub fallback: Option<String>,
    /// How the image continues another; `None` for one that belongs to no chain.
    pub increment: Option<IncrementStatistics>,
    /// Which older images were removed, and which could not be; `None` where all are kept.
    pub retention: Option<Garbage>,
    /// What was known before the start; `None` where nothing depended on it.
    pub plan: Option<Plan>,
    /// What was promised, and whether it was kept; the image's own copy has the promises only.
    pub contract: Contract,
    /// How writes were seen: `kvm-dirty-log`, `userfaultfd-wp`, or `none` where the guest was
    /// paused throughout.
    pub mechanism: &'static str,
    /// Threads that copied memory.
    pub capture_threads: u64,
    /// Threads that compressed, hashed and wrote.
    pub write_threads: u64,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// Pages that the guest never touched; they were not read.
    pub untouched_pages: u64,
    /// The rounds of harvests, up to a limit; the last is the one inside the pause.
    pub rounds: Vec<Round>,
    /// All rounds, reported or not.
    pub round_count: u64,
    /// Pages captured by all rounds, some of them several times.
    pub dirty_pages: u64,
    /// Mean rate of dirty pages between the first harvest and the pause, per second.
    pub dirty_pages_per_s: u64,
    /// Why harvesting ended; `None` for protocols without harvests.
    pub closing: Option<ClosingReason>,
    /// Whether the rounds got the rest below the downtime budget; `None` for protocols that need
    /// not converge.
    pub converged: Option<bool>,
    /// The pause.
    pub downtime: Downtime,
    /// The staging table.
    pub staging: StagingStatistics,
    /// Waits of vCPUs at write-protected memory; all zero for protocols without.
    pub stalls: StallStatistics,
    /// How memory was write-protected; `None` for protocols that do not.
    pub arming: Option<ArmingStatistics>,
    /// The disks that the guest writes.
    pub disks: Vec<DiskStatistics>,
    /// What went to the image.
    pub written: WriteStatistics,
    /// Waiting for a lazy restore to fill the guest's memory.
    pub fill_wait_us: u64,
    /// From the start until the pause.
    pub live_us: u64,
    /// Ending the dirty log after the resume.
    pub log_stop_us: u64,
    /// From the resume until every page was captured (`cow`).
    pub capture_us: u64,
    /// From the resume until every page was written.
    pub drain_us: u64,
    /// Syncing and making the image visible; 0 in the image's own copy of these figures.
    pub commit_us: u64,
    /// From the start until the image was whole.
    pub total_us: u64,
    /// Memory captured per second of the total time.
    pub bytes_per_s: u64,
    /// CPU time of the checkpoint's threads.
    pub cpu_us: u64,
}

/// One harvest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Round {
    /// Epoch of its copies.
    pub epoch: u32,
    /// When it began, from the start of the checkpoint.
    pub at_us: u64,
    /// How long it took.
    pub took_us: u64,
    /// Pages it captured.
    pub pages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Pages that it had to spill to the image, because staging was full.
    pub spilled_pages: u64,
    /// Pages dirtied per second since the round before.
    pub dirty_pages_per_s: u64,
}

/// How long no vCPU ran, from the first kick to the last resume, split by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Downtime {
    /// All of it, without `hook_us`.
    pub total_us: u64,
    /// Stopping the vCPUs.
    pub kick_us: u64,
    /// Pausing and draining the devices.
    pub quiesce_us: u64,
    /// Saving vCPU and device state.
    pub state_us: u64,
    /// Capturing the last pages (all of memory, for `stop`).
    pub last_pages_us: u64,
    /// Write-protecting memory (`cow`).
    pub arm_us: u64,
    /// Letting devices and vCPUs go.
    pub resume_us: u64,
    /// The caller's hook; not part of the total.
    pub hook_us: u64,
}

/// How a disk was captured.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DiskStatistics {
    /// Its name, as in `vda`.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// What was done.
    pub method: DiskMethod,
}

/// What kept a disk as it was in the pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskMethod {
    /// A file that shares the disk's blocks; writes to the disk did not wait.
    Reflink,
    /// What the guest was about to write was read first.
    CopyBeforeWrite,
}

/// The memory between capture and disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct StagingStatistics {
    /// Its size.
    pub capacity_bytes: u64,
    /// The most that was in use.
    pub peak_bytes: u64,
    /// Pages spilled to the image because it was full, pause included.
    pub spilled_pages: u64,
    /// Pages spilled inside the pause, which waited for the disk.
    pub spilled_in_pause_pages: u64,
    /// Pages that harvests during the scan left to later ones because it was full.
    pub deferred_pages: u64,
    /// Pages whose newer copy replaced an older one before it was written.
    pub replaced_pages: u64,
}

/// What the writers did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct WriteStatistics {
    /// Pages given to the image, zeros and repeated ones included.
    pub pages: u64,
    /// Pages of zeros, touched or not: an index entry each.
    pub zero_pages: u64,
    /// Copies that a newer copy of the same page made useless after they were written.
    pub duplicate_pages: u64,
    /// Bytes of the pages that are not zeros.
    pub raw_bytes: u64,
    /// What they take in the image.
    pub stored_bytes: u64,
}

impl Statistics {
    /// Adds a round to the totals, and to the list while it is short.
    pub(crate) fn add_round(&mut self, round: Round) {
        self.round_count += 1;
        self.dirty_pages += round.pages;
        if self.rounds.len() < ROUNDS_REPORTED_MAX {
            self.rounds.push(round);
        }
    }

    /// Computes the rates, once the times are known.
    pub(crate) fn finish(&mut self, total: Duration, cpu_ns: u64) {
        self.total_us = micros(total);
        self.cpu_us = cpu_ns / 1000;
        self.bytes_per_s = per_second(self.memory_bytes, total);
        self.contract.settle(self.downtime.total_us, self.total_us);
    }
}

/// Returns `duration` in whole microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Returns `count` per second of `time`; 0 for no time.
pub(crate) fn per_second(count: u64, time: Duration) -> u64 {
    let us = u128::from(micros(time));
    let rate = (u128::from(count) * 1_000_000).checked_div(us);
    u64::try_from(rate.unwrap_or(0)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_past_the_limit_count_in_the_totals_only() {
        let mut statistics = Statistics::default();
        for epoch in 1..=1010 {
            let round = Round {
                epoch,
                pages: 2,
                ..Round::default()
            };
            statistics.add_round(round);
        }
        assert_eq!(statistics.rounds.len(), ROUNDS_REPORTED_MAX);
        assert_eq!(statistics.round_count, 1010);
        assert_eq!(statistics.dirty_pages, 2020);
    }

    #[test]
    fn rates_of_no_time_are_zero() {
        assert_eq!(per_second(5, Duration::ZERO), 0);
        assert_eq!(per_second(5, Duration::from_millis(500)), 10);
    }
}
