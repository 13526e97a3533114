//! What a machine has of the host besides KVM and memory. All of it is opened before the machine has
//! a thread, so that a program can give up the right to open more (`MachineSpec::when_open`).

use std::sync::Arc;

use super::MachineError;
use super::device::OpenedSerial;
use super::memory::GuestRam;
use super::spec::{MachineSpec, PciDevice, PciDeviceSpec};
use super::virtio::balloon::Balloon;
use super::virtio::blk::{Blk, Disk};
use super::virtio::console::Console;
use super::virtio::net::Net;
use super::virtio::rng::Rng;
use super::virtio::{Backend, DeviceError};

/// The backends of a machine's devices.
#[derive(Debug, Default)]
pub(super) struct Opened {
    pub(super) serials: Vec<OpenedSerial>,
    pub(super) pci: Vec<OpenedPci>,
    pub(super) disks: Vec<Arc<Disk>>,
    pub(super) nets: Vec<Arc<Net>>,
    pub(super) consoles: Vec<Arc<Console>>,
}

/// What is behind a device on PCI.
#[derive(Debug)]
pub(super) struct OpenedPci {
    pub(super) slot: u8,
    /// What tells it from others of its kind.
    pub(super) name: String,
    pub(super) backend: Arc<dyn Backend>,
    /// The same, where it is a balloon.
    pub(super) balloon: Option<Arc<Balloon>>,
}

impl Opened {
    /// Opens what the devices of `spec` need, and tells who waits for that.
    pub(super) fn new(spec: &MachineSpec, ram: &Arc<GuestRam>) -> Result<Self, MachineError> {
        let mut opened = Self::default();
        for serial in &spec.serials {
            let port = serial.port;
            let serial = OpenedSerial::new(serial)
                .map_err(|source| MachineError::Serial { port, source })?;
            opened.serials.push(serial);
        }
        for PciDeviceSpec { slot, device } in &spec.pci {
            let device = opened.device(*slot, device, ram)?;
            opened.pci.push(device);
        }
        if let Some(when_open) = &spec.when_open {
            (when_open.0)().map_err(MachineError::NotConfined)?;
        }
        Ok(opened)
    }

    fn device(
        &mut self,
        slot: u8,
        device: &PciDevice,
        ram: &Arc<GuestRam>,
    ) -> Result<OpenedPci, MachineError> {
        let mut inflatable = None;
        let (name, backend): (_, Arc<dyn Backend>) = match device {
            PciDevice::Disk(disk) => {
                let name = disk.name.clone();
                let opened = Disk::open(disk).map_err(|source| {
                    let name = name.clone();
                    MachineError::Disk { name, source }
                })?;
                let opened = Arc::new(opened);
                self.disks.push(opened.clone());
                (name, Arc::new(Blk::new(opened)))
            }
            PciDevice::Net(net) => {
                let name = net.name.clone();
                let opened = Net::open(net).map_err(|source| {
                    let name = name.clone();
                    MachineError::Net { name, source }
                })?;
                let opened = Arc::new(opened);
                self.nets.push(opened.clone());
                (name, opened)
            }
            PciDevice::Rng(rng) => {
                let opened = Rng::open(rng).map_err(|source| DeviceError {
                    what: format!("open {}", rng.source.display()),
                    source,
                })?;
                (slot.to_string(), Arc::new(opened))
            }
            PciDevice::Balloon(balloon) => {
                let made = Balloon::new(*balloon, ram.clone()).map_err(|source| DeviceError {
                    what: "make a timer".to_owned(),
                    source,
                })?;
                let made = Arc::new(made);
                inflatable = Some(made.clone());
                (slot.to_string(), made)
            }
            PciDevice::Console(backend) => {
                let opened = Console::open(backend)
                    .map_err(|source| MachineError::Console { slot, source })?;
                let opened = Arc::new(opened);
                self.consoles.push(opened.clone());
                (slot.to_string(), opened)
            }
        };
        Ok(OpenedPci {
            slot,
            name,
            backend,
            balloon: inflatable,
        })
    }
}
