//! One checkpoint from its start to its end, on a thread of its own.
//!
//! The session's thread decides and waits; it touches neither storage nor guest memory in bulk,
//! so that it can always answer a cancel and always resume the guest.

mod image;
mod lineage;
mod pause;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, select};

use crate::checkpoint::control::Control;
use crate::checkpoint::crew::{Crew, guarded, thread_cpu_ns};
use crate::checkpoint::disks::DiskCopies;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::job::{Job, JobShared, Report};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::options::CheckpointOptions;
use crate::checkpoint::phase::Phase;
use crate::checkpoint::plan::{self, Contract};
use crate::checkpoint::policy::Policy;
use crate::checkpoint::protocol;
use crate::checkpoint::stats::{Statistics, micros};
use crate::checkpoint::tracker::{Logging, Tracker};
use crate::checkpoint::watchdog::PauseLease;
use crate::checkpoint::writer::{Buffers, Returned, Tally, WriteQueue, start_writers};
use crate::guest::Guest;
use crate::page::PAGE_BYTES;
use crate::store::{CommittedImage, ImageReader, ImageWriter, LimitedStorage, Storage};
use crate::sys::sigmask::SignalsBlocked;
use pause::PauseTimes;

/// How long a stopped session waits for its threads, and then for the image's removal. A write of
/// one chunk takes a millisecond, or some tens where it is compressed hard. Both together leave
/// a cancel some of the 100 ms that it is to be answered in.
const TEARDOWN_PATIENCE: Duration = Duration::from_millis(30);

/// How long to wait for the reason of a failure that another thread is just reporting.
const REASON_PATIENCE: Duration = Duration::from_secs(1);

/// Starts a checkpoint of `guest` into an image at `path` (or in it, where it is a directory).
///
/// Returns as soon as the checkpoint is under way; the job has the rest. Fails at once where the
/// options are wrong, the guest cannot be checkpointed, or another checkpoint of it is running.
/// Nothing is paused before the image is begun.
pub fn start(
    guest: Arc<dyn Guest>,
    storage: Arc<dyn Storage>,
    path: impl Into<PathBuf>,
    options: CheckpointOptions,
) -> Result<Job, CheckpointError> {
    options.validate()?;
    guest
        .check_checkpointable()
        .map_err(CheckpointError::guest("checkpoint the guest"))?;
    let claim = Claim::new(guest.clone())?;
    let layout = Arc::new(Layout::new(guest.regions()));
    let memory_bytes = (layout.page_count() * PAGE_BYTES) as u64;
    let job = Arc::new(JobShared::new(memory_bytes)?);
    let path = path.into();
    let shared = job.clone();
    let run = move || {
        let session = Session::new(guest, layout, options, &shared);
        let outcome = session.run(storage, path);
        drop(claim);
        shared.finish(outcome, true);
    };
    // The session's thread, and all that it starts, inherit the full mask.
    let blocked = SignalsBlocked::new();
    let session = thread::Builder::new()
        .name("lvp-session".to_owned())
        .spawn(run)
        .map_err(CheckpointError::resource("thread lvp-session"))?;
    drop(blocked);
    job.set_session(session);
    Ok(Job { shared: job })
}

/// The right to use the guest's dirty log.
pub(crate) struct Claim(Arc<dyn Guest>);

impl Claim {
    /// Fails while somebody else has it.
    pub(crate) fn new(guest: Arc<dyn Guest>) -> Result<Self, CheckpointError> {
        if guest.host_writes().claim() {
            Ok(Self(guest))
        } else {
            Err(CheckpointError::Busy)
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.host_writes().release_claim();
    }
}

/// What keeps a thread that works for the session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// It may block on storage; the thread can be abandoned.
    Storage,
    /// It takes CPU time, before anything is captured: the thread gives way to the guest, as the
    /// session's own must not, since it resumes the guest.
    Cpu,
}

/// A running checkpoint, as its own thread sees it.
pub(crate) struct Session {
    pub(crate) guest: Arc<dyn Guest>,
    pub(crate) layout: Arc<Layout>,
    pub(crate) options: CheckpointOptions,
    pub(crate) policy: Policy,
    pub(crate) job: Arc<JobShared>,
    pub(crate) control: Arc<Control>,
    pub(crate) lease: Arc<PauseLease>,
    /// Threads that read the guest.
    pub(crate) capture: Crew,
    /// Threads that only write the image.
    pub(crate) writers: Crew,
    /// Threads that copy the guest's disks.
    disk_crew: Crew,
    disks: Option<DiskCopies>,
    pub(crate) tally: Arc<Tally>,
    pub(crate) statistics: Statistics,
    /// What was written since the chain's last image, or the scan's mask where there is none.
    pub(crate) tracker: Arc<Tracker>,
    /// The image that this one continues.
    parent: Option<Arc<ImageReader>>,
    /// The log, from the pause of a chain's first image until its commit.
    log: Option<Logging>,
    /// The pause, as far as it is known when it ends.
    pause: Option<PauseTimes>,
    /// CPU time of the threads that have ended, in nanoseconds.
    cpu: Arc<AtomicU64>,
    /// Held here to the end, so that its removal never blocks this thread.
    image: Option<Arc<ImageWriter>>,
}

/// Returns when the guest is resumed, so that a promised downtime is kept: resuming takes a little
/// itself. With a hook in the pause it is not the engine that knows how long that takes.
fn longest_pause(options: &CheckpointOptions) -> Option<Duration> {
    let promised = options.max_downtime.filter(|_| options.at_pause.is_none());
    promised.map(|most| most * 9 / 10)
}

impl Session {
    fn new(
        guest: Arc<dyn Guest>,
        layout: Arc<Layout>,
        options: CheckpointOptions,
        job: &Arc<JobShared>,
    ) -> Self {
        let control = job.control.clone();
        let cpu = Arc::new(AtomicU64::new(0));
        let statistics = Statistics {
            protocol: options.protocol,
            memory_bytes: (layout.page_count() * PAGE_BYTES) as u64,
            contract: Contract::new(&options),
            ..Statistics::default()
        };
        Self {
            policy: Policy::new(&options, layout.page_count()),
            lease: Arc::new(PauseLease::new(
                guest.clone(),
                job.clone(),
                options.pause_limit,
                longest_pause(&options),
            )),
            capture: Crew::new(control.clone(), cpu.clone()),
            writers: Crew::new(control.clone(), cpu.clone()),
            disk_crew: Crew::new(control.clone(), cpu.clone()),
            disks: None,
            tally: Arc::default(),
            tracker: Arc::new(Tracker::new(guest.clone(), layout.clone())),
            parent: None,
            log: None,
            guest,
            layout,
            options,
            job: job.clone(),
            control,
            statistics,
            cpu,
            pause: None,
            image: None,
        }
    }

    /// Runs the checkpoint to its end, whatever that is.
    fn run(mut self, storage: Arc<dyn Storage>, path: PathBuf) -> Result<Report, CheckpointError> {
        let control = self.control.clone();
        let lease = self.lease.clone();
        let mut watchdog = Crew::new(control.clone(), Arc::default());
        let mut committed = None;
        guarded(&control, "lvp-session", || {
            let watch = self.lease.clone();
            watchdog.spawn("lvp-watchdog", move || {
                watch.watch();
                Ok(())
            })?;
            committed = Some(self.checkpoint(storage, path)?);
            Ok(())
        });
        if committed.is_none() {
            self.tear_down();
        } else {
            self.writers.join_until(Instant::now() + TEARDOWN_PATIENCE);
        }
        // Ends at once: the guest is paused no more.
        lease.end_watch();
        watchdog.join_until(Instant::now() + REASON_PATIENCE);
        let Some(image) = committed else {
            let reason = control.wait_for_reason(REASON_PATIENCE);
            return Err(reason.expect("whoever stops a checkpoint says why"));
        };
        self.finish_statistics();
        Ok(Report {
            image,
            statistics: Arc::new(self.statistics),
        })
    }

    fn checkpoint(
        &mut self,
        storage: Arc<dyn Storage>,
        path: PathBuf,
    ) -> Result<CommittedImage, Halt> {
        self.find_parent(&storage, &path)?;
        self.await_memory()?;
        plan::make(self, &storage, &path)?;
        let storage = match self.options.max_bandwidth {
            Some(rate) => Arc::new(LimitedStorage::new(storage, rate)),
            None => storage,
        };
        let image = self.begin_image(storage.clone(), path)?;
        let image = Arc::new(image);
        self.image = Some(image.clone());
        let disks = self.guest.disks();
        let copies = DiskCopies::new(disks, &image, &self.control, &mut self.disk_crew)?;
        self.disks = Some(copies);
        drop(image);
        let captured = protocol::capture(self)?;
        self.disk_crew.join()?;
        if let Some(disks) = self.disks.take() {
            self.statistics.disks = disks.statistics();
        }
        self.job.enter(Phase::Committing)?;
        self.commit(captured, storage)
    }

    /// Starts the threads that write the image, fed through the returned queue.
    pub(crate) fn start_writers(
        &mut self,
        buffers: Buffers,
    ) -> Result<(WriteQueue, Returned), CheckpointError> {
        let threads = self.policy.write_threads;
        self.statistics.write_threads = threads as u64;
        let image = self.image();
        start_writers(
            &mut self.writers,
            &self.control,
            &image,
            &self.tally,
            buffers,
            threads,
        )
    }

    /// Waits until everything queued is in the image, for which every handle on the queue must be
    /// gone, and keeps the buffers for the next checkpoint.
    pub(crate) fn join_writers(
        &mut self,
        returned: &Returned,
        resumed: Instant,
    ) -> Result<(), Halt> {
        self.writers.join()?;
        self.statistics.drain_us = micros(resumed.elapsed());
        self.options.workspace.keep(returned.buffers(), None);
        Ok(())
    }

    /// Returns the image, for a thread that writes to it.
    pub(crate) fn image(&self) -> Arc<ImageWriter> {
        let image = self.image.clone();
        image.expect("it is begun before a protocol runs, and committed after")
    }

    /// Waits for a lazy restore that still fills the guest's memory: what is missing looks like
    /// pages that were never touched. An increment has only what was written, which is there.
    fn await_memory(&mut self) -> Result<(), Halt> {
        /// How long a cancel may go unnoticed.
        const LOOK: Duration = Duration::from_millis(5);
        let Some(fill) = self.guest.filling() else {
            return Ok(());
        };
        if self.tracker.is_since_parent() {
            return Ok(());
        }
        let began = Instant::now();
        while !fill.wait(LOOK) {
            self.control.check()?;
            // A fill that fails ends the guest.
            self.guest
                .check_checkpointable()
                .map_err(CheckpointError::guest("checkpoint the guest"))?;
        }
        self.statistics.fill_wait_us = micros(began.elapsed());
        Ok(())
    }

    /// Computes the totals up to now. The CPU time is that of this thread and of those that ended.
    fn finish_statistics(&mut self) {
        let cpu_ns = self.cpu.load(Ordering::Relaxed) + thread_cpu_ns();
        let elapsed = self.control.started.elapsed();
        self.statistics.finish(elapsed, cpu_ns);
    }

    /// Runs work on a thread of its own, and waits for what comes of it.
    pub(crate) fn offload<T: Send + 'static>(
        &mut self,
        kind: Work,
        name: &str,
        work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
    ) -> Result<T, Halt> {
        let (done, result) = bounded(1);
        let body = move || {
            // Nobody may wait any more; the result is dropped then, and with it its file.
            done.send(work()?).ok();
            Ok(())
        };
        match kind {
            Work::Storage => self.writers.spawn(name, body)?,
            Work::Cpu => self.capture.spawn_polite(name, body)?,
        }
        let value = select! {
            recv(result) -> value => value.map_err(|_| Halt::Stopped)?,
            // A result that came with the order to stop counts: a commit may be in it.
            recv(self.control.stop_signal()) -> _ => {
                result.try_recv().map_err(|_| Halt::Stopped)?
            }
        };
        Ok(value)
    }

    /// Ends the threads of a stopped checkpoint, and abandons those that are stuck in storage.
    /// The guest runs and its log is off already.
    fn tear_down(&mut self) {
        let deadline = Instant::now() + TEARDOWN_PATIENCE;
        // First: nobody waits for a disk that is copied no more.
        self.disks = None;
        self.disk_crew.join_until(deadline);
        let all_ended = self.capture.join_until(deadline);
        self.writers.join_until(deadline);
        self.give_back(all_ended);
        if let Some(image) = self.image.take() {
            // The last to hold it removes the file, which may block.
            let removed = self.writers.spawn("lvp-abort", move || {
                drop(image);
                Ok(())
            });
            if let Err(error) = removed {
                log::warn!("could not remove the image in the background: {error}");
            }
            self.writers.join_until(Instant::now() + TEARDOWN_PATIENCE);
        }
    }
}
