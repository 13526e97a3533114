//! The state of one vCPU.

use kvm_bindings::{
    kvm_debugregs, kvm_lapic_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use serde::{Deserialize, Serialize};

use super::{CpuidEntry, SectionPayload};

/// One model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsrV1 {
    /// Its number.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// The guest's time stamp counter when a vCPU was saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TscV1 {
    /// The frequency that the guest sees, in kHz.
    pub khz: u32,
    /// What the guest would have read.
    pub guest: u64,
    /// What the host read at the same moment.
    pub host: u64,
    /// Guest minus host, where KVM tells; 0 where the offset cannot be changed.
    pub offset: Option<u64>,
}

/// A vCPU: its architectural state, in the units of KVM's interface.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuV1 {
    /// `KVM_MP_STATE_*`.
    pub mp_state: u32,
    /// General registers.
    pub regs: kvm_regs,
    /// Special registers.
    pub sregs: kvm_sregs,
    /// PAE page directory pointers, where KVM says that they are valid.
    pub pdptrs: Option<[u64; 4]>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// XSAVE area in the standard format.
    pub xsave: Vec<u8>,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// Pending exceptions, interrupts and NMIs.
    pub events: kvm_vcpu_events,
    /// Local APIC registers.
    pub lapic: LapicV1,
    /// Model-specific registers, without the time stamp counter.
    pub msrs: Vec<MsrV1>,
    /// The CPU that this vCPU shows to the guest.
    pub cpuid: Vec<CpuidEntry>,
    /// Its time stamp counter.
    pub tsc: TscV1,
}

/// The register page of a local APIC; all zeros where KVM has none, since the VMM emulates it.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LapicV1(pub kvm_lapic_state);

impl PartialEq for LapicV1 {
    fn eq(&self, other: &Self) -> bool {
        self.0.regs[..] == other.0.regs[..]
    }
}

impl SectionPayload for VcpuV1 {
    const KIND: &'static str = "vcpu";
    const VERSION: u16 = 1;
}
