//! Suite `downtime`: how long each protocol stops the guest, beside a plain write of its memory.
//!
//! One guest runs all the time; plain write and protocols take turns, so that a machine whose
//! speed drifts disturbs all alike.

use std::time::Duration;

use serde::Serialize;

use super::super::output::{bytes, table, to_f64};
use super::contender::{Contender, Staging};
use super::sample::{Sample, spread, spread_of_some, take, wait_ticks};
use super::setup::{Row, Setup, ensure_any, failures};
use super::spread::{Spread, cell};
use super::vm::{Backing, GuestSpec, Vm, micros};
use super::yardstick::plain_write;
use crate::host::Protocol;

/// The guest warms up, and settles after each checkpoint, for this long.
const SETTLE: Duration = Duration::from_millis(700);

/// How long the guest is watched without a checkpoint.
const IDLE_WINDOW: Duration = Duration::from_secs(1);

#[derive(Debug, Serialize)]
pub(super) struct Downtime {
    memory_bytes: u64,
    working_set_percent: u32,
    plain_write_us: Option<Spread>,
    /// Largest gap that the guest saw in a second without any checkpoint: the host's own noise.
    idle_gap_us: Option<Spread>,
    protocols: Vec<Figures>,
}

#[derive(Debug, Serialize)]
struct Figures {
    protocol: &'static str,
    downtime_us: Option<Spread>,
    guest_gap_us: Option<Spread>,
    /// Largest gap around the pause itself, in the runs that could tell.
    pause_gap_us: Option<Spread>,
    /// Guest's gap less the engine's downtime, run by run.
    gap_less_downtime_us: Option<Spread>,
    total_us: Option<Spread>,
    image_bytes: Option<u64>,
    downtime_to_plain_write: Option<f64>,
    samples: Vec<Sample>,
    error: Option<String>,
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<Downtime> {
    let args = setup.args;
    let target = setup.disk();
    let mut vm = setup.start_pagewriter(Contender::Nothing, &guest(setup), SETTLE)?;
    let mut rows: Vec<(Protocol, Row<Sample>)> = setup
        .protocols()
        .into_iter()
        .map(|protocol| {
            let contender = Contender::Ours(protocol, Staging::Default);
            (protocol, Row::new(contender))
        })
        .collect();
    let (mut plain, mut idle) = (Vec::new(), Vec::new());
    for run in 1..=args.runs {
        setup.say(format_args!("downtime: run {run} of {}", args.runs));
        let write = plain_write(&target.path("plain"), args.memory)?;
        plain.push(micros(write.written));
        idle.push(idle_gap_us(&vm)?);
        for (_, row) in &mut rows {
            row.turn(setup, |contender| {
                let request = target.request();
                take(&mut vm, contender, args.memory, &request, SETTLE)
            })?;
        }
        ensure_any(rows.iter().map(|(_, row)| row))?;
    }
    let plain_write_us = Spread::of(plain);
    Ok(Downtime {
        memory_bytes: args.memory,
        working_set_percent: args.working_set,
        idle_gap_us: Spread::of(idle),
        protocols: rows
            .into_iter()
            .map(|(protocol, row)| Figures::new(protocol, row, plain_write_us))
            .collect(),
        plain_write_us,
    })
}

/// Every page of this guest has been touched, and none can be compressed.
fn guest(setup: &Setup) -> GuestSpec {
    let cmdline = format!(
        "ws_percent={} pattern=random write=page fill=incompressible fill_percent=100 pages=2m \
         tick_ms=100",
        setup.args.working_set
    );
    GuestSpec {
        preallocate: true,
        ..GuestSpec::pagewriter(setup.args.memory, Backing::Thp, cmdline)
    }
}

fn idle_gap_us(vm: &Vm) -> anyhow::Result<f64> {
    let seen = vm.ticks()?.ticks.len();
    std::thread::sleep(IDLE_WINDOW);
    let ticks = wait_ticks(vm, seen + 1)?;
    Ok(ticks.largest_gap_us(seen).unwrap_or(0.0))
}

impl Figures {
    fn new(protocol: Protocol, row: Row<Sample>, plain_write_us: Option<Spread>) -> Self {
        let samples = row.samples;
        let downtime_us = spread(&samples, |sample| sample.downtime_us);
        Self {
            protocol: protocol.name(),
            downtime_us,
            guest_gap_us: spread(&samples, |sample| sample.guest_gap_us),
            pause_gap_us: spread_of_some(&samples, |sample| sample.pause_gap_us),
            gap_less_downtime_us: spread(&samples, |sample| {
                sample.guest_gap_us - sample.downtime_us
            }),
            total_us: spread(&samples, |sample| sample.total_us),
            image_bytes: samples.last().map(|sample| sample.image_bytes),
            downtime_to_plain_write: downtime_us
                .zip(plain_write_us)
                .map(|(ours, plain)| ours.median / plain.median),
            samples,
            error: row.error,
        }
    }

    fn row(&self) -> Vec<String> {
        let ms = |spread: &Option<Spread>| cell(spread.as_ref(), 1e3, 1);
        let mut cells = vec![
            self.protocol.to_owned(),
            ms(&self.downtime_us),
            ms(&self.guest_gap_us),
            ms(&self.pause_gap_us),
            ms(&self.gap_less_downtime_us),
            ms(&self.total_us),
        ];
        let ratio = self.downtime_to_plain_write;
        cells.push(ratio.map_or_else(String::new, |ratio| format!("{ratio:.3}")));
        cells.push(self.image_bytes.map_or_else(String::new, bytes));
        cells
    }
}

impl Downtime {
    pub fn markdown(&self) -> String {
        let ms = |spread: &Option<Spread>| cell(spread.as_ref(), 1e3, 1);
        let mut plain = vec![String::new(); 8];
        plain[0] = "plain write".to_owned();
        plain[1] = ms(&self.plain_write_us);
        plain[6] = "1.000".to_owned();
        plain[7] = bytes(self.memory_bytes);
        let mut idle = vec![String::new(); 8];
        idle[0] = "no checkpoint, 1 s".to_owned();
        idle[2] = ms(&self.idle_gap_us);
        let rows: Vec<_> = [plain, idle]
            .into_iter()
            .chain(self.protocols.iter().map(Figures::row))
            .collect();
        let header = [
            "ms: median (min–max)",
            "downtime",
            "gap in guest",
            "gap at the pause",
            "gap − downtime",
            "checkpoint",
            "downtime ÷ plain write",
            "image",
        ];
        format!(
            "### Downtime\n\n{} of memory, all of it incompressible, {} % of it rewritten at full \
             speed; no compression; image on disk, durable. Runs: {}.\n\n{}\n{}",
            bytes(self.memory_bytes),
            self.working_set_percent,
            to_f64(self.plain_write_us.map_or(0, |spread| spread.runs as u64)),
            table(&header, &rows),
            failures(
                self.protocols
                    .iter()
                    .map(|one| (one.protocol.to_owned(), one.error.clone()))
            )
        )
    }
}
