//! `livepoint demo`: the whole story once, with figures at the end.
//!
//! An NPB kernel runs undisturbed, then with one checkpoint of each protocol; then it is killed
//! after a live checkpoint, restored in a new process, and must verify its own result.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde::Serialize;

use super::Context;
use super::args::DemoArgs;
use super::console_log::number;
use super::output::{Output, bytes, micros, table, to_f64};
use super::scratch::Scratch;
use super::vm_process::VmProcess;
use crate::host::{CheckpointRequest, CheckpointSummary, Domain, DomainChanges, Image, Protocol};

/// The default guest: MG of class B in 1 GiB.
const DOMAIN_XML: &str = include_str!("../../examples/npb-mg.xml");

/// No run of a kernel that fits a demonstration takes this long on hardware that has KVM.
const RUN_TIMEOUT: Duration = Duration::from_secs(600);

/// What is shown beside each other: the traditional way, the paper's, and copy-on-write.
const PROTOCOLS: [Protocol; 3] = [Protocol::Stop, Protocol::Threaded, Protocol::Cow];

/// Share of the iterations after which the checkpoint starts: the working set is at its peak, and
/// most of the work is still to come.
const CHECKPOINT_AFTER: f64 = 0.3;

/// How long the guest runs on after the checkpoint before it is killed.
const RUN_ON: Duration = Duration::from_millis(300);

#[derive(Serialize)]
struct Report {
    kernel: String,
    class: String,
    memory_bytes: u64,
    undisturbed_s: f64,
    protocols: BTreeMap<&'static str, ProtocolFigures>,
    restored_verification: String,
}

#[derive(Serialize)]
struct ProtocolFigures {
    run_s: f64,
    added_s: f64,
    downtime_us: u64,
    guest_gap_us: u64,
    total_s: f64,
    image_bytes: u64,
}

/// What a run of the guest printed at its end.
struct GuestRun {
    seconds: f64,
    gap_us: u64,
    verification: String,
}

pub(super) fn demo(context: &Context, args: &DemoArgs) -> anyhow::Result<ExitCode> {
    let scratch = Scratch::new("livepoint-demo")?;
    let xml = match &args.domain {
        Some(path) => std::fs::read_to_string(path)
            .with_context(|| format!("could not read {}", path.display()))?,
        None => DOMAIN_XML.to_owned(),
    };
    let demo = Demo {
        out: context.output,
        dir: scratch.path().to_owned(),
        images: args
            .images
            .clone()
            .unwrap_or_else(|| scratch.path().join("images")),
        changes: changes(args),
        xml,
    };
    let report = demo.tell(args)?;
    let verified = report.restored_verification == "SUCCESSFUL";
    context.output.print(&report, text);
    Ok(if verified {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn changes(args: &DemoArgs) -> DomainChanges {
    let mut changes = DomainChanges::default();
    if args.domain.is_none() {
        let repeat = args.repeat.unwrap_or(2);
        let (kernel, class) = (&args.kernel, &args.class);
        changes.cmdline = Some(format!("kernel={kernel} class={class} repeat={repeat}"));
    }
    changes
}

struct Demo {
    out: Output,
    dir: PathBuf,
    images: PathBuf,
    changes: DomainChanges,
    xml: String,
}

impl Demo {
    fn tell(&self, args: &DemoArgs) -> anyhow::Result<Report> {
        std::fs::create_dir_all(&self.images)
            .with_context(|| format!("could not make {}", self.images.display()))?;
        let memory_bytes = Domain::memory_bytes_in(&self.xml)?;
        self.out.say(format_args!(
            "1. A VM with {} computes, undisturbed.",
            bytes(memory_bytes)
        ));
        let undisturbed = self.finish(self.start("undisturbed")?)?;
        self.out.say(format_args!(
            "   {:.2} s, Verification = {}",
            undisturbed.seconds, undisturbed.verification
        ));
        let mut protocols = BTreeMap::new();
        for (step, protocol) in (2..).zip(PROTOCOLS) {
            let name = protocol.name();
            self.out.say(format_args!(
                "{step}. Again, with one {name} checkpoint on the way."
            ));
            let figures = self.disturbed(protocol, undisturbed.seconds)?;
            self.out.say(format_args!(
                "   {:.2} s, no vCPU ran for {}",
                figures.run_s,
                micros(figures.downtime_us)
            ));
            protocols.insert(name, figures);
        }
        let restored_verification = self.crash_and_restore()?;
        Ok(Report {
            kernel: args.kernel.to_uppercase(),
            class: args.class.to_uppercase(),
            memory_bytes,
            undisturbed_s: undisturbed.seconds,
            protocols,
            restored_verification,
        })
    }

    fn start(&self, tag: &str) -> anyhow::Result<VmProcess> {
        VmProcess::run(&self.dir, tag, &self.xml, &self.changes)
    }

    /// Waits until the guest is well into its work.
    fn reach_peak(&self, vm: &mut VmProcess) -> anyhow::Result<()> {
        vm.wait_line("its progress", RUN_TIMEOUT, past_share)
            .map(drop)
    }

    fn checkpoint(
        &self,
        vm: &mut VmProcess,
        protocol: Protocol,
        image: &Path,
    ) -> anyhow::Result<CheckpointSummary> {
        let mut request = CheckpointRequest::new(protocol);
        request.out = Some(image.to_owned());
        // MG rewrites nearly half of the memory in every iteration: staging that holds all of it
        // spares the disk the copies that later ones supersede.
        request.max_staging_bytes = Some(Domain::memory_bytes_in(&self.xml)? / 2);
        vm.checkpoint(request)
    }

    fn disturbed(&self, protocol: Protocol, base_s: f64) -> anyhow::Result<ProtocolFigures> {
        let name = protocol.name();
        let mut vm = self.start(name)?;
        self.reach_peak(&mut vm)?;
        let image = self.images.join(format!("{name}.lpi"));
        let summary = self.checkpoint(&mut vm, protocol, &image)?;
        let run = self.finish(vm)?;
        ensure!(
            run.verification == "SUCCESSFUL",
            "the guest's result is wrong after a {name} checkpoint"
        );
        std::fs::remove_file(&image)
            .with_context(|| format!("could not remove {}", image.display()))?;
        Ok(ProtocolFigures {
            run_s: run.seconds,
            added_s: run.seconds - base_s,
            downtime_us: summary.figures.downtime_us,
            guest_gap_us: run.gap_us,
            total_s: to_f64(summary.figures.total_us) / 1e6,
            image_bytes: summary.image_bytes,
        })
    }

    fn crash_and_restore(&self) -> anyhow::Result<String> {
        self.out
            .say("5. Again, with a threaded checkpoint; then the VM is killed (SIGKILL).");
        let mut vm = self.start("killed")?;
        self.reach_peak(&mut vm)?;
        let image = self.images.join("crash.lpi");
        self.checkpoint(&mut vm, Protocol::Threaded, &image)?;
        std::thread::sleep(RUN_ON);
        let progress = last_progress(&vm.console().text()?);
        vm.kill();
        self.out.say(format_args!("   killed at: {progress}"));
        self.out
            .say("6. It is restored from the image, in a new process.");
        let name = Image::open(&image)?.name().to_owned();
        let restored = VmProcess::restore(&self.dir, "restored", &name, &image)?;
        let run = self.finish(restored)?;
        self.out
            .say(format_args!("   Verification = {}", run.verification));
        Ok(run.verification)
    }

    fn finish(&self, mut vm: VmProcess) -> anyhow::Result<GuestRun> {
        let done = vm.wait_line("its last line", RUN_TIMEOUT, |line| {
            line.starts_with("npb: done")
        })?;
        let text = vm.console().text()?;
        vm.wait_end(Duration::from_secs(30))?;
        let verified: Vec<_> = text
            .lines()
            .filter_map(|line| line.split_once("Verification = "))
            .collect();
        let all_hold = !verified.is_empty() && verified.iter().all(|(_, v)| v.starts_with("SUCC"));
        Ok(GuestRun {
            seconds: number(&done, "time_s")?,
            gap_us: number(&done, "max_gap_us")?,
            verification: if all_hold {
                "SUCCESSFUL"
            } else {
                "UNSUCCESSFUL"
            }
            .to_owned(),
        })
    }
}

/// Returns whether a progress line (`run R/N iteration I/M`) is past [`CHECKPOINT_AFTER`].
fn past_share(line: &str) -> bool {
    share_done(line).is_some_and(|share| share >= CHECKPOINT_AFTER)
}

/// Returns the share of the work that a progress line says is done.
fn share_done(line: &str) -> Option<f64> {
    let after = |word: &str| {
        let (_, rest) = line.split_once(word)?;
        let (done, of) = rest.split_whitespace().next()?.split_once('/')?;
        Some((done.parse::<f64>().ok()?, of.parse::<f64>().ok()?))
    };
    let (iteration, iterations) = after(" iteration ")?;
    let (run, runs) = after(" run ").unwrap_or((1.0, 1.0));
    Some((run - 1.0 + iteration / iterations) / runs)
}

fn last_progress(console: &str) -> String {
    let last = console
        .lines()
        .rev()
        .find(|line| share_done(line).is_some());
    last.unwrap_or("its start").to_owned()
}

fn text(report: &Report) -> String {
    let mut rows = vec![vec![
        "undisturbed".to_owned(),
        format!("{:.2} s", report.undisturbed_s),
        String::new(),
        String::new(),
        String::new(),
        String::new(),
        String::new(),
    ]];
    let figures_of = |protocol: Protocol| report.protocols.get_key_value(protocol.name());
    for (name, figures) in PROTOCOLS.into_iter().filter_map(figures_of) {
        rows.push(vec![
            (*name).to_owned(),
            format!("{:.2} s", figures.run_s),
            format!("{:+.2} s", figures.added_s),
            micros(figures.downtime_us),
            micros(figures.guest_gap_us),
            format!("{:.2} s", figures.total_s),
            bytes(figures.image_bytes),
        ]);
    }
    let header = [
        "",
        "run time",
        "added",
        "downtime",
        "longest gap in guest",
        "checkpoint",
        "image",
    ];
    format!(
        "\n{} class {}, {} of memory:\n\n{}\n\nRestored after SIGKILL: Verification = {}",
        report.kernel,
        report.class,
        bytes(report.memory_bytes),
        table(&header, &rows),
        report.restored_verification
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_counts_runs_and_iterations() {
        let share = share_done("npb: MG class B run 2/4 iteration 10/20 tsc=5").unwrap();
        assert!((share - 0.375).abs() < 1e-9);
        assert!(past_share("npb: MG class B iteration 7/20 tsc=5"));
        assert!(!past_share("npb: MG class B run 1/4 iteration 20/20 tsc=5"));
        assert!(share_done("npb: start").is_none());
    }
}
