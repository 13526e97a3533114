//! A domain in this process: its definition, its machine, its checkpoints.

use std::fmt;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::checkpoint::{self, Chain, Workspace};
use crate::domain::{
    DomainConfig, DomainError, DomainName, HostInterface, HostPath, Interface, KernelCmdline,
    LiveInfo, MemorySize, XmlView,
};
use crate::guest::{Guest, ImageFormat};
use crate::host::control::protocol::{DiskUse, InterfaceUse, JobId, Status};
use crate::host::convert::machine_spec;
use crate::host::dirty_rate::DirtyRateMeter;
use crate::host::disks::{self, DiskRestore};
use crate::host::files::{WhenOpen, images_directory, make_images_directory};
use crate::host::image::default_threads;
use crate::host::periodic::{self, Plan, Reports};
use crate::host::watch::Watchers;
use crate::host::{
    CheckpointRequest, DirtyRateRequest, DomainEvents, EndReason, FinalState, Happening, HostError,
    Image, Job, MachineState, RewindSummary, RuntimeDir, SharedMemory, Watch,
};
use crate::host::{lazy, rewind};
use crate::kvmstate::ClockPolicy;
use crate::machine::{self, Machine};
use crate::restore::eager;
use crate::store::{FileStorage, ImageReader};
use crate::sys::lock::LockFile;

/// Most threads that read an image: beyond it memory and disk are the limit.
const RESTORE_THREADS_MAX: usize = 8;

/// Images of a chain that is cut to a few are needed by at least so many after them: with less,
/// each would be nearly whole.
const SPAN_MIN: u32 = 8;

/// A guest that is part of the program: `<kernel>builtin:NAME</kernel>`.
#[derive(Clone, Copy, Debug)]
pub struct BuiltinKernel {
    /// What the XML calls it.
    pub name: &'static str,
    /// Its ELF file.
    pub elf: &'static [u8],
}

/// What a domain needs of the program that runs it.
#[derive(Clone, Debug)]
pub struct DomainOptions {
    /// Where locks are, and the control socket if there is one.
    pub runtime: RuntimeDir,
    /// Guests that are part of the program.
    pub builtin_kernels: Vec<BuiltinKernel>,
    /// The domain's number among those that run; the process's own where there is none.
    pub id: Option<u32>,
    /// What reads and writes disks of format qcow2; `None`: nothing can.
    pub qcow2: Option<&'static dyn ImageFormat>,
    /// Connected stream sockets that the first serial ports are served at, in place of what the
    /// XML says of them.
    pub consoles: Vec<Arc<OwnedFd>>,
    /// What is done once all that the machine needs of the host is open and locked, before it has
    /// a thread: to give up the right to open more. Done again where a domain is started again.
    pub when_open: Option<WhenOpen>,
}

impl DomainOptions {
    /// Makes options with no built-in guests.
    pub fn new(runtime: RuntimeDir) -> Self {
        Self {
            runtime,
            builtin_kernels: Vec::new(),
            id: None,
            qcow2: None,
            consoles: Vec::new(),
            when_open: None,
        }
    }
}

/// How an image is restored.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct RestoreOptions {
    /// Threads that read and check the image.
    pub threads: usize,
    /// What becomes of the time since the checkpoint.
    pub clock: ClockPolicy,
    /// Another name, and with it a new UUID: so that several domains can run from one image.
    pub new_name: Option<String>,
    /// Another document than the image's, of the same domain and to its guest the same machine.
    pub domain_xml: Option<String>,
    /// Where the image's disks are written to.
    pub disks: DiskRestore,
    /// Whether the guest's writes are tracked from its first one on, so that the first incremental
    /// checkpoint has only what was written since the image.
    pub track: bool,
    /// Whether the guest runs at once, and its memory comes as it is touched.
    pub lazy: bool,
    /// The image's memory, where others start from it too: pages are shared until they are written.
    pub shared: Option<SharedMemory>,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self {
            threads: default_threads(RESTORE_THREADS_MAX),
            clock: ClockPolicy::Continue,
            new_name: None,
            domain_xml: None,
            disks: DiskRestore::InPlace,
            track: false,
            lazy: false,
            shared: None,
        }
    }
}

/// What people and programs wrote into a running domain's document; the machine does not change.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DomainTexts {
    /// `<title>`.
    pub title: Option<String>,
    /// `<description>`.
    pub description: Option<String>,
    /// `<metadata>`, its own tags included.
    pub metadata: Option<String>,
}

/// Changes to a domain's XML.
#[derive(Clone, Debug, Default)]
pub struct DomainChanges {
    /// Another command line for the kernel.
    pub cmdline: Option<String>,
    /// Another size of memory.
    pub memory_bytes: Option<u64>,
}

/// A domain that this process runs. Every method may be called from any thread.
///
/// Dropping it destroys a machine that runs.
pub struct Domain {
    config: DomainConfig,
    options: DomainOptions,
    inner: Mutex<Inner>,
    // Buffers that one checkpoint leaves for the next.
    workspace: Workspace,
    // Of incremental checkpoints.
    chain: Chain,
    dirty_rate: DirtyRateMeter,
    watchers: Arc<Watchers>,
    /// The domain that was saved, where this one has another identity.
    origin: Option<Uuid>,
    /// The checkpoints at an interval that its document asks for, and what came of them.
    periodic: Option<Plan>,
    reports: Reports,
}

struct Inner {
    machine: Option<Arc<Machine>>,
    /// It is being put back to an image.
    rewinding: bool,
    /// Held from the start, or the restore, until the machine ends or starts again.
    locks: Option<Locks>,
    jobs: Vec<Job>,
    /// Changes to what the document says besides the machine.
    texts: Option<DomainTexts>,
}

/// What keeps two processes from running one domain.
struct Locks {
    _uuid: LockFile,
    _name: LockFile,
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

impl Domain {
    /// Makes a domain from XML. Nothing is allocated or locked until [`Domain::start`].
    pub fn define(xml: &str, options: DomainOptions) -> Result<Self, HostError> {
        let (config, notes) = DomainConfig::parse_with_notes(xml).map_err(refused)?;
        for note in notes {
            log::info!(
                "line {}: {}: {}",
                note.place.line,
                note.place.element,
                note.text
            );
        }
        // What the machine cannot do is told now rather than at the start.
        let mut spec = machine_spec(&config, &options.builtin_kernels, options.qcow2)?;
        options.attach_consoles(&mut spec)?;
        let periodic = Plan::of(&config)?;
        Ok(Self::new(config, options, periodic, None, None))
    }

    /// Makes a domain from an image, with its memory filled; [`Domain::start`] lets it run on.
    ///
    /// Says what this host lacks before anything is allocated. Blocks while the image is read.
    pub fn restore(
        image: &Path,
        restore: &RestoreOptions,
        options: DomainOptions,
    ) -> Result<Self, HostError> {
        let mut image = Image::open(image)?;
        image.check_host()?;
        let chain = Chain::default();
        if restore.track {
            image.keep_leaves(chain.leaves());
        }
        let reader = image.reader();
        let mut config = match &restore.domain_xml {
            Some(xml) => image.check_document(xml)?,
            None => parse(image.domain_xml())?,
        };
        if let Some(name) = &restore.new_name {
            let invalid = |error: crate::domain::ValueError| HostError::Invalid(error.to_string());
            config.name = DomainName::new(name).map_err(invalid)?;
            config.uuid = Uuid::new_v4();
            let interfaces = config.machine.devices.pci.interfaces_mut();
            interfaces.for_each(Interface::renew);
        }
        let mut periodic = Plan::of(&config)?;
        if periodic.is_some() && config.uuid != reader.manifest().guest.uuid {
            log::warn!(
                "domain {}: no periodic checkpoints, since they are another domain's",
                config.name.as_str()
            );
            periodic = None;
        }
        let locks = Locks::acquire(&config, &options.runtime)?;
        // Last before the machine, which locks them: what can be refused has been.
        disks::restore(reader, &mut config, &restore.disks, options.qcow2)?;
        let mut spec = machine_spec(&config, &options.builtin_kernels, options.qcow2)?;
        options.attach_consoles(&mut spec)?;
        let images = periodic.as_ref().map(Plan::directory);
        options.attach_when_open(&mut spec, Some(reader), images);
        spec.clock.after_restore = restore.clock;
        if restore.lazy && restore.shared.is_none() {
            let reader = Arc::new(image.into_reader());
            let machine = lazy::restore(&reader, spec, restore.track)?;
            let domain = Self::new(config, options, periodic, Some(machine), Some(locks));
            return Ok(domain.restored_from(reader, restore, chain));
        }
        let state = reader.sections()?;
        let unfilled = if let Some(shared) = &restore.shared {
            shared.build(reader, &config, spec)?
        } else {
            let unfilled = Machine::build_for_restore(spec)?;
            let fill = eager::FillOptions {
                threads: restore.threads,
                memory_is_fresh: true,
            };
            eager::fill(reader, unfilled.regions(), &fill)?;
            unfilled
        };
        let machine = if restore.track {
            unfilled.finish_tracked(state)?
        } else {
            unfilled.finish(state)?
        };
        let reader = Arc::new(image.into_reader());
        let machine = Arc::new(machine);
        let domain = Self::new(config, options, periodic, Some(machine), Some(locks));
        Ok(domain.restored_from(reader, restore, chain))
    }

    /// Makes the image that the domain's machine comes from known to it.
    fn restored_from(
        mut self,
        image: Arc<ImageReader>,
        restore: &RestoreOptions,
        chain: Chain,
    ) -> Self {
        self.origin = Some(image.manifest().guest.uuid);
        let machine = self.lock().machine.clone();
        if let Some(guest) = machine.filter(|_| restore.track) {
            let guest: Arc<dyn Guest> = guest;
            chain.adopt(&guest, image);
            self.chain = chain;
        }
        self
    }

    fn new(
        config: DomainConfig,
        options: DomainOptions,
        periodic: Option<Plan>,
        machine: Option<Arc<Machine>>,
        locks: Option<Locks>,
    ) -> Self {
        let watchers = Arc::new(Watchers::new());
        if let Some(machine) = &machine {
            watch(machine, &watchers);
        }
        Self {
            config,
            options,
            watchers,
            inner: Mutex::new(Inner {
                machine,
                rewinding: false,
                locks,
                jobs: Vec::new(),
                texts: None,
            }),
            workspace: Workspace::default(),
            chain: Chain::default(),
            dirty_rate: DirtyRateMeter::default(),
            origin: None,
            periodic,
            reports: Reports::default(),
        }
    }

    /// Returns the checkpoints at an interval that the document asks for.
    pub(super) fn periodic_plan(&self) -> Option<&Plan> {
        self.periodic.as_ref()
    }

    /// Returns where is said what came of them.
    pub(super) fn periodic_reports(&self) -> &Reports {
        &self.reports
    }

    /// Returns the domain's name.
    pub fn name(&self) -> &str {
        self.config.name.as_str()
    }

    /// Returns the domain's UUID.
    pub fn uuid(&self) -> Uuid {
        self.config.uuid
    }

    /// Lets the machine run, or only makes it ready if `paused`. A machine that has ended is made
    /// anew. Fails where another process runs the domain, and says which.
    pub fn start(&self, paused: bool) -> Result<(), HostError> {
        let mut inner = self.lock();
        let restored = inner
            .machine
            .as_ref()
            .filter(|machine| machine.state() == machine::MachineState::Created)
            .cloned();
        if restored.is_none()
            && inner
                .machine
                .as_ref()
                .is_some_and(|machine| !machine.state().has_ended())
        {
            return Err(HostError::State {
                state: self.state_in(&inner).to_string(),
                wanted: "it must be shut off to be started",
            });
        }
        if inner.locks.is_none() {
            inner.locks = Some(Locks::acquire(&self.config, &self.options.runtime)?);
        }
        let machine = match restored {
            Some(machine) => machine,
            None => {
                // Or it would keep the last machine, and what that has open.
                self.dirty_rate.stop();
                let options = &self.options;
                let mut spec = machine_spec(&self.config, &options.builtin_kernels, options.qcow2)?;
                self.options.attach_consoles(&mut spec)?;
                let images = self.periodic.as_ref().map(Plan::directory);
                self.options.attach_when_open(&mut spec, None, images);
                let machine = Arc::new(Machine::build(spec)?);
                watch(&machine, &self.watchers);
                machine
            }
        };
        inner.machine = Some(machine.clone());
        machine.start(paused)?;
        Ok(())
    }

    /// Stops the vCPUs until [`Domain::resume`]; on return none runs.
    pub fn pause(&self) -> Result<(), HostError> {
        Ok(self.machine()?.pause_by_user()?)
    }

    /// Undoes [`Domain::pause`].
    pub fn resume(&self) -> Result<(), HostError> {
        Ok(self.machine()?.resume_by_user()?)
    }

    /// Presses the power button: the guest decides.
    pub fn shutdown(&self) -> Result<(), HostError> {
        if !self.machine()?.shutdown()? {
            log::info!(
                "domain {}: the guest does not listen to its power button",
                self.name()
            );
        }
        Ok(())
    }

    /// Resets the machine, as its reset button would.
    pub fn reset(&self) -> Result<(), HostError> {
        Ok(self.machine()?.reset()?)
    }

    /// Gives each vCPU a non-maskable interrupt. Waits for a checkpoint's pause to end.
    pub fn inject_nmi(&self) -> Result<(), HostError> {
        Ok(self.machine()?.inject_nmi()?)
    }

    /// Ends the machine at once. A checkpoint that runs fails. Blocks until the vCPUs have ended.
    pub fn destroy(&self) -> Result<(), HostError> {
        let machine = self.machine()?;
        if machine.state().has_ended() {
            return Err(HostError::State {
                state: self.state().to_string(),
                wanted: "it must run to be destroyed",
            });
        }
        machine.destroy();
        Ok(())
    }

    /// Returns what the machine is doing.
    pub fn state(&self) -> MachineState {
        self.state_in(&self.lock())
    }

    fn state_in(&self, inner: &Inner) -> MachineState {
        inner
            .machine
            .as_ref()
            .map_or(MachineState::Created, |machine| (&machine.state()).into())
    }

    /// Waits until the machine has ended and says how.
    pub fn wait(&self) -> Result<EndReason, HostError> {
        let end = self.wait_timeout(None)?;
        Ok(end.expect("a wait without a limit ends with the machine"))
    }

    /// Waits until the machine has ended, but no longer than `timeout`; `None` where it still runs
    /// then.
    pub fn wait_timeout(&self, timeout: Option<Duration>) -> Result<Option<EndReason>, HostError> {
        let state = self.machine()?.wait(timeout);
        let Some(end) = EndReason::of(&state) else {
            return Ok(None);
        };
        self.dirty_rate.stop();
        // Others may run it now.
        self.lock().locks = None;
        Ok(Some(end))
    }

    /// Returns where each console can be reached, for those that have a path: serial ports, then
    /// virtio consoles.
    pub fn consoles(&self) -> Vec<PathBuf> {
        self.lock()
            .machine
            .as_ref()
            .map_or_else(Vec::new, |machine| {
                let serial = machine.consoles().into_iter().map(|console| console.path);
                serial.chain(machine.virtio_consoles()).flatten().collect()
            })
    }

    /// Returns the domain in figures.
    pub fn status(&self) -> Status {
        let inner = self.lock();
        let job = inner.jobs.last().filter(|job| !job.is_done());
        let job = job.map(|job| JobId { job: job.id() });
        let state = self.state_in(&inner);
        let machine = inner.machine.as_ref();
        let disks = machine.map(|machine| disks_of(machine));
        let interfaces = machine.map(|machine| interfaces_of(machine));
        let given_bytes = machine.and_then(|machine| machine.given_bytes());
        let memory_use = machine.and_then(|machine| machine.memory_use());
        drop(inner);
        Status {
            name: self.name().to_owned(),
            uuid: self.uuid(),
            id: Some(self.id()),
            pid: std::process::id(),
            state,
            vcpus: u32::from(self.config.machine.vcpus.count()),
            memory_bytes: self.config.machine.memory.size().bytes(),
            given_bytes,
            memory_use,
            consoles: self.consoles(),
            disks: disks.unwrap_or_default(),
            interfaces: interfaces.unwrap_or_default(),
            periodic: periodic::read(&self.reports),
            job,
            dirty_rate: self.dirty_rate.status(),
        }
    }

    /// Returns the domain's number among those that run.
    pub fn id(&self) -> u32 {
        self.options.id.unwrap_or_else(std::process::id)
    }

    /// Asks the guest to use `bytes` of its memory, and give the rest back by its balloon. The guest
    /// decides whether, and takes its time: [`Domain::status`] says how much it has given.
    pub fn set_memory(&self, bytes: u64) -> Result<(), HostError> {
        let machine = self.machine()?;
        let all = self.config.machine.memory.size().bytes();
        let Some(given) = all.checked_sub(bytes) else {
            return Err(HostError::Invalid(format!(
                "{bytes} bytes are more than the {all} bytes of the domain's memory"
            )));
        };
        needs_balloon(machine.ask_for_memory(given))
    }

    /// Asks the guest at once, and then every `period`, how it uses its memory, which its balloon's
    /// driver knows; [`Domain::status`] has its latest answer. Never where `period` is zero.
    pub fn ask_for_memory_use_every(&self, period: Duration) -> Result<(), HostError> {
        needs_balloon(self.machine()?.ask_for_memory_use_every(period))
    }

    /// Replaces what the document says besides the machine. Images keep what it was made with.
    pub fn set_texts(&self, texts: DomainTexts) -> Result<(), HostError> {
        let mut config = self.config.clone();
        config
            .set_texts(
                texts.title.as_deref(),
                texts.description.as_deref(),
                texts.metadata.as_deref(),
            )
            .map_err(|error| HostError::Invalid(error.to_string()))?;
        self.lock().texts = Some(texts);
        Ok(())
    }

    /// Returns the events of the domain from now on, after what it is doing now.
    pub fn events(&self) -> Result<(MachineState, DomainEvents), HostError> {
        let machine = self.machine()?;
        let events = DomainEvents(self.watch()?);
        Ok(((&machine.state()).into(), events))
    }

    /// Returns a watch for what happens to the domain from now on, also before its start and over
    /// its restarts. Unlike [`Domain::events`] it tells of checkpoints too.
    pub fn watch(&self) -> Result<Watch, HostError> {
        self.watchers.watch().map_err(|source| HostError::Resource {
            what: "an eventfd",
            source,
        })
    }

    /// Returns how the machine has ended, if it has.
    pub fn final_state(&self) -> Option<FinalState> {
        let inner = self.lock();
        FinalState::of(&inner.machine.as_ref()?.state())
    }

    /// Returns the domain in figures, as JSON.
    pub fn status_json(&self) -> String {
        serde_json::to_string_pretty(&self.status()).expect("a status is plain data")
    }

    /// Returns the domain's XML as it runs.
    pub fn xml(&self) -> String {
        let inner = self.lock();
        let mut config = self.config.clone();
        if let Some(texts) = &inner.texts {
            config
                .set_texts(
                    texts.title.as_deref(),
                    texts.description.as_deref(),
                    texts.metadata.as_deref(),
                )
                .expect("checked when they were set");
        }
        let Some(machine) = inner
            .machine
            .as_ref()
            .filter(|machine| !machine.state().has_ended())
        else {
            return config.to_xml(XmlView::Inactive);
        };
        let ptys = machine
            .consoles()
            .into_iter()
            .map(|console| HostPath::new(console.path?.to_str()?).ok())
            .collect();
        let console_ptys = machine
            .virtio_consoles()
            .into_iter()
            .map(|path| HostPath::new(path?.to_str()?).ok())
            .collect();
        let nets = machine.nets().iter();
        let taps = nets
            .map(|net| HostInterface::new(net.interface()?).ok())
            .collect();
        config.to_xml(XmlView::Live(&LiveInfo {
            id: self.id(),
            ptys,
            console_ptys,
            taps,
            given_kib: machine.given_bytes().unwrap_or(0) / 1024,
            statistics_period_s: machine.memory_use_period().map_or(0, |period| {
                u32::try_from(period.as_secs()).unwrap_or(u32::MAX)
            }),
        }))
    }

    /// Starts a checkpoint; the domain runs on. One at a time.
    pub fn start_checkpoint(&self, request: &CheckpointRequest) -> Result<Job, HostError> {
        let machine = self.machine()?;
        let out = match &request.out {
            Some(out) if out.is_absolute() => out.clone(),
            Some(out) => {
                let path = out.display();
                return Err(HostError::Invalid(format!(
                    "{path} is not an absolute path"
                )));
            }
            None => default_directory(self.name())?,
        };
        let mut inner = self.lock();
        inner.refuse_busy()?;
        self.dirty_rate.stop();
        let guest: Arc<dyn Guest> = machine;
        let mut options = request.engine_options(self.workspace.clone());
        options.chain = request.incremental.then(|| self.chain.clone());
        options.keep = request.keep;
        options.span = request.keep.map(|keep| keep.max(SPAN_MIN));
        if options.chain.is_none() {
            // Two cannot use the guest's dirty log: the next incremental image is whole.
            self.chain.end();
        }
        let started = checkpoint::start(guest, Arc::new(FileStorage), &out, options)?;
        let id = inner.jobs.last().map_or(1, |job| job.id() + 1);
        let job = Job::new(id, started);
        // Only the last job is ever asked for again; older ones would keep their results for ever.
        inner.jobs = vec![job.clone()];
        drop(inner);
        self.watchers
            .tell(None, Happening::CheckpointStarted { job: id });
        let watchers = self.watchers.clone();
        job.when_ended(move |failure| {
            watchers.tell(None, Happening::CheckpointEnded { job: id, failure });
        });
        Ok(job)
    }

    /// Begins to measure how fast the domain writes its memory; [`Domain::status`] has what comes of
    /// it. Refused while a checkpoint runs, and where the next one is to have only what was written
    /// since the last; a checkpoint that is started meanwhile ends the measurement.
    pub fn measure_dirty_rate(&self, request: DirtyRateRequest) -> Result<(), HostError> {
        let machine = self.machine()?;
        // Held until the log is the measurement's.
        let inner = self.lock();
        inner.refuse_busy()?;
        if machine.state().has_ended() {
            return Err(HostError::State {
                state: self.state_in(&inner).to_string(),
                wanted: "it must run to be measured",
            });
        }
        if self.chain.parent().is_some() {
            return Err(HostError::Tracked);
        }
        self.dirty_rate.start(machine, request)
    }

    /// Puts the domain back to the image at `to`, or to the last of its incremental checkpoints, in
    /// place: memory that has not changed since is kept where the domain's writes are tracked.
    ///
    /// What is refused, and an image that is found damaged, leaves the domain as it was. Blocks until
    /// it goes on. No checkpoint of it may run, and none can be started meanwhile.
    pub fn rewind(&self, to: Option<&Path>) -> Result<RewindSummary, HostError> {
        let machine = self.machine()?;
        let guest: Arc<dyn Guest> = machine.clone();
        self.lock().begin_rewind()?;
        self.dirty_rate.stop();
        let _ends = RewindEnds(self);
        let image = rewind::find(to, &self.chain, &guest)?;
        let uuids = [Some(self.uuid()), self.origin];
        let uuids: Vec<Uuid> = uuids.into_iter().flatten().collect();
        rewind::check(&image, &uuids)?;
        disks::check_read_only_disks(&image, &self.config, self.options.qcow2)?;
        let threads = default_threads(RESTORE_THREADS_MAX);
        rewind::rewind(&machine, &self.chain, &image, threads)
    }

    /// Returns the last job, if it has this number.
    pub fn job(&self, id: u64) -> Result<Job, HostError> {
        let inner = self.lock();
        let found = inner.jobs.iter().find(|job| job.id() == id).cloned();
        found.ok_or(HostError::NoSuchJob { job: id })
    }

    /// Returns the name of the domain that `xml` describes.
    pub fn name_in(xml: &str) -> Result<String, HostError> {
        Ok(parse(xml)?.name.as_str().to_owned())
    }

    /// Returns the memory of the domain that `xml` describes, in bytes.
    pub fn memory_bytes_in(xml: &str) -> Result<u64, HostError> {
        Ok(parse(xml)?.machine.memory.size().bytes())
    }

    /// Returns the name and the XML of a domain with `changes`.
    pub fn changed(xml: &str, changes: &DomainChanges) -> Result<(String, String), HostError> {
        let mut config = parse(xml)?;
        let invalid = |error: crate::domain::ValueError| HostError::Invalid(error.to_string());
        if let Some(cmdline) = &changes.cmdline {
            config.machine.boot.cmdline = KernelCmdline::new(cmdline).map_err(invalid)?;
        }
        if let Some(bytes) = changes.memory_bytes {
            let size = MemorySize::from_bytes(bytes).map_err(invalid)?;
            config.machine.memory = config.machine.memory.with_size(size).map_err(invalid)?;
        }
        Ok((
            config.name.as_str().to_owned(),
            config.to_xml(XmlView::Inactive),
        ))
    }

    /// Returns the machine, which must have been started and not have ended.
    pub(super) fn machine(&self) -> Result<Arc<Machine>, HostError> {
        let inner = self.lock();
        inner.machine.clone().ok_or_else(|| HostError::State {
            state: MachineState::Created.to_string(),
            wanted: "it must be started first",
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Every change is one assignment, so a panic leaves nothing half-changed.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Fails while a checkpoint or a rewind is under way.
    fn refuse_busy(&self) -> Result<(), HostError> {
        if self.rewinding {
            return Err(HostError::Rewinding);
        }
        match self.jobs.last().filter(|job| !job.is_done()) {
            Some(job) => Err(HostError::JobRunning { job: job.id() }),
            None => Ok(()),
        }
    }

    fn begin_rewind(&mut self) -> Result<(), HostError> {
        self.refuse_busy()?;
        self.rewinding = true;
        Ok(())
    }
}

/// Ends a rewind, whatever comes of it.
struct RewindEnds<'a>(&'a Domain);

impl Drop for RewindEnds<'_> {
    fn drop(&mut self) {
        self.0.lock().rewinding = false;
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        if let Some(machine) = self.lock().machine.take() {
            machine.destroy();
        }
        self.watchers.end();
    }
}

impl Locks {
    fn acquire(config: &DomainConfig, runtime: &RuntimeDir) -> Result<Self, HostError> {
        let uuid = LockFile::acquire(
            &runtime.uuid_lock(config.uuid),
            &format!("the domain with UUID {}", config.uuid),
        )?;
        let name = config.name.as_str();
        let by_name = LockFile::acquire(
            &runtime.name_lock(name),
            &format!("the domain name {name:?}"),
        )?;
        Ok(Self {
            _uuid: uuid,
            _name: by_name,
        })
    }
}

/// Tells the watchers what happens to a machine.
fn watch(machine: &Machine, watchers: &Arc<Watchers>) {
    let watchers = watchers.clone();
    machine.listen(Box::new(move |event| {
        let (state, what) = Happening::of(event);
        watchers.tell(state, what);
        true
    }));
}

fn needs_balloon(has: bool) -> Result<(), HostError> {
    let why = "the domain has no balloon: <memballoon model='virtio'/> makes one";
    has.then_some(())
        .ok_or_else(|| HostError::Unsupported(why.to_owned()))
}

fn disks_of(machine: &Machine) -> Vec<DiskUse> {
    let disks = machine.disks().iter();
    disks
        .map(|disk| {
            let counters = disk.counters();
            let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
            DiskUse {
                target: disk.name().to_owned(),
                reads: read(&counters.reads),
                read_bytes: read(&counters.read_bytes),
                writes: read(&counters.writes),
                written_bytes: read(&counters.written_bytes),
                flushes: read(&counters.flushes),
                errors: read(&counters.errors),
                read_ns: read(&counters.read_ns),
                write_ns: read(&counters.write_ns),
                flush_ns: read(&counters.flush_ns),
            }
        })
        .collect()
}

fn interfaces_of(machine: &Machine) -> Vec<InterfaceUse> {
    let nets = machine.nets().iter();
    nets.map(|net| {
        let counters = net.counters();
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let [a, b, c, d, e, f] = net.mac();
        InterfaceUse {
            mac: format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"),
            tap: net.interface().map(str::to_owned),
            received: read(&counters.received),
            received_bytes: read(&counters.received_bytes),
            received_dropped: read(&counters.received_dropped),
            sent: read(&counters.sent),
            sent_bytes: read(&counters.sent_bytes),
            sent_errors: read(&counters.sent_errors),
            sent_dropped: read(&counters.sent_dropped),
        }
    })
    .collect()
}

pub(super) fn parse(xml: &str) -> Result<DomainConfig, HostError> {
    DomainConfig::parse(xml).map_err(refused)
}

fn refused(source: DomainError) -> HostError {
    HostError::Domain {
        path: None,
        source: Box::new(source),
    }
}

/// Returns the directory of a domain's own images, and makes it.
fn default_directory(name: &str) -> Result<PathBuf, HostError> {
    let dir = images_directory(name)?;
    make_images_directory(&dir)?;
    Ok(dir)
}
