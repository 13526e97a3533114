//! `stop`: pause, write all memory to the image, resume; sync and commit after the resume.
//!
//! The baseline. Each thread copies a piece and writes it itself: nothing waits in a queue, and
//! with two threads one copies and hashes while the other is in the file system. Every piece
//! written is a sign of life, so that storage which blocks costs the checkpoint and not the guest.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crossbeam_channel::{Receiver, bounded};

use crate::checkpoint::capture::PieceReader;
use crate::checkpoint::control::Control;
use crate::checkpoint::error::Halt;
use crate::checkpoint::layout::{Layout, PIECE, Piece};
use crate::checkpoint::phase::Phase;
use crate::checkpoint::protocol::Captured;
use crate::checkpoint::session::Session;
use crate::checkpoint::tracker::DirtySet;
use crate::checkpoint::watchdog::PauseLease;
use crate::checkpoint::writer::{Buffer, Tally};
use crate::store::{ChunkScratch, ImageWriter};

pub(super) fn capture(session: &mut Session) -> Result<Captured, Halt> {
    let threads = session.policy.capture_threads;
    session.statistics.mechanism = "none";
    session.statistics.capture_threads = threads as u64;
    session.statistics.write_threads = 0;
    // Everything that can be ready before the pause is: threads wait with populated buffers.
    let (go, start) = bounded(threads);
    let (used, returned) = bounded(threads);
    let work = Arc::new(Work {
        layout: session.layout.clone(),
        image: session.image(),
        control: session.control.clone(),
        lease: session.lease.clone(),
        tally: session.tally.clone(),
        next: AtomicUsize::new(0),
        pieces: session.layout.pieces().collect(),
        written: OnceLock::new(),
    });
    for (number, mut buffer) in session
        .options
        .workspace
        .buffers(threads)?
        .into_iter()
        .enumerate()
    {
        let work = work.clone();
        let start = start.clone();
        let used = used.clone();
        session
            .capture
            .spawn(&format!("lvp-scan-{number}"), move || {
                work.run(&start, &mut buffer)?;
                used.send(buffer).ok();
                Ok(())
            })?;
    }
    let pause = session.in_pause(|session| {
        prepare_chain(session, &work.written)?;
        session.lease.beat_before("memory is written to the image");
        for _ in 0..threads {
            go.send(()).map_err(|_| Halt::Stopped)?;
        }
        session.capture.join()
    })?;
    session.job.enter(Phase::Draining)?;
    session
        .options
        .workspace
        .keep(returned.try_iter().collect(), None);
    Ok(Captured {
        sections: pause.sections,
        moment: pause.moment,
    })
}

/// Starts the chain's log at this moment, or takes what it has. Called in the pause.
fn prepare_chain(session: &mut Session, written: &OnceLock<Vec<usize>>) -> Result<(), Halt> {
    let tracker = session.tracker.clone();
    if tracker.is_since_parent() {
        session.statistics.mechanism = "kvm-dirty-log";
        let mut dirty = DirtySet::new(&session.layout);
        tracker.collect(&mut dirty)?;
        tracker.rearm_all(&dirty)?;
        let pages = dirty.windows().flat_map(|window| dirty.pages(window));
        let pages: Vec<_> = pages.collect();
        session.statistics.dirty_pages = pages.len() as u64;
        written.set(pages).expect("a checkpoint has one moment");
    } else if session.chain_goes_on() {
        let logging = session.start_log()?;
        tracker.arm_all()?;
        session.keep_log(logging);
    }
    Ok(())
}

struct Work {
    layout: Arc<Layout>,
    image: Arc<ImageWriter>,
    control: Arc<Control>,
    lease: Arc<PauseLease>,
    tally: Arc<Tally>,
    pieces: Vec<Piece>,
    /// The pages written since the chain's last image, set in the pause; all memory where there
    /// are none.
    written: OnceLock<Vec<usize>>,
    next: AtomicUsize,
}

impl Work {
    /// One thread: waits for the pause, then captures pieces until none is left.
    fn run(&self, start: &Receiver<()>, buffer: &mut Buffer) -> Result<(), Halt> {
        let mut reader = PieceReader::new();
        let mut scratch = ChunkScratch::default();
        self.control.wait(start)?;
        if let Some(pages) = self.written.get() {
            return self.run_pages(pages, buffer, &mut scratch);
        }
        while let Some(piece) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            self.control.check()?;
            buffer.clear(0);
            reader.capture(&self.layout, piece, buffer);
            buffer.write(&self.image, &mut scratch, &self.tally)?;
            self.count(piece.page_count);
        }
        Ok(())
    }

    /// The same for pages one by one.
    fn run_pages(
        &self,
        pages: &[usize],
        buffer: &mut Buffer,
        scratch: &mut ChunkScratch,
    ) -> Result<(), Halt> {
        loop {
            let first = self.next.fetch_add(PIECE, Ordering::Relaxed);
            if first >= pages.len() {
                return Ok(());
            }
            self.control.check()?;
            let part = &pages[first..(first + PIECE).min(pages.len())];
            buffer.clear(0);
            for &page in part {
                let room = buffer.push(self.layout.frame(page));
                self.layout.read_page(page, room);
            }
            buffer.write(&self.image, scratch, &self.tally)?;
            self.count(part.len());
        }
    }

    fn count(&self, pages: usize) {
        self.lease.beat();
        self.control
            .pages_scanned
            .fetch_add(pages as u64, Ordering::Relaxed);
        let written = self.image.bytes_written();
        self.control
            .bytes_written
            .fetch_max(written, Ordering::Relaxed);
    }
}
