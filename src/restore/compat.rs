//! What an image needs of a host, and what this host lacks, before a machine exists.

use std::fmt;

use crate::state::{CpuidEntry, HostFacts};

/// CPUID entry flag: the leaf depends on ECX.
const INDEX_MATTERS: u32 = 1;

/// TSC rates closer than this are the same: 250 parts per million, what NTP corrects for.
const TSC_TOLERANCE_PPM: u64 = 250;

/// One thing that the saved guest uses and the host does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Incompatibility {
    /// The CPUs are of different makers.
    Vendor {
        /// Vendor string in the image.
        saved: String,
        /// Vendor string of this host.
        host: String,
    },
    /// The guest was told of a CPU feature that this host does not offer.
    CpuidBit {
        /// CPUID function.
        function: u32,
        /// CPUID index.
        index: u32,
        /// Output register.
        register: Register,
        /// Bit of the register.
        bit: u32,
    },
    /// The host keeps less extended CPU state than the image holds.
    XsaveBytes {
        /// Bytes in the image.
        saved: u32,
        /// Bytes that the host takes.
        host: u32,
    },
    /// The host cannot set an MSR that the image holds.
    Msr {
        /// Index of the MSR.
        index: u32,
    },
    /// The guest's TSC would run at another rate.
    TscRate {
        /// kHz in the image.
        saved_khz: u32,
        /// kHz of this host.
        host_khz: u32,
    },
}

/// An output register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        })
    }
}

impl fmt::Display for Incompatibility {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vendor { saved, host } => {
                write!(f, "the guest ran on a {saved} CPU, this host has {host}")
            }
            Self::CpuidBit {
                function,
                index,
                register,
                bit,
            } => {
                write!(f, "the guest uses CPU feature ")?;
                if let Some(name) = bit_name(*function, *index, *register, *bit) {
                    write!(f, "{name} (")?;
                }
                write!(f, "CPUID {function:#x}.{index} {register} bit {bit}")?;
                if bit_name(*function, *index, *register, *bit).is_some() {
                    write!(f, ")")?;
                }
                write!(f, ", which this host lacks")
            }
            Self::XsaveBytes { saved, host } => write!(
                f,
                "the image holds {saved} bytes of extended CPU state, this host takes {host}"
            ),
            Self::Msr { index } => write!(f, "this host cannot set MSR {index:#x}"),
            Self::TscRate {
                saved_khz,
                host_khz,
            } => write!(
                f,
                "the guest's TSC runs at {saved_khz} kHz, this host's at {host_khz} kHz and it cannot scale it"
            ),
        }
    }
}

/// Returns everything that `saved` needs and `host` lacks; empty where the guest can be restored.
///
/// Unknown facts (a rate or size of 0, an empty vendor) are not compared.
pub fn check(saved: &HostFacts, host: &HostFacts) -> Vec<Incompatibility> {
    let mut lacks = Vec::new();
    if !saved.cpu_vendor.is_empty()
        && !host.cpu_vendor.is_empty()
        && saved.cpu_vendor != host.cpu_vendor
    {
        lacks.push(Incompatibility::Vendor {
            saved: saved.cpu_vendor.clone(),
            host: host.cpu_vendor.clone(),
        });
    }
    for leaf in FEATURE_LEAVES {
        check_leaf(leaf, &saved.cpuid, &host.cpuid, &mut lacks);
    }
    if saved.xsave_bytes > host.xsave_bytes && host.xsave_bytes > 0 {
        lacks.push(Incompatibility::XsaveBytes {
            saved: saved.xsave_bytes,
            host: host.xsave_bytes,
        });
    }
    let missing = saved.msrs.iter().filter(|index| !host.msrs.contains(index));
    lacks.extend(missing.map(|&index| Incompatibility::Msr { index }));
    let known = saved.tsc_khz > 0 && host.tsc_khz > 0;
    if known && !host.tsc_scaling && !same_rate(saved.tsc_khz, host.tsc_khz) {
        lacks.push(Incompatibility::TscRate {
            saved_khz: saved.tsc_khz,
            host_khz: host.tsc_khz,
        });
    }
    lacks
}

fn same_rate(a: u32, b: u32) -> bool {
    let difference = u64::from(a.abs_diff(b));
    difference * 1_000_000 <= u64::from(a) * TSC_TOLERANCE_PPM
}

/// A CPUID leaf whose outputs are feature bits. Others hold sizes, topology and identities, which
/// the guest may be told freely.
struct FeatureLeaf {
    function: u32,
    index: u32,
    registers: &'static [(Register, u32)],
}

/// Leaf 1 ECX bits that say what the guest's kernel or VMM does, not what the CPU can:
/// OSXSAVE, TSC-deadline (emulated by KVM) and "runs under a hypervisor".
const LEAF_1_ECX_MASK: u32 = !(1 << 27 | 1 << 24 | 1 << 31);

const FEATURE_LEAVES: &[FeatureLeaf] = &[
    FeatureLeaf {
        function: 1,
        index: 0,
        registers: &[
            (Register::Ecx, LEAF_1_ECX_MASK),
            // HTT (bit 28) is topology.
            (Register::Edx, !(1 << 28)),
        ],
    },
    FeatureLeaf {
        function: 7,
        index: 0,
        // OSPKE (ECX bit 4) mirrors a control register.
        registers: &[
            (Register::Ebx, !0),
            (Register::Ecx, !(1 << 4)),
            (Register::Edx, !0),
        ],
    },
    FeatureLeaf {
        function: 7,
        index: 1,
        registers: &[
            (Register::Eax, !0),
            (Register::Ebx, !0),
            (Register::Ecx, !0),
            (Register::Edx, !0),
        ],
    },
    FeatureLeaf {
        function: 7,
        index: 2,
        registers: &[(Register::Edx, !0)],
    },
    FeatureLeaf {
        function: 0xd,
        index: 0,
        registers: &[(Register::Eax, !0), (Register::Edx, !0)],
    },
    FeatureLeaf {
        function: 0xd,
        index: 1,
        registers: &[(Register::Eax, !0)],
    },
    FeatureLeaf {
        function: 0x4000_0001,
        index: 0,
        registers: &[(Register::Eax, !0)],
    },
    FeatureLeaf {
        function: 0x8000_0001,
        index: 0,
        // CMP_LEGACY (bit 1) is topology.
        registers: &[(Register::Ecx, !(1 << 1)), (Register::Edx, !0)],
    },
    FeatureLeaf {
        function: 0x8000_0008,
        index: 0,
        registers: &[(Register::Ebx, !0)],
    },
];

fn check_leaf(
    leaf: &FeatureLeaf,
    saved: &[CpuidEntry],
    host: &[CpuidEntry],
    lacks: &mut Vec<Incompatibility>,
) {
    let Some(needed) = find(leaf, saved) else {
        return;
    };
    let offered = find(leaf, host).unwrap_or_default();
    for &(register, mask) in leaf.registers {
        let missing = output(&needed, register) & !output(&offered, register) & mask;
        let bits = (0..32).filter(|bit| missing >> bit & 1 == 1);
        lacks.extend(bits.map(|bit| Incompatibility::CpuidBit {
            function: leaf.function,
            index: leaf.index,
            register,
            bit,
        }));
    }
}

fn find(leaf: &FeatureLeaf, entries: &[CpuidEntry]) -> Option<CpuidEntry> {
    let matches = |entry: &&CpuidEntry| {
        entry.function == leaf.function
            && (entry.index == leaf.index || (leaf.index == 0 && entry.flags & INDEX_MATTERS == 0))
    };
    entries.iter().find(matches).copied()
}

fn output(entry: &CpuidEntry, register: Register) -> u32 {
    match register {
        Register::Eax => entry.eax,
        Register::Ebx => entry.ebx,
        Register::Ecx => entry.ecx,
        Register::Edx => entry.edx,
    }
}

/// Returns the common name of a feature bit, for the features that hosts differ in most.
fn bit_name(function: u32, index: u32, register: Register, bit: u32) -> Option<&'static str> {
    BIT_NAMES
        .iter()
        .find(|&&(known, _)| known == (function, index, register, bit))
        .map(|&(_, name)| name)
}

type BitPlace = (u32, u32, Register, u32);

const BIT_NAMES: &[(BitPlace, &str)] = &[
    ((1, 0, Register::Ecx, 0), "SSE3"),
    ((1, 0, Register::Ecx, 1), "PCLMULQDQ"),
    ((1, 0, Register::Ecx, 5), "VMX"),
    ((1, 0, Register::Ecx, 9), "SSSE3"),
    ((1, 0, Register::Ecx, 12), "FMA"),
    ((1, 0, Register::Ecx, 13), "CMPXCHG16B"),
    ((1, 0, Register::Ecx, 17), "PCID"),
    ((1, 0, Register::Ecx, 19), "SSE4.1"),
    ((1, 0, Register::Ecx, 20), "SSE4.2"),
    ((1, 0, Register::Ecx, 21), "x2APIC"),
    ((1, 0, Register::Ecx, 22), "MOVBE"),
    ((1, 0, Register::Ecx, 23), "POPCNT"),
    ((1, 0, Register::Ecx, 25), "AES"),
    ((1, 0, Register::Ecx, 26), "XSAVE"),
    ((1, 0, Register::Ecx, 28), "AVX"),
    ((1, 0, Register::Ecx, 29), "F16C"),
    ((1, 0, Register::Ecx, 30), "RDRAND"),
    ((7, 0, Register::Ebx, 0), "FSGSBASE"),
    ((7, 0, Register::Ebx, 1), "TSC_ADJUST"),
    ((7, 0, Register::Ebx, 3), "BMI1"),
    ((7, 0, Register::Ebx, 5), "AVX2"),
    ((7, 0, Register::Ebx, 7), "SMEP"),
    ((7, 0, Register::Ebx, 8), "BMI2"),
    ((7, 0, Register::Ebx, 9), "ERMS"),
    ((7, 0, Register::Ebx, 10), "INVPCID"),
    ((7, 0, Register::Ebx, 16), "AVX512F"),
    ((7, 0, Register::Ebx, 17), "AVX512DQ"),
    ((7, 0, Register::Ebx, 18), "RDSEED"),
    ((7, 0, Register::Ebx, 19), "ADX"),
    ((7, 0, Register::Ebx, 20), "SMAP"),
    ((7, 0, Register::Ebx, 21), "AVX512_IFMA"),
    ((7, 0, Register::Ebx, 23), "CLFLUSHOPT"),
    ((7, 0, Register::Ebx, 24), "CLWB"),
    ((7, 0, Register::Ebx, 28), "AVX512CD"),
    ((7, 0, Register::Ebx, 29), "SHA"),
    ((7, 0, Register::Ebx, 30), "AVX512BW"),
    ((7, 0, Register::Ebx, 31), "AVX512VL"),
    ((7, 0, Register::Ecx, 1), "AVX512_VBMI"),
    ((7, 0, Register::Ecx, 2), "UMIP"),
    ((7, 0, Register::Ecx, 3), "PKU"),
    ((7, 0, Register::Ecx, 8), "GFNI"),
    ((7, 0, Register::Ecx, 9), "VAES"),
    ((7, 0, Register::Ecx, 10), "VPCLMULQDQ"),
    ((7, 0, Register::Ecx, 11), "AVX512_VNNI"),
    ((7, 0, Register::Ecx, 16), "LA57"),
    ((7, 0, Register::Ecx, 22), "RDPID"),
    ((7, 0, Register::Edx, 22), "AMX-BF16"),
    ((7, 0, Register::Edx, 24), "AMX-TILE"),
    ((7, 0, Register::Edx, 26), "IBRS"),
    ((7, 0, Register::Edx, 27), "STIBP"),
    ((7, 0, Register::Edx, 29), "ARCH_CAPABILITIES"),
    ((7, 0, Register::Edx, 31), "SSBD"),
    ((7, 1, Register::Eax, 4), "AVX_VNNI"),
    ((7, 1, Register::Eax, 5), "AVX512_BF16"),
    ((0xd, 0, Register::Eax, 2), "AVX state"),
    ((0xd, 0, Register::Eax, 5), "AVX-512 opmask state"),
    ((0xd, 0, Register::Eax, 9), "PKRU state"),
    ((0xd, 0, Register::Eax, 18), "AMX tile state"),
    ((0xd, 1, Register::Eax, 0), "XSAVEOPT"),
    ((0xd, 1, Register::Eax, 1), "XSAVEC"),
    ((0xd, 1, Register::Eax, 3), "XSAVES"),
    ((0x4000_0001, 0, Register::Eax, 3), "kvmclock"),
    ((0x4000_0001, 0, Register::Eax, 4), "KVM async page faults"),
    ((0x4000_0001, 0, Register::Eax, 5), "KVM steal time"),
    ((0x4000_0001, 0, Register::Eax, 6), "KVM paravirtual EOI"),
    ((0x4000_0001, 0, Register::Eax, 24), "KVM stable clock"),
    ((0x8000_0001, 0, Register::Ecx, 2), "SVM"),
    ((0x8000_0001, 0, Register::Ecx, 5), "LZCNT"),
    ((0x8000_0001, 0, Register::Ecx, 6), "SSE4A"),
    ((0x8000_0001, 0, Register::Edx, 20), "NX"),
    ((0x8000_0001, 0, Register::Edx, 26), "1 GiB pages"),
    ((0x8000_0001, 0, Register::Edx, 27), "RDTSCP"),
    ((0x8000_0001, 0, Register::Edx, 29), "long mode"),
    ((0x8000_0008, 0, Register::Ebx, 12), "IBPB"),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> HostFacts {
        HostFacts {
            cpu_vendor: "AuthenticAMD".to_owned(),
            cpuid: vec![CpuidEntry {
                function: 7,
                flags: INDEX_MATTERS,
                ebx: 1 << 5 | 1 << 3,
                ..CpuidEntry::default()
            }],
            tsc_khz: 2_600_000,
            xsave_bytes: 4096,
            msrs: vec![0x10, 0xc000_0080],
            ..HostFacts::default()
        }
    }

    #[test]
    fn a_host_can_restore_what_was_saved_on_it() {
        assert_eq!(check(&facts(), &facts()), []);
    }

    #[test]
    fn a_host_with_more_than_was_used_is_no_obstacle() {
        let mut host = facts();
        host.cpuid[0].ebx |= 1 << 16;
        host.xsave_bytes = 8192;
        host.msrs.push(0x6e0);
        assert_eq!(check(&facts(), &host), []);
    }

    #[test]
    fn everything_that_the_host_lacks_is_said_by_name() {
        let mut host = facts();
        host.cpu_vendor = "GenuineIntel".to_owned();
        host.cpuid[0].ebx = 1 << 3;
        host.xsave_bytes = 2696;
        host.msrs.pop();
        host.tsc_khz = 3_000_000;
        let said: Vec<String> = check(&facts(), &host)
            .iter()
            .map(ToString::to_string)
            .collect();
        insta::assert_debug_snapshot!(said, @r#"
        [
            "the guest ran on a AuthenticAMD CPU, this host has GenuineIntel",
            "the guest uses CPU feature AVX2 (CPUID 0x7.0 EBX bit 5), which this host lacks",
            "the image holds 4096 bytes of extended CPU state, this host takes 2696",
            "this host cannot set MSR 0xc0000080",
            "the guest's TSC runs at 2600000 kHz, this host's at 3000000 kHz and it cannot scale it",
        ]
        "#);
    }

    #[test]
    fn a_leaf_that_the_host_does_not_have_lacks_every_bit() {
        let mut host = facts();
        host.cpuid.clear();
        assert_eq!(check(&facts(), &host).len(), 2);
    }

    #[test]
    fn rates_that_differ_by_measurement_only_are_the_same_and_scaling_covers_the_rest() {
        let mut host = facts();
        host.tsc_khz += 600;
        assert_eq!(check(&facts(), &host), []);
        host.tsc_khz = 3_000_000;
        host.tsc_scaling = true;
        assert_eq!(check(&facts(), &host), []);
    }

    #[test]
    fn bits_that_only_mirror_what_the_guest_set_are_not_compared() {
        let mut saved = facts();
        saved.cpuid.push(CpuidEntry {
            function: 1,
            ecx: 1 << 27 | 1 << 31,
            edx: 1 << 28,
            ..CpuidEntry::default()
        });
        assert_eq!(check(&saved, &facts()), []);
    }
}
