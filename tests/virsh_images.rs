//! Saved images that get another document: what may change does, and what the guest would notice is
//! refused.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::livepointd::Daemon;
use common::{have_kvm, wait_line};

const PATIENCE: Duration = Duration::from_secs(120);

/// Defines and starts a guest that prints all the time, to `first`.
fn start(daemon: &Daemon) {
    let device = format!(
        "<serial type='file'><source path='{}' append='on'/></serial>",
        daemon.path("first").display()
    );
    let file = daemon.domain("d", "pagewriter ws=1M tick_ms=20", 64, &device);
    daemon.ok(&["define", file.to_str().unwrap()]);
    daemon.ok(&["start", "d"]);
    wait_tick(daemon, "first");
}

/// Waits until the guest prints to a file.
fn wait_tick(daemon: &Daemon, console: &str) {
    let path = daemon.path(console);
    wait_line(&path, PATIENCE, |line| line.contains("tick"));
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Writes a document with a change to a file, and returns that.
fn changed(daemon: &Daemon, document: &str, from: &str, to: &str) -> String {
    assert!(document.contains(from), "no {from} in {document}");
    let path = daemon.path("changed.xml");
    fs::write(&path, document.replace(from, to)).unwrap();
    text(&path)
}

/// Writes the document with the console elsewhere.
fn moved(daemon: &Daemon, document: &str, from: &str, to: &str) -> String {
    let (from, to) = (daemon.path(from), daemon.path(to));
    changed(daemon, document, &text(&from), &text(&to))
}

fn saved(daemon: &Daemon) -> PathBuf {
    let image = daemon.path("saved");
    daemon.ok(&["save", "d", image.to_str().unwrap()]);
    image
}

#[test]
fn a_saved_image_gets_another_document_and_is_restored_by_that() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    start(&daemon);
    let image = text(&saved(&daemon));
    let document = daemon.ok(&["save-image-dumpxml", &image]);
    let xml = moved(&daemon, &document, "first", "second");
    let said = daemon.ok(&["save-image-define", &image, &xml]);
    assert_eq!(said, format!("State file {image} updated."));
    let now = daemon.ok(&["save-image-dumpxml", &image]);
    assert_eq!(now, fs::read_to_string(&xml).unwrap().trim_end());
    daemon.ok(&["restore", &image]);
    wait_tick(&daemon, "second");
    assert_eq!(daemon.state("d"), "running");
    let running = daemon.ok(&["dumpxml", "d"]);
    assert!(running.contains(&text(&daemon.path("second"))), "{running}");
    // What is defined is as it was.
    let defined = daemon.ok(&["dumpxml", "d", "--inactive"]);
    assert!(defined.contains(&text(&daemon.path("first"))), "{defined}");
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn what_the_guest_would_notice_is_refused_and_the_image_is_as_it_was() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    start(&daemon);
    let image = saved(&daemon);
    let before = fs::read(&image).unwrap();
    let image = text(&image);
    let document = daemon.ok(&["save-image-dumpxml", &image]);
    for (from, to, wanted) in [
        (
            ">65536<",
            ">131072<",
            "domain memory in KiB 131072 does not match source 65536",
        ),
        (
            "<name>d<",
            "<name>e<",
            "domain name e does not match source d",
        ),
        (
            ">1</vcpu>",
            ">2</vcpu>",
            "domain vCPU count 2 does not match source 1",
        ),
    ] {
        let xml = changed(&daemon, &document, from, to);
        for args in [
            ["save-image-define", image.as_str(), xml.as_str()].as_slice(),
            ["restore", &image, "--xml", &xml].as_slice(),
        ] {
            let said = daemon.refused(args);
            assert!(said.contains("unsupported configuration"), "{said}");
            assert!(said.contains(wanted), "{said}");
        }
    }
    let xml = changed(&daemon, &document, "</domain>", "");
    daemon.refused(&["save-image-define", &image, &xml]);
    let none = text(&daemon.path("none"));
    daemon.refused(&["save-image-define", &none, &xml]);
    assert!(fs::read(&image).unwrap() == before);
    daemon.ok(&["restore", &image]);
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn an_image_says_whether_its_domain_is_to_run() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    start(&daemon);
    let image = text(&saved(&daemon));
    let document = daemon.ok(&["save-image-dumpxml", &image]);
    let xml = changed(&daemon, &document, "<name>", "<name>");
    daemon.ok(&["save-image-define", &image, &xml, "--paused"]);
    let both = ["save-image-define", &image, &xml, "--paused", "--running"];
    daemon.refused(&both);
    daemon.ok(&["restore", &image]);
    assert_eq!(daemon.state("d"), "paused");
    let image = text(&saved(&daemon));
    // Another document does not change it; a flag does.
    let xml = moved(&daemon, &document, "first", "second");
    daemon.ok(&["save-image-define", &image, &xml]);
    daemon.ok(&["restore", &image]);
    assert_eq!(daemon.state("d"), "paused");
    let image = text(&saved(&daemon));
    daemon.ok(&["save-image-define", &image, &xml, "--running"]);
    daemon.ok(&["restore", &image]);
    assert_eq!(daemon.state("d"), "running");
    wait_tick(&daemon, "second");
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn a_domain_is_saved_and_restored_with_another_document() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    start(&daemon);
    let document = daemon.ok(&["dumpxml", "d", "--inactive"]);
    let image = text(&daemon.path("saved"));
    let wrong = changed(&daemon, &document, ">65536<", ">131072<");
    let said = daemon.refused(&["save", "d", &image, "--xml", &wrong]);
    assert!(said.contains("does not match source"), "{said}");
    assert_eq!(daemon.state("d"), "running");
    assert!(!Path::new(&image).exists());
    let xml = moved(&daemon, &document, "first", "second");
    daemon.ok(&["save", "d", &image, "--xml", &xml]);
    let held = daemon.ok(&["save-image-dumpxml", &image]);
    assert!(held.contains(&text(&daemon.path("second"))), "{held}");
    // And another one at the restore, which the image does not get.
    let xml = moved(&daemon, &document, "first", "third");
    daemon.ok(&["restore", &image, "--xml", &xml]);
    wait_tick(&daemon, "third");
    assert!(!daemon.path("second").exists());
    assert_eq!(daemon.ok(&["save-image-dumpxml", &image]), held);
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn a_managed_save_gets_another_document_and_the_next_start_is_by_that() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    start(&daemon);
    let document = daemon.ok(&["dumpxml", "d", "--inactive"]);
    let xml = moved(&daemon, &document, "first", "second");
    let said = daemon.refused(&["managedsave-define", "d", &xml]);
    assert!(said.contains("does not have managed save image"), "{said}");
    daemon.ok(&["managedsave", "d"]);
    daemon.ok(&["managedsave-define", "d", &xml]);
    let held = daemon.ok(&["managedsave-dumpxml", "d"]);
    assert!(held.contains(&text(&daemon.path("second"))), "{held}");
    daemon.ok(&["start", "d"]);
    wait_tick(&daemon, "second");
    daemon.ok(&["destroy", "d"]);
}
