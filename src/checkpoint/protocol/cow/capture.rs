//! Capturing pieces: by the sweep, for a fault, and before a discard.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};

use super::ahead::EarlyWrites;
use super::{page_map_failed, protection_failed};
use crate::checkpoint::capture::{CapturedPieces, Finish, UntouchedPages, copy_piece};
use crate::checkpoint::control::Control;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::{Layout, Piece};
use crate::checkpoint::tracker::{Tracker, WORDS_PER_PIECE, WriteProtection};
use crate::checkpoint::writer::{Buffer, Sink, Tally, WriteQueue};
use crate::guest::DiscardObserver;
use crate::page::{AtomicPageBitmap, Gfn, PageRun, bitmap_words, runs_of_set_bits};
use crate::store::ImageWriter;
use crate::sync::OnceLock;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::sync::channel::{Receiver, Sender, bounded};

/// The epoch of copies: each page has one.
const EPOCH: u32 = 0;

/// The epoch of copies that somebody waited for: by it the image knows what the guest writes.
const WAITED_FOR: u32 = 1;

/// What a capture is made from.
pub(super) struct Parts {
    pub(super) layout: Arc<Layout>,
    pub(super) control: Arc<Control>,
    pub(super) protection: WriteProtection,
    pub(super) queue: WriteQueue,
    pub(super) image: Arc<ImageWriter>,
    pub(super) tally: Arc<Tally>,
    pub(super) staging_pieces: usize,
    /// The log that begins with the captured moment, where a chain begins with this image.
    pub(super) log: Option<Arc<Tracker>>,
}

/// What all threads of one `cow` checkpoint share. They have no lock in common.
pub(super) struct CopyOnWrite {
    parts: Parts,
    pieces: Vec<Piece>,
    captured: CapturedPieces,
    /// Pieces in which pages were given back before the pause.
    given_back: AtomicPageBitmap,
    /// Set in the pause, before anything is captured.
    moment: OnceLock<Moment>,
    /// Pieces whose touched pages are armed in the log that begins here.
    armed: AtomicPageBitmap,
    next: AtomicUsize,
    /// Somebody had to wait for a copy.
    guest_writes: AtomicBool,
    /// Gets a message when the first did, and at the end.
    hurry: (Sender<()>, Receiver<()>),
    pub(super) staged_peak: AtomicUsize,
    early_writes: EarlyWrites,
    released: AtomicBool,
    /// Readable once `released`.
    wake_up: OwnedFd,
    done: Sender<()>,
    all_captured: Receiver<()>,
}

/// What is to be captured of the moment.
pub(super) struct Moment {
    pub(super) untouched: UntouchedPages,
    /// The pages written since the chain's last image, by piece; all where there is none.
    pub(super) wanted: Option<Vec<u64>>,
}

impl Moment {
    fn wanted_of(&self, piece: usize) -> Option<&[u64]> {
        let bits = self.wanted.as_ref()?;
        bits.get(piece * WORDS_PER_PIECE..(piece + 1) * WORDS_PER_PIECE)
    }

    fn wants_none(&self, piece: usize) -> bool {
        self.wanted_of(piece)
            .is_some_and(|bits| bits.iter().all(|&word| word == 0))
    }
}

/// Who wants a piece captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum For {
    /// Nobody waits.
    Sweep,
    /// A writer waits, or somebody who discards.
    Writer,
}

impl CopyOnWrite {
    pub(super) fn new(parts: Parts) -> Result<Self, CheckpointError> {
        let pieces: Vec<_> = parts.layout.pieces().collect();
        let (done, all_captured) = bounded(1);
        let wake_up = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| CheckpointError::resource("an eventfd")(error.into()))?;
        Ok(Self {
            captured: CapturedPieces::new(pieces.len()),
            armed: AtomicPageBitmap::new(pieces.len() as u64),
            early_writes: EarlyWrites::new(pieces.len()),
            wake_up,
            given_back: AtomicPageBitmap::new(pieces.len() as u64),
            pieces,
            moment: OnceLock::new(),
            next: AtomicUsize::new(0),
            guest_writes: AtomicBool::new(false),
            hurry: bounded(1),
            staged_peak: AtomicUsize::new(0),
            released: AtomicBool::new(false),
            done,
            all_captured,
            parts,
        })
    }

    pub(super) fn layout(&self) -> &Layout {
        &self.parts.layout
    }

    pub(super) fn control(&self) -> &Control {
        &self.parts.control
    }

    pub(super) fn protection(&self) -> &WriteProtection {
        &self.parts.protection
    }

    pub(super) fn early_writes(&self) -> &EarlyWrites {
        &self.early_writes
    }

    /// Becomes readable with [`CopyOnWrite::release`].
    pub(super) fn wake_up(&self) -> &OwnedFd {
        &self.wake_up
    }

    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    /// Returns the pieces in which pages were given back so far, in order. Called in the pause.
    pub(super) fn given_back(&self) -> Vec<usize> {
        pieces_in(&self.given_back)
    }

    /// Fixes what is to be captured of the moment; captures may start.
    pub(super) fn set_moment(&self, moment: Moment) {
        let first = self.moment.set(moment).is_ok();
        assert!(first, "a checkpoint has one moment");
    }

    /// Gets a message once every piece is captured.
    pub(super) fn all_captured(&self) -> &Receiver<()> {
        &self.all_captured
    }

    /// Lets everybody write all memory, and the handlers end.
    pub(super) fn release(&self) {
        self.parts.protection.end();
        self.released.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.wake_up, &1_u64.to_ne_bytes()) {
            log::error!("could not wake the fault handlers: {error}");
        }
    }

    pub(super) fn is_released(&self) -> bool {
        self.released.load(Ordering::Acquire)
    }

    /// Captures pieces in order and writes each before the next, while nobody waits for a copy: the
    /// copy is in the CPU's cache when it is hashed and written. Ends with the first who waits.
    pub(super) fn write_through(&self) -> Result<(), Halt> {
        let mut sink = Sink::new(&self.parts.control, &self.parts.image, &self.parts.tally);
        let mut buffer = self.parts.queue.buffer(EPOCH)?;
        while !self.guest_writes.load(Ordering::Relaxed)
            && let Some(piece) = self.next_piece()?
        {
            if !self.capture_without_copy(piece)? {
                buffer.clear(EPOCH);
                self.copy(piece, &mut buffer);
                if self.finish(piece)? {
                    sink.write(&buffer)?;
                }
            }
        }
        self.parts.queue.put_back(buffer);
        Ok(())
    }

    /// Captures pieces in order once somebody has had to wait for a copy: ahead of the guest, as far
    /// as staging goes. Ends when none is left to begin with.
    pub(super) fn sweep(&self) -> Result<(), Halt> {
        while let Some(piece) = self.next_piece()? {
            self.capture(piece, For::Sweep)?;
        }
        Ok(())
    }

    /// Waits for the first who waits for a copy, or the end of all captures.
    pub(super) fn wait_for_hurry(&self) -> Result<(), Halt> {
        let (tell, told) = &self.hurry;
        self.control().wait(told)?;
        // For the other threads of the sweep.
        tell.try_send(()).ok();
        Ok(())
    }

    /// Returns the next piece that nobody has captured yet.
    fn next_piece(&self) -> Result<Option<usize>, Halt> {
        loop {
            self.control().check()?;
            let piece = self.next.fetch_add(1, Ordering::Relaxed);
            if piece >= self.pieces.len() {
                return Ok(None);
            }
            if !self.captured.has(piece) {
                return Ok(Some(piece));
            }
        }
    }

    /// Lets somebody write a piece: at once before the moment, after it is captured from then on.
    /// Returns whether the disk had to be waited for.
    pub(super) fn let_write(&self, piece: usize) -> Result<bool, Halt> {
        let unprotect = || self.unprotect(piece);
        if self.early_writes.let_through(piece, unprotect)? {
            return Ok(false);
        }
        self.capture_for_writer(piece)
    }

    /// Captures a piece that somebody waits to write, and lets him. Returns whether the disk had
    /// to be waited for.
    fn capture_for_writer(&self, piece: usize) -> Result<bool, Halt> {
        if !self.guest_writes.swap(true, Ordering::Relaxed) {
            // There is room for the one message.
            self.hurry.0.try_send(()).ok();
        }
        let waited = !self.captured.has(piece) && self.capture(piece, For::Writer)?;
        // Also where another thread captured it: it may not have come to the un-protecting yet,
        // and it may be long until the host lets it run again.
        self.count_as_written_if_not_armed(piece);
        self.unprotect(piece)?;
        Ok(waited)
    }

    /// Has the chain's next image take all of a piece that is about to be let go before it is
    /// armed: who captured it may yet arm it, and so clear what is written meanwhile.
    fn count_as_written_if_not_armed(&self, piece: usize) {
        if let Some(log) = &self.parts.log
            && !self.armed.get(piece as u64)
        {
            log.mark_piece(&self.pieces[piece], &[u64::MAX; WORDS_PER_PIECE]);
        }
    }

    /// Arms the touched pages of a captured piece in the log that begins with this image, while
    /// nobody can write them. Called by the one whose copy counts.
    fn arm(&self, piece: usize) -> Result<(), Halt> {
        let (Some(log), Some(moment)) = (&self.parts.log, self.moment.get()) else {
            return Ok(());
        };
        let mut touched = [0; WORDS_PER_PIECE];
        let untouched = moment.untouched.of_piece(piece);
        for (touched, untouched) in touched.iter_mut().zip(untouched) {
            *touched = !untouched;
        }
        log.arm_piece(&self.pieces[piece], &touched)?;
        self.armed.set(piece as u64);
        Ok(())
    }

    /// Completes the log that begins with this image, before all memory is let go.
    ///
    /// Pieces that are captured and not armed yet count as written, as for a writer. Then it arms
    /// the pages that were untouched at the moment, and were not protected therefore, and has
    /// the chain's next image take those that were touched since. Called when all is captured.
    ///
    /// Armed first, looked at second: a page that is touched between the two is in the log.
    pub(super) fn complete_log(&self) -> Result<(), Halt> {
        let (Some(log), Some(moment)) = (&self.parts.log, self.moment.get()) else {
            return Ok(());
        };
        let numbers = 0..self.pieces.len();
        numbers
            .clone()
            .for_each(|piece| self.count_as_written_if_not_armed(piece));
        let some: Vec<_> = numbers
            .filter(|&piece| moment.untouched.count(piece) > 0)
            .collect();
        for &piece in &some {
            log.arm_piece(&self.pieces[piece], moment.untouched.of_piece(piece))?;
        }
        let now = UntouchedPages::look(self.layout()).map_err(page_map_failed)?;
        for &piece in &some {
            let before = moment.untouched.of_piece(piece).iter();
            let pairs = before.zip(now.of_piece(piece));
            let touched: Vec<u64> = pairs.map(|(before, now)| before & !now).collect();
            log.mark_piece(&self.pieces[piece], &touched);
        }
        Ok(())
    }

    /// Copies a piece while it is protected, then un-protects it, then queues the copy. Returns
    /// whether the disk had to be waited for.
    fn capture(&self, piece: usize, wanted: For) -> Result<bool, Halt> {
        if self.capture_without_copy(piece)? {
            return Ok(false);
        }
        let queue = &self.parts.queue;
        let (mut buffer, waited) = match wanted {
            For::Sweep => (queue.buffer(EPOCH)?, false),
            For::Writer => queue.urgent_buffer(WAITED_FOR)?,
        };
        self.copy(piece, &mut buffer);
        if self.finish(piece)? {
            queue.submit(buffer)?;
            let staged = self
                .parts
                .staging_pieces
                .saturating_sub(queue.free_buffers());
            self.staged_peak.fetch_max(staged, Ordering::Relaxed);
        } else {
            queue.put_back(buffer);
        }
        Ok(waited)
    }

    fn moment(&self) -> &Moment {
        let moment = self.moment.get();
        moment.expect("nothing is captured before the pause")
    }

    fn copy(&self, piece: usize, buffer: &mut Buffer) {
        let moment = self.moment();
        let untouched = moment.untouched.of_piece(piece);
        let wanted = moment.wanted_of(piece);
        copy_piece(
            self.layout(),
            &self.pieces[piece],
            untouched,
            wanted,
            buffer,
        );
    }

    /// Captures a piece of which nothing is to be copied; returns whether it is such a one.
    fn capture_without_copy(&self, piece: usize) -> Result<bool, Halt> {
        let moment = self.moment();
        let untouched = moment.untouched.count(piece) == self.pieces[piece].page_count;
        if moment.wants_none(piece) {
            self.pass_over(piece)?;
        } else if untouched && moment.wanted.is_none() {
            self.capture_untouched(piece)?;
        } else {
            return Ok(false);
        }
        Ok(true)
    }

    /// A piece that was not written since the chain's last image.
    fn pass_over(&self, piece: usize) -> Result<(), Halt> {
        let finish = self.captured.finish(piece);
        if finish != Finish::TooLate {
            self.unprotect(piece)?;
            self.count(&self.pieces[piece]);
        }
        self.tell_if_last(finish);
        Ok(())
    }

    /// Zeros that are not even there: an entry in the index, no copy.
    fn capture_untouched(&self, piece: usize) -> Result<(), Halt> {
        let finish = self.captured.finish(piece);
        if finish != Finish::TooLate {
            let place = &self.pieces[piece];
            let start = self.layout().regions()[place.region].run.start.0;
            let run = PageRun {
                start: Gfn(start + place.first_page as u64),
                page_count: place.page_count as u64,
            };
            self.parts
                .image
                .record_zero(EPOCH, run)
                .map_err(CheckpointError::store("write"))?;
            // Nothing of it is protected, so that there is nothing to arm before it is let go.
            self.armed.set(piece as u64);
            self.parts.tally.add_untouched(run.page_count);
            self.count(place);
        }
        self.tell_if_last(finish);
        Ok(())
    }

    /// Lets everybody write a piece that was copied. Returns whether this copy is the one that
    /// counts.
    fn finish(&self, piece: usize) -> Result<bool, Halt> {
        let finish = self.captured.finish(piece);
        if finish == Finish::TooLate {
            return Ok(false);
        }
        self.arm(piece)?;
        self.unprotect(piece)?;
        self.count(&self.pieces[piece]);
        self.tell_if_last(finish);
        Ok(true)
    }

    /// Lets everybody write a piece, whatever its state.
    fn unprotect(&self, piece: usize) -> Result<(), Halt> {
        let result = self.protection().unprotect(&self.pieces[piece]);
        Ok(result.map_err(protection_failed)?)
    }

    fn count(&self, piece: &Piece) {
        self.control()
            .pages_scanned
            .fetch_add(piece.page_count as u64, Ordering::Relaxed);
    }

    fn tell_if_last(&self, finish: Finish) {
        if finish == Finish::Last {
            // There is room for the one message.
            self.done.send(()).ok();
            // Who waits for a hurry need not wait any more.
            self.hurry.0.try_send(()).ok();
        }
    }
}

impl DiscardObserver for CopyOnWrite {
    /// Captures what is about to be given back. Before the pause, it is noted: such pages are in
    /// no page table, and so cannot be protected. The pause waits for a discard under way, since it
    /// waits for all devices.
    fn before_discard(&self, run: PageRun) {
        let at_once = self.moment.get().is_some();
        for piece in self.parts.layout.pieces_of(run) {
            if !at_once {
                self.given_back.set(piece as u64);
            } else if let Err(Halt::Failed(error)) = self.capture_for_writer(piece) {
                self.control().fail(error);
            }
        }
    }
}

/// Takes the numbers of pieces out of a bitmap that has a bit for each, in order.
pub(super) fn pieces_in(bitmap: &AtomicPageBitmap) -> Vec<usize> {
    let mut bits = vec![0; bitmap_words(bitmap.pages())];
    bitmap.take_into(&mut bits);
    let index = |number: u64| usize::try_from(number).expect("pieces are counted in memory");
    let runs = runs_of_set_bits(&bits);
    runs.flat_map(|(first, count)| index(first)..index(first + count))
        .collect()
}
