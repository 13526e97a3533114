//! Workers that are confined: they do all that others do, and nothing else.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use common::have_kvm;
use common::livepointd::Daemon;

const PATIENCE: Duration = Duration::from_secs(120);

/// Every way to take a checkpoint.
const PROTOCOLS: [&str; 4] = ["stop", "precopy", "threaded", "cow"];

/// Returns a line of what the kernel tells of a domain's process.
fn status(daemon: &Daemon, name: &str, key: &str) -> String {
    let pid = daemon.worker(name)["pid"].to_string();
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(key));
    let value = value.unwrap_or_else(|| panic!("no {key} in {text}"));
    value.trim_start_matches(':').trim().to_owned()
}

fn has_landlock() -> bool {
    let lists = fs::read_to_string("/sys/kernel/security/lsm");
    // Where it cannot be read, the kernel's own log tells.
    lists.map_or_else(|_| probe_landlock(), |lists| lists.contains("landlock"))
}

fn probe_landlock() -> bool {
    let version = "import ctypes, sys; \
                   sys.exit(ctypes.CDLL(None).syscall(444, None, 0, 1) < 1)";
    let probe = std::process::Command::new("/usr/bin/python3");
    let mut probe = probe;
    probe.args(["-c", version]).status().unwrap().success()
}

/// A domain that writes to its disk, and checks disk and memory against one another.
fn define_writer(daemon: &Daemon) {
    let disk = daemon.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(2 << 20).unwrap();
    let devices = format!(
        "<disk type='file' device='disk'><source file='{}'/><target dev='vda' bus='virtio'/></disk>\
         <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>\
         <serial type='file'><source path='{}' append='on'/></serial>",
        disk.display(),
        daemon.path("console").display()
    );
    let file = daemon.domain("d", "virtio places=256 tick=8", 64, &devices);
    daemon.ok(&["define", file.to_str().unwrap()]);
}

/// Waits until the guest has found, after what it has printed so far, that disk and memory fit.
fn wait_check(daemon: &Daemon) {
    let console = daemon.path("console");
    let before = fs::read_to_string(&console).unwrap_or_default().len();
    let start = Instant::now();
    loop {
        let text = fs::read_to_string(&console).unwrap_or_default();
        assert!(!text.contains("WRONG") && !text.contains("PANIC"), "{text}");
        let new = text.get(before..).unwrap_or_default();
        if new.matches("virtio: blk checked").count() >= 2 {
            return;
        }
        assert!(start.elapsed() < PATIENCE, "{text}\n{}", daemon.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Takes a snapshot by `protocol`, and returns the one that was used.
fn snapshot(daemon: &Daemon, protocol: &str) -> String {
    let xml = daemon.path("snapshot.xml");
    let document = format!(
        "<domainsnapshot><name>{protocol}</name>\
         <checkpoint xmlns='urn:livepoint:1' protocol='{protocol}'/></domainsnapshot>"
    );
    fs::write(&xml, document).unwrap();
    daemon.ok(&["snapshot-create", "d", xml.to_str().unwrap()]);
    let stats = ["domjobinfo", "d", "--completed", "--rawstats", "--anystats"];
    let stats = daemon.ok(&stats);
    let used = stats
        .lines()
        .find_map(|line| line.strip_prefix("livepoint.protocol: "));
    used.unwrap_or_else(|| panic!("{stats}")).trim().to_owned()
}

/// Has a domain do all that domains do: checkpoints by every protocol, reverts, saves, a dump.
fn live_a_whole_life(daemon: &Daemon, look: impl Fn()) {
    define_writer(daemon);
    daemon.ok(&["start", "d"]);
    look();
    wait_check(daemon);
    for protocol in PROTOCOLS {
        assert_eq!(snapshot(daemon, protocol), protocol);
        wait_check(daemon);
    }
    daemon.ok(&["snapshot-revert", "d", "cow"]);
    wait_check(daemon);
    daemon.kill_worker("d");
    daemon.ok(&["snapshot-revert", "d", "threaded"]);
    wait_check(daemon);
    // Into directories that the process itself cannot write.
    let elsewhere = daemon.path("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    let path = |name: &str| elsewhere.join(name).to_str().unwrap().to_owned();
    let memory = format!("file={},snapshot=external", path("memory"));
    daemon.ok(&[
        "snapshot-create-as",
        "d",
        "external",
        "--live",
        "--memspec",
        &memory,
    ]);
    daemon.ok(&["dump", "d", &path("core"), "--memory-only", "--live"]);
    daemon.ok(&["snapshot-revert", "d", "external"]);
    look();
    wait_check(daemon);
    daemon.ok(&["save", "d", &path("saved")]);
    daemon.ok(&["restore", &path("saved")]);
    wait_check(daemon);
    daemon.ok(&["managedsave", "d"]);
    daemon.ok(&["start", "d"]);
    wait_check(daemon);
    daemon.ok(&["destroy", "d"]);
    let mut names: Vec<_> = fs::read_dir(&elsewhere)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["core", "memory", "saved"]);
    assert!(!daemon.path("run/d.sock").exists());
    let log = fs::read_to_string(daemon.path("var/log/d.log")).unwrap();
    for trouble in ["ERROR", "panicked"] {
        assert!(!log.contains(trouble), "{log}");
    }
    assert!(!has_landlock() || !log.contains("WARN"), "{log}");
}

/// Has a guest start over, whose kernel is a file, and power off by itself.
fn start_over(daemon: &Daemon) {
    let kernel = daemon.path("echo.elf");
    fs::write(&kernel, livepoint::guests::find("echo").unwrap().elf).unwrap();
    let console = daemon.path("echo.console");
    let serial = format!(
        "<serial type='file'><source path='{}' append='on'/></serial>",
        console.display()
    );
    let file = daemon.domain("echo", "echo", 64, &serial);
    let xml = fs::read_to_string(&file).unwrap();
    let xml = xml.replace("builtin:echo", kernel.to_str().unwrap());
    fs::write(&file, xml).unwrap();
    daemon.ok(&["define", file.to_str().unwrap()]);
    daemon.ok(&["start", "echo"]);
    let ready = |times: usize| {
        let start = Instant::now();
        loop {
            let text = fs::read_to_string(&console).unwrap_or_default();
            if text.matches("echo: ready").count() == times {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{text}\n{}", daemon.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    ready(1);
    daemon.ok(&["reset", "echo"]);
    ready(2);
    daemon.ok(&["shutdown", "echo"]);
    daemon.wait_state("echo", "shut off");
    let state = daemon.ok(&["domstate", "echo", "--reason"]);
    assert_eq!(state, "shut off (shutdown)");
}

#[test]
fn a_confined_worker_does_all_that_it_is_there_for() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    live_a_whole_life(&daemon, || {
        assert_eq!(status(&daemon, "d", "Seccomp"), "2");
        assert_eq!(status(&daemon, "d", "NoNewPrivs"), "1");
        // CAP_SYS_NICE stays where the limit of priorities cannot be raised, as in a container.
        let left = status(&daemon, "d", "CapEff");
        assert!(
            ["0000000000000000", "0000000000800000"].contains(&left.as_str()),
            "{left}"
        );
    });
    start_over(&daemon);
}

#[test]
fn a_confined_worker_is_denied_files_that_its_domain_does_not_name_and_goes_on() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    define_writer(&daemon);
    daemon.ok(&["start", "d"]);
    wait_check(&daemon);
    let image = daemon.path("image.lpi");
    let said = checkpoint_to(&daemon, &image);
    if has_landlock() {
        assert!(said.contains("error") && said.contains("denied"), "{said}");
        assert!(!image.exists());
    } else {
        common::skip("files of a confined worker", "this kernel has no Landlock");
    }
    // That was all: the guest runs, and is saved as ever.
    wait_check(&daemon);
    assert_eq!(snapshot(&daemon, "cow"), "cow");
    daemon.ok(&["destroy", "d"]);
}

/// Has the worker itself write an image; returns its answer.
fn checkpoint_to(daemon: &Daemon, image: &Path) -> String {
    let command = serde_json::json!({
        "execute": "livepoint-checkpoint",
        "arguments": { "protocol": "stop", "out": image },
    });
    let started = daemon.ok(&["qemu-monitor-command", "d", &command.to_string()]);
    let answer: serde_json::Value = serde_json::from_str(&started).unwrap();
    let Some(job) = answer["return"]["job"].as_u64() else {
        return started;
    };
    let wait = serde_json::json!({ "execute": "livepoint-job-wait", "arguments": { "job": job } });
    daemon.ok(&["qemu-monitor-command", "d", &wait.to_string()])
}

#[test]
fn a_directory_of_images_is_written_by_the_worker_itself() {
    if !have_kvm() {
        return;
    }
    let images = tempfile::tempdir().unwrap();
    let daemon = Daemon::with(&["--image-dir", images.path().to_str().unwrap()]);
    define_writer(&daemon);
    daemon.ok(&["start", "d"]);
    wait_check(&daemon);
    let image = images.path().join("image.lpi");
    let said = checkpoint_to(&daemon, &image);
    assert!(image.exists(), "{said}");
    let saved = images.path().join("saved");
    daemon.ok(&["save", "d", saved.to_str().unwrap()]);
    daemon.ok(&["restore", saved.to_str().unwrap()]);
    wait_check(&daemon);
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn a_worker_of_another_user_does_all_that_it_is_there_for() {
    if !have_kvm() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        common::skip("workers of another user", "only root starts them");
        return;
    }
    let daemon = Daemon::with(&["--worker-user", "nobody"]);
    let nobody = fs::read_to_string("/etc/passwd").unwrap();
    let nobody = nobody
        .lines()
        .find(|line| line.starts_with("nobody:"))
        .unwrap();
    let uid = nobody.split(':').nth(2).unwrap().to_owned();
    live_a_whole_life(&daemon, || {
        let uids = status(&daemon, "d", "Uid");
        assert!(
            uids.split_whitespace().all(|of_process| of_process == uid),
            "{uids}"
        );
    });
    start_over(&daemon);
}

#[test]
fn what_is_switched_off_is_off() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::with(&["--seccomp", "off", "--no-landlock"]);
    define_writer(&daemon);
    daemon.ok(&["start", "d"]);
    assert_eq!(status(&daemon, "d", "NoNewPrivs"), "0");
    wait_check(&daemon);
    let image = daemon.path("image.lpi");
    let said = checkpoint_to(&daemon, &image);
    assert!(image.exists(), "{said}");
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn a_daemon_that_was_told_nonsense_says_so() {
    let mut child = std::process::Command::new(env!("CARGO_BIN_EXE_livepointd"));
    let dir = tempfile::tempdir().unwrap();
    for name in ["--config-dir", "--state-dir", "--runtime-dir"] {
        child.arg(name).arg(dir.path().join("d"));
    }
    let output = child
        .args(["--worker-user", "no-such-user"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!output.status.success());
    assert!(
        said.contains("--worker-user: there is no user no-such-user"),
        "{said}"
    );
}
