//! What a firmware leaves in guest memory: the tables that kernels look for.

use std::sync::{Mutex, MutexGuard, PoisonError};

use uuid::Uuid;

use super::memory::GuestMemory;
use super::spec::MachineSpec;
use super::{acpi, smbios};

/// The tables of one machine.
#[derive(Debug)]
pub(super) struct Firmware {
    parts: acpi::Parts,
    uuid: Uuid,
    /// Stays the same when the guest starts over; each machine that is restored has another one,
    /// since others may have been restored from the same image.
    generation_id: Mutex<Uuid>,
}

impl Firmware {
    pub fn new(spec: &MachineSpec, apic_ids: &[u32]) -> Self {
        Self {
            parts: acpi::Parts {
                apic_ids: apic_ids.to_vec(),
                serial_ports: spec.serials.iter().map(|serial| serial.port).collect(),
            },
            uuid: spec.uuid,
            generation_id: Mutex::new(Uuid::new_v4()),
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
        acpi::write_generation_id(memory, *self.lock_generation_id());
    }

    /// Takes another generation id: the machine goes back, and will be what it was a second time.
    pub fn renew_generation_id(&self) {
        *self.lock_generation_id() = Uuid::new_v4();
    }

    fn lock_generation_id(&self) -> MutexGuard<'_, Uuid> {
        self.generation_id
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
