//! The machine's devices, and what all of them do around a pause.

pub(in crate::machine) mod backend;
pub mod i8042;
pub mod pm;
pub mod rtc;
pub mod serial;

use std::io;
use std::sync::Arc;
use std::time::Instant;

use kvm_ioctls::VmFd;

use crate::state::{StateError, StateSection, StateSet};

pub use backend::BackendError;
pub(super) use serial::OpenedSerial;

/// A device still had work in flight when its deadline passed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("device {device} still had requests in flight when the drain deadline passed")]
pub struct DrainTimeout {
    /// Name of the device.
    pub device: String,
}

/// What a device does around stop-and-copy. Called with every vCPU paused.
pub trait Quiesce {
    /// Stops starting new host I/O. Work that other devices still hand over is accepted and held:
    /// devices are paused one by one, in no promised order.
    fn pause(&self);

    /// Blocks until no request is in flight, or fails at `deadline`. After `Ok`, the device
    /// touches neither guest memory nor its backend until `resume`.
    fn drain(&self, deadline: Instant) -> Result<(), DrainTimeout>;

    /// Undoes `pause`. Runs before any vCPU does; held work is replayed here.
    fn resume(&self);
}

/// A device with a state.
pub trait Device: Quiesce + Send + Sync {
    /// Returns its name, as in `serial.0`.
    fn name(&self) -> String;

    /// Returns its state, in sections of its own. Called after [`Quiesce::drain`]; changes nothing.
    fn save(&self) -> Vec<StateSection>;

    /// Takes its state from `state`. Called while it is paused, after the interrupt controllers
    /// have theirs.
    fn restore(&self, state: &mut StateSet) -> Result<(), StateError>;

    /// Puts it back to where it was when the machine was new. Called while it is paused.
    fn reset(&self);
}

/// An interrupt line to the controllers in the kernel.
///
/// Set by ioctl and not by irqfd: the kernel may deliver an irqfd's interrupt later, when the
/// controllers' state has already been saved, and then it is in no state.
#[derive(Clone, Debug)]
pub struct IrqLine {
    vm: Arc<VmFd>,
    gsi: u32,
}

impl IrqLine {
    /// Returns line `gsi` of `vm`.
    pub fn new(vm: Arc<VmFd>, gsi: u32) -> Self {
        Self { vm, gsi }
    }

    /// Raises or lowers a level-triggered line.
    pub fn set(&self, active: bool) -> io::Result<()> {
        self.vm
            .set_irq_line(self.gsi, active)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

impl vm_superio::Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.set(true)?;
        self.set(false)
    }
}
