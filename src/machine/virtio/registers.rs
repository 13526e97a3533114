//! What the driver of a device sets: the common configuration, and the interrupts' vectors.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_queue::{Queue, QueueState};

use crate::machine::pci::Platform;
use crate::machine::pci::msix::{Msix, NO_VECTOR};
use crate::state::virtio::VirtqueueV1;

/// Interrupt status: a queue has completed requests.
const ISR_QUEUE: u8 = 1;
/// Interrupt status: the configuration has changed.
const ISR_CONFIG: u8 = 2;

/// A device's interrupts, which its thread sends and vCPUs set up.
#[derive(Debug)]
pub struct Interrupts(Mutex<Vectors>);

#[derive(Debug)]
pub(super) struct Vectors {
    pub msix: Msix,
    pub config: u16,
    pub queues: Vec<u16>,
    /// For drivers that poll: with MSI-X nobody reads it.
    isr: u8,
}

impl Interrupts {
    /// Makes the vectors of a device: one for each queue, and one for its configuration.
    pub(super) fn new(platform: Arc<dyn Platform>, queue_count: u16) -> Self {
        Self(Mutex::new(Vectors {
            msix: Msix::new(platform, queue_count + 1),
            config: NO_VECTOR,
            queues: vec![NO_VECTOR; queue_count.into()],
            isr: 0,
        }))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Vectors> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the driver that a queue has completed requests.
    pub(super) fn signal_queue(&self, queue: u16) {
        let mut vectors = self.lock();
        vectors.isr |= ISR_QUEUE;
        if let Some(&vector) = vectors.queues.get(usize::from(queue)) {
            vectors.msix.signal(vector);
        }
    }

    /// Tells the driver that the configuration, or the device's status, has changed.
    pub(super) fn signal_config(&self) {
        let mut vectors = self.lock();
        vectors.isr |= ISR_CONFIG;
        let vector = vectors.config;
        vectors.msix.signal(vector);
    }
}

impl Vectors {
    /// Returns the interrupt status and clears it, as reading it does.
    pub fn take_isr(&mut self) -> u8 {
        std::mem::take(&mut self.isr)
    }

    /// Puts the virtio part back to where it was; MSI-X is PCI's.
    pub fn reset(&mut self) {
        self.config = NO_VECTOR;
        self.queues.fill(NO_VECTOR);
        self.isr = 0;
    }

    /// Returns `vector` if there is such a one, else none: how a driver learns that it was refused.
    pub fn checked(&self, vector: u16) -> u16 {
        if vector < self.msix.count() {
            vector
        } else {
            NO_VECTOR
        }
    }
}

/// One queue as its driver sets it up.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QueueSetup {
    pub size: u16,
    pub enabled: bool,
    pub descriptors: u64,
    pub driver_ring: u64,
    pub device_ring: u64,
}

impl QueueSetup {
    /// Makes the queue; `None` where its driver set up none that can be. `next` is how many
    /// buffers were taken and given back before.
    pub fn make(&self, size_max: u16, event_index: bool, next: (u16, u16)) -> Option<Queue> {
        Queue::try_from(QueueState {
            max_size: size_max,
            next_avail: next.0,
            next_used: next.1,
            event_idx_enabled: event_index,
            size: self.size,
            ready: true,
            desc_table: self.descriptors,
            avail_ring: self.driver_ring,
            used_ring: self.device_ring,
        })
        .ok()
    }

    pub fn save(&self, queue: Option<&Queue>, vector: u16) -> VirtqueueV1 {
        use virtio_queue::QueueT;
        VirtqueueV1 {
            size: self.size,
            enabled: self.enabled,
            descriptors: self.descriptors,
            driver_ring: self.driver_ring,
            device_ring: self.device_ring,
            next_available: queue.map_or(0, QueueT::next_avail),
            next_used: queue.map_or(0, QueueT::next_used),
            vector,
        }
    }

    pub fn from_saved(saved: &VirtqueueV1) -> Self {
        Self {
            size: saved.size,
            enabled: saved.enabled,
            descriptors: saved.descriptors,
            driver_ring: saved.driver_ring,
            device_ring: saved.device_ring,
        }
    }
}

/// Replaces the part of `value` that a write at `at` (from its first byte) covers.
pub(super) fn merge<const N: usize>(value: [u8; N], at: u64, data: &[u8]) -> [u8; N] {
    let mut value = value;
    for (at, byte) in (at..).zip(data) {
        if let Some(place) = usize::try_from(at).ok().and_then(|at| value.get_mut(at)) {
            *place = *byte;
        }
    }
    value
}
