//! `livepoint bench`: the downtime of each protocol, beside a plain write of the same bytes.
//!
//! One guest runs all the time; plain write, `stop` and `threaded` take turns, so that a machine
//! whose speed drifts disturbs all three alike.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde::Serialize;

use super::Context;
use super::args::BenchArgs;
use super::console_log::number;
use super::output::{Output, bytes, table, to_f64};
use super::scratch::Scratch;
use super::vm_process::VmProcess;
use crate::host::{CheckpointRequest, Codec, DomainChanges, Protocol};

const DOMAIN_XML: &str = include_str!("../../examples/pagewriter.xml");

/// Block size of the plain write that the pauses are compared with.
const BLOCK_BYTES: usize = 1 << 20;

/// How long the guest may take to fill its memory.
const READY_TIMEOUT: Duration = Duration::from_secs(120);

/// How long after a checkpoint the guest's next ticks may take to come.
const TICK_TIMEOUT: Duration = Duration::from_secs(20);

/// The guest warms up, and settles after each checkpoint, for this long.
const SETTLE: Duration = Duration::from_millis(700);

/// How long the guest is watched without a checkpoint.
const IDLE_WINDOW: Duration = Duration::from_secs(1);

#[derive(Serialize)]
struct Report {
    memory_bytes: u64,
    working_set_percent: u32,
    runs: u32,
    plain_write_us: Spread,
    /// Largest gap that the guest saw in a second without any checkpoint: the host's own noise.
    idle_gap_us: Spread,
    protocols: Vec<ProtocolFigures>,
}

#[derive(Serialize)]
struct ProtocolFigures {
    protocol: &'static str,
    downtime_us: Spread,
    guest_gap_us: Spread,
    /// Guest's gap less the engine's downtime, run by run.
    gap_less_downtime_us: Spread,
    total_us: Spread,
    image_bytes: u64,
    downtime_to_plain_write: f64,
    samples: Vec<Sample>,
}

#[derive(Clone, Copy, Serialize)]
struct Sample {
    downtime_us: u64,
    guest_gap_us: u64,
    total_us: u64,
    image_bytes: u64,
}

/// Minimum, median and maximum of the runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Spread {
    min: f64,
    median: f64,
    max: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Self {
        assert!(!values.is_empty(), "every figure has at least one run");
        values.sort_by(f64::total_cmp);
        let last = values.len() - 1;
        let median = f64::midpoint(values[last / 2], values[last.div_ceil(2)]);
        Self {
            min: values[0],
            median,
            max: values[last],
        }
    }
}

pub(super) fn bench(context: &Context, args: &BenchArgs) -> anyhow::Result<()> {
    ensure!(args.runs > 0, "--runs must be at least 1");
    ensure!(
        (1..=90).contains(&args.working_set),
        "--working-set must be between 1 and 90"
    );
    let scratch = Scratch::new("livepoint-bench")?;
    let images = Scratch::inside(&args.images, ".livepoint-bench")?;
    let report = measure(context.output, args, scratch.path(), images.path())?;
    context.output.print(&report, text);
    Ok(())
}

fn measure(out: Output, args: &BenchArgs, dir: &Path, images: &Path) -> anyhow::Result<Report> {
    let changes = DomainChanges {
        memory_bytes: Some(args.memory),
        cmdline: Some(format!(
            "ws_percent={} pattern=random write=page fill=incompressible fill_percent=100 \
             pages=2m tick_ms=100",
            args.working_set
        )),
    };
    let mut vm = VmProcess::run(dir, "pagewriter", DOMAIN_XML, &changes)?;
    vm.wait_line("that it is ready", READY_TIMEOUT, |line| {
        line.contains("pagewriter: ready")
    })?;
    std::thread::sleep(SETTLE);
    let mut plain = Vec::new();
    let mut idle = Vec::new();
    let mut samples = [Vec::new(), Vec::new()];
    for run in 1..=args.runs {
        out.say(format_args!("run {run} of {}", args.runs));
        plain.push(to_f64(micros_of(plain_write(
            &images.join("plain"),
            args.memory,
        )?)));
        let before = vm.console().text()?.lines().count();
        std::thread::sleep(IDLE_WINDOW);
        idle.push(to_f64(gap_since(&mut vm, before)?));
        for (protocol, into) in PROTOCOLS.into_iter().zip(&mut samples) {
            into.push(sample(&mut vm, protocol, &images.join("image.lpi"))?);
        }
    }
    let plain_write_us = Spread::of(plain);
    let protocols = PROTOCOLS
        .into_iter()
        .zip(samples)
        .map(|(protocol, samples)| figures(protocol, samples, plain_write_us.median))
        .collect();
    Ok(Report {
        memory_bytes: args.memory,
        working_set_percent: args.working_set,
        runs: args.runs,
        plain_write_us,
        idle_gap_us: Spread::of(idle),
        protocols,
    })
}

const PROTOCOLS: [Protocol; 2] = [Protocol::Stop, Protocol::Threaded];

fn figures(protocol: Protocol, samples: Vec<Sample>, plain_us: f64) -> ProtocolFigures {
    let spread = |figure: fn(&Sample) -> f64| Spread::of(samples.iter().map(figure).collect());
    let downtime_us = spread(|sample| to_f64(sample.downtime_us));
    ProtocolFigures {
        protocol: protocol.name(),
        downtime_us,
        guest_gap_us: spread(|sample| to_f64(sample.guest_gap_us)),
        gap_less_downtime_us: spread(|sample| {
            to_f64(sample.guest_gap_us) - to_f64(sample.downtime_us)
        }),
        total_us: spread(|sample| to_f64(sample.total_us)),
        image_bytes: samples.last().map_or(0, |sample| sample.image_bytes),
        downtime_to_plain_write: downtime_us.median / plain_us,
        samples,
    }
}

/// Writes incompressible bytes to a new file in the page cache, as a saver does, and times it.
fn plain_write(path: &PathBuf, len: u64) -> anyhow::Result<Duration> {
    let mut block = vec![0_u8; BLOCK_BYTES];
    File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut block))?;
    let mut file =
        File::create(path).with_context(|| format!("could not write {}", path.display()))?;
    let start = Instant::now();
    let mut left = len;
    while left > 0 {
        let now = usize::try_from(left).map_or(BLOCK_BYTES, |left| left.min(BLOCK_BYTES));
        file.write_all(&block[..now])?;
        left -= now as u64;
    }
    let took = start.elapsed();
    // What is still on its way to the disk must not slow down what is measured next.
    file.sync_all()?;
    std::fs::remove_file(path)?;
    Ok(took)
}

fn sample(vm: &mut VmProcess, protocol: Protocol, image: &Path) -> anyhow::Result<Sample> {
    let before = vm.console().text()?.lines().count();
    let mut request = CheckpointRequest::new(protocol);
    request.out = Some(image.to_owned());
    request.codec = Codec::None;
    let summary = vm.checkpoint(request)?;
    std::thread::sleep(SETTLE);
    let guest_gap_us = gap_since(vm, before)?;
    std::fs::remove_file(image)?;
    Ok(Sample {
        downtime_us: summary.figures.downtime_us,
        guest_gap_us,
        total_us: summary.figures.total_us,
        image_bytes: summary.image_bytes,
    })
}

/// Returns the largest gap that the guest printed after its first `lines` lines.
fn gap_since(vm: &mut VmProcess, lines: usize) -> anyhow::Result<u64> {
    let start = Instant::now();
    loop {
        let text = vm.console().text()?;
        let gaps: Vec<u64> = text
            .lines()
            .skip(lines)
            .filter(|line| line.starts_with("tick "))
            .map(|line| number(line, "max_gap"))
            .collect::<anyhow::Result<_>>()?;
        if let Some(largest) = gaps.into_iter().max() {
            let layout = text
                .lines()
                .find(|line| line.starts_with("pagewriter: layout"));
            let khz: u64 = number(
                layout.context("the guest has printed no layout")?,
                "tsc_khz",
            )?;
            ensure!(khz > 0, "the guest does not know the rate of its TSC");
            return Ok(largest.saturating_mul(1000) / khz);
        }
        ensure!(start.elapsed() < TICK_TIMEOUT, "the guest ticks no more");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn micros_of(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn text(report: &Report) -> String {
    let cell = |spread: Spread| {
        format!(
            "{:.1} ({:.1}–{:.1})",
            spread.median / 1e3,
            spread.min / 1e3,
            spread.max / 1e3
        )
    };
    let row = |name: &str, cells: [String; 6]| [vec![name.to_owned()], cells.to_vec()].concat();
    let none = String::new;
    let mut rows = vec![
        row(
            "plain write",
            [
                cell(report.plain_write_us),
                none(),
                none(),
                none(),
                "1.000".to_owned(),
                bytes(report.memory_bytes),
            ],
        ),
        row(
            "no checkpoint",
            [
                none(),
                cell(report.idle_gap_us),
                none(),
                none(),
                none(),
                none(),
            ],
        ),
    ];
    for figures in &report.protocols {
        rows.push(vec![
            figures.protocol.to_owned(),
            cell(figures.downtime_us),
            cell(figures.guest_gap_us),
            cell(figures.gap_less_downtime_us),
            cell(figures.total_us),
            format!("{:.3}", figures.downtime_to_plain_write),
            bytes(figures.image_bytes),
        ]);
    }
    let header = [
        "ms: median (min–max)",
        "downtime",
        "gap in guest",
        "gap − downtime",
        "checkpoint",
        "downtime ÷ plain write",
        "image",
    ];
    format!(
        "\n{} of memory, {} % of it rewritten at full speed, {} runs:\n\n{}",
        bytes(report.memory_bytes),
        report.working_set_percent,
        report.runs,
        table(&header, &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_is_between_the_middle_two() {
        let spread = Spread::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!(
            spread,
            Spread {
                min: 1.0,
                median: 2.5,
                max: 4.0
            }
        );
        assert_eq!(
            Spread::of(vec![7.0]),
            Spread {
                min: 7.0,
                median: 7.0,
                max: 7.0
            }
        );
    }
}
