//! Who hears that the last set is copied finds every copy made.
//!
//! Counting the copies with a weaker ordering makes the model fail, and so does telling at every
//! block, or at the first.

use std::sync::Arc;
use std::sync::Mutex as Plain;
use std::time::Duration;

use loom::thread;

use crate::checkpoint::capture::{LastSet, PageCopy};
use crate::checkpoint::control::Control;
use crate::checkpoint::job::JobShared;
use crate::checkpoint::layout::Layout;
use crate::checkpoint::watchdog::PauseLease;
use crate::guest::Guest;
use crate::page::PAGE_BYTES;
use crate::sys::anon::map_anonymous;
use crate::world::ModelGuest;

/// One more than two blocks.
const COPIES: u32 = 129;

/// Three threads make the copies, of one page each time; one of them waits for the message.
pub(crate) fn the_message_comes_after_every_copy() {
    let guest = ModelGuest::new(1);
    guest.memory().store(0, 1);
    let layout = Arc::new(Layout::new(guest.regions()));
    let staging = map_anonymous(COPIES as usize * PAGE_BYTES, false).unwrap();
    let control = Arc::new(Control::new());
    let job = Arc::new(JobShared {
        control: control.clone(),
        ends: Plain::default(),
    });
    let lease = Arc::new(PauseLease::new(guest, job, Duration::ZERO, None));
    let copies = (0..COPIES).map(|slot| PageCopy { page: 0, slot });
    let (set, finished) = LastSet::new(layout, staging.clone(), control, lease, copies.collect());
    let set = Arc::new(set);
    let helpers = [set.clone(), set.clone()].map(|set| thread::spawn(move || set.run().unwrap()));
    set.run().unwrap();
    finished.recv().unwrap();
    for slot in [0, 63, 64, 127, 128] {
        assert_eq!(staging.load(slot), 1, "copy {slot} is not made");
    }
    for helper in helpers {
        helper.join().unwrap();
    }
    drop(set);
    assert!(finished.recv().is_err(), "the end was told twice");
}
