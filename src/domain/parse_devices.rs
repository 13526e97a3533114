//! Interprets `<devices>`.

use super::device::{Devices, SERIAL_ADDRESSES, SerialBackend, SerialPort, SerialPorts, UserAlias};
use super::document::{Element, is_space};
use super::error::{DomainError, ValueError};
use super::parse::number;
use super::parse_pci::pci_devices;
use super::values::HostPath;

/// Reads the devices of a domain; it may have none.
pub(super) fn devices(root: &Element) -> Result<Devices, DomainError> {
    let Some(devices) = root.child("devices") else {
        return Ok(Devices::default());
    };
    let serial = serial_ports(devices)?;
    let pci = pci_devices(devices, &serial)?;
    Ok(Devices { serial, pci })
}

fn serial_ports(devices: &Element) -> Result<SerialPorts, DomainError> {
    let mut ports = SerialPorts::default();
    // Ports that say their number go first, or an earlier one that does not
    // could take it.
    let (numbered, others): (Vec<_>, Vec<_>) = devices
        .children_named("serial")
        .partition(|serial| target_port(serial).is_some());
    for serial in numbered.into_iter().chain(others) {
        let index = match target_port(serial) {
            Some((target, text)) => {
                let port = number(target, "port", text)?;
                usize::try_from(port).unwrap_or(usize::MAX)
            }
            None => ports.free_index().ok_or_else(|| {
                serial.conflict("a machine has at most 2 serial ports".to_owned())
            })?,
        };
        check_address(serial, index)?;
        let port = SerialPort {
            backend: backend(serial)?,
            alias: user_alias(serial)?,
        };
        let inserted = ports.insert(index, port);
        inserted.map_err(|error| serial.refuse("serial port", error))?;
    }
    consoles(devices, &mut ports)?;
    Ok(ports)
}

fn target_port(device: &Element) -> Option<(&Element, &str)> {
    let target = device.child("target")?;
    Some((target, target.attribute("port")?))
}

/// Reads consoles: the first is serial port 0, as in libvirt.
fn consoles(devices: &Element, ports: &mut SerialPorts) -> Result<(), DomainError> {
    let mut consoles = devices
        .children_named("console")
        .filter(|console| !is_virtio_console(console));
    let Some(console) = consoles.next() else {
        return Ok(());
    };
    if let Some((target, text)) = target_port(console)
        && number(target, "port", text)? != 0
    {
        return Err(target.invalid("port", text, "0: the first console is serial port 0"));
    }
    let stated = backend(console)?;
    match ports.get(0) {
        None => {
            let inserted = ports.insert(0, SerialPort::from(stated));
            inserted.map_err(|error| console.refuse("console", error))?;
        }
        Some(port) if same_endpoint(&port.backend, &stated) => {}
        Some(port) => {
            return Err(console.conflict(format!(
                "the first console is serial port 0 under another name, \
                 but that is of type {} with another source",
                port.backend.type_name()
            )));
        }
    }
    match consoles.next() {
        None => Ok(()),
        Some(second) => Err(DomainError::Unsupported {
            place: second.place(),
            reason: "the machine has one serial console; a second console is of target type virtio",
        }),
    }
}

/// Whether a console is a virtio device, and not a serial port under another name.
pub(super) fn is_virtio_console(console: &Element) -> bool {
    let target = console.child("target");
    target.is_some_and(|target| target.attribute("type") == Some("virtio"))
}

/// Whether a console says the same as the port it mirrors; it may leave out how
/// a file is opened.
fn same_endpoint(port: &SerialBackend, console: &SerialBackend) -> bool {
    match (port, console) {
        (SerialBackend::File { path, .. }, SerialBackend::File { path: other, .. }) => {
            path == other
        }
        (port, console) => port == console,
    }
}

pub(super) fn user_alias(device: &Element) -> Result<Option<UserAlias>, DomainError> {
    let Some(alias) = device.child("alias") else {
        return Ok(None);
    };
    let name = alias.attribute("name").unwrap_or_default();
    if !UserAlias::is_user(name) {
        return Ok(None);
    }
    let user_alias = UserAlias::new(name).map(Some);
    user_alias.map_err(|error| alias.refuse("name", error))
}

/// Reads where a serial port's or a console's bytes come from and go to.
pub(super) fn backend(device: &Element) -> Result<SerialBackend, DomainError> {
    let kind = device.attribute("type").unwrap_or_default();
    let source = device.child("source");
    if let Some(source) = source {
        let owners = [
            ("path", ["file", "unix", "pty"].as_slice()),
            ("mode", &["unix"]),
            ("append", &["file"]),
        ];
        for (what, owners) in owners {
            if source.attribute(what).is_some() && !owners.contains(&kind) {
                return Err(source.conflict(format!("type='{kind}' has no attribute {what}")));
            }
        }
    }
    let path = || {
        let missing = |place: &Element, what| DomainError::Missing {
            place: place.place(),
            what,
            hint: "",
        };
        let source = source.ok_or_else(|| missing(device, "<source>"))?;
        let path = source.attribute("path");
        let path = path.ok_or_else(|| missing(source, "path"))?;
        HostPath::new(path).map_err(|error| source.refuse("path", error))
    };
    let attribute = |what| source.and_then(|source| source.attribute(what));
    Ok(match kind {
        "file" => SerialBackend::File {
            path: path()?,
            append: attribute("append").map(|append| append == "on"),
        },
        "unix" => SerialBackend::Unix {
            path: path()?,
            listen: attribute("mode") == Some("bind"),
        },
        "null" => SerialBackend::Null,
        "stdio" => SerialBackend::Stdio,
        _ => SerialBackend::Pty,
    })
}

/// Checks that an address, where one is given, is the one the port has.
fn check_address(device: &Element, index: usize) -> Result<(), DomainError> {
    let Some(address) = device.child("address") else {
        return Ok(());
    };
    let Some(&(iobase, irq)) = SERIAL_ADDRESSES.get(index) else {
        return Ok(());
    };
    for (what, standard) in [("iobase", iobase), ("irq", irq)] {
        let Some(text) = address.attribute(what) else {
            continue;
        };
        if unsigned(text) != Some(standard) {
            let expected = "the port's standard one: 0x3f8 and 4, or 0x2f8 and 3";
            return Err(address.refuse(what, ValueError::new(text, expected)));
        }
    }
    Ok(())
}

/// Reads a number that may be hexadecimal, as addresses are.
pub(super) fn unsigned(text: &str) -> Option<u64> {
    let text = text.trim_matches(is_space);
    let (digits, radix) = match text.strip_prefix("0x") {
        Some(digits) => (digits, 16),
        None => (text, 10),
    };
    // from_str_radix takes a sign, which addresses do not have.
    let plain = digits.chars().all(|c| c.is_ascii_hexdigit());
    plain.then(|| u64::from_str_radix(digits, radix).ok())?
}
