//! The CPU that each vCPU shows to the guest.

use crate::machine::spec::{CpuSpec, CpuidRegister, FeaturePolicy, FeatureRule, TopologySpec};
use crate::state::CpuidEntry;

/// CPUID leaf 1 ECX: VMX.
const VMX: u32 = 1 << 5;
/// CPUID leaf 1 ECX: a hypervisor is present, and says more in leaf 0x40000000.
const HYPERVISOR: u32 = 1 << 31;
/// CPUID leaf 0x80000001 ECX: SVM.
const SVM: u32 = 1 << 2;
/// CPUID leaf 1 EDX: more than one logical processor in a package.
const HTT: u32 = 1 << 28;
/// CPUID leaf 0x80000001 ECX: the logical processors of a package are cores.
const CMP_LEGACY: u32 = 1 << 1;
/// KVM's entry flag: the subleaf matters.
const INDEXED: u32 = 1;

/// A CPU that cannot be shown.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum CpuidError {
    /// KVM lacks a feature that is required.
    #[error("CPU feature {feature} is required, and this host does not offer it")]
    Missing {
        /// Its name.
        feature: String,
    },
    /// KVM has a feature that is forbidden.
    #[error("CPU feature {feature} is forbidden, and this host has it")]
    Forbidden {
        /// Its name.
        feature: String,
    },
    /// The rules show a feature whose state is not saved.
    #[error("CPU feature {feature} cannot be shown: what a guest's guests have is not saved")]
    Nested {
        /// Its name.
        feature: &'static str,
    },
    /// The topology is another number of vCPUs.
    #[error("a topology of {product} vCPUs does not fit {vcpu_count} vCPUs")]
    Topology {
        /// Product of the topology's numbers.
        product: u64,
        /// Number of vCPUs.
        vcpu_count: u32,
    },
}

/// Where a vCPU is in the topology: how many APIC id bits each level takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Levels {
    threads: u32,
    cores: u32,
    dies: u32,
    thread_bits: u32,
    core_bits: u32,
    die_bits: u32,
}

impl Levels {
    fn new(spec: &CpuSpec) -> Result<Self, CpuidError> {
        let topology = spec.topology.unwrap_or(TopologySpec {
            sockets: 1,
            dies: 1,
            cores: spec.vcpu_count,
            threads: 1,
        });
        let counts = [
            topology.sockets,
            topology.dies,
            topology.cores,
            topology.threads,
        ];
        let product = counts
            .into_iter()
            .map(u64::from)
            .fold(1, u64::saturating_mul);
        if product != u64::from(spec.vcpu_count) {
            return Err(CpuidError::Topology {
                product,
                vcpu_count: spec.vcpu_count,
            });
        }
        let bits = |count: u32| count.next_power_of_two().trailing_zeros();
        Ok(Self {
            threads: topology.threads,
            cores: topology.cores,
            dies: topology.dies,
            thread_bits: bits(topology.threads),
            core_bits: bits(topology.cores),
            die_bits: bits(topology.dies),
        })
    }

    /// Returns the APIC id of a vCPU: its place at each level, in as many bits as that level
    /// needs, so that shifting an id by a level's bits names the level above.
    fn apic_id(self, vcpu: u32) -> u32 {
        let thread = vcpu % self.threads;
        let core = vcpu / self.threads % self.cores;
        let die = vcpu / self.threads / self.cores % self.dies;
        let socket = vcpu / self.threads / self.cores / self.dies;
        let mut id = socket;
        for (place, bits) in [
            (die, self.die_bits),
            (core, self.core_bits),
            (thread, self.thread_bits),
        ] {
            id = id << bits | place;
        }
        id
    }

    fn package_bits(self) -> u32 {
        self.thread_bits + self.core_bits + self.die_bits
    }

    fn per_package(self) -> u32 {
        self.threads * self.cores * self.dies
    }
}

/// Returns the APIC ids of all vCPUs.
///
/// The same as the vCPUs' numbers unless a level of the topology is no power of two.
pub fn apic_ids(spec: &CpuSpec) -> Result<Vec<u32>, CpuidError> {
    let levels = Levels::new(spec)?;
    Ok((0..spec.vcpu_count)
        .map(|vcpu| levels.apic_id(vcpu))
        .collect())
}

/// Returns the CPUID of vCPU `vcpu`: what KVM offers, the rules applied, its place written in.
///
/// The hypervisor bit is always shown; VMX and SVM never are: what a guest's guests have in the CPU is not saved.
pub fn for_vcpu(
    supported: &[CpuidEntry],
    spec: &CpuSpec,
    vcpu: u32,
) -> Result<Vec<CpuidEntry>, CpuidError> {
    let levels = Levels::new(spec)?;
    let mut entries = supported.to_vec();
    for entry in &mut entries {
        entry.ecx &= !nested_bit(entry.function).map_or(0, |(bit, _)| bit);
        // Set whatever KVM lists: a guest looks for kvmclock only where it is.
        if entry.function == 1 {
            entry.ecx |= HYPERVISOR;
        }
    }
    for rule in &spec.features {
        apply(rule, &mut entries)?;
    }
    for entry in &entries {
        if let Some((_, feature)) =
            nested_bit(entry.function).filter(|(bit, _)| entry.ecx & bit != 0)
        {
            return Err(CpuidError::Nested { feature });
        }
    }
    let is_amd = entries
        .iter()
        .any(|entry| entry.function == 0 && [0x6874_7541, 0x6f67_7948].contains(&entry.ebx));
    for entry in &mut entries {
        place(entry, levels, vcpu, is_amd);
    }
    write_topology_leaves(&mut entries, levels, vcpu);
    Ok(entries)
}

/// Returns the bit of ECX in which a leaf offers nested virtualization.
fn nested_bit(function: u32) -> Option<(u32, &'static str)> {
    match function {
        1 => Some((VMX, "vmx")),
        0x8000_0001 => Some((SVM, "svm")),
        _ => None,
    }
}

fn register(entry: &mut CpuidEntry, register: CpuidRegister) -> &mut u32 {
    match register {
        CpuidRegister::Eax => &mut entry.eax,
        CpuidRegister::Ebx => &mut entry.ebx,
        CpuidRegister::Ecx => &mut entry.ecx,
        CpuidRegister::Edx => &mut entry.edx,
    }
}

fn apply(rule: &FeatureRule, entries: &mut Vec<CpuidEntry>) -> Result<(), CpuidError> {
    let mask = 1_u32 << (rule.bit % 32);
    let at = entries.iter().position(|entry| {
        entry.function == rule.leaf && (entry.flags & INDEXED == 0 || entry.index == rule.subleaf)
    });
    let has = at.is_some_and(|at| *register(&mut entries[at], rule.register) & mask != 0);
    let feature = rule.name.clone();
    match rule.policy {
        FeaturePolicy::Require if !has => return Err(CpuidError::Missing { feature }),
        FeaturePolicy::Forbid if has => return Err(CpuidError::Forbidden { feature }),
        FeaturePolicy::Disable if has => {
            let entry = &mut entries[at.expect("a leaf that has the bit is there")];
            *register(entry, rule.register) &= !mask;
        }
        FeaturePolicy::Force if !has => {
            let at = at.unwrap_or_else(|| {
                entries.push(CpuidEntry {
                    function: rule.leaf,
                    index: rule.subleaf,
                    flags: INDEXED,
                    ..CpuidEntry::default()
                });
                entries.len() - 1
            });
            *register(&mut entries[at], rule.register) |= mask;
        }
        _ => {}
    }
    Ok(())
}

/// Writes what depends on the vCPU's place into one entry.
fn place(entry: &mut CpuidEntry, levels: Levels, vcpu: u32, is_amd: bool) {
    let apic_id = levels.apic_id(vcpu);
    let per_package = levels.per_package();
    match entry.function {
        1 => {
            let ids = 1 << levels.package_bits();
            entry.ebx = entry.ebx & 0x0000_ffff | apic_id << 24 | (ids & 0xff) << 16;
            if per_package > 1 {
                entry.edx |= HTT;
            } else {
                entry.edx &= !HTT;
            }
        }
        // Caches, as Intel (4) and AMD (0x8000001d) describe them: ids that share one.
        4 | 0x8000_001d if entry.eax & 0x1f != 0 => {
            let level = entry.eax >> 5 & 7;
            let sharing = if level >= 3 {
                levels.package_bits()
            } else {
                levels.thread_bits
            };
            entry.eax = entry.eax & !(0xfff << 14) | ((1 << sharing) - 1) << 14;
            if entry.function == 4 {
                let cores = 1 << (levels.core_bits + levels.die_bits);
                entry.eax = entry.eax & !(0x3f << 26) | ((cores - 1) & 0x3f) << 26;
            }
        }
        0x8000_0001 => {
            if is_amd && per_package > 1 {
                entry.ecx |= CMP_LEGACY;
            } else {
                entry.ecx &= !CMP_LEGACY;
            }
        }
        0x8000_0008 if is_amd => {
            let bits = levels.package_bits();
            entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (per_package - 1) & 0xff;
        }
        0x8000_001e => {
            entry.eax = apic_id;
            let core = apic_id >> levels.thread_bits & ((1 << levels.core_bits) - 1);
            entry.ebx = entry.ebx & !0xffff | (levels.threads - 1) << 8 | core & 0xff;
            entry.ecx = entry.ecx & !0x7ff | apic_id >> levels.package_bits() & 0xff;
        }
        _ => {}
    }
}

/// Replaces leaves 0xb and 0x1f, where KVM offers them, by this vCPU's.
fn write_topology_leaves(entries: &mut Vec<CpuidEntry>, levels: Levels, vcpu: u32) {
    let apic_id = levels.apic_id(vcpu);
    let cores_and_dies = levels.core_bits + levels.die_bits;
    for leaf in [0xb, 0x1f] {
        if !entries.iter().any(|entry| entry.function == leaf) {
            continue;
        }
        entries.retain(|entry| entry.function != leaf);
        // Each level's type, how far to shift the id to get the level above, and how many
        // processors it has. Leaf 0xb knows no dies: its cores are those of the package.
        let threads = (1_u32, levels.thread_bits, levels.threads);
        let package = (2, levels.thread_bits + cores_and_dies, levels.per_package());
        let mut rows = vec![threads];
        if leaf == 0x1f && levels.dies > 1 {
            let core_shift = levels.thread_bits + levels.core_bits;
            rows.push((2, core_shift, levels.threads * levels.cores));
            rows.push((5, package.1, package.2));
        } else {
            rows.push(package);
        }
        rows.push((0, 0, 0));
        for (index, (kind, shift, count)) in (0..).zip(rows) {
            entries.push(CpuidEntry {
                function: leaf,
                index,
                flags: INDEXED,
                eax: shift,
                ebx: count,
                ecx: kind << 8 | index,
                edx: apic_id,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(vcpu_count: u32, topology: Option<TopologySpec>) -> CpuSpec {
        CpuSpec {
            vcpu_count,
            topology,
            features: Vec::new(),
        }
    }

    fn entry(function: u32) -> CpuidEntry {
        CpuidEntry {
            function,
            ..CpuidEntry::default()
        }
    }

    fn supported() -> Vec<CpuidEntry> {
        let mut leaf1 = entry(1);
        leaf1.ecx = VMX | 1;
        leaf1.ebx = 0x0a05_0800;
        vec![entry(0), leaf1, entry(0xb), entry(0x8000_0001)]
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_and_never_vmx() {
        let spec = spec(4, None);
        for vcpu in 0..4 {
            let entries = for_vcpu(&supported(), &spec, vcpu).unwrap();
            let leaf1 = entries.iter().find(|entry| entry.function == 1).unwrap();
            assert_eq!(leaf1.ebx >> 24, vcpu);
            assert_eq!(leaf1.ebx >> 16 & 0xff, 4);
            assert_eq!(leaf1.ebx & 0xffff, 0x0800);
            assert_eq!(leaf1.ecx, HYPERVISOR | 1);
            assert_ne!(leaf1.edx & HTT, 0);
            let leafb: Vec<_> = entries
                .iter()
                .filter(|entry| entry.function == 0xb)
                .map(|entry| (entry.eax, entry.ebx, entry.ecx, entry.edx))
                .collect();
            assert_eq!(
                leafb,
                [(0, 1, 0x100, vcpu), (2, 4, 0x201, vcpu), (0, 0, 2, vcpu)]
            );
        }
    }

    #[test]
    fn a_level_that_is_no_power_of_two_leaves_ids_out() {
        let topology = TopologySpec {
            sockets: 2,
            dies: 1,
            cores: 3,
            threads: 1,
        };
        let ids = apic_ids(&spec(6, Some(topology))).unwrap();
        assert_eq!(ids, [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn a_topology_of_another_number_is_refused() {
        let topology = TopologySpec {
            sockets: 2,
            dies: 1,
            cores: u32::MAX,
            threads: u32::MAX,
        };
        assert!(matches!(
            apic_ids(&spec(6, Some(topology))),
            Err(CpuidError::Topology { .. })
        ));
    }

    #[test]
    fn rules_show_hide_and_refuse() {
        let rule = |bit, policy| FeatureRule {
            name: format!("bit{bit}"),
            leaf: 1,
            subleaf: 0,
            register: CpuidRegister::Ecx,
            bit,
            policy,
        };
        let with = |rules: Vec<FeatureRule>| {
            let spec = CpuSpec {
                features: rules,
                ..spec(1, None)
            };
            for_vcpu(&supported(), &spec, 0).map(|entries| entries[1].ecx & !HYPERVISOR)
        };
        assert_eq!(with(vec![rule(0, FeaturePolicy::Disable)]), Ok(0));
        assert_eq!(with(vec![rule(9, FeaturePolicy::Force)]), Ok(1 | 1 << 9));
        assert_eq!(with(vec![rule(9, FeaturePolicy::Optional)]), Ok(1));
        assert_eq!(with(vec![rule(0, FeaturePolicy::Require)]), Ok(1));
        assert_eq!(
            with(vec![rule(9, FeaturePolicy::Require)]),
            Err(CpuidError::Missing {
                feature: "bit9".to_owned()
            })
        );
        assert_eq!(
            with(vec![rule(0, FeaturePolicy::Forbid)]),
            Err(CpuidError::Forbidden {
                feature: "bit0".to_owned()
            })
        );
    }
}
