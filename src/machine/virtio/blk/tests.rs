//! A disk whose driver may do anything.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use virtio_queue::desc::RawDescriptor;
use vm_memory::{Bytes, GuestAddress};

use super::{Blk, Disk};
use crate::machine::device::{Device, Quiesce};
use crate::machine::pci::PciFunction;
use crate::machine::spec::{DiskCache, DiskFormat, DiskSpec};
use crate::machine::virtio::feature;
use crate::machine::virtio::testing::{
    BUFFERS, INDIRECT, NEEDS_RESET, NEXT, RAM_BYTES, Rig, WRITE, descriptor,
};
use crate::state::StateSet;

const SECTORS: u64 = 64;
const FLUSH: u64 = 1 << 9;
const DISCARD: u64 = 1 << 13;

const HEADER: u64 = BUFFERS;
const DATA: u64 = BUFFERS + 0x1000;
const STATUS: u64 = BUFFERS + 0x3000;

fn backing() -> tempfile::NamedTempFile {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    for sector in 0..SECTORS {
        file.write_all(&[u8::try_from(sector).unwrap(); 512])
            .unwrap();
    }
    file
}

fn spec(file: &tempfile::NamedTempFile) -> DiskSpec {
    DiskSpec {
        name: "vda".to_owned(),
        path: file.path().to_owned(),
        format: DiskFormat::Raw,
        read_only: false,
        serial: "serial-1".to_owned(),
        cache: DiskCache::WriteBack,
        discard: true,
    }
}

fn rig(file: &tempfile::NamedTempFile) -> Rig {
    let disk = Disk::open(&spec(file)).unwrap();
    Rig::new(Arc::new(Blk::new(Arc::new(disk))))
}

fn put_header(rig: &Rig, kind: u32, sector: u64) {
    let memory = rig.memory();
    memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
    memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
    memory.write_obj(0xee_u8, GuestAddress(STATUS)).unwrap();
}

/// The usual three buffers.
fn request(len: u32, flags: u16) -> [RawDescriptor; 3] {
    [
        descriptor(HEADER, 16, NEXT, 1),
        descriptor(DATA, len, NEXT | flags, 2),
        descriptor(STATUS, 1, WRITE, 0),
    ]
}

/// Makes one request and returns its status and how many bytes were written.
fn ask(rig: &Rig, kind: u32, sector: u64, descriptors: &[RawDescriptor]) -> (u8, u32) {
    put_header(rig, kind, sector);
    let next = rig.used(0).wrapping_add(1);
    rig.offer(0, descriptors);
    let (_, written) = rig.wait_used(0, next).expect("the device gave up");
    let status = rig.memory().read_obj(GuestAddress(STATUS)).unwrap();
    (status, written)
}

fn data(rig: &Rig, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    rig.memory()
        .read_slice(&mut bytes, GuestAddress(DATA))
        .unwrap();
    bytes
}

#[test]
fn sectors_are_read_written_flushed_and_zeroed_where_the_driver_says() {
    let file = backing();
    let rig = rig(&file);
    rig.start(FLUSH | DISCARD | feature::EVENT_INDEX);
    assert_eq!(rig.read::<8>(0x2000), SECTORS.to_le_bytes());
    assert_eq!(ask(&rig, 0, 3, &request(1024, WRITE)), (0, 1025));
    let read = data(&rig, 1024);
    assert!(read[..512] == [3; 512] && read[512..] == [4; 512]);
    rig.memory()
        .write_slice(&[0xab; 512], GuestAddress(DATA))
        .unwrap();
    assert_eq!(ask(&rig, 1, 63, &request(512, 0)), (0, 1));
    let mut sector = [0; 512];
    file.as_file().read_exact_at(&mut sector, 63 * 512).unwrap();
    assert_eq!(sector, [0xab; 512]);
    let bare = [
        descriptor(HEADER, 16, NEXT, 1),
        descriptor(STATUS, 1, WRITE, 0),
    ];
    assert_eq!(ask(&rig, 4, 0, &bare), (0, 1));
    assert_eq!(ask(&rig, 8, 0, &request(20, WRITE)), (0, 21));
    assert_eq!(&data(&rig, 20)[..9], b"serial-1\0");
    // Sectors 8 to 15.
    let range = [8_u64.to_le_bytes(), 8_u64.to_le_bytes()].concat();
    rig.memory()
        .write_slice(&range, GuestAddress(DATA))
        .unwrap();
    assert_eq!(ask(&rig, 11, 0, &request(16, 0)), (0, 1));
    let mut around = [0; 3 * 512];
    file.as_file().read_exact_at(&mut around, 7 * 512).unwrap();
    assert!(around[..512] == [7; 512] && around[512..] == [0; 1024]);
    assert!(!rig.recorder.messages().is_empty());
}

#[test]
fn a_request_in_many_pieces_is_the_same_request() {
    let file = backing();
    let rig = rig(&file);
    rig.start(FLUSH);
    let pieces = [
        descriptor(HEADER, 3, NEXT, 1),
        descriptor(HEADER + 3, 13, NEXT, 2),
        descriptor(DATA, 500, NEXT | WRITE, 3),
        descriptor(DATA + 500, 0, NEXT | WRITE, 4),
        // The last byte of this one is the status.
        descriptor(DATA + 500, 13, WRITE, 0),
    ];
    put_header(&rig, 0, 9);
    rig.offer(0, &pieces);
    assert_eq!(rig.wait_used(0, 1), Some((0, 513)));
    assert_eq!(data(&rig, 513), [vec![9; 512], vec![0]].concat());
    // The same by a table of descriptors.
    let table = BUFFERS + 0x8000;
    for (at, piece) in (0..).zip(pieces) {
        let address = GuestAddress(table + at * 16);
        rig.memory().write_obj(piece, address).unwrap();
    }
    put_header(&rig, 0, 10);
    rig.offer(0, &[descriptor(table, 5 * 16, INDIRECT, 0)]);
    assert_eq!(rig.wait_used(0, 2), Some((0, 513)));
    assert_eq!(data(&rig, 512), vec![10; 512]);
}

#[test]
fn what_cannot_be_done_is_answered_and_the_device_goes_on() {
    let file = backing();
    let rig = rig(&file);
    rig.start(FLUSH);
    let before = std::fs::read(file.path()).unwrap();
    for (kind, sector, len, flags, status) in [
        (0, SECTORS, 512, WRITE, 1),
        (0, SECTORS - 1, 1024, WRITE, 1),
        (0, u64::MAX, 512, WRITE, 1),
        (1, SECTORS, 512, 0, 1),
        (1, 0, 100, 0, 1),
        (0, 0, 511, WRITE, 1),
        (99, 0, 512, WRITE, 2),
        (0xffff_ffff, 0, 512, 0, 2),
        (11, 0, 15, 0, 1),
        (11, 0, 16 * 33, 0, 1),
    ] {
        let found = ask(&rig, kind, sector, &request(len, flags));
        assert_eq!(found, (status, 1), "{kind} {sector} {len}");
    }
    assert_eq!(std::fs::read(file.path()).unwrap(), before);
    assert_eq!(ask(&rig, 0, 1, &request(512, WRITE)), (0, 513));
    assert_eq!(rig.status() & NEEDS_RESET, 0);
}

#[test]
fn a_read_only_disk_refuses_writes_and_is_shared() {
    let file = backing();
    let read_only = DiskSpec {
        read_only: true,
        ..spec(&file)
    };
    let disk = Disk::open(&read_only).unwrap();
    let _second = Disk::open(&read_only).unwrap();
    Disk::open(&spec(&file)).unwrap_err();
    let rig = Rig::new(Arc::new(Blk::new(Arc::new(disk))));
    assert_eq!(rig.offered() & (1 << 5 | FLUSH | DISCARD), 1 << 5);
    rig.start(1 << 5);
    assert_eq!(ask(&rig, 1, 0, &request(512, 0)), (1, 1));
    assert_eq!(ask(&rig, 0, 2, &request(512, WRITE)), (0, 513));
}

/// Chains that break the rules, by what is wrong with them.
fn broken_chains() -> Vec<(&'static str, Vec<RawDescriptor>)> {
    vec![
        ("a loop", vec![descriptor(HEADER, 16, NEXT, 0)]),
        (
            "an index out of range",
            vec![descriptor(HEADER, 16, NEXT, 999)],
        ),
        (
            "no header",
            vec![
                descriptor(HEADER, 15, NEXT, 1),
                descriptor(STATUS, 1, WRITE, 0),
            ],
        ),
        ("no room for a status", vec![descriptor(HEADER, 16, 0, 0)]),
        ("nothing at all", vec![descriptor(HEADER, 0, WRITE, 0)]),
        (
            "a buffer outside of memory",
            vec![
                descriptor(HEADER, 16, NEXT, 1),
                descriptor(RAM_BYTES - 256, 512, NEXT | WRITE, 2),
                descriptor(STATUS, 1, WRITE, 0),
            ],
        ),
        (
            "an address that wraps",
            vec![
                descriptor(u64::MAX - 7, 16, NEXT, 1),
                descriptor(STATUS, 1, WRITE, 0),
            ],
        ),
        (
            "a chain longer than 4 GiB",
            vec![
                descriptor(HEADER, u32::MAX, NEXT, 1),
                descriptor(HEADER, u32::MAX, NEXT, 2),
                descriptor(STATUS, 1, WRITE, 0),
            ],
        ),
        (
            "a readable buffer behind a writable one",
            vec![
                descriptor(STATUS, 1, NEXT | WRITE, 1),
                descriptor(HEADER, 16, 0, 0),
            ],
        ),
        (
            "a table of a length that is none",
            vec![descriptor(DATA, 17, INDIRECT, 0)],
        ),
        ("an empty table", vec![descriptor(DATA, 0, INDIRECT, 0)]),
        (
            "a table outside of memory",
            vec![descriptor(RAM_BYTES, 32, INDIRECT, 0)],
        ),
        (
            "a table that names itself",
            vec![descriptor(0x1000, 16, INDIRECT, 0)],
        ),
    ]
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_reset_the_device() {
    let file = backing();
    let rig = rig(&file);
    for (what, chain) in broken_chains() {
        rig.start(FLUSH);
        let sent = rig.recorder.messages().len();
        put_header(&rig, 0, 0);
        rig.offer(0, &chain);
        assert_eq!(rig.wait_used(0, 1), None, "{what}");
        assert_eq!(rig.used(0), 0, "{what}");
        // The vector behind the queues' is the configuration's.
        rig.wait(|| rig.recorder.messages().len() > sent);
        assert_eq!(rig.recorder.messages()[sent], (0xfee0_0000, 0x41), "{what}");
        // It does nothing more until it is reset, and then all that it did before.
        rig.kick(0);
        rig.start(FLUSH);
        assert_eq!(ask(&rig, 0, 5, &request(512, WRITE)), (0, 513), "{what}");
    }
}

#[test]
fn indices_out_of_range_need_a_reset() {
    let file = backing();
    let rig = rig(&file);
    rig.start(FLUSH);
    rig.set_available(0, 17);
    rig.kick(0);
    assert_eq!(rig.wait_used(0, 1), None);
    rig.start(FLUSH);
    rig.offer_head(0, 16);
    assert_eq!(rig.wait_used(0, 1), None);
    rig.start(FLUSH);
    assert_eq!(ask(&rig, 0, 5, &request(512, WRITE)), (0, 513));
}

#[test]
fn queues_outside_of_memory_need_a_reset() {
    let file = backing();
    let rig = rig(&file);
    for addresses in [
        [RAM_BYTES, 0x2000, 0x3000],
        [0x1000, RAM_BYTES - 4, 0x3000],
        [0x1000, 0x2000, u64::MAX - 3],
        [0x1008, 0x2000, 0x3000],
        [0x1000, 0x2001, 0x3000],
        [0x1000, 0x2000, 0x3002],
    ] {
        rig.agree(feature::VERSION_1);
        rig.place_queue(0, addresses);
        rig.write(0x14, &[0xf]);
        assert_eq!(rig.status(), 0xf | NEEDS_RESET, "{addresses:x?}");
        rig.kick(0);
    }
    rig.start(FLUSH);
    assert_eq!(ask(&rig, 0, 5, &request(512, WRITE)), (0, 513));
}

#[test]
fn features_that_are_not_offered_and_legacy_drivers_are_refused() {
    let file = backing();
    let rig = rig(&file);
    for features in [
        0,
        FLUSH,
        feature::VERSION_1 | 1 << 63,
        feature::VERSION_1 | 1,
    ] {
        rig.agree(features);
        assert_eq!(rig.status(), 3, "{features:#x}");
    }
    // Too large, no power of two, no such queue: the driver reads back what holds.
    for size in [0_u16, 3, 512, 0xffff] {
        rig.write(0x18, &size.to_le_bytes());
        assert_eq!(rig.read::<2>(0x18), 256_u16.to_le_bytes());
    }
    rig.write(0x16, &7_u16.to_le_bytes());
    assert_eq!(rig.read::<2>(0x18), [0, 0]);
    rig.write(0x1a, &5_u16.to_le_bytes());
    rig.write(0x10, &5_u16.to_le_bytes());
    assert_eq!(rig.read::<2>(0x10), [0xff; 2]);
}

#[test]
fn a_pause_leaves_requests_in_the_queue_and_a_restore_carries_them_out_once() {
    let file = backing();
    let rig = rig(&file);
    rig.start(FLUSH);
    assert_eq!(ask(&rig, 0, 1, &request(512, WRITE)), (0, 513));
    rig.device.pause();
    let soon = Instant::now() + Duration::from_secs(5);
    rig.device.drain(soon).unwrap();
    put_header(&rig, 0, 6);
    rig.offer(0, &request(512, WRITE));
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(rig.used(0), 1, "paused");
    let saved = rig.device.save();
    // Another device with the same memory, as a restore makes it.
    let ram = rig.ram.clone();
    drop(rig);
    let disk = Disk::open(&spec(&file)).unwrap();
    let restored = Rig::restored(Arc::new(Blk::new(Arc::new(disk))), ram, &saved);
    assert_eq!(restored.device.save(), saved);
    restored.device.resume();
    assert_eq!(restored.wait_used(0, 2), Some((0, 513)));
    assert_eq!(data(&restored, 512), vec![6; 512]);
    restored.wait(|| restored.recorder.messages() == [(0xfee0_0000, 0x40)]);
}

#[test]
fn a_state_of_another_device_is_refused() {
    let file = backing();
    let rig = rig(&file);
    rig.start(FLUSH);
    let saved = rig.device.save();
    drop(rig);
    File::options()
        .write(true)
        .open(file.path())
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let disk = Disk::open(&spec(&file)).unwrap();
    let other = Rig::new(Arc::new(Blk::new(Arc::new(disk))));
    let mut state = StateSet::new(saved).unwrap();
    other.device.restore(&mut state).unwrap_err();
}

#[test]
fn events_follow_the_bar() {
    let file = backing();
    let rig = rig(&file);
    assert_eq!((rig.device.bar(), rig.recorder.attached()), (None, vec![]));
    rig.device.write_config(4, &2_u16.to_le_bytes());
    assert_eq!(rig.device.bar(), Some(0xc001_0000));
    assert_eq!(rig.recorder.attached(), [0xc001_3000]);
    rig.device
        .write_config(0x10, &0xd123_0000_u32.to_le_bytes());
    assert_eq!(rig.recorder.attached(), [0xd123_3000]);
    // Sizing, and addresses outside of the window, answer nowhere.
    rig.device.write_config(0x10, &[0xff; 4]);
    assert_eq!((rig.device.bar(), rig.recorder.attached()), (None, vec![]));
    rig.device
        .write_config(0x10, &0xfec0_0000_u32.to_le_bytes());
    assert_eq!(rig.device.bar(), None);
    rig.device.reset();
    assert_eq!(rig.device.bar(), None);
}

#[test]
fn registers_are_reached_by_the_configuration_access_capability() {
    let file = backing();
    let rig = rig(&file);
    // The last capability.
    let mut at = [0x40];
    let mut link = at;
    while link != [0] {
        at = link;
        rig.device.read_config(usize::from(at[0]) + 1, &mut link);
    }
    let at = usize::from(at[0]);
    rig.device.write_config(at + 4, &[0]);
    rig.device.write_config(at + 8, &0x2000_u32.to_le_bytes());
    rig.device.write_config(at + 12, &4_u32.to_le_bytes());
    let mut sectors = [0; 4];
    rig.device.read_config(at + 16, &mut sectors);
    assert_eq!(u32::from_le_bytes(sectors), 64);
    rig.device.write_config(at + 8, &0x16_u32.to_le_bytes());
    rig.device.write_config(at + 12, &2_u32.to_le_bytes());
    rig.device.write_config(at + 16, &7_u16.to_le_bytes());
    assert_eq!(rig.read::<2>(0x16), [7, 0]);
    // A window of a length that is none shows nothing.
    rig.device.write_config(at + 12, &3_u32.to_le_bytes());
    rig.device.read_config(at + 16, &mut sectors);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn no_guest_makes_the_device_panic_or_hang(
        accesses in prop::collection::vec(
            (0_u64..0x1_0000, prop::collection::vec(any::<u8>(), 1..9), any::<bool>()), 1..60),
        rings in prop::collection::vec(any::<u8>(), 0x800),
        config in prop::collection::vec((0_usize..256, any::<u32>()), 0..12),
        start: bool,
    ) {
        let file = backing();
        let rig = rig(&file);
        if start {
            rig.start(FLUSH | feature::EVENT_INDEX);
            rig.memory().write_slice(&rings, GuestAddress(0x1000)).unwrap();
            rig.kick(0);
        }
        for (at, value) in config {
            rig.device.write_config(at & !3, &value.to_le_bytes());
        }
        for (offset, bytes, common) in accesses {
            let offset = if common { offset % 0x38 } else { offset };
            rig.write(offset, &bytes);
            let mut data = bytes;
            rig.device.read_bar(offset, &mut data);
        }
        rig.device.pause();
        rig.device.drain(Instant::now() + Duration::from_secs(5)).unwrap();
        let saved = rig.device.save();
        rig.device.restore(&mut StateSet::new(saved).unwrap()).unwrap();
        rig.device.resume();
        // Whatever happened: a reset makes it useful again.
        rig.device.write_config(4, &2_u16.to_le_bytes());
        rig.start(FLUSH);
        prop_assert_eq!(ask(&rig, 0, 5, &request(512, WRITE)), (0, 513));
    }
}

#[test]
fn what_is_asked_is_counted() {
    use std::sync::atomic::Ordering;
    let file = backing();
    let disk = Arc::new(Disk::open(&spec(&file)).unwrap());
    let rig = Rig::new(Arc::new(Blk::new(disk.clone())));
    rig.start(FLUSH);
    ask(&rig, 0, 1, &request(1024, WRITE));
    ask(&rig, 1, 2, &request(512, 0));
    ask(
        &rig,
        4,
        0,
        &[
            descriptor(HEADER, 16, NEXT, 1),
            descriptor(STATUS, 1, WRITE, 0),
        ],
    );
    // Behind the end.
    ask(&rig, 0, SECTORS, &request(512, WRITE));
    let counters = disk.counters();
    let counted = [
        &counters.reads,
        &counters.read_bytes,
        &counters.writes,
        &counters.written_bytes,
        &counters.flushes,
        &counters.errors,
    ]
    .map(|counter| counter.load(Ordering::Relaxed));
    assert_eq!(counted, [1, 1024, 1, 512, 1, 1]);
}
