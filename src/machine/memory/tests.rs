//! Guest memory of every kind: where it is, that it is zeros, and that writes are marked.

use super::slots::{SLOT_BYTES_MIN, slot_bytes};
use super::*;
use crate::page::PIECE_BYTES;
use vm_memory::Bytes;

fn spec(bytes: u64, backing: BackingSpec) -> MemorySpec {
    MemorySpec {
        bytes,
        backing,
        preallocate: false,
        locked: false,
        shared: None,
    }
}

#[test]
fn memory_goes_around_the_hole() {
    assert_eq!(layout(1 << 20), [(0, 1 << 20)]);
    assert_eq!(layout(3 << 30), [(0, 3 << 30)]);
    assert_eq!(layout(5 << 30), [(0, 3 << 30), (4 << 30, 2 << 30)]);
}

#[test]
fn memory_above_the_hole_is_mapped_aligned_and_written_with_a_mark() {
    let ram = GuestRam::new(&spec((3 << 30) + (4 << 20), BackingSpec::Anonymous)).unwrap();
    let high = ram.regions().last().unwrap();
    assert_eq!(high.start.gpa(), HOLE_END);
    assert_eq!(high.mapping.hva() % PIECE_BYTES, 0);
    ram.memory()
        .write_slice(b"livepoint", GuestAddress(HOLE_END + 4090))
        .unwrap();
    let mut bits = vec![0; 16];
    ram.host_writes().take_into(high.slot, &mut bits);
    assert_eq!(bits[0], 0b11);
    let mut out = [0; 9];
    high.mapping.copy_out(4090, &mut out);
    assert_eq!(&out, b"livepoint");
}

#[test]
fn slots_divide_memory_without_gaps_and_are_as_few_as_may_be() {
    let gib = 1 << 30;
    assert_eq!(slot_bytes(gib, 4096), SLOT_BYTES_MIN);
    assert_eq!(slot_bytes(gib, gib), gib);
    assert_eq!(slot_bytes(100 * gib, 4096), 2 * gib);
    let bytes = (3 << 30) + (300 << 20);
    let ram = GuestRam::new(&spec(bytes, BackingSpec::Anonymous)).unwrap();
    let regions = ram.regions();
    assert_eq!(regions.len(), 12 + 2);
    for (number, pair) in (0..).zip(regions.windows(2)) {
        assert_eq!((pair[0].slot, pair[1].slot), (number, number + 1));
        let (end, next) = (pair[0].run().end().gpa(), pair[1].start.gpa());
        assert!(end == next || (end, next) == (HOLE_START, HOLE_END));
    }
    let pages: u64 = regions.iter().map(|region| region.page_count).sum();
    assert_eq!(pages * PAGE_BYTES as u64, bytes);
}

#[test]
fn a_write_over_the_end_of_a_slot_is_marked_in_both() {
    let ram = GuestRam::new(&spec(512 << 20, BackingSpec::Anonymous)).unwrap();
    let end = GuestAddress(SLOT_BYTES_MIN - 4);
    ram.memory().write_slice(b"livepoint", end).unwrap();
    let last = ram.regions()[0].page_count - 1;
    let mut bits = vec![0; crate::page::bitmap_words(last + 1)];
    ram.host_writes().take_into(0, &mut bits);
    assert_eq!(
        crate::page::runs_of_set_bits(&bits).collect::<Vec<_>>(),
        [(last, 1)]
    );
    bits.fill(0);
    ram.host_writes().take_into(1, &mut bits);
    assert_eq!(
        crate::page::runs_of_set_bits(&bits).collect::<Vec<_>>(),
        [(0, 1)]
    );
}

#[test]
fn every_backing_reads_zeros_after_a_discard() {
    let backings = [
        BackingSpec::Anonymous,
        BackingSpec::AnonymousSmallPages,
        BackingSpec::Memfd,
    ];
    for backing in backings {
        for (preallocate, locked) in [(false, false), (true, false), (false, true)] {
            let ram = GuestRam::new(&MemorySpec {
                preallocate,
                locked,
                ..spec(4 << 20, backing)
            })
            .unwrap();
            ram.memory().write_obj(7_u64, GuestAddress(0x1000)).unwrap();
            ram.discard_all().unwrap();
            let read: u64 = ram.memory().read_obj(GuestAddress(0x1000)).unwrap();
            assert_eq!(read, 0, "{backing:?}");
        }
    }
}

#[test]
fn a_size_that_does_not_fit_its_pages_is_refused() {
    let hugetlb = BackingSpec::Hugetlb {
        page_bytes: 2 << 20,
    };
    for wrong in [spec(4096, BackingSpec::Memfd), spec(3 << 20, hugetlb)] {
        assert!(matches!(
            GuestRam::new(&wrong),
            Err(MemoryError::Size { .. })
        ));
    }
}

#[test]
fn a_short_hugetlb_pool_is_named() {
    let hugetlb = BackingSpec::Hugetlb {
        page_bytes: 2 << 20,
    };
    let error = GuestRam::new(&spec(1 << 46, hugetlb)).unwrap_err();
    assert!(error.to_string().contains("nr_hugepages"), "{error}");
}
