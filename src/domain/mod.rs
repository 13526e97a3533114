//! libvirt domain XML and the machine it describes.
//!
//! [`DomainConfig::parse`] turns a document into a [`DomainConfig`], and
//! [`DomainConfig::to_xml`] turns it back. A document is read in three steps:
//! `document` makes a tree in which every element knows its line; `rules` holds
//! the tree to a table of the whole format, so that what is not carried out is
//! refused by name; `parse` interprets what is left. Types carry the rest: a
//! [`MachineConfig`] that exists is a machine that can be built, as far as can
//! be said without asking the host.
//!
//! Documents come from users, clients and checkpoint images, and are treated as
//! hostile: every size has a limit, entities are not expanded, and nothing here
//! opens a file.

#![warn(clippy::indexing_slicing)]

mod balloon;
mod clock;
mod cpu;
mod cpu_features;
mod device;
mod disk;
mod document;
mod error;
mod format;
mod format_pci;
mod interface;
mod memory;
mod metadata;
mod parse;
mod parse_devices;
mod parse_pci;
mod pci;
mod periodic;
mod rng;
mod rules;
mod same_guest;
mod table;
mod table_devices;
mod table_pci;
#[cfg(test)]
mod tests;
mod values;

use uuid::Uuid;

pub use balloon::Balloon;
pub use clock::{
    ClockBasis, ClockConfig, ClockOffset, TIMEZONE_BYTES_MAX, TickPolicy, TimeZoneName,
};
pub use cpu::{CpuConfig, CpuMode, CpuModel, CpuTopology, FeaturePolicy, VCPUS_MAX, Vcpus};
pub use cpu_features::{CpuFeature, CpuidRegister};
pub use device::{
    ALIAS_BYTES_MAX, Devices, SERIAL_PORTS_MAX, SerialBackend, SerialPort, SerialPorts, UserAlias,
};
pub use disk::{
    Disk, DiskCache, DiskFormat, DiskSerial, DiskSourceKind, DiskTarget, SERIAL_BYTES_MAX,
    TARGET_BYTES_MAX,
};
pub use document::{
    ATTRIBUTES_MAX, DEPTH_MAX, DOCUMENT_BYTES_MAX, ELEMENTS_MAX, NAMESPACES_MAX, TEXT_BYTES_MAX,
};
pub use error::{DomainError, Note, Place, Quote, ValueError};
pub use format::{LiveInfo, XmlView};
pub use interface::{
    HostInterface, INTERFACE_NAME_BYTES_MAX, Interface, InterfaceSource, MacAddress,
};
pub use memory::{
    HugePageSize, MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, MEMORY_BYTES_MULTIPLE, MemoryConfig,
    MemorySize, MemorySource,
};
pub use metadata::Metadata;
pub use pci::{PCI_SLOT_MAX, PciDevice, PciDeviceKind, PciDevices, PciSlot};
pub use periodic::{METADATA_NAMESPACE, Periodic};
pub use rng::{RNG_PERIOD_MS, Rng, RngRate, RngSource};
pub use rules::{Disposition, Rule, reference, rules};
pub use same_guest::OtherGuest;
pub use values::{
    BUILTIN_BYTES_MAX, BootConfig, BuiltinName, CMDLINE_BYTES_MAX, Description, DomainName,
    HostPath, KernelCmdline, KernelSource, Lifecycle, LifecycleAction, NAME_BYTES_MAX,
    PATH_BYTES_MAX, TITLE_BYTES_MAX, Title,
};

/// A machine, without the name and the wishes of who runs it.
#[derive(Clone, Debug, PartialEq)]
pub struct MachineConfig {
    /// Guest memory.
    pub memory: MemoryConfig,
    /// The vCPUs.
    pub vcpus: Vcpus,
    /// The CPU that the guest sees.
    pub cpu: CpuConfig,
    /// What the machine starts with.
    pub boot: BootConfig,
    /// The guest's clocks.
    pub clock: ClockConfig,
    /// The devices.
    pub devices: Devices,
}

impl MachineConfig {
    /// Makes a machine with one vCPU, the host's CPU and no devices.
    pub fn new(memory: MemorySize, boot: BootConfig) -> Self {
        MachineConfig {
            memory: MemoryConfig::new(memory),
            vcpus: Vcpus::ONE,
            cpu: CpuConfig::default(),
            boot,
            clock: ClockConfig::default(),
            devices: Devices::default(),
        }
    }
}

/// A domain: a machine, its name, and what to do when it stops.
#[derive(Clone, Debug, PartialEq)]
pub struct DomainConfig {
    /// Name, unique on a host.
    pub name: DomainName,
    /// Identity; a document without one is given a random one.
    pub uuid: Uuid,
    /// A short text for people.
    pub title: Option<Title>,
    /// A longer text for people.
    pub description: Option<Description>,
    /// What other programs stored in the document.
    pub metadata: Option<Metadata>,
    /// What to do when the guest stops by itself.
    pub lifecycle: Lifecycle,
    /// The machine.
    pub machine: MachineConfig,
    /// Namespace declarations of the root, which metadata may use.
    namespaces: Vec<(String, String)>,
    /// What the document has besides, without effect.
    kept: rules::Kept,
}

impl DomainConfig {
    /// Makes a domain with a random UUID and libvirt's default lifecycle.
    pub fn new(name: DomainName, machine: MachineConfig) -> Self {
        DomainConfig {
            name,
            uuid: Uuid::new_v4(),
            title: None,
            description: None,
            metadata: None,
            lifecycle: Lifecycle::default(),
            machine,
            namespaces: Vec::new(),
            kept: rules::Kept::default(),
        }
    }

    /// Reads a document.
    ///
    /// # Errors
    ///
    /// The document is malformed, contradicts itself, or asks for something
    /// this program does not carry out. The error says what and where.
    pub fn parse(xml: &str) -> Result<DomainConfig, DomainError> {
        DomainConfig::parse_with_notes(xml).map(|(config, _)| config)
    }

    /// Reads a document whose encoding has not been checked.
    ///
    /// # Errors
    ///
    /// As for [`DomainConfig::parse`]; also where the bytes are not UTF-8.
    pub fn parse_bytes(xml: &[u8]) -> Result<DomainConfig, DomainError> {
        if xml.len() > DOCUMENT_BYTES_MAX {
            return Err(document::too_many_bytes());
        }
        match std::str::from_utf8(xml) {
            Ok(xml) => DomainConfig::parse(xml),
            Err(error) => Err(document::bad_encoding(xml, error.valid_up_to())),
        }
    }

    /// Reads a document and says what of it has no effect, or another effect
    /// than in libvirt.
    ///
    /// # Errors
    ///
    /// As for [`DomainConfig::parse`].
    pub fn parse_with_notes(xml: &str) -> Result<(DomainConfig, Vec<Note>), DomainError> {
        let root = document::read(xml)?;
        let survey = rules::survey(&root)?;
        parse::domain(&root, survey)
    }

    /// Writes the domain as a document in canonical form: defaults filled in,
    /// sections in libvirt's order. Reading it gives an equal domain.
    pub fn to_xml(&self, view: XmlView<'_>) -> String {
        format::document(self, view)
    }
}
