//! Notices of what the VMM itself does to guest memory: no hardware log sees it.

use std::fmt;
use std::sync::Arc;

use crate::page::{AtomicPageBitmap, PageRun};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{PoisonError, RwLock, RwLockReadGuard};

/// Told of a discard before the memory is given back; `cow` captures the pages first.
pub trait DiscardObserver: Send + Sync {
    /// Called before `run` is discarded. May block until its pages are captured, but never for
    /// storage.
    fn before_discard(&self, run: PageRun);
}

/// A VMM that keeps a log of its own writes, and is asked for it.
pub trait HostWriteSource: Send + Sync {
    /// Takes the pages of `slot` that were written since the last call, and adds their bits to
    /// `into`. A page is told after it was written.
    fn take_into(&self, slot: u32, into: &mut [u64]);
}

/// Pages that the VMM wrote or discarded.
///
/// Device code calls [`HostWrites::mark_dirty`] **after** a write completes: marked before it,
/// the mark could be harvested and the page copied while the write is still to come. Balloon,
/// free-page reporting and unplug go through [`HostWrites::will_discard`].
pub struct HostWrites {
    /// Sorted by frame.
    regions: Vec<Region>,
    observer: RwLock<Option<Arc<dyn DiscardObserver>>>,
    source: Option<Arc<dyn HostWriteSource>>,
    claimed: AtomicBool,
}

struct Region {
    slot: u32,
    run: PageRun,
    written: AtomicPageBitmap,
}

impl fmt::Debug for HostWrites {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostWrites")
            .field("regions", &self.regions.len())
            .finish_non_exhaustive()
    }
}

impl HostWrites {
    /// Makes a log for regions given as (slot, frames), which do not overlap.
    pub fn new(regions: impl IntoIterator<Item = (u32, PageRun)>) -> Self {
        let mut regions: Vec<_> = regions
            .into_iter()
            .map(|(slot, run)| Region {
                slot,
                run,
                written: AtomicPageBitmap::new(run.page_count),
            })
            .collect();
        regions.sort_unstable_by_key(|region| region.run.start);
        Self {
            regions,
            observer: RwLock::new(None),
            source: None,
            claimed: AtomicBool::new(false),
        }
    }

    /// Asks `source` too, whenever marks are taken.
    #[must_use]
    pub fn with_source(mut self, source: Arc<dyn HostWriteSource>) -> Self {
        self.source = Some(source);
        self
    }

    /// Claims this log, and with it the guest's dirty log; false while somebody else holds both.
    ///
    /// Marks are taken once: two checkpoints at a time would steal each other's.
    #[must_use = "a claim that failed must stop its caller"]
    pub fn claim(&self) -> bool {
        !self.claimed.swap(true, Ordering::AcqRel)
    }

    /// Ends a claim.
    pub fn release_claim(&self) {
        self.claimed.store(false, Ordering::Release);
    }

    /// Marks the pages that `len` bytes at `gpa` touch; bytes outside every region are ignored.
    /// Call after the write.
    pub fn mark_dirty(&self, gpa: u64, len: u64) {
        self.mark_run(PageRun::touching(gpa, len));
    }

    fn mark_run(&self, run: PageRun) {
        let first = self
            .regions
            .partition_point(|region| region.run.end() <= run.start);
        for region in &self.regions[first..] {
            let Some(part) = region.run.intersection(run) else {
                return;
            };
            region
                .written
                .set_run(part.start.0 - region.run.start.0, part.page_count);
        }
    }

    /// Announces that `run` is about to be given back to the host; keep the returned value until
    /// that is done. Blocks while an observer captures the pages.
    ///
    /// Dropping it marks the pages dirty: a mark made only before could be harvested, and the old
    /// bytes copied, while the discard is still to come.
    #[must_use = "the pages are marked dirty when this is dropped, which must be after the discard"]
    pub fn will_discard(&self, run: PageRun) -> Discard<'_> {
        let observer = self.observer.read();
        let observer = observer.unwrap_or_else(PoisonError::into_inner);
        if let Some(observer) = observer.as_ref() {
            observer.before_discard(run);
        }
        Discard {
            writes: self,
            run,
            _observer: observer,
        }
    }

    /// Sets or takes away who is told of discards. Blocks until those under way have ended: the
    /// observer knows of every discard that comes after this returns.
    pub fn set_discard_observer(&self, observer: Option<Arc<dyn DiscardObserver>>) {
        *self
            .observer
            .write()
            .unwrap_or_else(PoisonError::into_inner) = observer;
    }

    /// Takes the pages of `slot` written since the last call, and adds their bits to `into`.
    pub fn take_into(&self, slot: u32, into: &mut [u64]) {
        for region in self.regions.iter().filter(|region| region.slot == slot) {
            region.written.take_into(into);
            if let Some(source) = &self.source {
                source.take_into(slot, into);
            }
        }
    }

    /// Forgets all marks: what was written before a checkpoint starts is scanned anyway.
    pub fn clear(&self) {
        self.regions
            .iter()
            .for_each(|region| region.written.clear());
    }
}

/// A discard under way; see [`HostWrites::will_discard`].
pub struct Discard<'a> {
    writes: &'a HostWrites,
    run: PageRun,
    // Nobody else becomes the observer before the memory is given back: he would look at memory
    // that is still there, and never hear that it went.
    _observer: RwLockReadGuard<'a, Option<Arc<dyn DiscardObserver>>>,
}

impl fmt::Debug for Discard<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Discard")
            .field("run", &self.run)
            .finish_non_exhaustive()
    }
}

impl Drop for Discard<'_> {
    fn drop(&mut self) {
        self.writes.mark_run(self.run);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Gfn;
    use std::sync::Mutex;

    fn two_regions() -> HostWrites {
        HostWrites::new([
            (
                0,
                PageRun {
                    start: Gfn(0),
                    page_count: 64,
                },
            ),
            (
                1,
                PageRun {
                    start: Gfn(0x100),
                    page_count: 64,
                },
            ),
        ])
    }

    fn taken(writes: &HostWrites, slot: u32) -> u64 {
        let mut bits = [0];
        writes.take_into(slot, &mut bits);
        bits[0]
    }

    #[test]
    fn a_write_is_reported_once_in_its_own_slot() {
        let writes = two_regions();
        writes.mark_dirty(0x10_0fff, 2);
        assert_eq!(taken(&writes, 0), 0);
        assert_eq!(taken(&writes, 1), 0b11);
        assert_eq!(taken(&writes, 1), 0);
    }

    #[test]
    fn a_write_across_the_end_of_a_region_is_cut_there() {
        let writes = two_regions();
        writes.mark_dirty(63 * 4096, 8192);
        assert_eq!(taken(&writes, 0), 1 << 63);
    }

    #[test]
    fn only_one_claim_is_held_at_a_time() {
        let writes = two_regions();
        assert!(writes.claim());
        assert!(!writes.claim());
        writes.release_claim();
        assert!(writes.claim());
    }

    #[test]
    fn a_discard_is_announced_before_and_marked_after() {
        struct Seen(Mutex<Vec<PageRun>>);
        impl DiscardObserver for Seen {
            fn before_discard(&self, run: PageRun) {
                self.0.lock().unwrap().push(run);
            }
        }
        let writes = two_regions();
        let seen = Arc::new(Seen(Mutex::default()));
        writes.set_discard_observer(Some(seen.clone()));
        let run = PageRun {
            start: Gfn(2),
            page_count: 1,
        };
        let discard = writes.will_discard(run);
        assert_eq!(*seen.0.lock().unwrap(), [run]);
        assert_eq!(taken(&writes, 0), 0, "marked only once the memory is gone");
        drop(discard);
        assert_eq!(taken(&writes, 0), 0b100);
    }

    #[test]
    fn an_observer_is_set_only_when_discards_under_way_have_ended() {
        struct Deaf;
        impl DiscardObserver for Deaf {
            fn before_discard(&self, _run: PageRun) {}
        }
        let writes = two_regions();
        let run = PageRun {
            start: Gfn(2),
            page_count: 1,
        };
        let discard = writes.will_discard(run);
        std::thread::scope(|scope| {
            let set = scope.spawn(|| {
                writes.set_discard_observer(Some(Arc::new(Deaf)));
                taken(&writes, 0)
            });
            // Time to do it too early in.
            std::thread::sleep(std::time::Duration::from_millis(20));
            drop(discard);
            assert_eq!(
                set.join().unwrap(),
                0b100,
                "set before the discard had ended"
            );
        });
    }
}
