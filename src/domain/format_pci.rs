//! Writes the devices that are on PCI.

use super::disk::{Disk, DiskSourceKind};
use super::document::Element;
use super::pci::{PciDevice, PciDeviceKind, PciDevices, PciSlot};

/// Adds the devices to `into`; `live` adds the names that a running machine gives them.
pub(super) fn devices(into: &mut Element, on_pci: &PciDevices, live: bool) {
    let mut disks = 0;
    for (slot, device) in on_pci.iter() {
        let (mut element, name) = match &device.kind {
            PciDeviceKind::Disk(described) => {
                disks += 1;
                (disk(described), format!("virtio-disk{}", disks - 1))
            }
        };
        if let Some(name) = alias(device, name, live) {
            element.push(Element::new("alias").with("name", &name));
        }
        element.push(address(slot));
        into.push(element);
    }
}

fn alias(device: &PciDevice, name: String, live: bool) -> Option<String> {
    let given = device.alias.as_ref().map(|alias| alias.as_str().to_owned());
    given.or(live.then_some(name))
}

fn address(slot: PciSlot) -> Element {
    let slot = format!("{:#04x}", slot.number());
    Element::new("address")
        .with("type", "pci")
        .with("domain", "0x0000")
        .with("bus", "0x00")
        .with("slot", &slot)
        .with("function", "0x0")
}

fn disk(disk: &Disk) -> Element {
    let (kind, what) = match disk.source_kind {
        DiskSourceKind::File => ("file", "file"),
        DiskSourceKind::Block => ("block", "dev"),
    };
    let mut element = Element::new("disk")
        .with("type", kind)
        .with("device", "disk");
    let mut driver = Element::new("driver")
        .with("name", "qemu")
        .with("type", "raw");
    if let Some(cache) = disk.cache {
        driver = driver.with("cache", cache.name());
    }
    if let Some(discard) = disk.discard {
        driver = driver.with("discard", if discard { "unmap" } else { "ignore" });
    }
    element.push(driver);
    element.push(Element::new("source").with(what, &disk.source));
    let target = Element::new("target")
        .with("dev", disk.target.as_str())
        .with("bus", "virtio");
    element.push(target);
    if disk.read_only {
        element.push(Element::new("readonly"));
    }
    if let Some(serial) = &disk.serial {
        element.push_text("serial", serial.as_str());
    }
    element
}
