//! KVM's own state of a VM that another VMM made.

use std::os::fd::BorrowedFd;
use std::sync::OnceLock;

use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::ForeignError;
use crate::kvmstate::{self, ClockPolicy, KvmStateError, MsrSet};
use crate::state::{HostFacts, StateSection, StateSet};
use crate::sys;

/// `/dev/kvm`, and what is asked of it once.
#[derive(Debug)]
pub struct KvmHandle {
    kvm: Kvm,
    /// The MSRs of this VM's vCPUs. To find them out takes a millisecond.
    msrs: OnceLock<MsrSet>,
}

impl KvmHandle {
    /// Opens `/dev/kvm`, or duplicates the descriptor of it that the caller has.
    pub fn open(own: Option<BorrowedFd<'_>>) -> Result<Self, ForeignError> {
        let kvm = match own {
            Some(fd) => sys::kvm::borrow_kvm(fd).map_err(ForeignError::kvm("duplicate kvm_fd"))?,
            None => Kvm::new().map_err(os("open /dev/kvm"))?,
        };
        if kvm.get_api_version() != 12 {
            return Err(ForeignError::Invalid(
                "kvm_fd is not a descriptor of /dev/kvm".to_owned(),
            ));
        }
        Ok(Self {
            kvm,
            msrs: OnceLock::new(),
        })
    }

    /// Returns a handle of the caller's VM.
    pub(super) fn vm(&self, vm: BorrowedFd<'_>) -> Result<VmFd, ForeignError> {
        let vm =
            sys::kvm::borrow_vm(&self.kvm, vm).map_err(ForeignError::kvm("duplicate vm_fd"))?;
        // Every VM has this extension; a descriptor of something else has none.
        if vm.check_extension_int(Cap::UserMemory) <= 0 {
            return Err(ForeignError::Invalid(
                "vm_fd is not a descriptor of a KVM VM".to_owned(),
            ));
        }
        Ok(vm)
    }

    /// Returns the length of the page that a vCPU shares with its VMM.
    pub(super) fn run_page_bytes(&self) -> Result<usize, ForeignError> {
        self.kvm
            .get_vcpu_mmap_size()
            .map_err(os("ask for the size of a vCPU's page"))
    }

    /// Returns the MSRs that this VM's vCPUs have.
    pub(super) fn msrs(&self, vcpu: &VcpuFd) -> Result<&MsrSet, KvmStateError> {
        if let Some(msrs) = self.msrs.get() {
            return Ok(msrs);
        }
        let probed = MsrSet::probe(&self.kvm, vcpu)?;
        Ok(self.msrs.get_or_init(|| probed))
    }

    /// Saves a VM with these vCPUs, all of them stopped and their pending exits complete.
    pub fn save(
        &self,
        vm: BorrowedFd<'_>,
        vcpus: &[BorrowedFd<'_>],
    ) -> Result<(Vec<StateSection>, HostFacts), ForeignError> {
        let vm = self.vm(vm)?;
        let vcpus = self.vcpus(&vm, vcpus)?;
        let vcpus: Vec<_> = vcpus.iter().collect();
        let Some(first) = vcpus.first() else {
            return Err(ForeignError::Invalid("a VM has a vCPU".to_owned()));
        };
        let msrs = self.msrs(first)?;
        let (sections, first) = kvmstate::save_any(&vm, &vcpus, msrs)?;
        let scaling = self.kvm.check_extension(Cap::TscControl);
        let facts = first.map_or_else(HostFacts::default, |first| {
            kvmstate::guest_facts(&first, msrs, scaling)
        });
        Ok((sections, facts))
    }

    /// Restores what [`KvmHandle::save`] saved, into a VM with as many vCPUs that never ran, and
    /// takes its sections.
    pub fn restore(
        &self,
        vm: BorrowedFd<'_>,
        vcpus: &[BorrowedFd<'_>],
        state: &mut StateSet,
        policy: ClockPolicy,
    ) -> Result<(), ForeignError> {
        let vm = self.vm(vm)?;
        let vcpus = self.vcpus(&vm, vcpus)?;
        let vcpus: Vec<_> = vcpus.iter().collect();
        Ok(kvmstate::restore_any(&vm, &vcpus, state, policy)?)
    }

    fn vcpus(&self, vm: &VmFd, fds: &[BorrowedFd<'_>]) -> Result<Vec<VcpuFd>, ForeignError> {
        let handles = fds.iter().map(|&fd| sys::kvm::borrow_vcpu(vm, fd));
        handles
            .collect::<Result<_, _>>()
            .map_err(ForeignError::kvm("use a vCPU's descriptor"))
    }
}

/// Returns kvm-ioctls' error as ours.
fn os(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> ForeignError {
    move |error| ForeignError::Kvm {
        what,
        source: std::io::Error::from_raw_os_error(error.errno()),
    }
}
