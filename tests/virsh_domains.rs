//! Domains under virsh: their power, and disks in snapshots, which come back with the memory.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use common::livepointd::Daemon;
use common::{have_kvm, whole_lines};

const PATIENCE: Duration = Duration::from_secs(120);

/// A domain whose guest writes numbered, checksummed records to its disk, and checks memory and
/// disk against one another all the time.
struct Writer {
    daemon: Daemon,
    console: PathBuf,
    disk: PathBuf,
}

impl Writer {
    fn new() -> Self {
        let daemon = Daemon::new();
        let (console, disk) = (daemon.path("console"), daemon.path("disk.img"));
        fs::File::create(&disk).unwrap().set_len(4 << 20).unwrap();
        let devices = format!(
            "<disk type='file' device='disk'><source file='{}'/><target dev='vda' bus='virtio'/>\
             </disk><serial type='file'><source path='{}' append='on'/></serial>",
            disk.display(),
            console.display()
        );
        let file = daemon.domain("d", "virtio places=512 tick=8", 64, &devices);
        daemon.ok(&["define", file.to_str().unwrap()]);
        Self {
            daemon,
            console,
            disk,
        }
    }

    /// Starts it, and takes the live snapshot `one` once it has written.
    fn with_snapshot_one() -> Self {
        let writer = Self::new();
        writer.daemon.ok(&["start", "d"]);
        writer.wait_checks(0, 1);
        let create = ["snapshot-create-as", "d", "one", "--live"];
        writer.daemon.ok(&create);
        writer
    }

    fn printed(&self) -> String {
        let text = fs::read_to_string(&self.console).unwrap_or_default();
        for bad in ["WRONG", "PANIC", "no disk"] {
            assert!(!text.contains(bad), "{text}");
        }
        text.replace('\r', "")
    }

    /// Returns how much has been printed.
    fn mark(&self) -> usize {
        self.printed().len()
    }

    /// Waits until the guest, in what it prints after `mark`, has found its disk right `checks`
    /// times; returns the numbers of records that it had acknowledged then.
    fn wait_checks(&self, mark: usize, checks: usize) -> Vec<u64> {
        let start = Instant::now();
        loop {
            let text = self.printed();
            let acknowledged = |line: &str| {
                let (_, rest) = line.split_once("acknowledged=")?;
                rest.split_whitespace().next()?.parse().ok()
            };
            let whole = whole_lines(&text);
            // What was printed half at the mark is left out.
            let seen: Vec<u64> = whole
                .get(mark..)
                .unwrap_or_default()
                .lines()
                .skip(1)
                .filter(|line| line.starts_with("virtio: blk checked"))
                .filter_map(acknowledged)
                .collect();
            if seen.len() >= checks {
                return seen;
            }
            assert!(start.elapsed() < PATIENCE, "{text}\n{}", self.daemon.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn disk_bytes(&self) -> Vec<u8> {
        fs::read(&self.disk).unwrap()
    }
}

#[test]
fn a_revert_brings_the_disk_back_with_the_memory() {
    if !have_kvm() {
        return;
    }
    let writer = Writer::with_snapshot_one();
    let daemon = &writer.daemon;
    assert!(
        daemon
            .ok(&["snapshot-dumpxml", "d", "one"])
            .contains("<disk name='vda' snapshot='internal'/>")
    );
    let later = *writer.wait_checks(writer.mark(), 4).last().unwrap();
    let mark = writer.mark();
    daemon.ok(&["snapshot-revert", "d", "one"]);
    // It goes on from where it was, with the disk that it had then, or it says that it is wrong.
    // Until it was ended it may have printed more than once.
    let so_far = writer.wait_checks(mark, 0).len();
    let again = writer.wait_checks(mark, so_far + 2);
    assert!(
        again.iter().any(|number| *number < later),
        "{again:?} {later}"
    );
    // So it does where its process was killed, and its disk is lost.
    daemon.kill_worker("d");
    fs::remove_file(&writer.disk).unwrap();
    let mark = writer.mark();
    daemon.ok(&["snapshot-revert", "d", "one"]);
    writer.wait_checks(mark, 2);
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn a_disk_is_of_the_snapshots_moment_each_time_it_is_gone_back_to() {
    if !have_kvm() {
        return;
    }
    let writer = Writer::with_snapshot_one();
    let daemon = &writer.daemon;
    writer.wait_checks(writer.mark(), 1);
    daemon.ok(&["snapshot-create-as", "d", "two"]);
    writer.wait_checks(writer.mark(), 1);
    let mut contents = Vec::new();
    for name in ["one", "two", "one", "two"] {
        daemon.ok(&["snapshot-revert", "d", name, "--paused"]);
        contents.push(writer.disk_bytes());
        // Between them it runs, and changes its disk.
        let mark = writer.mark();
        daemon.ok(&["resume", "d"]);
        writer.wait_checks(mark, 1);
    }
    assert!(contents[0] == contents[2] && contents[1] == contents[3]);
    assert!(contents[0] != contents[1] && contents[0] != writer.disk_bytes());
    // What is saved has the disk, too.
    let saved = daemon.path("saved");
    let saved = saved.to_str().unwrap();
    daemon.ok(&["save", "d", saved]);
    fs::write(&writer.disk, vec![0; 4 << 20]).unwrap();
    let mark = writer.mark();
    daemon.ok(&["restore", saved]);
    writer.wait_checks(mark, 2);
    daemon.ok(&["destroy", "d"]);
}

#[test]
fn what_cannot_be_done_with_a_disk_in_a_snapshot_is_refused_before_anything_happens() {
    if !have_kvm() {
        return;
    }
    let writer = Writer::new();
    let daemon = &writer.daemon;
    let create = |args: &[&str]| {
        let all = [&["snapshot-create-as", "d", "s"], args].concat();
        let said = daemon.refused(&all);
        assert_eq!(daemon.ok(&["snapshot-list", "d", "--name"]), "");
        said
    };
    // There is no image that the disk could be in.
    let said = create(&[]);
    let libvirts = "internal snapshot for disk vda unsupported for storage type raw";
    assert!(said.contains(libvirts), "{said}");
    daemon.ok(&["start", "d"]);
    let said = create(&["--diskspec", "vda,snapshot=no"]);
    assert!(said.contains("disk vda cannot be left out"), "{said}");
    let said = create(&["--diskspec", "vda,snapshot=external,file=/tmp/x"]);
    assert!(said.contains("not in files of their own"), "{said}");
    let said = create(&["--diskspec", "vdz"]);
    assert!(said.contains("no disk named 'vdz'"), "{said}");
    let said = create(&["--disk-only"]);
    assert!(said.contains("the disks without the memory"), "{said}");
    assert_eq!(daemon.state("d"), "running");
    daemon.ok(&["destroy", "d"]);
    // A snapshot of the definition alone leaves the disk as it is.
    daemon.ok(&[
        "snapshot-create-as",
        "d",
        "s",
        "--diskspec",
        "vda,snapshot=no",
    ]);
    let before = writer.disk_bytes();
    daemon.ok(&["snapshot-revert", "d", "s"]);
    assert!(writer.disk_bytes() == before);
    assert_eq!(daemon.state("d"), "shut off");
}

#[test]
fn a_reboot_keeps_the_id_and_a_shutdown_ends_it() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let console = daemon.path("console");
    let serial = format!(
        "<serial type='file'><source path='{}' append='on'/></serial>",
        console.display()
    );
    let file = daemon.domain("d", "echo", 64, &serial);
    daemon.ok(&["define", file.to_str().unwrap()]);
    daemon.ok(&["start", "d"]);
    let starts = |wanted: usize| {
        let start = Instant::now();
        loop {
            let text = fs::read_to_string(&console).unwrap_or_default();
            if text.matches("echo: ready").count() == wanted {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{text}\n{}", daemon.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    starts(1);
    let (id, pid) = (
        daemon.ok(&["domid", "d"]),
        daemon.worker("d")["pid"].clone(),
    );
    let said = daemon.ok(&["reboot", "d"]);
    assert_eq!(said, "Domain 'd' is being rebooted");
    starts(2);
    assert_eq!(daemon.ok(&["domid", "d"]), id);
    assert_ne!(daemon.worker("d")["pid"], pid);
    assert_eq!(
        daemon.ok(&["domstate", "d", "--reason"]),
        "running (booted)"
    );
    let said = daemon.refused(&["shutdown", "d", "--mode", "agent"]);
    let libvirts = "argument unsupported: QEMU guest agent is not configured";
    assert!(said.contains(libvirts), "{said}");
    let said = daemon.ok(&["shutdown", "d", "--mode", "acpi"]);
    assert_eq!(said, "Domain 'd' is being shutdown");
    daemon.wait_state("d", "shut off");
    let state = daemon.ok(&["domstate", "d", "--reason"]);
    assert_eq!(state, "shut off (shutdown)");
    let said = daemon.refused(&["shutdown", "d"]);
    assert!(
        said.contains("Requested operation is not valid: domain is not running"),
        "{said}"
    );
}

/// Runs a command of the daemon's program; returns whether it succeeded and what it said.
fn guests(daemon: &Daemon, args: &[&str]) -> (bool, String) {
    let mut command = std::process::Command::new("timeout");
    let program = daemon.command();
    command.arg("120").arg(program.get_program());
    let output = command
        .args(program.get_args())
        .args(args)
        .output()
        .unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(said).unwrap())
}

/// Returns whether the file system notes that a domain was paused: older ones in memory do not.
fn keeps_attributes(daemon: &Daemon) -> bool {
    let file = daemon.path("attribute");
    fs::write(&file, "").unwrap();
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(&file, "user.livepoint.test", b"1", flags).is_ok()
}

#[test]
fn guests_are_saved_with_the_host_and_go_on_with_it() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    for name in ["runs", "paused", "off"] {
        daemon.define_echo(name);
    }
    daemon.ok(&["start", "runs"]);
    daemon.ok(&["start", "paused"]);
    daemon.ok(&["suspend", "paused"]);
    let file = daemon.domain("transient", "echo", 64, "<console type='pty'/>");
    daemon.ok(&["create", file.to_str().unwrap()]);
    let (done, said) = guests(&daemon, &["stop-guests"]);
    assert!(done, "{said}{}", daemon.log());
    for line in ["runs: saved", "paused: saved", "transient: shut down"] {
        assert!(said.contains(line), "{said}");
    }
    assert_eq!(daemon.ok(&["list", "--name"]), "");
    let saved = daemon.ok(&["list", "--all", "--name", "--with-managed-save"]);
    assert_eq!(
        saved.split_whitespace().collect::<Vec<_>>(),
        ["paused", "runs"]
    );
    let (done, said) = guests(&daemon, &["start-guests"]);
    assert!(done, "{said}{}", daemon.log());
    assert!(!said.contains("off"), "{said}");
    let state = |name: &str| daemon.ok(&["domstate", name, "--reason"]);
    assert_eq!(state("runs"), "running (restored)");
    if keeps_attributes(&daemon) {
        assert!(state("paused").starts_with("paused"), "{}", state("paused"));
    }
    assert_eq!(daemon.state("off"), "shut off");
    // They are started once: another start of the host after an ordinary day starts none.
    daemon.ok(&["destroy", "runs"]);
    let (done, said) = guests(&daemon, &["start-guests"]);
    assert!(done && said.is_empty(), "{said}");
    assert_eq!(daemon.state("runs"), "shut off");
}

#[test]
fn guests_are_shut_down_with_the_host_or_named() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    daemon.define_echo("listens");
    // This one has no power button.
    let file = daemon.domain(
        "deaf",
        "pagewriter ws=1M rate=1M",
        64,
        "<console type='pty'/>",
    );
    daemon.ok(&["define", file.to_str().unwrap()]);
    daemon.ok(&["start", "listens"]);
    daemon.ok(&["start", "deaf"]);
    let (done, said) = guests(
        &daemon,
        &["stop-guests", "--how", "shutdown", "--timeout", "3"],
    );
    assert!(!done, "{said}");
    assert!(
        said.contains("deaf: it did not shut down within 3 s, and still runs"),
        "{said}"
    );
    assert_eq!(daemon.state("deaf"), "running");
    daemon.wait_state("listens", "shut off");
    daemon.ok(&["destroy", "deaf"]);
    let (done, said) = guests(&daemon, &["start-guests"]);
    assert!(done && said.contains("listens: started"), "{said}");
    for name in ["listens", "deaf"] {
        assert_eq!(daemon.state(name), "running");
    }
    // Guests outlive the daemon: they are saved without it. To start them, one has to be there.
    let mut daemon = daemon;
    daemon.kill();
    let (done, said) = guests(&daemon, &["stop-guests"]);
    assert!(
        done && said.contains("listens: saved") && said.contains("deaf: saved"),
        "{said}"
    );
    let (done, said) = guests(&daemon, &["start-guests"]);
    assert!(!done && said.contains("no daemon answers at"), "{said}");
    daemon.start();
    let saved = daemon.ok(&["list", "--all", "--name", "--with-managed-save"]);
    assert_eq!(
        saved.split_whitespace().collect::<Vec<_>>(),
        ["deaf", "listens"]
    );
    // Where one runs, and does not answer at this socket, its domains are not touched.
    fs::remove_file(daemon.socket()).unwrap();
    let (done, said) = guests(&daemon, &["stop-guests"]);
    assert!(!done && said.contains("in use"), "{said}");
}

#[test]
fn what_starts_with_the_host_does_not_start_with_each_daemon() {
    if !have_kvm() {
        return;
    }
    let mut daemon = Daemon::new();
    daemon.define_echo("auto");
    daemon.ok(&["autostart", "auto"]);
    // Nothing was to be started with the host when this daemon began.
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.state("auto"), "shut off");
    // What is in the runtime directory goes when the host does.
    daemon.kill();
    fs::remove_dir_all(daemon.path("run")).unwrap();
    daemon.start();
    daemon.wait_state("auto", "running");
    daemon.ok(&["destroy", "auto"]);
    daemon.kill();
    daemon.start();
    assert_eq!(daemon.state("auto"), "shut off");
}

#[test]
fn a_snapshot_that_has_no_image_names_the_format_of_the_disk_that_it_cannot_keep() {
    let daemon = Daemon::new();
    let devices = "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
                   <source file='/nowhere.qcow2'/><target dev='vda' bus='virtio'/></disk>";
    let file = daemon.domain("q", "echo", 64, devices);
    daemon.ok(&["define", file.to_str().unwrap()]);
    let said = daemon.refused(&["snapshot-create-as", "q", "s"]);
    let libvirts = "internal snapshot for disk vda unsupported for storage type qcow2";
    assert!(said.contains(libvirts), "{said}");
}
