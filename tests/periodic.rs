//! Checkpoints at an interval that a domain's own document asks for.
#![cfg(feature = "cli")]
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::livepointd::Daemon;
use common::memory::read_page;
use common::pagewriter::assert_single_moment;
use common::victim::{Victim, images_in, livepoint};
use common::{have_kvm, machine_memory, wait_line};
use livepoint::host::control::protocol::Method;
use livepoint::host::{Image, PeriodicStatus};
use livepoint::restore::eager;
use livepoint::store::{FileStorage, ImageReader};

const PATIENCE: Duration = Duration::from_secs(60);

/// Returns a domain with the page writer, whose console is a file, that asks for checkpoints with
/// these attributes.
fn document(name: &str, console: &Path, attributes: &str) -> String {
    let console = console.display();
    format!(
        "<domain type='kvm'>\n<name>{name}</name>\n<metadata>\n\
         <livepoint:checkpoint xmlns:livepoint='urn:livepoint:1' {attributes}/>\n</metadata>\n\
         <memory unit='MiB'>64</memory>\n<os><type arch='x86_64'>hvm</type>\
         <kernel>builtin:pagewriter</kernel><cmdline>ws_percent=10 pattern=random write=page \
         fill=incompressible tick_ms=0</cmdline></os>\n\
         <devices><serial type='file'><source path='{console}' append='on'/>\
         <target port='0'/></serial>\
         <memballoon model='none'/></devices>\n</domain>\n"
    )
}

fn run(dir: &Path, attributes: &str) -> Victim {
    let xml = dir.join("victim.xml");
    let console = dir.join("console");
    fs::write(&xml, document("victim", &console, attributes)).unwrap();
    let victim = Victim::start(dir, Stdio::null(), |command| command.arg("run").arg(&xml));
    wait_ready(&console);
    victim
}

/// Waits until the guest has filled its memory: an image from before is of no moment that can be told.
fn wait_ready(console: &Path) {
    wait_line(console, PATIENCE, |line| {
        line.starts_with("pagewriter: ready")
    });
}

fn status(victim: &Victim) -> PeriodicStatus {
    victim.client().status().unwrap().periodic.unwrap()
}

/// Waits until the figures are as they are wanted.
fn wait_for(victim: &Victim, wanted: impl Fn(&PeriodicStatus) -> bool) -> PeriodicStatus {
    let began = Instant::now();
    loop {
        let now = status(victim);
        if wanted(&now) {
            return now;
        }
        assert!(began.elapsed() < PATIENCE, "{now:?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn assert_whole(image: &Path) {
    Image::open(image).unwrap().verify().unwrap();
}

fn assert_of_one_moment(image: &Path) {
    let reader = ImageReader::open(&FileStorage, image).unwrap();
    let memory = machine_memory(&reader.manifest().regions, 0);
    eager::fill(&reader, &memory, &eager::FillOptions::default()).unwrap();
    assert_single_moment(|gpa, out| read_page(&memory, gpa, out), 7);
}

#[test]
fn a_domain_is_checkpointed_as_its_document_asks_for() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("made/for/it");
    let attributes = format!(
        "every='100ms' keep='3' directory='{}' protocol='cow' durable='no'",
        images.display()
    );
    let victim = run(dir.path(), &attributes);
    // The guest runs by now: what begins from here on is of it.
    let before = status(&victim).series.taken;
    let seen = wait_for(&victim, |now| now.series.taken >= before + 6);
    assert_eq!((seen.every_ms, seen.series.failed), (100, 0), "{seen:?}");
    let last = seen.last_image.unwrap();
    assert!(last.starts_with(&images), "{}", last.display());
    // While it is paused there is nothing new, and what is kept stays.
    let mut client = victim.client();
    client.run(Method::Pause).unwrap();
    let before = status(&victim).series.taken;
    std::thread::sleep(Duration::from_secs(1));
    // One may have been under way.
    let after = status(&victim).series.taken;
    assert!(after <= before + 1, "{before}, then {after}");
    client.run(Method::Resume).unwrap();
    wait_for(&victim, |now| now.series.taken > after);
    victim.kill();
    let kept = images_in(&images);
    // More than three where those need older ones.
    assert!(kept.len() >= 3, "{kept:?}");
    kept.iter().for_each(|image| assert_whole(image));
    kept.iter()
        .rev()
        .take(3)
        .for_each(|image| assert_of_one_moment(image));
    let newest = ImageReader::open(&FileStorage, kept.last().unwrap()).unwrap();
    assert!(newest.manifest().parent.is_some(), "it is an increment");
    drop(newest);
    // The images are of the domain that was saved: another one takes none among them.
    let image = kept.last().unwrap();
    let other = Victim::start(dir.path(), Stdio::null(), |command| {
        let command = command.arg("restore").arg(image);
        command.args(["--new-identity", "--name", "victim"])
    });
    assert_eq!(other.client().status().unwrap().periodic, None);
    other.kill();
    // The same one goes on.
    let again = Victim::restore(dir.path(), image);
    wait_for(&again, |now| now.series.taken > 0);
}

#[test]
fn checkpoints_that_are_not_done_in_time_are_said_to_be_missed() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    // The first image takes some seconds at this rate.
    let attributes = format!(
        "every='100ms' directory='{}' protocol='threaded' codec='none' max_bandwidth='20000000'",
        images.display()
    );
    let victim = run(dir.path(), &attributes);
    let seen = wait_for(&victim, |now| now.series.taken > 0 && now.series.missed > 0);
    assert_eq!(seen.series.failed, 0, "{seen:?}");
    let output = livepoint(&dir.path().join("run"))
        .args(["status", "victim"])
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("Checkpoints every 100.0 ms: "), "{said}");
    assert!(said.contains(" missed"), "{said}");
}

#[test]
fn what_has_no_meaning_is_refused_before_anything_runs() {
    let dir = tempfile::tempdir().unwrap();
    for (attributes, words) in [
        (
            "every='soon'",
            "line 4: <checkpoint>: every 'soon' is not a time",
        ),
        ("every='1s' keep='0'", "keep '0' is not a number from 1 on"),
        ("every='1s' speed='9'", "no attribute speed"),
        ("every='1s' protocol='fast'", "fast"),
    ] {
        let xml = dir.path().join("bad.xml");
        let console = dir.path().join("console");
        fs::write(&xml, document("victim", &console, attributes)).unwrap();
        let output = livepoint(&dir.path().join("run"))
            .arg("run")
            .arg(&xml)
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{attributes}");
        assert!(said.contains(words), "{attributes}: {said}");
    }
}

/// Runs a domain under a daemon, whose process is confined, until there are checkpoints, and takes a
/// snapshot beside them.
fn checkpoints_under(daemon: &Daemon, uid: Option<u32>) {
    let images: PathBuf = daemon.path("made/images");
    let xml = daemon.path("d.xml");
    let attributes = format!(
        "every='200ms' keep='2' directory='{}' protocol='cow'",
        images.display()
    );
    let console = daemon.path("console");
    fs::write(&xml, document("d", &console, &attributes)).unwrap();
    daemon.ok(&["define", xml.to_str().unwrap()]);
    daemon.ok(&["start", "d"]);
    wait_ready(&console);
    let taken = |daemon: &Daemon| daemon.worker("d")["periodic"]["taken"].as_u64().unwrap();
    let (began, before) = (Instant::now(), taken(daemon));
    while taken(daemon) < before + 3 {
        assert!(
            began.elapsed() < PATIENCE,
            "{}\n{}",
            daemon.worker("d"),
            daemon.log()
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    let worker = daemon.worker("d");
    let process = fs::read_to_string(format!("/proc/{}/status", worker["pid"])).unwrap();
    assert!(process.contains("Seccomp:\t2\n"), "{process}");
    assert_eq!(worker["periodic"]["failed"], 0, "{worker}");
    // A snapshot is refused while a checkpoint is under way.
    loop {
        let output = daemon.virsh(&["snapshot-create-as", "d", "beside"]);
        if output.status.success() {
            break;
        }
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(said.contains("still runs"), "{said}");
        assert!(began.elapsed() < 2 * PATIENCE, "{said}");
        std::thread::sleep(Duration::from_millis(50));
    }
    daemon.ok(&["destroy", "d"]);
    let kept = images_in(&images);
    assert_of_one_moment(kept.last().unwrap());
    for image in kept {
        assert_whole(&image);
        let owner = fs::metadata(&image).unwrap().uid();
        assert!(uid.is_none_or(|uid| owner == uid), "{}", image.display());
    }
    assert_eq!(daemon.ok(&["snapshot-list", "d", "--name"]), "beside");
}

#[test]
fn a_confined_domain_of_the_daemon_is_checkpointed_too_and_has_snapshots_beside() {
    if !have_kvm() {
        return;
    }
    checkpoints_under(&Daemon::new(), None);
}

#[test]
fn the_directory_is_made_for_the_user_that_the_domain_runs_as() {
    if !have_kvm() {
        return;
    }
    if !rustix::process::geteuid().is_root() {
        common::skip("workers of another user", "only root starts them");
        return;
    }
    let users = fs::read_to_string("/etc/passwd").unwrap();
    let mut users = users.lines().map(|line| line.split(':'));
    let nobody = users.find_map(|mut user| (user.next()? == "nobody").then(|| user.nth(1))?);
    let uid = nobody.unwrap().parse().unwrap();
    checkpoints_under(&Daemon::with(&["--worker-user", "nobody"]), Some(uid));
}
