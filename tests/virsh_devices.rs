//! Devices and actions of a definition, changed by virsh; and where a guest can be reached.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::process::Command;
use std::time::Duration;

use common::livepointd::Daemon;
use common::{have_kvm, wait_line};

fn document(daemon: &Daemon, text: &str) -> String {
    let path = daemon.path("device.xml");
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

fn disk(source: &str, inside: &str) -> String {
    format!(
        "<disk type='file' device='disk'><source file='{source}'/>\
         <target dev='vda' bus='virtio'/>{inside}</disk>"
    )
}

/// Returns the line of a device in the definition that says in which slot it is.
fn slot_of(daemon: &Daemon, kind: &str) -> String {
    let xml = daemon.ok(&["dumpxml", "d", "--inactive"]);
    let device = xml.split(&format!("<{kind} ")).nth(1).unwrap();
    let slot = device.split("slot='").nth(1).unwrap();
    slot.split('\'').next().unwrap().to_owned()
}

#[test]
fn devices_of_a_definition_are_attached_changed_and_detached() {
    let daemon = Daemon::new();
    daemon.define_echo("d");
    let plain = daemon.ok(&["dumpxml", "d"]);
    daemon.ok(&["attach-disk", "d", "/one.img", "vda", "--config"]);
    daemon.ok(&[
        "attach-interface",
        "d",
        "bridge",
        "br7",
        "--mac",
        "52:54:00:00:00:07",
        "--config",
    ]);
    let slots = [slot_of(&daemon, "disk"), slot_of(&daemon, "interface")];
    // Another file and a serial number, in the same place.
    let file = document(&daemon, &disk("/two.img", "<serial>S7</serial>"));
    daemon.ok(&["update-device", "d", &file, "--config"]);
    let link = "<interface type='bridge'><mac address='52:54:00:00:00:07'/>\
                <source bridge='br8'/><link state='down'/><model type='virtio'/></interface>";
    let file = document(&daemon, link);
    daemon.ok(&["update-device", "d", &file, "--config"]);
    let xml = daemon.ok(&["dumpxml", "d"]);
    for (is_there, what) in [
        (true, "/two.img"),
        (true, "<serial>S7</serial>"),
        (true, "br8"),
        (true, "<link state='down'/>"),
        (false, "/one.img"),
        (false, "br7"),
    ] {
        assert_eq!(xml.contains(what), is_there, "{what}: {xml}");
    }
    assert_eq!(
        [slot_of(&daemon, "disk"), slot_of(&daemon, "interface")],
        slots
    );
    daemon.ok(&["detach-disk", "d", "vda", "--config"]);
    let mac = ["--mac", "52:54:00:00:00:07"];
    daemon.ok(&[
        "detach-interface",
        "d",
        "bridge",
        mac[0],
        mac[1],
        "--config",
    ]);
    assert_eq!(daemon.ok(&["dumpxml", "d"]), plain);
}

#[test]
fn a_device_that_is_not_there_or_cannot_be_changed_is_named() {
    let daemon = Daemon::new();
    daemon.define_echo("d");
    daemon.ok(&["attach-disk", "d", "/one.img", "vda", "--config"]);
    let before = daemon.ok(&["dumpxml", "d"]);
    let other = disk("/two.img", "").replace("vda", "vdb");
    let interface = "<interface type='ethernet'><mac address='52:54:00:00:00:08'/>\
                     <model type='virtio'/></interface>";
    let rng = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>";
    let console = "<console type='pty'/>";
    for (text, command, wanted) in [
        (other.as_str(), "detach-device", "no target device vdb"),
        (other.as_str(), "update-device", "no target device vdb"),
        (
            interface,
            "detach-device",
            "no device matching MAC address 52:54:00:00:00:08",
        ),
        (rng, "detach-device", "device not found: device not present"),
        (
            console,
            "detach-device",
            "persistent detach of device 'console' is not supported",
        ),
        (
            console,
            "update-device",
            "persistent update of device 'console' is not supported",
        ),
        ("<disk", "detach-device", "error"),
        ("<disk type='nfs'/>", "update-device", "error"),
    ] {
        let file = document(&daemon, text);
        let said = daemon.refused(&[command, "d", &file, "--config"]);
        assert!(said.contains(wanted), "{command} {text}: {said}");
    }
    assert_eq!(daemon.ok(&["dumpxml", "d"]), before);
}

#[test]
fn the_actions_of_a_definition_are_set() {
    let daemon = Daemon::new();
    daemon.define_echo("d");
    daemon.ok(&[
        "set-lifecycle-action",
        "d",
        "poweroff",
        "restart",
        "--config",
    ]);
    daemon.ok(&["set-lifecycle-action", "d", "crash", "preserve", "--config"]);
    let xml = daemon.ok(&["dumpxml", "d"]);
    assert!(xml.contains("<on_poweroff>restart</on_poweroff>"), "{xml}");
    assert!(xml.contains("<on_crash>preserve</on_crash>"), "{xml}");
    let said = daemon.refused(&["set-lifecycle-action", "d", "crash", "coredump-destroy"]);
    assert!(said.contains("is not supported"), "{said}");
    if !have_kvm() {
        return;
    }
    daemon.ok(&["start", "d"]);
    let said = daemon.refused(&["set-lifecycle-action", "d", "crash", "destroy", "--live"]);
    assert!(said.contains("of a running domain do not change"), "{said}");
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn the_addresses_that_the_host_has_heard_of_are_told() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let mac = "52:54:00:00:00:09";
    let Some(tap) = daemon.start_with_interface("d", mac, "addresses of a guest") else {
        return;
    };
    let none = daemon.ok(&["domifaddr", "d", "--source", "arp"]);
    assert!(!none.contains("52:54"), "{none}");
    // As if the guest had said something.
    let mut heard = Command::new("ip");
    heard.args(["neigh", "add", "192.0.2.7", "lladdr", "52:54:00:00:00:09"]);
    heard.args(["nud", "permanent", "dev", &tap]);
    let heard = heard.output().expect("ip, of the package iproute2");
    if !heard.status.success() {
        let why = String::from_utf8_lossy(&heard.stderr);
        common::skip("addresses of a guest", why.trim());
        daemon.ok(&["destroy", "d"]);
        return;
    }
    let told = daemon.ok(&["domifaddr", "d", "--source", "arp"]);
    let line = told.lines().find(|line| line.contains(&tap));
    let fields: Vec<_> = line
        .unwrap_or_else(|| panic!("{told}"))
        .split_whitespace()
        .collect();
    assert_eq!(fields[1..], ["52:54:00:00:00:09", "ipv4", "192.0.2.7/0"]);
    // Of networks of libvirt's there are none; an agent there is not.
    let leases = daemon.ok(&["domifaddr", "d"]);
    assert!(!leases.contains("52:54"), "{leases}");
    let agent = daemon.refused(&["domifaddr", "d", "--source", "agent"]);
    assert!(agent.contains("guest agent is not configured"), "{agent}");
    daemon.ok(&["destroy", "d"]);
    let off = daemon.refused(&["domifaddr", "d", "--source", "arp"]);
    assert!(off.contains("domain is not running"), "{off}");
}

#[test]
fn a_guest_is_given_a_non_maskable_interrupt() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let console = daemon.path("console");
    let serial = format!(
        "<serial type='file'><source path='{}'/></serial>",
        console.display()
    );
    let file = daemon.domain("d", "echo", 64, &serial);
    daemon.ok(&["define", file.to_str().unwrap()]);
    let off = daemon.refused(&["inject-nmi", "d"]);
    assert!(off.contains("domain is not running"), "{off}");
    daemon.ok(&["start", "d"]);
    let patience = Duration::from_secs(120);
    wait_line(&console, patience, |line| line.contains("echo: ready"));
    daemon.ok(&["inject-nmi", "d"]);
    // The guest has no use for it, says so and powers off.
    wait_line(&console, patience, |line| line.contains("PANIC vector=2 "));
    daemon.wait_state("d", "shut off");
}

#[test]
fn a_vcpu_is_pinned_to_cpus_of_the_host_while_it_runs() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    daemon.define_echo("d");
    daemon.ok(&["start", "d"]);
    let pid = daemon.worker("d")["pid"].to_string();
    let allowed = || {
        let threads = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        let status = threads.filter_map(|thread| {
            let path = thread.unwrap().path();
            let name = fs::read_to_string(path.join("comm")).ok()?;
            (name.trim() == "lvp-vcpu-0").then(|| fs::read_to_string(path.join("status")).unwrap())
        });
        let status: Vec<_> = status.collect();
        let line = status[0]
            .lines()
            .find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        line.unwrap().trim().to_owned()
    };
    // One that this process may use, whichever those are.
    let mine = rustix::thread::sched_getaffinity(None).unwrap();
    let mut cpus = 0..rustix::thread::CpuSet::MAX_CPU;
    let cpu = cpus.find(|cpu| mine.is_set(*cpu)).unwrap().to_string();
    daemon.ok(&["vcpupin", "d", "0", &cpu]);
    assert_eq!(allowed(), cpu);
    let pins = daemon.ok(&["vcpupin", "d"]);
    let line = pins.lines().last().unwrap();
    assert_eq!(
        line.split_whitespace().collect::<Vec<_>>(),
        ["0", &cpu],
        "{pins}"
    );
    let info = daemon.ok(&["vcpuinfo", "d", "--pretty"]);
    assert!(
        info.contains(&format!("CPU Affinity:   {cpu} (out of")),
        "{info}"
    );
    let said = daemon.refused(&["vcpupin", "d", "7", &cpu]);
    assert!(
        said.contains("vcpu 7 is not present in live config"),
        "{said}"
    );
    let said = daemon.refused(&["vcpupin", "d", "0", &cpu, "--config"]);
    assert!(said.contains("its definition does not say"), "{said}");
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn the_host_tells_what_it_is_and_its_free_pages() {
    let daemon = Daemon::new();
    let sysinfo = daemon.virsh(&["sysinfo"]);
    let (told, said) = (
        String::from_utf8(sysinfo.stdout).unwrap(),
        String::from_utf8(sysinfo.stderr).unwrap(),
    );
    if sysinfo.status.success() {
        assert!(told.contains("<sysinfo type='smbios'>"), "{told}");
    } else {
        // A host without firmware tables, as some virtual machines are.
        assert!(said.contains("information is not available"), "{said}");
    }
    let all = daemon.ok(&["freepages", "--all"]);
    let free = |text: &str, size: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(size));
        let count = line.unwrap_or_else(|| panic!("no {size} in {text}"));
        count.trim().parse::<u64>().unwrap()
    };
    assert!(all.starts_with("Node 0:"), "{all}");
    assert!(free(&all, "4KiB:") > 0, "{all}");
    let one = daemon.ok(&["freepages", "0", "4"]);
    assert!(free(&one, "4KiB:") > 0, "{one}");
    let said = daemon.refused(&["freepages", "0", "3"]);
    assert!(said.contains("page size 3 is not available"), "{said}");
}
