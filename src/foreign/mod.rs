//! VMs that another VMM makes and runs: it registers memory, vCPU threads and callbacks, and is a
//! [`Guest`](crate::guest::Guest) then, as our own machine is.
//!
//! The VMM keeps its VM, its threads and its devices. Nothing here installs a signal handler or
//! changes what the VMM set up, but for the kick signal in the threads that enter as vCPUs, which
//! gets its mask back, and the dirty log of the memory slots while a checkpoint runs.

mod discard;
mod error;
mod kvm;
mod memory;
mod state;
mod uses;
mod vcpu;
mod view;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES;
use kvm_ioctls::VmFd;
use uuid::Uuid;

use crate::guest::{Guest, HostWriteSource, HostWrites, MemoryRegion};
use crate::kvmstate::KvmDirtyLog;
use crate::page::{Gfn, PAGE_BYTES, PAGE_SHIFT, PageRun};
use crate::sys;
use crate::sys::mapping::GuestMapping;
use crate::sys::signal;

pub use error::ForeignError;
pub use kvm::KvmHandle;
pub use state::{KIND_BYTES_MAX, SavedState};
pub use vcpu::{Passage, VCPUS_MAX};

use uses::{Use, Uses};
use vcpu::Vcpus;
use view::{Shared, View};

/// What is asked of the VMM. Errors are its own numbers, which only messages show.
///
/// Called from threads of the engine's, one call at a time, except for the host writes.
pub trait Vmm: Send + Sync + fmt::Debug {
    /// A pause begins: vCPUs that do not pass the gate stop before this returns.
    fn pause(&self) -> Result<(), i32>;

    /// All vCPUs are stopped: devices finish what they have begun, and touch neither guest memory
    /// nor their backends until [`Vmm::resume`].
    fn quiesce(&self, timeout: Duration) -> Result<(), i32>;

    /// Ends a pause that began, whatever became of it. vCPUs at the gate go on afterwards.
    fn resume(&self);

    /// Adds the state of vCPUs and devices. All are stopped.
    fn save(&self, state: &mut SavedState) -> Result<(), i32>;

    /// Makes a vCPU leave the guest; only called where the VMM kicks its vCPUs itself.
    fn kick(&self, vcpu: usize);

    /// Takes the pages of `slot` that the VMM wrote; adds nothing where it calls
    /// [`ForeignGuest::mark_dirty`] instead.
    fn take_host_writes(&self, slot: u32, into: &mut [u64]);
}

/// Who a guest is, in its images.
#[derive(Clone, Debug)]
pub struct GuestIdentity {
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Text of the VMM's own: what it needs to make the same VM again.
    pub description: String,
}

impl GuestIdentity {
    /// Returns a UUID that no other guest has.
    pub fn new_uuid() -> Uuid {
        Uuid::new_v4()
    }
}

/// How a guest's vCPUs are kicked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kick {
    /// By a signal; `None` takes the first real-time one.
    Signal(Option<i32>),
    /// By the VMM: [`Vmm::kick`].
    Vmm,
}

/// A memory slot of the VMM's VM.
#[derive(Debug)]
pub struct RegionSpec<'a> {
    /// KVM memslot.
    pub slot: u32,
    /// The slot's flags, as the VMM set them.
    pub flags: u32,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Host virtual address of the first byte.
    pub hva: usize,
    /// Length in bytes.
    pub bytes: usize,
    /// The file that is mapped there, if any.
    pub fd: Option<BorrowedFd<'a>>,
}

/// A VM that another VMM runs. Every method may be called from any thread.
pub struct ForeignGuest {
    shared: Arc<Shared>,
    vm: VmFd,
    /// Held by whoever changes the regions, or starts a checkpoint.
    regions: Mutex<Vec<Registered>>,
    /// The guest with the regions of now; `None` where they changed since the last checkpoint.
    view: RwLock<Option<Arc<View>>>,
}

#[derive(Debug)]
struct Registered {
    region: MemoryRegion,
    flags: u32,
}

impl fmt::Debug for ForeignGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ForeignGuest")
            .field("name", &self.shared.identity.name)
            .finish_non_exhaustive()
    }
}

/// Asks the VMM for its own log of writes.
struct AskVmm(Arc<dyn Vmm>);

impl HostWriteSource for AskVmm {
    fn take_into(&self, slot: u32, into: &mut [u64]) {
        self.0.take_host_writes(slot, into);
    }
}

impl ForeignGuest {
    /// Registers the VM of another VMM, which keeps its descriptor.
    pub fn new(
        identity: GuestIdentity,
        vm: BorrowedFd<'_>,
        kvm: KvmHandle,
        vcpu_count: usize,
        kick: Kick,
        vmm: Arc<dyn Vmm>,
    ) -> Result<Self, ForeignError> {
        if vcpu_count > VCPUS_MAX {
            return Err(ForeignError::Invalid(format!(
                "{vcpu_count} vCPUs; {VCPUS_MAX} are the most"
            )));
        }
        let kick_signal = match kick {
            Kick::Vmm => None,
            Kick::Signal(number) => {
                let number = number.unwrap_or_else(signal::default_kick);
                if !vcpu::can_kick(number) {
                    return Err(ForeignError::Invalid(format!(
                        "signal {number} cannot kick vCPUs"
                    )));
                }
                Some(number)
            }
        };
        let vm = kvm.vm(vm)?;
        Ok(Self {
            vm,
            shared: Arc::new(Shared {
                identity,
                vcpus: Vcpus::new(vcpu_count, kick_signal),
                vmm,
                kvm: Arc::new(kvm),
                facts: Mutex::default(),
                uses: Uses::new(),
            }),
            regions: Mutex::default(),
            view: RwLock::default(),
        })
    }

    /// Registers a memory slot. `map` makes the mapping, and promises that the memory stays until
    /// the region was removed or the guest closed.
    pub fn add_region(
        &self,
        spec: &RegionSpec<'_>,
        map: impl FnOnce(Arc<dyn std::any::Any + Send + Sync>) -> GuestMapping,
    ) -> Result<(), ForeignError> {
        let (start, page_count) = check_bounds(spec)?;
        if spec.flags & KVM_MEM_LOG_DIRTY_PAGES != 0 {
            return Err(ForeignError::InUse {
                slot: spec.slot,
                what: "a dirty log",
            });
        }
        let backing = memory::backing_of(&(spec.hva..spec.hva + spec.bytes), spec.fd)?;
        let mut regions = self.lock_regions();
        let run = PageRun { start, page_count };
        for other in regions.iter().map(|other| &other.region) {
            if other.slot == spec.slot {
                return Err(ForeignError::Invalid(format!(
                    "slot {} is registered already",
                    spec.slot
                )));
            }
            if other.run().intersection(run).is_some() {
                return Err(ForeignError::Invalid(format!(
                    "slot {} overlaps slot {} at {:#x}",
                    spec.slot,
                    other.slot,
                    other.start.gpa().max(spec.gpa)
                )));
            }
        }
        self.drop_view("a new memory region")?;
        let region = MemoryRegion {
            slot: spec.slot,
            start,
            page_count,
            mapping: map(Arc::new(Use::new(&self.shared.uses))),
            backing,
        };
        regions.push(Registered {
            region,
            flags: spec.flags,
        });
        regions.sort_by_key(|registered| registered.region.start);
        Ok(())
    }

    /// Takes a memory slot off; on return nothing here touches its memory any more.
    pub fn remove_region(&self, slot: u32) -> Result<(), ForeignError> {
        let mut regions = self.lock_regions();
        let found = regions
            .iter()
            .position(|registered| registered.region.slot == slot);
        let Some(found) = found else {
            return Err(ForeignError::Invalid(format!(
                "slot {slot} is not registered"
            )));
        };
        self.drop_view("the removal of a memory region")?;
        regions.remove(found);
        // What is left belongs to this list: one use each.
        self.shared.uses.wait_for(regions.len());
        Ok(())
    }

    /// Forgets the view, which has the regions of before; fails while a checkpoint uses it. Waits
    /// for discards that began with it.
    fn drop_view(&self, what: &'static str) -> Result<(), ForeignError> {
        let old = {
            let mut view = self.view.write().unwrap_or_else(PoisonError::into_inner);
            if let Some(old) = &*view
                && !old.host_writes.claim()
            {
                return Err(ForeignError::Busy { what });
            }
            view.take()
        };
        // Not with the view locked: a discard looks at it.
        if let Some(old) = old {
            old.host_writes.set_discard_observer(None);
        }
        Ok(())
    }

    /// Runs `start` with the guest as the engine sees it, and no change of its regions meanwhile.
    pub fn with_view<T, E: From<ForeignError>>(
        &self,
        start: impl FnOnce(Arc<dyn Guest>) -> Result<T, E>,
    ) -> Result<T, E> {
        let regions = self.lock_regions();
        start(self.view_of(&regions)?)
    }

    /// Returns the guest with the regions of now.
    fn view(&self) -> Result<Arc<View>, ForeignError> {
        // Without waiting for a change of the regions, where it can be.
        match self.current_view() {
            Some(view) => Ok(view),
            None => self.view_of(&self.lock_regions()),
        }
    }

    fn view_of(&self, regions: &[Registered]) -> Result<Arc<View>, ForeignError> {
        if let Some(view) = self.current_view() {
            return Ok(view);
        }
        let view = Arc::new(self.make_view(regions)?);
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = Some(view.clone());
        Ok(view)
    }

    fn make_view(&self, regions: &[Registered]) -> Result<View, ForeignError> {
        let vm = sys::kvm::vm_fd(&self.vm);
        let log_vm = self.shared.kvm.vm(vm)?;
        let slots: Vec<_> = regions
            .iter()
            .map(|registered| (registered.region.clone(), registered.flags))
            .collect();
        let runs = regions
            .iter()
            .map(|registered| (registered.region.slot, registered.region.run()));
        let ask = Arc::new(AskVmm(self.shared.vmm.clone()));
        Ok(View {
            regions: slots.iter().map(|(region, _)| region.clone()).collect(),
            log: KvmDirtyLog::new(log_vm, &slots)?,
            host_writes: HostWrites::new(runs).with_source(ask),
            shared: self.shared.clone(),
            _use: Use::new(&self.shared.uses),
        })
    }

    /// Returns the regions of now, sorted by frame.
    pub fn regions(&self) -> Vec<MemoryRegion> {
        let regions = self.lock_regions();
        regions
            .iter()
            .map(|registered| registered.region.clone())
            .collect()
    }

    /// Makes the calling thread the one that runs `vcpu`. Its CPUID is set before.
    pub fn vcpu_enter(&self, vcpu: usize, fd: BorrowedFd<'_>) -> Result<(), ForeignError> {
        let Shared { vcpus, kvm, .. } = &*self.shared;
        vcpus.enter(vcpu, fd, kvm, &self.vm)
    }

    /// Called before each entry into the guest; blocks while the guest is paused.
    pub fn vcpu_gate(&self, vcpu: usize) -> Result<Passage, ForeignError> {
        self.shared.vcpus.pass(vcpu)
    }

    /// Ends what [`ForeignGuest::vcpu_enter`] began: no pause waits for this vCPU any more.
    pub fn vcpu_leave(&self, vcpu: usize) -> Result<Passage, ForeignError> {
        self.shared.vcpus.leave(vcpu)
    }

    /// Tells that the VMM wrote memory. Called **after** the write.
    pub fn mark_dirty(&self, gpa: u64, bytes: u64) {
        if let Some(view) = self.current_view() {
            view.host_writes.mark_dirty(gpa, bytes);
        }
    }

    /// The view, if a checkpoint was ever taken with the regions of now. Before that nothing needs
    /// to be told: a checkpoint begins with all of memory.
    fn current_view(&self) -> Option<Arc<View>> {
        self.view
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Waits until nothing here touches the guest, its memory or the VMM any more. The checkpoints
    /// have ended, or are about to.
    pub fn close(&self) {
        let mut regions = self.lock_regions();
        *self.view.write().unwrap_or_else(PoisonError::into_inner) = None;
        regions.clear();
        self.shared.uses.wait_for(0);
    }

    fn lock_regions(&self) -> MutexGuard<'_, Vec<Registered>> {
        // Changed by one call at a time, as the last thing.
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn check_bounds(spec: &RegionSpec<'_>) -> Result<(Gfn, u64), ForeignError> {
    let RegionSpec {
        slot,
        gpa,
        hva,
        bytes,
        ..
    } = *spec;
    let page = PAGE_BYTES as u64;
    let aligned = |value: u64| value.is_multiple_of(page);
    if !aligned(gpa) || !aligned(hva as u64) || !aligned(bytes as u64) || bytes == 0 {
        return Err(ForeignError::Invalid(format!(
            "slot {slot}: {bytes:#x} bytes at gpa {gpa:#x} and hva {hva:#x} are not whole pages"
        )));
    }
    let bytes = bytes as u64;
    if gpa.checked_add(bytes).is_none() || (hva as u64).checked_add(bytes).is_none() {
        return Err(ForeignError::Invalid(format!(
            "slot {slot}: {bytes:#x} bytes at gpa {gpa:#x} go past the end of the address space"
        )));
    }
    Ok((Gfn::containing(gpa), bytes >> PAGE_SHIFT))
}
