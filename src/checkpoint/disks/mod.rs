//! The guest's disks: copied as they were in the pause, while the guest writes on.
//!
//! In the pause nothing is copied. From then on a disk's thread asks before it writes: the piece of
//! 2 MiB that it is about to change is read into memory first, if nobody has read it yet. A sweep
//! reads the others, in order; holes it passes over. What was read goes to the image by a thread of
//! its own, over a bounded queue: when the image's storage is slow, the sweep waits, and so does a
//! guest that writes what the sweep has not come to.
//!
//! Where the disk's file system lets two files share their blocks, the disk is *frozen* instead, right
//! after the pause: whoever wants to write waits until a file is there that is the disk as it was, and
//! which the sweep then reads. Nobody waits after that.
//!
//! There is no layer over the disk that would have to be merged back: whenever this process dies,
//! the disk's own file has all that the guest flushed.

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam_channel::{Receiver, Sender, bounded, select};

use crate::checkpoint::control::Control;
use crate::checkpoint::crew::Crew;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::stats::{DiskMethod, DiskStatistics};
use crate::guest::{DiskFacts, FrozenDisk, GuestDisk, WriteObserver};
use crate::page::{Gfn, PAGE_BYTES, PIECE_BYTES, PIECE_PAGES, PageRun};
use crate::store::{ChunkPages, ChunkScratch, DiskLayout, ImageWriter, ReadOnlyDisk};

/// Pieces in memory on their way to the image: 16 MiB.
const STAGED_PIECES: usize = 8;

/// What becomes of one piece of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Piece {
    /// It is on the disk as it was.
    Todo,
    /// Somebody reads it.
    Reading,
    /// It is kept.
    Kept,
}

/// A piece of a disk that is kept.
struct Staged {
    disk: usize,
    piece: usize,
    bytes: usize,
    /// What it holds; `None` for a hole.
    data: Option<Vec<u8>>,
}

#[derive(Debug)]
struct State {
    pieces: Vec<Piece>,
    /// Nothing is kept any more: everybody may write.
    released: bool,
    /// It is not known yet whether the disk can be frozen: nobody may write.
    is_freezing: bool,
}

/// One disk while it is copied.
struct Copying {
    number: usize,
    disk: Arc<dyn GuestDisk>,
    bytes: u64,
    control: Arc<Control>,
    /// Whether the disk can probably be frozen.
    may_freeze: bool,
    /// The disk as it was in the pause, where it could be frozen.
    frozen: OnceLock<Box<dyn FrozenDisk>>,
    state: Mutex<State>,
    changed: Condvar,
    free: Receiver<Vec<u8>>,
    full: Sender<Staged>,
}

/// The disks of one checkpoint. Dropping it lets everybody write.
pub(crate) struct DiskCopies {
    disks: Vec<Arc<Copying>>,
    go: Option<Sender<()>>,
}

/// Returns what the image is to say of the disks: those it has, and those it names.
pub(crate) fn describe(disks: &[Arc<dyn GuestDisk>]) -> (Vec<DiskLayout>, Vec<ReadOnlyDisk>) {
    let path = |facts: &DiskFacts| facts.path.to_string_lossy().into_owned();
    let (mut copied, mut named) = (Vec::new(), Vec::new());
    for facts in disks.iter().map(|disk| disk.facts()) {
        if facts.read_only {
            named.push(ReadOnlyDisk {
                path: path(&facts),
                name: facts.name,
                bytes: facts.bytes,
                modified_ns: facts.modified_ns,
            });
        } else {
            copied.push(DiskLayout {
                path: path(&facts),
                name: facts.name,
                bytes: facts.bytes,
            });
        }
    }
    (copied, named)
}

fn failed(name: &str) -> impl FnOnce(std::io::Error) -> CheckpointError {
    let disk = name.to_owned();
    move |source| CheckpointError::Disk {
        disk,
        source: Arc::new(source),
    }
}

impl DiskCopies {
    /// Makes ready to copy the disks that the guest writes, and starts the threads, which wait for
    /// [`DiskCopies::go`].
    pub(crate) fn new(
        disks: Vec<Arc<dyn GuestDisk>>,
        image: &Arc<ImageWriter>,
        control: &Arc<Control>,
        crew: &mut Crew,
    ) -> Result<Self, CheckpointError> {
        let writable = disks.into_iter().filter(|disk| !disk.facts().read_only);
        let (recycle, free) = bounded(STAGED_PIECES);
        let (full, staged) = bounded(STAGED_PIECES);
        let disks: Vec<Arc<Copying>> = writable
            .enumerate()
            .map(|(number, disk)| {
                let bytes = disk.facts().bytes;
                let count = usize::try_from(bytes.div_ceil(PIECE_BYTES as u64));
                let pieces = vec![Piece::Todo; count.expect("limits keep disks addressable")];
                Arc::new(Copying {
                    number,
                    bytes,
                    control: control.clone(),
                    // Tried now, so that it is quick when the guest waits for it.
                    may_freeze: matches!(disk.freeze(), Ok(Some(_))),
                    frozen: OnceLock::new(),
                    disk,
                    state: Mutex::new(State {
                        pieces,
                        released: false,
                        is_freezing: false,
                    }),
                    changed: Condvar::new(),
                    free: free.clone(),
                    full: full.clone(),
                })
            })
            .collect();
        drop(full);
        if disks.is_empty() {
            return Ok(Self { disks, go: None });
        }
        for _ in 0..STAGED_PIECES {
            recycle.send(Vec::new()).ok();
        }
        let (image, for_writer) = (image.clone(), control.clone());
        // Each piece is kept once, by the sweep or by who writes it.
        let expected: usize = disks.iter().map(|disk| disk.lock().pieces.len()).sum();
        crew.spawn("lvp-disk-write", move || {
            write_staged(&image, &for_writer, &staged, &recycle, expected)
        })?;
        let (go, start) = bounded::<()>(1);
        let (swept, for_sweep) = (disks.clone(), control.clone());
        crew.spawn("lvp-disk-scan", move || {
            for_sweep.wait(&start)?;
            swept.iter().for_each(|disk| disk.freeze());
            for disk in swept {
                disk.sweep()?;
                disk.end();
            }
            Ok(())
        })?;
        let go = Some(go);
        Ok(Self { disks, go })
    }

    /// From here on nothing that is on the disks is lost. Called in the pause.
    pub(crate) fn begin(&self) {
        for disk in &self.disks {
            disk.lock().is_freezing = disk.may_freeze;
            let observer: Arc<dyn WriteObserver> = disk.clone();
            disk.disk.set_write_observer(Some(observer));
        }
    }

    /// Lets the sweep go, after the pause.
    pub(crate) fn go(&mut self) {
        if let Some(go) = self.go.take() {
            go.send(()).ok();
        }
    }

    /// Returns how each was captured.
    pub(crate) fn statistics(&self) -> Vec<DiskStatistics> {
        let disks = self.disks.iter();
        disks
            .map(|disk| DiskStatistics {
                name: disk.disk.facts().name,
                bytes: disk.bytes,
                method: if disk.frozen.get().is_some() {
                    DiskMethod::Reflink
                } else {
                    DiskMethod::CopyBeforeWrite
                },
            })
            .collect()
    }
}

impl Drop for DiskCopies {
    fn drop(&mut self) {
        self.disks.iter().for_each(|disk| disk.end());
    }
}

impl Copying {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets everybody write.
    fn end(&self) {
        self.disk.set_write_observer(None);
        let mut state = self.lock();
        (state.released, state.is_freezing) = (true, false);
        drop(state);
        self.changed.notify_all();
    }

    /// Freezes the disk where that can be, and lets everybody write; else all goes on by pieces.
    fn freeze(&self) {
        if !self.lock().is_freezing {
            return;
        }
        match self.disk.freeze() {
            Ok(Some(frozen)) => {
                self.frozen.set(frozen).expect("frozen once");
                self.disk.set_write_observer(None);
            }
            Ok(None) => {}
            Err(error) => log::info!("disk {} is copied: {error}", self.disk.facts().name),
        }
        self.lock().is_freezing = false;
        self.changed.notify_all();
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        match self.frozen.get() {
            Some(frozen) => frozen.read_at(out, offset),
            None => self.disk.read_at(out, offset),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        match self.frozen.get() {
            Some(frozen) => frozen.next_data(offset),
            None => self.disk.next_data(offset),
        }
    }

    /// Reads what nobody else has read, in order.
    fn sweep(&self) -> Result<(), Halt> {
        let name = self.disk.facts().name;
        let mut next = 0;
        let count = self.lock().pieces.len();
        while next < count {
            self.control.check()?;
            let at = (next * PIECE_BYTES) as u64;
            let data = self.next_data(at).map_err(failed(&name))?;
            let data = data.map_or(self.bytes, |range| range.start);
            // A hole up to there: kept, if nobody has written into it meanwhile.
            let end = usize::try_from(data / PIECE_BYTES as u64).expect("inside the disk");
            let hole = if data >= self.bytes { count } else { end };
            while next < hole {
                // Claimed after the look, which came after the pause: nobody has written into it.
                if self.claim(next) {
                    self.pass_on(next, None)?;
                }
                next += 1;
            }
            if next < count {
                self.keep(next)?;
                next += 1;
            }
        }
        Ok(())
    }

    /// Takes a piece to read it; false where somebody else has, or did.
    fn claim(&self, piece: usize) -> bool {
        let mut state = self.lock();
        let is_todo = !state.released && state.pieces[piece] == Piece::Todo;
        if is_todo {
            state.pieces[piece] = Piece::Reading;
        }
        is_todo
    }

    /// Sees to it that a piece is kept; returns when it is.
    fn keep(&self, piece: usize) -> Result<(), Halt> {
        if self.claim(piece) {
            return self.read(piece);
        }
        let waits = |state: &mut State| !state.released && state.pieces[piece] == Piece::Reading;
        drop(
            self.changed
                .wait_while(self.lock(), waits)
                .unwrap_or_else(PoisonError::into_inner),
        );
        self.control.check()
    }

    /// Reads a claimed piece into memory, and passes it on.
    fn read(&self, piece: usize) -> Result<(), Halt> {
        let mut data = self.control.wait(&self.free)?;
        let len = self.len_of(piece);
        data.clear();
        data.resize(len.next_multiple_of(PAGE_BYTES), 0);
        let offset = (piece * PIECE_BYTES) as u64;
        let read = self.read_at(&mut data[..len], offset);
        read.map_err(failed(&self.disk.facts().name))?;
        self.pass_on(piece, Some(data))
    }

    fn len_of(&self, piece: usize) -> usize {
        let left = self.bytes - (piece * PIECE_BYTES) as u64;
        usize::try_from(left).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES))
    }

    fn pass_on(&self, piece: usize, data: Option<Vec<u8>>) -> Result<(), Halt> {
        // It is in memory: the guest need not wait for the image's storage.
        self.lock().pieces[piece] = Piece::Kept;
        self.changed.notify_all();
        let staged = Staged {
            disk: self.number,
            piece,
            bytes: self.len_of(piece),
            data,
        };
        select! {
            send(self.full, staged) -> sent => sent.map_err(|_| Halt::Stopped),
            recv(self.control.stop_signal()) -> _ => Err(Halt::Stopped),
        }
    }
}

impl WriteObserver for Copying {
    fn before_write(&self, offset: u64, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let waits = |state: &mut State| state.is_freezing;
        let waited = self.changed.wait_while(self.lock(), waits);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        if self.frozen.get().is_some() {
            return;
        }
        let piece = |at: u64| usize::try_from(at / PIECE_BYTES as u64).unwrap_or(usize::MAX);
        let last = piece((offset + bytes - 1).min(self.bytes.saturating_sub(1)));
        for number in piece(offset)..=last {
            if let Err(halt) = self.keep(number) {
                // The checkpoint has failed, and not the guest: it writes on.
                if let Halt::Failed(error) = halt {
                    self.control.fail(error);
                }
                self.end();
                return;
            }
        }
    }
}

/// Writes `expected` pieces to the image.
fn write_staged(
    image: &ImageWriter,
    control: &Control,
    staged: &Receiver<Staged>,
    recycle: &Sender<Vec<u8>>,
    expected: usize,
) -> Result<(), Halt> {
    let failed = || CheckpointError::store("write a disk to");
    let mut scratch = ChunkScratch::default();
    let mut frames = Vec::new();
    for _ in 0..expected {
        let piece = control.wait(staged)?;
        let disk = image.disk_frames(piece.disk);
        let run = PageRun {
            start: Gfn(disk.start.0 + piece.piece as u64 * PIECE_PAGES),
            page_count: piece.bytes.div_ceil(PAGE_BYTES) as u64,
        };
        let Some(data) = piece.data else {
            image.record_zero(0, run).map_err(failed())?;
            continue;
        };
        frames.clear();
        frames.extend((run.start.0..run.end().0).map(Gfn));
        let pages = ChunkPages {
            epoch: 0,
            frames: &frames,
            data: &data,
        };
        image.write_chunk(pages, &mut scratch).map_err(failed())?;
        recycle.send(data).ok();
    }
    Ok(())
}
