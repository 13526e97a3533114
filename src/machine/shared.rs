//! What the machine's threads share, and what they do to it.

use std::mem;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, TrySendError};
use kvm_ioctls::VmFd;

use super::boot;
use super::bus::Bus;
use super::device::pm::PowerManagement;
use super::device::rtc::Rtc;
use super::device::serial::SerialPort;
use super::device::{Device, DrainTimeout};
use super::exclusion::Exclusion;
use super::firmware::Firmware;
use super::lifecycle::{Lifecycle, MachineEvent, ShutoffReason, WrongState};
use super::memory::GuestRam;
use super::pci::PciBus;
use super::spec::{BootSpec, EndAction, MachineSpec};
use super::vcpu::Vcpu;
use super::virtio::VirtioPci;
use super::virtio::balloon::Balloon;
use super::virtio::blk::Disk;
use super::virtio::console::Console;
use super::virtio::net::Net;
use super::{MachineError, describe_chain};
use crate::guest::{GateTimeout, MemoryFill, VcpuGate};
use crate::kvmstate::{self, Board, KvmDirtyLog, MsrSet, VcpuRestore};
use crate::state::HostFacts;
use crate::state::vcpu::VcpuV1;

/// How long vCPUs may take to stop. On a busy host 0.4 s were seen.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a device may take to finish what it has begun.
pub(super) const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the end of a machine waits for the reader of its last output.
const LAST_OUTPUT_TIMEOUT: Duration = Duration::from_secs(2);

/// What a vCPU asks of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset,
    /// The guest crashed.
    Crash(String),
    /// A thread of the machine cannot go on.
    Fail(String),
    /// The machine is gone; the supervisor ends.
    Quit,
}

/// A request, and how often the machine had started over before it.
#[derive(Clone, Debug)]
pub(super) struct Asked {
    request: Request,
    restarts: u64,
}

/// What the machine is when it starts over.
#[derive(Debug)]
pub(super) struct PowerOn {
    pub vcpus: Vec<VcpuV1>,
    pub board: Board,
}

/// Holds of the gate and of devices that outlive the call that made them, other than the engine's.
#[derive(Debug, Default)]
pub(super) struct Holds {
    /// The user has paused the machine.
    pub user: bool,
    /// The machine has crashed, and is kept.
    pub kept: bool,
    /// The devices on PCI are held: for the user, or because a restored machine has not started.
    pub devices: bool,
}

/// What the machine's threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub spec: MachineSpec,
    // Before the memory: KVM uses that until its VM is gone.
    pub vcpus: Vec<Vcpu>,
    pub dirty_log: KvmDirtyLog,
    pub vm: Arc<VmFd>,
    pub ports: Bus,
    pub mmio: Bus,
    pub devices: Devices,
    pub ram: Arc<GuestRam>,
    pub firmware: Firmware,
    pub gate: VcpuGate,
    pub lifecycle: Lifecycle,
    pub exclusion: Exclusion,
    pub msrs: MsrSet,
    pub facts: HostFacts,
    pub power_on: PowerOn,
    pub kick_signal: i32,
    pub run_page_bytes: usize,
    /// Held by whoever changes the machine: its user, or the supervisor.
    pub changing: Mutex<Holds>,
    /// The guest's clock when its user paused it; `None` while it runs.
    pub paused_clock: Mutex<Option<u64>>,
    /// How many engine pauses are in force; held while devices are paused or resumed.
    pub quiesced: Mutex<u32>,
    stopping: AtomicBool,
    restarts: Mutex<u64>,
    restarted: Condvar,
    requests: Sender<Asked>,
}

/// The machine's devices.
#[derive(Debug)]
pub(super) struct Devices {
    pub serials: Vec<Arc<SerialPort>>,
    pub pm: Arc<PowerManagement>,
    pub rtc: Arc<Rtc>,
    pub pci: Arc<PciBus>,
    pub virtio: Vec<Arc<VirtioPci>>,
    pub disks: Vec<Arc<Disk>>,
    pub nets: Vec<Arc<Net>>,
    pub consoles: Vec<Arc<Console>>,
    /// The balloon, and the device that it is.
    pub balloon: Option<(Arc<Balloon>, Arc<VirtioPci>)>,
}

impl Devices {
    /// Returns all of them, in the order in which they are restored.
    pub(super) fn all(&self) -> impl Iterator<Item = &dyn Device> {
        let serials = self.serials.iter().map(|port| &**port as &dyn Device);
        let board: [&dyn Device; 3] = [&*self.pm, &*self.rtc, &*self.pci];
        serials.chain(board).chain(self.on_pci())
    }

    fn on_pci(&self) -> impl Iterator<Item = &dyn Device> {
        self.virtio.iter().map(|device| &**device as &dyn Device)
    }

    /// Keeps the devices on PCI from disks and networks until [`Devices::release`], whatever else
    /// pauses and resumes them.
    pub(super) fn hold(&self) -> Result<(), DrainTimeout> {
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        self.on_pci().for_each(|device| device.pause());
        let drained = self.on_pci().try_for_each(|device| device.drain(deadline));
        if drained.is_err() {
            self.release();
        }
        drained
    }

    pub(super) fn release(&self) {
        self.on_pci().for_each(|device| device.resume());
    }

    /// Pauses and drains all; on an error they run again.
    pub(super) fn quiesce(&self) -> Result<(), DrainTimeout> {
        let deadline = Instant::now() + DRAIN_TIMEOUT;
        self.all().for_each(|device| device.pause());
        let drained = self.all().try_for_each(|device| device.drain(deadline));
        if drained.is_err() {
            self.resume();
        }
        drained
    }

    pub(super) fn resume(&self) {
        self.all().for_each(|device| device.resume());
    }
}

/// What [`Shared::new`] is given.
pub(super) struct Parts {
    pub spec: MachineSpec,
    pub vcpus: Vec<Vcpu>,
    pub dirty_log: KvmDirtyLog,
    pub vm: Arc<VmFd>,
    pub ports: Bus,
    pub mmio: Bus,
    pub devices: Devices,
    pub ram: Arc<GuestRam>,
    pub firmware: Firmware,
    pub msrs: MsrSet,
    pub facts: HostFacts,
    pub power_on: PowerOn,
    pub kick_signal: i32,
    pub run_page_bytes: usize,
}

impl Shared {
    pub(super) fn new(parts: Parts) -> (Self, Receiver<Asked>) {
        // Each vCPU waits after its request, so that there is room for all of them, and for one
        // from the machine.
        let (requests, receiver) = crossbeam_channel::bounded(2 * parts.vcpus.len() + 2);
        let shared = Self {
            gate: VcpuGate::new(parts.vcpus.len()),
            spec: parts.spec,
            vcpus: parts.vcpus,
            dirty_log: parts.dirty_log,
            vm: parts.vm,
            ports: parts.ports,
            mmio: parts.mmio,
            devices: parts.devices,
            ram: parts.ram,
            firmware: parts.firmware,
            lifecycle: Lifecycle::new(),
            exclusion: Exclusion::default(),
            msrs: parts.msrs,
            facts: parts.facts,
            power_on: parts.power_on,
            kick_signal: parts.kick_signal,
            run_page_bytes: parts.run_page_bytes,
            changing: Mutex::default(),
            paused_clock: Mutex::default(),
            quiesced: Mutex::new(0),
            stopping: AtomicBool::new(false),
            restarts: Mutex::new(0),
            restarted: Condvar::new(),
            requests,
        };
        (shared, receiver)
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn lock_changing(&self) -> MutexGuard<'_, Holds> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops all vCPUs at the gate.
    pub(super) fn close_gate(&self) -> Result<(), GateTimeout> {
        self.gate.close(STOP_TIMEOUT, |place| {
            self.vcpus[place].kick(self.kick_signal);
        })
    }

    pub(super) fn lock_filling(&self) -> MutexGuard<'_, Option<Arc<dyn MemoryFill>>> {
        self.ram.lock_filling()
    }

    /// Returns the guest's clock when its user paused it.
    pub(super) fn lock_paused_clock(&self) -> MutexGuard<'_, Option<u64>> {
        self.paused_clock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes a request to the supervisor; does not block.
    pub(super) fn request(&self, request: Request) {
        self.exclusion.add_request();
        let asked = Asked {
            request,
            restarts: self.restarts(),
        };
        if let Err(TrySendError::Full(asked) | TrySendError::Disconnected(asked)) =
            self.requests.try_send(asked)
        {
            log::warn!(
                "the machine has ended; {:?} is not carried out",
                asked.request
            );
            self.exclusion.end_request();
        }
    }

    /// Returns how often the machine has started over.
    pub(super) fn restarts(&self) -> u64 {
        *self.lock_restarts()
    }

    /// Notes that the guest is another one now: what its vCPUs asked for is void. Called before the
    /// gate opens: what a vCPU asks for from then on is not stale.
    fn note_restart(&self) {
        *self.lock_restarts() += 1;
        self.restarted.notify_all();
    }

    fn lock_restarts(&self) -> MutexGuard<'_, u64> {
        self.restarts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the machine has started over since `before`; false where it ends instead.
    pub(super) fn wait_for_restart(&self, before: u64) -> bool {
        let waits = |restarts: &mut u64| *restarts == before && !self.is_stopping();
        let restarts = self
            .restarted
            .wait_while(self.lock_restarts(), waits)
            .unwrap_or_else(PoisonError::into_inner);
        *restarts != before && !self.is_stopping()
    }

    /// Carries out requests until the machine is gone.
    pub(super) fn supervise(&self, requests: &Receiver<Asked>) {
        for asked in requests {
            let quits = asked.request == Request::Quit;
            // What a guest asked for before it started over, it does not want any more. A thread
            // that is gone does not come back by it.
            let is_stale = asked.restarts != self.restarts();
            if !is_stale || matches!(asked.request, Request::Fail(_)) {
                self.carry_out(asked.request);
            }
            self.exclusion.end_request();
            if quits {
                return;
            }
        }
    }

    fn carry_out(&self, request: Request) {
        let actions = self.spec.lifecycle;
        let (action, reason) = match request {
            Request::PowerOff => (actions.on_poweroff, ShutoffReason::PoweredOff),
            Request::Reset => (actions.on_reboot, ShutoffReason::Reset),
            Request::Crash(why) => {
                log::warn!("{}: {why}", self.spec.name);
                (actions.on_crash, ShutoffReason::Crashed(why))
            }
            Request::Fail(why) => (EndAction::Destroy, ShutoffReason::Failed(why)),
            Request::Quit => return,
        };
        match action {
            EndAction::Destroy => self.end(&MachineEvent::Shutoff(reason)),
            EndAction::Preserve => self.end(&MachineEvent::Crashed(reason.to_string())),
            EndAction::Restart => {
                if let Err(error) = self.reset() {
                    let why = format!("could not start over: {}", describe_chain(&error));
                    self.end(&MachineEvent::Shutoff(ShutoffReason::Failed(why)));
                }
            }
        }
    }

    /// Ends the machine; one that has ended already stays as it is.
    ///
    /// A machine that is kept to be looked at keeps its vCPU threads at the gate.
    pub(super) fn end(&self, event: &MachineEvent) {
        self.end_locked(&mut self.lock_changing(), event);
    }

    fn end_locked(&self, holds: &mut Holds, event: &MachineEvent) {
        if self.lifecycle.check(event).is_err() {
            return;
        }
        let keeps = matches!(event, MachineEvent::Crashed(_));
        let closed = self.close_gate();
        if let Err(error) = &closed {
            // Its memory stays mapped for as long as the thread lives.
            log::error!("{error}; the machine ends without it");
        }
        if !keeps {
            self.stopping.store(true, Ordering::Release);
            // Whoever waits for a restart has either seen the flag, or waits by now.
            drop(self.lock_restarts());
            self.restarted.notify_all();
        }
        let deadline = Instant::now() + LAST_OUTPUT_TIMEOUT;
        for port in &self.devices.serials {
            port.flush_until(deadline);
        }
        for console in &self.devices.consoles {
            console.flush_until(deadline);
        }
        if let Err(WrongState { state }) = self.lifecycle.apply(event) {
            log::debug!("the machine is {state} already");
        }
        if keeps {
            holds.kept = closed.is_ok();
            return;
        }
        // vCPUs that wait at the gate find that the machine stops: now, or after the engine's
        // own resume.
        for held in [
            closed.is_ok(),
            mem::take(&mut holds.user),
            mem::take(&mut holds.kept),
        ] {
            if held {
                self.gate.open();
            }
        }
    }

    /// Starts the guest over, in the same VM and memory; where that fails, the machine ends.
    ///
    /// Waits until no engine's pause is in force.
    pub(super) fn reset(&self) -> Result<(), MachineError> {
        let boot = self.spec.boot.as_ref().ok_or(MachineError::NothingToBoot)?;
        let mut holds = self.lock_changing();
        self.lifecycle.check(&MachineEvent::Reset)?;
        self.while_stopped(|| {
            let result = self.start_over(boot);
            // The memory is gone, or half of the new kernel is in it.
            self.end_unless_anew(&mut holds, "start over", &result);
            result
        })?;
        self.lifecycle.apply(&MachineEvent::Reset)?;
        Ok(())
    }

    /// Runs `change` with all vCPUs stopped, outside of any engine's pause.
    pub(super) fn while_stopped(
        &self,
        change: impl FnOnce() -> Result<(), MachineError>,
    ) -> Result<(), MachineError> {
        self.exclusion.begin_reset();
        let result = match self.close_gate() {
            Ok(()) => {
                let result = change();
                self.gate.open();
                result
            }
            Err(timeout) => Err(timeout.into()),
        };
        self.exclusion.end_reset();
        result
    }

    /// Notes that the guest is another one now, or ends the machine where it could not be made one:
    /// then nothing may run. Called with all vCPUs stopped.
    pub(super) fn end_unless_anew(
        &self,
        holds: &mut Holds,
        what: &str,
        result: &Result<(), MachineError>,
    ) {
        match result {
            Ok(()) => self.note_restart(),
            Err(error) => {
                let why = format!("could not {what}: {}", describe_chain(error));
                let event = MachineEvent::Shutoff(ShutoffReason::Failed(why));
                self.end_locked(holds, &event);
            }
        }
    }

    /// Puts memory, devices and vCPUs back to where they were. All vCPUs are stopped.
    fn start_over(&self, boot: &BootSpec) -> Result<(), MachineError> {
        self.devices.quiesce()?;
        let result = (|| {
            self.ram.discard_all()?;
            let entry = boot::load(self.ram.memory(), self.spec.memory.bytes, boot)?;
            self.firmware.write(self.ram.memory());
            let board = &self.power_on.board;
            kvmstate::restore_chips(&self.vm, &board.irqchip, &board.pit)?;
            for (vcpu, state) in self.vcpus.iter().zip(&self.power_on.vcpus) {
                // Neither takes a CPUID again, and a counter that goes on confuses no guest.
                let how = VcpuRestore {
                    cpuid: false,
                    tsc: None,
                };
                kvmstate::restore_vcpu(&self.vm, &vcpu.fd, vcpu.number, state, how)?;
            }
            if let Some(first) = self.vcpus.first() {
                first
                    .set_entry(entry)
                    .map_err(MachineError::kvm("set the entry point"))?;
            }
            self.devices.all().for_each(|device| device.reset());
            Ok(())
        })();
        self.devices.resume();
        result
    }

    /// Tells the guest's watchdogs that the time it missed was no hang.
    pub(super) fn excuse_pause(&self) {
        for vcpu in &self.vcpus {
            // KVM refuses where the guest does not use the paravirtual clock.
            if vcpu.fd.kvmclock_ctrl().is_err() {
                log::debug!("vCPU {} has no paravirtual clock to tell", vcpu.number);
            }
        }
    }

    /// Tells the supervisor to end.
    pub(super) fn quit(&self) {
        self.request(Request::Quit);
    }
}
