//! Suite `sizes`: whether the downtime of live protocols grows with memory.
//!
//! Half of memory is full, a share of it is rewritten at full speed, and the image is in memory.
//! Each machine is saved several times in a row: the later checkpoints must be like the first.

use std::time::Duration;

use anyhow::bail;
use serde::Serialize;

use super::super::output::{bytes, table};
use super::contender::{Contender, Staging, is_live};
use super::huge_pages::{GuestMemory, Pool, Resident};
use super::machine::available_bytes;
use super::sample::{Sample, Stalls, spread, spread_of_some, take};
use super::setup::{Row, Setup, failures};
use super::spread::{Spread, cell, median};
use super::vm::{Backing, GuestSpec, half_full};
use crate::host::Protocol;

/// Checkpoints of one machine, one after the other.
const IN_A_ROW: usize = 5;

const SETTLE: Duration = Duration::from_millis(700);

const TICK_MS: u32 = 50;

/// Memory that must be there beside what grows with the guest.
const SPARE_BYTES: u64 = 512 << 20;

/// A kind of memory and of guest.
#[derive(Clone, Copy, Debug, Serialize)]
struct Kind {
    #[serde(serialize_with = "backing_name")]
    backing: Backing,
    working_set_percent: u32,
    guest_pages: &'static str,
}

const KINDS: [Kind; 5] = [
    kind(Backing::Thp, 10, "2m"),
    kind(Backing::Hugetlb, 10, "2m"),
    kind(Backing::Memfd, 10, "2m"),
    kind(Backing::Memfd, 50, "2m"),
    kind(Backing::Thp, 10, "4k"),
];

const fn kind(backing: Backing, working_set_percent: u32, guest_pages: &'static str) -> Kind {
    Kind {
        backing,
        working_set_percent,
        guest_pages,
    }
}

#[expect(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes fields by reference"
)]
fn backing_name<S: serde::Serializer>(backing: &Backing, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(backing.name())
}

#[derive(Debug, Serialize)]
pub(super) struct Sizes {
    checkpoints_in_a_row: usize,
    cells: Vec<Cell>,
    growth: Vec<Growth>,
    /// What was left out, and why.
    skipped: Vec<String>,
}

/// One protocol on one kind of memory of one size.
#[derive(Debug, Serialize)]
struct Cell {
    #[serde(flatten)]
    kind: Kind,
    memory_bytes: u64,
    protocol: &'static str,
    downtime_us: Option<Spread>,
    guest_gap_us: Option<Spread>,
    pause_gap_us: Option<Spread>,
    total_us: Option<Spread>,
    staging_peak_bytes: Option<Spread>,
    stalls: Option<StallFigures>,
    /// Median of the first, second .. checkpoint of each machine.
    downtime_us_in_a_row: Vec<Option<f64>>,
    guest_gap_us_in_a_row: Vec<Option<f64>>,
    /// Share of resident guest memory in huge pages before the first checkpoint and after the
    /// last.
    huge_share_before: Option<f64>,
    huge_share_after: Option<f64>,
    machines: usize,
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct StallFigures {
    count: Option<Spread>,
    p50_us: Option<Spread>,
    p99_us: Option<Spread>,
    max_us: Option<Spread>,
}

/// The largest memory beside the smallest.
#[derive(Debug, Serialize)]
struct Growth {
    #[serde(flatten)]
    kind: Kind,
    protocol: &'static str,
    from_bytes: u64,
    to_bytes: u64,
    downtime_ratio: f64,
    guest_gap_ratio: f64,
}

/// What one machine has shown.
#[derive(Clone, Debug)]
struct Machine {
    samples: Vec<Sample>,
    before: Option<Resident>,
    after: Option<Resident>,
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<Sizes> {
    let mut skipped = Vec::new();
    let mut cells = Vec::new();
    for kind in KINDS {
        let mut sizes = Vec::new();
        for &size in &setup.args.sizes {
            match fits(setup, kind, size) {
                Ok(()) => sizes.push(size),
                Err(why) => skipped.push(format!("{}, {}: {why}", title(kind), bytes(size))),
            }
        }
        let Some(&largest) = sizes.iter().max() else {
            continue;
        };
        let _pool = if kind.backing == Backing::Hugetlb && setup.args.hugetlb {
            match Pool::with_room_for(largest) {
                Ok(pool) => Some(pool),
                Err(error) => {
                    skipped.push(format!("{}: {error:#}", title(kind)));
                    continue;
                }
            }
        } else {
            None
        };
        cells.extend(measure(setup, kind, &sizes)?);
    }
    if let Some(error) = cells.first().and_then(|cell| cell.error.as_ref())
        && cells.iter().all(|cell| cell.machines == 0)
    {
        bail!("{error}");
    }
    Ok(Sizes {
        checkpoints_in_a_row: IN_A_ROW,
        growth: growth(&cells),
        cells,
        skipped,
    })
}

/// Says why memory of that size and kind cannot be measured here.
fn fits(setup: &Setup, kind: Kind, size: u64) -> Result<(), String> {
    if kind.backing == Backing::Hugetlb && !setup.args.hugetlb && Pool::free_bytes() < size {
        return Err("too few free huge pages; --hugetlb sets them up for the time".to_owned());
    }
    // Guest, staging and image, and twice the copies that later ones replace.
    let needed = size / 10 * 22 + SPARE_BYTES;
    match available_bytes() {
        Some(available) if available < needed => Err(format!(
            "needs {} of memory, {} are available",
            bytes(needed),
            bytes(available)
        )),
        _ => Ok(()),
    }
}

fn measure(setup: &Setup, kind: Kind, sizes: &[u64]) -> anyhow::Result<Vec<Cell>> {
    let protocols: Vec<_> = setup
        .protocols()
        .into_iter()
        .filter(|&one| is_live(one))
        .collect();
    let mut rows: Vec<(u64, Protocol, Row<Machine>)> = Vec::new();
    for &size in sizes {
        for &protocol in &protocols {
            let contender = Contender::Ours(protocol, Staging::Ample);
            rows.push((size, protocol, Row::new(contender)));
        }
    }
    let machines = setup.args.runs.div_ceil(u32::try_from(IN_A_ROW)?);
    for machine in 1..=machines {
        setup.say(format_args!(
            "sizes: {}: machine {machine} of {machines}",
            title(kind)
        ));
        for (size, _, row) in &mut rows {
            row.turn(setup, |contender| {
                save_in_a_row(setup, contender, kind, *size)
            })?;
        }
    }
    Ok(rows
        .into_iter()
        .map(|(size, protocol, row)| Cell::new(kind, size, protocol, row))
        .collect())
}

fn save_in_a_row(
    setup: &Setup,
    contender: Contender,
    kind: Kind,
    size: u64,
) -> anyhow::Result<Machine> {
    let cmdline = half_full(kind.working_set_percent, kind.guest_pages, TICK_MS);
    let guest = GuestSpec::pagewriter(size, kind.backing, cmdline);
    let mut vm = setup.start_pagewriter(contender, &guest, SETTLE)?;
    let memory = vm.pid().and_then(|pid| GuestMemory::find(pid, size).ok());
    let look = || memory.as_ref().and_then(|memory| memory.look().ok());
    let before = look();
    let mut samples = Vec::new();
    for _ in 0..IN_A_ROW {
        let request = setup.shm().request();
        samples.push(take(&mut vm, contender, size, &request, SETTLE)?);
    }
    Ok(Machine {
        samples,
        before,
        after: look(),
    })
}

impl Cell {
    fn new(kind: Kind, memory_bytes: u64, protocol: Protocol, row: Row<Machine>) -> Self {
        let machines = row.samples;
        let in_a_row = |figure: fn(&Sample) -> f64| {
            let nth = |n: usize| machines.iter().filter_map(move |one| one.samples.get(n));
            (0..IN_A_ROW)
                .map(|n| median(nth(n).map(figure)))
                .collect::<Vec<_>>()
        };
        let share = |look: fn(&Machine) -> Option<Resident>| {
            median(machines.iter().filter_map(look).filter_map(huge_share))
        };
        let samples: Vec<Sample> = machines
            .iter()
            .flat_map(|one| one.samples.clone())
            .collect();
        Self {
            kind,
            memory_bytes,
            protocol: protocol.name(),
            downtime_us: spread(&samples, |sample| sample.downtime_us),
            guest_gap_us: spread(&samples, |sample| sample.guest_gap_us),
            pause_gap_us: spread_of_some(&samples, |sample| sample.pause_gap_us),
            total_us: spread(&samples, |sample| sample.total_us),
            staging_peak_bytes: spread_of_some(&samples, |sample| sample.staging_peak_bytes),
            stalls: StallFigures::of(&samples),
            downtime_us_in_a_row: in_a_row(|sample| sample.downtime_us),
            guest_gap_us_in_a_row: in_a_row(|sample| sample.guest_gap_us),
            huge_share_before: share(|machine| machine.before),
            huge_share_after: share(|machine| machine.after),
            machines: machines.len(),
            error: row.error,
        }
    }

    fn row(&self) -> Vec<String> {
        let ms = |spread: &Option<Spread>| cell(spread.as_ref(), 1e3, 2);
        let stalls = self.stalls.as_ref();
        let stall = |part: fn(&StallFigures) -> Option<Spread>, unit: f64| {
            let spread = stalls.and_then(part);
            spread.map_or_else(String::new, |spread| format!("{:.1}", spread.median / unit))
        };
        let in_a_row: Vec<_> = self
            .downtime_us_in_a_row
            .iter()
            .flatten()
            .map(|us| format!("{:.2}", us / 1e3))
            .collect();
        let percent = |share: Option<f64>| {
            share.map_or_else(|| "–".to_owned(), |v| format!("{:.0}", v * 100.0))
        };
        vec![
            self.protocol.to_owned(),
            bytes(self.memory_bytes),
            ms(&self.downtime_us),
            ms(&self.guest_gap_us),
            ms(&self.pause_gap_us),
            in_a_row.join(" "),
            stall(|figures| figures.p50_us, 1e3),
            stall(|figures| figures.p99_us, 1e3),
            stall(|figures| figures.max_us, 1e3),
            format!(
                "{} → {}",
                percent(self.huge_share_before),
                percent(self.huge_share_after)
            ),
        ]
    }
}

impl StallFigures {
    fn of(samples: &[Sample]) -> Option<Self> {
        let of = |figure: fn(&Stalls) -> f64| {
            spread_of_some(samples, |sample| sample.stalls.as_ref().map(figure))
        };
        let count = of(|stalls| stalls.count);
        count.is_some().then_some(Self {
            count,
            p50_us: of(|stalls| stalls.p50_us),
            p99_us: of(|stalls| stalls.p99_us),
            max_us: of(|stalls| stalls.max_us),
        })
    }
}

fn huge_share(resident: Resident) -> Option<f64> {
    use super::super::output::to_f64;
    (resident.bytes > 0).then(|| to_f64(resident.huge_bytes) / to_f64(resident.bytes))
}

fn growth(cells: &[Cell]) -> Vec<Growth> {
    let mut grown = Vec::new();
    for large in cells {
        let same =
            |cell: &&Cell| cell.protocol == large.protocol && title(cell.kind) == title(large.kind);
        let alike: Vec<_> = cells.iter().filter(same).collect();
        let Some(small) = alike.iter().min_by_key(|cell| cell.memory_bytes) else {
            continue;
        };
        let largest = alike
            .iter()
            .all(|cell| cell.memory_bytes <= large.memory_bytes);
        if !largest || small.memory_bytes == large.memory_bytes {
            continue;
        }
        let ratio = |figure: fn(&Cell) -> Option<Spread>| {
            Some(figure(large)?.median / figure(small)?.median)
        };
        let downtime = ratio(|cell| cell.downtime_us);
        if let Some((downtime_ratio, guest_gap_ratio)) =
            downtime.zip(ratio(|cell| cell.guest_gap_us))
        {
            grown.push(Growth {
                kind: large.kind,
                protocol: large.protocol,
                from_bytes: small.memory_bytes,
                to_bytes: large.memory_bytes,
                downtime_ratio,
                guest_gap_ratio,
            });
        }
    }
    grown
}

fn title(kind: Kind) -> String {
    let memory = match kind.backing {
        Backing::Thp => "transparent huge pages",
        Backing::Hugetlb => "hugetlb",
        Backing::Memfd => "4 KiB memory",
    };
    let tables = if kind.guest_pages == "4k" {
        ", guest page tables of 4 KiB"
    } else {
        ""
    };
    format!(
        "{memory}, working set {} %{tables}",
        kind.working_set_percent
    )
}

impl Sizes {
    pub fn markdown(&self) -> String {
        let header = [
            "ms: median (min–max)",
            "memory",
            "downtime",
            "gap in guest",
            "gap at the pause",
            "downtime, one after the other",
            "stall p50",
            "stall p99",
            "stall max",
            "% huge",
        ];
        let mut text = format!(
            "### Downtime and the size of memory\n\nHalf of memory incompressible, the rest \
             untouched, the working set rewritten at full speed; 1 vCPU; staging of 60 % of \
             memory; image in shm; {} checkpoints of each machine in a row. *% huge*: share of \
             guest memory in huge pages before and after.\n",
            self.checkpoints_in_a_row
        );
        for kind in KINDS {
            let here = |cell: &&Cell| title(cell.kind) == title(kind);
            let cells = || self.cells.iter().filter(here);
            let rows: Vec<_> = cells().map(Cell::row).collect();
            if !rows.is_empty() {
                text += &format!("\n{}:\n\n{}\n", title(kind), table(&header, &rows));
                text += &failures(cells().map(|cell| {
                    let name = format!("{}, {}", cell.protocol, bytes(cell.memory_bytes));
                    (name, cell.error.clone())
                }));
            }
        }
        for one in &self.growth {
            text += &format!(
                "\n- {}, {}: from {} to {} of memory, downtime × {:.2}, gap in guest × {:.2}",
                one.protocol,
                title(one.kind),
                bytes(one.from_bytes),
                bytes(one.to_bytes),
                one.downtime_ratio,
                one.guest_gap_ratio
            );
        }
        for skipped in &self.skipped {
            text += &format!("\n- left out: {skipped}");
        }
        text + "\n"
    }
}
