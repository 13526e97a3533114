//! Devices of definitions: added, changed and taken out. A running machine keeps those that it has.

use super::config::{affected, redefine};
use super::info::{AFFECT_CONFIG, AFFECT_LIVE};
use super::{Answer, DriverCall, Livepoint, check_flags, parse_domain};
use crate::daemon::job::JobKind;
use crate::daemon::xml;
use crate::host::{DomainConfig, PciDevice, PciDeviceKind, PciDevices, PciSlot, XmlView};
use crate::rpc::{Code, DomainRef, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(8, Slow, attach),
    procedure!(13, Slow, detach),
    procedure!(160, Slow, attach_flags),
    procedure!(161, Slow, detach_flags),
    procedure!(174, Slow, update),
];

/// Flag: also where the guest has locked the device.
const FORCE: u32 = 4;

fn attach(call: &DriverCall<'_>, (wanted, xml): (DomainRef, String)) -> Answer<()> {
    attach_flags(call, (wanted, xml, AFFECT_LIVE))
}

fn detach(call: &DriverCall<'_>, (wanted, xml): (DomainRef, String)) -> Answer<()> {
    detach_flags(call, (wanted, xml, AFFECT_LIVE))
}

/// Returns the name of a device document's element.
fn device_kind(document: &str) -> Answer<String> {
    let kind = xml::root_name(document)?;
    xml::read(document, &kind)?;
    Ok(kind)
}

fn not_supported(what: &str, kind: &str) -> RpcError {
    RpcError::new(
        Code::OperationUnsupported,
        format!("{what} of device '{kind}' is not supported"),
    )
}

fn wrong(why: impl Into<String>) -> RpcError {
    RpcError::new(Code::InvalidArg, why)
}

/// Returns a domain's document with a device more.
fn with_device(config: &DomainConfig, device: &str, kind: &str) -> Answer<DomainConfig> {
    let xml = config.to_xml(XmlView::Inactive);
    // The last one: what programs keep in the document comes before it.
    let end = xml.rfind("</devices>");
    let end = end.ok_or_else(|| not_supported("persistent attach", kind))?;
    let (before, after) = xml.split_at(end);
    parse_domain(&format!("{before}{device}{after}"))
}

fn attach_flags(
    call: &DriverCall<'_>,
    (wanted, device, flags): (DomainRef, String, u32),
) -> Answer<()> {
    check_flags(
        flags,
        AFFECT_LIVE | AFFECT_CONFIG,
        "virDomainAttachDeviceFlags",
    )?;
    edit(call, &wanted, &device, flags, "attach", |old, kind| {
        with_device(old, &device, kind)
    })
}

/// Makes another definition out of a domain's by a device's document; `edit` is told of what kind the
/// device is. `what` is done to it.
fn edit(
    call: &DriverCall<'_>,
    wanted: &DomainRef,
    document: &str,
    flags: u32,
    what: &str,
    edit: impl FnOnce(&DomainConfig, &str) -> Answer<DomainConfig>,
) -> Answer<()> {
    let domain = call.driver.registry.find(wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let affected = affected(&domain, flags)?;
    let kind = device_kind(document)?;
    if affected.live {
        return Err(not_supported(&format!("live {what}"), &kind));
    }
    redefine(call.driver, &domain, |old| edit(old, &kind))
}

fn detach_flags(
    call: &DriverCall<'_>,
    (wanted, device, flags): (DomainRef, String, u32),
) -> Answer<()> {
    check_flags(
        flags,
        AFFECT_LIVE | AFFECT_CONFIG,
        "virDomainDetachDeviceFlags",
    )?;
    change(
        call,
        &wanted,
        &device,
        flags,
        "detach",
        |devices, _, slot| {
            devices.remove(slot);
            Ok(())
        },
    )
}

fn update(call: &DriverCall<'_>, (wanted, device, flags): (DomainRef, String, u32)) -> Answer<()> {
    check_flags(
        flags,
        AFFECT_LIVE | AFFECT_CONFIG | FORCE,
        "virDomainUpdateDeviceFlags",
    )?;
    change(
        call,
        &wanted,
        &device,
        flags,
        "update",
        |devices, new, slot| {
            if matches!(new.kind, PciDeviceKind::Rng(_)) {
                return Err(not_supported("persistent update", "rng"));
            }
            devices.remove(slot);
            // Where it was: a device that is another one to its guest would be a new one.
            let placed = devices.insert(Some(slot), new);
            placed.map(drop).map_err(|error| wrong(error.to_string()))
        },
    )
}

/// Changes the device of a definition that a document describes.
fn change(
    call: &DriverCall<'_>,
    wanted: &DomainRef,
    document: &str,
    flags: u32,
    what: &str,
    change: impl FnOnce(&mut PciDevices, PciDevice, PciSlot) -> Answer<()>,
) -> Answer<()> {
    edit(call, wanted, document, flags, what, |old, kind| {
        if !["disk", "interface", "rng"].contains(&kind) {
            return Err(not_supported(&format!("persistent {what}"), kind));
        }
        let device = read_device(document)?;
        let mut new = old.clone();
        let devices = &mut new.machine.devices.pci;
        let slot = find(devices, &device)?;
        change(devices, device, slot)?;
        Ok(new)
    })
}

/// Reads the document of a device on PCI.
fn read_device(document: &str) -> Answer<PciDevice> {
    // In a domain that is nobody's, so that it is held to all the rules.
    let domain = format!(
        "<domain type='kvm'><name>device</name><memory unit='MiB'>64</memory>\
         <os><type>hvm</type><kernel>/nowhere</kernel></os>\
         <devices>{document}<memballoon model='none'/></devices></domain>"
    );
    let config = parse_domain(&domain)?;
    let mut devices = config.machine.devices.pci.iter();
    let found = devices.next().map(|(_, device)| device.clone());
    found.ok_or_else(|| wrong("the document has no device"))
}

/// Finds the device that another is meant to be: a disk by its name, an interface by its address.
fn find(devices: &PciDevices, wanted: &PciDevice) -> Answer<PciSlot> {
    let is_it = |device: &PciDevice| match (&device.kind, &wanted.kind) {
        (PciDeviceKind::Disk(one), PciDeviceKind::Disk(other)) => one.target == other.target,
        (PciDeviceKind::Interface(one), PciDeviceKind::Interface(other)) => one.mac == other.mac,
        (PciDeviceKind::Rng(one), PciDeviceKind::Rng(other)) => one == other,
        _ => false,
    };
    let mut found = devices.iter().filter(|(_, device)| is_it(device));
    let slot = found.next().map(|(slot, _)| slot);
    slot.ok_or_else(|| match &wanted.kind {
        PciDeviceKind::Disk(disk) => wrong(format!("no target device {}", disk.target.as_str())),
        PciDeviceKind::Interface(interface) => RpcError::new(
            Code::DeviceMissing,
            format!("no device matching MAC address {} found", interface.mac),
        ),
        _ => RpcError::new(
            Code::DeviceMissing,
            "device not present in domain configuration",
        ),
    })
}
