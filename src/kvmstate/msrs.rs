//! Model-specific registers: which are saved, and how they are set.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use super::{KvmStateError, os_error};
use crate::state::vcpu::MsrV1;

/// Time stamp counter: saved apart, see [`super::tsc`].
pub(super) const TSC: u32 = 0x10;
/// Deadline of the local APIC's timer: set last, see [`super::vcpu`].
pub(super) const TSC_DEADLINE: u32 = 0x6e0;

/// MSRs that KVM's list leaves out although a guest may use them: TSC_AUX, SPEC_CTRL, and the
/// memory types. Those that a KVM refuses to read are left out by [`MsrSet::probe`].
const NOT_LISTED: &[u32] = &[0xc000_0103, 0x48, 0x250, 0x258, 0x259, 0x2ff];

/// Fixed-range memory types of 4 KiB ranges, and the variable ranges: not in KVM's list either.
const NOT_LISTED_RANGES: [std::ops::RangeInclusive<u32>; 2] = [0x268..=0x26f, 0x200..=0x20f];

/// The most MSRs in one call; KVM takes 256.
const BATCH_MAX: usize = 128;

/// The MSRs that are saved from each vCPU of a VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrSet {
    indices: Vec<u32>,
}

impl MsrSet {
    /// Finds out which MSRs `vcpu` can save: those that KVM lists, and some that it does not.
    ///
    /// Depends on the vCPU's CPUID, which is therefore set before.
    pub fn probe(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, KvmStateError> {
        let list = kvm
            .get_msr_index_list()
            .map_err(KvmStateError::vm("list the MSRs"))?;
        let mut wanted: Vec<u32> = list.as_slice().to_vec();
        wanted.extend(NOT_LISTED);
        wanted.extend(NOT_LISTED_RANGES.into_iter().flatten());
        wanted.sort_unstable();
        wanted.dedup();
        // Read one by one: KVM lists some that this CPU model then refuses.
        wanted.retain(|&index| index != TSC && read_batch(vcpu, &[index]).len() == 1);
        Ok(Self { indices: wanted })
    }

    /// Returns the numbers of the MSRs, sorted; the time stamp counter is not among them.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// Reads them all.
    pub(super) fn save(&self, vcpu: &VcpuFd, number: u32) -> Result<Vec<MsrV1>, KvmStateError> {
        let mut saved = Vec::with_capacity(self.indices.len());
        for batch in self.indices.chunks(BATCH_MAX) {
            let read = read_batch(vcpu, batch);
            if let Some(&index) = batch.get(read.len()) {
                return Err(KvmStateError::GetMsr {
                    vcpu: number,
                    index,
                });
            }
            saved.extend(read);
        }
        Ok(saved)
    }
}

/// Reads MSRs until the first that KVM refuses.
fn read_batch(vcpu: &VcpuFd, indices: &[u32]) -> Vec<MsrV1> {
    let entries: Vec<_> = indices
        .iter()
        .map(|&index| kvm_msr_entry {
            index,
            ..Default::default()
        })
        .collect();
    let mut msrs = Msrs::from_entries(&entries).expect("a batch is shorter than KVM's limit");
    let read = vcpu.get_msrs(&mut msrs).unwrap_or(0);
    msrs.as_slice()
        .iter()
        .take(read)
        .map(|entry| MsrV1 {
            index: entry.index,
            value: entry.data,
        })
        .collect()
}

/// Reads one MSR, or `None` where KVM refuses.
pub(super) fn read(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    read_batch(vcpu, &[index]).first().map(|msr| msr.value)
}

/// Sets MSRs in the order given.
///
/// One that KVM refuses is an error unless it has the wanted value already: some are listed and
/// readable but cannot be set, not even to the value that they have.
pub(super) fn write(vcpu: &VcpuFd, number: u32, wanted: &[MsrV1]) -> Result<(), KvmStateError> {
    let mut rest = wanted;
    while !rest.is_empty() {
        let batch = &rest[..rest.len().min(BATCH_MAX)];
        let entries: Vec<_> = batch
            .iter()
            .map(|msr| kvm_msr_entry {
                index: msr.index,
                data: msr.value,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).expect("a batch is shorter than KVM's limit");
        let set = vcpu.set_msrs(&msrs).map_err(|error| KvmStateError::Vcpu {
            what: "set MSRs",
            vcpu: number,
            source: os_error(error),
        })?;
        rest = &rest[set.min(rest.len())..];
        if set < batch.len() {
            let refused = rest[0];
            if read(vcpu, refused.index) != Some(refused.value) {
                return Err(KvmStateError::SetMsr {
                    vcpu: number,
                    index: refused.index,
                    value: refused.value,
                });
            }
            rest = &rest[1..];
        }
    }
    Ok(())
}
