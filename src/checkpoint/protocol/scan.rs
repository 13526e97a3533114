//! The scan of `threaded` and `precopy`: every piece once, while the guest runs.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, Sender, bounded};

use crate::checkpoint::capture::{LastSet, PieceReader};
use crate::checkpoint::control::Control;
use crate::checkpoint::error::Halt;
use crate::checkpoint::layout::{Layout, Window};
use crate::checkpoint::polite::take_turns;
use crate::checkpoint::session::Session;
use crate::checkpoint::tracker::Tracker;
use crate::checkpoint::writer::WriteQueue;

/// The epoch of the scan's copies: every harvest is newer.
const SCAN_EPOCH: u32 = 0;

/// Starts the scan. Returns the way to have its threads help with the last set, which they wait
/// for until it is dropped, and a receiver that is disconnected when the scan is over.
pub(super) fn start_scan(
    session: &mut Session,
    tracker: &Arc<Tracker>,
    queue: &WriteQueue,
) -> Result<(Sender<Arc<LastSet>>, Receiver<Infallible>), Halt> {
    let scan = Arc::new(Scan {
        layout: session.layout.clone(),
        tracker: tracker.clone(),
        control: session.control.clone(),
        // Where the log has run since an earlier image there is nothing to scan.
        next: AtomicUsize::new(if tracker.is_since_parent() {
            session.layout.windows().len()
        } else {
            0
        }),
    });
    if tracker.is_since_parent() {
        let pages = session.layout.page_count() as u64;
        session
            .control
            .pages_scanned
            .store(pages, Ordering::Relaxed);
    }
    let threads = session.policy.scan_threads();
    let (unfinished, scanning) = bounded(0);
    let (helpers, last_set) = bounded(threads);
    for number in 0..threads {
        let scanner = Scanner {
            scan: scan.clone(),
            queue: queue.clone(),
            unfinished: unfinished.clone(),
            last_set: last_set.clone(),
        };
        session
            .capture
            .spawn_polite(&format!("lvp-scan-{number}"), move || scanner.run())?;
    }
    Ok((helpers, scanning))
}

/// What the scanning threads share.
struct Scan {
    layout: Arc<Layout>,
    tracker: Arc<Tracker>,
    control: Arc<Control>,
    next: AtomicUsize,
}

/// What one scanning thread owns.
struct Scanner {
    scan: Arc<Scan>,
    queue: WriteQueue,
    /// Dropped when there is nothing left to scan.
    unfinished: Sender<Infallible>,
    /// The copies to help with in the pause.
    last_set: Receiver<Arc<LastSet>>,
}

impl Scanner {
    /// Scans until nothing is left, then waits for the pause and helps with the last set. Ends
    /// after that, when the session needs no help, or by the order to stop.
    fn run(self) -> Result<(), Halt> {
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
        // From here on the guest waits for what this thread does.
        take_turns();
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
