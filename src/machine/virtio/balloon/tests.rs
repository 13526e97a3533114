//! A balloon whose driver may do anything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::{Balloon, PAGE_REPORTING};
use crate::machine::device::{Device, Quiesce};
use crate::machine::spec::BalloonSpec;
use crate::machine::virtio::testing::{
    BUFFERS, INDIRECT, NEEDS_RESET, NEXT, RAM_BYTES, Rig, WRITE, descriptor, ram,
};
use crate::state::StateSet;

const PATIENCE: Duration = Duration::from_secs(60);
/// A page that is given up, by its number.
const PAGE: u32 = 0x200;

fn rig() -> (Rig, Arc<Balloon>) {
    let spec = BalloonSpec {
        free_page_reporting: true,
        auto_deflate: false,
        wanted_bytes: 0,
    };
    let ram = ram();
    let balloon = Arc::new(Balloon::new(spec, ram.clone()));
    (Rig::with_ram(balloon.clone(), ram), balloon)
}

fn page(number: u32) -> GuestAddress {
    GuestAddress(u64::from(number) * 0x1000)
}

fn fill(rig: &Rig, pages: std::ops::Range<u32>) {
    for number in pages {
        let bytes = [0xaa; 0x1000];
        rig.memory().write_slice(&bytes, page(number)).unwrap();
    }
}

fn first_byte(rig: &Rig, number: u32) -> u8 {
    rig.memory().read_obj(page(number)).unwrap()
}

fn give(rig: &Rig, pages: &[u32]) {
    let list: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    let memory = rig.memory();
    memory.write_slice(&list, GuestAddress(BUFFERS)).unwrap();
    let len = u32::try_from(list.len()).unwrap();
    rig.offer(0, &[descriptor(BUFFERS, len, 0, 0)]);
}

#[test]
fn pages_that_are_given_are_gone_and_marked_and_others_stay() {
    let (rig, balloon) = rig();
    rig.start(PAGE_REPORTING);
    fill(&rig, PAGE..PAGE + 10);
    rig.ram.host_writes().clear();
    // In any order, twice, and one that is not there at all.
    give(
        &rig,
        &[PAGE + 2, PAGE, PAGE + 1, PAGE + 7, PAGE + 7, u32::MAX],
    );
    rig.wait_used(0, 1).unwrap();
    let found: Vec<u8> = (0..10).map(|at| first_byte(&rig, PAGE + at)).collect();
    let a = 0xaa;
    assert_eq!(found, [0, 0, 0, a, a, a, a, 0, a, a]);
    let mut marks = vec![0; usize::try_from(RAM_BYTES / 4096 / 64).unwrap()];
    rig.ram.host_writes().take_into(0, &mut marks);
    assert_eq!(marks[usize::try_from(PAGE).unwrap() / 64], 0b1000_0111);
    // The driver says how many they are, and is told how many there should be.
    rig.write(0x2004, &4_u32.to_le_bytes());
    assert_eq!(balloon.given_bytes(), 4 * 4096);
    balloon.ask_for(9 * 4096);
    let sent = rig.recorder.messages().len();
    rig.device.notify_config();
    assert_eq!(rig.recorder.messages().len(), sent + 1);
    let expected = [9_u32.to_le_bytes(), 4_u32.to_le_bytes()].concat();
    assert_eq!(rig.read::<8>(0x2000)[..], expected);
    rig.offer(1, &[descriptor(BUFFERS, 16, 0, 0)]);
    rig.wait_used(1, 1).unwrap();
}

#[test]
fn whole_pages_that_are_reported_free_are_gone() {
    let (rig, _) = rig();
    rig.start(PAGE_REPORTING);
    fill(&rig, PAGE..PAGE + 8);
    let start = u64::from(PAGE) * 0x1000;
    let report = [
        descriptor(start, 0x1000, NEXT | WRITE, 1),
        // From the middle of the third page to that of the sixth.
        descriptor(start + 0x2800, 0x3000, NEXT | WRITE, 2),
        // A part of one.
        descriptor(start + 0x7100, 0x100, WRITE, 0),
    ];
    rig.offer(2, &report);
    rig.wait_used(2, 1).unwrap();
    let found: Vec<u8> = (0..8).map(|at| first_byte(&rig, PAGE + at)).collect();
    let a = 0xaa;
    assert_eq!(found, [0, a, a, 0, 0, a, a, a]);
}

#[test]
fn a_balloon_that_is_saved_has_its_size_when_it_is_restored() {
    let (rig, balloon) = rig();
    rig.start(PAGE_REPORTING);
    balloon.ask_for(100 * 4096);
    rig.write(0x2004, &60_u32.to_le_bytes());
    rig.device.pause();
    rig.device.drain(Instant::now() + PATIENCE).unwrap();
    let saved = rig.device.save();
    let ram = rig.ram.clone();
    drop(rig);
    let spec = BalloonSpec {
        free_page_reporting: true,
        auto_deflate: false,
        wanted_bytes: 0,
    };
    let balloon = Arc::new(Balloon::new(spec, ram.clone()));
    let restored = Rig::with_ram(balloon.clone(), ram);
    restored.device.pause();
    let mut state = StateSet::new(saved.clone()).unwrap();
    restored.device.restore(&mut state).unwrap();
    state.finish().unwrap();
    assert_eq!(restored.device.save(), saved);
    assert_eq!(balloon.given_bytes(), 60 * 4096);
    restored.device.resume();
    fill(&restored, PAGE..PAGE + 1);
    give(&restored, &[PAGE]);
    restored.wait_used(0, 1).unwrap();
    assert_eq!(first_byte(&restored, PAGE), 0);
    // A driver that begins anew has given nothing.
    restored.start(0);
    assert_eq!(balloon.given_bytes(), 0);
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_reset_the_device() {
    let (rig, _) = rig();
    for (queue, what, chain) in [
        (0, "a part of a number", descriptor(BUFFERS, 6, 0, 0)),
        (0, "no number", descriptor(BUFFERS, 0, 0, 0)),
        (0, "too many", descriptor(BUFFERS, 4 * 4097, 0, 0)),
        (0, "the other way", descriptor(BUFFERS, 4, WRITE, 0)),
        (0, "a loop", descriptor(BUFFERS, 4, NEXT, 0)),
        (0, "outside of memory", descriptor(RAM_BYTES, 4, 0, 0)),
        (1, "a loop", descriptor(BUFFERS, 4, NEXT, 0)),
        (2, "nothing", descriptor(BUFFERS, 0, WRITE, 0)),
        (2, "the other way", descriptor(BUFFERS, 4096, 0, 0)),
        (
            2,
            "outside of memory",
            descriptor(RAM_BYTES - 4096, 8192, WRITE, 0),
        ),
        (2, "an empty table", descriptor(BUFFERS, 0, INDIRECT, 0)),
    ] {
        rig.start(PAGE_REPORTING);
        rig.offer(queue, &[chain]);
        assert_eq!(rig.wait_used(queue, 1), None, "{queue} {what}");
        assert_ne!(rig.status() & NEEDS_RESET, 0, "{queue} {what}");
        rig.start(PAGE_REPORTING);
        fill(&rig, PAGE..PAGE + 1);
        give(&rig, &[PAGE]);
        rig.wait_used(0, 1).unwrap();
        assert_eq!(first_byte(&rig, PAGE), 0, "{queue} {what}");
    }
}

#[test]
fn a_guest_that_gives_its_queues_away_harms_only_itself() {
    let (rig, _) = rig();
    rig.start(PAGE_REPORTING);
    // Its rings are in the first pages; then everything.
    give(&rig, &(0..0x400).collect::<Vec<u32>>());
    let deadline = Instant::now() + PATIENCE;
    while first_byte(&rig, u32::try_from(BUFFERS / 4096).unwrap()) != 0 {
        assert!(Instant::now() < deadline, "the device hangs");
        std::thread::sleep(Duration::from_millis(1));
    }
    rig.device.pause();
    rig.device.drain(Instant::now() + PATIENCE).unwrap();
    rig.device.resume();
    rig.start(PAGE_REPORTING);
    fill(&rig, PAGE..PAGE + 1);
    give(&rig, &[PAGE]);
    rig.wait_used(0, 1).unwrap();
}
