//! Suite `full`: a whole checkpoint of memory that is all full and at rest, beside what the same
//! bytes cost without any virtual machine.

use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use serde::Serialize;

use super::super::output::{bytes, table};
use super::contender::{Contender, Staging};
use super::setup::{Row, Setup, Target, discard, ensure_any, failures};
use super::spread::{Spread, cell};
use super::vm::{Backing, GuestSpec, Vm, micros};
use super::yardstick::{Memory, PlainWrite, plain_write};

/// What the guest does until it is paused: one that waits for its next write takes a CPU.
const CMDLINE: &str = "ws=1M rate=1M pattern=random write=page fill=incompressible \
                       fill_percent=100 pages=2m tick_ms=1000";

/// Room of a spare file beyond the guest's memory: tables, state and manifest.
const SPARE_EXTRA_BYTES: u64 = 16 << 20;

/// Those that are measured, where this build has them.
const PROTOCOLS: [&str; 3] = ["stop", "threaded", "cow"];

const SETTLE: Duration = Duration::from_millis(300);

#[derive(Debug, Serialize)]
pub(super) struct Full {
    memory_bytes: u64,
    /// Two threads copy the same number of bytes.
    memcpy_us: Option<Spread>,
    /// Two threads hash them with BLAKE3.
    blake3_us: Option<Spread>,
    targets: Vec<TargetFigures>,
}

#[derive(Debug, Serialize)]
struct TargetFigures {
    target: &'static str,
    durable: bool,
    /// One thread writes the same number of bytes; with `durable`, and syncs them.
    plain_write_us: Option<Spread>,
    protocols: Vec<Figures>,
}

#[derive(Debug, Serialize)]
struct Figures {
    protocol: Contender,
    total_us: Option<Spread>,
    image_bytes: Option<u64>,
    cpu_us: Option<Spread>,
    to_memcpy: Option<f64>,
    to_blake3: Option<f64>,
    to_plain_write: Option<f64>,
    error: Option<String>,
}

#[derive(Clone, Debug)]
struct Sample {
    total_us: f64,
    image_bytes: u64,
    cpu_us: Option<f64>,
}

/// Everything measured with one target.
struct Place {
    target: Target,
    durable: bool,
    plain: Vec<f64>,
    rows: Vec<Row<Sample>>,
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<Full> {
    let args = setup.args;
    let len = usize::try_from(args.memory).context("more memory than this host can address")?;
    let guest = GuestSpec::pagewriter(args.memory, Backing::Thp, CMDLINE.to_owned());
    let mut vm = setup.start_pagewriter(Contender::Nothing, &guest, SETTLE)?;
    vm.pause()?;
    let mut memory = Memory::new(len);
    let mut places = [
        place(setup, setup.shm(), false),
        place(setup, setup.disk(), true),
    ];
    make_spare(&places[0].target.path(SPARE), args.memory)?;
    let (mut copies, mut hashes) = (Vec::new(), Vec::new());
    for run in 1..=args.runs {
        setup.say(format_args!("full: run {run} of {}", args.runs));
        copies.push(micros(memory.copy()));
        hashes.push(micros(memory.hash()));
        for place in &mut places {
            let PlainWrite { written, synced } =
                plain_write(&place.target.path("plain"), args.memory)?;
            place
                .plain
                .push(micros(if place.durable { synced } else { written }));
            for row in &mut place.rows {
                let (target, durable) = (&place.target, place.durable);
                row.turn(setup, |contender| {
                    sample(&mut vm, contender, args.memory, target, durable)
                })?;
            }
        }
        ensure_any(places.iter().flat_map(|place| &place.rows))?;
    }
    let (memcpy_us, blake3_us) = (Spread::of(copies), Spread::of(hashes));
    Ok(Full {
        memory_bytes: args.memory,
        targets: places
            .into_iter()
            .map(|place| place.figures(memcpy_us, blake3_us))
            .collect(),
        memcpy_us,
        blake3_us,
    })
}

fn place(setup: &Setup, target: Target, durable: bool) -> Place {
    let rows = PROTOCOLS
        .into_iter()
        .filter_map(|name| setup.protocol(name))
        .map(|protocol| Row::new(Contender::Ours(protocol, Staging::Ample)))
        .collect();
    Place {
        target,
        durable,
        plain: Vec::new(),
        rows,
    }
}

fn sample(
    vm: &mut Vm,
    contender: Contender,
    memory_bytes: u64,
    target: &Target,
    durable: bool,
) -> anyhow::Result<Sample> {
    let mut request = target.request();
    request.durable = durable;
    let spare = target.path(SPARE);
    request.spare = spare.exists().then(|| spare.clone());
    let outcome = vm.checkpoint(contender, memory_bytes, &request)?;
    if request.spare.is_some() {
        fs::rename(&request.image, &spare)?;
    } else {
        discard(&request.image)?;
    }
    std::thread::sleep(SETTLE);
    Ok(Sample {
        total_us: outcome.total_us(),
        image_bytes: outcome.image_bytes,
        cpu_us: outcome.figure("/cpu_us"),
    })
}

/// Name of the file that images in memory are written over.
const SPARE: &str = "spare";

/// Makes a file with room for an image of `memory_bytes`.
fn make_spare(path: &Path, memory_bytes: u64) -> anyhow::Result<()> {
    let what = || format!("could not make {}", path.display());
    let file = File::create(path).with_context(what)?;
    let flags = rustix::fs::FallocateFlags::empty();
    rustix::fs::fallocate(&file, flags, 0, memory_bytes + SPARE_EXTRA_BYTES).with_context(what)
}

impl Place {
    fn figures(self, memcpy_us: Option<Spread>, blake3_us: Option<Spread>) -> TargetFigures {
        let plain_write_us = Spread::of(self.plain);
        let protocols = self.rows.into_iter().map(|row| {
            let total_us = Spread::of(row.samples.iter().map(|sample| sample.total_us));
            let to = |other: Option<Spread>| Some(total_us?.median / other?.median);
            Figures {
                protocol: row.contender,
                total_us,
                image_bytes: row.samples.last().map(|sample| sample.image_bytes),
                cpu_us: Spread::of(row.samples.iter().filter_map(|sample| sample.cpu_us)),
                to_memcpy: to(memcpy_us),
                to_blake3: to(blake3_us),
                to_plain_write: to(plain_write_us),
                error: row.error,
            }
        });
        TargetFigures {
            target: self.target.name,
            durable: self.durable,
            plain_write_us,
            protocols: protocols.collect(),
        }
    }
}

impl Full {
    pub fn markdown(&self) -> String {
        let ms = |spread: &Option<Spread>| cell(spread.as_ref(), 1e3, 1);
        let ratio = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.2}"));
        let plain = |name: String, spread: &Option<Spread>| {
            let mut row = vec![String::new(); 7];
            row[0] = name;
            row[1] = ms(spread);
            row
        };
        let mut rows = vec![
            plain("memcpy, 2 threads".to_owned(), &self.memcpy_us),
            plain("BLAKE3, 2 threads".to_owned(), &self.blake3_us),
        ];
        for target in &self.targets {
            let (name, sync) = (target.target, if target.durable { " + fsync" } else { "" });
            rows.push(plain(
                format!("plain write{sync}, {name}"),
                &target.plain_write_us,
            ));
            for figures in &target.protocols {
                rows.push(vec![
                    format!("{}, {name}", figures.protocol),
                    ms(&figures.total_us),
                    ratio(figures.to_memcpy),
                    ratio(figures.to_blake3),
                    ratio(figures.to_plain_write),
                    ms(&figures.cpu_us),
                    figures.image_bytes.map_or_else(String::new, bytes),
                ]);
            }
        }
        let header = [
            "ms: median (min–max)",
            "time",
            "÷ memcpy",
            "÷ BLAKE3",
            "÷ plain write",
            "CPU time",
            "image",
        ];
        format!(
            "### A whole checkpoint\n\n{} of memory, all of it incompressible, the guest at \
             rest; no compression, digests on; durable in a new file on disk, not durable over a \
             spare file in shm.\n\n{}\n{}",
            bytes(self.memory_bytes),
            table(&header, &rows),
            failures(self.targets.iter().flat_map(|target| {
                let name = |one: &Figures| format!("{}, {}", one.protocol, target.target);
                let rows = target.protocols.iter();
                rows.map(move |one| (name(one), one.error.clone()))
            }))
        )
    }
}
