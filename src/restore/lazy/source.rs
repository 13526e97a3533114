//! Putting pieces together from checked chunks.

use std::array;
use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::pieces::Place;
use crate::guest::MemoryRegion;
use crate::page::{PAGE_BYTES, PIECE_BYTES, PIECE_PAGES};
use crate::store::{ImageReader, ReadScratch, StoreError};
use crate::sys::anon::{HugeBytes, map_anonymous, populate};
use crate::sys::mapping::GuestMapping;
use crate::sys::missing::MissingPages;

/// Most checked chunks that wait for more pieces that need them: 128 MiB.
const KEPT_MAX: usize = 64;

/// Checked chunks whose pages are of several pieces, so that each is read and checked once.
///
/// Their memory is used again: finding new memory takes the host longer than reading a chunk.
#[derive(Debug)]
pub(super) struct SharedChunks {
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    chunks: HashMap<usize, KeptChunk>,
    oldest: VecDeque<usize>,
    spare: Vec<HugeBytes>,
}

#[derive(Debug)]
struct KeptChunk {
    checked: Arc<CheckedChunk>,
    /// Pieces that need it still.
    pieces: usize,
}

/// A chunk whose digest held.
#[derive(Debug)]
struct CheckedChunk {
    memory: HugeBytes,
    len: usize,
}

impl CheckedChunk {
    fn raw(&self) -> &[u8] {
        &self.memory[..self.len]
    }
}

impl SharedChunks {
    pub(super) fn new() -> Self {
        Self {
            kept: Mutex::default(),
        }
    }

    pub(super) fn clear(&self) {
        *self.lock() = Kept::default();
    }

    /// Takes a kept chunk for one of the pieces that need it; [`SharedChunks::give_back`] must follow.
    fn take(&self, chunk: usize) -> Option<Arc<CheckedChunk>> {
        let mut kept = self.lock();
        let found = kept.chunks.get_mut(&chunk)?;
        let checked = found.checked.clone();
        found.pieces -= 1;
        if found.pieces == 0 {
            kept.chunks.remove(&chunk);
        }
        Some(checked)
    }

    /// Has the memory of a chunk used again if nobody needs the chunk.
    fn give_back(&self, checked: Arc<CheckedChunk>) {
        if let Some(checked) = Arc::into_inner(checked) {
            self.lock().spare.push(checked.memory);
        }
    }

    /// Keeps chunks that were just read, each in its scratch, for the other pieces that need them.
    fn keep_all(&self, reader: &ImageReader, read: &mut Vec<usize>, scratches: &[ReadScratch]) {
        for (chunk, scratch) in read.drain(..).zip(scratches) {
            self.keep(chunk, scratch.chunk(), pieces_of(reader, chunk) - 1);
        }
    }

    /// Keeps a chunk for `pieces` more pieces, in the place of the oldest where there are many. It is
    /// read again where there is no memory for it.
    fn keep(&self, chunk: usize, raw: &[u8], pieces: usize) {
        if pieces == 0 || self.lock().chunks.contains_key(&chunk) {
            return;
        }
        let spare = self.lock().make_room();
        let Ok(mut memory) = spare.map_or_else(|| HugeBytes::new(PIECE_BYTES), Ok) else {
            return;
        };
        let len = raw.len();
        memory[..len].copy_from_slice(raw);
        let mut kept = self.lock();
        if kept.chunks.contains_key(&chunk) {
            kept.spare.push(memory);
            return;
        }
        let checked = Arc::new(CheckedChunk { memory, len });
        kept.chunks.insert(chunk, KeptChunk { checked, pieces });
        kept.oldest.push_back(chunk);
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// Gives chunks up until there may be one more; returns memory for that, if there is any.
    fn make_room(&mut self) -> Option<HugeBytes> {
        while self.chunks.len() >= KEPT_MAX {
            let oldest = self.oldest.pop_front()?;
            let given_up = self.chunks.remove(&oldest);
            let unused = given_up.and_then(|kept| Arc::into_inner(kept.checked));
            self.spare.extend(unused.map(|checked| checked.memory));
        }
        self.spare.pop()
    }
}

/// One filling thread's memory.
pub(super) struct PieceBuilder {
    target: Target,
    /// A chunk each: of a piece that has no more, what is read is kept when it is in the guest already.
    scratches: [ReadScratch; 2],
}

/// Where a piece is put together.
enum Target {
    /// Memory that is moved into the guest, and made anew for the next piece.
    Moved(GuestMapping),
    /// Memory that is copied into the guest.
    Copied(HugeBytes),
}

impl PieceBuilder {
    pub(super) fn new(moves: bool) -> Result<Self, StoreError> {
        let target = if moves {
            map_anonymous(PIECE_BYTES, true).map(Target::Moved)
        } else {
            HugeBytes::new(PIECE_BYTES).map(Target::Copied)
        };
        Ok(Self {
            target: target.map_err(failed("map memory for"))?,
            scratches: array::from_fn(|_| ReadScratch::default()),
        })
    }

    /// Puts a piece together and into the guest.
    pub(super) fn fill(
        &mut self,
        reader: &ImageReader,
        region: &MemoryRegion,
        place: Place,
        chunks: &SharedChunks,
        missing: &MissingPages,
    ) -> Result<(), StoreError> {
        self.clear(place.len).map_err(failed("make memory for"))?;
        let mut done = HashSet::new();
        let mut read = Vec::new();
        let sources: Vec<_> = reader.sources_in(place.run).collect();
        for (chunk, _) in &sources {
            if !done.insert(*chunk) {
                continue;
            }
            let kept = chunks.take(*chunk);
            let target = &mut self.target;
            let mut put = |raw: &[u8]| {
                for (_, part) in sources.iter().filter(|(other, _)| other == chunk) {
                    let page = part.run.start.0 - place.run.start.0;
                    let offset = usize::try_from(page).expect("a piece has few pages") * PAGE_BYTES;
                    target.put(offset, part.bytes_in(raw));
                }
            };
            if let Some(checked) = kept {
                put(checked.raw());
                chunks.give_back(checked);
                continue;
            }
            if read.len() == self.scratches.len() {
                chunks.keep_all(reader, &mut read, &self.scratches);
            }
            put(reader.read_chunk(*chunk, &mut self.scratches[read.len()])?);
            read.push(*chunk);
        }
        let (mapping, offset) = (&region.mapping, place.offset);
        let filled = match &self.target {
            Target::Moved(source) => missing.move_in(mapping, offset, source, place.len),
            Target::Copied(bytes) => missing.copy_in(mapping, offset, &bytes[..place.len]),
        };
        filled.map_err(failed("put memory into the guest of"))?;
        chunks.keep_all(reader, &mut read, &self.scratches);
        Ok(())
    }

    /// Makes memory for the next piece now, while nobody waits for it.
    pub(super) fn prepare(&mut self) {
        self.scratches.iter_mut().for_each(ReadScratch::prepare);
        if let Target::Moved(source) = &self.target {
            // Where this fails, filling the piece fails, and says so.
            populate(source, 0, PIECE_BYTES).ok();
        }
    }

    /// Makes all of the piece's memory, so that it is moved as a whole; it is zeros.
    fn clear(&mut self, len: usize) -> io::Result<()> {
        match &mut self.target {
            Target::Moved(source) => populate(source, 0, len),
            Target::Copied(bytes) => {
                bytes[..len].fill(0);
                Ok(())
            }
        }
    }
}

impl Target {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        match self {
            Self::Moved(source) => source.copy_in(offset, bytes),
            Self::Copied(target) => target[offset..offset + bytes.len()].copy_from_slice(bytes),
        }
    }
}

/// Returns how many pieces need a chunk.
fn pieces_of(reader: &ImageReader, chunk: usize) -> usize {
    let runs = reader.runs_of_chunk(chunk);
    let pieces: HashSet<u64> = runs
        .flat_map(|part| {
            let last = part.run.end().0 - 1;
            part.run.start.0 / PIECE_PAGES..=last / PIECE_PAGES
        })
        .collect();
    pieces.len()
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> StoreError {
    move |source| StoreError::Io {
        action,
        path: std::path::PathBuf::from("a lazy restore"),
        source,
    }
}
