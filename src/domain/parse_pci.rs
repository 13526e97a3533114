//! Interprets the devices that are on PCI.

use super::balloon::Balloon;
use super::device::{SerialBackend, SerialPorts};
use super::disk::{Disk, DiskCache, DiskFormat, DiskSerial, DiskSourceKind, DiskTarget};
use super::document::Element;
use super::error::{DomainError, ValueError};
use super::interface::{HostInterface, Interface, InterfaceSource, MacAddress};
use super::parse::TEXT;
use super::parse::number;
use super::parse_devices::{backend, is_virtio_console, unsigned, user_alias};
use super::pci::{PciDevice, PciDeviceKind, PciDevices, PciSlot};
use super::rng::{RNG_PERIOD_MS, Rng, RngRate, RngSource};
use super::values::HostPath;

/// Reads the devices on PCI; `serial` has names that they may not have.
pub(super) fn pci_devices(
    devices: &Element,
    serial: &SerialPorts,
) -> Result<PciDevices, DomainError> {
    let mut on_pci = PciDevices::default();
    let mut unplaced = Vec::new();
    for element in &devices.children {
        let kind = match element.name.as_str() {
            "disk" => PciDeviceKind::Disk(disk(element)?),
            "interface" => PciDeviceKind::Interface(interface(element)?),
            "rng" => PciDeviceKind::Rng(rng(element)?),
            "console" if is_virtio_console(element) => {
                PciDeviceKind::Console(console(element, serial)?)
            }
            "memballoon" if element.attribute("model") != Some("none") => {
                PciDeviceKind::Balloon(balloon(element)?)
            }
            _ => continue,
        };
        let alias = user_alias(element)?;
        if let Some(alias) = &alias
            && serial
                .iter()
                .any(|(_, port)| port.alias.as_ref() == Some(alias))
        {
            let error = ValueError::new(alias.as_str(), "unique among devices");
            return Err(element.refuse("alias", error));
        }
        let device = PciDevice { kind, alias };
        match slot(element)? {
            Some(slot) => insert(&mut on_pci, element, Some(slot), device)?,
            None => unplaced.push((element, device)),
        }
    }
    // Those that say their slot go first, or an earlier one that does not could take it.
    for (element, device) in unplaced {
        insert(&mut on_pci, element, None, device)?;
    }
    Ok(on_pci)
}

fn insert(
    on_pci: &mut PciDevices,
    element: &Element,
    slot: Option<PciSlot>,
    device: PciDevice,
) -> Result<(), DomainError> {
    let inserted = on_pci.insert(slot, device);
    inserted
        .map(drop)
        .map_err(|error| element.refuse("device", error))
}

/// Reads a device's address.
fn slot(device: &Element) -> Result<Option<PciSlot>, DomainError> {
    let address = device.child("address");
    let Some(address) = address.filter(|it| it.attribute("type") == Some("pci")) else {
        return Ok(None);
    };
    for what in ["domain", "bus", "function"] {
        if let Some(text) = address.attribute(what)
            && unsigned(text) != Some(0)
        {
            let expected = "0: there is one bus, and each device has a slot of its own";
            return Err(address.invalid(what, text, expected));
        }
    }
    let Some(text) = address.attribute("slot") else {
        return Ok(None);
    };
    let number = unsigned(text).and_then(|number| u8::try_from(number).ok());
    let Some(number) = number else {
        return Err(address.invalid("slot", text, "a slot from 0x01 to 0x1f"));
    };
    let slot = PciSlot::new(number).map_err(|error| address.refuse("slot", error))?;
    Ok(Some(slot))
}

fn missing(element: &Element, what: &'static str, hint: &'static str) -> DomainError {
    DomainError::Missing {
        place: element.place(),
        what,
        hint,
    }
}

fn disk(element: &Element) -> Result<Disk, DomainError> {
    let Some(target) = element.child("target") else {
        return Err(missing(element, "<target>", ""));
    };
    let name = target.attribute("dev").unwrap_or_default();
    let name = DiskTarget::new(name).map_err(|error| target.refuse("dev", error))?;
    let (source_kind, source) = disk_source(element)?;
    let driver = element.child("driver");
    let attribute = |what| driver.and_then(|driver| driver.attribute(what));
    let format = attribute("type").and_then(DiskFormat::from_name);
    let format = format.unwrap_or_default();
    if source_kind == DiskSourceKind::Block && format != DiskFormat::Raw {
        let reason = format!("a block device is raw, and not {}", format.name());
        return Err(element.conflict(reason));
    }
    let serial = element.child("serial").filter(|it| !it.text.is_empty());
    let serial = serial
        .map(|element| DiskSerial::new(&element.text).map_err(|error| element.refuse(TEXT, error)));
    Ok(Disk {
        source_kind,
        format,
        read_only: element.child("readonly").is_some(),
        serial: serial.transpose()?,
        // `default` is what it is without.
        cache: attribute("cache").and_then(DiskCache::from_name),
        discard: attribute("discard").map(|discard| discard == "unmap"),
        ..Disk::new(name, source)
    })
}

fn disk_source(element: &Element) -> Result<(DiskSourceKind, HostPath), DomainError> {
    let (kind, what, other) = match element.attribute("type") {
        Some("block") => (DiskSourceKind::Block, "dev", "file"),
        _ => (DiskSourceKind::File, "file", "dev"),
    };
    let Some(source) = element.child("source") else {
        return Err(missing(element, "<source>", ""));
    };
    if source.attribute(other).is_some() {
        let reason = format!("a disk of this type has no attribute {other}, but {what}");
        return Err(source.conflict(reason));
    }
    let Some(path) = source.attribute(what) else {
        return Err(missing(source, what, ""));
    };
    let path = HostPath::new(path).map_err(|error| source.refuse(what, error))?;
    Ok((kind, path))
}

fn interface(element: &Element) -> Result<Interface, DomainError> {
    let mut interface = Interface::new(interface_source(element)?);
    if let Some(mac) = element.child("mac") {
        let text = mac.attribute("address").unwrap_or_default();
        interface.mac = MacAddress::parse(text).map_err(|error| mac.refuse("address", error))?;
    }
    if let Some(target) = element.child("target")
        && let Some(name) = target.attribute("dev")
        && (interface.needs_tap() || !HostInterface::is_of_running(name))
    {
        let name = HostInterface::new(name).map_err(|error| target.refuse("dev", error))?;
        interface.target = Some(name);
    }
    if interface.needs_tap() && interface.target.is_none() {
        let hint = ": managed='no' is for a tap that is there already";
        return Err(missing(
            element.child("target").unwrap_or(element),
            "dev",
            hint,
        ));
    }
    let link = element.child("link");
    let state = link.and_then(|link| link.attribute("state"));
    interface.link_up = state.map(|state| state == "up");
    Ok(interface)
}

fn interface_source(element: &Element) -> Result<InterfaceSource, DomainError> {
    let source = element.child("source");
    let target = element.child("target");
    let managed = target.and_then(|target| target.attribute("managed"));
    if element.attribute("type") == Some("bridge") {
        if let (Some(target), Some(_)) = (target, managed) {
            let reason = "a tap that is put on a bridge is always made by the machine".to_owned();
            return Err(target.conflict(reason));
        }
        let Some(source) = source else {
            return Err(missing(element, "<source>", ""));
        };
        let Some(bridge) = source.attribute("bridge") else {
            return Err(missing(source, "bridge", ""));
        };
        let bridge = HostInterface::new(bridge).map_err(|error| source.refuse("bridge", error))?;
        return Ok(InterfaceSource::Bridge(bridge));
    }
    if let Some(source) = source {
        let reason = "an interface of type ethernet has no source: its tap is the <target>";
        return Err(source.conflict(reason.to_owned()));
    }
    let managed = managed.map(|managed| managed == "yes");
    Ok(InterfaceSource::Ethernet { managed })
}

fn rng(element: &Element) -> Result<Rng, DomainError> {
    let Some(backend) = element.child("backend") else {
        return Err(missing(element, "<backend>", ""));
    };
    let source = match backend.text.as_str() {
        "" | "/dev/urandom" => RngSource::Urandom,
        "/dev/random" => RngSource::Random,
        other => return Err(backend.invalid(TEXT, other, "/dev/urandom or /dev/random")),
    };
    let Some(rate) = element.child("rate") else {
        return Ok(Rng { source, rate: None });
    };
    let bytes = figure(rate, "bytes", 0)?;
    let period = figure(rate, "period", RNG_PERIOD_MS)?;
    let rate = RngRate::new(bytes, period).map_err(|error| rate.refuse("rate", error))?;
    let rate = Some(rate);
    Ok(Rng { source, rate })
}

/// Reads a virtio console, which may not share what a serial port has.
fn console(element: &Element, serial: &SerialPorts) -> Result<SerialBackend, DomainError> {
    let console = backend(element)?;
    for (_, port) in serial.iter() {
        let beside = port.backend.check_beside(&console);
        beside.map_err(|error| element.refuse("console", error))?;
    }
    Ok(console)
}

/// Reads a number; `default` where it is not there.
fn figure(element: &Element, what: &'static str, default: u32) -> Result<u32, DomainError> {
    let Some(text) = element.attribute(what) else {
        return Ok(default);
    };
    let value = u32::try_from(number(element, what, text)?);
    value.map_err(|_| element.invalid(what, text, "less than 2^32"))
}

/// Reads a balloon, but for how large it is.
fn balloon(element: &Element) -> Result<Balloon, DomainError> {
    let is_on = |what| element.attribute(what).map(|text| text == "on");
    let statistics_period_s = match element.child("stats") {
        Some(stats) => figure(stats, "period", 0)?,
        None => 0,
    };
    Ok(Balloon {
        free_page_reporting: is_on("freePageReporting"),
        auto_deflate: is_on("autodeflate"),
        statistics_period_s,
        current: None,
    })
}
