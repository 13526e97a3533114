//! An entropy device whose driver may do anything.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::Rng;
use crate::machine::device::{Device, Quiesce};
use crate::machine::spec::{RngRate, RngSpec};
use crate::machine::virtio::testing::{
    BUFFERS, NEEDS_RESET, NEXT, RAM_BYTES, Rig, WRITE, descriptor,
};

const PATIENCE: Duration = Duration::from_secs(60);

fn device(rate: Option<RngRate>) -> Arc<Rng> {
    let source = PathBuf::from("/dev/urandom");
    Arc::new(Rng::open(&RngSpec { source, rate }).unwrap())
}

fn bytes(rig: &Rig, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let memory = rig.memory();
    memory
        .read_slice(&mut bytes, GuestAddress(BUFFERS))
        .unwrap();
    bytes
}

#[test]
fn every_request_is_filled_with_other_numbers() {
    let rig = Rig::new(device(None));
    rig.start(0);
    let mut seen = HashSet::new();
    for number in 1..=20 {
        rig.offer(0, &[descriptor(BUFFERS, 64, WRITE, 0)]);
        assert_eq!(rig.wait_used(0, number), Some((0, 64)));
        assert!(seen.insert(bytes(&rig, 64)));
    }
    // A large one is answered in part, scattered or not.
    let pieces = [
        descriptor(BUFFERS, 100, NEXT | WRITE, 1),
        descriptor(BUFFERS + 100, 60_000, WRITE, 0),
    ];
    rig.offer(0, &pieces);
    assert_eq!(rig.wait_used(0, 21), Some((0, 4096)));
    assert_eq!(bytes(&rig, 5000)[4096..], [0; 904]);
}

#[test]
fn a_rate_is_kept_and_what_waits_is_filled_in_the_next_period() {
    let period = Duration::from_millis(300);
    let rig = Rig::new(device(Some(RngRate { bytes: 100, period })));
    rig.start(0);
    let start = Instant::now();
    for number in 1..=6 {
        rig.offer(0, &[descriptor(BUFFERS, 50, WRITE, 0)]);
        assert_eq!(rig.wait_used(0, number), Some((0, 50)));
    }
    // Two in each period: the last of them came in the third.
    assert!(start.elapsed() >= 2 * period, "{:?}", start.elapsed());
}

#[test]
fn a_request_that_waits_for_its_period_is_in_a_saved_state() {
    let period = PATIENCE;
    let rig = Rig::new(device(Some(RngRate { bytes: 10, period })));
    rig.start(0);
    rig.offer(0, &[descriptor(BUFFERS, 50, WRITE, 0)]);
    assert_eq!(rig.wait_used(0, 1), Some((0, 10)));
    rig.offer(0, &[descriptor(BUFFERS, 50, WRITE, 0)]);
    let saved = rig.pause_and_save();
    let ram = rig.ram.clone();
    drop(rig);
    let restored = Rig::restored(device(None), ram, &saved);
    assert_eq!(restored.device.save(), saved);
    restored.device.resume();
    assert_eq!(restored.wait_used(0, 2), Some((0, 50)));
}

#[test]
fn a_driver_that_breaks_the_rules_has_to_reset_the_device() {
    let rig = Rig::new(device(None));
    for (what, chain) in [
        ("nothing to write to", descriptor(BUFFERS, 64, 0, 0)),
        ("no room", descriptor(BUFFERS, 0, WRITE, 0)),
        ("a loop", descriptor(BUFFERS, 64, WRITE | NEXT, 0)),
        ("outside of memory", descriptor(RAM_BYTES, 64, WRITE, 0)),
    ] {
        rig.start(0);
        rig.offer(0, &[chain]);
        assert_eq!(rig.wait_used(0, 1), None, "{what}");
        assert_ne!(rig.status() & NEEDS_RESET, 0, "{what}");
        rig.start(0);
        rig.offer(0, &[descriptor(BUFFERS, 64, WRITE, 0)]);
        assert_eq!(rig.wait_used(0, 1), Some((0, 64)), "{what}");
    }
}
