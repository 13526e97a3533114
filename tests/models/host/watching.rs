//! Watches of a domain: nothing is lost, nothing comes after the end, and a thread that waits always
//! ends.
//!
//! Each of these makes a model here fail: a notice that wakes nobody, or is added after that; a
//! descriptor that is cleared without the queue's lock; a close that wakes nobody; a watch that is
//! added without the lock under which others are told.

use std::sync::Arc;
use std::time::Duration;

use loom::sync::atomic::{AtomicU64, Ordering};
use loom::thread;

use crate::host::MachineState;
use crate::host::watch::{Happening, Watch, Watched, Watchers};
use crate::sys::event::Event;

fn number(watched: Watched) -> Option<u64> {
    match watched {
        Watched::Notice(notice) => Some(notice.number),
        Watched::Nothing => panic!("a wait without a limit came to nothing"),
        Watched::Over => None,
    }
}

/// A reader takes all that happens, in order, and hears of the end.
pub(crate) fn a_reader_misses_nothing() {
    let watchers = Arc::new(Watchers::new());
    let watch = watchers.watch().unwrap();
    drop(Event::last());
    let teller = watchers.clone();
    let teller = thread::spawn(move || {
        teller.tell(Some(MachineState::Running), Happening::Started);
        teller.tell(None, Happening::Reset);
        teller.end();
    });
    let numbers: Vec<_> = std::iter::from_fn(|| number(watch.next(None))).collect();
    assert_eq!(numbers, [1, 2]);
    teller.join().unwrap();
}

/// Who polls finds a notice, or the end, behind a descriptor that is readable; and the descriptor
/// is readable once all is told.
pub(crate) fn the_descriptor_is_readable_while_a_notice_waits() {
    let watchers = Arc::new(Watchers::new());
    let watch = watchers.watch().unwrap();
    let readable = Event::last();
    let teller = watchers.clone();
    let teller = thread::spawn(move || {
        teller.tell(None, Happening::Reset);
        teller.tell(None, Happening::Reset);
    });
    let mut taken = 0;
    for _ in 0..2 {
        if readable.is_set() {
            let next = watch.next(Some(Duration::ZERO));
            assert!(matches!(next, Watched::Notice(_)), "readable for nothing");
            taken += 1;
        }
    }
    teller.join().unwrap();
    assert_eq!(readable.is_set(), taken < 2, "readable says that some wait");
}

/// The thread that calls back, as the C ABI has it.
fn call_back(watch: Arc<Watch>, calls: Arc<AtomicU64>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        while let Watched::Notice(_) = watch.next(None) {
            calls.fetch_add(1, Ordering::Relaxed);
        }
    })
}

/// Events are freed while something happens: the thread ends, and calls no more.
pub(crate) fn a_watch_that_is_freed_calls_no_more() {
    let watchers = Arc::new(Watchers::new());
    let watch = Arc::new(watchers.watch().unwrap());
    drop(Event::last());
    let calls = Arc::new(AtomicU64::new(0));
    let thread = call_back(watch.clone(), calls.clone());
    let teller = watchers.clone();
    let teller = thread::spawn(move || teller.tell(None, Happening::Reset));
    watch.close();
    thread.join().unwrap();
    let then = calls.load(Ordering::Relaxed);
    teller.join().unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), then);
}

/// A machine is freed while a watch of it begins: the watch ends, whichever came first.
pub(crate) fn a_watch_that_begins_at_the_end_ends_too() {
    let watchers = Arc::new(Watchers::new());
    let ender = watchers.clone();
    let ender = thread::spawn(move || ender.end());
    let watch = watchers.watch().unwrap();
    drop(Event::last());
    assert_eq!(watch.next(None), Watched::Over);
    ender.join().unwrap();
}

/// Whoever only closes the watch, and does not wait for the thread, is called after that: must fail.
pub(crate) fn a_thread_that_is_not_waited_for_may_call_again() {
    let watchers = Watchers::new();
    let watch = Arc::new(watchers.watch().unwrap());
    drop(Event::last());
    let calls = Arc::new(AtomicU64::new(0));
    let thread = call_back(watch.clone(), calls.clone());
    watchers.tell(None, Happening::Reset);
    watch.close();
    let then = calls.load(Ordering::Relaxed);
    thread.join().unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), then);
}
