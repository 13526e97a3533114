//! Which pages a harvest reports.

use std::sync::Arc;

use crate::checkpoint::fake::{Call, FakeGuest};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::tracker::{DirtySet, Logging, Tracker};
use crate::guest::Guest;

struct Tracked {
    guest: Arc<FakeGuest>,
    layout: Arc<Layout>,
    tracker: Arc<Tracker>,
    _logging: Logging,
}

impl Tracked {
    /// Two windows' worth of pages, logging, nothing scanned.
    fn new() -> Self {
        let guest = FakeGuest::new(&[4096], 0);
        guest.fill();
        let layout = Arc::new(Layout::new(guest.regions()));
        assert_eq!(layout.windows().len(), 2);
        Self {
            tracker: Arc::new(Tracker::new(guest.clone(), layout.clone())),
            _logging: Logging::start(guest.clone()).unwrap(),
            layout,
            guest,
        }
    }

    fn scan(&self, window: usize) {
        self.tracker
            .arm_for_scan(&self.layout.windows()[window])
            .unwrap();
    }

    /// One harvest, with its re-arms.
    fn harvest(&self) -> Vec<usize> {
        let mut set = DirtySet::new(&self.layout);
        self.tracker.collect(&mut set).unwrap();
        let mut pages = Vec::new();
        for window in set.windows() {
            self.tracker.rearm_window(&set, &window).unwrap();
            pages.extend(set.pages(window));
        }
        pages
    }
}

#[test]
fn pages_that_were_not_scanned_are_not_dirty() {
    let tracked = Tracked::new();
    assert!(tracked.harvest().is_empty(), "the initial ones of the log");
    tracked.scan(0);
    assert!(tracked.harvest().is_empty(), "the scan re-armed them");
}

#[test]
fn page_written_after_rearm_is_captured_next_round() {
    let tracked = Tracked::new();
    tracked.scan(0);
    tracked.guest.write_page(70, 1);
    tracked.guest.device_write(71, 1);
    assert_eq!(tracked.harvest(), [70, 71]);
    assert!(tracked.harvest().is_empty());
    tracked.guest.write_page(70, 2);
    assert_eq!(tracked.harvest(), [70]);
}

#[test]
fn a_page_written_between_fetch_and_rearm_is_reported_again() {
    let tracked = Tracked::new();
    tracked.scan(0);
    tracked.guest.write_page(5, 1);
    let mut set = DirtySet::new(&tracked.layout);
    tracked.tracker.collect(&mut set).unwrap();
    tracked.guest.write_page(6, 1);
    for window in set.windows() {
        tracked.tracker.rearm_window(&set, &window).unwrap();
    }
    assert_eq!(tracked.harvest(), [6]);
}

#[test]
fn writes_to_a_piece_that_is_scanned_during_a_harvest_come_with_the_next_one() {
    let tracked = Tracked::new();
    tracked.scan(0);
    let once = std::sync::Once::new();
    let (tracker, layout) = (tracked.tracker.clone(), tracked.layout.clone());
    // Between the look at the mask and the fetch: the second window is scanned, then written.
    tracked.guest.on(Call::Fetch, move |guest| {
        once.call_once(|| {
            tracker.arm_for_scan(&layout.windows()[1]).unwrap();
            guest.write_page(3000, 1);
            guest.device_write(3001, 1);
        });
    });
    assert!(tracked.harvest().is_empty());
    assert_eq!(tracked.harvest(), [3000, 3001]);
}

#[test]
fn a_mark_of_a_piece_that_is_scanned_just_before_it_is_taken_is_not_lost() {
    let tracked = Tracked::new();
    tracked.scan(0);
    let once = std::sync::Once::new();
    let (tracker, layout) = (tracked.tracker.clone(), tracked.layout.clone());
    // Before the marks are taken: the second window is scanned, copied, and then written.
    tracked.guest.on(Call::HostWrites, move |guest| {
        once.call_once(|| {
            tracker.arm_for_scan(&layout.windows()[1]).unwrap();
            guest.device_write(3001, 1);
        });
    });
    assert_eq!(tracked.harvest(), [3001]);
}

#[test]
fn a_peek_counts_and_takes_nothing() {
    let tracked = Tracked::new();
    tracked.scan(0);
    tracked.guest.write_page(1, 1);
    tracked.guest.write_page(4000, 1);
    tracked.guest.device_write(9, 1);
    let mut scratch = DirtySet::new(&tracked.layout);
    assert_eq!(tracked.tracker.peek(&mut scratch).unwrap(), 1);
    assert_eq!(tracked.harvest(), [1, 9]);
}

#[test]
fn a_window_that_is_put_back_comes_with_the_next_harvest() {
    let tracked = Tracked::new();
    tracked.scan(0);
    tracked.guest.write_page(70, 1);
    tracked.guest.device_write(71, 1);
    let mut set = DirtySet::new(&tracked.layout);
    tracked.tracker.collect(&mut set).unwrap();
    for window in set.windows() {
        assert_eq!(tracked.tracker.put_back(&set, &window), 2);
    }
    assert_eq!(tracked.harvest(), [70, 71]);
    assert!(tracked.harvest().is_empty());
}

#[test]
fn a_discard_is_reported() {
    let tracked = Tracked::new();
    tracked.scan(0);
    tracked.scan(1);
    tracked.guest.discard(600, 3);
    assert_eq!(tracked.harvest(), [600, 601, 602]);
}
