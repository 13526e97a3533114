//! Copying the last dirty pages, inside the pause, by as many threads as are there.

use std::sync::Arc;

use crate::checkpoint::capture::slot_offset;
use crate::checkpoint::control::Control;
use crate::checkpoint::error::Halt;
use crate::checkpoint::layout::Layout;
use crate::checkpoint::watchdog::PauseLease;
use crate::page::PAGE_BYTES;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::channel::{Receiver, Sender, bounded};
use crate::sys::mapping::GuestMapping;

/// Copies that a thread claims at once: 256 KiB, some 20 µs.
const BLOCK: usize = 64;

/// A copy of one page into its slot of the staging table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageCopy {
    pub(crate) page: usize,
    pub(crate) slot: u32,
}

/// The copies of the last set, shared by the threads that make them.
///
/// Blocks are claimed one by one, so that a thread that the host does not run delays nobody but
/// the block it holds.
pub(crate) struct LastSet {
    pub(crate) layout: Arc<Layout>,
    pub(crate) memory: GuestMapping,
    pub(crate) control: Arc<Control>,
    pub(crate) lease: Arc<PauseLease>,
    copies: Vec<PageCopy>,
    next: AtomicUsize,
    left: AtomicUsize,
    done: Sender<()>,
}

impl LastSet {
    /// Makes the set; the receiver gets a message when every copy is made, at once if there are
    /// none.
    pub(crate) fn new(
        layout: Arc<Layout>,
        memory: GuestMapping,
        control: Arc<Control>,
        lease: Arc<PauseLease>,
        copies: Vec<PageCopy>,
    ) -> (Self, Receiver<()>) {
        let (done, finished) = bounded(1);
        if copies.is_empty() {
            done.send(()).expect("the receiver lives and has room");
        }
        let set = Self {
            layout,
            memory,
            control,
            lease,
            left: AtomicUsize::new(copies.len()),
            copies,
            next: AtomicUsize::new(0),
            done,
        };
        (set, finished)
    }

    /// Makes copies until every one is claimed.
    pub(crate) fn run(&self) -> Result<(), Halt> {
        loop {
            self.control.check()?;
            let first = self.next.fetch_add(BLOCK, Ordering::Relaxed);
            if first >= self.copies.len() {
                return Ok(());
            }
            let end = (first + BLOCK).min(self.copies.len());
            for copy in &self.copies[first..end] {
                self.layout
                    .copy_page(copy.page, &self.memory, slot_offset(copy.slot));
            }
            self.lease.beat();
            // Release: whoever gets the message sees the copies of all blocks.
            if self.left.fetch_sub(end - first, Ordering::AcqRel) == end - first {
                self.done.send(()).ok();
            }
        }
    }

    /// Returns whether a second thread would be of use.
    pub(crate) fn is_worth_sharing(&self) -> bool {
        self.copies.len() > 8 * BLOCK
    }
}

const _: () = assert!(
    PAGE_BYTES * BLOCK == 256 << 10,
    "the block is as large as its comment says"
);
