//! Domains that start from one image share its memory until they write it, and are each their own.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::machines::{checkpoint_and_compare, pagewriter_spec};
use common::memory::{assert_same_memory, shadow};
use common::{have_kvm, long, wait_line};
use livepoint::checkpoint::{Chain, Protocol};
use livepoint::guest::Guest;
use livepoint::host::Image;
use livepoint::machine::Machine;
use livepoint::machine::memory::to_be_shared;
use livepoint::machine::spec::MachineSpec;
use livepoint::restore::eager;
use livepoint::store::{FileStorage, ImageReader};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);

/// Where a machine's generation id is.
const GENERATION_ID: u64 = 0xe_f000;

/// A directory with domains of its own, which end with it.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn livepoint(&self, args: &[&str]) -> Output {
        let run = self.path("run");
        let mut command = Command::new(env!("CARGO_BIN_EXE_livepoint"));
        command.arg("--json").arg("--runtime-dir").arg(run);
        command.args(args).output().unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        let output = self.livepoint(args);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{args:?}: {errors}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let listed = self.livepoint(&["list"]);
        let Ok(listed) = serde_json::from_slice::<Value>(&listed.stdout) else {
            return;
        };
        for domain in listed.as_array().into_iter().flatten() {
            self.livepoint(&["destroy", domain["name"].as_str().unwrap_or_default()]);
        }
    }
}

/// Returns how much memory of its own a process has, in bytes.
fn own_memory(pid: u64) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("RssAnon:"))
        .unwrap();
    let kib = line.split_whitespace().nth(1).unwrap();
    kib.parse::<u64>().unwrap() << 10
}

/// The memory once, and less than an eighth of it for each: 16 clones of 512 MiB take less than
/// 1.5 GiB.
#[test]
fn clones_share_memory_until_they_write_it_and_all_compute_on() {
    if !have_kvm() {
        return;
    }
    let (count, mib, class, repeat) = if long() {
        (16, 512, "A", 4)
    } else {
        (4, 128, "W", 36)
    };
    let bench = Bench {
        dir: tempfile::tempdir().unwrap(),
    };
    let xml = bench.path("npb.xml");
    let text = format!(
        "<domain type='kvm'><name>npb</name><memory unit='MiB'>{mib}</memory>\
         <os><type arch='x86_64'>hvm</type><kernel>builtin:npb</kernel>\
         <cmdline>kernel=mg class={class} repeat={repeat}</cmdline></os>\
         <devices><serial type='stdio'><target port='0'/></serial>\
         <memballoon model='none'/></devices></domain>"
    );
    fs::write(&xml, text).unwrap();
    bench.json(&["run", "--detach", xml.to_str().unwrap()]);
    let log = |name: &str| bench.path("run").join(format!("{name}.log"));
    wait_line(&log("npb"), PATIENCE, |line| line.contains(" ready "));
    let image = bench.path("npb.lpi");
    let image = image.to_str().unwrap();
    bench.json(&["checkpoint", "npb", "--out", image]);
    bench.json(&["destroy", "npb"]);

    let number = count.to_string();
    let began = Instant::now();
    let clones = bench.json(&["clone", image, "--count", &number, "--paused"]);
    let started_in = began.elapsed();
    let clones = clones["domains"].as_array().unwrap();
    assert_eq!(clones.len(), count);
    let pids = clones.iter().map(|clone| clone["pid"].as_u64().unwrap());
    let own: Vec<u64> = pids.map(own_memory).collect();
    let in_all = (mib << 20) + own.iter().sum::<u64>();
    println!(
        "{count} clones in {started_in:?}: {} MiB in all",
        in_all >> 20
    );
    assert!(
        in_all < (mib << 20) + count as u64 * (mib << 20) / 8,
        "{own:?}"
    );
    let uuids: HashSet<_> = clones.iter().map(|clone| &clone["uuid"]).collect();
    assert_eq!(uuids.len(), count);
    let mut generations = HashSet::new();
    for clone in clones {
        let name = clone["name"].as_str().unwrap();
        let saved = bench.path("clone.lpi");
        if generations.len() < 4 {
            let saved = saved.to_str().unwrap();
            bench.json(&["checkpoint", name, "--protocol", "stop", "--out", saved]);
            let mut id = [0; 16];
            Image::open(Path::new(saved))
                .unwrap()
                .read(GENERATION_ID, 16, |at, bytes| {
                    id[at..at + bytes.len()].copy_from_slice(bytes);
                })
                .unwrap();
            assert!(generations.insert(id), "a generation id twice");
        }
        bench.json(&["resume", name]);
    }
    for clone in clones {
        let log = log(clone["name"].as_str().unwrap());
        let done = wait_line(&log, PATIENCE * 5, |line| line.starts_with("npb: done"));
        assert!(
            done.starts_with(&format!("npb: done runs={repeat} failed=0")),
            "{done}"
        );
    }
}

fn spec(console: &Path) -> MachineSpec {
    pagewriter_spec(64 << 20, 1, "2m", 20, console)
}

#[test]
fn checkpoints_of_clones_are_exactly_the_memory_of_their_pause() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let console = dir.path().join("console");
    let original = Arc::new(Machine::build(spec(&console)).unwrap());
    original.start(false).unwrap();
    wait_line(&console, PATIENCE, |line| {
        line.starts_with("pagewriter: ready")
    });
    let report = checkpoint_and_compare(&original, None, Protocol::Stop, dir.path());
    let image = report.image.path;
    original.destroy();
    let reader = Arc::new(ImageReader::open(&FileStorage, &image).unwrap());
    let (freezer, regions) = to_be_shared(64 << 20).unwrap();
    eager::fill(&reader, &regions, &eager::FillOptions::default()).unwrap();
    let pristine = shadow(&regions);
    for (from, to) in regions.iter().zip(&pristine) {
        from.mapping.copy_to(0, &to.mapping, 0, from.mapping.len());
    }
    drop(regions);
    let frozen = Arc::new(freezer.freeze().unwrap());
    // All of them are there at the same time, and run in turns: CPUs are few.
    let clones: Vec<(Arc<Machine>, Chain)> = Protocol::CAPTURING
        .iter()
        .map(|_| {
            let mut spec = spec(&console);
            spec.memory.shared = Some(frozen.clone());
            let unfilled = Machine::build_for_restore(spec).unwrap();
            assert_same_memory(unfilled.regions(), &pristine);
            let machine = unfilled.finish_tracked(reader.sections().unwrap()).unwrap();
            let machine = Arc::new(machine);
            let chain = Chain::default();
            let guest: Arc<dyn Guest> = machine.clone();
            chain.adopt(&guest, reader.clone());
            machine.start(true).unwrap();
            (machine, chain)
        })
        .collect();
    for ((machine, chain), protocol) in clones.iter().zip(Protocol::CAPTURING) {
        machine.resume_by_user().unwrap();
        // Increments of the image, and then a whole one.
        for _ in 0..2 {
            checkpoint_and_compare(machine, Some(chain), protocol, dir.path());
        }
        chain.end();
        checkpoint_and_compare(machine, None, protocol, dir.path());
        machine.pause_by_user().unwrap();
    }
    // One that starts over has memory of zeros, not of the image; the others are as they were.
    let (first, _) = &clones[0];
    first.resume_by_user().unwrap();
    first.reset().unwrap();
    wait_line(&console, PATIENCE, {
        let seen = fs::read_to_string(&console).unwrap();
        let before = seen.matches("pagewriter: ready").count();
        let console = console.clone();
        move |_| {
            let now = fs::read_to_string(&console).unwrap();
            now.matches("pagewriter: ready").count() > before
        }
    });
    checkpoint_and_compare(first, None, Protocol::Cow, dir.path());
    drop(clones);
    let untouched = frozen.map_private(0, frozen.len()).unwrap();
    let (mut now, mut then) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    for offset in (0..untouched.len()).step_by(1 << 20) {
        untouched.copy_out(offset, &mut now);
        pristine[0].mapping.copy_out(offset, &mut then);
        assert!(now == then, "a clone has changed what all share");
    }
}
