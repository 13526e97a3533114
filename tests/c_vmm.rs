//! VMMs that are not ours, in C, whose guests are checkpointed through the C ABI.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use common::c::{compile, guest_file, root, run};
use common::{have_kvm, wait_line};

/// How long a loaded machine may take for a checkpoint.
const PATIENCE: Duration = Duration::from_secs(120);

/// Runs of the guest's computation, some 10 ms each: it must outlast a checkpoint, by a library
/// that is not optimised too.
const REPEAT: u32 = if cfg!(debug_assertions) { 1500 } else { 500 };

/// Kills the VMM if the test has not.
struct Vmm(Child);

impl Drop for Vmm {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

struct Place {
    dir: tempfile::TempDir,
    program: PathBuf,
    kernel: PathBuf,
}

impl Place {
    /// Compiles the program; `flags` may name another header.
    fn new(flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self {
            program: compile(dir.path(), "examples/c/own_vmm.c", flags),
            kernel: guest_file(dir.path(), "npb"),
            dir,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Starts a guest that computes and checks itself, and checkpoints it.
    fn start(&self, image: &Path, protocol: &str) -> Vmm {
        let log = |name: &str| File::create(self.path(&format!("{protocol}.{name}"))).unwrap();
        let child = Command::new(&self.program)
            .arg(&self.kernel)
            .arg(format!("kernel=mg class=S repeat={REPEAT}"))
            .arg(image)
            .arg(protocol)
            .arg("check")
            .stdin(Stdio::null())
            .stdout(log("console"))
            .stderr(log("log"))
            .spawn()
            .unwrap();
        Vmm(child)
    }
}

/// Checkpoints a VM that runs, kills its VMM, and lets another go on from the image.
fn checkpoint_kill_and_restore(place: &Place, protocol: &str) {
    let image = place.path(&format!("{protocol}.lpi"));
    let mut vmm = place.start(&image, protocol);
    // The program has compared every page of the image with memory as it was in the pause.
    let log = place.path(&format!("{protocol}.log"));
    let compared = wait_line(&log, PATIENCE, |line| line.contains("pages differ"));
    assert!(
        compared.contains(" 0 of 32768 pages differ"),
        "{protocol}: {compared}"
    );
    // A guest that is faster than a loaded machine's checkpoint has ended by now.
    if vmm.0.try_wait().unwrap().is_none() {
        vmm.0.kill().unwrap();
        vmm.0.wait().unwrap();
        let before = fs::read_to_string(place.path(&format!("{protocol}.console"))).unwrap();
        assert!(!before.contains("npb: done"), "{protocol}");
    }

    let restored = run(Command::new(&place.program).arg("--restore").arg(&image));
    let console = String::from_utf8_lossy(&restored.stdout);
    assert!(
        console.contains(&format!("npb: done runs={REPEAT} failed=0")),
        "{protocol}: {console}"
    );
    assert!(!console.contains("UNSUCCESSFUL"), "{protocol}: {console}");
    println!("{protocol}: {}", fs::read_to_string(&log).unwrap().trim());
}

#[test]
fn a_vmm_that_is_not_ours_checkpoints_its_running_vm_is_killed_and_goes_on() {
    if !have_kvm() {
        return;
    }
    let place = Place::new(&[]);
    for protocol in ["stop", "precopy", "threaded", "cow", "auto"] {
        checkpoint_kill_and_restore(&place, protocol);
    }
}

#[test]
fn a_vmm_compiled_against_an_older_header_does_the_same() {
    if !have_kvm() {
        return;
    }
    // The header with which guests of other VMMs came.
    let old = root().join("ffi-tests/old/guests");
    let place = Place::new(&["-I", old.to_str().unwrap()]);
    checkpoint_kill_and_restore(&place, "threaded");
}

#[test]
fn a_vmm_with_threads_signals_and_devices_of_its_own_keeps_them_and_has_whole_images() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "ffi-tests/foreign.c", &[]);
    let output = run(Command::new(program).arg(dir.path()));
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    assert!(said.ends_with("foreign: done\n"), "{said}");
}
