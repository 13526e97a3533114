//! What a machine has once: interrupt controllers, timer, clock, and its layout.

use kvm_bindings::{kvm_irqchip, kvm_pit_state2};
use serde::{Deserialize, Serialize};

use super::SectionPayload;

/// The two 8259s and the I/O APIC.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct IrqchipV1 {
    /// First 8259.
    pub pic_master: kvm_irqchip,
    /// Second 8259.
    pub pic_slave: kvm_irqchip,
    /// I/O APIC.
    pub ioapic: kvm_irqchip,
}

impl std::fmt::Debug for IrqchipV1 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The chips are unions of register dumps; there is nothing to read in them.
        f.debug_struct("IrqchipV1").finish_non_exhaustive()
    }
}

impl SectionPayload for IrqchipV1 {
    const KIND: &'static str = "irqchip";
    const VERSION: u16 = 1;
}

/// The 8254 timer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct PitV1 {
    /// Its channels, in KVM's form.
    pub channels: kvm_pit_state2,
}

impl SectionPayload for PitV1 {
    const KIND: &'static str = "pit";
    const VERSION: u16 = 1;
}

/// The paravirtual clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClockV1 {
    /// Nanoseconds that the guest's kvmclock had counted.
    pub guest_ns: u64,
    /// The host's wall clock at that moment, in nanoseconds since 1970.
    pub realtime_ns: u64,
}

impl SectionPayload for ClockV1 {
    const KIND: &'static str = "clock";
    const VERSION: u16 = 1;
}

/// One range of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamRangeV1 {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub bytes: u64,
}

/// What a machine consists of: a restore refuses another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineV1 {
    /// Guest memory.
    pub ram: Vec<RamRangeV1>,
    /// Number of vCPUs.
    pub vcpu_count: u32,
    /// Numbers of the serial ports, from 0 for COM1.
    pub serial_ports: Vec<u32>,
}

impl SectionPayload for MachineV1 {
    const KIND: &'static str = "machine";
    const VERSION: u16 = 1;
}
