//! livepointd as a service of systemd: the units that are installed, in a machine that systemd boots.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;

use common::booted::{Booted, can_boot};
use common::have_kvm;

const UNITS: [&str; 4] = [
    "livepointd.service",
    "livepoint-guests.service",
    "virtlivepointd.socket",
    "virtlivepointd-ro.socket",
];
const SOCKETS: [&str; 2] = ["virtlivepointd.socket", "virtlivepointd-ro.socket"];

/// A guest that writes to its disk, and checks disk and memory against one another.
const TICK: Guest = Guest { name: "tick" };

struct Guest {
    name: &'static str,
}

impl Guest {
    fn console(&self) -> String {
        format!("/var/{}.console", self.name)
    }

    fn xml(&self, kernel: &str, cmdline: &str, devices: &str) -> String {
        format!(
            "<domain type='kvm'>\n<name>{}</name>\n<memory unit='MiB'>64</memory>\n\
             <os><type arch='x86_64'>hvm</type><kernel>builtin:{kernel}</kernel>\
             <cmdline>{cmdline}</cmdline></os>\n\
             <devices>{devices}<serial type='file'><source path='{}' append='on'/></serial>\
             <memballoon model='none'/></devices>\n</domain>\n",
            self.name,
            self.console(),
        )
    }

    /// Defines it, with a disk of its own, and an interface where the host has taps.
    fn define_writer(&self, machine: &Booted) {
        let disk = format!("/var/{}.img", self.name);
        let file = fs::File::create(machine.file(&disk)).unwrap();
        file.set_len(2 << 20).unwrap();
        let mut devices = format!(
            "<disk type='file' device='disk'><source file='{disk}'/>\
             <target dev='vda' bus='virtio'/></disk>\
             <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
        );
        if std::path::Path::new("/dev/net/tun").exists() {
            devices.push_str("<interface type='ethernet'/>");
        }
        self.define(machine, &self.xml("virtio", "places=256 tick=8", &devices));
    }

    /// Defines one that waits for its power button.
    fn define_echo(&self, machine: &Booted) {
        self.define(machine, &self.xml("echo", "", ""));
    }

    fn define(&self, machine: &Booted, xml: &str) {
        let file = format!("/var/{}.xml", self.name);
        machine.write(&file, xml);
        machine.virsh(&["define", &file]);
    }

    fn printed(&self, machine: &Booted) -> String {
        fs::read_to_string(machine.file(&self.console())).unwrap_or_default()
    }

    /// Waits until the guest has found, after what it has printed so far, that disk and memory fit.
    fn wait_check(&self, machine: &mut Booted) {
        let before = self.printed(machine).len();
        machine.wait("the guest's own check", |machine| {
            let text = self.printed(machine);
            assert!(!text.contains("WRONG") && !text.contains("PANIC"), "{text}");
            let new = text.get(before..).unwrap_or_default();
            new.matches("virtio: blk checked").count() >= 2
        });
    }

    /// Waits until the guest's kernel has started so many times.
    fn wait_ready(&self, machine: &mut Booted, times: usize) {
        machine.wait("the guest is ready", |machine| {
            self.printed(machine).matches("echo: ready").count() == times
        });
    }

    /// How often its kernel has started.
    fn starts(&self, machine: &Booted) -> usize {
        self.printed(machine).matches("virtio: start").count()
    }

    /// Returns its process, as the machine counts them.
    fn pid(&self, machine: &Booted) -> String {
        let command = r#"{"execute":"livepoint-status"}"#;
        let answer = machine.virsh(&["qemu-monitor-command", self.name, command]);
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        answer["return"]["pid"].to_string()
    }

    /// Returns the scope that its process is in.
    fn scope(&self, machine: &Booted) -> String {
        let group = group_of(machine, &self.pid(machine));
        let uuid = machine.virsh(&["domuuid", self.name]);
        let scope = group.strip_prefix("/machine.slice/").unwrap_or(&group);
        let named = scope.starts_with(&format!("livepoint-{}-", uuid.trim()));
        assert!(named && scope.ends_with(".scope"), "{group}");
        scope.to_owned()
    }

    fn state(&self, machine: &Booted) -> String {
        machine.virsh(&["domstate", self.name, "--reason"])
    }
}

fn group_of(machine: &Booted, pid: &str) -> String {
    let groups = machine.ok(&["cat", &format!("/proc/{pid}/cgroup")]);
    let group = groups.lines().find_map(|line| line.strip_prefix("0::"));
    group.unwrap().to_owned()
}

/// Returns which sockets a process has open.
fn sockets_of(machine: &Booted, pid: &str) -> Vec<String> {
    let folder = format!("/proc/{pid}/fd");
    let list = machine.ok(&["find", &folder, "-lname", "socket:*", "-printf", "%l\n"]);
    list.lines().map(str::to_owned).collect()
}

fn assert_nothing_failed(machine: &Booted) {
    let failed = [
        "systemctl",
        "list-units",
        "--failed",
        "--plain",
        "--no-legend",
    ];
    let failed = machine.ok(&failed);
    assert!(
        !failed.contains("livepoint"),
        "{failed}\n{}",
        machine.journal()
    );
}

fn start_sockets(machine: &Booted) {
    machine.ok(&[&["systemctl", "start"], &SOCKETS[..]].concat());
}

/// Asserts that a guest's process is where it belongs, apart from the daemon.
fn assert_in_a_scope_of_its_own(machine: &Booted, guest: &Guest) {
    let (pid, scope) = (guest.pid(machine), guest.scope(machine));
    let status = machine.ok(&["systemctl", "status", "--no-pager", "--full", &scope]);
    let title = format!("{scope} - Virtual machine {}", guest.name);
    assert!(status.contains(&title) && status.contains(&pid), "{status}");
    let daemon = machine.property("livepointd", "MainPID");
    let services = "/system.slice/livepointd.service";
    assert_eq!(group_of(machine, &daemon), services);
    let procs = format!("/sys/fs/cgroup{services}/cgroup.procs");
    assert_eq!(machine.ok(&["cat", &procs]), daemon);
    let sockets = sockets_of(machine, &daemon);
    assert!(sockets.len() >= 4, "{sockets:?}");
    let shared: Vec<_> = sockets_of(machine, &pid)
        .into_iter()
        .filter(|socket| sockets.contains(socket))
        .collect();
    assert!(
        shared.is_empty(),
        "the guest's process has the daemon's {shared:?}"
    );
}

#[test]
fn guests_outlive_whatever_systemd_does_to_the_daemon() {
    if !have_kvm() || !can_boot() {
        return;
    }
    let mut machine = Booted::new();
    let verify = [&["systemd-analyze", "verify", "--man=no"], &UNITS[..]].concat();
    assert_eq!(machine.ok(&verify), "");
    start_sockets(&machine);
    assert_eq!(machine.property("livepointd", "ActiveState"), "inactive");
    // The first client starts it; it has said that it is ready, by its own word.
    machine.virsh(&["version"]);
    assert_eq!(machine.property("livepointd", "ActiveState"), "active");
    assert_eq!(machine.property("livepointd", "Type"), "notify");
    TICK.define_writer(&machine);
    machine.virsh(&["start", "tick"]);
    TICK.wait_check(&mut machine);
    assert_in_a_scope_of_its_own(&machine, &TICK);
    let pid = TICK.pid(&machine);
    for command in [
        &["restart", "livepointd"][..],
        &["kill", "--signal", "KILL", "livepointd"],
        &["stop", "livepointd"],
        &["restart", "virtlivepointd.socket"],
        &["stop", "virtlivepointd.socket", "livepointd"],
    ] {
        machine.ok(&[&["systemctl"], command].concat());
        TICK.wait_check(&mut machine);
        if command[0] == "stop" {
            assert_eq!(machine.property("livepointd", "ActiveState"), "inactive");
        }
        start_sockets(&machine);
        assert_eq!(machine.virsh(&["list", "--name"]).trim(), "tick");
        machine.virsh(&["suspend", "tick"]);
        assert_eq!(TICK.state(&machine), "paused (user)");
        machine.virsh(&["resume", "tick"]);
        TICK.wait_check(&mut machine);
        assert_eq!(TICK.pid(&machine), pid, "{command:?}");
        assert_eq!(TICK.starts(&machine), 1, "{command:?}");
        assert_in_a_scope_of_its_own(&machine, &TICK);
    }
    // However often that is.
    for _ in 0..8 {
        machine.ok(&["systemctl", "kill", "--signal", "KILL", "livepointd"]);
        assert_eq!(machine.virsh(&["list", "--name"]).trim(), "tick");
    }
    assert_eq!(TICK.pid(&machine), pid);
    assert_nothing_failed(&machine);
    live_on(&mut machine);
}

/// Has a guest be saved and brought back, each time in a process of its own in a scope of its own.
fn live_on(machine: &mut Booted) {
    let document = "<domainsnapshot><name>s</name>\
                    <checkpoint xmlns='urn:livepoint:1' protocol='cow'/></domainsnapshot>";
    machine.write("/var/snapshot.xml", document);
    machine.virsh(&["snapshot-create", "tick", "/var/snapshot.xml"]);
    let stats = [
        "domjobinfo",
        "tick",
        "--completed",
        "--rawstats",
        "--anystats",
    ];
    let stats = machine.virsh(&stats);
    assert!(stats.contains("livepoint.protocol: cow"), "{stats}");
    TICK.wait_check(machine);
    let scope = TICK.scope(machine);
    machine.ok(&["systemctl", "set-property", &scope, "CPUWeight=50"]);
    for _ in 0..5 {
        let before = TICK.pid(machine);
        machine.virsh(&["snapshot-revert", "tick", "s"]);
        TICK.wait_check(machine);
        assert_ne!(TICK.pid(machine), before);
        assert_in_a_scope_of_its_own(machine, &TICK);
    }
    let scope = TICK.scope(machine);
    machine.virsh(&["destroy", "tick"]);
    machine.wait("the scope is gone", |machine| {
        machine.property(&scope, "LoadState") == "not-found"
    });
    assert_nothing_failed(machine);
}

#[test]
fn workers_of_another_user_run_in_scopes_as_well() {
    if !have_kvm() || !can_boot() {
        return;
    }
    let mut machine = Booted::new();
    let options = "LIVEPOINTD_OPTIONS=\"--worker-user nobody\"\n";
    machine.write("/etc/default/livepointd", options);
    start_sockets(&machine);
    TICK.define_writer(&machine);
    machine.virsh(&["start", "tick"]);
    TICK.wait_check(&mut machine);
    let process = format!("/proc/{}", TICK.pid(&machine));
    assert_eq!(machine.ok(&["stat", "--format", "%U", &process]), "nobody");
    machine.ok(&["systemctl", "restart", "livepointd"]);
    TICK.wait_check(&mut machine);
    assert_in_a_scope_of_its_own(&machine, &TICK);
    live_on(&mut machine);
}

#[test]
fn an_idle_daemon_ends_and_its_socket_starts_it_again() {
    if !have_kvm() || !can_boot() {
        return;
    }
    let mut machine = Booted::new();
    let options = "LIVEPOINTD_OPTIONS=\"--timeout 1\"\n";
    machine.write("/etc/default/livepointd", options);
    start_sockets(&machine);
    let guest = Guest { name: "guest" };
    guest.define_echo(&machine);
    machine.virsh(&["autostart", "guest"]);
    machine.virsh(&["start", "guest"]);
    guest.wait_ready(&mut machine, 1);
    let daemon = machine.property("livepointd", "MainPID");
    // Needed, it stays.
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert_eq!(machine.property("livepointd", "MainPID"), daemon);
    machine.virsh(&["destroy", "guest"]);
    // More often than systemd starts a service by default.
    for _ in 0..6 {
        machine.wait("the daemon has ended", |machine| {
            machine.property("livepointd", "ActiveState") == "inactive"
        });
        let run = machine.property("livepointd", "InvocationID");
        // The host has not started again: nor has what starts with it.
        assert_eq!(guest.state(&machine), "shut off (unknown)");
        assert_ne!(machine.property("livepointd", "InvocationID"), run);
    }
    assert_nothing_failed(&machine);
}

/// Has the host shut down and start again.
fn restart_host(machine: &mut Booted) {
    machine.power_off();
    machine.start();
    machine.wait("guests have been started", |machine| {
        machine.property("livepoint-guests", "ActiveState") == "active"
    });
    assert_nothing_failed(machine);
}

#[test]
fn guests_are_saved_when_the_host_shuts_down_and_go_on_when_it_starts() {
    if !have_kvm() || !can_boot() {
        return;
    }
    let mut machine = Booted::new();
    // As the package does.
    machine.ok(&[&["systemctl", "enable", "--now"], &UNITS[..]].concat());
    let (auto, passing) = (Guest { name: "auto" }, Guest { name: "passing" });
    TICK.define_writer(&machine);
    auto.define_echo(&machine);
    machine.virsh(&["autostart", "auto"]);
    machine.virsh(&["start", "tick"]);
    machine.virsh(&["start", "auto"]);
    machine.write("/var/passing.xml", &passing.xml("echo", "", ""));
    machine.virsh(&["create", "/var/passing.xml"]);
    auto.wait_ready(&mut machine, 1);
    passing.wait_ready(&mut machine, 1);
    TICK.wait_check(&mut machine);
    restart_host(&mut machine);
    assert_eq!(TICK.state(&machine), "running (restored)");
    assert_eq!(auto.state(&machine), "running (restored)");
    TICK.wait_check(&mut machine);
    // One that is transient is gone, and what ran was not started anew.
    let names = machine.virsh(&["list", "--all", "--name"]);
    assert_eq!(
        names.split_whitespace().collect::<Vec<_>>(),
        ["auto", "tick"]
    );
    assert_eq!(TICK.starts(&machine), 1);

    // Nor does it need a daemon, which no host that shuts down starts any more.
    machine.ok(&["systemctl", "stop", "livepointd"]);
    restart_host(&mut machine);
    assert_eq!(TICK.state(&machine), "running (restored)");
    TICK.wait_check(&mut machine);
    assert_eq!(TICK.starts(&machine), 1);
    assert_in_a_scope_of_its_own(&machine, &TICK);

    // A new session of the host, without this unit's help: what starts with the host does.
    machine.virsh(&["destroy", "tick"]);
    machine.ok(&["systemctl", "disable", "livepoint-guests"]);
    machine.virsh(&["destroy", "auto"]);
    machine.power_off();
    machine.start();
    auto.wait_ready(&mut machine, 2);
    assert!(TICK.state(&machine).starts_with("shut off"));
}

#[test]
fn guests_are_shut_down_with_the_host_where_that_is_asked_for() {
    if !have_kvm() || !can_boot() {
        return;
    }
    let mut machine = Booted::new();
    let options = "LIVEPOINT_GUESTS_OPTIONS=\"--how shutdown --timeout 100\"\n";
    machine.write("/etc/default/livepointd", options);
    machine.ok(&[&["systemctl", "enable", "--now"], &UNITS[..]].concat());
    let guest = Guest { name: "guest" };
    guest.define_echo(&machine);
    machine.virsh(&["start", "guest"]);
    guest.wait_ready(&mut machine, 1);
    restart_host(&mut machine);
    // It has started again.
    guest.wait_ready(&mut machine, 2);
    assert_eq!(guest.state(&machine), "running (booted)");
}
