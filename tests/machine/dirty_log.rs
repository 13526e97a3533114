//! What KVM's dirty log reports of a guest that writes.

use std::thread;
use std::time::Duration;

use livepoint::guest::{DirtyLog, Guest, MemoryRegion};
use livepoint::machine::Machine;
use livepoint::page::{PAGE_BYTES, PIECE_BYTES, PIECE_PAGES, bitmap_words, runs_of_set_bits};

use crate::common::have_kvm;
use crate::guest_code::{assemble, spec};

/// Writes a counter to pages of 2 to 14 MiB, spread by a multiplicative generator.
const WRITER: &str = "
    mov $1, %ebx
1:  imul $1103515245, %ebx, %ebx
    add $12345, %ebx
    mov %ebx, %eax
    shr $8, %eax
    and $0xbff000, %eax
    add $0x200000, %eax
    incq %r9
    mov %r9, (%rax)
    jmp 1b";

fn snapshot(region: &MemoryRegion) -> Vec<u8> {
    let mut bytes = vec![0; region.mapping.len()];
    region.mapping.copy_out(0, &mut bytes);
    bytes
}

fn changed_pages(before: &[u8], after: &[u8]) -> Vec<usize> {
    let pages = before.chunks(PAGE_BYTES).zip(after.chunks(PAGE_BYTES));
    let changed = pages.enumerate().filter(|(_, (a, b))| a != b);
    changed.map(|(page, _)| page).collect()
}

fn fetch(log: &dyn DirtyLog, region: &MemoryRegion) -> Vec<u64> {
    let mut bits = vec![0; bitmap_words(region.page_count)];
    log.fetch(region.slot, &mut bits).unwrap();
    bits
}

fn has(bits: &[u64], page: usize) -> bool {
    bits[page / 64] >> (page % 64) & 1 == 1
}

/// Re-arms everything that is set, piece by piece.
fn rearm(log: &dyn DirtyLog, region: &MemoryRegion, bits: &[u64]) {
    for first in (0..region.page_count).step_by(512) {
        let word = bitmap_words(first);
        log.rearm(region.slot, first, PIECE_PAGES, &bits[word..word + 8])
            .unwrap();
    }
}

#[test]
fn every_page_that_changed_was_reported() {
    if !have_kvm() {
        return;
    }
    let (spec, _console) = spec(assemble(WRITER));
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    let region = machine.regions()[0].clone();
    let log = machine.dirty_log();
    log.start().unwrap();
    log.start().unwrap();
    let all = fetch(log, &region);
    let first: Vec<_> = runs_of_set_bits(&all).collect();
    assert_eq!(first, [(0, region.page_count)], "all are dirty at first");
    for round in 0..10 {
        machine.pause().unwrap();
        rearm(log, &region, &fetch(log, &region));
        let before = snapshot(&region);
        machine.resume();
        thread::sleep(Duration::from_millis(30));
        machine.pause().unwrap();
        let after = snapshot(&region);
        let bits = fetch(log, &region);
        machine.resume();
        let changed = changed_pages(&before, &after);
        assert!(
            !changed.is_empty(),
            "round {round}: the guest did not write"
        );
        let missed: Vec<_> = changed.iter().filter(|&&page| !has(&bits, page)).collect();
        assert!(missed.is_empty(), "round {round}: missed {missed:?}");
        let reported: u64 = runs_of_set_bits(&bits).map(|(_, count)| count).sum();
        assert!(reported < changed.len() as u64 + 64, "round {round}");
    }
    log.stop().unwrap();
    log.stop().unwrap();
    log.start().unwrap();
    let all: Vec<_> = runs_of_set_bits(&fetch(log, &region)).collect();
    assert_eq!(all, [(0, region.page_count)], "and again at the next start");
    log.stop().unwrap();
}

#[test]
fn a_copy_after_its_rearm_is_reported_again_or_whole() {
    if !have_kvm() {
        return;
    }
    // While the guest runs: re-arm, copy, and at the end every page whose copy differs is dirty.
    let (spec, _console) = spec(assemble(WRITER));
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    let region = machine.regions()[0].clone();
    let log = machine.dirty_log();
    log.start().unwrap();
    for _ in 0..10 {
        let mut copy = vec![0; region.mapping.len()];
        for (at, piece) in copy.chunks_mut(PIECE_BYTES).enumerate() {
            log.rearm(
                region.slot,
                at as u64 * PIECE_PAGES,
                PIECE_PAGES,
                &[u64::MAX; 8],
            )
            .unwrap();
            region.mapping.copy_out(at * PIECE_BYTES, piece);
        }
        machine.pause().unwrap();
        let bits = fetch(log, &region);
        let differing = changed_pages(&copy, &snapshot(&region));
        machine.resume();
        let missed: Vec<_> = differing
            .iter()
            .filter(|&&page| !has(&bits, page))
            .collect();
        assert!(missed.is_empty(), "{missed:?}");
    }
    log.stop().unwrap();
}

#[test]
fn windows_that_do_not_fit_are_refused() {
    if !have_kvm() {
        return;
    }
    let (spec, _console) = spec(assemble("1: jmp 1b"));
    let machine = Machine::build(spec).unwrap();
    let pages = machine.regions()[0].page_count;
    let log = machine.dirty_log();
    log.start().unwrap();
    let bits = vec![u64::MAX; bitmap_words(pages) + 1];
    for (first, count) in [
        (1, 64),
        (0, 63),
        (64, pages),
        (pages, 64),
        (u64::MAX - 63, 64),
    ] {
        assert!(
            log.rearm(0, first, count, &bits).is_err(),
            "{first} {count}"
        );
    }
    assert!(log.rearm(7, 0, 64, &bits).is_err(), "no such slot");
    log.rearm(0, 0, pages, &bits).unwrap();
}
