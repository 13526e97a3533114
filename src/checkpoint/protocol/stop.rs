//! `stop`: pause, write all memory to the image, resume; sync and commit after the resume.
//!
//! The baseline. Each thread copies a piece and writes it itself: nothing waits in a queue, and
//! with two threads one copies and hashes while the other is in the file system. Every piece
//! written is a sign of life, so that storage which blocks costs the checkpoint and not the guest.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::{Receiver, bounded};

use crate::checkpoint::capture::PieceReader;
use crate::checkpoint::control::Control;
use crate::checkpoint::error::Halt;
use crate::checkpoint::layout::{Layout, Piece};
use crate::checkpoint::phase::Phase;
use crate::checkpoint::protocol::Captured;
use crate::checkpoint::session::Session;
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

struct Work {
    layout: Arc<Layout>,
    image: Arc<ImageWriter>,
    control: Arc<Control>,
    lease: Arc<PauseLease>,
    tally: Arc<Tally>,
    pieces: Vec<Piece>,
    next: AtomicUsize,
}

impl Work {
    /// One thread: waits for the pause, then captures pieces until none is left.
    fn run(&self, start: &Receiver<()>, buffer: &mut Buffer) -> Result<(), Halt> {
        let mut reader = PieceReader::new();
        let mut scratch = ChunkScratch::default();
        self.control.wait(start)?;
        while let Some(piece) = self.pieces.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            self.control.check()?;
            buffer.clear(0);
            reader.capture(&self.layout, piece, buffer);
            buffer.write(&self.image, &mut scratch, &self.tally)?;
            self.lease.beat();
            let pages = piece.page_count as u64;
            self.control
                .pages_scanned
                .fetch_add(pages, Ordering::Relaxed);
            let written = self.image.bytes_written();
            self.control
                .bytes_written
                .fetch_max(written, Ordering::Relaxed);
        }
        Ok(())
    }
}
