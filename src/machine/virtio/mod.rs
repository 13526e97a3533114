//! Virtio devices on PCI, by version 1 of the specification (no legacy interface).
//!
//! A device is three parts. [`VirtioPci`] is what the guest's driver sets up: configuration,
//! features, queues, interrupts. A [`Backend`] is what the device does. Between them a thread
//! ([`engine`](Engine)) runs the backend whenever the guest has something for it, and is what a
//! pause stops: it finishes the request at hand, and what is still in the rings stays there.
//!
//! Rings and buffers are written by the guest at any time and are never trusted. What breaks the
//! rules puts the device into `DEVICE_NEEDS_RESET`: it does nothing more until its driver resets
//! it.

pub mod balloon;
pub mod blk;
pub mod console;
mod engine;
pub mod net;
mod queue;
mod registers;
pub mod rng;
#[cfg(test)]
mod testing;
mod timer;
mod transport;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::PollFlags;

use crate::guest::GuestDisk;
use crate::machine::memory::GuestMemory;
use crate::state::{StateError, StateSection, StateSet};

pub use engine::Engine;
pub use queue::{Chain, Fault, Slices, Virtqueue};
pub use transport::{DeviceError, VirtioPci};

/// Feature bits that every device here offers; see the specification, section 6.
pub mod feature {
    /// Descriptors may name a table of descriptors.
    pub const INDIRECT: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
    /// Both sides say at which index they want to be told.
    pub const EVENT_INDEX: u64 = 1 << virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
    /// The device is not a legacy one.
    pub const VERSION_1: u64 = 1 << virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
}

/// What kind of device it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    /// Number by the virtio specification, section 5.
    pub device_type: u16,
    /// PCI class code.
    pub class: u32,
    /// Name of its state's sections and of its thread, as in `blk`.
    pub name: &'static str,
}

/// Whether the backend is to go on.
#[derive(Debug)]
pub struct Stop(AtomicBool);

impl Stop {
    fn new() -> Self {
        Self(AtomicBool::new(false))
    }

    fn set(&self, stop: bool) {
        self.0.store(stop, Ordering::Release);
    }

    /// Returns whether to return to the caller after the request at hand.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// What the backend works on, in the device's own thread.
#[derive(Debug)]
pub struct Work<'a> {
    /// Guest memory. What is written through it is marked for checkpoints.
    pub memory: &'a GuestMemory,
    /// The device's queues, by number; `None` for those that the driver did not enable.
    pub queues: &'a mut [Option<Virtqueue>],
    /// Features that the driver took.
    pub features: u64,
    /// Set when a pause or a reset wants the thread.
    pub stop: &'a Stop,
}

/// Reads a device's configuration from the bytes of all of it: what is behind its end is zero.
fn read_from(config: &[u8], offset: u64, data: &mut [u8]) {
    for (at, byte) in (offset..).zip(data) {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        *byte = config.get(at).copied().unwrap_or(0);
    }
}

/// What a device does. Its methods are called by several threads.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Returns what it is.
    fn kind(&self) -> Kind;

    /// Returns the features that it offers besides [`feature`]'s.
    fn features(&self) -> u64;

    /// Returns the most descriptors of each queue, powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Reads its configuration; what is behind the end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Takes a write to its configuration; most devices have nothing to write.
    fn write_config(&self, _offset: u64, _data: &[u8]) {}

    /// Does what there is to do, until nothing is left or `work.stop` is set. Runs in the
    /// device's thread, and may block for the host's I/O.
    fn process(&self, work: &mut Work<'_>) -> Result<(), Fault>;

    /// Returns the disk that it is, for checkpoints.
    fn disk(&self) -> Option<Arc<dyn GuestDisk>> {
        None
    }

    /// Returns what besides the queues wakes the thread: asked after each [`Backend::process`].
    fn poll_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        None
    }

    /// Returns what its kind has besides [`VirtioPciV1`](crate::state::virtio::VirtioPciV1).
    fn save(&self, _instance: u32) -> Option<StateSection> {
        None
    }

    /// Takes that state.
    fn restore(&self, _instance: u32, _state: &mut StateSet) -> Result<(), StateError> {
        Ok(())
    }

    /// Forgets what the driver has set up. The thread is not in [`Backend::process`].
    fn reset(&self) {}
}
