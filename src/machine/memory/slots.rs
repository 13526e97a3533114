//! Where guest memory is in the guest, and by which memory slots KVM has it.

use crate::guest::MemoryRegion;
use crate::page::{Gfn, PAGE_BYTES};

/// Where the hole for devices below 4 GiB starts.
pub const HOLE_START: u64 = 3 << 30;
/// Where it ends, and memory goes on.
pub const HOLE_END: u64 = 4 << 30;

/// Returns guest physical address and length of each range of `bytes` of memory.
pub fn layout(bytes: u64) -> Vec<(u64, u64)> {
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![(0, low)];
    if bytes > low {
        ranges.push((HOLE_END, bytes - low));
    }
    ranges
}

/// The least memory of one slot. Ending the dirty log of a slot holds vCPUs up for 2 to 3 ms a GiB
/// (measured on huge pages): with slots of this size it is less than a millisecond at a time.
pub(super) const SLOT_BYTES_MIN: u64 = 256 << 20;

/// The most slots that memory is divided into; KVM has 509 at least (`KVM_CAP_NR_MEMSLOTS`).
const SLOTS_MAX: u64 = 64;

/// Returns the size of a memory slot, for so much memory in pages of that size: a power of two.
pub(super) fn slot_bytes(memory_bytes: u64, page_bytes: u64) -> u64 {
    let share = memory_bytes.div_ceil(SLOTS_MAX).next_power_of_two();
    share.max(SLOT_BYTES_MIN).max(page_bytes)
}

/// Divides `ranges` into slots of at most `slot_bytes`, numbered in order.
pub(super) fn divide(ranges: &[MemoryRegion], slot_bytes: u64) -> Vec<MemoryRegion> {
    let slot_pages = slot_bytes / PAGE_BYTES as u64;
    let parts = ranges.iter().flat_map(|range| {
        let starts =
            (0..range.page_count).step_by(usize::try_from(slot_pages).unwrap_or(usize::MAX));
        starts.map(move |first| (range, first, slot_pages.min(range.page_count - first)))
    });
    let bytes = |pages: u64| usize::try_from(pages).expect("memory is mapped") * PAGE_BYTES;
    (0..)
        .zip(parts)
        .map(|(slot, (range, first, page_count))| MemoryRegion {
            slot,
            start: Gfn(range.start.0 + first),
            page_count,
            mapping: range.mapping.part(bytes(first), bytes(page_count)),
            backing: range.backing,
        })
        .collect()
}
