//! A running machine back to a saved state, in the same process, VM and memory.

use std::error::Error;

use super::lifecycle::MachineEvent;
use super::shared::{Holds, Shared};
use super::{Machine, MachineError, build};
use crate::kvmstate::{self, Board};
use crate::state::board::MachineV1;
use crate::state::vcpu::VcpuV1;
use crate::state::{CpuidEntry, StateSection, StateSet};

/// Why memory was not put back.
pub type MemoryFailure = Box<dyn Error + Send + Sync>;

/// Memory that is put back while nothing in the machine runs.
pub trait MemoryRewind {
    /// Finds out what must be put back and makes sure that it can be, and changes nothing: after
    /// an error the machine goes on as it was.
    fn prepare(&mut self) -> Result<Reuse, MemoryFailure>;

    /// Puts it back. After an error memory is nobody's, and the machine ends.
    fn put_back(&mut self) -> Result<(), MemoryFailure>;
}

/// What of memory is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// All that is not put back.
    Rest,
    /// Nothing: all of it reads zeros when it is put back.
    Nothing,
}

/// A saved state, as far as it was looked at before anything changes.
struct Checked {
    vcpus: Vec<VcpuV1>,
    board: Board,
    devices: StateSet,
}

impl Machine {
    /// Puts the machine back to `saved`, with the memory that `memory` puts back. A machine that its
    /// user has paused stays paused.
    ///
    /// The state must be of this machine: as many vCPUs that see the same CPU, the same memory and
    /// devices. What is refused, and what fails before memory changes, leaves the machine as it was;
    /// what fails after that ends it. The guest has a new generation id, and is told. Waits for an
    /// engine's pause to end.
    pub fn rewind(
        &self,
        saved: StateSet,
        memory: &mut dyn MemoryRewind,
    ) -> Result<(), MachineError> {
        self.shared.rewind(saved, memory)
    }
}

impl Shared {
    fn rewind(&self, saved: StateSet, memory: &mut dyn MemoryRewind) -> Result<(), MachineError> {
        let mut holds = self.lock_changing();
        self.lifecycle.check(&MachineEvent::Rewound)?;
        let checked = self.check_saved(saved)?;
        self.while_stopped(|| self.rewind_stopped(&mut holds, checked, memory))?;
        self.lifecycle.apply(&MachineEvent::Rewound)?;
        Ok(())
    }

    /// Does it with all vCPUs stopped.
    fn rewind_stopped(
        &self,
        holds: &mut Holds,
        checked: Checked,
        memory: &mut dyn MemoryRewind,
    ) -> Result<(), MachineError> {
        self.devices.quiesce()?;
        let reuse = match memory.prepare() {
            Ok(reuse) => reuse,
            Err(source) => {
                self.devices.resume();
                return Err(MachineError::Rewind { source });
            }
        };
        let result = self.put_back(checked, memory, reuse);
        self.devices.resume();
        self.end_unless_anew(holds, "be put back", &result);
        result
    }

    /// Fails where the state is of another machine; changes nothing.
    fn check_saved(&self, mut saved: StateSet) -> Result<Checked, MachineError> {
        build::check_layout(&saved.take::<MachineV1>(0)?, &self.spec)?;
        let vcpus = kvmstate::take_vcpus(&mut saved, self.vcpus.len())?;
        for (number, (saved, now)) in vcpus.iter().zip(&self.power_on.vcpus).enumerate() {
            if let Some(what) = other_cpu(&saved.cpuid, &now.cpuid) {
                let what = format!("vCPU {number} sees another CPU: {what}");
                return Err(MachineError::OtherMachine { what });
            }
        }
        let board = kvmstate::take_board(&mut saved)?;
        let name = |section: &StateSection| {
            let StateSection { kind, instance, .. } = section;
            format!("{kind}.{instance} version {}", section.version)
        };
        let mut theirs: Vec<_> = saved.sections().iter().map(name).collect();
        let ours = self.devices.all().flat_map(|device| device.save());
        let mut ours: Vec<_> = ours.map(|section| name(&section)).collect();
        theirs.sort_unstable();
        ours.sort_unstable();
        if theirs != ours {
            let (theirs, ours) = (theirs.join(", "), ours.join(", "));
            let what = format!("it has {theirs}; this one has {ours}");
            return Err(MachineError::OtherMachine { what });
        }
        let devices = saved;
        Ok(Checked {
            vcpus,
            board,
            devices,
        })
    }

    /// Memory first: KVM writes the guest's clock into it, and the rest is as in a restore.
    fn put_back(
        &self,
        checked: Checked,
        memory: &mut dyn MemoryRewind,
        reuse: Reuse,
    ) -> Result<(), MachineError> {
        let Checked {
            vcpus: saved,
            board,
            mut devices,
        } = checked;
        if reuse == Reuse::Nothing {
            self.ram.discard_all()?;
        }
        memory
            .put_back()
            .map_err(|source| MachineError::Rewind { source })?;
        let vcpus: Vec<_> = self.vcpus.iter().map(|vcpu| &vcpu.fd).collect();
        let policy = self.spec.clock.after_restore;
        kvmstate::put_back(&self.vm, &vcpus, &board, &saved, policy)?;
        if let Some(paused) = &mut *self.lock_paused_clock() {
            *paused = kvmstate::save_clock(&self.vm)?.guest_ns;
        }
        for device in self.devices.all() {
            device.reset();
            device.restore(&mut devices)?;
        }
        devices.finish()?;
        self.firmware.renew_generation_id();
        build::tell_of_restore(self);
        Ok(())
    }
}

/// Returns the first difference of two CPUs, by their CPUID, but for the bits in which KVM shows
/// what the guest has set.
fn other_cpu(saved: &[CpuidEntry], now: &[CpuidEntry]) -> Option<String> {
    if saved.len() != now.len() {
        return Some(format!("{} CPUID entries, now {}", saved.len(), now.len()));
    }
    let differ = saved.iter().zip(now).find(|(a, b)| fixed(a) != fixed(b));
    differ.map(|(a, _)| format!("CPUID {:#x}.{}", a.function, a.index))
}

fn fixed(entry: &CpuidEntry) -> CpuidEntry {
    /// MONITOR and OSXSAVE.
    const LEAF_1_ECX: u32 = 1 << 3 | 1 << 27;
    /// APIC.
    const LEAF_1_EDX: u32 = 1 << 9;
    /// OSPKE.
    const LEAF_7_ECX: u32 = 1 << 4;
    let mut entry = *entry;
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ecx &= !LEAF_1_ECX;
            entry.edx &= !LEAF_1_EDX;
        }
        (7, 0) => entry.ecx &= !LEAF_7_ECX,
        // The size of what XCR0 and IA32_XSS enable.
        (0xd, 0 | 1) => entry.ebx = 0,
        _ => {}
    }
    entry
}
