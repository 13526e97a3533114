//! Devices on PCI, each in a slot of the one bus.

use std::collections::BTreeMap;

use super::balloon::Balloon;
use super::device::{SerialBackend, UserAlias};
use super::disk::Disk;
use super::error::ValueError;
use super::interface::Interface;
use super::rng::Rng;

/// Slots that devices may have: 1 to this one. Slot 0 has the host bridge.
pub const PCI_SLOT_MAX: u8 = 31;

/// A slot for a device on PCI bus 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciSlot(u8);

impl PciSlot {
    /// Makes a slot.
    ///
    /// # Errors
    ///
    /// It is 0, which has the host bridge, or above [`PCI_SLOT_MAX`].
    pub fn new(slot: u8) -> Result<Self, ValueError> {
        if (1..=PCI_SLOT_MAX).contains(&slot) {
            Ok(PciSlot(slot))
        } else {
            Err(ValueError::new(
                &format!("{slot:#04x}"),
                "a slot from 0x01 to 0x1f: slot 0 has the host bridge",
            ))
        }
    }

    /// Returns its number.
    pub fn number(self) -> u8 {
        self.0
    }
}

/// What a device on PCI is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PciDeviceKind {
    /// A disk.
    Disk(Disk),
    /// A network interface.
    Interface(Interface),
    /// A source of random numbers.
    Rng(Rng),
    /// A balloon; a machine has at most one.
    Balloon(Balloon),
    /// A console, whose bytes come from and go to what a serial port's may.
    Console(SerialBackend),
}

/// A device on PCI.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciDevice {
    /// What it is.
    pub kind: PciDeviceKind,
    /// The user's name for it.
    pub alias: Option<UserAlias>,
}

impl PciDevice {
    /// Returns the disk that it is.
    pub fn disk(&self) -> Option<&Disk> {
        match &self.kind {
            PciDeviceKind::Disk(disk) => Some(disk),
            _ => None,
        }
    }

    /// Returns the network interface that it is.
    pub fn interface(&self) -> Option<&Interface> {
        match &self.kind {
            PciDeviceKind::Interface(interface) => Some(interface),
            _ => None,
        }
    }
}

impl From<Disk> for PciDevice {
    fn from(disk: Disk) -> Self {
        PciDevice {
            kind: PciDeviceKind::Disk(disk),
            alias: None,
        }
    }
}

/// The devices on PCI, no two of which have the same slot, name or host resource.
///
/// Slots are part of the machine: a guest that runs, and so an image of it, depends on them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciDevices(BTreeMap<PciSlot, PciDevice>);

impl PciDevices {
    /// Adds a device, in the lowest free slot where none is given.
    ///
    /// # Errors
    ///
    /// The slot is taken, all of them are, or another device has the same name or uses the same
    /// thing of the host.
    pub fn insert(
        &mut self,
        slot: Option<PciSlot>,
        device: PciDevice,
    ) -> Result<PciSlot, ValueError> {
        for other in self.0.values() {
            check_together(other, &device)?;
        }
        let slot = match slot {
            Some(slot) => slot,
            None => self.free_slot()?,
        };
        if self.0.contains_key(&slot) {
            let text = format!("{:#04x}", slot.number());
            return Err(ValueError::new(&text, "a free PCI slot: this one is taken"));
        }
        self.0.insert(slot, device);
        Ok(slot)
    }

    /// Takes a device out.
    pub fn remove(&mut self, slot: PciSlot) -> Option<PciDevice> {
        self.0.remove(&slot)
    }

    fn free_slot(&self) -> Result<PciSlot, ValueError> {
        let mut slots = (1..=PCI_SLOT_MAX).map(PciSlot);
        let free = slots.find(|slot| !self.0.contains_key(slot));
        free.ok_or_else(|| ValueError::new("none", "a free PCI slot: all 31 are taken"))
    }

    /// Returns the devices by slot.
    pub fn iter(&self) -> impl Iterator<Item = (PciSlot, &PciDevice)> {
        self.0.iter().map(|(slot, device)| (*slot, device))
    }

    /// Returns the disks by slot.
    pub fn disks(&self) -> impl Iterator<Item = (PciSlot, &Disk)> {
        self.iter()
            .filter_map(|(slot, device)| Some((slot, device.disk()?)))
    }

    /// Returns the disk of that name.
    pub fn disk_mut(&mut self, target: &str) -> Option<&mut Disk> {
        self.0
            .values_mut()
            .find_map(|device| match &mut device.kind {
                PciDeviceKind::Disk(disk) if disk.target.as_str() == target => Some(disk),
                _ => None,
            })
    }

    /// Returns the balloon.
    pub fn balloon(&self) -> Option<&Balloon> {
        self.0.values().find_map(|device| match &device.kind {
            PciDeviceKind::Balloon(balloon) => Some(balloon),
            _ => None,
        })
    }

    /// Returns the balloon, to be changed.
    pub fn balloon_mut(&mut self) -> Option<&mut Balloon> {
        let mut devices = self.0.values_mut();
        devices.find_map(|device| match &mut device.kind {
            PciDeviceKind::Balloon(balloon) => Some(balloon),
            _ => None,
        })
    }

    /// Returns the network interfaces by slot.
    pub fn interfaces(&self) -> impl Iterator<Item = (PciSlot, &Interface)> {
        self.iter()
            .filter_map(|(slot, device)| Some((slot, device.interface()?)))
    }

    /// Returns the network interfaces by slot, to be changed.
    pub fn interfaces_mut(&mut self) -> impl Iterator<Item = &mut Interface> {
        let devices = self.0.values_mut();
        devices.filter_map(|device| match &mut device.kind {
            PciDeviceKind::Interface(interface) => Some(interface),
            _ => None,
        })
    }
}

/// Refuses two devices that cannot be in one machine.
fn check_together(one: &PciDevice, other: &PciDevice) -> Result<(), ValueError> {
    if let Some(alias) = &other.alias
        && one.alias.as_ref() == Some(alias)
    {
        return Err(ValueError::new(alias.as_str(), "unique among devices"));
    }
    match (&one.kind, &other.kind) {
        (PciDeviceKind::Disk(one), PciDeviceKind::Disk(other)) => one.check_beside(other),
        (PciDeviceKind::Interface(one), PciDeviceKind::Interface(other)) => one.check_beside(other),
        (PciDeviceKind::Balloon(_), PciDeviceKind::Balloon(_)) => {
            Err(ValueError::new("memballoon", "the only balloon"))
        }
        (PciDeviceKind::Console(one), PciDeviceKind::Console(other)) => one.check_beside(other),
        _ => Ok(()),
    }
}
