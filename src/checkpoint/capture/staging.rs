//! The staging table: bounded memory between capture and disk.

use crate::checkpoint::error::CheckpointError;
use crate::page::{PAGE_BYTES, PIECE_BYTES};
use crate::sys::anon;
use crate::sys::mapping::GuestMapping;

/// No slot, or no page.
const NONE: u32 = u32::MAX;

/// Populated this much at a time, so that nothing waits long for it.
const POPULATE_BYTES: usize = 8 * PIECE_BYTES;

/// The newest copy of each page that the guest wrote, until it goes to the image.
///
/// One thread at a time places pages; the copies themselves may be made by several at once, each
/// into its own slots of [`Staging::memory`]. A page that comes again gets the slot it has, and
/// so replaces the older copy: the newest epoch wins.
#[derive(Debug)]
pub(crate) struct Staging {
    memory: GuestMapping,
    populated_bytes: usize,
    /// Slot of each page of the guest.
    slot_of: Vec<u32>,
    /// Page and epoch of each slot.
    slots: Vec<Slot>,
    /// Slots given back; the others are `fresh..`. Those given back are populated.
    free: Vec<u32>,
    fresh: usize,
    peak: usize,
    pub(crate) replaced_pages: u64,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    page: usize,
    epoch: u32,
}

/// A page in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Staged {
    pub(crate) epoch: u32,
    pub(crate) page: usize,
    pub(crate) slot: u32,
}

impl Staging {
    /// Makes a table of `slots` slots for a guest of `page_count` pages, in `kept` memory of an
    /// earlier one if that fits.
    pub(crate) fn new(
        slots: usize,
        page_count: usize,
        kept: Option<(GuestMapping, usize)>,
    ) -> Result<Self, CheckpointError> {
        assert!(slots < NONE as usize, "slots are numbered in 32 bits");
        let bytes = slots * PAGE_BYTES;
        let fits = |(memory, _): &(GuestMapping, usize)| memory.len() == bytes;
        let (memory, populated_bytes) = match kept.filter(fits) {
            Some(kept) => kept,
            None => {
                let what = format!("{bytes} bytes of staging memory");
                let mapped = anon::map_anonymous(bytes, bytes >= PIECE_BYTES);
                (mapped.map_err(CheckpointError::resource(what))?, 0)
            }
        };
        Ok(Self {
            memory,
            populated_bytes,
            slot_of: vec![NONE; page_count],
            slots: vec![Slot { page: 0, epoch: 0 }; slots],
            free: Vec::new(),
            fresh: 0,
            peak: 0,
            replaced_pages: 0,
        })
    }

    /// Populates the memory of the next `slots` free slots; `wanted` is asked now and then, and
    /// ends it early.
    pub(crate) fn populate(
        &mut self,
        slots: usize,
        mut wanted: impl FnMut() -> bool,
    ) -> Result<(), CheckpointError> {
        let fresh_needed = slots.saturating_sub(self.free.len());
        let end = (self.fresh + fresh_needed).min(self.slots.len()) * PAGE_BYTES;
        while self.populated_bytes < end && wanted() {
            let left = self.memory.len() - self.populated_bytes;
            let step = POPULATE_BYTES.min(left);
            anon::populate(&self.memory, self.populated_bytes, step)
                .map_err(CheckpointError::resource("staging memory"))?;
            self.populated_bytes += step;
        }
        Ok(())
    }

    pub(crate) fn memory(&self) -> &GuestMapping {
        &self.memory
    }

    /// Ends the table; returns its memory and how much of it is populated, for the next one.
    pub(crate) fn into_memory(self) -> (GuestMapping, usize) {
        (self.memory, self.populated_bytes)
    }

    pub(crate) fn used(&self) -> usize {
        self.fresh - self.free.len()
    }

    pub(crate) fn free_slots(&self) -> usize {
        self.slots.len() - self.used()
    }

    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn peak(&self) -> usize {
        self.peak
    }

    /// Returns how many of `pages` have no slot, and so would take a free one.
    pub(crate) fn without_slot(&self, pages: impl Iterator<Item = usize>) -> usize {
        pages.filter(|&page| self.slot_of[page] == NONE).count()
    }

    /// Returns whether all of `pages` find slots while `reserved` stay free.
    pub(crate) fn has_room(&self, pages: impl Iterator<Item = usize>, reserved: usize) -> bool {
        let room = self.free_slots().saturating_sub(reserved);
        let without_slot = pages.filter(|&page| self.slot_of[page] == NONE);
        without_slot.take(room + 1).count() <= room
    }

    /// Returns the slot for a copy of `page`: the one it has, or a free one while more than
    /// `reserved` are free. `None` where it has none and may take none.
    pub(crate) fn place(&mut self, page: usize, epoch: u32, reserved: usize) -> Option<u32> {
        let mut slot = self.slot_of[page];
        if slot == NONE {
            if self.free_slots() <= reserved {
                return None;
            }
            slot = self.free.pop().unwrap_or_else(|| {
                let next = u32::try_from(self.fresh).expect("slots are numbered in 32 bits");
                self.fresh += 1;
                next
            });
            self.slot_of[page] = slot;
            self.peak = self.peak.max(self.used());
        } else {
            self.replaced_pages += 1;
        }
        let entry = &mut self.slots[slot as usize];
        assert!(entry.page != page || entry.epoch <= epoch, "epochs go up");
        *entry = Slot { page, epoch };
        Some(slot)
    }

    /// Gives the slot of a page back, after its copy went to the writers.
    pub(crate) fn release(&mut self, staged: Staged) {
        let slot = std::mem::replace(&mut self.slot_of[staged.page], NONE);
        assert_eq!(slot, staged.slot, "a page has one slot");
        self.free.push(slot);
    }

    /// Returns the staged pages whose epoch is below `before`, oldest first and in page order.
    pub(crate) fn older_than(&self, before: u32) -> Vec<Staged> {
        let mut staged: Vec<_> = self
            .slots
            .iter()
            .zip(0_u32..)
            .take(self.fresh)
            .filter(|&(entry, slot)| self.slot_of[entry.page] == slot && entry.epoch < before)
            .map(|(entry, slot)| Staged {
                epoch: entry.epoch,
                page: entry.page,
                slot,
            })
            .collect();
        staged.sort_unstable_by_key(|staged| (staged.epoch, staged.page));
        staged
    }
}

/// Returns the offset of a slot's bytes.
pub(crate) fn slot_offset(slot: u32) -> usize {
    slot as usize * PAGE_BYTES
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(slots: usize) -> Staging {
        Staging::new(slots, 1000, None).unwrap()
    }

    #[test]
    fn a_page_that_comes_again_replaces_its_older_copy() {
        let mut staging = table(4);
        let first = staging.place(7, 1, 0).unwrap();
        assert_eq!(staging.place(7, 3, 0), Some(first));
        assert_eq!(staging.used(), 1);
        assert_eq!(staging.replaced_pages, 1);
        let staged = staging.older_than(u32::MAX);
        let only = Staged {
            epoch: 3,
            page: 7,
            slot: first,
        };
        assert_eq!(staged, [only]);
    }

    #[test]
    fn a_full_table_takes_only_pages_that_it_has_and_its_reserve_is_kept() {
        let mut staging = table(4);
        for page in 0..3 {
            assert!(staging.place(page, 1, 1).is_some());
        }
        assert_eq!(staging.place(3, 1, 1), None, "the last slot is reserved");
        assert!(staging.place(2, 2, 1).is_some());
        assert!(staging.has_room([0, 1, 3].into_iter(), 0));
        assert!(!staging.has_room([0, 1, 3].into_iter(), 1));
        assert!(staging.place(3, 2, 0).is_some());
        assert_eq!(staging.place(4, 2, 0), None);
        assert_eq!((staging.peak(), staging.free_slots()), (4, 0));
    }

    #[test]
    fn slots_that_are_given_back_are_used_again_and_their_pages_are_gone() {
        let mut staging = table(2);
        staging.place(1, 1, 0).unwrap();
        staging.place(2, 2, 0).unwrap();
        for staged in staging.older_than(2) {
            staging.release(staged);
        }
        assert_eq!(staging.used(), 1);
        let slot = staging.place(3, 3, 0).unwrap();
        let pages: Vec<_> = staging
            .older_than(u32::MAX)
            .iter()
            .map(|staged| staged.page)
            .collect();
        assert_eq!(pages, [2, 3]);
        assert_eq!(slot, 0);
    }

    #[test]
    fn memory_is_populated_ahead_and_kept_for_the_next_table() {
        let mut staging = table(16);
        staging.populate(3, || true).unwrap();
        let (memory, populated) = staging.into_memory();
        assert_eq!(populated, 16 * PAGE_BYTES);
        let hva = memory.hva();
        let next = Staging::new(16, 10, Some((memory, populated))).unwrap();
        assert_eq!(next.memory().hva(), hva);
        let other = Staging::new(8, 10, Some(next.into_memory())).unwrap();
        assert_eq!(other.memory().len(), 8 * PAGE_BYTES);
    }
}
