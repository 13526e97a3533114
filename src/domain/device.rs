//! Devices: [`Devices`] has a field for each bus that they are on.

use super::error::ValueError;
use super::pci::PciDevices;
use super::values::HostPath;

/// Most serial ports. COM3 and COM4 share edge-triggered interrupt lines with
/// COM1 and COM2, where one port's interrupt can hide the other's.
pub const SERIAL_PORTS_MAX: usize = 2;
/// Longest name of a device, in bytes.
pub const ALIAS_BYTES_MAX: usize = 64;

/// The devices of a machine.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Devices {
    /// Serial ports; port 0 is also the console.
    pub serial: SerialPorts,
    /// Devices on PCI.
    pub pci: PciDevices,
}

/// A name that the user gave to a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UserAlias(String);

impl UserAlias {
    /// Makes a name that starts with `ua-`, as libvirt wants it.
    ///
    /// # Errors
    ///
    /// It starts otherwise, is too long, or has characters besides letters,
    /// digits, `-` and `_`.
    pub fn new(name: &str) -> Result<Self, ValueError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        let fits = name.len() <= ALIAS_BYTES_MAX && name.chars().all(is_allowed);
        if !fits || !UserAlias::is_user(name) {
            return Err(ValueError::new(
                name,
                "`ua-` and at most 61 letters, digits, '-' and '_'",
            ));
        }
        Ok(UserAlias(name.to_owned()))
    }

    pub(super) fn is_user(name: &str) -> bool {
        name.starts_with("ua-")
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Where the bytes of a serial port come from and go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialBackend {
    /// A pseudo-terminal, made when the machine starts.
    Pty,
    /// Nowhere.
    Null,
    /// The standard input and output of the machine's process.
    Stdio,
    /// A file that output is written to.
    File {
        /// The file.
        path: HostPath,
        /// Whether output is added at its end; `None`: the document does not
        /// say, so the file is emptied first.
        append: Option<bool>,
    },
    /// A Unix stream socket.
    Unix {
        /// The socket.
        path: HostPath,
        /// Whether the machine listens; otherwise it connects.
        listen: bool,
    },
}

impl SerialBackend {
    /// Returns the word that documents use.
    pub fn type_name(&self) -> &'static str {
        match self {
            SerialBackend::Pty => "pty",
            SerialBackend::Null => "null",
            SerialBackend::Stdio => "stdio",
            SerialBackend::File { .. } => "file",
            SerialBackend::Unix { .. } => "unix",
        }
    }

    /// Whether both would use the same thing of the host at once.
    fn collides_with(&self, other: &SerialBackend) -> bool {
        use SerialBackend::{File, Null, Pty, Stdio, Unix};
        match (self, other) {
            (Stdio, Stdio) => true,
            (
                File { path, .. } | Unix { path, .. },
                File { path: with, .. } | Unix { path: with, .. },
            ) => path == with,
            (Pty | Null | Stdio | File { .. } | Unix { .. }, _) => false,
        }
    }

    /// Refuses a second user of the same file, socket or terminal.
    pub(super) fn check_beside(&self, other: &SerialBackend) -> Result<(), ValueError> {
        if self.collides_with(other) {
            return Err(ValueError::new(
                other.type_name(),
                "free: another serial port or console uses the same one",
            ));
        }
        Ok(())
    }
}

/// A serial port: a 16550 UART.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// Where its bytes come from and go to.
    pub backend: SerialBackend,
    /// The user's name for it.
    pub alias: Option<UserAlias>,
}

impl From<SerialBackend> for SerialPort {
    fn from(backend: SerialBackend) -> Self {
        SerialPort {
            backend,
            alias: None,
        }
    }
}

/// The serial ports of a machine, no two of which use the same file, socket or
/// terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SerialPorts([Option<SerialPort>; SERIAL_PORTS_MAX]);

impl SerialPorts {
    /// Adds a port.
    ///
    /// # Errors
    ///
    /// There is no such port, it is there already, or another port has the
    /// same backend or name.
    pub fn insert(&mut self, index: usize, port: SerialPort) -> Result<(), ValueError> {
        for (_, other) in self.iter() {
            other.backend.check_beside(&port.backend)?;
            if let Some(alias) = &port.alias
                && other.alias.as_ref() == Some(alias)
            {
                return Err(ValueError::new(alias.as_str(), "unique among devices"));
            }
        }
        match self.0.get_mut(index) {
            Some(slot @ None) => {
                *slot = Some(port);
                Ok(())
            }
            _ => Err(ValueError::new(&index.to_string(), "a free port, 0 or 1")),
        }
    }

    /// Returns one port.
    pub fn get(&self, index: usize) -> Option<&SerialPort> {
        self.0.get(index)?.as_ref()
    }

    /// Returns the ports that are there, each with its number.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &SerialPort)> {
        let numbered = self.0.iter().enumerate();
        numbered.filter_map(|(index, port)| port.as_ref().map(|port| (index, port)))
    }

    /// Returns the lowest number that is free.
    pub(super) fn free_index(&self) -> Option<usize> {
        self.0.iter().position(Option::is_none)
    }
}

/// Standard I/O address and interrupt line of a serial port.
pub(super) const SERIAL_ADDRESSES: [(u64, u64); SERIAL_PORTS_MAX] = [(0x3f8, 4), (0x2f8, 3)];
