//! What this host's KVM offers, and what a guest was built on.

use std::fs;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2,
};
use kvm_ioctls::{Cap, Kvm};

use super::{KvmStateError, MsrSet};
use crate::state::vcpu::VcpuV1;
use crate::state::{CpuidEntry, HostFacts};
use crate::sys;

/// CPUID leaf 1 ECX: VMX.
const VMX: u32 = 1 << 5;
/// CPUID leaf 0x80000001 ECX: SVM.
const SVM: u32 = 1 << 2;
/// CPUID leaf 1 ECX: TSC-deadline timer.
const TSC_DEADLINE: u32 = 1 << 24;

/// Returns the CPUID table that KVM can show to a guest whose local APICs are in the kernel.
pub fn supported_cpuid(kvm: &Kvm) -> Result<Vec<CpuidEntry>, KvmStateError> {
    let table = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmStateError::vm("list the CPU features"))?;
    let mut entries = cpuid_entries(&table);
    // KVM leaves this bit to us, because it depends on where the local APIC is.
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        for entry in entries.iter_mut().filter(|entry| entry.function == 1) {
            entry.ecx |= TSC_DEADLINE;
        }
    }
    Ok(entries)
}

/// Returns what this host offers. Makes and drops an empty VM for what only a vCPU can tell.
///
/// The CPUID is the one that a vCPU has after it was given all that KVM supports: a KVM that
/// cannot hide the host's features shows more of them to its guests than it lists.
pub fn host_facts(kvm: &Kvm) -> Result<HostFacts, KvmStateError> {
    let supported = supported_cpuid(kvm)?;
    let vm = kvm
        .create_vm()
        .map_err(KvmStateError::vm("create a VM to look at"))?;
    let vcpu = vm
        .create_vcpu(0)
        .map_err(KvmStateError::vm("create a vCPU to look at"))?;
    vcpu.set_cpuid2(&cpuid_table(&supported)?)
        .map_err(KvmStateError::vm("show a vCPU the CPU features"))?;
    let shown = vcpu
        .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmStateError::vm("read back a vCPU's CPU features"))?;
    let msrs = MsrSet::probe(kvm, &vcpu)?;
    let (xsave_bytes, _) = sys::kvm::xsave_bytes(&vm);
    Ok(HostFacts {
        // KVM knows no rate where the host's counter is unstable.
        tsc_khz: vcpu.get_tsc_khz().unwrap_or(0),
        tsc_scaling: kvm.check_extension(Cap::TscControl),
        xsave_bytes: u32::try_from(xsave_bytes).unwrap_or(u32::MAX),
        msrs: msrs.indices().to_vec(),
        ..named(cpuid_entries(&shown))
    })
}

/// Returns what a guest with this first vCPU was built on.
pub fn guest_facts(vcpu: &VcpuV1, msrs: &MsrSet, tsc_scaling: bool) -> HostFacts {
    HostFacts {
        tsc_khz: vcpu.tsc.khz,
        tsc_scaling,
        xsave_bytes: u32::try_from(vcpu.xsave.len()).unwrap_or(u32::MAX),
        msrs: msrs.indices().to_vec(),
        ..named(vcpu.cpuid.clone())
    }
}

fn named(cpuid: Vec<CpuidEntry>) -> HostFacts {
    let text = |bytes: Vec<u8>| {
        String::from_utf8_lossy(&bytes)
            .trim_matches(['\0', ' '])
            .to_owned()
    };
    let leaf = |function: u32| cpuid.iter().find(|entry| entry.function == function);
    let vendor = leaf(0).map_or_else(Vec::new, |entry| {
        [entry.ebx, entry.edx, entry.ecx]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    });
    let brand = (0x8000_0002..=0x8000_0004)
        .filter_map(leaf)
        .flat_map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
        .flat_map(u32::to_le_bytes)
        .collect();
    HostFacts {
        cpu_vendor: text(vendor),
        cpu_brand: text(brand),
        cpuid,
        // For people only; an empty name misleads nobody.
        kernel_release: fs::read_to_string("/proc/sys/kernel/osrelease")
            .map(|release| release.trim().to_owned())
            .unwrap_or_default(),
        ..HostFacts::default()
    }
}

/// Returns the feature that lets a guest run guests of its own, if it has one.
pub(super) fn nested_feature(cpuid: &[CpuidEntry]) -> Option<&'static str> {
    cpuid.iter().find_map(|entry| match entry.function {
        1 if entry.ecx & VMX != 0 => Some("VMX"),
        0x8000_0001 if entry.ecx & SVM != 0 => Some("SVM"),
        _ => None,
    })
}

/// Returns KVM's CPUID table as saved-state entries.
pub fn cpuid_entries(table: &CpuId) -> Vec<CpuidEntry> {
    table
        .as_slice()
        .iter()
        .map(|entry| CpuidEntry {
            function: entry.function,
            index: entry.index,
            flags: entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
        })
        .collect()
}

/// Returns entries as KVM takes them; more than KVM takes is an error.
pub fn cpuid_table(entries: &[CpuidEntry]) -> Result<CpuId, KvmStateError> {
    let raw: Vec<_> = entries
        .iter()
        .map(|entry| kvm_cpuid_entry2 {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            eax: entry.eax,
            ebx: entry.ebx,
            ecx: entry.ecx,
            edx: entry.edx,
            ..Default::default()
        })
        .collect();
    CpuId::from_entries(&raw).map_err(|_| KvmStateError::Vm {
        what: "take a CPUID table of this length",
        source: std::io::ErrorKind::InvalidInput.into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_says_who_it_is() {
        if std::env::var_os("LIVEPOINT_NO_KVM").is_some_and(|value| value == "1") {
            println!("skipped: no KVM (LIVEPOINT_NO_KVM=1)");
            return;
        }
        let facts = host_facts(&Kvm::new().unwrap()).unwrap();
        assert!(!facts.cpu_vendor.is_empty());
        assert!(!facts.cpuid.is_empty());
        assert!(facts.xsave_bytes >= 4096);
        assert!(facts.msrs.contains(&0x174));
        assert!(!facts.kernel_release.contains('\n'));
    }

    #[test]
    fn tables_and_entries_are_the_same() {
        let entries = vec![CpuidEntry {
            function: 0xd,
            index: 2,
            flags: 1,
            eax: 3,
            ebx: 4,
            ecx: 5,
            edx: 6,
        }];
        assert_eq!(cpuid_entries(&cpuid_table(&entries).unwrap()), entries);
        assert!(cpuid_table(&vec![CpuidEntry::default(); 257]).is_err());
    }
}
