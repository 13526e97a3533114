//! One checkpoint from its start to its end, on a thread of its own.
//!
//! The session's thread decides and waits; it touches neither storage nor guest memory in bulk,
//! so that it can always answer a cancel and always resume the guest.

use std::path::{Path, PathBuf};
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{bounded, select};
use jiff::Timestamp;

use crate::checkpoint::capture::touched_pages;
use crate::checkpoint::chain::IncrementStatistics;
use crate::checkpoint::commit::GatedStorage;
use crate::checkpoint::control::Control;
use crate::checkpoint::crew::{Crew, guarded, thread_cpu_ns};
use crate::checkpoint::disks::{self, DiskCopies};
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::job::{Job, JobShared, Report};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::options::{CheckpointOptions, Protocol};
use crate::checkpoint::phase::Phase;
use crate::checkpoint::plan::{self, Contract};
use crate::checkpoint::policy::Policy;
use crate::checkpoint::protocol::{self, Captured};
use crate::checkpoint::stats::{Downtime, Statistics, micros};
use crate::checkpoint::tracker::{DirtySet, Logging, Tracker};
use crate::checkpoint::watchdog::PauseLease;
use crate::checkpoint::writer::{Buffers, Returned, Tally, WriteQueue, start_writers};
use crate::guest::Guest;
use crate::page::PAGE_BYTES;
use crate::state::StateSection;
use crate::store::{
    CarryOver, CommittedImage, Garbage, ImageReader, ImageWriter, LimitedStorage, ManifestFacts,
    Storage, StoreError, WriteOptions, collect_garbage, estimate_bytes,
};
use crate::sys::sigmask::SignalsBlocked;

/// How long a stopped session waits for its threads, and then for the image's removal. A write of
/// one chunk takes a millisecond, or some tens where it is compressed hard. Both together leave
/// a cancel some of the 100 ms that it is to be answered in.
const TEARDOWN_PATIENCE: Duration = Duration::from_millis(30);

/// How long the image may still be in use by this process: a checkpoint that was just given up may
/// have threads left that are in the middle of a write.
const HANDOVER_PATIENCE: Duration = Duration::from_secs(1);
const HANDOVER_LOOK: Duration = Duration::from_millis(5);

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

/// Removes images that are older than the newest `keep`. The new one is whole whatever comes of it.
fn retain(storage: &dyn Storage, committed: &CommittedImage, keep: u32) -> Option<Garbage> {
    let dir = committed.path.parent()?;
    let keep = usize::try_from(keep.max(1)).unwrap_or(usize::MAX);
    let collected = collect_garbage(storage, dir, keep);
    let collected = collected.inspect_err(|error| {
        log::warn!("could not remove old images: {error}");
    });
    collected.ok()
}

/// Opens a committed image, to be continued.
fn read_back(storage: &dyn Storage, committed: &CommittedImage) -> Option<Arc<ImageReader>> {
    let opened = ImageReader::open(storage, &committed.path);
    let reader = opened.inspect_err(|error| {
        log::warn!("the next image will be whole, since this one cannot be read: {error}");
    });
    let same = |reader: &ImageReader| reader.image_uuid() == committed.image_uuid;
    reader.ok().filter(same).map(Arc::new)
}

/// When a pause began and ended.
#[derive(Clone, Copy, Debug)]
struct PauseTimes {
    started: Instant,
    /// Just before the resume.
    resuming: Instant,
    hook: Duration,
}

/// What a pause yields beside memory.
pub(crate) struct PauseOutcome {
    pub(crate) sections: Vec<StateSection>,
    pub(crate) moment: Timestamp,
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
        self.disks = None;
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

    fn begin_image(
        &mut self,
        storage: Arc<dyn Storage>,
        path: PathBuf,
    ) -> Result<ImageWriter, Halt> {
        let storage = Arc::new(GatedStorage::new(storage, self.control.gate.clone()));
        let regions = self.layout.for_image();
        // What a spare file frees is as much as it is likely to need.
        let check_space = self.options.check_space && self.options.spare.is_none();
        let expected_bytes = if check_space {
            Some(estimate_bytes(self.expected_pages()?))
        } else {
            None
        };
        self.control.check()?;
        let (copied, named) = disks::describe(&self.guest.disks());
        let options = WriteOptions {
            codec: self.options.codec,
            durable: self.options.durable,
            spare: self.options.spare.clone(),
            guest_waits: self.options.protocol == Protocol::Stop,
            expected_bytes,
            disks: copied,
            read_only_disks: named,
        };
        let parent = self.parent.clone();
        self.offload("lvp-create", move || {
            let began = Instant::now();
            let begun = loop {
                match ImageWriter::create(storage.clone(), &path, &regions, &options) {
                    Err(StoreError::InUse {
                        holder: Some(holder),
                        ..
                    }) if holder.pid == process::id() && began.elapsed() < HANDOVER_PATIENCE => {
                        thread::sleep(HANDOVER_LOOK);
                    }
                    begun => break begun,
                }
            };
            let begun = begun.and_then(|mut image| match parent {
                Some(parent) => image.inherit(parent).map(|()| image),
                None => Ok(image),
            });
            begun.map_err(CheckpointError::store("begin"))
        })
    }

    /// Returns the pages that the image will hold at most, by what is known now.
    fn expected_pages(&self) -> Result<u64, Halt> {
        if self.parent.is_none() {
            return Ok(touched_pages(&self.layout, || self.control.check().is_ok()));
        }
        let dirty = self.tracker.peek(&mut DirtySet::new(&self.layout))?;
        let carried = self.carry_over().pages;
        Ok((dirty + carried).min(self.layout.page_count() as u64))
    }

    /// Finds the image that this one continues, and what was written since.
    fn find_parent(&mut self, storage: &Arc<dyn Storage>, path: &Path) -> Result<(), Halt> {
        let Some(chain) = self.options.chain.clone() else {
            return Ok(());
        };
        let (guest, storage, path) = (self.guest.clone(), storage.clone(), path.to_owned());
        let asked = chain.clone();
        // On a thread that can be abandoned: the disk may not answer.
        let found = self.offload("lvp-parent", move || {
            asked
                .parent_for(&guest, storage.as_ref(), &path)
                .map_err(CheckpointError::store("continue"))
        })?;
        let whole_because = found.as_ref().err().copied();
        match found {
            Ok(parent) => {
                let tracker = Tracker::since_parent(self.guest.clone(), &self.layout);
                self.tracker = Arc::new(tracker);
                self.parent = Some(parent);
            }
            // Whatever its log has is of no use: it begins anew.
            Err(_) => chain.end(),
        }
        self.statistics.increment = Some(IncrementStatistics {
            parent: self.parent.as_ref().map(|parent| parent.image_uuid()),
            whole_because,
            carried_pages: 0,
        });
        Ok(())
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

    /// Returns whether the guest's writes are tracked after this checkpoint.
    pub(crate) fn chain_goes_on(&self) -> bool {
        self.options.chain.is_some()
    }

    /// Starts the guest's dirty log, or takes part in the chain's.
    pub(crate) fn start_log(&self) -> Result<Logging, CheckpointError> {
        if self.tracker.is_since_parent() {
            Ok(Logging::of_chain(self.guest.clone()))
        } else {
            Logging::start(self.guest.clone())
        }
    }

    /// Keeps the log until the image is committed; it ends where that fails, if it began here.
    pub(crate) fn keep_log(&mut self, logging: Logging) {
        self.log = Some(logging);
    }

    /// Returns how much of the memory that need not be written is to be written all the same.
    fn carry_over(&self) -> CarryOver {
        let Some(span) = self.options.span else {
            return CarryOver::LEAST;
        };
        let pages = self.parent.as_ref().map_or(0, |parent| parent.data_pages());
        CarryOver {
            pages: pages.div_ceil(u64::from(span.max(1))),
            ..CarryOver::LEAST
        }
    }

    /// Gives the chain the committed image, or ends it where that cannot be read back.
    fn advance_chain(&mut self, next: Option<Arc<ImageReader>>) {
        let Some(chain) = &self.options.chain else {
            return;
        };
        if let Some(next) = next {
            chain.advance(&self.guest, next);
        } else {
            chain.end();
        }
        if let Some(log) = self.log.take() {
            log.leave_on();
        }
    }

    /// Has the chain's log know what this checkpoint took from it, which came to nothing.
    /// `all_ended` where no thread of it takes any more.
    fn give_back(&mut self, all_ended: bool) {
        self.log = None;
        if !self.tracker.is_since_parent() {
            return;
        }
        if all_ended {
            self.tracker.give_back();
        } else if let Some(chain) = &self.options.chain {
            log::warn!("a thread of the checkpoint is stuck: the chain of increments ends");
            chain.end();
        }
    }

    fn commit(
        &mut self,
        captured: Captured,
        storage: Arc<dyn Storage>,
    ) -> Result<CommittedImage, Halt> {
        let Captured { sections, moment } = captured;
        let image = self.image.take().and_then(Arc::into_inner);
        let image = image.expect("the protocol ended all who held it");
        let image = self.carry(image)?;
        let pages = self.layout.page_count() as u64;
        self.statistics.written = self.tally.totals(pages);
        self.statistics.untouched_pages = self.tally.untouched_pages();
        self.ask_vcpus();
        self.finish_statistics();
        let statistics =
            serde_json::to_value(&self.statistics).expect("numbers and names encode as JSON");
        let description = self.guest.describe();
        let facts = ManifestFacts {
            name: description.name,
            uuid: description.uuid,
            domain_xml: description.domain_xml,
            vcpu_count: description.vcpu_count,
            facts: description.facts,
            protocol: self.options.protocol.name().to_owned(),
            statistics,
            created: moment,
        };
        let began = Instant::now();
        let continues = self.chain_goes_on();
        let keep = self.options.keep;
        let (committed, next, retention) = self.offload("lvp-commit", move || {
            for section in sections {
                image
                    .add_section(section)
                    .map_err(CheckpointError::store("add state to"))?;
            }
            let committed = image
                .commit(facts)
                .map_err(CheckpointError::store("commit"))?;
            let next = continues
                .then(|| read_back(storage.as_ref(), &committed))
                .flatten();
            let retention = keep.and_then(|keep| retain(storage.as_ref(), &committed, keep));
            Ok((committed, next, retention))
        })?;
        self.statistics.retention = retention;
        self.advance_chain(next);
        self.statistics.commit_us = micros(began.elapsed());
        let bytes = committed.image_bytes;
        self.control
            .bytes_written
            .fetch_max(bytes, Ordering::Relaxed);
        Ok(committed)
    }

    /// Writes memory of earlier images into this one, so that they are not needed for ever.
    fn carry(&mut self, image: ImageWriter) -> Result<ImageWriter, Halt> {
        if self.parent.is_none() {
            return Ok(image);
        }
        let (how, control) = (self.carry_over(), self.control.clone());
        let (image, carried) = self.offload("lvp-carry", move || {
            let carried = image.carry_over(how, || control.check().is_ok());
            let carried = carried.map_err(CheckpointError::store("write"))?;
            Ok((image, carried))
        })?;
        self.control.check()?;
        if let Some(increment) = &mut self.statistics.increment {
            increment.carried_pages = carried;
        }
        Ok(image)
    }

    /// Computes the totals up to now. The CPU time is that of this thread and of those that ended.
    fn finish_statistics(&mut self) {
        let cpu_ns = self.cpu.load(Ordering::Relaxed) + thread_cpu_ns();
        let elapsed = self.control.started.elapsed();
        self.statistics.finish(elapsed, cpu_ns);
    }

    /// Runs work that may block on storage on a thread that can be abandoned.
    pub(crate) fn offload<T: Send + 'static>(
        &mut self,
        name: &str,
        work: impl FnOnce() -> Result<T, CheckpointError> + Send + 'static,
    ) -> Result<T, Halt> {
        let (done, result) = bounded(1);
        self.writers.spawn(name, move || {
            // Nobody may wait any more; the result is dropped then, and with it its file.
            done.send(work()?).ok();
            Ok(())
        })?;
        let value = select! {
            recv(result) -> value => value.map_err(|_| Halt::Stopped)?,
            // A result that came with the order to stop counts: a commit may be in it.
            recv(self.control.stop_signal()) -> _ => {
                result.try_recv().map_err(|_| Halt::Stopped)?
            }
        };
        Ok(value)
    }

    /// Pauses the guest, saves its state, lets `last_pages` capture the rest, and resumes it.
    ///
    /// The order is: kick, complete pending exits and drain devices (the guest's `pause`); save
    /// state; last pages; the caller's hook; resume. State comes before pages, because saving it
    /// may write guest memory. Whatever happens, the guest runs when this returns.
    pub(crate) fn in_pause(
        &mut self,
        last_pages: impl FnOnce(&mut Self) -> Result<(), Halt>,
    ) -> Result<PauseOutcome, Halt> {
        self.job.enter(Phase::Pausing)?;
        self.statistics.live_us = micros(self.control.started.elapsed());
        self.lease.beat_before("the guest's state is saved");
        let pause = self.lease.pause()?;
        let moment = Timestamp::now();
        let mut downtime = Downtime {
            kick_us: micros(pause.timing.kick),
            quiesce_us: micros(pause.timing.quiesce),
            ..Downtime::default()
        };
        let saving = Instant::now();
        let sections = self.guest.save_state();
        let sections = sections.map_err(CheckpointError::guest("save the guest's state"))?;
        downtime.state_us = micros(saving.elapsed());
        self.lease.beat_before("the last pages are captured");
        let capturing = Instant::now();
        last_pages(self)?;
        downtime.last_pages_us = micros(capturing.elapsed());
        if let Some(disks) = &self.disks {
            disks.begin();
        }
        let hook = self.run_hook();
        let times = PauseTimes {
            started: pause.started,
            resuming: Instant::now(),
            hook,
        };
        pause.end()?;
        if let Some(disks) = &mut self.disks {
            disks.go();
        }
        downtime.hook_us = micros(hook);
        self.statistics.downtime = downtime;
        self.pause = Some(times);
        self.finish_downtime(Instant::now());
        Ok(PauseOutcome { sections, moment })
    }

    /// Takes the end of the pause from the vCPUs. They know better than this thread, which may have
    /// lost its turn when they went on.
    fn ask_vcpus(&mut self) {
        /// Later than this it was not our resume that they waited for: a user held them as well.
        const LATE: Duration = Duration::from_secs(1);
        let (Some(times), Some(resumed)) = (self.pause, self.guest.last_resumed()) else {
            return;
        };
        if (times.resuming..times.resuming + LATE).contains(&resumed) {
            self.finish_downtime(resumed);
        }
    }

    /// Computes how long the pause was that ended with `resumed`.
    fn finish_downtime(&mut self, resumed: Instant) {
        let Some(times) = self.pause else {
            return;
        };
        let downtime = &mut self.statistics.downtime;
        downtime.resume_us = micros(resumed.saturating_duration_since(times.resuming));
        let paused = resumed.saturating_duration_since(times.started);
        downtime.total_us = micros(paused.saturating_sub(times.hook));
    }

    fn run_hook(&self) -> Duration {
        let Some(hook) = &self.options.at_pause else {
            return Duration::ZERO;
        };
        self.lease.beat_before("the caller's hook runs");
        let began = Instant::now();
        hook(self.guest.as_ref());
        self.lease.beat();
        began.elapsed()
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
