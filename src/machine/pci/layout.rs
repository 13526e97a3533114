//! Where PCI is: its ports, its window of memory, and what the machine puts there.

use crate::machine::memory::{HOLE_END, HOLE_START};

/// Ports of configuration mechanism 1: the address register, then the data register.
pub const CONFIG_PORT: u64 = 0xcf8;
/// How many ports they take.
pub const CONFIG_PORTS: u64 = 8;

/// First byte of the window that BARs may be in.
pub const MMIO_START: u64 = HOLE_START;
/// First byte behind it; the I/O APIC follows.
pub const MMIO_END: u64 = 0xfec0_0000;

/// Slots of the one bus, of which 0 is the host bridge's.
pub const SLOTS: u8 = 32;

/// Bytes of the BAR of a virtio device, and how far apart the machine places them.
pub const VIRTIO_BAR_BYTES: u64 = 0x1_0000;

const _: () = assert!(MMIO_START < MMIO_END && MMIO_END < HOLE_END);
// All of them lie in the first 2 MiB of the window.
const _: () = assert!(SLOTS as u64 * VIRTIO_BAR_BYTES <= 2 << 20);

/// Returns where the machine places the BAR of the device in `slot`; the guest may move it.
pub fn initial_bar(slot: u8) -> u32 {
    let address = MMIO_START + u64::from(slot) * VIRTIO_BAR_BYTES;
    u32::try_from(address).expect("the window is below 4 GiB")
}
