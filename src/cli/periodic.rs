//! Checkpoints at an interval.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::Context;
use super::args::CheckpointArgs;
use super::domain::summary_text;
use super::output::{duration, micros};
use crate::host::control::ControlClient;
use crate::host::{CheckpointRequest, CheckpointSummary, HostError, Schedule, Series};

/// One checkpoint of a series.
#[derive(Serialize)]
struct Taken<'a> {
    number: u64,
    /// How long after its time it began.
    late_us: u64,
    #[serde(flatten)]
    summary: &'a CheckpointSummary,
}

/// Takes a checkpoint every `every`, until the domain ends or `args` has enough.
///
/// None is begun before the one before is done: a time that passes meanwhile is missed, and said to
/// be, and the next one is taken at its own time.
pub(super) fn run(
    context: &Context,
    args: &CheckpointArgs,
    every: Duration,
    request: &CheckpointRequest,
) -> anyhow::Result<()> {
    anyhow::ensure!(!every.is_zero(), "an interval of no time");
    let mut client = ControlClient::connect(&context.runtime()?, &args.name)?;
    let mut schedule = Schedule::new(Instant::now(), every);
    let mut series = Series::default();
    while args
        .count
        .is_none_or(|count| series.taken + series.failed < count)
    {
        let due = schedule.due();
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let late = due.elapsed();
        series.late += u64::from(schedule.is_late(late));
        match take(&mut client, request) {
            Ok(summary) => {
                series.taken += 1;
                let late_us = u64::try_from(late.as_micros()).unwrap_or(u64::MAX);
                let taken = Taken {
                    number: series.taken,
                    late_us,
                    summary: &summary,
                };
                context.output.print(&taken, |taken| {
                    format!(
                        "{}: {}, {} late",
                        taken.number,
                        summary_text(taken.summary),
                        micros(late_us)
                    )
                });
            }
            Err(HostError::Connection { .. }) => break,
            Err(error) => {
                series.failed += 1;
                eprintln!("livepoint: checkpoint failed: {}", error.full_message());
            }
        }
        let missed = schedule.advance(Instant::now());
        if missed > 0 {
            series.missed += missed;
            eprintln!(
                "livepoint: {missed} checkpoints missed: the last took longer than {}",
                duration(every)
            );
        }
    }
    context.output.print(&series, |series| {
        format!(
            "{} taken, {} failed, {} missed, {} late",
            series.taken, series.failed, series.missed, series.late
        )
    });
    anyhow::ensure!(series.failed == 0, "{} checkpoints failed", series.failed);
    Ok(())
}

fn take(
    client: &mut ControlClient,
    request: &CheckpointRequest,
) -> Result<CheckpointSummary, HostError> {
    let job = client.start_checkpoint(request.clone())?;
    client.wait(job, |_| ())
}
