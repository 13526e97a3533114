//! Lazy restore: the guest runs at once, and its memory comes as it is touched.
//!
//! A userfaultfd holds whoever touches memory that is not there. Memory comes in pieces of 2 MiB:
//! first those that somebody waits for (`lvp-lazy-N`), and in between all others, in order
//! (`lvp-fill`), beginning with what the guest wrote last, as the image records it. A piece is put
//! together beside the guest from chunks whose digests hold, and then moved into it at once (by
//! `UFFDIO_MOVE`, which keeps huge pages; by `UFFDIO_COPY` before Linux 6.8). Pieces without data
//! are left alone: they are zeros when they are touched.
//!
//! **A byte that no digest covers never comes to the guest.** Where a chunk is damaged or cannot be
//! read, whoever waits for its piece goes on waiting, the owner of the guest is told, stops it, and
//! gives the memory up ([`LazyFill::give_up`]).

mod pieces;
mod source;

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use super::eager::{FillError, check_layout};
use crate::guest::{Backing, DiscardObserver, MemoryFill, MemoryRegion};
use crate::page::PageRun;
use crate::store::{ImageReader, StoreError};
use crate::sys::missing::MissingPages;
use crate::sys::priority;
use crate::sys::sigmask::SignalsBlocked;
use pieces::{Claim, Pieces};
use source::PieceBuilder;

/// Threads that serve faults: one reads while another waits for the disk.
const HANDLERS: usize = 2;

/// How much nicer the filling thread is than the guest's: at 5 a vCPU gets three quarters of a CPU
/// that the two share (sched(7)).
const FILL_NICENESS: i32 = 5;

/// Told once why memory cannot be filled.
pub type FailureHook = Box<dyn FnOnce(Arc<StoreError>) + Send>;

/// Memory that is being filled from an image. Dropping it gives up what is not there yet.
///
/// The image stays leased until all of it is there.
#[derive(Debug)]
pub struct LazyFill {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

/// How far a fill is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct FillProgress {
    /// Pieces of 2 MiB that have data.
    pub pieces: u64,
    /// Those that are there.
    pub filled_pieces: u64,
    /// Those that somebody waited for.
    pub faulted_pieces: u64,
    /// Those of the working set that the image records, which come before all others.
    pub working_set_pieces: u64,
}

struct Shared {
    reader: Mutex<Option<Arc<ImageReader>>>,
    regions: Vec<MemoryRegion>,
    missing: MissingPages,
    pieces: Pieces,
    /// The pieces that are brought first.
    working_set: Vec<usize>,
    faulted: AtomicU64,
    stop: AtomicBool,
    /// No turns are given to anybody else: somebody waits for all of it.
    hurry: AtomicBool,
    wake: OwnedFd,
    state: Mutex<State>,
    changed: Condvar,
    chunks: source::SharedChunks,
}

#[derive(Default)]
struct State {
    complete: bool,
    failure: Option<Arc<StoreError>>,
    hook: Option<FailureHook>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("progress", &self.progress())
            .finish_non_exhaustive()
    }
}

impl LazyFill {
    /// Takes charge of `regions`, which must not have been touched since they were mapped, and
    /// begins to fill them. Returns before any of it is there.
    ///
    /// Fails where memory is not anonymous, or userfaultfd cannot be used.
    pub fn start(
        reader: Arc<ImageReader>,
        regions: &[MemoryRegion],
    ) -> Result<Arc<Self>, FillError> {
        check_layout(&reader.manifest().regions, regions)?;
        let backed = regions
            .iter()
            .find(|region| !matches!(region.backing, Backing::Anonymous { .. }));
        if let Some(region) = backed {
            return Err(FillError::NotLazy {
                reason: format!("memory slot {} is not anonymous memory", region.slot),
            });
        }
        let failed = |what: &'static str| {
            move |error: std::io::Error| FillError::NotLazy {
                reason: format!("{what}: {error}"),
            }
        };
        let missing = MissingPages::new().map_err(failed("userfaultfd cannot be used"))?;
        let pieces = Pieces::new(&reader, regions);
        for (region, range) in pieces.ranges_to_register() {
            let mapping = &regions[region].mapping;
            missing
                .register(mapping, range.start, range.len())
                .map_err(failed("guest memory cannot be watched"))?;
        }
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| failed("an eventfd cannot be made")(error.into()))?;
        let shared = Arc::new(Shared {
            chunks: source::SharedChunks::new(),
            working_set: pieces.of(&reader.manifest().working_set),
            reader: Mutex::new(Some(reader)),
            regions: regions.to_vec(),
            missing,
            pieces,
            faulted: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            hurry: AtomicBool::new(false),
            wake,
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        if shared.pieces.left() == 0 {
            shared.finish();
        }
        let fill = Arc::new(Self {
            shared: shared.clone(),
            threads: Mutex::default(),
        });
        let mut threads = fill.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let _blocked = SignalsBlocked::new();
        let mut spawn = |name: String, run: fn(&Shared)| {
            let shared = shared.clone();
            let spawned = thread::Builder::new()
                .name(name)
                .spawn(move || run(&shared));
            spawned.map(|thread| threads.push(thread))
        };
        let mut spawned = spawn("lvp-fill".to_owned(), Shared::fill_in_order);
        for number in 0..HANDLERS {
            spawned = spawned.and(spawn(format!("lvp-lazy-{number}"), Shared::serve_faults));
        }
        drop(threads);
        spawned.map_err(failed("a thread cannot be started"))?;
        Ok(fill)
    }

    /// Has `hook` called when memory cannot be filled; at once where it has come to that already.
    ///
    /// It must stop the guest and then call [`LazyFill::give_up`]: whoever waits for the memory
    /// waits until then.
    pub fn on_failure(&self, hook: FailureHook) {
        let mut state = self.shared.lock();
        match state.failure.clone() {
            Some(failure) => {
                drop(state);
                hook(failure);
            }
            None => state.hook = Some(hook),
        }
    }

    /// Returns why memory cannot be filled, if it has come to that.
    pub fn failure(&self) -> Option<Arc<StoreError>> {
        self.shared.lock().failure.clone()
    }

    /// Lets everybody go who waits for memory that will not come: it reads as zeros. The guest must
    /// not run any more.
    pub fn give_up(&self) {
        self.shared.stop();
        self.shared.unregister();
    }

    /// Returns how far the fill is.
    pub fn progress(&self) -> FillProgress {
        self.shared.progress()
    }

    /// Returns whether all memory is there.
    pub fn is_complete(&self) -> bool {
        self.shared.lock().complete
    }
}

impl MemoryFill for LazyFill {
    fn wait(&self, timeout: Duration) -> bool {
        if !timeout.is_zero() {
            self.shared.hurry.store(true, Ordering::Relaxed);
        }
        let state = self.shared.lock();
        let waits = |state: &mut State| !state.complete && state.failure.is_none();
        let (state, _) = self
            .shared
            .changed
            .wait_timeout_while(state, timeout, waits)
            .unwrap_or_else(PoisonError::into_inner);
        state.complete
    }
}

impl DiscardObserver for LazyFill {
    /// Memory that is given back must not come again from the image: all of it comes first.
    fn before_discard(&self, _run: PageRun) {
        while !self.wait(Duration::from_secs(1)) {
            if self.failure().is_some() || self.shared.stop.load(Ordering::Acquire) {
                return;
            }
        }
    }
}

impl Drop for LazyFill {
    fn drop(&mut self) {
        self.give_up();
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        for thread in threads.drain(..) {
            // The hook of a failure may drop the guest, and this with it, on a thread of ours.
            if thread.thread().id() != thread::current().id() && thread.join().is_err() {
                log::error!("a thread that filled memory panicked");
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn progress(&self) -> FillProgress {
        FillProgress {
            pieces: self.pieces.with_data(),
            filled_pieces: self.pieces.with_data() - self.pieces.left(),
            faulted_pieces: self.faulted.load(Ordering::Relaxed),
            working_set_pieces: self.working_set.len() as u64,
        }
    }

    fn reader(&self) -> Option<Arc<ImageReader>> {
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        reader.clone()
    }

    /// Has every thread end.
    fn stop(&self) {
        self.stop.store(true, Ordering::Release);
        if let Err(error) = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            log::error!("could not wake those who fill memory: {error}");
        }
        self.changed.notify_all();
    }

    fn unregister(&self) {
        for region in &self.regions {
            if let Err(error) = self.missing.unregister(&region.mapping) {
                log::error!("could not give up memory slot {}: {error}", region.slot);
            }
        }
    }

    /// All of it is there: nobody need be held any more, and the image may go.
    fn finish(&self) {
        self.unregister();
        *self.reader.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.chunks.clear();
        self.lock().complete = true;
        self.stop();
    }

    fn fail(&self, error: StoreError) {
        let error = Arc::new(error);
        let hook = {
            let mut state = self.lock();
            if state.failure.is_some() || state.complete {
                return;
            }
            state.failure = Some(error.clone());
            state.hook.take()
        };
        self.stop();
        if let Some(hook) = hook {
            hook(error);
        }
    }

    /// Fills the working set and then piece after piece, until all are there.
    fn fill_in_order(&self) {
        if let Err(error) = rustix::process::nice(FILL_NICENESS) {
            log::debug!("memory is filled at the guest's own priority: {error}");
        }
        let Some(mut builder) = self.builder() else {
            return;
        };
        let mut polite = true;
        let working_set = self.working_set.iter().copied();
        for piece in working_set.chain(0..self.pieces.count()) {
            if self.stop.load(Ordering::Acquire) {
                return;
            }
            if polite && self.hurry.load(Ordering::Relaxed) {
                polite = false;
                priority::run_as_equal(priority::this_thread()).ok();
            }
            if !self.fill(piece, &mut builder) {
                return;
            }
        }
    }

    /// Fills the pieces that somebody waits for, until all are there.
    fn serve_faults(&self) {
        let Some(mut builder) = self.builder() else {
            return;
        };
        builder.prepare();
        let mut addresses = Vec::new();
        while !self.stop.load(Ordering::Acquire) {
            let mut fds = [
                PollFd::new(&self.missing, PollFlags::IN),
                PollFd::new(&self.wake, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::error!("could not wait for faults: {error}");
                    return;
                }
            }
            addresses.clear();
            if let Err(error) = self.missing.read_faults(&mut addresses) {
                log::error!("could not read faults: {error}");
                return;
            }
            for &address in &addresses {
                let Some(piece) = self.pieces.at(address, &self.regions) else {
                    continue;
                };
                if self.pieces.is_todo(piece) {
                    self.faulted.fetch_add(1, Ordering::Relaxed);
                }
                if !self.fill(piece, &mut builder) {
                    return;
                }
                // Who faulted after it was filled, but was told of before, waits still.
                self.wake_piece(piece);
            }
            builder.prepare();
        }
    }

    fn wake_piece(&self, piece: usize) {
        let place = self.pieces.place(piece);
        if self.pieces.is_filled(piece) {
            let mapping = &self.regions[place.region].mapping;
            if let Err(error) = self.missing.wake(mapping, place.offset, place.len) {
                log::error!("could not wake those who wait for memory: {error}");
            }
        }
    }

    /// Makes the memory of a thread that fills pieces; none where that fails, and all with it.
    fn builder(&self) -> Option<PieceBuilder> {
        let made = PieceBuilder::new(self.missing.can_move());
        made.map_err(|error| self.fail(error)).ok()
    }

    /// Fills a piece that nobody fills yet; false where the thread must end.
    fn fill(&self, piece: usize, builder: &mut PieceBuilder) -> bool {
        if self.pieces.claim(piece) != Claim::Mine {
            return true;
        }
        let Some(reader) = self.reader() else {
            return false;
        };
        let place = self.pieces.place(piece);
        let region = &self.regions[place.region];
        let filled = builder.fill(&reader, region, place, &self.chunks, &self.missing);
        if let Err(error) = filled {
            self.fail(error);
            return false;
        }
        if self.pieces.finish(piece) {
            drop(reader);
            self.finish();
        }
        true
    }
}

/// Waits until `fill` is complete or has failed, for tests and tools; returns how long it took.
pub fn wait_for(fill: &LazyFill) -> Duration {
    let began = Instant::now();
    while !fill.wait(Duration::from_secs(1)) && fill.failure().is_none() {}
    began.elapsed()
}
