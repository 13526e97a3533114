//! The facade that every edge uses: define, start, checkpoint, restore, jobs, images.
//!
//! Edges (command, C ABI, daemons) see only what this module defines or re-exports.

#[cfg(feature = "cli")]
pub mod confine;
mod console;
pub mod control;
mod convert;
mod dirty_rate;
mod disks;
mod domain;
mod error;
mod event;
mod files;
mod foreign;
mod image;
mod job;
mod lazy;
mod periodic;
mod request;
mod rewind;
mod runtime;
mod shared_memory;
mod watch;

use crate::kvmstate;
use crate::machine::{self, MachineError};

pub use crate::checkpoint::{DirtyRateMode, Protocol};
pub use crate::domain::{
    DiskFormat, DomainConfig, DomainError, DomainName, LifecycleAction, METADATA_NAMESPACE,
    MemorySize, PciDevice, PciDeviceKind, PciDevices, PciSlot, VCPUS_MAX, Vcpus, XmlView,
};
pub use crate::foreign::{
    ForeignError, ForeignGuest, GuestIdentity, Kick, KvmHandle, Passage, RegionSpec, SavedState,
    Vmm,
};
pub use crate::kvmstate::ClockPolicy;
pub use crate::machine::{GuestMemoryUse, MemoryFigure};
pub use crate::qcow2::disk_bytes as qcow2_disk_bytes;
pub use crate::state::StateSection;
pub use crate::store::{Codec, Garbage, ImageSummary, VerifyReport};
pub use crate::sys::lock::LockFile;
pub use crate::sys::passed_fds::take as take_passed_descriptors;
pub use crate::sys::termination::TerminationSignals;
pub use crate::sys::tsc::read as host_tsc;
pub use crate::sys::whole_file::{sync_dir_of, write as write_whole_file};
pub use console::duplicate as duplicate_descriptor;
pub use dirty_rate::{DIRTY_RATE_SECONDS, DirtyRateRequest, DirtyRateStatus, Measured};
pub use disks::DiskRestore;
pub use domain::{
    BuiltinKernel, Domain, DomainChanges, DomainOptions, DomainTexts, RestoreOptions,
};
pub use error::{ErrorCode, HostError};
pub use event::{DomainEvent, DomainEvents, Ending, FinalState};
pub use files::{DomainFiles, WhenOpen};
pub use foreign::ForeignVm;
pub use image::{Image, MemoryRange, collect_garbage};
pub use job::Job;
pub use periodic::{PeriodicCheckpoints, PeriodicStatus, Schedule, Series};
pub use request::{
    CheckpointRequest, CheckpointSummary, EndReason, Figures, JobProgress, MachineState,
    ThreadCount,
};
pub use rewind::RewindSummary;
pub use runtime::RuntimeDir;
pub use shared_memory::SharedMemory;
pub use watch::{Happening, NOTICES_MAX, Notice, Watch, Watched};

/// Fails where this host cannot run machines, and says what it lacks.
pub fn check_host() -> Result<(), HostError> {
    machine_facts().map(|_| ())
}

/// Returns what this host offers to machines.
fn machine_facts() -> Result<crate::state::HostFacts, HostError> {
    let kvm = machine::open_kvm()?;
    Ok(kvmstate::host_facts(&kvm).map_err(MachineError::from)?)
}
