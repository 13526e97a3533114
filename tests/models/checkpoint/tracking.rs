//! Between a scan and its harvests no store of the guest is lost, and no write of the VMM's.
//!
//! The newest copy of each page must be what memory holds when all is over. What the callers of
//! the tracker do is in [`Capture`], in their order: re-arm first, copy second. Copying first
//! makes a model fail ([`copying_before_rearming_loses_a_store`]), and so does each of these:
//! taking the host's marks after the look at the mask, either fence missing, the mask looked at
//! after the log, the flag set before the re-arm, no re-arm in the scan, `put_back` not marking
//! again, marks set or taken with a weaker ordering, or taken by a load and a store.

use std::sync::Arc;

use loom::thread::{self, JoinHandle};

use crate::checkpoint::layout::Layout;
use crate::checkpoint::tracker::{DirtySet, Tracker};
use crate::guest::Guest;
use crate::world::ModelGuest;

/// A harvest of one checkpoint; the scan is another thread's.
struct Capture {
    guest: Arc<ModelGuest>,
    layout: Arc<Layout>,
    tracker: Arc<Tracker>,
    dirty: DirtySet,
    pages: usize,
}

/// Newest copies, by page.
type Copies = Vec<u8>;

/// What a harvest does with what it collected.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Harvest {
    RearmThenCopy,
    CopyThenRearm,
    PutBack,
}

impl Capture {
    fn new(pages: usize) -> Self {
        let guest = ModelGuest::new(pages);
        let layout = Arc::new(Layout::new(guest.regions()));
        Self {
            tracker: Arc::new(Tracker::new(guest.clone(), layout.clone())),
            dirty: DirtySet::new(&layout),
            guest,
            layout,
            pages,
        }
    }

    fn scan(&self) -> JoinHandle<Copies> {
        let (guest, layout) = (self.guest.clone(), self.layout.clone());
        let (tracker, pages) = (self.tracker.clone(), self.pages);
        thread::spawn(move || {
            tracker.arm_for_scan(&layout.windows()[0]).unwrap();
            (0..pages).map(|page| guest.memory().load(page)).collect()
        })
    }

    /// Returns the copies that were made, by page.
    fn harvest(&mut self, how: Harvest) -> Vec<(usize, u8)> {
        self.tracker.collect(&mut self.dirty).unwrap();
        let mut copies = Vec::new();
        for window in self.dirty.windows() {
            if how == Harvest::PutBack {
                self.tracker.put_back(&self.dirty, &window);
                continue;
            }
            if how == Harvest::RearmThenCopy {
                self.tracker.rearm_window(&self.dirty, &window).unwrap();
            }
            let pages = self.dirty.pages(window);
            copies.extend(pages.map(|page| (page, self.guest.memory().load(page))));
            if how == Harvest::CopyThenRearm {
                self.tracker.rearm_window(&self.dirty, &window).unwrap();
            }
        }
        copies
    }
}

/// Harvests while the scan and `writer` run, then once more when nobody does.
fn run(pages: usize, live: &[Harvest], writer: impl Fn(&ModelGuest) + Send + 'static) {
    let mut capture = Capture::new(pages);
    let scan = capture.scan();
    let guest = capture.guest.clone();
    let writer = thread::spawn(move || writer(&guest));
    let live = live.iter();
    let mut newer: Vec<_> = live.flat_map(|&how| capture.harvest(how)).collect();
    let mut image = scan.join().unwrap();
    writer.join().unwrap();
    newer.extend(capture.harvest(Harvest::RearmThenCopy));
    for (page, value) in newer {
        image[page] = value;
    }
    let memory: Copies = (0..pages)
        .map(|page| capture.guest.memory().load(page))
        .collect();
    assert_eq!(image, memory, "a write is lost");
}

pub(crate) fn no_store_of_the_guest_is_lost() {
    run(1, &[Harvest::RearmThenCopy; 2], |guest| {
        guest.store(0, 1);
        guest.store(0, 2);
    });
}

/// Two pages, whose marks share a word.
pub(crate) fn no_write_of_the_vmm_is_lost() {
    run(2, &[Harvest::RearmThenCopy; 2], |guest| {
        guest.write(0, 1);
        guest.write(1, 2);
    });
}

pub(crate) fn a_harvest_that_is_put_back_is_not_lost() {
    run(1, &[Harvest::PutBack], |guest| {
        guest.store(0, 1);
        guest.write(0, 2);
    });
}

/// The bits that the log has from its start are not taken for stores.
pub(crate) fn what_nobody_wrote_is_not_harvested() {
    let mut capture = Capture::new(1);
    let scan = capture.scan();
    assert_eq!(capture.harvest(Harvest::RearmThenCopy), []);
    scan.join().unwrap();
    assert_eq!(capture.harvest(Harvest::RearmThenCopy), []);
}

/// Fails: a store between the two is forgotten by the re-arm.
pub(crate) fn copying_before_rearming_loses_a_store() {
    run(1, &[Harvest::CopyThenRearm], |guest| {
        guest.store(0, 1);
        guest.store(0, 2);
    });
}

/// Fails: a harvest between the two copies the page, and forgets the mark.
pub(crate) fn marking_before_writing_loses_the_write() {
    run(1, &[Harvest::RearmThenCopy], |guest| {
        guest.write_marked_first(0, 1);
    });
}
