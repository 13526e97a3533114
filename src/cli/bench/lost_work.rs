//! Suite `lost-work`: how much of the guest's work one checkpoint costs.
//!
//! Every turn has a machine of its own, so that nobody starts with what another has left of its
//! memory; it is saved twice, since the second time buffers are there already.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;

use super::super::args::{GuestPages, TargetName};
use super::super::output::{bytes, table, to_f64};
use super::contender::{Contender, Staging, is_live};
use super::loss::{Loss, Place, Point, lost_work};
use super::qemu::QemuMode;
use super::sample::wait_ticks;
use super::setup::{Row, Setup, Target, discard, ensure_any, failures};
use super::spread::{Spread, cell};
use super::vm::{Backing, GuestSpec, Outcome, Vm, captured_by, half_full, title};

const WORKING_SET_PERCENT: u32 = 50;

/// Short, so that the rate over time shows what happens; each tick costs the guest some of it.
const TICK_MS: u32 = 30;

/// The guest reaches its speed within this.
const SETTLE: Duration = Duration::from_millis(700);

/// How long a quiet guest is watched, before and after a checkpoint.
const QUIET: Duration = Duration::from_millis(1000);

/// What stands for a checkpoint where there is none.
const NOTHING: Duration = Duration::from_millis(1000);

/// How long a guest may take after a checkpoint until it is back at its speed.
const RECOVERY_MAX: Duration = Duration::from_secs(8);

const POLL: Duration = Duration::from_millis(100);

#[derive(Debug, Serialize)]
pub(super) struct LostWork {
    memory_bytes: u64,
    working_set_percent: u32,
    guest_pages: GuestPages,
    targets: Vec<TargetFigures>,
    ratios: Vec<Ratio>,
}

#[derive(Debug, Serialize)]
struct TargetFigures {
    target: &'static str,
    rows: Vec<Figures>,
}

/// What one contender costs the guest.
#[derive(Debug, Serialize)]
struct Figures {
    contender: Contender,
    /// The first checkpoint of each machine.
    first: Option<Costs>,
    /// The second one.
    second: Option<Costs>,
    /// The guest's rate over time through the first checkpoint of the first run.
    trace: Vec<Point>,
    error: Option<String>,
}

#[derive(Debug, Serialize)]
struct Costs {
    /// ∫ (1 − rate ÷ base rate) dt, from the request until the guest was back at its speed.
    lost_ms: Option<Spread>,
    /// Longer than the undisturbed guest would have taken for the same work, over all that was
    /// watched.
    difference_ms: Option<Spread>,
    /// From the request until the guest was back at its speed.
    disturbed_ms: Option<Spread>,
    guest_gap_ms: Option<Spread>,
    downtime_ms: Option<Spread>,
    total_ms: Option<Spread>,
    staging_peak_bytes: Option<Spread>,
    image_bytes: Option<Spread>,
    /// The protocols that captured memory, which `auto` chooses.
    captured_by: BTreeSet<String>,
    /// Runs in which the guest was back at its speed before the watch ended.
    recovered: usize,
}

/// Ours beside another, from the medians of one run of the command.
#[derive(Debug, Serialize)]
struct Ratio {
    target: &'static str,
    checkpoint: &'static str,
    ours: String,
    other: String,
    value: f64,
}

/// One checkpoint.
#[derive(Clone, Debug)]
struct Sample {
    loss: Loss,
    outcome: Option<Outcome>,
}

type Turn = [Sample; 2];

pub(super) fn run(setup: &Setup) -> anyhow::Result<LostWork> {
    let args = setup.args;
    let contenders = contenders(setup);
    let targets = setup.targets(&[TargetName::Shm, TargetName::HeldDisk]);
    let mut all: Vec<Vec<Row<Turn>>> = targets
        .iter()
        .map(|_| contenders.iter().copied().map(Row::new).collect())
        .collect();
    for run in 1..=args.runs {
        for (target, rows) in targets.iter().zip(&mut all) {
            for row in rows.iter_mut() {
                setup.say(format_args!(
                    "lost-work: run {run} of {}: {}, {}",
                    args.runs, target.name, row.contender
                ));
                row.turn(setup, |contender| turn(setup, contender, target))?;
            }
            ensure_any(rows.iter())?;
        }
    }
    let figures: Vec<TargetFigures> = targets
        .iter()
        .zip(all)
        .map(|(target, rows)| TargetFigures {
            target: target.name,
            rows: rows.into_iter().map(Figures::new).collect(),
        })
        .collect();
    Ok(LostWork {
        memory_bytes: args.memory,
        working_set_percent: WORKING_SET_PERCENT,
        guest_pages: args.guest_pages,
        ratios: figures
            .iter()
            .flat_map(|target| ratios(setup, target))
            .collect(),
        targets: figures,
    })
}

/// Nothing at all, every protocol, live ones with default staging too, and QEMU if asked for.
fn contenders(setup: &Setup) -> Vec<Contender> {
    let ours = setup.ours();
    let default = ours
        .iter()
        .filter_map(|one| one.protocol())
        .filter(|&protocol| is_live(protocol))
        .map(|protocol| Contender::Ours(protocol, Staging::Default));
    let qemu = setup.qemu_modes().map(Contender::Qemu);
    [Contender::Nothing]
        .into_iter()
        .chain(ours.iter().copied())
        .chain(default)
        .chain(qemu)
        .collect()
}

fn turn(setup: &Setup, contender: Contender, target: &Target) -> anyhow::Result<Turn> {
    let memory_bytes = setup.args.memory;
    let cmdline = half_full(WORKING_SET_PERCENT, setup.args.guest_pages.name(), TICK_MS);
    let guest = GuestSpec::pagewriter(memory_bytes, Backing::Thp, cmdline);
    let mut vm = setup.start_pagewriter(contender, &guest, SETTLE)?;
    let quiet_from = vm.ticks()?.ticks.len();
    std::thread::sleep(QUIET);
    let (first, recovered) = save(&mut vm, contender, memory_bytes, target, quiet_from)?;
    let (second, _) = save(&mut vm, contender, memory_bytes, target, recovered)?;
    Ok([first, second])
}

/// Saves the guest, and watches it from before until it is back at its speed; returns the tick
/// from which it was.
fn save(
    vm: &mut Vm,
    contender: Contender,
    memory_bytes: u64,
    target: &Target,
    quiet_from: usize,
) -> anyhow::Result<(Sample, usize)> {
    let requested = vm.ticks()?.ticks.len();
    let request = target.request();
    let outcome = match contender {
        Contender::Nothing => {
            std::thread::sleep(NOTHING);
            None
        }
        _ => Some(vm.checkpoint(contender, memory_bytes, &request)?),
    };
    let place = Place {
        quiet_from,
        requested,
        done: vm.ticks()?.ticks.len(),
    };
    let loss = watch(vm, place)?;
    if outcome.is_some() {
        discard(&request.image)?;
    }
    let recovered = loss.recovered.unwrap_or(place.done);
    Ok((Sample { loss, outcome }, recovered))
}

/// Watches the guest until it is back at its speed, and for a while more.
fn watch(vm: &Vm, place: Place) -> anyhow::Result<Loss> {
    let quiet = usize::try_from(QUIET.as_millis() / u128::from(TICK_MS))?;
    let start = Instant::now();
    loop {
        std::thread::sleep(POLL);
        let ticks = wait_ticks(vm, place.done + 1)?;
        let loss = lost_work(&ticks, place);
        let recovered = loss.as_ref().and_then(|loss| loss.recovered);
        let enough = recovered.is_some_and(|tick| ticks.ticks.len() > tick + quiet);
        if enough || start.elapsed() > RECOVERY_MAX {
            return loss.context("the guest ticked too rarely to tell its rate");
        }
    }
}

impl Figures {
    fn new(row: Row<Turn>) -> Self {
        let nth = |n: usize| {
            let samples: Vec<&Sample> = row.samples.iter().map(|turn| &turn[n]).collect();
            Costs::of(&samples)
        };
        Self {
            contender: row.contender,
            first: nth(0),
            second: nth(1),
            trace: row
                .samples
                .first()
                .map_or_else(Vec::new, |turn| turn[0].loss.trace.clone()),
            error: row.error,
        }
    }

    fn row(&self, which: fn(&Self) -> Option<&Costs>, order: &str) -> Vec<String> {
        let costs = which(self);
        let ms = |part: fn(&Costs) -> Option<Spread>| {
            let spread = costs.and_then(part);
            cell(spread.as_ref(), 1.0, 0)
        };
        let size = costs.and_then(|costs| costs.image_bytes);
        let none = BTreeSet::new();
        let by = costs.map_or(&none, |costs| &costs.captured_by);
        vec![
            title(self.contender, by) + order,
            ms(|costs| costs.lost_ms),
            ms(|costs| costs.difference_ms),
            ms(|costs| costs.disturbed_ms),
            ms(|costs| costs.guest_gap_ms),
            ms(|costs| costs.downtime_ms),
            ms(|costs| costs.total_ms),
            size.map_or_else(String::new, |size| {
                format!("{:.0}", size.median / to_f64(1 << 20))
            }),
        ]
    }
}

impl Costs {
    fn of(samples: &[&Sample]) -> Option<Self> {
        let loss =
            |figure: fn(&Loss) -> f64| Spread::of(samples.iter().map(|one| figure(&one.loss)));
        let outcome = |figure: fn(&Outcome) -> Option<f64>| {
            let outcomes = samples.iter().filter_map(|one| one.outcome.as_ref());
            Spread::of(outcomes.filter_map(figure))
        };
        let lost_ms = loss(|loss| loss.lost_s * 1e3);
        lost_ms.is_some().then(|| Self {
            lost_ms,
            difference_ms: loss(|loss| loss.difference_s * 1e3),
            disturbed_ms: loss(|loss| loss.disturbed_s * 1e3),
            guest_gap_ms: loss(|loss| loss.largest_gap_us / 1e3),
            downtime_ms: outcome(|one| Some(one.downtime_us()? / 1e3)),
            total_ms: outcome(|one| Some(one.total_us() / 1e3)),
            staging_peak_bytes: outcome(|one| one.figure("/staging/peak_bytes")),
            image_bytes: outcome(|one| Some(to_f64(one.image_bytes))),
            captured_by: captured_by(samples.iter().filter_map(|one| one.outcome.as_ref())),
            recovered: samples
                .iter()
                .filter(|one| one.loss.recovered.is_some())
                .count(),
        })
    }
}

/// Compares the better of our two ways to keep the guest running with its alternatives.
fn ratios(setup: &Setup, target: &TargetFigures) -> Vec<Ratio> {
    let mut ratios = Vec::new();
    for checkpoint in ["first", "second"] {
        let lost = |contender: Contender| {
            let row = target.rows.iter().find(|row| row.contender == contender)?;
            let costs = if checkpoint == "first" {
                &row.first
            } else {
                &row.second
            };
            Some(costs.as_ref()?.lost_ms?.median)
        };
        let ours = ["threaded", "cow"]
            .into_iter()
            .filter_map(|name| setup.protocol(name))
            .map(|protocol| Contender::Ours(protocol, Staging::Ample))
            .filter_map(|contender| Some((contender, lost(contender)?)))
            .min_by(|a, b| a.1.total_cmp(&b.1));
        let stop = setup
            .protocol("stop")
            .map(|stop| Contender::Ours(stop, Staging::Ample));
        let others = stop
            .into_iter()
            .chain(QemuMode::ALL.into_iter().map(Contender::Qemu));
        for other in others {
            if let Some(((contender, ours), theirs)) = ours.zip(lost(other)) {
                ratios.push(Ratio {
                    target: target.target,
                    checkpoint,
                    ours: contender.to_string(),
                    other: other.to_string(),
                    value: ours / theirs,
                });
            }
        }
    }
    ratios
}

impl LostWork {
    pub fn markdown(&self) -> String {
        let header = [
            "ms: median (min–max)",
            "lost work",
            "plain difference",
            "disturbed for",
            "gap in guest",
            "downtime",
            "checkpoint",
            "image, MiB",
        ];
        let mut text = format!(
            "### Work lost to a checkpoint\n\n{} of memory, {} % of it rewritten at full speed, \
             the rest untouched, mapped by the guest in pages of {}; 1 vCPU; staging of 60 % of \
             memory, or the default; no compression; a machine for each run and row, saved twice.\n",
            bytes(self.memory_bytes),
            self.working_set_percent,
            self.guest_pages.name()
        );
        for target in &self.targets {
            let mut rows = Vec::new();
            for figures in &target.rows {
                rows.push(figures.row(|figures| figures.first.as_ref(), ""));
                if figures.second.is_some() {
                    rows.push(figures.row(|figures| figures.second.as_ref(), ", again"));
                }
            }
            text += &format!(
                "\nImage in {}:\n\n{}\n",
                target.target,
                table(&header, &rows)
            );
            let errors = target.rows.iter();
            text += &failures(errors.map(|row| (row.contender.to_string(), row.error.clone())));
        }
        for ratio in &self.ratios {
            text += &format!(
                "\n- {}, {} checkpoint: {} loses {:.2} of what {} does",
                ratio.target, ratio.checkpoint, ratio.ours, ratio.value, ratio.other
            );
        }
        text + "\n"
    }

    /// Returns the guest's rate over time, for each target and way to save it.
    pub fn traces(&self) -> impl Iterator<Item = (&'static str, Vec<(String, &[Point])>)> {
        self.targets.iter().map(|target| {
            let shown = target.rows.iter().filter(|row| {
                !matches!(
                    row.contender,
                    Contender::Nothing | Contender::Ours(_, Staging::Default)
                )
            });
            let traces = shown.filter(|row| !row.trace.is_empty());
            let named = traces.map(|row| (row.contender.to_string(), row.trace.as_slice()));
            (target.target, named.collect())
        })
    }
}
