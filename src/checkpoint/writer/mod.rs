//! From captured pages to the image: buffers, the queue, and the threads at its end.
//!
//! A fixed set of buffers goes round: a capturing thread takes a free one, fills it and queues it;
//! a writing thread compresses, hashes and writes it, and frees it. Nothing is allocated on the
//! way, and whoever captures faster than the disk writes waits for a free buffer.

use std::convert::Infallible;
use std::sync::Arc;

use crate::checkpoint::control::Control;
use crate::checkpoint::crew::Crew;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::PIECE;
use crate::checkpoint::stats::WriteStatistics;
use crate::page::{Gfn, PAGE_BYTES, PIECE_BYTES, PageRun};
use crate::store::{ChunkPages, ChunkScratch, ImageWriter};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::channel::{Receiver, Sender, bounded, select};
use crate::sys::anon::HugeBytes;

/// One chunk on its way to the image.
#[derive(Debug)]
pub(crate) struct Buffer {
    /// The epoch of all its copies; the highest wins in the image.
    pub(crate) epoch: u32,
    frames: Vec<Gfn>,
    data: HugeBytes,
    /// Runs of pages that were never touched.
    zeros: Vec<PageRun>,
}

impl Buffer {
    /// Makes an empty buffer, all of it populated: the copies must not fault.
    pub(crate) fn new() -> Result<Self, CheckpointError> {
        let data = HugeBytes::new(PIECE_BYTES);
        Ok(Self {
            epoch: 0,
            frames: Vec::with_capacity(PIECE),
            data: data.map_err(CheckpointError::resource("memory for a buffer"))?,
            zeros: Vec::with_capacity(PIECE / 2),
        })
    }

    pub(crate) fn clear(&mut self, epoch: u32) {
        self.epoch = epoch;
        self.frames.clear();
        self.zeros.clear();
    }

    pub(crate) fn is_full(&self) -> bool {
        self.frames.len() == PIECE
    }

    /// Adds `run`'s frames and returns the room for their bytes.
    pub(crate) fn push_run(&mut self, run: PageRun) -> &mut [u8] {
        let first = self.frames.len();
        self.frames.extend((run.start.0..run.end().0).map(Gfn));
        &mut self.data[first * PAGE_BYTES..self.frames.len() * PAGE_BYTES]
    }

    /// Adds one frame and returns the room for its bytes.
    pub(crate) fn push(&mut self, frame: Gfn) -> &mut [u8] {
        self.push_run(PageRun {
            start: frame,
            page_count: 1,
        })
    }

    /// Adds a run of pages that were never touched.
    pub(crate) fn push_untouched(&mut self, run: PageRun) {
        self.zeros.push(run);
    }

    #[cfg(test)]
    pub(crate) fn frames(&self) -> &[Gfn] {
        &self.frames
    }

    #[cfg(test)]
    pub(crate) fn zero_runs(&self) -> &[PageRun] {
        &self.zeros
    }

    /// Writes the buffer to `image`.
    pub(crate) fn write(
        &self,
        image: &ImageWriter,
        scratch: &mut ChunkScratch,
        tally: &Tally,
    ) -> Result<(), CheckpointError> {
        let failed = CheckpointError::store("write");
        let result = (|| {
            for &run in &self.zeros {
                image.record_zero(self.epoch, run)?;
                tally.add_untouched(run.page_count);
            }
            if self.frames.is_empty() {
                return Ok(());
            }
            let pages = ChunkPages {
                epoch: self.epoch,
                frames: &self.frames,
                data: &self.data[..self.frames.len() * PAGE_BYTES],
            };
            let stats = image.write_chunk(pages, scratch)?;
            tally
                .copied
                .fetch_add(self.frames.len() as u64, Ordering::Relaxed);
            tally.zero.fetch_add(stats.zero_pages, Ordering::Relaxed);
            tally
                .raw_bytes
                .fetch_add(stats.raw_bytes, Ordering::Relaxed);
            tally
                .stored_bytes
                .fetch_add(stats.stored_bytes, Ordering::Relaxed);
            Ok(())
        })();
        result.map_err(failed)
    }
}

/// What a thread writes buffers with.
#[derive(Debug)]
pub(crate) struct Sink {
    control: Arc<Control>,
    image: Arc<ImageWriter>,
    tally: Arc<Tally>,
    scratch: ChunkScratch,
}

impl Sink {
    pub(crate) fn new(
        control: &Arc<Control>,
        image: &Arc<ImageWriter>,
        tally: &Arc<Tally>,
    ) -> Self {
        Self {
            control: control.clone(),
            image: image.clone(),
            tally: tally.clone(),
            scratch: ChunkScratch::default(),
        }
    }

    /// Compresses, hashes and writes a buffer. Blocks for the disk.
    pub(crate) fn write(&mut self, buffer: &Buffer) -> Result<(), CheckpointError> {
        buffer.write(&self.image, &mut self.scratch, &self.tally)?;
        let written = self.image.bytes_written();
        self.control
            .bytes_written
            .fetch_max(written, Ordering::Relaxed);
        Ok(())
    }
}

/// What went to the image; counted by all writing threads.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    untouched: AtomicU64,
    copied: AtomicU64,
    zero: AtomicU64,
    raw_bytes: AtomicU64,
    stored_bytes: AtomicU64,
}

impl Tally {
    /// Counts pages recorded without being read.
    pub(crate) fn add_untouched(&self, pages: u64) {
        self.untouched.fetch_add(pages, Ordering::Relaxed);
    }

    /// Returns the pages recorded without being read.
    pub(crate) fn untouched_pages(&self) -> u64 {
        self.untouched.load(Ordering::Relaxed)
    }

    /// Returns the totals for a guest of `page_count` pages, all of which were written.
    pub(crate) fn totals(&self, page_count: u64) -> WriteStatistics {
        let untouched = self.untouched_pages();
        let pages = untouched + self.copied.load(Ordering::Relaxed);
        WriteStatistics {
            pages,
            zero_pages: untouched + self.zero.load(Ordering::Relaxed),
            duplicate_pages: pages.saturating_sub(page_count),
            raw_bytes: self.raw_bytes.load(Ordering::Relaxed),
            stored_bytes: self.stored_bytes.load(Ordering::Relaxed),
        }
    }
}

/// The capturing side of the queue. The writing threads end when the last clone is dropped.
#[derive(Clone, Debug)]
pub(crate) struct WriteQueue {
    filled: Sender<Buffer>,
    pool: Pool,
    stop: Receiver<Infallible>,
}

/// The free buffers, of which some may be kept for urgent copies.
#[derive(Clone, Debug)]
struct Pool {
    free: (Sender<Buffer>, Receiver<Buffer>),
    /// Has room for the reserve and no more.
    urgent: (Sender<Buffer>, Receiver<Buffer>),
}

impl Pool {
    fn new(buffers: Buffers) -> Self {
        let Buffers { all, reserve } = buffers;
        let pool = Self {
            free: bounded(all.len()),
            urgent: bounded(reserve),
        };
        all.into_iter().for_each(|buffer| pool.put(buffer));
        pool
    }

    /// Fills the reserve first. Does not wait: the other side has room for all.
    ///
    /// The reserve never grows above its size, however many give buffers back at a time: the sweep
    /// would wait for those above, and they for a writer in need of them that may never come.
    fn put(&self, buffer: Buffer) {
        if let Err(full) = self.urgent.0.try_send(buffer) {
            let sent = self.free.0.send(full.into_inner());
            sent.expect("the pool itself holds a receiver");
        }
    }
}

impl WriteQueue {
    /// Waits for a free buffer, and clears it for copies of `epoch`.
    pub(crate) fn buffer(&self, epoch: u32) -> Result<Buffer, Halt> {
        select! {
            recv(self.pool.free.1) -> buffer => Self::cleared(buffer.ok(), epoch),
            recv(self.stop) -> _ => Err(Halt::Stopped),
        }
    }

    /// Like [`WriteQueue::buffer`], for a copy that somebody waits for: takes those of the reserve
    /// too. Returns also whether all buffers were full, so that the disk was waited for.
    pub(crate) fn urgent_buffer(&self, epoch: u32) -> Result<(Buffer, bool), Halt> {
        let Pool { free, urgent } = &self.pool;
        let at_once = urgent.1.try_recv().or_else(|_| free.1.try_recv()).ok();
        if at_once.is_some() {
            return Ok((Self::cleared(at_once, epoch)?, false));
        }
        let buffer = select! {
            recv(urgent.1) -> buffer => Self::cleared(buffer.ok(), epoch)?,
            recv(free.1) -> buffer => Self::cleared(buffer.ok(), epoch)?,
            recv(self.stop) -> _ => return Err(Halt::Stopped),
        };
        Ok((buffer, true))
    }

    fn cleared(buffer: Option<Buffer>, epoch: u32) -> Result<Buffer, Halt> {
        let mut buffer = buffer.ok_or(Halt::Stopped)?;
        buffer.clear(epoch);
        Ok(buffer)
    }

    /// Returns how many buffers are free.
    pub(crate) fn free_buffers(&self) -> usize {
        let Pool { free, urgent } = &self.pool;
        free.1.len() + urgent.1.len()
    }

    /// Gives a buffer back unwritten.
    pub(crate) fn put_back(&self, buffer: Buffer) {
        self.pool.put(buffer);
    }

    /// Hands a buffer to the writing threads. Does not wait: the queue has room for all of them.
    pub(crate) fn submit(&self, buffer: Buffer) -> Result<(), Halt> {
        self.filled.send(buffer).map_err(|_| Halt::Stopped)
    }
}

/// The buffers, for the next checkpoint, once the writing threads have ended.
#[derive(Debug)]
pub(crate) struct Returned(Pool);

impl Returned {
    pub(crate) fn buffers(&self) -> Vec<Buffer> {
        let Pool { free, urgent } = &self.0;
        free.1.try_iter().chain(urgent.1.try_iter()).collect()
    }
}

/// The buffers of one checkpoint.
pub(crate) struct Buffers {
    pub(crate) all: Vec<Buffer>,
    /// How many are kept for urgent copies.
    pub(crate) reserve: usize,
}

impl Buffers {
    /// All of them alike.
    pub(crate) fn alike(all: Vec<Buffer>) -> Self {
        Self { all, reserve: 0 }
    }
}

/// Starts `threads` writing threads in `crew`, fed through the returned queue.
pub(crate) fn start_writers(
    crew: &mut Crew,
    control: &Arc<Control>,
    image: &Arc<ImageWriter>,
    tally: &Arc<Tally>,
    buffers: Buffers,
    threads: usize,
) -> Result<(WriteQueue, Returned), CheckpointError> {
    let (filled, to_write) = bounded(buffers.all.len());
    let pool = Pool::new(buffers);
    for number in 0..threads {
        let writer = Writer {
            sink: Sink::new(control, image, tally),
            stop: control.stop_signal().clone(),
            to_write: to_write.clone(),
            pool: pool.clone(),
        };
        crew.spawn_polite(&format!("lvp-write-{number}"), move || writer.run())?;
    }
    let queue = WriteQueue {
        filled,
        pool: pool.clone(),
        stop: control.stop_signal().clone(),
    };
    Ok((queue, Returned(pool)))
}

struct Writer {
    sink: Sink,
    stop: Receiver<Infallible>,
    to_write: Receiver<Buffer>,
    pool: Pool,
}

impl Writer {
    /// Ends when nobody fills buffers any more, by the order to stop, or by a failed write.
    fn run(mut self) -> Result<(), Halt> {
        loop {
            let buffer = select! {
                recv(self.to_write) -> buffer => match buffer {
                    Ok(buffer) => buffer,
                    Err(_) => return Ok(()),
                },
                recv(self.stop) -> _ => return Err(Halt::Stopped),
            };
            self.sink.write(&buffer)?;
            self.pool.put(buffer);
        }
    }
}
