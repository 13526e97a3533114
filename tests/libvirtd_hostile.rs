//! The daemon under clients that misbehave, under load, and killed at random moments.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use common::livepointd::Daemon;
use common::rpc_client::{RpcClient, call_header, packet};
use common::{Random, have_kvm, long};
use livepoint::rpc::{DomainRef, Encoder, KNOWN, List};

/// What the daemon's process uses.
#[derive(Debug)]
struct Usage {
    rss_kib: u64,
    threads: usize,
    descriptors: usize,
    cpu_ticks: u64,
}

fn usage(daemon: &Daemon) -> Usage {
    let process = format!("/proc/{}", daemon.pid());
    let status = fs::read_to_string(format!("{process}/status")).unwrap();
    let rss = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let stat = fs::read_to_string(format!("{process}/stat")).unwrap();
    let fields: Vec<u64> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .map(|field| field.parse().unwrap_or(0))
        .collect();
    Usage {
        rss_kib: rss
            .unwrap()
            .split_whitespace()
            .next()
            .unwrap()
            .parse()
            .unwrap(),
        threads: fs::read_dir(format!("{process}/task")).unwrap().count(),
        descriptors: fs::read_dir(format!("{process}/fd")).unwrap().count(),
        cpu_ticks: fields[11] + fields[12],
    }
}

/// A client that behaves, in a thread: it notes the longest that a call took.
struct GoodClient {
    stop: Arc<AtomicBool>,
    thread: thread::JoinHandle<(Duration, u32)>,
}

impl GoodClient {
    fn start(socket: &Path, interval: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut client = RpcClient::open(socket);
        let seen = stop.clone();
        let thread = thread::spawn(move || {
            let (mut longest, mut calls) = (Duration::ZERO, 0);
            while !seen.load(Ordering::Acquire) {
                let start = Instant::now();
                let none = List::<DomainRef, 0>(Vec::new());
                client.call(344, &(none, 0_u32, 0_u32)).unwrap().unwrap();
                longest = longest.max(start.elapsed());
                calls += 1;
                thread::sleep(interval.saturating_sub(start.elapsed()));
            }
            (longest, calls)
        });
        Self { stop, thread }
    }

    /// Returns the longest that a call took, and how many there were.
    fn end(self) -> (Duration, u32) {
        self.stop.store(true, Ordering::Release);
        self.thread.join().unwrap()
    }
}

/// Returns a plausible call: arguments of the kinds that procedures take, in some order.
fn plausible(random: &mut Random, domain: &DomainRef) -> Vec<u8> {
    let known = &KNOWN[usize::try_from(random.below(KNOWN.len() as u64)).unwrap()];
    let mut payload = Vec::new();
    if random.below(4) > 0 {
        payload.extend(Encoder::of(domain));
    }
    for _ in 0..random.below(4) {
        match random.below(5) {
            0 => payload.extend(Encoder::of(&u32::try_from(random.below(8)).unwrap())),
            1 => payload.extend(Encoder::of(&"word")),
            2 => payload.extend(Encoder::of(&Some("<domainsnapshot/>"))),
            3 => payload.extend(Encoder::of(&None::<u32>)),
            _ => payload.extend(Encoder::of(&random.next())),
        }
    }
    packet(&call_header(known.number, 7), &payload)
}

/// Changes some bytes; mostly not the length, so that the rest of the stream stays a stream.
fn mutate(random: &mut Random, packet: &mut [u8]) {
    let from = if random.below(20) == 0 { 0 } else { 4 };
    for _ in 0..random.below(6) {
        let at = usize::try_from(random.below((packet.len() - from) as u64)).unwrap();
        packet[from + at] = u8::try_from(random.below(256)).unwrap();
    }
}

/// Waits until connections and calls have ended, and compares what the daemon uses.
fn check_for_leaks(daemon: &Daemon, before: &Usage) {
    let start = Instant::now();
    loop {
        let after = usage(daemon);
        let threads = after.threads <= before.threads + 2;
        let descriptors = after.descriptors <= before.descriptors + 4;
        let memory = after.rss_kib <= before.rss_kib + (96 << 10);
        if threads && descriptors && memory {
            return;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "before: {before:?}, after: {after:?}\n{}",
            daemon.log()
        );
        thread::sleep(Duration::from_millis(100));
    }
}

/// How long a call of an honest client may take while others do their worst. The short form shares
/// the machine with other tests: it finds calls that hang, and no more.
fn served_within() -> Duration {
    Duration::from_secs(if long() { 1 } else { 20 })
}

#[test]
fn mutated_packets_are_answered_or_hung_up_on_and_others_are_served_meanwhile() {
    if !have_kvm() {
        return;
    }
    let daemon = Daemon::new();
    daemon.define_echo("target");
    daemon.ok(&["start", "target"]);
    let good = GoodClient::start(&daemon.socket(), Duration::from_millis(20));
    let target = RpcClient::open(&daemon.socket()).domains().remove(0);
    let before = usage(&daemon);
    let mut random = Random::new(20_261_126);
    let mut sent = 0;
    while sent < 10_000 {
        let client = RpcClient::open(&daemon.socket());
        let mut socket = client.socket();
        socket.set_nonblocking(false).unwrap();
        for _ in 0..50 {
            let mut bytes = plausible(&mut random, &target);
            mutate(&mut random, &mut bytes);
            sent += 1;
            // The daemon may have hung up.
            if socket.write_all(&bytes).is_err() {
                break;
            }
        }
    }
    let (longest, calls) = good.end();
    println!("{sent} packets; {calls} calls of another client, the longest took {longest:?}");
    assert!(calls > 0 && longest < served_within(), "{longest:?}");
    check_for_leaks(&daemon, &before);
    let log = daemon.log();
    assert!(!log.contains("panicked"), "{log}");
    RpcClient::open(&daemon.socket()).domains();
}

#[test]
fn streams_of_anything_cost_others_nothing() {
    let daemon = Daemon::new();
    let good = GoodClient::start(&daemon.socket(), Duration::from_millis(20));
    let before = usage(&daemon);
    let mut random = Random::new(7);
    let mut held = Vec::new();
    for round in 0..1000_u32 {
        let Ok(mut stream) = UnixStream::connect(daemon.socket()) else {
            panic!("the daemon takes no more clients:\n{}", daemon.log());
        };
        stream
            .set_write_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        let bytes: Vec<u8> = match round % 5 {
            // Noise.
            0 => (0..random.below(3000))
                .map(|_| random.next().to_le_bytes()[0])
                .collect(),
            // The start of a packet of 32 MiB that never comes.
            1 => 0x0200_0004_u32.to_be_bytes().to_vec(),
            // A length that no packet has.
            2 => u32::MAX.to_be_bytes().to_vec(),
            // A header and half of its payload.
            3 => packet(&call_header(1, 0), &[0; 64])[..60].to_vec(),
            // An open whose name is longer than its packet.
            _ => packet(&call_header(1, 0), &[0, 0, 0, 1, 0x7f, 0xff, 0xff, 0xff]),
        };
        // The daemon may hang up at any moment.
        drop(stream.write_all(&bytes));
        // Some stay, silent.
        if round % 10 == 3 {
            held.push(stream);
        }
    }
    let (longest, calls) = good.end();
    assert!(calls > 0 && longest < served_within(), "{longest:?}");
    drop(held);
    check_for_leaks(&daemon, &before);
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

#[test]
fn a_client_that_reads_nothing_is_held_back_and_holds_up_nobody() {
    let daemon = Daemon::new();
    for number in 0..20 {
        daemon.define_echo(&format!("d{number}"));
    }
    let good = GoodClient::start(&daemon.socket(), Duration::from_millis(20));
    let before = usage(&daemon);
    let client = RpcClient::open(&daemon.socket());
    let none = List::<DomainRef, 0>(Vec::new());
    let call = packet(&call_header(344, 9), &Encoder::of(&(none, 0_u32, 0_u32)));
    let mut socket = client.socket();
    socket
        .set_write_timeout(Some(Duration::from_millis(500)))
        .unwrap();
    // Each answer is some kilobytes: the daemon stops reading from who does not take them.
    let block = call.repeat(100);
    let mut blocked = false;
    for _ in 0..1000 {
        if socket.write_all(&block).is_err() {
            blocked = true;
            break;
        }
    }
    assert!(
        blocked,
        "the daemon read 100,000 calls without an answer being taken"
    );
    let grown = usage(&daemon).rss_kib.saturating_sub(before.rss_kib);
    assert!(grown < 64 << 10, "{grown} KiB");
    let (longest, calls) = good.end();
    assert!(calls > 0 && longest < served_within(), "{longest:?}");
}

#[test]
fn a_read_only_connection_changes_nothing_whatever_it_asks_for() {
    const DENIED: i32 = 29;
    let daemon = Daemon::new();
    daemon.define_echo("d");
    // By the socket, and by the flag of an open at the other socket.
    let by_socket = RpcClient::open(&daemon.path("sock-ro"));
    let mut by_flag = RpcClient::connect(&daemon.socket()).unwrap();
    by_flag
        .call(1, &(Some("livepoint:///system"), 1_u32))
        .unwrap()
        .unwrap();
    for mut client in [by_socket, by_flag] {
        let domain = client.domains().remove(0);
        for known in KNOWN.iter().filter(|known| known.writes) {
            let answer = client.call(known.number, &(domain.clone(), 0_u32)).unwrap();
            assert_eq!(answer, Err(DENIED), "{}", known.name);
        }
        assert!(client.call(212, &(domain, 0_u32)).unwrap().is_ok());
    }
    assert_eq!(daemon.state("d"), "shut off");
}

#[test]
fn calls_that_no_client_of_libvirt_makes_are_answered_as_libvirtd_does() {
    const INTERNAL: i32 = 1;
    const NO_SUPPORT: i32 = 3;
    const RPC: i32 = 39;
    let daemon = Daemon::new();
    let mut early = RpcClient::connect(&daemon.socket()).unwrap();
    assert_eq!(early.call(59, &()).unwrap(), Err(INTERNAL), "not open");
    early.call(66, &0xdead_beef_u32).unwrap().unwrap();
    early.call(1, &(Some(""), 0_u32, "junk")).unwrap().unwrap();
    assert_eq!(
        early.call(1, &(Some(""), 0_u32)).unwrap(),
        Err(INTERNAL),
        "open twice"
    );
    assert_eq!(
        early.call(9999, &()).unwrap(),
        Err(RPC),
        "unknown procedure"
    );
    assert_eq!(
        early.call(305, &()).unwrap(),
        Err(RPC),
        "not of a hypervisor"
    );
    assert_eq!(
        early.call(211, &(0_u32, 0_u32)).unwrap(),
        Err(NO_SUPPORT),
        "screenshot"
    );
    assert_eq!(early.call(23, &()).unwrap(), Err(RPC), "no arguments");
    // Neither replies nor stray pieces of streams are answered; the next call is.
    for kind in [1, 2, 3] {
        let mut header = call_header(59, 77);
        header.kind = kind;
        early.socket().write_all(&packet(&header, b"")).unwrap();
    }
    early.call(59, &()).unwrap().unwrap();
    let mut other = RpcClient::connect(&daemon.socket()).unwrap();
    let wrong = other.call(1, &(Some("qemu:///system"), 0_u32)).unwrap();
    assert_eq!(wrong, Err(5), "another driver's URI");
    early.call(2, &()).unwrap().unwrap();
    let mut rest = Vec::new();
    assert_eq!(early.socket().read_to_end(&mut rest).unwrap(), 0, "closed");
}

/// Calls that fail since the daemon is dead, or a domain is in another state, are part of the test.
fn try_virsh(daemon: &Mutex<Daemon>, args: &[&str]) -> bool {
    let mut command = daemon.lock().unwrap().virsh_command(args);
    command.output().is_ok_and(|output| output.status.success())
}

#[test]
fn a_daemon_killed_at_random_moments_under_load_loses_no_domain() {
    if !have_kvm() {
        return;
    }
    let rounds = if long() { 100 } else { 10 };
    let daemon = Daemon::new();
    let kept = ["kept0", "kept1"];
    for name in kept {
        daemon.define_echo(name);
        daemon.ok(&["start", name]);
    }
    let ids = kept.map(|name| daemon.ok(&["domid", name]));
    let files: Vec<_> = (0..2)
        .map(|number| daemon.domain(&format!("churn{number}"), "echo", 16, ""))
        .collect();
    let daemon = Mutex::new(daemon);
    let over = AtomicBool::new(false);
    let mut random = Random::new(11);
    thread::scope(|scope| {
        for (number, file) in files.iter().enumerate() {
            let (daemon, over) = (&daemon, &over);
            scope.spawn(move || {
                let name = format!("churn{number}");
                while !over.load(Ordering::Acquire) {
                    for args in [
                        &["define", file.to_str().unwrap()][..],
                        &["start", &name],
                        &["snapshot-create-as", &name, "s", "--live"],
                        &["snapshot-delete", &name, "s"],
                        &["destroy", &name],
                        &["undefine", &name, "--snapshots-metadata"],
                    ] {
                        try_virsh(daemon, args);
                    }
                }
            });
        }
        for _ in 0..rounds {
            thread::sleep(Duration::from_millis(20 + random.below(700)));
            let mut daemon = daemon.lock().unwrap();
            daemon.kill();
            daemon.start();
        }
        over.store(true, Ordering::Release);
    });
    let daemon = daemon.into_inner().unwrap();
    for (name, id) in kept.into_iter().zip(ids) {
        assert_eq!(daemon.ok(&["domid", name]), id, "{}", daemon.log());
        assert_eq!(daemon.state(name), "running");
    }
    // A worker that had just been started when the daemon died is found by its socket.
    let start = Instant::now();
    loop {
        let running = daemon.ok(&["list", "--name"]);
        let mut running: Vec<_> = running.lines().filter(|name| !name.is_empty()).collect();
        running.sort_unstable();
        let sockets = fs::read_dir(daemon.path("run")).unwrap();
        let mut workers: Vec<String> = sockets
            .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
            .filter_map(|name| Some(name.strip_suffix(".sock")?.to_owned()))
            .collect();
        workers.sort_unstable();
        if running == workers {
            break;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "{running:?} run, and there are workers of {workers:?}\n{}",
            daemon.log()
        );
        thread::sleep(Duration::from_millis(100));
    }
    let log = daemon.log();
    assert!(
        !log.contains("panicked") && !log.contains("not used"),
        "{log}"
    );
}

#[test]
fn many_connections_that_poll_statistics_are_all_served_in_time() {
    if !have_kvm() {
        return;
    }
    let (domains, time, limit) = if long() {
        (20, Duration::from_secs(60), served_within())
    } else {
        (5, Duration::from_secs(5), served_within())
    };
    let connections = 100;
    let daemon = Daemon::new();
    for number in 0..domains {
        let name = format!("d{number}");
        daemon.define_echo(&name);
        daemon.ok(&["start", &name]);
    }
    let before = usage(&daemon);
    let start = Instant::now();
    let clients: Vec<_> = (0..connections)
        .map(|_| GoodClient::start(&daemon.socket(), Duration::from_secs(1)))
        .collect();
    thread::sleep(time);
    let during = usage(&daemon);
    for client in &clients {
        client.stop.store(true, Ordering::Release);
    }
    let ends: Vec<_> = clients.into_iter().map(GoodClient::end).collect();
    let longest = ends.iter().map(|(longest, _)| *longest).max().unwrap();
    let calls: u32 = ends.iter().map(|(_, calls)| calls).sum();
    let cpu_ms = (during.cpu_ticks - before.cpu_ticks) * 10;
    println!(
        "{connections} connections, {domains} domains, {:.1} s: {calls} calls, the longest took \
         {longest:?}; {cpu_ms} ms of CPU, {} KiB of memory",
        start.elapsed().as_secs_f64(),
        during.rss_kib
    );
    assert!(longest < limit, "{longest:?}");
}
