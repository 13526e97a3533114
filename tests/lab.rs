//! The lab: livepoint on ordinary KVM and an older kernel, with guests that this machine's own
//! `/dev/kvm` may not be able to run. See tests/lab/README.md.
//!
//! All checks share one L1 machine, which is booted by the first of them.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::{Arguments, Failed, Trial};

/// How long one job may take, on a host that is busy with others.
const JOB_TIMEOUT: Duration = Duration::from_secs(1500);

/// The same in the long form, in which jobs do more.
const LONG_JOB_TIMEOUT: Duration = Duration::from_secs(5400);

/// How long L1 may run at most, in seconds.
const L1_SECONDS: u32 = 3600;

/// The same in the long form.
const LONG_L1_SECONDS: u32 = 4 * 3600;

/// A line of jobs whose guest has a root file system of its own.
const NEEDS_ROOT: &str = "# needs: prepare-root";

/// Jobs of the long form only (`LIVEPOINT_LONG=1`): they take minutes each.
const LONG_JOBS: &[(&str, &str)] = &[
    (
        "a_stock_kernel_on_four_cpus_computes_on_through_checkpoints_of_every_protocol",
        "linux-checkpoint",
    ),
    (
        "a_debian_with_systemd_a_database_and_dpkg_at_work_comes_back_healthy",
        "linux-root",
    ),
    (
        "consoles_of_a_stock_kernel_answer_on_through_checkpoints_of_every_protocol",
        "linux-console",
    ),
];

/// What each job proves is said at its beginning.
const JOBS: &[(&str, &str)] = &[
    (
        "built_in_guests_run_on_through_checkpoints_of_every_protocol",
        "builtin",
    ),
    (
        "a_stock_kernel_boots_to_a_shell_and_powers_off",
        "linux-boot",
    ),
    (
        "a_stock_kernel_keeps_on_its_disk_what_it_has_synced",
        "linux-disk",
    ),
    (
        "what_a_stock_kernel_has_reported_is_on_its_disk_after_a_crash_and_a_restore",
        "linux-crash",
    ),
    (
        "the_same_holds_on_a_file_system_with_reflink_which_freezes_the_disks",
        "linux-crash-xfs",
    ),
    (
        "two_restores_of_one_image_are_machines_of_their_own_each_with_the_clock_asked_for",
        "linux-clones",
    ),
    (
        "a_stock_kernel_lives_its_life_under_virsh_and_goes_back_to_its_snapshots",
        "virsh",
    ),
    (
        "a_stock_kernel_gives_memory_back_and_takes_it_again",
        "linux-balloon",
    ),
];

/// The L1 machine, while it runs.
struct Lab {
    boot: Child,
    /// Where what it boots is.
    lab: PathBuf,
    share: tempfile::TempDir,
    setting: String,
    jobs: u32,
}

fn is_long() -> bool {
    env::var_os("LIVEPOINT_LONG").is_some_and(|value| value == "1")
}

/// Where the scripts are.
fn scripts() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lab")
}

/// Makes what the lab boots, unless it is there.
fn prepare(script: &str, lab: &Path) -> Result<(), Failed> {
    let prepared = Command::new(scripts().join(script)).arg(lab).output()?;
    if prepared.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&prepared.stderr);
    Err(format!("tests/lab/{script} failed: {said}").into())
}

impl Lab {
    fn start() -> Result<Self, Failed> {
        // Beside the test programs, in the target directory, whatever profile they are of.
        let program = Path::new(env!("CARGO_BIN_EXE_livepoint"));
        let target = program.ancestors().nth(2).expect("target/profile/program");
        let lab = target.join("lab");
        prepare("prepare", &lab)?;
        let share = tempfile::tempdir_in(target)?;
        let seconds = if is_long() {
            LONG_L1_SECONDS
        } else {
            L1_SECONDS
        };
        // Its standard input is the lifeline: L1 ends with this process.
        let boot = Command::new(scripts().join("boot"))
            .arg(share.path())
            .env("LAB_DIR", &lab)
            .env("LAB_SECONDS", seconds.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()?;
        let checkpoints = if is_long() { 20 } else { 5 };
        let setting = format!(
            "export LAB='{}' LAB_DIR='{}' LIVEPOINT='{}' LAB_CHECKPOINTS={checkpoints}\n\
             . \"$LAB/functions\"\n",
            scripts().display(),
            lab.display(),
            program.display()
        );
        Ok(Self {
            boot,
            lab,
            share,
            setting,
            jobs: 0,
        })
    }

    /// Runs a job script; its output is the error where it fails.
    fn run(&mut self, job: &str) -> Result<(), Failed> {
        self.jobs += 1;
        let file = |ending: &str| self.share.path().join(format!("{}.{ending}", self.jobs));
        let script = fs::read_to_string(scripts().join("jobs").join(format!("{job}.sh")))?;
        if script.lines().any(|line| line == NEEDS_ROOT) {
            prepare("prepare-root", &self.lab)?;
        }
        let timeout = if is_long() {
            LONG_JOB_TIMEOUT
        } else {
            JOB_TIMEOUT
        };
        let unfinished = file("new");
        fs::write(&unfinished, format!("{}{script}", self.setting))?;
        fs::rename(&unfinished, file("sh"))?;
        let start = Instant::now();
        let log = || fs::read_to_string(file("log")).unwrap_or_default();
        // Where L1's own kernel is in trouble, its console tells.
        let failed = |what: String| {
            let console = fs::read_to_string(self.share.path().join("console")).unwrap_or_default();
            let lines = console.lines().collect::<Vec<_>>();
            let end = lines[lines.len().saturating_sub(20)..].join("\n");
            format!("{job} {what}:\n{}\nthe end of L1's console:\n{end}", log())
        };
        loop {
            if let Ok(status) = fs::read_to_string(file("status")) {
                if status.trim() == "0" {
                    println!("{job}: {:.0} s\n{}", start.elapsed().as_secs_f64(), log());
                    return Ok(());
                }
                return Err(failed(format!("ended with {}", status.trim())).into());
            }
            if let Some(status) = self.boot.try_wait()? {
                return Err(failed(format!("was under way when L1 ended with {status}")).into());
            }
            if start.elapsed() > timeout {
                // Nothing else can run in this L1: the job still does.
                drop(self.boot.stdin.take());
                return Err(failed(format!("did not end in {} s", timeout.as_secs())).into());
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        // Both fail only where L1 has ended by itself.
        drop(fs::write(self.share.path().join("stop"), ""));
        drop(self.boot.wait());
    }
}

fn check(lab: &Mutex<Option<Lab>>, name: &str, job: &str) -> Result<(), Failed> {
    if env::var_os("LIVEPOINT_NO_LAB").is_some_and(|value| value == "1") {
        common::skip(name, "LIVEPOINT_NO_LAB=1");
        return Ok(());
    }
    if cfg!(debug_assertions) {
        // Emulated, it compresses a piece of memory in seconds, which the watchdog does not wait for.
        common::skip(
            name,
            "a debug build is too slow in an emulated machine: use --release",
        );
        return Ok(());
    }
    let mut lab = lab.lock().unwrap_or_else(PoisonError::into_inner);
    if lab.is_none() {
        *lab = Some(Lab::start()?);
    }
    lab.as_mut().expect("started above").run(job)
}

fn main() {
    let lab = Arc::new(Mutex::new(None));
    let long_jobs = if is_long() { LONG_JOBS } else { &[] };
    let trials = JOBS
        .iter()
        .chain(long_jobs)
        .map(|&(name, job)| {
            let lab = lab.clone();
            Trial::test(name, move || check(&lab, name, job))
        })
        .collect();
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    drop(lab.lock().unwrap_or_else(PoisonError::into_inner).take());
    conclusion.exit();
}
