//! Suite `increments`: an increment after about 1 % of memory was written, beside a whole checkpoint
//! of the same guest in the same run.

use std::fs;
use std::time::Duration;

use serde::Serialize;

use super::super::output::{bytes, table};
use super::contender::Contender;
use super::setup::{Row, Setup, Target, ensure_any, failures};
use super::spread::{Spread, cell};
use super::vm::{Backing, GuestSpec, Outcome, Vm};

/// Between a chain's image and the next: as long as the scattered writer takes for its share.
pub(super) const INTERVAL: Duration = Duration::from_millis(100);

const SETTLE: Duration = Duration::from_millis(300);

/// How the guest's writes lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Writes {
    /// In one stretch of 1 % of memory, all of it again and again.
    Contiguous,
    /// All over memory, 1 % of it in an interval.
    Scattered,
}

impl Writes {
    pub const ALL: [Self; 2] = [Self::Contiguous, Self::Scattered];

    pub fn name(self) -> &'static str {
        match self {
            Self::Contiguous => "contiguous",
            Self::Scattered => "scattered",
        }
    }

    /// Returns a page writer that fills all of memory, and writes so.
    pub fn guest(self, memory_bytes: u64) -> GuestSpec {
        let rate = memory_bytes / 100 * 1000 / 100;
        let (share, rate) = match self {
            Self::Contiguous => (1, String::new()),
            Self::Scattered => (95, format!("rate={rate}")),
        };
        let cmdline = format!(
            "ws_percent={share} {rate} pattern=random write=page fill=incompressible \
             fill_percent=100 pages=2m tick_ms=1000"
        );
        GuestSpec::pagewriter(memory_bytes, Backing::Thp, cmdline)
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Increments {
    memory_bytes: u64,
    rows: Vec<Figures>,
}

#[derive(Debug, Serialize)]
struct Figures {
    writes: Writes,
    protocol: Contender,
    target: &'static str,
    /// Pages that were written since the whole image, in percent of all.
    written_percent: Option<Spread>,
    whole_us: Option<Spread>,
    whole_downtime_us: Option<Spread>,
    increment_us: Option<Spread>,
    increment_downtime_us: Option<Spread>,
    whole_bytes: Option<Spread>,
    increment_bytes: Option<Spread>,
    /// Of medians.
    time_ratio: Option<f64>,
    bytes_ratio: Option<f64>,
    error: Option<String>,
}

/// A whole image and the increment after it.
#[derive(Clone, Debug)]
struct Sample {
    whole: Outcome,
    increment: Outcome,
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<Increments> {
    let args = setup.args;
    let mut rows = Vec::new();
    for writes in Writes::ALL {
        for target in [setup.shm(), setup.disk()] {
            let mut vm =
                setup.start_pagewriter(Contender::Nothing, &writes.guest(args.memory), SETTLE)?;
            let mut contenders: Vec<Row<Sample>> = setup.ours().into_iter().map(Row::new).collect();
            for run in 1..=args.runs {
                let (name, runs) = (writes.name(), args.runs);
                setup.say(format_args!(
                    "increments, {name}, {}: run {run} of {runs}",
                    target.name
                ));
                for row in &mut contenders {
                    row.turn(setup, |contender| {
                        sample(&mut vm, contender, args.memory, &target)
                    })?;
                }
                ensure_any(&contenders)?;
            }
            rows.extend(
                contenders
                    .into_iter()
                    .map(|row| Figures::new(writes, target.name, args.memory, row)),
            );
        }
    }
    Ok(Increments {
        memory_bytes: args.memory,
        rows,
    })
}

fn sample(
    vm: &mut Vm,
    contender: Contender,
    memory_bytes: u64,
    target: &Target,
) -> anyhow::Result<Sample> {
    let dir = target.path("chain");
    fs::create_dir(&dir)?;
    let mut request = target.request();
    request.image.clone_from(&dir);
    request.incremental = true;
    // In a directory without images of the guest, so that it is whole.
    let whole = vm.checkpoint(contender, memory_bytes, &request)?;
    // What was written while the whole one was made goes into one that does not count.
    vm.checkpoint(contender, memory_bytes, &request)?;
    std::thread::sleep(INTERVAL);
    let increment = vm.checkpoint(contender, memory_bytes, &request)?;
    // The next one's is not to wait for this one's bytes.
    rustix::fs::sync();
    fs::remove_dir_all(&dir)?;
    std::thread::sleep(SETTLE);
    Ok(Sample { whole, increment })
}

impl Figures {
    fn new(writes: Writes, target: &'static str, memory_bytes: u64, row: Row<Sample>) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "sizes and counts of pages")]
        let float = |count: u64| count as f64;
        let of = |figure: &dyn Fn(&Sample) -> Option<f64>| {
            Spread::of(row.samples.iter().filter_map(figure))
        };
        let written = |sample: &Sample| {
            let data = sample.increment.figure("/written/pages")?;
            let zero = sample
                .increment
                .figure("/written/zero_pages")
                .unwrap_or(0.0);
            Some((data + zero) * 100.0 / float(memory_bytes / 4096))
        };
        let whole_us = of(&|sample| Some(sample.whole.total_us()));
        let increment_us = of(&|sample| Some(sample.increment.total_us()));
        let whole_bytes = of(&|sample| Some(float(sample.whole.image_bytes)));
        let increment_bytes = of(&|sample| Some(float(sample.increment.image_bytes)));
        let ratio = |a: Option<Spread>, b: Option<Spread>| Some(a?.median / b?.median);
        Self {
            writes,
            protocol: row.contender,
            target,
            written_percent: of(&written),
            whole_us,
            whole_downtime_us: of(&|sample| sample.whole.downtime_us()),
            increment_us,
            increment_downtime_us: of(&|sample| sample.increment.downtime_us()),
            time_ratio: ratio(increment_us, whole_us),
            bytes_ratio: ratio(increment_bytes, whole_bytes),
            whole_bytes,
            increment_bytes,
            error: row.error,
        }
    }

    fn row(&self) -> Vec<String> {
        let ms = |spread: &Option<Spread>, places| cell(spread.as_ref(), 1e3, places);
        let ratio = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.3}"));
        let mib = |spread: &Option<Spread>| cell(spread.as_ref(), 1024.0 * 1024.0, 1);
        vec![
            format!("{}, {}, {}", self.writes.name(), self.protocol, self.target),
            cell(self.written_percent.as_ref(), 1.0, 2),
            ms(&self.whole_us, 1),
            ms(&self.increment_us, 1),
            ratio(self.time_ratio),
            mib(&self.increment_bytes),
            ratio(self.bytes_ratio),
            ms(&self.whole_downtime_us, 2),
            ms(&self.increment_downtime_us, 2),
        ]
    }
}

impl Increments {
    pub fn markdown(&self) -> String {
        let header = [
            "ms: median (min–max)",
            "written, %",
            "whole",
            "increment",
            "÷ whole",
            "MiB",
            "÷ whole",
            "downtime, whole",
            "downtime, increment",
        ];
        let rows: Vec<_> = self.rows.iter().map(Figures::row).collect();
        let failed = self.rows.iter().map(|row| {
            let name = format!("{}, {}", row.writes.name(), row.protocol);
            (name, row.error.clone())
        });
        format!(
            "### Increments\n\n{} of memory, all of it incompressible; a whole image, {} ms, and \
             an increment of it; no compression, digests on, durable.\n\n{}\n{}",
            bytes(self.memory_bytes),
            INTERVAL.as_millis(),
            table(&header, &rows),
            failures(failed)
        )
    }
}
