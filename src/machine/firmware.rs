//! What a firmware leaves in guest memory: the tables that kernels look for.

use uuid::Uuid;

use super::memory::GuestMemory;
use super::spec::MachineSpec;
use super::{acpi, smbios};

/// The tables of one machine.
#[derive(Clone, Debug)]
pub(super) struct Firmware {
    parts: acpi::Parts,
    uuid: Uuid,
    /// Stays the same when the guest starts over; each machine that is restored has another one,
    /// since others may have been restored from the same image.
    generation_id: Uuid,
}

impl Firmware {
    pub fn new(spec: &MachineSpec, apic_ids: &[u32]) -> Self {
        Self {
            parts: acpi::Parts {
                apic_ids: apic_ids.to_vec(),
                serial_ports: spec.serials.iter().map(|serial| serial.port).collect(),
            },
            uuid: spec.uuid,
            generation_id: Uuid::new_v4(),
        }
    }

    /// Writes all tables, for a kernel that is about to start.
    pub fn write(&self, memory: &GuestMemory) {
        acpi::write(memory, &self.parts);
        self.write_identity(memory);
    }

    /// Writes what tells this machine from the one that was saved: generation id and UUID.
    pub fn write_identity(&self, memory: &GuestMemory) {
        smbios::write(memory, self.uuid);
        acpi::write_generation_id(memory, self.generation_id);
    }
}
