//! `livepoint bench`: a short run of it, for what programs read from it.
#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::path::Path;
use std::process::{Command, Output};

use common::have_kvm;
use serde_json::Value;

fn bench(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_livepoint"))
        .args(["--json", "bench", "--images"])
        .arg(dir)
        .args(args)
        .output()
        .unwrap()
}

/// Returns the row of a contender.
fn row<'a>(target: &'a Value, contender: &str) -> &'a Value {
    let rows = target["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["contender"] == contender);
    row.unwrap_or_else(|| panic!("no row {contender} in {target}"))
}

#[test]
fn lost_work_is_reported_for_every_target_and_contender() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("report");
    let output = bench(
        dir.path(),
        &[
            "--suite=lost-work",
            "--runs=1",
            "--memory=128M",
            "--protocols=stop,threaded",
            "--out",
            out.to_str().unwrap(),
        ],
    );
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["host"]["cpus"].as_u64().unwrap() >= 1);
    assert_eq!(report["runs"], 1);
    let suite = &report["suites"]["lost-work"];
    assert_eq!(suite["memory_bytes"], 128 << 20);
    let targets = suite["targets"].as_array().unwrap();
    let names: Vec<_> = targets.iter().map(|target| &target["target"]).collect();
    assert_eq!(names, ["shm", "disk-500"]);
    for target in targets {
        for contender in ["none", "stop", "threaded", "threaded-default-staging"] {
            let row = row(target, contender);
            assert!(row["error"].is_null(), "{row}");
            for order in ["first", "second"] {
                assert!(row[order]["lost_ms"]["median"].is_f64(), "{row}");
                assert!(row[order]["difference_ms"]["median"].is_f64(), "{row}");
                assert!(row[order]["guest_gap_ms"]["max"].is_f64(), "{row}");
            }
            assert!(row["trace"].as_array().unwrap().len() > 30, "{row}");
        }
    }
    // A guest that stands still loses about what it stands still for; other work on the host may
    // hide much of it.
    let stop = &row(&targets[1], "stop")["first"];
    let (lost, downtime) = (&stop["lost_ms"]["median"], &stop["downtime_ms"]["median"]);
    assert!(
        lost.as_f64().unwrap() > 0.25 * downtime.as_f64().unwrap(),
        "{stop}"
    );
    assert!(suite["ratios"].as_array().unwrap().len() >= 4);
    for file in [
        "report.md",
        "report.json",
        "rate-shm.svg",
        "rate-disk-500.svg",
    ] {
        assert!(out.join(file).exists(), "{file}");
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

#[test]
fn a_mistake_on_the_command_line_is_told_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    for wrong in [
        "--suite=everything",
        "--protocols=magic",
        "--peer=xen",
        "--runs=0",
        "--sizes=1X",
    ] {
        let output = bench(dir.path(), &[wrong]);
        assert_eq!(output.status.code(), Some(2), "{wrong}");
    }
    let output = bench(dir.path(), &["--suite=npb", "--kernels=zz"]);
    assert_eq!(output.status.code(), Some(1));
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("no NPB kernel zz"), "{errors}");
}
