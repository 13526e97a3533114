//! What the machine cannot do is refused under the stock virsh, in words that say so.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;

use common::have_kvm;
use common::livepointd::Daemon;

/// Writes a document to the daemon's directory, and returns its path.
fn document(daemon: &Daemon, name: &str, text: &str) -> String {
    let path = daemon.path(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// Asserts that virsh fails, and says something in which all of `words` are.
fn refused(daemon: &Daemon, args: &[&str], words: &[&str]) {
    let said = daemon.refused(args);
    for word in words {
        assert!(said.contains(word), "{args:?} without {word:?}:\n{said}");
    }
}

const DISK: &str = "<disk type='file' device='disk'><source file='/d'/>\
     <target dev='vda' bus='virtio'/></disk>";
const CDROM: &str = "<disk type='file' device='cdrom'><source file='/d.iso'/>\
     <target dev='sda' bus='sata'/><readonly/></disk>";
const INTERFACE: &str = "<interface type='ethernet'><model type='virtio'/></interface>";

#[test]
fn devices_are_not_attached_detached_or_changed_while_the_domain_runs() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    daemon.define_echo("d");
    daemon.ok(&["start", "d"]);
    let before = daemon.ok(&["dumpxml", "d"]);
    for (kind, text) in [("disk", DISK), ("interface", INTERFACE)] {
        let file = document(&daemon, "device.xml", text);
        for (command, what) in [
            ("attach-device", "attach"),
            ("detach-device", "detach"),
            ("update-device", "update"),
        ] {
            let says = format!("live {what} of device '{kind}' is not supported");
            refused(
                &daemon,
                &[command, "d", &file, "--live"],
                &["Operation not supported", &says],
            );
        }
    }
    refused(
        &daemon,
        &["attach-disk", "d", "/d", "vda", "--live"],
        &["live attach of device 'disk' is not supported"],
    );
    assert_eq!(daemon.ok(&["dumpxml", "d"]), before);
    assert_eq!(daemon.state("d"), "running");
}

#[test]
fn there_is_no_cd_to_change() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let disk = daemon.path("disk.img");
    fs::write(&disk, [0; 4096]).unwrap();
    let devices = format!(
        "<console type='pty'/><disk type='file'><source file='{}'/><target dev='vda'/></disk>",
        disk.display()
    );
    let xml = daemon.domain("d", "echo", 64, &devices);
    daemon.ok(&["define", xml.to_str().unwrap()]);
    daemon.ok(&["start", "d"]);
    // virsh looks for a drive itself.
    for target in ["vda", "sda"] {
        let says = format!("No disk found whose source path or target is {target}");
        refused(&daemon, &["change-media", "d", target, "--eject"], &[&says]);
    }
    let cdrom = document(&daemon, "cdrom.xml", CDROM);
    // What it would ask for if it found one.
    refused(
        &daemon,
        &["update-device", "d", &cdrom, "--live"],
        &[
            "Operation not supported",
            "live update of device 'disk' is not supported",
        ],
    );
    // Nor can a domain have a drive.
    let says = "CD-ROM and floppy drives are not supported";
    refused(
        &daemon,
        &["attach-device", "d", &cdrom, "--config"],
        &[says],
    );
    let text = fs::read_to_string(&xml).unwrap();
    let text = text
        .replace("<console", &format!("{CDROM}<console"))
        .replace("<name>d<", "<name>e<");
    let file = document(&daemon, "domain.xml", &text);
    refused(&daemon, &["define", &file], &["'cdrom'", says]);
}

#[test]
fn firmware_is_not_booted() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    for (place, os) in [
        (
            "loader",
            "<os><type arch='x86_64'>hvm</type>\
             <loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader></os>",
        ),
        (
            "firmware",
            "<os firmware='efi'><type arch='x86_64'>hvm</type></os>",
        ),
        (
            "nvram",
            "<os><type arch='x86_64'>hvm</type><kernel>builtin:echo</kernel>\
             <nvram>/var/lib/nvram</nvram></os>",
        ),
    ] {
        let text = format!(
            "<domain type='kvm'><name>f</name><memory unit='MiB'>64</memory>{os}\
             <devices><memballoon model='none'/></devices></domain>"
        );
        let file = document(&daemon, "firmware.xml", &text);
        for command in ["define", "create"] {
            refused(
                &daemon,
                &[command, &file],
                &[place, "firmware boot is not supported; give <kernel>"],
            );
        }
    }
    // What programs ask before they offer it.
    let capabilities = daemon.ok(&["domcapabilities"]);
    assert!(
        capabilities.contains("<loader supported='no'/>"),
        "{capabilities}"
    );
}

#[test]
fn a_domain_is_not_migrated_and_runs_on() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    daemon.define_echo("d");
    daemon.ok(&["start", "d"]);
    let here = daemon.uri();
    for how in [
        &["--live"][..],
        &["--live", "--p2p"],
        &["--offline", "--persistent"],
        &["--live", "--p2p", "--tunnelled"],
        &["--live", "--direct"],
    ] {
        let args = [&["migrate", "d", &here], how].concat();
        let said = daemon.refused(&args);
        let clear = said.contains("migration is not supported by the source host")
            || said.contains("not supported by the connection driver: virDomainMigrate");
        assert!(clear, "{args:?}: {said}");
    }
    assert_eq!(daemon.state("d"), "running");
}
