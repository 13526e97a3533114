//! The states of PCI and of the devices on it.

use serde::{Deserialize, Serialize};

use super::SectionPayload;

/// The PCI bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciV1 {
    /// What the guest wrote last to the address register of mechanism 1.
    pub config_address: u32,
}

impl SectionPayload for PciV1 {
    const KIND: &'static str = "pci";
    const VERSION: u16 = 1;
}

/// One vector of MSI-X.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixVectorV1 {
    /// Where the message goes.
    pub address: u64,
    /// The message.
    pub data: u32,
    /// Whether the vector is masked.
    pub masked: bool,
    /// Whether it was to be sent while it was masked.
    pub pending: bool,
}

/// One virtqueue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtqueueV1 {
    /// Number of descriptors.
    pub size: u16,
    /// Whether the driver enabled it.
    pub enabled: bool,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the ring that the driver writes.
    pub driver_ring: u64,
    /// Address of the ring that the device writes.
    pub device_ring: u64,
    /// How many buffers the device has taken, modulo 2^16.
    pub next_available: u16,
    /// How many it has given back, modulo 2^16.
    pub next_used: u16,
    /// Its MSI-X vector; 0xffff for none.
    pub vector: u16,
}

/// A virtio device on PCI, but for what its kind has besides.
///
/// Its instance is its slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioPciV1 {
    /// Kind of device, by the numbers of the virtio specification.
    pub device_type: u16,
    /// PCI command register.
    pub command: u16,
    /// First base address register.
    pub bar: u32,
    /// Interrupt line register, which means nothing but keeps what is written.
    pub interrupt_line: u8,
    /// Where the configuration access capability points: BAR, offset, length.
    pub access_window: (u8, u32, u32),
    /// Whether MSI-X is on.
    pub msix_enabled: bool,
    /// Whether all vectors are masked.
    pub msix_masked: bool,
    /// The vectors.
    pub vectors: Vec<MsixVectorV1>,
    /// Device status; `DEVICE_NEEDS_RESET` in it as well.
    pub status: u8,
    /// Which half of the device's features is shown.
    pub device_feature_select: u32,
    /// Which half of the driver's features is written.
    pub driver_feature_select: u32,
    /// Features that the driver took.
    pub driver_features: u64,
    /// Features that the device offered: another build may offer others.
    pub device_features: u64,
    /// MSI-X vector of configuration changes; 0xffff for none.
    pub config_vector: u16,
    /// Which queue is shown.
    pub queue_select: u16,
    /// The queues.
    pub queues: Vec<VirtqueueV1>,
}

impl SectionPayload for VirtioPciV1 {
    const KIND: &'static str = "virtio-pci";
    const VERSION: u16 = 1;
}

/// A virtio network device. Its instance is its slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioNetV1 {
    /// Its hardware address, which its driver has read.
    pub mac: [u8; 6],
}

impl SectionPayload for VirtioNetV1 {
    const KIND: &'static str = "virtio-net";
    const VERSION: u16 = 1;
}

/// A console. Its instance is its slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioConsoleV1 {
    /// Bytes of the next request of its second queue that have gone out already.
    pub taken: u32,
}

impl SectionPayload for VirtioConsoleV1 {
    const KIND: &'static str = "virtio-console";
    const VERSION: u16 = 1;
}

/// A balloon. Its instance is its slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioBalloonV1 {
    /// How many pages of 4 KiB the guest is asked to give.
    pub target_pages: u32,
    /// How many it says that it has given.
    pub actual_pages: u32,
}

impl SectionPayload for VirtioBalloonV1 {
    const KIND: &'static str = "virtio-balloon";
    const VERSION: u16 = 1;
}

/// A virtio disk. Its instance is its slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioBlkV1 {
    /// Size of the disk in sectors of 512 bytes.
    pub sectors: u64,
}

impl SectionPayload for VirtioBlkV1 {
    const KIND: &'static str = "virtio-blk";
    const VERSION: u16 = 1;
}
