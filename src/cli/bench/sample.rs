//! One checkpoint of a page writer, as its maker and as the guest saw it.

use std::time::{Duration, Instant};

use anyhow::ensure;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::contender::Contender;
use super::setup::discard;
use super::spread::Spread;
use super::ticks::Ticks;
use super::vm::{Outcome, Request, Vm};
use crate::host::host_tsc;

/// How long the guest's next tick may take to come.
const TICK_TIMEOUT: Duration = Duration::from_secs(20);

/// Ticks that must follow a checkpoint: the first may have begun before its end.
const TICKS_AFTER: usize = 2;

/// Slack for the place of the pause in time, in µs: a thread starts a little after it is asked to.
const SLACK_US: u64 = 500;

/// What one checkpoint cost. Times are in µs.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Sample {
    /// The protocol that captured memory, which `auto` chooses.
    pub captured_by: Option<String>,
    pub downtime_us: f64,
    /// Largest gap that the guest saw from the request until it ran as before.
    pub guest_gap_us: f64,
    /// Largest of its gaps that reaches into the pause, where the host can tell.
    pub pause_gap_us: Option<f64>,
    pub total_us: f64,
    pub image_bytes: u64,
    pub staging_peak_bytes: Option<f64>,
    pub cpu_us: Option<f64>,
    /// How long the guest's accesses waited for copies, one by one.
    pub stalls: Option<Stalls>,
}

/// Stalls of one checkpoint, as the engine's statistics have them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Stalls {
    pub count: f64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub max_us: f64,
}

impl Stalls {
    /// Returns those of a checkpoint, where its protocol has any.
    pub fn of(outcome: &Outcome) -> Option<Self> {
        let stalls: Self =
            serde_json::from_value(outcome.statistics.get("stalls")?.clone()).ok()?;
        let protected = outcome
            .statistics
            .get("arming")
            .is_some_and(Value::is_object);
        (protected || stalls.count > 0.0).then_some(stalls)
    }
}

/// Takes a checkpoint with `contender`, and lets the guest settle afterwards.
pub(super) fn take(
    vm: &mut Vm,
    contender: Contender,
    memory_bytes: u64,
    request: &Request,
    settle: Duration,
) -> anyhow::Result<Sample> {
    let seen = vm.ticks()?.ticks.len();
    let outcome = vm.checkpoint(contender, memory_bytes, request)?;
    let done = vm.ticks()?.ticks.len();
    std::thread::sleep(settle);
    let ticks = wait_ticks(vm, done + TICKS_AFTER)?;
    discard(&request.image)?;
    Ok(Sample {
        captured_by: outcome.captured_by().map(str::to_owned),
        downtime_us: outcome.downtime_us().unwrap_or(0.0),
        guest_gap_us: ticks.largest_gap_us(seen).unwrap_or(0.0),
        pause_gap_us: pause_gap_us(&ticks, seen, &outcome),
        total_us: outcome.total_us(),
        image_bytes: outcome.image_bytes,
        staging_peak_bytes: outcome.figure("/staging/peak_bytes"),
        cpu_us: outcome.figure("/cpu_us"),
        stalls: Stalls::of(&outcome),
    })
}

/// Waits until the guest has printed so many ticks.
pub(super) fn wait_ticks(vm: &Vm, count: usize) -> anyhow::Result<Ticks> {
    let start = Instant::now();
    loop {
        let ticks = vm.ticks()?;
        if ticks.ticks.len() >= count {
            return Ok(ticks);
        }
        ensure!(start.elapsed() < TICK_TIMEOUT, "the guest ticks no more");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Returns the largest gap that reaches into the engine's pause. Known only where guest and host
/// read the same TSC.
fn pause_gap_us(ticks: &Ticks, seen: usize, outcome: &Outcome) -> Option<f64> {
    let began = outcome.began.as_ref()?;
    let last = ticks.ticks.last()?.tsc;
    if !(*began.start()..=host_tsc()).contains(&last) {
        return None;
    }
    let live_us = outcome.statistics["live_us"].as_u64()?;
    let downtime_us = outcome.statistics.pointer("/downtime/total_us")?.as_u64()?;
    let from = began.start() + ticks.cycles(live_us.saturating_sub(SLACK_US));
    let to = began.end() + ticks.cycles(live_us + downtime_us + SLACK_US);
    ticks.gap_in_us(seen, &(from..=to))
}

/// Returns the spread of a figure that every sample has.
pub(super) fn spread(samples: &[Sample], figure: impl Fn(&Sample) -> f64) -> Option<Spread> {
    Spread::of(samples.iter().map(figure))
}

/// Returns the spread of a figure that samples may have.
pub(super) fn spread_of_some(
    samples: &[Sample],
    figure: impl Fn(&Sample) -> Option<f64>,
) -> Option<Spread> {
    Spread::of(samples.iter().filter_map(figure))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn stalls_are_read_where_there_are_any() {
        let mut outcome = Outcome {
            downtime: None,
            total: Duration::ZERO,
            image_bytes: 0,
            statistics: json!({
                "stalls": { "count": 3, "p50_us": 1, "p99_us": 2.5, "max_us": 4, "new": 1 }
            }),
            began: None,
        };
        let stalls = Stalls::of(&outcome).unwrap();
        assert_eq!((stalls.count, stalls.p99_us), (3.0, 2.5));
        let none = json!({ "count": 0, "p50_us": 0, "p99_us": 0, "max_us": 0 });
        outcome.statistics = json!({ "stalls": none, "arming": null });
        assert_eq!(Stalls::of(&outcome), None);
        outcome.statistics = json!({ "stalls": none, "arming": { "us": 1 } });
        assert!(Stalls::of(&outcome).is_some());
        outcome.statistics = json!({ "stalls": null });
        assert_eq!(Stalls::of(&outcome), None);
        outcome.statistics = json!(null);
        assert_eq!(Stalls::of(&outcome), None);
    }
}
