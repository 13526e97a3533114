//! A network device whose driver, or whose other end, may do anything.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::io::{Errno, read, write};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use virtio_queue::desc::RawDescriptor;
use vm_memory::{Bytes, GuestAddress};

use super::Net;
use crate::machine::device::{Device, Quiesce};
use crate::machine::pci::PciFunction;
use crate::machine::spec::{NetPort, NetSpec};
use crate::machine::virtio::feature;
use crate::machine::virtio::testing::{
    BUFFERS, INDIRECT, NEEDS_RESET, NEXT, RAM_BYTES, Rig, WRITE, descriptor,
};
use crate::state::StateSet;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];
const STATUS: u64 = 1 << 16;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const PATIENCE: Duration = Duration::from_secs(60);

/// A device with its driver, and the other end of its wire.
struct Wire {
    rig: Rig,
    net: Arc<Net>,
    host: OwnedFd,
}

fn pair() -> (OwnedFd, OwnedFd) {
    let ends = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    );
    let (device, host) = ends.unwrap();
    fcntl_setfl(&device, OFlags::NONBLOCK).unwrap();
    fcntl_setfl(&host, OFlags::NONBLOCK).unwrap();
    (device, host)
}

fn net(socket: Arc<OwnedFd>, link_up: bool) -> Arc<Net> {
    let spec = NetSpec {
        name: "net0".to_owned(),
        mac: MAC,
        link_up,
        port: NetPort::Socket(socket),
    };
    Arc::new(Net::open(&spec).unwrap())
}

fn wire_with(link_up: bool) -> Wire {
    let (device, host) = pair();
    let net = net(Arc::new(device), link_up);
    let rig = Rig::new(net.clone());
    Wire { rig, net, host }
}

fn wire() -> Wire {
    wire_with(true)
}

/// A packet with its header; `seed` says what it is.
fn packet(seed: u8, len: usize) -> Vec<u8> {
    let bytes = (0..7_u8).cycle().map(|at| seed.wrapping_add(at)).take(len);
    [vec![0; 12], bytes.collect()].concat()
}

fn buffer(number: u64) -> u64 {
    BUFFERS + number * 0x5000
}

impl Wire {
    fn send(&self, packet: &[u8]) {
        assert_eq!(write(&self.host, packet).unwrap(), packet.len());
    }

    fn take(&self) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 1 << 17];
        match read(&self.host, &mut bytes) {
            Ok(len) => Some(bytes[..len].to_vec()),
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn wait_packet(&self) -> Vec<u8> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(packet) = self.take() {
                return packet;
            }
            assert!(Instant::now() < deadline, "no packet comes");
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Has the driver send `packet` from buffer `number`.
    fn transmit(&self, number: u16, packet: &[u8]) {
        let address = buffer(number.into());
        let memory = self.rig.memory();
        memory.write_slice(packet, GuestAddress(address)).unwrap();
        let len = u32::try_from(packet.len()).unwrap();
        self.rig
            .offer_at(TRANSMIT, number, &[descriptor(address, len, 0, 0)]);
    }

    /// Has the driver offer buffer `number` for a packet of at most `len` bytes.
    fn make_room(&self, number: u16, len: u32) {
        let address = buffer(u64::from(number) + 32);
        self.rig
            .offer_at(RECEIVE, number, &[descriptor(address, len, WRITE, 0)]);
    }

    fn received(&self, number: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let address = GuestAddress(buffer(u64::from(number) + 32));
        self.rig.memory().read_slice(&mut bytes, address).unwrap();
        bytes
    }

    /// Checks that packets pass both ways; the rings are empty.
    fn works(&self) -> bool {
        let used = [RECEIVE, TRANSMIT].map(|queue| self.rig.used(queue).wrapping_add(1));
        self.transmit(3, &packet(9, 60));
        if self.rig.wait_used(TRANSMIT, used[1]).is_none() || self.wait_packet() != packet(9, 60) {
            return false;
        }
        self.make_room(3, 2048);
        self.send(&packet(8, 60));
        self.rig.wait_used(RECEIVE, used[0]) == Some((3, 72))
    }
}

fn counted(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[test]
fn packets_pass_in_order_both_ways_and_are_counted() {
    let wire = wire();
    wire.rig.start(STATUS | feature::EVENT_INDEX);
    assert_eq!(wire.rig.read::<8>(0x2000), [0x52, 0x54, 0, 1, 2, 3, 1, 0]);
    for number in 0..10 {
        wire.transmit(number, &packet(u8::try_from(number).unwrap(), 100));
    }
    for number in 0..10 {
        assert_eq!(wire.wait_packet(), packet(number, 100));
    }
    wire.rig.wait_used(TRANSMIT, 10).unwrap();
    for number in 0..10 {
        wire.make_room(number, 1526);
    }
    for number in 0..10 {
        wire.send(&packet(0x40 + number, 1514));
    }
    assert_eq!(wire.rig.wait_used(RECEIVE, 10), Some((9, 1526)));
    for number in 0..10 {
        let mut expected = packet(0x40 + u8::try_from(number).unwrap(), 1514);
        // In one buffer.
        expected[10] = 1;
        assert_eq!(wire.received(number, 1526), expected);
    }
    let counters = wire.net.counters();
    let found = [
        &counters.sent,
        &counters.sent_bytes,
        &counters.received,
        &counters.received_bytes,
        &counters.received_dropped,
        &counters.sent_errors,
    ]
    .map(counted);
    assert_eq!(found, [10, 1000, 10, 15140, 0, 0]);
    assert!(!wire.rig.recorder.messages().is_empty());
}

#[test]
fn a_packet_in_many_pieces_is_one_packet() {
    let wire = wire();
    wire.rig.start(STATUS);
    let bytes = packet(5, 88);
    let memory = wire.rig.memory();
    memory.write_slice(&bytes, GuestAddress(buffer(0))).unwrap();
    let pieces = [
        descriptor(buffer(0), 5, NEXT, 1),
        descriptor(buffer(0) + 5, 0, NEXT, 2),
        descriptor(buffer(0) + 5, 95, 0, 0),
    ];
    wire.rig.offer(TRANSMIT, &pieces);
    assert_eq!(wire.wait_packet(), bytes);
    let room = [
        descriptor(buffer(32), 11, NEXT | WRITE, 1),
        descriptor(buffer(32) + 11, 40, NEXT | WRITE, 2),
        descriptor(buffer(32) + 51, 2000, WRITE, 0),
    ];
    wire.rig.offer(RECEIVE, &room);
    wire.send(&bytes);
    assert_eq!(wire.rig.wait_used(RECEIVE, 1), Some((0, 100)));
    assert_eq!(wire.received(0, 100)[12..], bytes[12..]);
    assert_eq!(wire.received(0, 12)[10..], [1, 0]);
}

#[test]
fn a_packet_that_does_not_fit_is_dropped_and_the_buffer_takes_the_next() {
    let wire = wire();
    wire.rig.start(STATUS);
    wire.make_room(0, 112);
    wire.send(&packet(1, 101));
    // Less than a header, and nothing but one.
    wire.send(&[7; 5]);
    wire.send(&packet(1, 0));
    wire.send(&packet(2, 100));
    assert_eq!(wire.rig.wait_used(RECEIVE, 1), Some((0, 112)));
    assert_eq!(wire.received(0, 112)[12..], packet(2, 100)[12..]);
    assert_eq!(counted(&wire.net.counters().received_dropped), 3);
}

#[test]
fn packets_wait_in_the_host_until_there_is_room() {
    let wire = wire();
    wire.rig.start(STATUS);
    for seed in 0..5 {
        wire.send(&packet(seed, 60));
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(wire.rig.used(RECEIVE), 0);
    for number in 0..5 {
        wire.make_room(number, 128);
        let next = number + 1;
        assert_eq!(wire.rig.wait_used(RECEIVE, next), Some((number.into(), 72)));
        let seed = u8::try_from(number).unwrap();
        assert_eq!(wire.received(number, 72)[12..], packet(seed, 60)[12..]);
    }
}

#[test]
fn packets_wait_in_the_guest_until_the_host_takes_them() {
    let wire = wire();
    wire.rig.start(STATUS);
    let size = 16 << 10;
    // What fits into the socket before it is full; then the rest waits in the ring.
    let mut sent = 0_u16;
    loop {
        let number = sent % 16;
        wire.transmit(number, &packet(u8::try_from(number).unwrap(), size));
        sent += 1;
        let deadline = Instant::now() + Duration::from_millis(200);
        while wire.rig.used(TRANSMIT) != sent && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(200));
        }
        if wire.rig.used(TRANSMIT) != sent {
            break;
        }
        assert!(sent < 10_000, "the socket takes everything");
    }
    for number in 0..sent {
        let seed = u8::try_from(number % 16).unwrap();
        assert_eq!(wire.wait_packet(), packet(seed, size));
    }
    wire.rig.wait_used(TRANSMIT, sent).unwrap();
    assert_eq!(wire.take(), None, "twice");
    let counters = wire.net.counters();
    assert_eq!(counted(&counters.sent), u64::from(sent));
    assert_eq!(counted(&counters.sent_errors), 0);
}

#[test]
fn with_its_link_down_a_device_drops_both_ways() {
    let wire = wire_with(false);
    wire.rig.start(STATUS);
    assert_eq!(wire.rig.read::<2>(0x2006), [0, 0]);
    wire.transmit(0, &packet(1, 60));
    wire.rig.wait_used(TRANSMIT, 1).unwrap();
    wire.make_room(0, 128);
    wire.send(&packet(2, 60));
    let counters = wire.net.counters();
    wire.rig.wait(|| counted(&counters.received_dropped) == 1);
    assert_eq!(wire.take(), None);
    assert_eq!(
        (wire.rig.used(RECEIVE), counted(&counters.sent_dropped)),
        (0, 1)
    );
}

#[test]
fn a_pause_leaves_packets_where_they_are_and_a_restore_carries_each_once() {
    let wire = wire();
    wire.rig.start(STATUS);
    assert!(wire.works());
    wire.make_room(4, 128);
    wire.rig.device.pause();
    let soon = Instant::now() + PATIENCE;
    wire.rig.device.drain(soon).unwrap();
    wire.transmit(5, &packet(0x55, 60));
    wire.send(&packet(0x66, 60));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(wire.take(), None, "paused");
    assert_eq!(wire.rig.used(RECEIVE), 1, "paused");
    let saved = wire.rig.device.save();
    // Another device with the same memory and wire, as a restore makes it.
    let ram = wire.rig.ram.clone();
    let super::Port::Socket(socket) = &wire.net.port else {
        panic!("a socket was given");
    };
    let net = net(socket.clone(), true);
    drop(wire.rig);
    let restored = Wire {
        rig: Rig::restored(net.clone(), ram, &saved),
        net,
        host: wire.host,
    };
    assert_eq!(restored.rig.device.save(), saved);
    restored.rig.device.resume();
    assert_eq!(restored.wait_packet(), packet(0x55, 60));
    assert_eq!(restored.rig.wait_used(RECEIVE, 2), Some((4, 72)));
    assert_eq!(restored.received(4, 72)[12..], packet(0x66, 60)[12..]);
    assert!(restored.works(), "each once");
}

#[test]
fn an_end_that_goes_away_harms_nobody() {
    let wire = wire();
    wire.rig.start(STATUS);
    wire.make_room(0, 128);
    drop(wire.host);
    wire.rig.offer(TRANSMIT, &[descriptor(buffer(0), 72, 0, 0)]);
    wire.rig.wait_used(TRANSMIT, 1).unwrap();
    assert_eq!(counted(&wire.net.counters().sent_errors), 1);
    assert_eq!(wire.rig.status() & NEEDS_RESET, 0);
}

/// Chains that break the rules, by what is wrong with them; `flags` say which way they go.
fn broken_chains(flags: u16) -> Vec<(&'static str, Vec<RawDescriptor>)> {
    let at = buffer(0);
    vec![
        ("no header", vec![descriptor(at, 11, flags, 0)]),
        ("nothing at all", vec![descriptor(at, 0, flags, 0)]),
        ("the other way", vec![descriptor(at, 64, flags ^ WRITE, 0)]),
        ("a loop", vec![descriptor(at, 64, NEXT | flags, 0)]),
        (
            "an index out of range",
            vec![descriptor(at, 64, NEXT | flags, 999)],
        ),
        (
            "a buffer outside of memory",
            vec![descriptor(RAM_BYTES - 16, 64, flags, 0)],
        ),
        (
            "an address that wraps",
            vec![descriptor(u64::MAX - 7, 64, flags, 0)],
        ),
        (
            "a chain longer than 4 GiB",
            vec![
                descriptor(at, u32::MAX, NEXT | flags, 1),
                descriptor(at, u32::MAX, flags, 0),
            ],
        ),
        (
            "a table that names itself",
            vec![descriptor(0x1000, 16, INDIRECT, 0)],
        ),
        ("an empty table", vec![descriptor(at, 0, INDIRECT, 0)]),
    ]
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_reset_the_device() {
    let wire = wire();
    for (queue, flags) in [(RECEIVE, WRITE), (TRANSMIT, 0)] {
        for (what, chain) in broken_chains(flags) {
            wire.rig.start(STATUS);
            wire.rig.offer(queue, &chain);
            assert_eq!(wire.rig.wait_used(queue, 1), None, "{queue} {what}");
            assert_eq!(wire.rig.used(queue), 0, "{queue} {what}");
            wire.rig.kick(queue);
            wire.rig.start(STATUS);
            assert!(wire.works(), "{queue} {what}");
        }
    }
}

#[test]
fn a_packet_of_more_pieces_than_a_system_call_takes_is_refused_alone() {
    let wire = wire();
    wire.rig.start(STATUS);
    let table = buffer(64);
    let count = 1500_u16;
    for at in 0..count {
        let more = if at + 1 < count { NEXT } else { 0 };
        let piece = descriptor(buffer(0), 1, more, at + 1);
        let address = GuestAddress(table + u64::from(at) * 16);
        wire.rig.memory().write_obj(piece, address).unwrap();
    }
    let len = u32::from(count) * 16;
    let chain = [descriptor(table, len, INDIRECT, 0)];
    wire.rig.offer(TRANSMIT, &chain);
    wire.rig.wait_used(TRANSMIT, 1).unwrap();
    assert_eq!(counted(&wire.net.counters().sent_errors), 1);
    assert!(wire.works());
}

#[test]
fn a_device_with_one_queue_enabled_uses_that_one() {
    let wire = wire();
    wire.rig.agree(STATUS | feature::VERSION_1);
    let queue = wire.rig.queue(TRANSMIT);
    wire.rig
        .memory()
        .write_slice(&[0; 0x800], GuestAddress(queue[1]))
        .unwrap();
    wire.rig.place_queue(TRANSMIT, queue);
    wire.rig.write(0x14, &[0xf]);
    wire.transmit(0, &packet(1, 60));
    assert_eq!(wire.wait_packet(), packet(1, 60));
}

#[test]
fn a_tap_of_the_host_carries_packets_where_one_can_be_made() {
    let name = format!("lvpt{}", std::process::id());
    let spec = NetSpec {
        name: "net0".to_owned(),
        mac: MAC,
        link_up: true,
        port: NetPort::Tap {
            name: Some(name.clone()),
            make: true,
        },
    };
    let net = match Net::open(&spec) {
        Ok(net) => Arc::new(net),
        Err(error) => {
            println!("skipped: {error}");
            return;
        }
    };
    assert_eq!(net.interface(), Some(name.as_str()));
    let busy = Net::open(&spec).unwrap_err();
    assert!(busy.to_string().contains("another program"), "{busy}");
    let rig = Rig::new(net.clone());
    rig.start(STATUS | 3);
    // A broadcast by an experimental protocol (0x88b5), which the host counts and drops.
    let frame = [&[0; 12][..], &[0xff; 6], &MAC, &[0x88, 0xb5], &[1; 46]].concat();
    let memory = rig.memory();
    memory.write_slice(&frame, GuestAddress(buffer(0))).unwrap();
    let counters = format!("/sys/class/net/{name}/statistics/rx_packets");
    let read = || std::fs::read_to_string(&counters).unwrap();
    let before: u64 = read().trim().parse().unwrap();
    rig.offer(TRANSMIT, &[descriptor(buffer(0), 72, 0, 0)]);
    rig.wait_used(TRANSMIT, 1).unwrap();
    assert_eq!(counted(&net.counters().sent), 1);
    rig.wait(|| read().trim().parse::<u64>().unwrap() > before);
    drop(rig);
    drop(net);
    assert!(!std::path::Path::new(&format!("/sys/class/net/{name}")).exists());
    let missing = NetSpec {
        port: NetPort::Tap {
            name: Some(name.clone()),
            make: false,
        },
        ..spec.clone()
    };
    let error = Net::open(&missing).unwrap_err().to_string();
    assert!(
        error.contains(&name) && error.contains("managed"),
        "{error}"
    );
    let bridge = NetSpec {
        port: NetPort::Bridge {
            bridge: "lo".to_owned(),
            name: None,
        },
        ..spec
    };
    let error = Net::open(&bridge).unwrap_err().to_string();
    assert!(error.contains("no bridge"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn no_guest_and_no_host_make_the_device_panic_or_hang(
        rings in prop::collection::vec(any::<u8>(), 0x2000),
        packets in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..3000), 0..8),
        index in any::<[u16; 2]>(),
        event_index: bool,
    ) {
        let wire = wire();
        wire.rig.start(STATUS | if event_index { feature::EVENT_INDEX } else { 0 });
        for packet in packets {
            wire.send(&packet);
        }
        wire.rig.memory().write_slice(&rings, GuestAddress(0x1000)).unwrap();
        for (queue, index) in [RECEIVE, TRANSMIT].into_iter().zip(index) {
            wire.rig.set_available(queue, index % 20);
            wire.rig.kick(queue);
        }
        wire.rig.device.pause();
        wire.rig.device.drain(Instant::now() + PATIENCE).unwrap();
        let saved = wire.rig.device.save();
        wire.rig.device.restore(&mut StateSet::new(saved).unwrap()).unwrap();
        wire.rig.device.resume();
        wire.rig.device.write_config(4, &2_u16.to_le_bytes());
        wire.rig.start(STATUS);
        // What was on its way meanwhile.
        while wire.take().is_some() {}
        wire.rig.device.pause();
        wire.rig.device.drain(Instant::now() + PATIENCE).unwrap();
        wire.rig.device.resume();
        while wire.take().is_some() {}
        wire.transmit(3, &packet(9, 60));
        prop_assert_eq!(wire.wait_packet(), packet(9, 60));
    }
}
