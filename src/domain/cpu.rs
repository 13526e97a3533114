//! vCPUs: how many, in what topology, and what CPU the guest sees.

use std::collections::BTreeMap;

use super::cpu_features::CpuFeature;
use super::error::ValueError;

/// Most vCPUs of one machine. Stop-and-copy kicks and saves every vCPU within
/// the downtime budget; 16 is what that has been measured for.
pub const VCPUS_MAX: u8 = 16;

/// Sockets, dies, cores and threads; the product is the number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuTopology {
    sockets: u8,
    dies: u8,
    cores: u8,
    threads: u8,
}

impl CpuTopology {
    /// Makes a topology of 1 to [`VCPUS_MAX`] vCPUs.
    ///
    /// # Errors
    ///
    /// The product is 0 or too large.
    pub fn new(sockets: u8, dies: u8, cores: u8, threads: u8) -> Result<Self, ValueError> {
        let counts = [sockets, dies, cores, threads];
        let product: u64 = counts.into_iter().map(u64::from).product();
        if product == 0 || product > u64::from(VCPUS_MAX) {
            let value = format!("{sockets} x {dies} x {cores} x {threads}");
            return Err(ValueError::new(&value, "a topology of 1 to 16 vCPUs"));
        }
        Ok(CpuTopology {
            sockets,
            dies,
            cores,
            threads,
        })
    }

    /// Returns the number of sockets.
    pub fn sockets(&self) -> u8 {
        self.sockets
    }

    /// Returns the number of dies per socket.
    pub fn dies(&self) -> u8 {
        self.dies
    }

    /// Returns the number of cores per die.
    pub fn cores(&self) -> u8 {
        self.cores
    }

    /// Returns the number of threads per core.
    pub fn threads(&self) -> u8 {
        self.threads
    }

    /// Returns the number of vCPUs.
    pub fn vcpu_count(&self) -> u8 {
        // At most 16 by construction.
        self.sockets * self.dies * self.cores * self.threads
    }
}

/// The vCPUs of a machine: a number, or a topology that implies the number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vcpus {
    count: u8,
    topology: Option<CpuTopology>,
}

impl Vcpus {
    /// One vCPU.
    pub const ONE: Vcpus = Vcpus {
        count: 1,
        topology: None,
    };

    /// Makes vCPUs without a topology of their own.
    ///
    /// # Errors
    ///
    /// `count` is 0 or above [`VCPUS_MAX`].
    pub fn new(count: u8) -> Result<Self, ValueError> {
        if count == 0 || count > VCPUS_MAX {
            let value = count.to_string();
            return Err(ValueError::new(&value, "a number of vCPUs from 1 to 16"));
        }
        Ok(Vcpus {
            count,
            topology: None,
        })
    }

    /// Makes the vCPUs of a topology.
    pub fn with_topology(topology: CpuTopology) -> Self {
        Vcpus {
            count: topology.vcpu_count(),
            topology: Some(topology),
        }
    }

    /// Returns the number of vCPUs.
    pub fn count(&self) -> u8 {
        self.count
    }

    /// Returns the topology the document gives, if it gives one.
    pub fn topology(&self) -> Option<CpuTopology> {
        self.topology
    }
}

/// A CPU model: the feature levels of the x86-64 psABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuModel {
    /// x86-64-v1: SSE2, the first 64-bit CPUs.
    V1,
    /// x86-64-v2: up to SSE4.2 and POPCNT.
    V2,
    /// x86-64-v3: AVX2, BMI, FMA and MOVBE.
    V3,
    /// x86-64-v4: AVX-512 F, BW, CD, DQ and VL.
    V4,
}

impl CpuModel {
    const ALL: [CpuModel; 4] = [CpuModel::V1, CpuModel::V2, CpuModel::V3, CpuModel::V4];

    /// Returns the name that documents use.
    pub fn name(self) -> &'static str {
        match self {
            CpuModel::V1 => "x86-64-v1",
            CpuModel::V2 => "x86-64-v2",
            CpuModel::V3 => "x86-64-v3",
            CpuModel::V4 => "x86-64-v4",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<CpuModel> {
        CpuModel::ALL.into_iter().find(|model| model.name() == name)
    }
}

/// What CPU the guest sees, before single features are changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CpuMode {
    /// The host's CPU, as far as KVM supports it.
    #[default]
    HostPassthrough,
    /// To the machine the same as [`CpuMode::HostPassthrough`].
    HostModel,
    /// A named model.
    Custom(CpuModel),
}

/// What to do about one CPU feature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FeaturePolicy {
    /// The guest sees it whatever the host has.
    Force,
    /// The guest sees it; a host without it is an error.
    #[default]
    Require,
    /// The guest sees it where the host has it.
    Optional,
    /// The guest does not see it.
    Disable,
    /// A host that has it is an error.
    Forbid,
}

impl FeaturePolicy {
    const ALL: [FeaturePolicy; 5] = [
        FeaturePolicy::Force,
        FeaturePolicy::Require,
        FeaturePolicy::Optional,
        FeaturePolicy::Disable,
        FeaturePolicy::Forbid,
    ];

    /// Returns the word that documents use.
    pub fn name(self) -> &'static str {
        match self {
            FeaturePolicy::Force => "force",
            FeaturePolicy::Require => "require",
            FeaturePolicy::Optional => "optional",
            FeaturePolicy::Disable => "disable",
            FeaturePolicy::Forbid => "forbid",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<FeaturePolicy> {
        let mut all = FeaturePolicy::ALL.into_iter();
        all.find(|policy| policy.name() == name)
    }
}

/// The CPU the guest sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CpuConfig {
    /// Where its features come from.
    pub mode: CpuMode,
    /// Features that differ from the mode's, each with its policy.
    pub features: BTreeMap<CpuFeature, FeaturePolicy>,
    /// Whether the guest sees performance counters; `None`: as the host has it.
    pub pmu: Option<bool>,
    /// Whether KVM offers paravirtual spinlocks; `None`: as the host has it.
    pub paravirtual_spinlocks: Option<bool>,
}
