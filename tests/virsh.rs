//! The daemon under the stock virsh of Debian.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::io::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::have_kvm;
use common::livepointd::Daemon;
use common::terminal::{Background, Terminal};

/// Returns whether a line is what the pattern says, whose `*` stand for anything.
fn line_fits(pattern: &str, line: &str) -> bool {
    let mut parts = pattern.split('*');
    let first = parts.next().unwrap();
    let Some(mut rest) = line.strip_prefix(first) else {
        return false;
    };
    let parts: Vec<_> = parts.collect();
    let Some((last, middle)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in middle {
        let Some(at) = rest.find(part) else {
            return false;
        };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// Returns whether lines are what the patterns say, of which `...` stands for any lines.
fn lines_fit(patterns: &[&str], lines: &[&str]) -> bool {
    match patterns.split_first() {
        None => lines.is_empty(),
        Some((&"...", rest)) => (0..=lines.len()).any(|at| lines_fit(rest, &lines[at..])),
        Some((first, rest)) => lines
            .split_first()
            .is_some_and(|(line, lines)| line_fits(first, line) && lines_fit(rest, lines)),
    }
}

/// Splits a command at spaces: the last of some commands is a text with spaces.
fn words(command: &str) -> Vec<&str> {
    if command.starts_with("desc ") && command.contains("A guest") {
        let at = command.find("A guest").unwrap();
        let mut words: Vec<_> = command[..at].split_whitespace().collect();
        words.push(&command[at..]);
        return words;
    }
    command.split_whitespace().collect()
}

#[test]
fn a_session_at_virsh_prints_what_libvirt_would() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    daemon.domain("echo", "echo", 64, "<console type='pty'/>");
    fs::write(
        daemon.path("disk.xml"),
        "<disk type='file'><source file='/d'/><target dev='vda' bus='virtio'/></disk>",
    )
    .unwrap();
    let dir = daemon.path("").display().to_string();
    let session = fs::read_to_string("tests/virsh/session.txt").unwrap();
    let session = session.replace("DIR", dir.trim_end_matches('/'));
    for step in session.split("\n$ ").skip(1) {
        let (command, expected) = step.split_once('\n').unwrap_or((step, ""));
        let output = daemon.virsh(&words(command));
        let printed = [output.stdout, output.stderr].concat();
        let printed = String::from_utf8(printed).unwrap();
        let trimmed = |text: &str| -> Vec<String> {
            let lines = text.lines().map(|line| line.trim_end().to_owned());
            lines.filter(|line| !line.is_empty()).collect()
        };
        let (expected, printed) = (trimmed(expected), trimmed(&printed));
        let fits = lines_fit(
            &expected.iter().map(String::as_str).collect::<Vec<_>>(),
            &printed.iter().map(String::as_str).collect::<Vec<_>>(),
        );
        assert!(
            fits,
            "virsh {command}\nprinted:\n{}\nexpected:\n{}\nthe daemon's log:\n{}",
            printed.join("\n"),
            expected.join("\n"),
            daemon.log()
        );
    }
}

fn wait_for(what: &str, daemon: &Daemon, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        let log = daemon.log();
        assert!(start.elapsed() < Duration::from_secs(60), "{what}\n{log}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn events_tell_what_happens_to_a_domain_in_order() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let file = daemon.path("events");
    let _events = Background {
        child: daemon
            .virsh_without_limit(&["event", "--all", "--loop"])
            .stdout(fs::File::create(&file).unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap(),
    };
    let events = || fs::read_to_string(&file).unwrap();
    // The first events tell when virsh has asked for them.
    wait_for("no events come", &daemon, || {
        daemon.define_echo("probe");
        daemon.ok(&["undefine", "probe"]);
        events().contains("'probe'")
    });
    daemon.define_echo("d");
    daemon.ok(&["start", "d"]);
    daemon.ok(&["suspend", "d"]);
    daemon.ok(&["resume", "d"]);
    daemon.ok(&["snapshot-create-as", "d", "s", "--live"]);
    daemon.ok(&["snapshot-revert", "d", "s"]);
    daemon.ok(&["desc", "d", "--live", "text"]);
    daemon.ok(&["reset", "d"]);
    daemon.ok(&["shutdown", "d"]);
    daemon.wait_state("d", "shut off");
    daemon.ok(&["snapshot-delete", "d", "s"]);
    daemon.ok(&["undefine", "d"]);
    let wanted = [
        "event 'lifecycle' for domain 'd': Defined Added",
        "event 'lifecycle' for domain 'd': Started Booted",
        "event 'lifecycle' for domain 'd': Suspended Paused",
        "event 'lifecycle' for domain 'd': Resumed Unpaused",
        "event 'job-completed' for domain 'd':",
        "livepoint.downtime_us",
        "event 'lifecycle' for domain 'd': Stopped Snapshot",
        "event 'lifecycle' for domain 'd': Started Snapshot",
        "event 'metadata-change' for domain 'd'",
        "event 'reboot' for domain 'd'",
        "event 'lifecycle' for domain 'd': Shutdown Finished after guest request",
        "event 'lifecycle' for domain 'd': Stopped Shutdown",
        "event 'lifecycle' for domain 'd': Undefined Removed",
    ];
    wait_for("the last event does not come", &daemon, || {
        events().contains(wanted.last().unwrap())
    });
    let text = events();
    let mut rest = text.as_str();
    for event in wanted {
        let at = rest.find(event);
        let at = at.unwrap_or_else(|| panic!("{event:?} is not where it belongs in:\n{text}"));
        rest = &rest[at + event.len()..];
    }
}

#[test]
fn a_daemon_that_is_killed_finds_its_domains_again() {
    if !have_kvm() {
        return;
    }
    let mut daemon = Daemon::new();
    daemon.define_echo("kept");
    daemon.define_echo("ends");
    for name in ["kept", "ends"] {
        daemon.ok(&["start", name]);
    }
    daemon.ok(&["snapshot-create-as", "kept", "s", "--live"]);
    let before = daemon.ok(&["domid", "kept"]);
    let mut console = Terminal::open(&daemon, &["console", "ends"]);
    console.wait("Escape character");
    daemon.kill();
    drop(console);
    // The guest of one of them powers off while no daemon is there.
    let stream = std::os::unix::net::UnixStream::connect(daemon.path("run/ends.sock")).unwrap();
    writeln!(&stream, r#"{{"id":1,"method":"shutdown"}}"#).unwrap();
    wait_for("the guest powers off", &daemon, || {
        std::os::unix::net::UnixStream::connect(daemon.path("run/ends.sock")).is_err()
    });
    daemon.start();
    assert_eq!(daemon.ok(&["domid", "kept"]), before);
    assert_eq!(daemon.state("kept"), "running");
    assert_eq!(
        daemon.ok(&["domstate", "--reason", "ends"]),
        "shut off (shutdown)"
    );
    assert_eq!(daemon.ok(&["snapshot-current", "kept", "--name"]), "s");
    daemon.ok(&["snapshot-revert", "kept", "s"]);
    daemon.ok(&["destroy", "kept"]);
}

#[test]
fn the_documentation_lists_every_procedure_as_it_is() {
    let text = fs::read_to_string("docs/libvirt-coverage.md").unwrap();
    let rows: Vec<Vec<&str>> = text
        .lines()
        .filter(|line| line.starts_with("| ") && !line.contains("| number |"))
        .map(|line| line.split('|').map(str::trim).collect())
        .collect();
    let coverage = livepoint::daemon::coverage();
    assert_eq!((rows.len(), coverage.len()), (205, 205));
    for (row, (number, name, is_there)) in rows.iter().zip(coverage) {
        assert_eq!(row[1..3], [number.to_string().as_str(), name]);
        assert!(["yes", "partial", "no"].contains(&row[3]), "{row:?}");
        // Events are sent rather than called, and are yes where they happen.
        let is_event = row[4].starts_with("an event");
        assert!(is_event || is_there == (row[3] != "no"), "{row:?}");
        assert_eq!(
            row[3] == "partial",
            row[3] == "partial" && !row[4].is_empty()
        );
    }
}

#[test]
fn a_core_file_has_the_guests_memory_where_the_guest_has_it() {
    use std::os::unix::fs::FileExt as _;
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    daemon.define_echo("d");
    daemon.ok(&["start", "d"]);
    let core = daemon.path("core");
    daemon.ok(&["dump", "d", core.to_str().unwrap(), "--memory-only"]);
    assert_eq!(
        daemon.ok(&["domstate", "d", "--reason"]),
        "running (unpaused)"
    );
    let readelf = |arg: &str, file: &std::path::Path| {
        let output = std::process::Command::new("readelf")
            .arg(arg)
            .arg(file)
            .output();
        String::from_utf8(output.unwrap().stdout).unwrap()
    };
    assert!(readelf("-hW", &core).contains("CORE (Core file)"));
    assert!(readelf("-nW", &core).contains("NT_PRSTATUS"));
    // The guest is loaded at 2 MiB: its file's bytes are there in the core.
    let segments = readelf("-lW", &core);
    let number = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
    let loads: Vec<Vec<u64>> = segments
        .lines()
        .filter(|line| line.trim().starts_with("LOAD"))
        .map(|line| {
            line.split_whitespace()
                .skip(1)
                .take(4)
                .map(number)
                .collect()
        })
        .collect();
    let guest = daemon.path("echo.elf");
    fs::write(&guest, livepoint::guests::find("echo").unwrap().elf).unwrap();
    let text = readelf("-lW", &guest);
    let first = text
        .lines()
        .find(|line| line.trim().starts_with("LOAD"))
        .unwrap();
    let first: Vec<u64> = first
        .split_whitespace()
        .skip(1)
        .take(5)
        .map(number)
        .collect();
    let (offset, physical) = (first[0], first[2]);
    let holds = |load: &&Vec<u64>| (load[2]..load[2] + load[3]).contains(&physical);
    let load = loads.iter().find(holds).unwrap();
    let (mut in_guest, mut in_core) = ([0_u8; 256], [0_u8; 256]);
    fs::File::open(&guest)
        .unwrap()
        .read_exact_at(&mut in_guest, offset)
        .unwrap();
    let at = load[0] + physical - load[2];
    fs::File::open(&core)
        .unwrap()
        .read_exact_at(&mut in_core, at)
        .unwrap();
    assert_eq!(in_guest, in_core);
    assert!(!daemon.path("core.lpi").exists());
}

#[test]
fn a_python_program_runs_twenty_domains_at_once_and_hears_of_all() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let output = std::process::Command::new("timeout")
        .args(["300", "/usr/bin/python3", "tests/virsh/fleet.py"])
        .arg(daemon.uri())
        .arg("20")
        .arg(daemon.path(""))
        .output()
        .unwrap();
    let printed = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{printed}{errors}{}", daemon.log());
    println!("{printed}");
}

#[test]
fn a_service_manager_gives_the_sockets_and_is_told_that_they_are_served() {
    use std::os::unix::net::UnixDatagram;
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let notify = UnixDatagram::bind(path("notify")).unwrap();
    notify
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    // What systemd does before it starts a service that it has sockets for.
    let program = "import os, socket, sys\n\
        here, daemon = sys.argv[1:3]\n\
        names = ['rw', 'ro']\n\
        kept = []\n\
        for at, name in enumerate(names):\n\
        \x20   made = socket.socket(socket.AF_UNIX)\n\
        \x20   made.bind(f'{here}/{name}')\n\
        \x20   made.listen()\n\
        \x20   kept.append(made.detach())\n\
        spare = [os.dup2(fd, 100 + at) for at, fd in enumerate(kept)]\n\
        for at, fd in enumerate(spare):\n\
        \x20   os.dup2(fd, 3 + at)\n\
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2',\n\
        \x20   LISTEN_FDNAMES='livepoint:livepoint-ro', NOTIFY_SOCKET=f'{here}/notify')\n\
        os.execv(daemon, [daemon, '--config-dir', f'{here}/etc', '--state-dir', f'{here}/var',\n\
        \x20   '--runtime-dir', f'{here}/run', '--timeout', '1'])\n";
    let mut child = std::process::Command::new("/usr/bin/python3")
        .args(["-c", program])
        .arg(dir.path())
        .arg(env!("CARGO_BIN_EXE_livepointd"))
        .spawn()
        .unwrap();
    let mut told = [0; 64];
    let count = notify.recv(&mut told).unwrap();
    assert_eq!(&told[..count], b"READY=1");
    let mut client = common::rpc_client::RpcClient::open(&path("rw"));
    assert!(client.domains().is_empty());
    let mut read_only = common::rpc_client::RpcClient::open(&path("ro"));
    assert_eq!(read_only.call(11, &"<domain/>").unwrap(), Err(29));
    drop((client, read_only));
    // Nobody is there any more, so that it ends by itself.
    let count = notify.recv(&mut told).unwrap();
    assert_eq!(&told[..count], b"STOPPING=1");
    assert!(child.wait().unwrap().success());
}

#[test]
fn a_disk_tells_its_size_and_what_was_asked_of_it() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let disk = daemon.path("disk.img");
    fs::File::create(&disk).unwrap().set_len(8 << 20).unwrap();
    let device = format!(
        "<disk type='file' device='disk'><source file='{}'/>\
         <target dev='vda' bus='virtio'/></disk><console type='pty'/>",
        disk.display()
    );
    let file = daemon.domain("d", "echo", 64, &device);
    daemon.ok(&["define", file.to_str().unwrap()]);
    daemon.ok(&["start", "d"]);
    let info = daemon.ok(&["domblkinfo", "d", "vda"]);
    assert!(info.contains("Capacity:       8388608"), "{info}");
    // The built-in guest has no driver for disks: nothing is asked of it.
    let stats = daemon.ok(&["domblkstat", "d", "vda"]);
    for line in [
        "vda rd_req 0",
        "vda wr_bytes 0",
        "vda flush_operations 0",
        "vda errs 0",
        "vda rd_total_times 0",
        "vda flush_total_times 0",
    ] {
        assert!(stats.contains(line), "{stats}");
    }
    assert!(daemon.ok(&["domblklist", "d"]).contains("vda      /"));
    let all = daemon.ok(&["domstats", "d", "--block"]);
    for line in [
        "block.count=1",
        "block.0.name=vda",
        "block.0.rd.reqs=0",
        "block.0.wr.times=0",
        "block.0.capacity=8388608",
    ] {
        assert!(all.contains(line), "{all}");
    }
    assert!(
        daemon
            .refused(&["domblkinfo", "d", "vdb"])
            .contains("not assigned to domain")
    );
}

#[test]
fn a_qcow2_disk_is_as_large_as_its_guest_sees_it_and_takes_what_is_in_it() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let disk = daemon.path("disk.qcow2");
    let made = std::process::Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&disk)
        .arg("1G")
        .status();
    assert!(
        made.expect("qemu-img, of the Debian package qemu-utils")
            .success()
    );
    let device = format!(
        "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{}'/><target dev='vda' bus='virtio'/></disk><console type='pty'/>",
        disk.display()
    );
    let file = daemon.domain("q", "echo", 64, &device);
    daemon.ok(&["define", file.to_str().unwrap()]);
    for run in ["", "start"] {
        if !run.is_empty() {
            daemon.ok(&[run, "q"]);
        }
        let info = daemon.ok(&["domblkinfo", "q", "vda"]);
        let figure = |name: &str| -> u64 {
            let line = info.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().last().unwrap().parse().unwrap()
        };
        assert_eq!(figure("Capacity:"), 1 << 30, "{info}");
        assert!(figure("Allocation:") < 1 << 20, "{info}");
        assert_eq!(figure("Physical:"), fs::metadata(&disk).unwrap().len());
    }
    let all = daemon.ok(&["domstats", "q", "--block"]);
    assert!(all.contains("block.0.capacity=1073741824"), "{all}");
    let xml = daemon.ok(&["dumpxml", "q"]);
    assert!(xml.contains("type='qcow2'"), "{xml}");
}

#[test]
fn an_interface_is_listed_with_its_tap_and_tells_what_passed_it() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let mac = "52:54:00:ab:cd:ef";
    let tap = daemon.start_with_interface("n", mac, "an interface under virsh");
    let Some(tap) = tap.as_deref() else {
        return;
    };
    assert!(tap.starts_with("vnet"), "{tap}");
    for device in [tap, "52:54:00:AB:CD:EF"] {
        let stats = daemon.ok(&["domifstat", "n", device]);
        assert!(stats.contains("tx_packets 0"), "{stats}");
    }
    let all = daemon.ok(&["domstats", "n", "--interface"]);
    assert!(
        all.contains("net.count=1") && all.contains(&format!("net.0.name={tap}")),
        "{all}"
    );
    let unknown = daemon.refused(&["domifstat", "n", "eth7"]);
    assert!(unknown.contains("is not a known interface"), "{unknown}");
    assert!(!daemon.ok(&["dumpxml", "--inactive", "n"]).contains("vnet"));
    daemon.ok(&["destroy", "n"]);
    let gone = format!("/sys/class/net/{tap}");
    wait_for("the tap is gone", &daemon, || {
        !std::path::Path::new(&gone).exists()
    });
}

#[test]
fn a_guest_with_a_balloon_can_be_asked_for_memory_and_one_without_cannot() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    let file = daemon.domain("b", "echo", 64, "<console type='pty'/>");
    let xml = fs::read_to_string(&file).unwrap();
    let balloon = "<memballoon model='virtio' freePageReporting='on'/>";
    fs::write(&file, xml.replace("<memballoon model='none'/>", balloon)).unwrap();
    daemon.ok(&["define", file.to_str().unwrap()]);
    daemon.ok(&["start", "b"]);
    daemon.ok(&["setmem", "b", "32768", "--live"]);
    // The built-in guest has no driver for it: it gives nothing.
    assert!(
        daemon
            .ok(&["dominfo", "b"])
            .contains("Used memory:    65536 KiB")
    );
    assert!(daemon.ok(&["dommemstat", "b"]).contains("actual 65536"));
    let more = daemon.refused(&["setmem", "b", "65540", "--live"]);
    assert!(more.contains("higher than max memory"), "{more}");
    daemon.ok(&["setmem", "b", "49152", "--config"]);
    let inactive = daemon.ok(&["dumpxml", "--inactive", "b"]);
    let current = "<currentMemory unit='KiB'>49152</currentMemory>";
    assert!(inactive.contains(current), "{inactive}");
    assert!(
        inactive.contains("<memory unit='KiB'>65536</memory>"),
        "{inactive}"
    );
    // Nor does it say how it uses its memory; how often it would be asked is kept.
    let period = |view: &[&str]| {
        let xml = daemon.ok(&[&["dumpxml", "b"][..], view].concat());
        let at = xml.find("<stats period='");
        at.map(|at| {
            xml[at + 15..]
                .chars()
                .take_while(char::is_ascii_digit)
                .collect::<String>()
        })
    };
    daemon.ok(&["dommemstat", "b", "--period", "7", "--live"]);
    daemon.ok(&["dommemstat", "b", "--period", "9", "--config"]);
    assert_eq!(period(&[]).as_deref(), Some("7"));
    assert_eq!(period(&["--inactive"]).as_deref(), Some("9"));
    daemon.ok(&["dommemstat", "b", "--period", "0", "--live", "--config"]);
    assert_eq!((period(&[]), period(&["--inactive"])), (None, None));
    let stats = daemon.ok(&["dommemstat", "b"]);
    assert!(!stats.contains("unused"), "{stats}");
    daemon.define_echo("plain");
    daemon.ok(&["start", "plain"]);
    let none = daemon.refused(&["setmem", "plain", "32768", "--live"]);
    assert!(none.contains("without the balloon"), "{none}");
    for place in ["--live", "--config"] {
        let none = daemon.refused(&["dommemstat", "plain", "--period", "7", place]);
        assert!(none.contains("balloon model must be virtio"), "{none}");
    }
}
