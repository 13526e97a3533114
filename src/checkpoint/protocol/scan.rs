//! The scan of `threaded`: every piece once, while the guest runs.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender};

use crate::checkpoint::capture::{LastSet, PieceReader};
use crate::checkpoint::control::Control;
use crate::checkpoint::error::Halt;
use crate::checkpoint::layout::{Layout, Window};
use crate::checkpoint::tracker::Tracker;
use crate::checkpoint::writer::WriteQueue;

/// The epoch of the scan's copies: every harvest is newer.
const SCAN_EPOCH: u32 = 0;

/// What the scanning threads share.
pub(super) struct Scan {
    pub(super) layout: Arc<Layout>,
    pub(super) tracker: Arc<Tracker>,
    pub(super) control: Arc<Control>,
    pub(super) next: AtomicUsize,
}

/// What one scanning thread owns.
pub(super) struct Scanner {
    pub(super) scan: Arc<Scan>,
    pub(super) queue: WriteQueue,
    /// Dropped when there is nothing left to scan.
    pub(super) unfinished: Sender<Infallible>,
    /// The copies to help with in the pause.
    pub(super) last_set: Receiver<Arc<LastSet>>,
}

impl Scanner {
    /// Scans until nothing is left, then waits for the pause and helps with the last set. Ends
    /// after that, when the session needs no help, or by the order to stop.
    pub(super) fn run(self) -> Result<(), Halt> {
        let Self {
            scan,
            queue,
            unfinished,
            last_set,
        } = self;
        let mut reader = PieceReader::new();
        while let Some(window) = scan
            .layout
            .windows()
            .get(scan.next.fetch_add(1, Ordering::Relaxed))
        {
            scan.window(window, &mut reader, &queue)?;
        }
        drop(queue);
        drop(unfinished);
        match last_set.recv() {
            Ok(set) => set.run(),
            Err(_) => Ok(()),
        }
    }
}

impl Scan {
    fn window(
        &self,
        window: &Window,
        reader: &mut PieceReader,
        queue: &WriteQueue,
    ) -> Result<(), Halt> {
        self.control.check()?;
        // Re-arm first, copy second: a store that races a copy is reported by the next harvest.
        self.tracker.arm_for_scan(window)?;
        for piece in window.pieces() {
            let mut buffer = queue.buffer(SCAN_EPOCH)?;
            reader.capture(&self.layout, &piece, &mut buffer);
            queue.submit(buffer)?;
            let pages = piece.page_count as u64;
            self.control
                .pages_scanned
                .fetch_add(pages, Ordering::Relaxed);
        }
        Ok(())
    }
}
