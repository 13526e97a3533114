//! A guest's memory is given back when the last thread of the engine has let go of it.
//!
//! Each of these makes a model here fail: a use that ends before the memory was touched last; an
//! end that wakes nobody; a wait that looks at the count without its lock.

use std::sync::Arc;

use loom::sync::atomic::{AtomicBool, Ordering};
use loom::thread;

use super::uses::{Use, Uses};

/// A thread of the engine, and whether it has touched memory for the last time. The flag is as weak
/// as memory is: only what orders the threads makes it seen.
struct Engine {
    thread: thread::JoinHandle<()>,
    touched: Arc<AtomicBool>,
}

impl Engine {
    fn start(uses: &Arc<Uses>, touches_in_time: bool) -> Self {
        let touched = Arc::new(AtomicBool::new(false));
        let (lent, touches) = (Use::new(uses), touched.clone());
        let thread = thread::spawn(move || {
            let touch = || touches.store(true, Ordering::Relaxed);
            if touches_in_time {
                touch();
                drop(lent);
            } else {
                drop(lent);
                touch();
            }
        });
        Self { thread, touched }
    }

    /// Whoever unmaps the memory now does so after the last touch.
    fn end(self) {
        assert!(
            self.touched.load(Ordering::Relaxed),
            "touched after its end"
        );
        self.thread.join().unwrap();
    }
}

/// lvp_guest_free() waits for two threads of the engine.
pub(crate) fn memory_is_given_back_after_the_last_use() {
    let uses = Uses::new();
    let engines = [(); 2].map(|()| Engine::start(&uses, true));
    uses.wait_for(0);
    engines.into_iter().for_each(Engine::end);
}

/// lvp_guest_remove_region() waits for one use of two: the other region's own stays.
pub(crate) fn a_region_goes_when_its_uses_have_ended() {
    let uses = Uses::new();
    let _other = Use::new(&uses);
    let engine = Engine::start(&uses, true);
    uses.wait_for(1);
    engine.end();
}

/// A use that ends too early: must fail.
pub(crate) fn a_use_that_ends_before_the_last_touch_is_none() {
    let uses = Uses::new();
    let engine = Engine::start(&uses, false);
    uses.wait_for(0);
    engine.end();
}
