//! A checkpoint every second, for a while: none is missed, nothing grows, and what is kept is whole.
#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::memory::read_page;
use common::pagewriter::assert_single_moment;
use common::{have_kvm, long, machine_memory, wait_line, whole_lines};
use livepoint::restore::eager;
use livepoint::store::{FileStorage, ImageReader};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

/// How many images are kept.
const KEEP: usize = 10;

/// A `livepoint run`, which ends with this.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn livepoint(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_livepoint"));
    command
        .arg("--json")
        .arg("--runtime-dir")
        .arg(dir.join("run"));
    command
}

/// Returns a figure in KiB of a process, as in `VmRSS`.
fn kib(pid: u32, key: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with(key)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

fn images(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    let mut found: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// Returns what the files in a directory take on disk, in MiB.
fn disk_mib(dir: &Path) -> u64 {
    let entries = fs::read_dir(dir).unwrap();
    // One may be removed meanwhile.
    let sizes = entries.filter_map(|entry| Some(entry.ok()?.metadata().ok()?.blocks() * 512));
    sizes.sum::<u64>() >> 20
}

/// Pages that the guest has written, by its own count, and when, by its own clock, in its ticks.
fn ticks(console: &Path) -> Vec<(u64, u64)> {
    let text = fs::read_to_string(console).unwrap_or_default();
    let field = |line: &str, key: &str| {
        line.split_whitespace()
            .find_map(|word| word.strip_prefix(key)?.parse::<u64>().ok())
    };
    whole_lines(&text)
        .lines()
        .filter(|line| line.starts_with("tick cpu=0 "))
        .filter_map(|line| Some((field(line, "tsc=")?, field(line, "pages=")?)))
        .collect()
}

fn rate(ticks: &[(u64, u64)]) -> f64 {
    let ((t0, p0), (t1, p1)) = (ticks[0], ticks[ticks.len() - 1]);
    #[expect(clippy::cast_precision_loss, reason = "counts of pages and cycles")]
    let rate = (p1 - p0) as f64 / (t1 - t0).max(1) as f64;
    rate
}

#[test]
fn a_checkpoint_every_second_keeps_pace_and_grows_nothing() {
    if !have_kvm() {
        return;
    }
    let (mib, count, rate_bytes) = if long() {
        (1024, 300, 100_000_000)
    } else {
        (128, 14, 12_000_000)
    };
    let dir = tempfile::tempdir().unwrap();
    let (xml, console) = (dir.path().join("soak.xml"), dir.path().join("console"));
    let text = format!(
        "<domain type='kvm'><name>soak</name><memory unit='MiB'>{mib}</memory>\
         <os><type arch='x86_64'>hvm</type><kernel>builtin:pagewriter</kernel>\
         <cmdline>ws_percent=10 rate={rate_bytes} pattern=random write=page fill=incompressible \
         fill_percent=50 tick_ms=100</cmdline></os>\
         <devices><serial type='stdio'><target port='0'/></serial>\
         <memballoon model='none'/></devices></domain>"
    );
    fs::write(&xml, text).unwrap();
    let mut run = livepoint(dir.path());
    run.arg("run").arg(&xml).stdin(Stdio::null());
    let child = run.stdout(File::create(&console).unwrap()).spawn().unwrap();
    let running = Running(child);
    let pid = running.0.id();
    wait_line(&console, PATIENCE, |line| {
        line.starts_with("pagewriter: ready")
    });
    std::thread::sleep(Duration::from_secs(3));
    let before = rate(&ticks(&console));
    let chain = dir.path().join("images");
    fs::create_dir(&chain).unwrap();
    let seen = ticks(&console).len();
    let number = (count + 1).to_string();
    let series = livepoint(dir.path())
        .args([
            "checkpoint",
            "soak",
            "--protocol",
            "threaded",
            "--codec",
            "none",
        ])
        .arg("--out")
        .arg(&chain)
        .args(["--every", "1s", "--keep", "10", "--count", &number])
        .stdout(File::create(dir.path().join("series")).unwrap())
        .spawn()
        .unwrap();
    let mut series = Running(series);
    // Once the chain is as long as it gets, and staging is there.
    let began = Instant::now();
    let settled = Duration::from_secs(if long() { 40 } else { 12 });
    while began.elapsed() < settled {
        std::thread::sleep(Duration::from_millis(200));
    }
    let (memory, open) = (kib(pid, "VmRSS:"), descriptors(pid));
    let disk = disk_mib(&chain);
    let status = loop {
        if let Some(status) = series.0.try_wait().unwrap() {
            break status;
        }
        let most = Duration::from_secs(count) * 3 + PATIENCE;
        assert!(began.elapsed() < most, "it does not end");
        std::thread::sleep(Duration::from_millis(50));
    };
    assert!(status.success(), "{status}");
    let during = rate(&ticks(&console)[seen..]);
    let said = fs::read_to_string(dir.path().join("series")).unwrap();
    let last = said.trim_end().rfind("\n{").map_or(0, |at| at + 1);
    let series: Value = serde_json::from_str(&said[last..]).unwrap();
    let (memory_after, open_after) = (kib(pid, "VmRSS:"), descriptors(pid));
    let disk_after = disk_mib(&chain);
    println!(
        "{series}; speed {:.3} of before; memory {memory} to {memory_after} KiB, descriptors {open} \
         to {open_after}, disk {disk} to {disk_after} MiB in {} images",
        during / before,
        images(&chain).len()
    );
    assert_eq!(series["failed"], 0, "{series}");
    assert_eq!(series["taken"], count + 1, "{series}");
    assert!(memory_after < memory + memory / 10 + (16 << 10), "it grows");
    assert!(
        open_after <= open + 4,
        "descriptors: {open} to {open_after}"
    );
    assert!(
        disk_after < disk + disk / 2 + 64,
        "disk: {disk} to {disk_after} MiB"
    );
    if long() {
        // With the machine to itself; the short form asks nothing of its speed.
        assert_eq!(series["missed"], 0, "{series}");
        assert!(during > before * 0.95, "slowed to {}", during / before);
    }
    drop(running);
    let left = images(&chain);
    // Each image is needed by no more than as many after it as are kept.
    assert!((KEEP..=2 * KEEP).contains(&left.len()), "{left:?}");
    for image in left.iter().rev().take(KEEP) {
        let reader = ImageReader::open(&FileStorage, image).unwrap();
        let memory = machine_memory(&reader.manifest().regions, 0);
        eager::fill(&reader, &memory, &eager::FillOptions::default()).unwrap();
        let seen = assert_single_moment(|gpa, out| read_page(&memory, gpa, out), 17);
        assert!(seen.working_set_pages > 0);
    }
}
