//! A balloon whose driver may do anything.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::{Balloon, MemoryFigure, PAGE_REPORTING, STATS_QUEUE};
use crate::machine::device::{Device, Quiesce};
use crate::machine::memory::GuestRam;
use crate::machine::spec::BalloonSpec;
use crate::machine::virtio::testing::{
    BUFFERS, INDIRECT, NEEDS_RESET, NEXT, RAM_BYTES, Rig, WRITE, descriptor, ram,
};
use crate::state::virtio::{VirtioBalloonV1, VirtioPciV1};
use crate::state::{StateSection, StateSet};

const PATIENCE: Duration = Duration::from_secs(60);
/// A page that is given up, by its number.
const PAGE: u32 = 0x200;

fn rig() -> (Rig, Arc<Balloon>) {
    let ram = ram();
    let balloon = balloon(&ram, Duration::ZERO);
    (Rig::with_ram(balloon.clone(), ram), balloon)
}

/// Makes another one that goes on from a saved state, paused.
fn restored(
    ram: Arc<GuestRam>,
    statistics_period: Duration,
    saved: &[StateSection],
) -> (Rig, Arc<Balloon>) {
    let balloon = balloon(&ram, statistics_period);
    (Rig::restored(balloon.clone(), ram, saved), balloon)
}

fn balloon(ram: &Arc<GuestRam>, statistics_period: Duration) -> Arc<Balloon> {
    let spec = BalloonSpec {
        free_page_reporting: true,
        auto_deflate: false,
        wanted_bytes: 0,
        statistics_period,
    };
    Arc::new(Balloon::new(spec, ram.clone()).unwrap())
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
    let saved = rig.pause_and_save();
    let ram = rig.ram.clone();
    drop(rig);
    let (restored, balloon) = restored(ram, Duration::ZERO, &saved);
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

/// Fills the driver's buffer with figures and gives it to the device.
fn tell(rig: &Rig, figures: &[(u16, u64)]) {
    let bytes: Vec<u8> = figures
        .iter()
        .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
        .collect();
    let memory = rig.memory();
    memory.write_slice(&bytes, GuestAddress(BUFFERS)).unwrap();
    let len = u32::try_from(bytes.len()).unwrap();
    rig.offer(2, &[descriptor(BUFFERS, len, 0, 0)]);
}

/// Waits until the device has figures; returns how much memory they say is free.
fn wait_free(rig: &Rig, balloon: &Balloon, wanted: u64) {
    let free = || {
        let told = balloon.memory_use()?;
        told.figures.get(&MemoryFigure::FreeBytes).copied()
    };
    rig.wait(|| free() == Some(wanted));
}

#[test]
fn the_guest_says_how_it_uses_its_memory_whenever_it_is_asked() {
    let (rig, balloon) = rig();
    rig.start(STATS_QUEUE | PAGE_REPORTING);
    assert_eq!(balloon.memory_use(), None);
    // One that the driver does not know, and one that the device does not.
    tell(&rig, &[(4, 1000), (5, 9000), (6, u64::MAX), (77, 5)]);
    wait_free(&rig, &balloon, 1000);
    let figures = balloon.memory_use().unwrap().figures;
    let expected = [
        (MemoryFigure::FreeBytes, 1000),
        (MemoryFigure::TotalBytes, 9000),
    ];
    assert_eq!(figures, expected.into());
    // The buffer is the device's until it asks again: once, and not once more for a notification.
    rig.kick(2);
    balloon.ask_for_use_every(Duration::from_secs(3600));
    rig.wait_used(2, 1).unwrap();
    tell(&rig, &[(4, 2000)]);
    wait_free(&rig, &balloon, 2000);
    assert_eq!(rig.used(2), 1);
    // Reports have the next queue then.
    fill(&rig, PAGE..PAGE + 1);
    let start = u64::from(PAGE) * 0x1000;
    rig.offer(3, &[descriptor(start, 0x1000, WRITE, 0)]);
    rig.wait_used(3, 1).unwrap();
    assert_eq!(first_byte(&rig, PAGE), 0);
    // Asked again and again.
    balloon.ask_for_use_every(Duration::from_millis(1));
    for round in 2..10 {
        rig.wait_used(2, round).unwrap();
        tell(&rig, &[(4, u64::from(round))]);
        wait_free(&rig, &balloon, u64::from(round));
    }
    // Another driver knows nothing of what this one said.
    rig.start(STATS_QUEUE);
    assert_eq!(balloon.memory_use(), None);
}

#[test]
fn a_restored_balloon_asks_anew_by_the_buffer_that_its_driver_has_given() {
    let (rig, balloon) = rig();
    rig.start(STATS_QUEUE);
    tell(&rig, &[(4, 1000)]);
    wait_free(&rig, &balloon, 1000);
    let saved = rig.pause_and_save();
    let ram = rig.ram.clone();
    drop(rig);
    let (restored, balloon) = restored(ram, Duration::from_secs(3600), &saved);
    restored.device.resume();
    restored.wait_used(2, 1).unwrap();
    assert_eq!(balloon.memory_use(), None, "figures of another time");
    tell(&restored, &[(4, 500)]);
    wait_free(&restored, &balloon, 500);
}

#[test]
fn a_balloon_that_was_saved_without_statistics_is_restored() {
    let (rig, _) = rig();
    rig.start(PAGE_REPORTING);
    let mut saved = StateSet::new(rig.pause_and_save()).unwrap();
    let mut pci: VirtioPciV1 = saved.take(1).unwrap();
    let balloon: VirtioBalloonV1 = saved.take(1).unwrap();
    pci.queues.pop();
    pci.vectors.pop();
    pci.device_features &= !STATS_QUEUE;
    let ram = rig.ram.clone();
    drop(rig);
    let sections = vec![
        StateSection::encode(1, &pci),
        StateSection::encode(1, &balloon),
    ];
    let (restored, _) = restored(ram, Duration::from_secs(1), &sections);
    restored.device.resume();
    fill(&restored, PAGE..PAGE + 1);
    let start = u64::from(PAGE) * 0x1000;
    restored.offer(2, &[descriptor(start, 0x1000, WRITE, 0)]);
    restored.wait_used(2, 1).unwrap();
    assert_eq!(first_byte(&restored, PAGE), 0);
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
fn statistics_that_are_none_stop_the_device_until_it_is_reset() {
    let (rig, balloon) = rig();
    for (what, chain) in [
        ("a part of a figure", descriptor(BUFFERS, 25, 0, 0)),
        ("too many", descriptor(BUFFERS, 2570, 0, 0)),
        ("a loop", descriptor(BUFFERS, 10, NEXT, 0)),
        ("outside of memory", descriptor(RAM_BYTES, 10, 0, 0)),
    ] {
        rig.start(STATS_QUEUE);
        rig.offer(2, &[chain]);
        rig.wait(|| rig.status() & NEEDS_RESET != 0);
        assert_eq!(balloon.memory_use(), None, "{what}");
        rig.start(STATS_QUEUE);
        tell(&rig, &[(4, 7)]);
        wait_free(&rig, &balloon, 7);
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
