//! Interrupts and events by KVM.

use std::sync::Arc;

use kvm_bindings::kvm_msi;
use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};

use super::Platform;
use crate::sys::event::Event;

/// KVM's interrupt controllers and ioeventfds.
///
/// Messages go by `KVM_SIGNAL_MSI` and not by irqfd. It is one system call, too, and needs no
/// table of routes; and the interrupt has arrived when it returns, whereas the kernel may deliver
/// an irqfd's later, when the controllers' state has been saved, and then it is in no state.
#[derive(Debug)]
pub struct KvmPlatform {
    vm: Arc<VmFd>,
}

impl KvmPlatform {
    /// Uses the controllers of `vm`.
    pub fn new(vm: Arc<VmFd>) -> Self {
        Self { vm }
    }
}

impl Platform for KvmPlatform {
    fn send_msi(&self, address: u64, data: u32) {
        let message = kvm_msi {
            address_lo: low(address),
            address_hi: low(address >> 32),
            data,
            ..Default::default()
        };
        // A message that goes nowhere is the guest's mistake.
        if let Err(error) = self.vm.signal_msi(message) {
            log::debug!("an interrupt to {address:#x} went nowhere: {error}");
        }
    }

    fn attach(&self, event: &Event, gpa: u64) {
        let address = IoEventAddress::Mmio(gpa);
        let attached = self
            .vm
            .register_ioevent(event.for_kvm(), &address, NoDatamatch);
        if let Err(error) = attached {
            log::debug!("writes to {gpa:#x} exit to this process: {error}");
        }
    }

    fn detach(&self, event: &Event, gpa: u64) {
        let address = IoEventAddress::Mmio(gpa);
        let detached = self
            .vm
            .unregister_ioevent(event.for_kvm(), &address, NoDatamatch);
        if let Err(error) = detached {
            log::debug!("no event was attached to {gpa:#x}: {error}");
        }
    }
}

fn low(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).expect("32 bits")
}
