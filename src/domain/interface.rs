//! Network interfaces.

use std::fmt;

use uuid::Uuid;

use super::error::ValueError;

/// Longest name of a network interface of the host, in bytes: the kernel's limit.
pub const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// How generated addresses start: the range that KVM's guests have by custom.
const GENERATED_START: [u8; 3] = [0x52, 0x54, 0x00];
/// How names start that belong to a running machine.
const RUNNING_NAME: &str = "vnet";

/// Hardware address of a network interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// Makes an address.
    ///
    /// # Errors
    ///
    /// It is one of many receivers, or all zeros.
    pub fn new(bytes: [u8; 6]) -> Result<Self, ValueError> {
        let address = MacAddress(bytes);
        let [first, ..] = bytes;
        if first & 1 == 0 && bytes != [0; 6] {
            return Ok(address);
        }
        let expected = "one receiver's address: the first number must be even, and not all zeros";
        Err(ValueError::new(&address.to_string(), expected))
    }

    /// Reads `52:54:00:12:34:56`.
    ///
    /// # Errors
    ///
    /// It is something else, or as for [`MacAddress::new`].
    pub fn parse(text: &str) -> Result<Self, ValueError> {
        let digits = |part: &str| part.len() <= 2 && part.chars().all(|c| c.is_ascii_hexdigit());
        let mut parts = text.split(':');
        let mut bytes = [0; 6];
        for byte in &mut bytes {
            let part = parts.next().filter(|part| digits(part));
            let value = part.and_then(|part| u8::from_str_radix(part, 16).ok());
            *byte = value.ok_or_else(|| malformed(text))?;
        }
        if parts.next().is_some() {
            return Err(malformed(text));
        }
        MacAddress::new(bytes)
    }

    /// Makes a random one.
    pub fn generate() -> Self {
        let [a, b, c] = GENERATED_START;
        let [d, e, f, ..] = Uuid::new_v4().into_bytes();
        MacAddress([a, b, c, d, e, f])
    }

    /// Returns its bytes.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

fn malformed(text: &str) -> ValueError {
    ValueError::new(text, "six hexadecimal numbers, as in 52:54:00:12:34:56")
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Name of a network interface of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInterface(String);

impl HostInterface {
    /// Makes a name.
    ///
    /// # Errors
    ///
    /// No interface can have it, or it has characters besides letters, digits, `-`, `_` and `.`.
    pub fn new(name: &str) -> Result<Self, ValueError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        let fits = (1..=INTERFACE_NAME_BYTES_MAX).contains(&name.len());
        if fits && name.chars().all(is_allowed) && ![".", ".."].contains(&name) {
            return Ok(HostInterface(name.to_owned()));
        }
        let expected = "1 to 15 letters, digits, '-', '_' and '.'";
        Err(ValueError::new(name, expected))
    }

    /// Whether the name belongs to a running machine, as libvirt has it.
    pub(super) fn is_of_running(name: &str) -> bool {
        name.starts_with(RUNNING_NAME)
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// What a network interface of the guest is connected to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InterfaceSource {
    /// A tap of the host, which whoever owns the machine connects.
    Ethernet {
        /// Whether the tap is there already, and is left as it is; `None`: the document does not
        /// say, so that one is made.
        managed: Option<bool>,
    },
    /// A tap that is made, and is put on this bridge of the host.
    Bridge(HostInterface),
}

/// A network interface of the guest, as a virtio device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its hardware address.
    pub mac: MacAddress,
    /// What it is connected to.
    pub source: InterfaceSource,
    /// Name of the tap; `None` for a new one at each start.
    pub target: Option<HostInterface>,
    /// Whether its cable is plugged in; `None`: the document does not say, so it is.
    pub link_up: Option<bool>,
}

impl Interface {
    /// Makes an interface with a random address, and a new tap at each start.
    pub fn new(source: InterfaceSource) -> Self {
        Interface {
            mac: MacAddress::generate(),
            source,
            target: None,
            link_up: None,
        }
    }

    /// Whether the tap is not made, but has to be there.
    pub fn needs_tap(&self) -> bool {
        let managed = &self.source;
        matches!(
            managed,
            InterfaceSource::Ethernet {
                managed: Some(false)
            }
        )
    }

    /// Makes it another one, beside which the old one may be in use: with a new address, and,
    /// where the tap is made by the machine, with a new tap.
    pub fn renew(&mut self) {
        self.mac = MacAddress::generate();
        if !self.needs_tap() {
            self.target = None;
        }
    }

    /// Refuses a second interface of the same address or tap.
    pub(super) fn check_beside(&self, other: &Interface) -> Result<(), ValueError> {
        if self.mac == other.mac {
            let expected = "another address than the other interfaces'";
            return Err(ValueError::new(&other.mac.to_string(), expected));
        }
        match &other.target {
            Some(target) if self.target.as_ref() == Some(target) => Err(ValueError::new(
                target.as_str(),
                "free: another interface has the same tap",
            )),
            _ => Ok(()),
        }
    }
}
