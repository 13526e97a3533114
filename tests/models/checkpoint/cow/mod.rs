//! `cow`: a guest of a few pieces of one page each, which is captured while it writes.

#[path = "../../../../src/checkpoint/protocol/cow/ahead.rs"]
mod ahead;
#[path = "../../../../src/checkpoint/protocol/cow/capture.rs"]
mod capture;

pub(crate) mod arming;
pub(crate) mod pieces;

use std::sync::Arc;
use std::time::Duration;

use loom::thread::{self, JoinHandle};

use crate::checkpoint::capture::UntouchedPages;
use crate::checkpoint::control::Control;
use crate::checkpoint::crew::Crew;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::layout::Layout;
use crate::checkpoint::tracker::WriteProtection;
use crate::checkpoint::writer::{Buffers, Returned, start_writers};
use crate::guest::{Backing, MemoryRegion};
use crate::page::Gfn;
use crate::store::ImageWriter;
use crate::sync::channel::Receiver;
use crate::sync::{Condvar, Mutex};
use crate::sys::anon::map_anonymous;
use crate::sys::mapping::GuestMapping;
use crate::sys::userfault::Userfault;
use ahead::Ahead;
use capture::{CopyOnWrite, Parts};

fn page_map_failed(error: std::io::Error) -> CheckpointError {
    CheckpointError::resource("this process's page map")(error)
}

fn protection_failed(error: std::io::Error) -> CheckpointError {
    CheckpointError::Protection {
        source: Arc::new(error),
    }
}

/// A guest and its checkpoint.
struct Scene {
    /// Of each piece.
    memory: Vec<GuestMapping>,
    layout: Arc<Layout>,
    userfault: Userfault,
    control: Arc<Control>,
    cow: Arc<CopyOnWrite>,
    all_captured: Receiver<()>,
    image: Arc<ImageWriter>,
    writers: Crew,
    returned: Returned,
    buffers: usize,
    gate: Gate,
    /// Stores to the first piece before the moment.
    stores_before: usize,
}

/// A vCPU, as its program sees it.
struct Vcpu {
    memory: Vec<GuestMapping>,
    userfault: Userfault,
    gate: Gate,
}

impl Vcpu {
    fn store(&self, piece: usize, value: u8) {
        self.userfault.store(&self.memory[piece], 0, value, 1);
    }

    /// Like [`Vcpu::store`]. If there is a fault a handler hears of it twice, and the second time
    /// when it is served already.
    fn store_told_twice(&self, piece: usize, value: u8) {
        self.userfault.store(&self.memory[piece], 0, value, 2);
    }

    /// Stops here while the guest is paused.
    fn pass(&self) {
        self.gate.pass();
    }
}

impl Scene {
    /// Nothing is protected yet, and nobody runs.
    fn new(pieces: u32, buffers: usize, reserve: usize) -> Self {
        let memory: Vec<_> = (0..pieces)
            .map(|_| map_anonymous(crate::page::PAGE_BYTES, false).unwrap())
            .collect();
        let regions = (0..pieces)
            .zip(&memory)
            .map(|(slot, mapping)| MemoryRegion {
                slot,
                start: Gfn(u64::from(slot) << 8),
                page_count: 1,
                mapping: mapping.clone(),
                backing: Backing::Memfd,
            });
        let layout = Arc::new(Layout::new(&regions.collect::<Vec<_>>()));
        let control = Arc::new(Control::new());
        let image = Arc::new(ImageWriter::default());
        let tally = Arc::default();
        let mut writers = Crew::default();
        let all = (0..buffers).map(|_| crate::checkpoint::writer::Buffer::new().unwrap());
        let buffers_made = Buffers {
            all: all.collect(),
            reserve,
        };
        let (queue, returned) =
            start_writers(&mut writers, &control, &image, &tally, buffers_made, 1).unwrap();
        let protection = WriteProtection::new(layout.clone()).unwrap();
        let userfault = protection.userfault().clone();
        let cow = CopyOnWrite::new(Parts {
            layout: layout.clone(),
            control: control.clone(),
            protection,
            queue,
            image: image.clone(),
            tally,
            staging_pieces: buffers,
            log: None,
        });
        let cow = Arc::new(cow.unwrap());
        Self {
            memory,
            layout,
            userfault,
            control,
            all_captured: cow.all_captured().clone(),
            cow,
            image,
            writers,
            returned,
            buffers,
            gate: Gate::new(),
            stores_before: 0,
        }
    }

    fn untouched(&self) -> UntouchedPages {
        UntouchedPages::look(&self.layout).unwrap()
    }

    /// Fixes the moment and protects all memory, as in a pause.
    fn pause(&self) {
        let mut ahead = Ahead::new(self.cow.clone(), self.untouched(), Duration::MAX);
        ahead.finish_in_pause(None).unwrap();
    }

    /// A handler that serves every writer until none is left.
    fn handler(&self) -> JoinHandle<()> {
        let (cow, layout, userfault) = (
            self.cow.clone(),
            self.layout.clone(),
            self.userfault.clone(),
        );
        thread::spawn(move || {
            while let Some(address) = userfault.next_fault() {
                cow.let_write(layout.piece_at(address).unwrap()).unwrap();
            }
        })
    }

    /// The vCPU; there is one.
    fn vcpu(&self, program: impl Fn(&Vcpu) + Send + 'static) -> JoinHandle<()> {
        let vcpu = Vcpu {
            memory: self.memory.clone(),
            userfault: self.userfault.clone(),
            gate: self.gate.clone(),
        };
        vcpu.gate.enter();
        thread::spawn(move || {
            program(&vcpu);
            vcpu.gate.leave();
            vcpu.userfault.end_writers();
        })
    }

    /// Like [`Scene::end_told`], where nobody waits for the end.
    fn end(self, at_moment: &[u8]) {
        let captured = self.all_captured.clone();
        self.end_told(at_moment, || {
            assert!(captured.try_recv().is_ok(), "the end was not told");
        });
    }

    /// Writes the image, until all who capture have ended, and checks it: it is of the moment, at
    /// which the pieces had these values, and later stores were ordered behind the copies in it.
    fn end_told(mut self, at_moment: &[u8], told: impl FnOnce()) {
        drop(self.cow);
        self.writers.take()().unwrap();
        told();
        assert!(
            self.all_captured.try_recv().is_err(),
            "the end was told twice"
        );
        assert!(self.control.check().is_ok());
        assert_eq!(self.returned.buffers().len(), self.buffers);
        let written = self.image.written.lock().unwrap();
        assert_eq!(written.len(), at_moment.len(), "{written:?}");
        for (piece, (&value, memory)) in at_moment.iter().zip(&self.memory).enumerate() {
            let frame = self.layout.frame(piece);
            let copy = written.iter().find(|written| written.frame == frame);
            let copy = copy.expect("every piece is in the image");
            assert_eq!(copy.value, value, "piece {piece} is not of the moment");
            for store in &memory.stores(0)[self.stores_before..] {
                let behind = store.behind.get(copy.copy);
                assert_eq!(
                    behind,
                    Some(&true),
                    "a store may come before the copy of {piece}"
                );
            }
        }
    }
}

/// Where vCPUs stop for a pause.
#[derive(Clone)]
struct Gate(Arc<(Mutex<Passage>, Condvar)>);

struct Passage {
    never_waits: bool,
    closed: bool,
    running: usize,
}

impl Gate {
    fn new() -> Self {
        let passage = Passage {
            never_waits: false,
            closed: false,
            running: 0,
        };
        Self(Arc::new((Mutex::new(passage), Condvar::new())))
    }

    fn enter(&self) {
        self.0.0.lock().unwrap().running += 1;
    }

    fn leave(&self) {
        self.0.0.lock().unwrap().running -= 1;
        self.0.1.notify_all();
    }

    fn pass(&self) {
        let mut passage = self.0.0.lock().unwrap();
        if passage.closed {
            passage.running -= 1;
            self.0.1.notify_all();
            passage = self
                .0
                .1
                .wait_while(passage, |passage| passage.closed)
                .unwrap();
            passage.running += 1;
        }
    }

    fn close(&self) {
        let mut passage = self.0.0.lock().unwrap();
        passage.closed = true;
        let waits = |passage: &mut Passage| passage.running > 0 && !passage.never_waits;
        drop(self.0.1.wait_while(passage, waits).unwrap());
    }

    /// Has [`Gate::close`] wait for nobody.
    fn break_down(&self) {
        self.0.0.lock().unwrap().never_waits = true;
    }

    fn open(&self) {
        self.0.0.lock().unwrap().closed = false;
        self.0.1.notify_all();
    }
}
