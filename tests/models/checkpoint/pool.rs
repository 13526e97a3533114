//! The buffers of `cow`: some are kept for writers that wait, and all of them go round.
//!
//! Each of these makes a model here fail: no reserve, the sweep taking from it, a copy that is
//! given back to nobody, the writers giving back two buffers for one, and a reserve that may grow
//! above its size (as where it was measured before a buffer was added to it: the sweep then waited
//! for buffers that nobody was to take).

use std::sync::Arc;

use loom::thread;

use crate::checkpoint::control::Control;
use crate::checkpoint::crew::Crew;
use crate::checkpoint::error::Halt;
use crate::checkpoint::writer::{Buffer, Buffers, Returned, WriteQueue, start_writers};
use crate::page::Gfn;
use crate::store::ImageWriter;

const EPOCH: u32 = 0;

struct Pool {
    control: Arc<Control>,
    writers: Crew,
    image: Arc<ImageWriter>,
    queue: WriteQueue,
    returned: Returned,
    buffers: usize,
}

impl Pool {
    fn new(buffers: usize, reserve: usize, writers: usize) -> Self {
        let control = Arc::new(Control::new());
        let image = Arc::new(ImageWriter::default());
        let mut crew = Crew::default();
        let made = Buffers {
            all: (0..buffers).map(|_| Buffer::new().unwrap()).collect(),
            reserve,
        };
        let (queue, returned) =
            start_writers(&mut crew, &control, &image, &Arc::default(), made, writers).unwrap();
        Self {
            control,
            writers: crew,
            image,
            queue,
            returned,
            buffers,
        }
    }

    /// Starts a thread that writes.
    fn writer(&mut self) -> thread::JoinHandle<()> {
        let work = self.writers.take();
        thread::spawn(move || work().unwrap())
    }
}

/// Fills a buffer and queues it.
fn submit(queue: &WriteQueue, mut buffer: Buffer, frame: u64) -> Result<(), Halt> {
    buffer.push(Gfn(frame))[..2].fill(0);
    queue.submit(buffer)
}

/// The sweep takes all that it gets, and the disk writes nothing: who waits for a writer has a
/// buffer at once.
pub(crate) fn the_sweep_leaves_the_reserve() {
    sweep_all(1);
}

/// Fails.
pub(crate) fn without_a_reserve_a_writer_waits_for_the_disk() {
    sweep_all(0);
}

fn sweep_all(reserve: usize) {
    let pool = Pool::new(3, reserve, 1);
    let queue = pool.queue.clone();
    let sweep = thread::spawn(move || {
        for frame in 0.. {
            let Ok(buffer) = queue.buffer(EPOCH) else {
                return frame;
            };
            submit(&queue, buffer, frame).unwrap();
        }
        unreachable!("the pool is bounded")
    });
    let (buffer, waited) = pool.queue.urgent_buffer(EPOCH).unwrap();
    assert!(!waited, "the disk was waited for");
    pool.queue.put_back(buffer);
    pool.control.cancel();
    assert!(sweep.join().unwrap() <= 3);
}

/// Two threads write: every buffer comes back once, and whoever waits for one gets it, whichever
/// way the buffers came back before.
pub(crate) fn every_buffer_goes_round() {
    let mut pool = Pool::new(2, 1, 2);
    let writers = [pool.writer(), pool.writer()];
    let (urgent, _) = pool.queue.urgent_buffer(EPOCH).unwrap();
    submit(&pool.queue, urgent, 0).unwrap();
    for frame in 1..=2 {
        let buffer = pool.queue.buffer(EPOCH).unwrap();
        submit(&pool.queue, buffer, frame).unwrap();
    }
    drop(pool.queue);
    for writer in writers {
        writer.join().unwrap();
    }
    let written = pool.image.written.lock().unwrap();
    let mut frames: Vec<_> = written.iter().map(|written| written.frame.0).collect();
    frames.sort_unstable();
    assert_eq!(frames, [0, 1, 2]);
    assert_eq!(pool.returned.buffers().len(), pool.buffers);
}
