//! Building a machine, new or for a saved state.

use std::ffi::CStr;
use std::io;
use std::sync::Arc;

use crossbeam_channel::Receiver;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::bus::Bus;
use super::device::IrqLine;
use super::device::i8042::{self, I8042};
use super::device::pm::{self, PowerManagement};
use super::device::rtc::{self, Rtc};
use super::device::serial::{self, SerialPort};
use super::firmware::Firmware;
use super::memory::GuestRam;
use super::opened::{Opened, OpenedPci};
use super::pci::{KvmPlatform, PciBus, PciFunction, PciWindow, layout};
use super::shared::{Asked, Devices, Parts, PowerOn, Shared};
use super::spec::MachineSpec;
use super::vcpu::Vcpu;
use super::virtio::VirtioPci;
use super::virtio::balloon::Balloon;
use super::{MachineError, acpi, boot, cpuid};
use crate::kvmstate::{self, KvmDirtyLog, KvmStateError, MsrSet};
use crate::state::board::{MachineV1, RamRangeV1};
use crate::state::{CpuidEntry, StateSet};
use crate::sys::{self, signal};

/// What the kernel must have; all of it is older than the oldest kernel that we support.
const CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Pages that Intel's CPUs need to run real mode, below the top of the hole.
const IDENTITY_MAP_GPA: u64 = 0xfffb_c000;
const TSS_GPA: usize = 0xfffb_d000;

/// The most vCPUs: their APIC ids fit 8 bits, of which one means all.
const VCPUS_MAX: u32 = 254;

/// A balloon, and the device that it is behind.
type Inflatable = (Arc<Balloon>, Arc<VirtioPci>);

/// A VM with its memory, devices and vCPUs, none of which has a state yet.
#[derive(Debug)]
pub(super) struct Base {
    spec: MachineSpec,
    kvm: Kvm,
    // Before the memory: KVM uses that until its VM is gone.
    vcpus: Vec<VcpuFd>,
    devices: Devices,
    ports: Bus,
    mmio: Bus,
    vm: Arc<VmFd>,
    ram: Arc<GuestRam>,
    firmware: Firmware,
}

fn check_spec(spec: &MachineSpec, kvm: &Kvm) -> Result<(), MachineError> {
    let refuse = |what: String| Err(MachineError::Spec { what });
    let most = u32::try_from(kvm.get_max_vcpus())
        .unwrap_or(u32::MAX)
        .min(VCPUS_MAX);
    let count = spec.cpu.vcpu_count;
    if count == 0 || count > most {
        return refuse(format!("{count} vCPUs; from 1 to {most} are possible here"));
    }
    for (at, port) in spec.serials.iter().enumerate() {
        let number = port.port;
        let exists = usize::try_from(number).is_ok_and(|n| n < serial::ADDRESSES.len());
        let twice = spec.serials[..at].iter().any(|other| other.port == number);
        if !exists || twice {
            return refuse(format!("serial port {number}: from 0 to 3, each once"));
        }
    }
    for (at, device) in spec.pci.iter().enumerate() {
        let slot = device.slot;
        let twice = spec.pci[..at].iter().any(|other| other.slot == slot);
        if !(1..layout::SLOTS).contains(&slot) || twice {
            return refuse(format!("PCI slot {slot}: from 1 to 31, each once"));
        }
    }
    if let Some(number) = spec.kick_signal
        && (!(1..=64).contains(&number) || [libc::SIGKILL, libc::SIGSTOP].contains(&number))
    {
        return refuse(format!("signal {number} to kick vCPUs with"));
    }
    Ok(())
}

/// Opens /dev/kvm, or says what may help.
pub fn open_kvm() -> Result<Kvm, MachineError> {
    open_kvm_at(c"/dev/kvm")
}

fn open_kvm_at(path: &CStr) -> Result<Kvm, MachineError> {
    let kvm = Kvm::new_with_path(path).map_err(|error| {
        let source = io::Error::from_raw_os_error(error.errno());
        let hint = match source.kind() {
            io::ErrorKind::NotFound => {
                "is virtualization enabled, and the module kvm_intel or kvm_amd loaded?"
            }
            io::ErrorKind::PermissionDenied => "may this user open it (group kvm)?",
            _ => "is the host's KVM in order?",
        };
        MachineError::NoKvm { hint, source }
    })?;
    if kvm.get_api_version() != 12 {
        let capability = "API version 12";
        return Err(MachineError::MissingCapability { capability });
    }
    for &(cap, capability) in CAPABILITIES {
        if !kvm.check_extension(cap) {
            return Err(MachineError::MissingCapability { capability });
        }
    }
    Ok(kvm)
}

impl Base {
    /// Makes VM, memory, interrupt controllers (before the vCPUs: KVM refuses it after), timer
    /// and vCPUs, in the order in which KVM takes them, and opens the devices' backends.
    pub(super) fn new(spec: MachineSpec) -> Result<Self, MachineError> {
        let kvm = open_kvm()?;
        check_spec(&spec, &kvm)?;
        let apic_ids = cpuid::apic_ids(&spec.cpu)?;
        let ram = Arc::new(GuestRam::new(&spec.memory)?);
        let vm = kvm.create_vm().map_err(MachineError::kvm("create a VM"))?;
        for region in ram.regions() {
            let (gpa, mapping) = (region.start.gpa(), &region.mapping);
            sys::kvm::set_memory_slot(sys::kvm::vm_fd(&vm), region.slot, 0, gpa, mapping).map_err(
                |source| MachineError::Kvm {
                    what: "give the VM its memory",
                    source,
                },
            )?;
        }
        vm.set_identity_map_address(IDENTITY_MAP_GPA)
            .map_err(MachineError::kvm("place the identity map"))?;
        vm.set_tss_address(TSS_GPA)
            .map_err(MachineError::kvm("place the task state segment"))?;
        vm.create_irq_chip()
            .map_err(MachineError::kvm("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            // Port 0x61 belongs to the timer: guests calibrate with it.
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit)
            .map_err(MachineError::kvm("create the timer"))?;
        sys::kvm::set_pit_reinject(sys::kvm::vm_fd(&vm), spec.clock.pit_reinject).map_err(
            |source| MachineError::Kvm {
                what: "set the timer's policy for late ticks",
                source,
            },
        )?;
        let firmware = Firmware::new(&spec, &apic_ids);
        let vcpus = apic_ids
            .into_iter()
            .map(|id| vm.create_vcpu(id.into()))
            .collect::<Result<_, _>>()
            .map_err(MachineError::kvm("create a vCPU"))?;
        let vm = Arc::new(vm);
        let (devices, ports, mmio) = make_devices(&spec, &vm, &ram)?;
        Ok(Self {
            spec,
            kvm,
            vcpus,
            devices,
            ports,
            mmio,
            vm,
            ram,
            firmware,
        })
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Loads the kernel, and puts the first vCPU to its entry point.
    pub(super) fn boot(self) -> Result<(Shared, Receiver<Asked>), MachineError> {
        let source = self.spec.boot.as_ref().ok_or(MachineError::NothingToBoot)?;
        let entry = boot::load(self.ram.memory(), self.spec.memory.bytes, source)?;
        self.firmware.write(self.ram.memory());
        let supported = kvmstate::supported_cpuid(&self.kvm)?;
        let cpuids = (0..self.spec.cpu.vcpu_count)
            .map(|vcpu| cpuid::for_vcpu(&supported, &self.spec.cpu, vcpu))
            .collect::<Result<Vec<_>, _>>()?;
        let (shared, requests) = self.power_on(&cpuids)?;
        if let Some(first) = shared.vcpus.first() {
            first
                .set_entry(entry)
                .map_err(MachineError::kvm("set the entry point"))?;
        }
        shared.devices.resume();
        Ok((shared, requests))
    }

    /// Takes a saved state, all of it; with the dirty log on and all memory armed if `track`.
    pub(super) fn restore(
        self,
        mut state: StateSet,
        track: bool,
    ) -> Result<(Shared, Receiver<Asked>), MachineError> {
        check_layout(&state.take::<MachineV1>(0)?, &self.spec)?;
        let saved = kvmstate::take_vcpus(&mut state, self.vcpus.len())?;
        let board = kvmstate::take_board(&mut state)?;
        let cpuids: Vec<_> = saved.iter().map(|vcpu| vcpu.cpuid.clone()).collect();
        // First what a reset goes back to; it needs the CPUID, which the saved state brings.
        let (shared, requests) = self.power_on(&cpuids)?;
        if track {
            shared.ram.host_writes().clear();
            shared
                .dirty_log
                .start_armed()
                .map_err(|source| MachineError::Kvm {
                    what: "start the dirty log",
                    source,
                })?;
        }
        let vcpus: Vec<_> = shared.vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        let policy = shared.spec.clock.after_restore;
        kvmstate::restore_taken(&shared.vm, &vcpus, &board, &saved, policy)?;
        // After the interrupt controllers: devices raise their lines again. Paused since they
        // were made, so that no input comes before the state, and then resumed, so that held work
        // begins. Disks and networks wait until the machine is started: requests that were in the
        // queues when it was saved are carried out then, and not for a machine that is only
        // looked at.
        shared.devices.hold()?;
        shared.lock_changing().devices = true;
        let restored = shared
            .devices
            .all()
            .try_for_each(|device| device.restore(&mut state));
        shared.devices.resume();
        restored?;
        state.finish()?;
        tell_of_restore(&shared);
        Ok((shared, requests))
    }

    /// Gives the vCPUs what firmware would, and notes what a reset goes back to.
    fn power_on(
        self,
        cpuids: &[Vec<CpuidEntry>],
    ) -> Result<(Shared, Receiver<Asked>), MachineError> {
        let vcpus: Vec<Vcpu> = (0..)
            .zip(self.vcpus)
            .map(|(number, fd)| Vcpu::new(number, fd))
            .collect();
        for (vcpu, cpuid) in vcpus.iter().zip(cpuids) {
            vcpu.fd
                .set_cpuid2(&kvmstate::cpuid_table(cpuid)?)
                .map_err(MachineError::kvm("set a vCPU's CPUID"))?;
            vcpu.set_firmware_state()
                .map_err(MachineError::kvm("set a vCPU's memory types"))?;
        }
        let first = vcpus.first().expect("a machine has a vCPU");
        let msrs = MsrSet::probe(&self.kvm, &first.fd)?;
        let power_on = PowerOn {
            vcpus: vcpus
                .iter()
                .map(|vcpu| kvmstate::save_vcpu(&self.vm, &vcpu.fd, vcpu.number, &msrs))
                .collect::<Result<_, KvmStateError>>()?,
            board: kvmstate::save_board(&self.vm)?,
        };
        let tsc_scaling = self.kvm.check_extension(Cap::TscControl);
        let facts = kvmstate::guest_facts(&power_on.vcpus[0], &msrs, tsc_scaling);
        let log_vm =
            sys::kvm::borrow_vm(&self.kvm, sys::kvm::vm_fd(&self.vm)).map_err(|source| {
                MachineError::Kvm {
                    what: "duplicate the VM's descriptor",
                    source,
                }
            })?;
        let slots: Vec<_> = self
            .ram
            .regions()
            .iter()
            .map(|region| (region.clone(), 0))
            .collect();
        let kick_signal = self.spec.kick_signal.unwrap_or_else(signal::default_kick);
        let run_page_bytes = self
            .kvm
            .get_vcpu_mmap_size()
            .map_err(MachineError::kvm("ask for the size of a vCPU's page"))?;
        Ok(Shared::new(Parts {
            dirty_log: KvmDirtyLog::new(log_vm, &slots)?,
            spec: self.spec,
            vcpus,
            vm: self.vm,
            ports: self.ports,
            mmio: self.mmio,
            devices: self.devices,
            ram: self.ram,
            firmware: self.firmware,
            msrs,
            facts,
            power_on,
            kick_signal,
            run_page_bytes,
        }))
    }
}

/// Lets the guest know that it was restored: others may have been from the same image, and time
/// may have passed.
pub(super) fn tell_of_restore(shared: &Shared) {
    shared.firmware.write_identity(shared.ram.memory());
    shared.devices.pm.raise_event(acpi::GENERATION_EVENT);
    shared.excuse_pause();
}

/// Makes the devices, and the buses that lead to them: ports and memory.
fn make_devices(
    spec: &MachineSpec,
    vm: &Arc<VmFd>,
    ram: &Arc<GuestRam>,
) -> Result<(Devices, Bus, Bus), MachineError> {
    let opened = Opened::new(spec, ram)?;
    let mut ports = Bus::default();
    let mut serials = Vec::new();
    for opened in opened.serials {
        let number = opened.port();
        let (port, gsi) = serial::ADDRESSES[number as usize];
        let line = IrqLine::new(vm.clone(), gsi);
        let device = SerialPort::new(opened, line).map_err(|source| MachineError::Serial {
            port: number,
            source,
        })?;
        ports.insert(port, serial::PORTS, device.clone());
        serials.push(device);
    }
    let power = Arc::new(PowerManagement::new(IrqLine::new(vm.clone(), pm::SCI)));
    ports.insert(pm::PORT, pm::PORTS, power.clone());
    ports.insert(i8042::PORT, i8042::PORTS, Arc::new(I8042));
    let line = IrqLine::new(vm.clone(), rtc::LINE);
    let clock = Arc::new(Rtc::new(
        &spec.clock,
        Box::new(move |active| {
            if let Err(error) = line.set(active) {
                log::warn!("could not set the real-time clock's interrupt: {error}");
            }
        }),
    ));
    ports.insert(rtc::PORT, rtc::PORTS, clock.clone());
    let (virtio, balloon) = make_virtio(opened.pci, vm, ram)?;
    let functions = virtio.iter().map(|device| {
        let function: Arc<dyn PciFunction> = device.clone();
        (device.slot(), function)
    });
    let pci = Arc::new(PciBus::new(functions));
    ports.insert(layout::CONFIG_PORT, layout::CONFIG_PORTS, pci.clone());
    let mut mmio = Bus::default();
    let window = Arc::new(PciWindow(pci.clone()));
    mmio.insert(
        layout::MMIO_START,
        layout::MMIO_END - layout::MMIO_START,
        window,
    );
    let devices = Devices {
        serials,
        pm: power,
        rtc: clock,
        pci,
        virtio,
        disks: opened.disks,
        nets: opened.nets,
        consoles: opened.consoles,
        balloon,
    };
    Ok((devices, ports, mmio))
}

/// Makes the functions on PCI; returns the balloon apart, too.
fn make_virtio(
    opened: Vec<OpenedPci>,
    vm: &Arc<VmFd>,
    ram: &Arc<GuestRam>,
) -> Result<(Vec<Arc<VirtioPci>>, Option<Inflatable>), MachineError> {
    let platform = Arc::new(KvmPlatform::new(vm.clone()));
    let mut devices = Vec::new();
    let mut inflatable = None;
    for of_host in opened {
        let thread = format!("{}-{}", of_host.backend.kind().name, of_host.name);
        let (ram, platform) = (ram.clone(), platform.clone());
        let made = VirtioPci::new(of_host.slot, &thread, of_host.backend, ram, platform)?;
        if let Some(balloon) = of_host.balloon {
            inflatable = Some((balloon, made.clone()));
        }
        devices.push(made);
    }
    Ok((devices, inflatable))
}

/// Returns what a machine of this spec consists of.
pub(super) fn machine_layout(spec: &MachineSpec) -> MachineV1 {
    MachineV1 {
        ram: super::memory::layout(spec.memory.bytes)
            .into_iter()
            .map(|(gpa, bytes)| RamRangeV1 { gpa, bytes })
            .collect(),
        vcpu_count: spec.cpu.vcpu_count,
        serial_ports: spec.serials.iter().map(|serial| serial.port).collect(),
    }
}

pub(super) fn check_layout(saved: &MachineV1, spec: &MachineSpec) -> Result<(), MachineError> {
    let ours = machine_layout(spec);
    let other = |what: String| Err(MachineError::OtherMachine { what });
    if saved.vcpu_count != ours.vcpu_count {
        return other(format!(
            "{} vCPUs, this one has {}",
            saved.vcpu_count, ours.vcpu_count
        ));
    }
    if saved.ram != ours.ram {
        let total = |ranges: &[RamRangeV1]| -> u64 {
            ranges
                .iter()
                .fold(0, |sum, range| range.bytes.saturating_add(sum))
        };
        return other(format!(
            "{} bytes of memory, this one has {}",
            total(&saved.ram),
            total(&ours.ram)
        ));
    }
    if saved.serial_ports != ours.serial_ports {
        return other(format!(
            "serial ports {:?}, this one has {:?}",
            saved.serial_ports, ours.serial_ports
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_kvm_is_told_what_may_help() {
        let error = open_kvm_at(c"/nonexistent/kvm").unwrap_err();
        assert!(matches!(error, MachineError::NoKvm { .. }));
        assert!(error.to_string().contains("module"), "{error}");
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        if std::env::var_os("LIVEPOINT_NO_KVM").is_some_and(|value| value == "1") {
            println!("skipped: no KVM (LIVEPOINT_NO_KVM=1)");
            return;
        }
        let kvm = open_kvm().unwrap();
        let changes: [fn(&mut MachineSpec); 4] = [
            |spec| spec.cpu.vcpu_count = 0,
            |spec| spec.cpu.vcpu_count = 255,
            |spec| spec.kick_signal = Some(libc::SIGKILL),
            |spec| {
                spec.serials.push(super::super::spec::SerialSpec {
                    port: 4,
                    backend: super::super::spec::SerialBackend::Null,
                });
            },
        ];
        for change in changes {
            let mut spec = MachineSpec::new(16 << 20, None);
            check_spec(&spec, &kvm).unwrap();
            change(&mut spec);
            assert!(matches!(
                check_spec(&spec, &kvm),
                Err(MachineError::Spec { .. })
            ));
        }
    }
}
