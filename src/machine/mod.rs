//! Virtual machines on KVM.
//!
//! [`Machine::build`] makes one from a [`MachineSpec`]; [`Machine::build_for_restore`] makes one
//! whose memory the caller fills before it gets a saved state. A [`Machine`] is a
//! [`Guest`](crate::guest::Guest) for the checkpoint engine.
//!
//! Threads: one for each vCPU (`lvp-vcpu-0`), one for each serial port that waits for something
//! (`lvp-serial-0`), one for each
//! virtio device (`lvp-blk-vda`), and a supervisor that carries out what the guest asks for. All of them end
//! with the machine, have every signal blocked, and install no handler.

pub mod acpi;
pub mod boot;
mod build;
pub mod bus;
pub mod cpuid;
pub mod device;
mod exclusion;
mod firmware;
mod guest;
mod lifecycle;
pub mod memory;
mod opened;
pub mod pci;
mod rewind;
mod shared;
mod smbios;
pub mod spec;
mod vcpu;
pub mod virtio;

use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::Receiver;

use crate::guest::{GateTimeout, HostWrites, MemoryFill, MemoryRegion};
use crate::kvmstate::{self, KvmStateError};
use crate::state::{StateError, StateSet};
use crate::sys::kvm_run::VcpuRun;
use crate::sys::sigmask::SignalsBlocked;
use boot::BootError;
use cpuid::CpuidError;
use device::{BackendError, DrainTimeout};
use memory::MemoryError;
use shared::{Asked, Shared};
use spec::MachineSpec;
use virtio::DeviceError;
use virtio::blk::{Disk, DiskError};
use virtio::net::{Net, NetError};

pub use build::open_kvm;
pub use lifecycle::{EventListener, MachineEvent, MachineState, ShutoffReason, WrongState};
pub use rewind::{MemoryFailure, MemoryRewind, Reuse};
pub use virtio::balloon::{GuestMemoryUse, MemoryFigure};

/// A machine that cannot be built, or cannot do what was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// KVM is not there.
    #[error("could not open /dev/kvm: {hint}")]
    NoKvm {
        /// What may help.
        hint: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// KVM is too old.
    #[error("this kernel's KVM lacks {capability}")]
    MissingCapability {
        /// Name of the capability.
        capability: &'static str,
    },
    /// A call to KVM failed.
    #[error("could not {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// KVM's reason.
        #[source]
        source: io::Error,
    },
    /// Something of the spec is out of range.
    #[error("the machine cannot have {what}")]
    Spec {
        /// What it is.
        what: String,
    },
    /// There is no kernel to start, or to start over with.
    #[error("the machine has no kernel to start")]
    NothingToBoot,
    /// A thread could not be started.
    #[error("could not start a thread")]
    Thread(#[source] io::Error),
    /// The saved state is of another machine.
    #[error("the saved state is of another machine: {what}")]
    OtherMachine {
        /// What differs.
        what: String,
    },
    /// Guest memory could not be made.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel could not be loaded.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// The CPU cannot be shown.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// A serial port's backend could not be opened.
    #[error("serial port {port}")]
    Serial {
        /// Number of the port.
        port: u32,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// A virtio console's backend could not be opened.
    #[error("the console in PCI slot {slot:#04x}")]
    Console {
        /// Its slot.
        slot: u8,
        /// Why.
        #[source]
        source: BackendError,
    },
    /// A disk could not be opened.
    #[error("disk {name}")]
    Disk {
        /// Its name in the guest.
        name: String,
        /// Why.
        #[source]
        source: DiskError,
    },
    /// A network device could not be opened.
    #[error("network device {name}")]
    Net {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: NetError,
    },
    /// What was to be done once everything was open failed.
    #[error("could not confine the process")]
    NotConfined(#[source] io::Error),
    /// A device could not be made.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A state could not be read or set.
    #[error(transparent)]
    KvmState(#[from] KvmStateError),
    /// A section is missing, left over, or does not decode.
    #[error(transparent)]
    State(#[from] StateError),
    /// Memory could not be put back.
    #[error("could not put memory back")]
    Rewind {
        /// Why.
        #[source]
        source: MemoryFailure,
    },
    /// The machine is not in a state where this can be done.
    #[error(transparent)]
    WrongState(#[from] WrongState),
    /// A vCPU did not stop.
    #[error(transparent)]
    Gate(#[from] GateTimeout),
    /// A device did not finish what it had begun.
    #[error(transparent)]
    Drain(#[from] DrainTimeout),
}

impl MachineError {
    fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm {
            what,
            source: io::Error::from_raw_os_error(error.errno()),
        }
    }
}

/// Returns an error and its causes in one line.
pub(crate) fn describe_chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// A serial port as seen from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Console {
    /// Number of the serial port, from 0 for COM1.
    pub port: u32,
    /// The terminal, file or socket of the host, where there is one.
    pub path: Option<PathBuf>,
    /// Bytes of output dropped because their reader did not read.
    pub lost_bytes: u64,
}

/// A virtual machine. Dropping it ends it.
///
/// Every method may be called from any thread; those that change the machine wait for one another.
#[derive(Debug)]
pub struct Machine {
    shared: Arc<Shared>,
    requests: Receiver<Asked>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Machine {
    /// Builds a machine and loads its kernel. Nothing runs before [`Machine::start`].
    pub fn build(spec: MachineSpec) -> Result<Self, MachineError> {
        build::Base::new(spec)?.boot().map(Self::new)
    }

    /// Builds a machine whose memory the caller fills, to be given a saved state.
    pub fn build_for_restore(spec: MachineSpec) -> Result<UnfilledMachine, MachineError> {
        let base = build::Base::new(spec)?;
        Ok(UnfilledMachine { base })
    }

    fn new((shared, requests): (Shared, Receiver<Asked>)) -> Self {
        Self {
            shared: Arc::new(shared),
            requests,
            threads: Mutex::default(),
        }
    }

    /// Starts the vCPUs; `paused` leaves them waiting for [`Machine::resume_by_user`].
    pub fn start(&self, paused: bool) -> Result<(), MachineError> {
        let shared = &self.shared;
        let mut holds = shared.lock_changing();
        let event = if paused {
            MachineEvent::StartedPaused
        } else {
            MachineEvent::Started
        };
        shared.lifecycle.check(&event)?;
        let runs: Vec<VcpuRun> = shared
            .vcpus
            .iter()
            .map(|vcpu| VcpuRun::new(&vcpu.fd, shared.run_page_bytes))
            .collect::<Result<_, _>>()
            .map_err(|source| MachineError::Kvm {
                what: "map a vCPU's page",
                source,
            })?;
        if paused {
            self.hold_for_user(&mut holds)?;
        } else if std::mem::take(&mut holds.devices) {
            shared.devices.release();
        }
        shared.lifecycle.apply(&event)?;
        drop(holds);
        let started = self.spawn_threads(runs);
        if let Err(error) = &started {
            let why = describe_chain(error);
            shared.end(&MachineEvent::Shutoff(ShutoffReason::Failed(why)));
        }
        started
    }

    fn spawn_threads(&self, runs: Vec<VcpuRun>) -> Result<(), MachineError> {
        let mut threads = self.threads.lock().unwrap_or_else(PoisonError::into_inner);
        let _blocked = SignalsBlocked::new();
        let (shared, requests) = (self.shared.clone(), self.requests.clone());
        let supervisor = thread::Builder::new()
            .name("lvp-supervisor".to_owned())
            .spawn(move || shared.supervise(&requests));
        threads.push(supervisor.map_err(MachineError::Thread)?);
        for (place, run) in runs.into_iter().enumerate() {
            let shared = self.shared.clone();
            // Entered here, so that a pause right after the start waits for it.
            self.shared.gate.enter(place);
            let spawned = thread::Builder::new()
                .name(format!("lvp-vcpu-{place}"))
                .spawn(move || vcpu::thread(&shared, &shared.vcpus[place], run));
            match spawned {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    self.shared.gate.leave(place);
                    return Err(MachineError::Thread(error));
                }
            }
        }
        Ok(())
    }

    fn hold_for_user(&self, holds: &mut shared::Holds) -> Result<(), MachineError> {
        self.shared.close_gate()?;
        let held = if holds.devices {
            Ok(())
        } else {
            self.shared.devices.hold()
        };
        holds.devices = held.is_ok();
        let clock = held
            .map_err(MachineError::from)
            .and_then(|()| Ok(kvmstate::save_clock(&self.shared.vm)?));
        match clock {
            Ok(clock) => {
                *self.shared.lock_paused_clock() = Some(clock.guest_ns);
                holds.user = true;
                Ok(())
            }
            Err(error) => {
                if std::mem::take(&mut holds.devices) {
                    self.shared.devices.release();
                }
                self.shared.gate.open();
                Err(error)
            }
        }
    }

    /// Pauses the machine until [`Machine::resume_by_user`]. Its paravirtual clock stands still.
    ///
    /// An engine may checkpoint it meanwhile: its pauses nest in this one.
    pub fn pause_by_user(&self) -> Result<(), MachineError> {
        let mut holds = self.shared.lock_changing();
        self.shared.lifecycle.check(&MachineEvent::Paused)?;
        self.hold_for_user(&mut holds)?;
        self.shared.lifecycle.apply(&MachineEvent::Paused)?;
        Ok(())
    }

    /// Ends the user's pause.
    pub fn resume_by_user(&self) -> Result<(), MachineError> {
        let mut holds = self.shared.lock_changing();
        self.shared.lifecycle.check(&MachineEvent::Resumed)?;
        if let Some(guest_ns) = self.shared.lock_paused_clock().take() {
            kvmstate::set_clock(&self.shared.vm, guest_ns)?;
        }
        self.shared.excuse_pause();
        self.shared.lifecycle.apply(&MachineEvent::Resumed)?;
        holds.user = false;
        if std::mem::take(&mut holds.devices) {
            self.shared.devices.release();
        }
        self.shared.gate.open();
        Ok(())
    }

    /// Presses the power button. Returns whether the guest has asked to be told; one that has
    /// not will not power off.
    pub fn shutdown(&self) -> Result<bool, MachineError> {
        match self.state() {
            MachineState::Running | MachineState::Paused => {
                Ok(self.shared.devices.pm.press_power_button())
            }
            state => Err(WrongState { state }.into()),
        }
    }

    /// Starts the guest over. Waits for an engine's pause to end.
    ///
    /// Where the kernel cannot be loaded again, the machine ends. Where it has none, or a vCPU
    /// does not stop, it goes on.
    pub fn reset(&self) -> Result<(), MachineError> {
        self.shared.reset()
    }

    /// Gives each vCPU a non-maskable interrupt, as a server's button for that does. Waits until no
    /// engine's pause is in force.
    pub fn inject_nmi(&self) -> Result<(), MachineError> {
        let _changing = self.shared.lock_changing();
        match self.state() {
            MachineState::Running | MachineState::Paused => {}
            state => return Err(WrongState { state }.into()),
        }
        self.shared.while_stopped(|| {
            let mut vcpus = self.shared.vcpus.iter();
            vcpus.try_for_each(|vcpu| {
                vcpu.fd.nmi().map_err(|error| MachineError::Kvm {
                    what: "give a vCPU a non-maskable interrupt",
                    source: io::Error::from_raw_os_error(error.errno()),
                })
            })
        })
    }

    /// Ends the machine at once. One that has ended is left as it is.
    ///
    /// An engine that has it paused may still save it, and then resumes it to no effect.
    pub fn destroy(&self) {
        let reason = ShutoffReason::Destroyed;
        self.shared.end(&MachineEvent::Shutoff(reason));
    }

    /// Ends the machine, since something that it needs has failed: `why` is the reason that it gives.
    pub fn fail(&self, why: &str) {
        let reason = ShutoffReason::Failed(why.to_owned());
        self.shared.end(&MachineEvent::Shutoff(reason));
    }

    /// Says what still fills the machine's memory, of which nobody else knows what is missing.
    pub fn set_filling(&self, fill: Arc<dyn MemoryFill>) {
        *self.shared.lock_filling() = Some(fill);
    }

    /// Returns what the machine is doing.
    pub fn state(&self) -> MachineState {
        self.shared.lifecycle.state()
    }

    /// Waits until the machine has ended, or `timeout` has passed; returns its state then.
    pub fn wait(&self, timeout: Option<Duration>) -> MachineState {
        self.shared.lifecycle.wait_for_end(timeout)
    }

    /// Returns the disks.
    pub fn disks(&self) -> &[Arc<Disk>] {
        &self.shared.devices.disks
    }

    /// Returns how many bytes of memory the guest has given back by its balloon; `None` where it
    /// has none.
    pub fn given_bytes(&self) -> Option<u64> {
        let balloon = self.shared.devices.balloon.as_ref();
        balloon.map(|(balloon, _)| balloon.given_bytes())
    }

    /// Asks the guest to give so many bytes of memory back, altogether; false where it has no
    /// balloon. The guest decides whether, and takes its time.
    pub fn ask_for_memory(&self, bytes: u64) -> bool {
        let Some((balloon, device)) = &self.shared.devices.balloon else {
            return false;
        };
        balloon.ask_for(bytes);
        device.notify_config();
        true
    }

    /// Returns how the guest used its memory when it was asked last; `None` where it has no
    /// balloon, or no driver of it that answers.
    pub fn memory_use(&self) -> Option<GuestMemoryUse> {
        let (balloon, _) = self.shared.devices.balloon.as_ref()?;
        balloon.memory_use()
    }

    /// Returns how often the guest is asked for that, zero for never; `None` where it has no
    /// balloon.
    pub fn memory_use_period(&self) -> Option<Duration> {
        let (balloon, _) = self.shared.devices.balloon.as_ref()?;
        Some(balloon.asks_for_use_every())
    }

    /// Asks the guest at once and each time `period` has passed how it uses its memory; never
    /// where it is zero. False where it has no balloon.
    pub fn ask_for_memory_use_every(&self, period: Duration) -> bool {
        let balloon = self.shared.devices.balloon.as_ref();
        balloon
            .map(|(balloon, _)| balloon.ask_for_use_every(period))
            .is_some()
    }

    /// Returns the network devices.
    pub fn nets(&self) -> &[Arc<Net>] {
        &self.shared.devices.nets
    }

    /// Has `listener` told of the events from now on.
    pub fn listen(&self, listener: EventListener) {
        self.shared.lifecycle.listen(listener);
    }

    /// Returns the serial ports.
    pub fn consoles(&self) -> Vec<Console> {
        let ports = &self.shared.devices.serials;
        ports
            .iter()
            .map(|port| Console {
                port: port.number(),
                path: port.path(),
                lost_bytes: port.lost_bytes(),
            })
            .collect()
    }

    /// Returns the terminals, files or sockets of the virtio consoles, for those that have one.
    pub fn virtio_consoles(&self) -> Vec<Option<PathBuf>> {
        let consoles = self.shared.devices.consoles.iter();
        consoles
            .map(|console| console.path().map(Into::into))
            .collect()
    }

    /// Returns what the machine was made from.
    pub fn spec(&self) -> &MachineSpec {
        &self.shared.spec
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.destroy();
        self.shared.quit();
        let threads =
            std::mem::take(&mut *self.threads.lock().unwrap_or_else(PoisonError::into_inner));
        // A pause that nobody ended would keep its threads, and so this one, for ever.
        while self.shared.gate.is_closed() {
            log::error!("the machine is dropped while something has it paused");
            self.shared.gate.open();
        }
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a thread of the machine panicked");
            }
        }
    }
}

/// A machine without memory content and state.
///
/// The caller fills [`UnfilledMachine::regions`], then calls [`UnfilledMachine::finish`]. With
/// memory that is filled on demand, whoever fills it is at work before that call: KVM writes to
/// guest memory in it.
#[derive(Debug)]
pub struct UnfilledMachine {
    base: build::Base,
}

impl UnfilledMachine {
    /// Returns the memory to fill, sorted by frame. It reads zeros.
    pub fn regions(&self) -> &[MemoryRegion] {
        self.base.ram().regions()
    }

    /// Returns the log of what the VMM writes; filling memory need not be marked.
    pub fn host_writes(&self) -> &Arc<HostWrites> {
        self.base.ram().host_writes()
    }

    /// Gives the machine its state; every section of `state` must be used. Start it then.
    pub fn finish(self, state: StateSet) -> Result<Machine, MachineError> {
        self.base.restore(state, false).map(Machine::new)
    }

    /// Like [`UnfilledMachine::finish`], with the dirty log on and every page armed before KVM or a
    /// device writes any: the log has all that the guest's memory comes to differ in from what the
    /// caller filled it with.
    pub fn finish_tracked(self, state: StateSet) -> Result<Machine, MachineError> {
        self.base.restore(state, true).map(Machine::new)
    }
}
