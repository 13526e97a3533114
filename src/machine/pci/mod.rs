//! PCI: one bus, reached by configuration mechanism 1.
//!
//! Slot 0 has the host bridge. Every other function is a device with one memory BAR, which may be
//! anywhere in the window ([`layout`]), and interrupts by MSI-X only.

mod bus;
pub mod config;
pub mod layout;
pub mod msix;
mod platform;
#[cfg(test)]
pub(in crate::machine) mod testing;

use std::fmt;

use crate::sys::event::Event;

pub use bus::{PciBus, PciWindow};
pub use platform::KvmPlatform;

/// One function on the bus. Called by vCPU threads, by several at once.
pub trait PciFunction: fmt::Debug + Send + Sync {
    /// Reads `data.len()` bytes of configuration (1, 2 or 4, not across a long word).
    fn read_config(&self, at: usize, data: &mut [u8]);

    /// Writes configuration.
    fn write_config(&self, at: usize, data: &[u8]);

    /// Returns where its BAR answers now; `None` while the guest has it switched off.
    fn bar(&self) -> Option<u64>;

    /// Reads registers of the BAR.
    fn read_bar(&self, offset: u64, data: &mut [u8]);

    /// Writes registers of the BAR.
    fn write_bar(&self, offset: u64, data: &[u8]);
}

/// What a function needs of the machine around it.
pub trait Platform: fmt::Debug + Send + Sync {
    /// Sends an interrupt message. On return the interrupt controller has it: a state saved after
    /// that includes it.
    fn send_msi(&self, address: u64, data: u32);

    /// Has every write to `gpa` set `event`, without an exit to this process. Where that cannot
    /// be, the write arrives at the function's BAR as others do.
    fn attach(&self, event: &Event, gpa: u64);

    /// Ends [`Platform::attach`].
    fn detach(&self, event: &Event, gpa: u64);
}
