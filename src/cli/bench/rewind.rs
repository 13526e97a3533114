//! Suite `rewind`: a running guest back to its last checkpoint in place, beside an eager restore of
//! the same image in a new process.

use std::time::{Duration, Instant};

use serde::Serialize;

use super::super::output::{bytes, table};
use super::super::vm_process::{Spawned, Start};
use super::contender::{Contender, Staging};
use super::increments::{INTERVAL, Writes};
use super::setup::Setup;
use super::spread::{Spread, cell};
use super::vm::{Vm, micros};
use crate::host::{Protocol, RewindSummary};

const SETTLE: Duration = Duration::from_millis(300);

#[derive(Debug, Serialize)]
pub(super) struct Rewind {
    memory_bytes: u64,
    rows: Vec<Figures>,
}

#[derive(Debug, Serialize)]
struct Figures {
    writes: Writes,
    put_back_percent: Option<Spread>,
    rewind_us: Option<Spread>,
    /// Of it, finding out what to put back, reading and checking it.
    prepare_us: Option<Spread>,
    /// From the command until the restored guest's process answers.
    restore_us: Option<Spread>,
    /// Of medians.
    ratio: Option<f64>,
}

struct Sample {
    rewind: f64,
    summary: RewindSummary,
    restore: f64,
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<Rewind> {
    let args = setup.args;
    let rows = Writes::ALL.into_iter().map(|writes| measure(setup, writes));
    Ok(Rewind {
        memory_bytes: args.memory,
        rows: rows.collect::<Result<_, _>>()?,
    })
}

fn measure(setup: &Setup, writes: Writes) -> anyhow::Result<Figures> {
    let args = setup.args;
    let guest = writes.guest(args.memory);
    let mut vm = setup.start_pagewriter(Contender::Nothing, &guest, SETTLE)?;
    let target = setup.shm();
    let mut request = target.request();
    request.incremental = true;
    let contender = Contender::Ours(Protocol::Cow, Staging::Ample);
    vm.checkpoint(contender, args.memory, &request)?;
    let mut samples = Vec::new();
    for run in 1..=args.runs {
        setup.say(format_args!(
            "rewind, {}: run {run} of {}",
            writes.name(),
            args.runs
        ));
        std::thread::sleep(INTERVAL);
        let Vm::Ours(ours) = &mut vm else {
            anyhow::bail!("only machines of ours are put back");
        };
        let began = Instant::now();
        let summary = ours.rewind()?;
        let rewind = micros(began.elapsed());
        // Nobody else runs while the other is restored.
        ours.pause()?;
        let began = Instant::now();
        let restored = Spawned::another(setup.scratch(), "restored", &request.image, Start::Eager)?;
        let restored = restored.answer()?;
        let restore = micros(began.elapsed());
        restored.kill();
        ours.resume()?;
        samples.push(Sample {
            rewind,
            summary,
            restore,
        });
        setup.go_on()?;
    }
    Ok(Figures::new(writes, &samples))
}

impl Figures {
    fn new(writes: Writes, samples: &[Sample]) -> Self {
        let of = |figure: &dyn Fn(&Sample) -> f64| Spread::of(samples.iter().map(figure));
        #[expect(
            clippy::cast_precision_loss,
            reason = "counts of pages and microseconds"
        )]
        let float = |count: u64| count as f64;
        let rewind_us = of(&|sample| sample.rewind);
        let restore_us = of(&|sample| sample.restore);
        Self {
            writes,
            put_back_percent: of(&|sample| {
                float(sample.summary.pages) * 100.0 / float(sample.summary.memory_pages)
            }),
            prepare_us: of(&|sample| float(sample.summary.prepare_us)),
            ratio: rewind_us.zip(restore_us).map(|(a, b)| a.median / b.median),
            rewind_us,
            restore_us,
        }
    }
}

impl Rewind {
    pub fn markdown(&self) -> String {
        let header = [
            "ms: median (min–max)",
            "put back, %",
            "rewind",
            "reading and checking",
            "eager restore",
            "rewind ÷ restore",
        ];
        let rows = self.rows.iter().map(|row| {
            vec![
                row.writes.name().to_owned(),
                cell(row.put_back_percent.as_ref(), 1.0, 2),
                cell(row.rewind_us.as_ref(), 1e3, 1),
                cell(row.prepare_us.as_ref(), 1e3, 1),
                cell(row.restore_us.as_ref(), 1e3, 1),
                row.ratio.map_or_else(String::new, |v| format!("{v:.3}")),
            ]
        });
        format!(
            "### Rewind\n\n{} of memory, all of it incompressible; back to an image of `cow` after \
             {} ms of writing; image in shm.\n\n{}",
            bytes(self.memory_bytes),
            INTERVAL.as_millis(),
            table(&header, &rows.collect::<Vec<_>>())
        )
    }
}
