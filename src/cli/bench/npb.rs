//! Suite `npb`: computations that verify themselves, each with one checkpoint on the way.
//!
//! As in the evaluation of "Thread-Based Live Checkpointing of Virtual Machines" (IEEE NCA 2011):
//! added run time, time of the checkpoint and longest outage, beside those of `stop`. The
//! checkpoint starts where the working set is at its peak.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use serde::Serialize;

use super::super::args::TargetName;
use super::super::console_log::number;
use super::super::output::{bytes, table, to_f64};
use super::contender::Contender;
use super::sample::Stalls;
use super::setup::{Row, Setup, Target, discard, ensure_any, failures};
use super::spread::{Spread, cell, quartiles};
use super::vm::{Backing, GuestSpec, Outcome, Vm, captured_by, title};

/// Kernels that the guest may have, in the paper's order.
const KERNELS: [&str; 5] = ["ep", "mg", "is", "ft", "cg"];

/// A run shall last so long beyond what a checkpoint takes at the slowest target.
const RUN_ON_S: f64 = 3.0;

/// What the guest says of a kernel that it does not have.
const NO_KERNEL: &str = "npb: error: no kernel";

/// No run of a kernel that is worth measuring takes this long.
const RUN_TIMEOUT: Duration = Duration::from_secs(1800);

const END_TIMEOUT: Duration = Duration::from_secs(30);

/// A loss below so many times the spread of the undisturbed runs says nothing. Their spread is how
/// far the middle half of them is apart: one run that other work on the host disturbed moves the
/// range by any amount, and this by little.
const JUDGED_SPREADS: f64 = 5.0;

/// Fewer runs have no middle half to speak of.
const JUDGED_RUNS: usize = 3;

#[derive(Debug, Serialize)]
pub(super) struct Npb {
    class: String,
    memory_bytes: u64,
    kernels: Vec<Kernel>,
    /// Kernels that this build's guest does not have.
    missing: Vec<&'static str>,
}

#[derive(Debug, Serialize)]
pub(super) struct Kernel {
    pub kernel: String,
    repeat: u32,
    undisturbed_s: Option<Spread>,
    undisturbed_middle_half_s: Option<f64>,
    undisturbed_gap_us: Option<Spread>,
    pub targets: Vec<TargetFigures>,
    error: Option<String>,
}

#[derive(Debug, Serialize)]
pub(super) struct TargetFigures {
    pub target: &'static str,
    /// Whether `stop` loses enough for the ratios to say something.
    pub judged: bool,
    pub protocols: Vec<Figures>,
}

#[derive(Debug, Serialize)]
pub(super) struct Figures {
    pub protocol: Contender,
    /// Longer than the median of the undisturbed runs.
    added_s: Option<Spread>,
    pub overhead_to_stop: Option<f64>,
    total_us: Option<Spread>,
    pub total_to_stop: Option<f64>,
    /// Longest outage that the guest saw in its whole run.
    guest_gap_us: Option<Spread>,
    pub gap_to_stop: Option<f64>,
    downtime_us: Option<Spread>,
    stall_max_us: Option<Spread>,
    staging_peak_bytes: Option<Spread>,
    /// Bytes of the image, as a share of the guest's memory.
    written_to_memory: Option<Spread>,
    cpu_us: Option<Spread>,
    /// The protocols that captured memory, which `auto` chooses.
    captured_by: BTreeSet<String>,
    error: Option<String>,
}

/// A run of a kernel.
#[derive(Clone, Debug)]
struct Run {
    seconds: f64,
    gap_us: f64,
    outcome: Option<Outcome>,
}

/// A kernel on its way through the runs.
struct Plan {
    kernel: String,
    repeat: u32,
    undisturbed: Row<Run>,
    cells: Vec<(Target, Vec<Row<Run>>)>,
}

pub(super) fn run(setup: &Setup) -> anyhow::Result<Npb> {
    let args = setup.args;
    let known = |name: &String| KERNELS.iter().any(|one| name.eq_ignore_ascii_case(one));
    if let Some(unknown) = args.kernels.iter().find(|name| !known(name)) {
        bail!(
            "there is no NPB kernel {unknown}; there are {}",
            KERNELS.join(", ")
        );
    }
    let mut missing = Vec::new();
    let mut plans = Vec::new();
    for &kernel in &KERNELS {
        let chosen = args
            .kernels
            .iter()
            .any(|one| one.eq_ignore_ascii_case(kernel));
        if !chosen && !args.kernels.is_empty() {
            continue;
        }
        match calibrate(setup, kernel) {
            Ok(Some(repeat)) => plans.push(Plan::new(setup, kernel, repeat)),
            Ok(None) if chosen => bail!("the npb guest has no kernel {kernel}"),
            Ok(None) => missing.push(kernel),
            Err(error) => {
                setup.go_on()?;
                plans.push(Plan::failed(kernel, format!("{error:#}")));
            }
        }
    }
    ensure_any_plan(&plans)?;
    for run in 1..=args.runs {
        for plan in &mut plans {
            setup.say(format_args!(
                "npb: run {run} of {}: {}",
                args.runs, plan.kernel
            ));
            plan.take_turns(setup)?;
        }
        let rows = plans.iter().flat_map(|plan| &plan.cells);
        ensure_any(rows.flat_map(|(_, rows)| rows))?;
    }
    Ok(Npb {
        class: args.class.to_uppercase(),
        memory_bytes: args.memory,
        kernels: plans
            .into_iter()
            .map(|plan| plan.figures(args.memory))
            .collect(),
        missing,
    })
}

/// Fails where no kernel can be run: then the reason is not one kernel's.
fn ensure_any_plan(plans: &[Plan]) -> anyhow::Result<()> {
    let any = plans.iter().any(|plan| plan.undisturbed.error.is_none());
    match plans
        .iter()
        .find_map(|plan| plan.undisturbed.error.as_ref())
    {
        Some(error) if !any => bail!("{error}"),
        _ => Ok(()),
    }
}

/// Returns how often a kernel must run for a checkpoint to end well before it does; `None` where
/// the guest does not have it.
fn calibrate(setup: &Setup, kernel: &str) -> anyhow::Result<Option<u32>> {
    setup.go_on()?;
    let mut vm = match setup.start(Contender::Nothing, &guest(setup, kernel, 1)) {
        Ok(vm) => vm,
        // It may have ended before its process could answer.
        Err(error) if format!("{error:#}").contains(NO_KERNEL) => return Ok(None),
        Err(error) => return Err(error),
    };
    let line = vm.wait_line("its result", RUN_TIMEOUT, |line| {
        line.starts_with("npb: done") || line.starts_with("npb: error") || is_failure(line)
    })?;
    if line.contains(NO_KERNEL) {
        return Ok(None);
    }
    let seconds: f64 = number(&line, "time_s").with_context(|| line.clone())?;
    ensure!(seconds > 0.0, "the guest does not know the rate of its TSC");
    let slowest = to_f64(setup.args.memory) / to_f64(super::setup::HELD_BYTES_PER_S);
    let wanted = RUN_ON_S + 2.0 * slowest;
    let repeats = (1..=1000_u32).find(|&count| f64::from(count) * seconds >= wanted);
    Ok(Some(repeats.unwrap_or(1000)))
}

fn is_failure(line: &str) -> bool {
    line.starts_with("PANIC") || line.starts_with("runtime:")
}

/// All memory is there from the start: first touches are not what is measured.
fn guest(setup: &Setup, kernel: &str, repeat: u32) -> GuestSpec {
    GuestSpec {
        kernel: "npb",
        cmdline: format!("kernel={kernel} class={} repeat={repeat}", setup.args.class),
        memory_bytes: setup.args.memory,
        backing: Backing::Thp,
        preallocate: true,
    }
}

impl Plan {
    fn new(setup: &Setup, kernel: &str, repeat: u32) -> Self {
        let targets = setup.targets(&[TargetName::Disk, TargetName::Shm, TargetName::HeldDisk]);
        let rows = || setup.ours().into_iter().map(Row::new).collect();
        Self {
            kernel: kernel.to_owned(),
            repeat,
            undisturbed: Row::new(Contender::Nothing),
            cells: targets.into_iter().map(|target| (target, rows())).collect(),
        }
    }

    /// Returns the plan for a kernel that does not run at all.
    fn failed(kernel: &str, why: String) -> Self {
        let mut undisturbed = Row::new(Contender::Nothing);
        undisturbed.error = Some(why);
        Self {
            kernel: kernel.to_owned(),
            repeat: 0,
            undisturbed,
            cells: Vec::new(),
        }
    }

    fn take_turns(&mut self, setup: &Setup) -> anyhow::Result<()> {
        let guest = guest(setup, &self.kernel, self.repeat);
        self.undisturbed.turn(setup, |contender| {
            let mut vm = setup.start(contender, &guest)?;
            finish(&mut vm, None)
        })?;
        for (target, rows) in &mut self.cells {
            for row in rows.iter_mut() {
                row.turn(setup, |contender| {
                    disturbed(setup, contender, &guest, target)
                })?;
            }
        }
        Ok(())
    }

    fn figures(self, memory_bytes: u64) -> Kernel {
        let seconds = || self.undisturbed.samples.iter().map(|run| run.seconds);
        let undisturbed_s = Spread::of(seconds());
        let middle_half_s = quartiles(seconds()).map(|(low, high)| high - low);
        let targets = self.cells.into_iter().map(|(target, rows)| {
            let mut protocols: Vec<Figures> = rows
                .into_iter()
                .map(|row| Figures::new(row, undisturbed_s, memory_bytes))
                .collect();
            let judged = compare(&mut protocols, undisturbed_s, middle_half_s);
            TargetFigures {
                target: target.name,
                judged,
                protocols,
            }
        });
        Kernel {
            targets: targets.collect(),
            kernel: self.kernel,
            repeat: self.repeat,
            undisturbed_s,
            undisturbed_middle_half_s: middle_half_s,
            undisturbed_gap_us: Spread::of(self.undisturbed.samples.iter().map(|run| run.gap_us)),
            error: self.undisturbed.error,
        }
    }
}

/// Runs a kernel with one checkpoint, taken when it has touched all its memory and done one
/// iteration.
fn disturbed(
    setup: &Setup,
    contender: Contender,
    guest: &GuestSpec,
    target: &Target,
) -> anyhow::Result<Run> {
    let mut vm = setup.start(contender, guest)?;
    let line = vm.wait_line("its first iteration", RUN_TIMEOUT, |line| {
        line.contains(" iteration ") || is_failure(line)
    })?;
    ensure!(!is_failure(&line), "{line}");
    let request = target.request();
    let outcome = vm.checkpoint(contender, guest.memory_bytes, &request)?;
    let printed = vm.console().text()?;
    ensure!(
        !printed.contains("npb: done"),
        "the run ended before the checkpoint did"
    );
    let run = finish(&mut vm, Some(outcome))?;
    discard(&request.image)?;
    Ok(run)
}

fn finish(vm: &mut Vm, outcome: Option<Outcome>) -> anyhow::Result<Run> {
    let done = vm.wait_line("its last line", RUN_TIMEOUT, |line| {
        line.starts_with("npb: done") || line.starts_with("npb: error") || is_failure(line)
    })?;
    let failed: u32 = number(&done, "failed").with_context(|| done.clone())?;
    ensure!(failed == 0, "the result is wrong: {done}");
    if let Vm::Ours(vm) = vm {
        vm.wait_end(END_TIMEOUT)?;
    }
    Ok(Run {
        seconds: number(&done, "time_s")?,
        gap_us: number(&done, "max_gap_us")?,
        outcome,
    })
}

impl Figures {
    fn new(row: Row<Run>, undisturbed_s: Option<Spread>, memory_bytes: u64) -> Self {
        let runs = &row.samples;
        let base = undisturbed_s.map(|spread| spread.median);
        let of = |figure: &dyn Fn(&Outcome) -> Option<f64>| {
            let outcomes = runs.iter().filter_map(|run| run.outcome.as_ref());
            Spread::of(outcomes.filter_map(figure))
        };
        Self {
            protocol: row.contender,
            added_s: base.and_then(|base| Spread::of(runs.iter().map(|run| run.seconds - base))),
            overhead_to_stop: None,
            total_us: of(&|one| Some(one.total_us())),
            total_to_stop: None,
            guest_gap_us: Spread::of(runs.iter().map(|run| run.gap_us)),
            gap_to_stop: None,
            downtime_us: of(&Outcome::downtime_us),
            stall_max_us: of(&|one| Some(Stalls::of(one)?.max_us)),
            staging_peak_bytes: of(&|one| one.figure("/staging/peak_bytes")),
            written_to_memory: of(&|one| Some(to_f64(one.image_bytes) / to_f64(memory_bytes))),
            cpu_us: of(&|one| one.figure("/cpu_us")),
            captured_by: captured_by(runs.iter().filter_map(|run| run.outcome.as_ref())),
            error: row.error,
        }
    }

    fn row(&self, target: &TargetFigures) -> Vec<String> {
        let to = |value: Option<f64>| value.map_or_else(String::new, |v| format!("{v:.2}"));
        let show = |spread: &Option<Spread>, unit, decimals| cell(spread.as_ref(), unit, decimals);
        let judged = if target.judged { "" } else { " *" };
        vec![
            format!(
                "{}, {}{judged}",
                target.target,
                title(self.protocol, &self.captured_by)
            ),
            show(&self.added_s, 1.0, 2),
            to(self.overhead_to_stop),
            show(&self.guest_gap_us, 1e3, 1),
            to(self.gap_to_stop),
            show(&self.total_us, 1e6, 2),
            to(self.total_to_stop),
            show(&self.downtime_us, 1e3, 1),
            show(&self.stall_max_us, 1e3, 1),
            show(&self.staging_peak_bytes, to_f64(1 << 20), 0),
            show(&self.written_to_memory, 1.0, 2),
            show(&self.cpu_us, 1e6, 2),
        ]
    }
}

/// Fills in the ratios to `stop`; returns whether they say something.
fn compare(
    protocols: &mut [Figures],
    undisturbed_s: Option<Spread>,
    middle_half_s: Option<f64>,
) -> bool {
    let stop = protocols
        .iter()
        .find(|figures| figures.protocol.to_string() == "stop");
    let Some(stop) = stop else { return false };
    let (added, total, gap) = (stop.added_s, stop.total_us, stop.guest_gap_us);
    let ratio = |ours: Option<Spread>, stop: Option<Spread>| Some(ours?.median / stop?.median);
    for figures in protocols.iter_mut() {
        figures.overhead_to_stop = ratio(figures.added_s, added);
        figures.total_to_stop = ratio(figures.total_us, total);
        figures.gap_to_stop = ratio(figures.guest_gap_us, gap);
    }
    let several = undisturbed_s.is_some_and(|undisturbed| undisturbed.runs >= JUDGED_RUNS);
    added
        .zip(middle_half_s)
        .is_some_and(|(added, apart)| several && added.median >= JUDGED_SPREADS * apart)
}

impl Npb {
    pub fn markdown(&self) -> String {
        let header = [
            "median (min–max)",
            "added, s",
            "÷ stop",
            "longest outage, ms",
            "÷ stop",
            "checkpoint, s",
            "÷ stop",
            "downtime, ms",
            "longest stall, ms",
            "staging, MiB",
            "image ÷ RAM",
            "CPU, s",
        ];
        let mut text = format!(
            "### NAS Parallel Benchmarks\n\nClass {}, {} of memory, 1 vCPU, no compression, staging \
             of 60 % of memory; one checkpoint after the first iteration. Targets: disk, shm, and \
             disk held to 500 MB/s. \\*: not judged, since what `stop` loses is less than {} times \
             how far the middle half of the undisturbed runs is apart.\n",
            self.class,
            bytes(self.memory_bytes),
            JUDGED_SPREADS
        );
        for kernel in &self.kernels {
            if let Some(error) = &kernel.error {
                text += &format!("\n{}: {error}\n", kernel.kernel.to_uppercase());
            }
            if kernel.targets.is_empty() {
                continue;
            }
            let targets = kernel.targets.iter();
            let rows: Vec<_> = targets
                .flat_map(|target| target.protocols.iter().map(|one| one.row(target)))
                .collect();
            text += &format!(
                "\n{}, {} runs in a row in one guest; undisturbed {} s, longest outage {} ms:\n\n{}\n",
                kernel.kernel.to_uppercase(),
                kernel.repeat,
                cell(kernel.undisturbed_s.as_ref(), 1.0, 2),
                cell(kernel.undisturbed_gap_us.as_ref(), 1e3, 1),
                table(&header, &rows)
            );
            text += &failures(kernel.targets.iter().flat_map(|target| {
                let name = |one: &Figures| format!("{}, {}", target.target, one.protocol);
                let rows = target.protocols.iter();
                rows.map(move |one| (name(one), one.error.clone()))
            }));
        }
        if !self.missing.is_empty() {
            text += &format!(
                "\nNot in this build's guest: {}.\n",
                self.missing.join(", ")
            );
        }
        text
    }

    pub fn kernels(&self) -> &[Kernel] {
        &self.kernels
    }
}

#[cfg(test)]
mod tests {
    use super::super::contender::Staging;
    use super::*;
    use crate::host::Protocol;

    fn figures(protocol: Protocol, added: f64, total: f64) -> Figures {
        let row = Row::new(Contender::Ours(protocol, Staging::Ample));
        Figures {
            added_s: Spread::of([added]),
            total_us: Spread::of([total]),
            ..Figures::new(row, None, 1)
        }
    }

    #[test]
    fn a_loss_within_the_noise_is_not_judged() {
        let mut protocols = [
            figures(Protocol::Stop, 1.0, 2.0),
            figures(Protocol::Threaded, 0.5, 3.0),
        ];
        let runs = Spread::of([10.0, 10.1, 10.9]);
        assert!(compare(&mut protocols, runs, Some(0.2)));
        assert_eq!(protocols[1].overhead_to_stop, Some(0.5));
        assert_eq!(protocols[1].total_to_stop, Some(1.5));
        assert_eq!(protocols[1].gap_to_stop, None);
        assert!(!compare(&mut protocols, runs, Some(0.21)));
        let few = Spread::of([10.0, 10.1]);
        assert!(!compare(&mut protocols, few, Some(0.1)));
        assert!(!compare(&mut protocols[1..], runs, Some(0.1)));
    }
}
