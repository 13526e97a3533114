//! A console whose driver and whose host may do anything.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress};

use super::Console;
use crate::machine::device::{Device, Quiesce};
use crate::machine::spec::SerialBackend;
use crate::machine::virtio::testing::{
    BUFFERS, NEEDS_RESET, NEXT, QUEUE_SIZE, RAM_BYTES, Rig, WRITE, descriptor,
};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const PATIENCE: Duration = Duration::from_secs(60);

/// A console at one end of a socket, which holds little; the other end is returned.
fn at_socket() -> (SerialBackend, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&ours, 0x1_0000).unwrap();
    theirs.set_read_timeout(Some(PATIENCE)).unwrap();
    (SerialBackend::Stream(Arc::new(OwnedFd::from(ours))), theirs)
}

/// A console that waits for its reader.
fn patient(backend: &SerialBackend) -> Arc<Console> {
    Arc::new(Console::with_stall_max(backend, PATIENCE).unwrap())
}

fn started(backend: &SerialBackend) -> Rig {
    let rig = Rig::new(patient(backend));
    rig.start(0);
    rig
}

/// Has the guest print `bytes`, which go into a buffer of their own.
fn print(rig: &Rig, index: u16, bytes: &[u8]) {
    let at = BUFFERS + 0x1_0000 * u64::from(index);
    rig.memory().write_slice(bytes, GuestAddress(at)).unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    rig.offer_at(TRANSMIT, index, &[descriptor(at, len, 0, 0)]);
}

fn read(from: &mut UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    from.read_exact(&mut bytes).unwrap();
    bytes
}

fn buffer(rig: &Rig, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    rig.memory()
        .read_slice(&mut bytes, GuestAddress(BUFFERS))
        .unwrap();
    bytes
}

#[test]
fn what_the_guest_prints_goes_out_and_what_is_typed_comes_in() {
    let (backend, mut host) = at_socket();
    let rig = started(&backend);
    // In two pieces, one request.
    rig.memory()
        .write_slice(b"hello, host", GuestAddress(BUFFERS + 0x1000))
        .unwrap();
    let pieces = [
        descriptor(BUFFERS + 0x1000, 7, NEXT, 1),
        descriptor(BUFFERS + 0x1007, 4, 0, 0),
    ];
    rig.offer(TRANSMIT, &pieces);
    assert_eq!(rig.wait_used(TRANSMIT, 1), Some((0, 0)));
    assert_eq!(read(&mut host, 11), b"hello, host");
    // What is typed before there is room for it waits.
    host.write_all(b"hello").unwrap();
    rig.offer(RECEIVE, &[descriptor(BUFFERS, 3, WRITE, 0)]);
    assert_eq!(rig.wait_used(RECEIVE, 1), Some((0, 3)));
    assert_eq!(buffer(&rig, 3), b"hel");
    rig.offer(RECEIVE, &[descriptor(BUFFERS, 64, WRITE, 0)]);
    assert_eq!(rig.wait_used(RECEIVE, 2), Some((0, 2)));
    assert_eq!(buffer(&rig, 2), b"lo");
    // And what is typed after it wakes the device.
    rig.offer(RECEIVE, &[descriptor(BUFFERS, 64, WRITE, 0)]);
    host.write_all(b"guest").unwrap();
    assert_eq!(rig.wait_used(RECEIVE, 3), Some((0, 5)));
    assert_eq!(buffer(&rig, 5), b"guest");
}

#[test]
fn a_terminal_may_be_opened_left_and_opened_again() {
    let console = Arc::new(Console::open(&SerialBackend::Pty { mode: 0o600 }).unwrap());
    let path = console.path().unwrap().to_owned();
    let rig = Rig::new(console);
    rig.start(0);
    // Nobody is there: gone.
    print(&rig, 0, b"nobody reads this");
    assert_eq!(rig.wait_used(TRANSMIT, 1), Some((0, 0)));
    for round in 1..=2 {
        rig.offer(RECEIVE, &[descriptor(BUFFERS, 64, WRITE, 0)]);
        let mut terminal = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(&path)
            .unwrap();
        terminal.write_all(b"typed").unwrap();
        assert_eq!(rig.wait_used(RECEIVE, round), Some((0, 5)));
        assert_eq!(buffer(&rig, 5), b"typed");
        print(&rig, 1, b"shown");
        rig.wait_used(TRANSMIT, 1 + round).unwrap();
        let mut shown = [0; 5];
        terminal.read_exact(&mut shown).unwrap();
        assert_eq!(&shown, b"shown");
    }
}

/// Prints more than the host takes, one letter in each request.
fn print_too_much(rig: &Rig) {
    for index in 0..QUEUE_SIZE {
        let letter = b'a' + u8::try_from(index).unwrap();
        print(rig, index, &[letter; 0x1_0000]);
    }
    rig.wait(|| rig.used(TRANSMIT) >= 1);
    // Time to get into the middle of a request, which no test depends on.
    std::thread::sleep(Duration::from_millis(50));
}

#[test]
fn a_request_that_has_gone_out_in_part_goes_on_there_after_a_restore() {
    let (backend, mut host) = at_socket();
    let rig = started(&backend);
    print_too_much(&rig);
    let saved = rig.pause_and_save();
    assert!(rig.used(TRANSMIT) < QUEUE_SIZE);
    // Another device with the same memory and socket, as a restore makes it.
    let ram = rig.ram.clone();
    drop(rig);
    let restored = Rig::restored(patient(&backend), ram, &saved);
    assert_eq!(restored.device.save(), saved);
    restored.device.resume();
    for index in 0..QUEUE_SIZE {
        let text = read(&mut host, 0x1_0000);
        let letter = b'a' + u8::try_from(index).unwrap();
        assert!(text.iter().all(|&byte| byte == letter), "request {index}");
    }
    assert!(restored.wait_used(TRANSMIT, QUEUE_SIZE).is_some());
    host.set_nonblocking(true).unwrap();
    let twice = host.read(&mut [0; 16]);
    assert_eq!(twice.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_host_that_leaves_holds_nothing_up() {
    let (backend, host) = at_socket();
    let rig = started(&backend);
    rig.offer(RECEIVE, &[descriptor(BUFFERS, 64, WRITE, 0)]);
    print_too_much(&rig);
    drop(host);
    rig.wait_used(TRANSMIT, QUEUE_SIZE).unwrap();
    print(&rig, 0, b"gone");
    rig.wait_used(TRANSMIT, QUEUE_SIZE + 1).unwrap();
    assert_eq!(rig.used(RECEIVE), 0);
}

#[test]
fn a_reader_that_takes_nothing_holds_the_guest_up_for_a_moment_only() {
    let (backend, mut host) = at_socket();
    let rig = Rig::new(Arc::new(Console::open(&backend).unwrap()));
    rig.start(0);
    print_too_much(&rig);
    assert!(rig.wait_used(TRANSMIT, QUEUE_SIZE).is_some());
    // What had gone out until then is whole; the rest is gone.
    host.set_nonblocking(true).unwrap();
    let mut kept = Vec::new();
    let end = host.read_to_end(&mut kept).unwrap_err();
    assert_eq!(end.kind(), std::io::ErrorKind::WouldBlock);
    assert!(kept.len() < usize::from(QUEUE_SIZE) * 0x1_0000);
    for (at, &byte) in kept.iter().enumerate() {
        assert_eq!(usize::from(byte - b'a'), at / 0x1_0000, "byte {at}");
    }
    // A reader that goes on gets what comes then.
    print(&rig, 0, b"again");
    rig.wait_used(TRANSMIT, QUEUE_SIZE + 1).unwrap();
    host.set_nonblocking(false).unwrap();
    assert_eq!(read(&mut host, 5), b"again");
}

#[test]
fn a_reset_forgets_what_had_gone_out() {
    let (backend, mut host) = at_socket();
    let rig = started(&backend);
    print_too_much(&rig);
    let whole = usize::from(rig.used(TRANSMIT));
    rig.start(0);
    print(&rig, 0, b"THE END");
    let mut all = Vec::new();
    while !all.ends_with(b"THE END") {
        all.extend(read(&mut host, 1));
    }
    assert_eq!(rig.wait_used(TRANSMIT, 1), Some((0, 0)));
    assert!(all.len() >= whole * 0x1_0000 + 7);
    assert!(all.len() < usize::from(QUEUE_SIZE) * 0x1_0000 + 7);
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_reset_the_device() {
    let (backend, mut host) = at_socket();
    let rig = started(&backend);
    for (what, queue, chain) in [
        ("no room", RECEIVE, descriptor(BUFFERS, 0, WRITE, 0)),
        (
            "nothing to write to",
            RECEIVE,
            descriptor(BUFFERS, 64, 0, 0),
        ),
        ("a loop", TRANSMIT, descriptor(BUFFERS, 64, NEXT, 0)),
        (
            "outside of memory",
            TRANSMIT,
            descriptor(RAM_BYTES, 64, 0, 0),
        ),
    ] {
        rig.start(0);
        rig.offer(queue, &[chain]);
        assert_eq!(rig.wait_used(queue, 1), None, "{what}");
        assert_ne!(rig.status() & NEEDS_RESET, 0, "{what}");
        rig.start(0);
        print(&rig, 0, b"well");
        assert_eq!(rig.wait_used(TRANSMIT, 1), Some((0, 0)), "{what}");
        assert_eq!(read(&mut host, 4), b"well");
    }
}
