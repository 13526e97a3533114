//! Writes the devices that are on PCI.

use super::balloon::Balloon;
use super::device::SerialBackend;
use super::disk::{Disk, DiskSourceKind};
use super::document::Element;
use super::format::{LiveInfo, character_device};
use super::interface::{HostInterface, Interface, InterfaceSource};
use super::pci::{PciDevice, PciDeviceKind, PciDevices, PciSlot};
use super::rng::Rng;
use super::values::HostPath;

/// Adds the devices to `into`, but for consoles; `live` adds the names that a running machine gives
/// them.
pub(super) fn devices(into: &mut Element, on_pci: &PciDevices, live: Option<&LiveInfo>) {
    let mut disks = 0;
    let mut interfaces = 0;
    let mut rngs = 0;
    for (slot, device) in on_pci.iter() {
        let (element, name) = match &device.kind {
            PciDeviceKind::Disk(described) => {
                disks += 1;
                (disk(described), format!("virtio-disk{}", disks - 1))
            }
            PciDeviceKind::Interface(described) => {
                let number = interfaces;
                interfaces += 1;
                let tap = live.and_then(|live| live.taps.get(number)?.as_ref());
                (interface(described, tap), format!("net{number}"))
            }
            PciDeviceKind::Balloon(described) => {
                let period_s = live.map(|live| live.statistics_period_s);
                let period_s = period_s.unwrap_or(described.statistics_period_s);
                (balloon(described, period_s), "balloon0".to_owned())
            }
            PciDeviceKind::Rng(described) => {
                rngs += 1;
                (rng(*described), format!("rng{}", rngs - 1))
            }
            PciDeviceKind::Console(_) => continue,
        };
        into.push(place(element, slot, device, name, live));
    }
}

/// Adds the consoles, the first of which is console `first` of the machine.
pub(super) fn consoles(
    into: &mut Element,
    on_pci: &PciDevices,
    live: Option<&LiveInfo>,
    first: usize,
) {
    let mut number = 0;
    for (slot, device) in on_pci.iter() {
        if let PciDeviceKind::Console(backend) = &device.kind {
            let pty = live.and_then(|live| live.console_ptys.get(number)?.as_ref());
            let port = first + number;
            let element = console(backend, pty, port);
            into.push(place(element, slot, device, format!("console{port}"), live));
            number += 1;
        }
    }
}

/// Adds a device's name, and where it is.
fn place(
    mut element: Element,
    slot: PciSlot,
    device: &PciDevice,
    name: String,
    live: Option<&LiveInfo>,
) -> Element {
    if let Some(name) = alias(device, name, live.is_some()) {
        element.push(Element::new("alias").with("name", &name));
    }
    element.push(address(slot));
    element
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
        .with("type", disk.format.name());
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

/// Writes an interface; `tap` is the one that a running machine has.
fn interface(interface: &Interface, tap: Option<&HostInterface>) -> Element {
    let (kind, managed) = match &interface.source {
        InterfaceSource::Ethernet { managed } => ("ethernet", *managed),
        InterfaceSource::Bridge(_) => ("bridge", None),
    };
    let mut element = Element::new("interface").with("type", kind);
    let mac = interface.mac.to_string();
    element.push(Element::new("mac").with("address", &mac));
    if let InterfaceSource::Bridge(bridge) = &interface.source {
        element.push(Element::new("source").with("bridge", bridge.as_str()));
    }
    let mut target = Element::new("target");
    if let Some(name) = interface.target.as_ref().or(tap) {
        target = target.with("dev", name.as_str());
    }
    if let Some(managed) = managed {
        target = target.with("managed", if managed { "yes" } else { "no" });
    }
    if !target.attributes.is_empty() {
        element.push(target);
    }
    element.push(Element::new("model").with("type", "virtio"));
    if let Some(up) = interface.link_up {
        element.push(Element::new("link").with("state", if up { "up" } else { "down" }));
    }
    element
}

fn rng(rng: Rng) -> Element {
    let mut element = Element::new("rng").with("model", "virtio");
    if let Some(rate) = rng.rate {
        let limit = Element::new("rate");
        let limit = limit.with("bytes", rate.bytes());
        element.push(limit.with("period", rate.period_ms()));
    }
    let mut backend = Element::new("backend").with("model", "random");
    backend.text = rng.source.path().to_owned();
    element.push(backend);
    element
}

fn console(backend: &SerialBackend, pty: Option<&HostPath>, port: usize) -> Element {
    let mut element = character_device("console", backend, pty);
    if let (SerialBackend::Pty, Some(pty)) = (backend, pty) {
        element = element.with("tty", pty);
    }
    let target = Element::new("target").with("type", "virtio");
    element.push(target.with("port", port));
    element
}

fn balloon(balloon: &Balloon, statistics_period_s: u32) -> Element {
    let mut element = Element::new("memballoon").with("model", "virtio");
    for (name, value) in [
        ("autodeflate", balloon.auto_deflate),
        ("freePageReporting", balloon.free_page_reporting),
    ] {
        if let Some(on) = value {
            element = element.with(name, if on { "on" } else { "off" });
        }
    }
    if statistics_period_s > 0 {
        element.push(Element::new("stats").with("period", statistics_period_s));
    }
    element
}
