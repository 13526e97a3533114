//! The guest as the checkpoint engine sees it, with the memory that it has now.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::uses::{Use, Uses};
use super::vcpu::Vcpus;
use super::{GuestIdentity, SavedState, Vmm};
use crate::foreign::KvmHandle;
use crate::guest::{
    Description, DirtyLog, Guest, GuestError, HostWrites, MemoryRegion, PauseTiming,
};
use crate::kvmstate::KvmDirtyLog;
use crate::state::{HostFacts, StateSection};

/// How long the VMM's devices may take to finish what they have begun.
const QUIESCE_TIMEOUT: Duration = Duration::from_secs(5);

/// What all views of one guest share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) identity: GuestIdentity,
    pub(super) vcpus: Vcpus,
    pub(super) vmm: Arc<dyn Vmm>,
    pub(super) kvm: Arc<KvmHandle>,
    /// What the guest was built on, as of its last saved state.
    pub(super) facts: Mutex<HostFacts>,
    pub(super) uses: Arc<Uses>,
}

/// The guest with the regions of one moment: a region that comes or goes makes another view.
#[derive(Debug)]
pub(super) struct View {
    pub(super) regions: Vec<MemoryRegion>,
    pub(super) log: KvmDirtyLog,
    pub(super) host_writes: HostWrites,
    pub(super) shared: Arc<Shared>,
    pub(super) _use: Use,
}

impl Guest for View {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.log
    }

    fn host_writes(&self) -> &HostWrites {
        &self.host_writes
    }

    fn check_checkpointable(&self) -> Result<(), GuestError> {
        if self.regions.is_empty() {
            return Err(GuestError::NotCheckpointable {
                what: "a guest without memory".to_owned(),
                why: "no region is registered".to_owned(),
            });
        }
        Ok(())
    }

    fn pause(&self) -> Result<PauseTiming, GuestError> {
        let Shared { vcpus, vmm, .. } = &*self.shared;
        let start = Instant::now();
        vmm.pause().map_err(failed("pause"))?;
        if let Err(timeout) = vcpus.close(|vcpu| vmm.kick(vcpu)) {
            vmm.resume();
            return Err(timeout.into());
        }
        let stopped = Instant::now();
        if let Err(status) = vmm.quiesce(QUIESCE_TIMEOUT) {
            vmm.resume();
            vcpus.open();
            return Err(failed("quiesce its devices")(status));
        }
        Ok(PauseTiming {
            kick: stopped - start,
            quiesce: stopped.elapsed(),
        })
    }

    fn resume(&self) {
        self.shared.vmm.resume();
        self.shared.vcpus.open();
    }

    fn last_resumed(&self) -> Option<Instant> {
        self.shared.vcpus.last_left()
    }

    fn save_state(&self) -> Result<Vec<StateSection>, GuestError> {
        let mut state = SavedState::of_kvm(self.shared.kvm.clone());
        self.shared
            .vmm
            .save(&mut state)
            .map_err(failed("save its state"))?;
        *self
            .shared
            .facts
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = state.facts;
        Ok(state.set.sections().to_vec())
    }

    fn describe(&self) -> Description {
        let GuestIdentity {
            name,
            uuid,
            description,
        } = self.shared.identity.clone();
        let facts = self
            .shared
            .facts
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Description {
            name,
            uuid,
            domain_xml: description,
            vcpu_count: u32::try_from(self.shared.vcpus.count()).unwrap_or(u32::MAX),
            facts: facts.clone(),
        }
    }
}

fn failed(what: &'static str) -> impl FnOnce(i32) -> GuestError {
    move |status| GuestError::Vmm { what, status }
}
