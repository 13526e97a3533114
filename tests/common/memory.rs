//! Guest memory, compared with what it should be.

use std::sync::Arc;

use livepoint::checkpoint::PauseHook;
use livepoint::guest::{Guest, MemoryRegion};
use livepoint::page::PAGE_BYTES;
use livepoint::sys::anon;

/// Bytes that are compared at once.
const COMPARE_BYTES: usize = 1 << 20;

/// Memory of the same layout as a guest's, of the test's own.
pub fn shadow(regions: &[MemoryRegion]) -> Vec<MemoryRegion> {
    regions
        .iter()
        .map(|region| MemoryRegion {
            mapping: anon::map_anonymous(region.mapping.len(), true).unwrap(),
            ..region.clone()
        })
        .collect()
}

/// Fails at the first page that differs.
pub fn assert_same_memory(got: &[MemoryRegion], want: &[MemoryRegion]) {
    let (mut a, mut b) = (vec![0_u8; COMPARE_BYTES], vec![0_u8; COMPARE_BYTES]);
    for (got, want) in got.iter().zip(want) {
        for offset in (0..got.mapping.len()).step_by(COMPARE_BYTES) {
            let len = COMPARE_BYTES.min(got.mapping.len() - offset);
            got.mapping.copy_out(offset, &mut a[..len]);
            want.mapping.copy_out(offset, &mut b[..len]);
            if a[..len] != b[..len] {
                let byte = a[..len]
                    .iter()
                    .zip(&b[..len])
                    .position(|(a, b)| a != b)
                    .unwrap();
                let gpa = got.start.gpa() + (offset + byte) as u64;
                panic!("page {:#x} is not as it was in the pause", gpa >> 12);
            }
        }
    }
}

/// Copies the page at `gpa` out of `regions`.
pub fn read_page(regions: &[MemoryRegion], gpa: u64, out: &mut [u8]) {
    let region = regions
        .iter()
        .find(|region| (region.start.gpa()..region.run().end().gpa()).contains(&gpa))
        .unwrap_or_else(|| panic!("{gpa:#x} is in no region"));
    let offset = usize::try_from(gpa - region.start.gpa()).unwrap();
    region.mapping.copy_out(offset, &mut out[..PAGE_BYTES]);
}

/// Returns a hook that copies the guest's memory to `into` in the pause.
pub fn copy_at_pause(into: Arc<Vec<MemoryRegion>>) -> PauseHook {
    Arc::new(move |guest: &dyn Guest| {
        for (from, to) in guest.regions().iter().zip(into.iter()) {
            from.mapping.copy_to(0, &to.mapping, 0, from.mapping.len());
        }
    })
}
