//! A driver of a device, for tests: it sets the device up by its registers, as a guest does, and
//! may then break every rule.

use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_queue::desc::RawDescriptor;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::{Backend, VirtioPci, feature};
use crate::machine::device::{Device, Quiesce};
use crate::machine::memory::{GuestMemory, GuestRam};
use crate::machine::pci::PciFunction;
use crate::machine::pci::testing::Recorder;
use crate::machine::spec::{BackingSpec, MemorySpec};
use crate::state::{StateSection, StateSet};

pub const NEEDS_RESET: u8 = 0x40;
pub const WRITE: u16 = 2;
pub const NEXT: u16 = 1;
pub const INDIRECT: u16 = 4;

pub const QUEUE_SIZE: u16 = 16;
const QUEUE_STEP: u64 = 0x1000;
/// Where the test's buffers begin; each gets a page.
pub const BUFFERS: u64 = 0x10_0000;
pub const RAM_BYTES: u64 = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

pub fn ram() -> Arc<GuestRam> {
    let spec = MemorySpec {
        bytes: RAM_BYTES,
        backing: BackingSpec::AnonymousSmallPages,
        preallocate: false,
        locked: false,
        shared: None,
    };
    Arc::new(GuestRam::new(&spec).unwrap())
}

/// A device and its driver.
pub struct Rig {
    pub device: Arc<VirtioPci>,
    pub ram: Arc<GuestRam>,
    pub recorder: Arc<Recorder>,
    queues: u16,
}

pub fn descriptor(address: u64, len: u32, flags: u16, next: u16) -> RawDescriptor {
    Descriptor::new(address, len, flags, next).into()
}

impl Rig {
    pub fn new(backend: Arc<dyn Backend>) -> Self {
        Self::with_ram(backend, ram())
    }

    pub fn with_ram(backend: Arc<dyn Backend>, ram: Arc<GuestRam>) -> Self {
        let recorder = Arc::new(Recorder::default());
        let queues = u16::try_from(backend.queue_sizes().len()).unwrap();
        let device = VirtioPci::new(1, "test", backend, ram.clone(), recorder.clone()).unwrap();
        device.resume();
        Self {
            device,
            ram,
            recorder,
            queues,
        }
    }

    /// Makes another device with the memory of one that was saved, as a restore does; it takes all
    /// of the state, and is paused.
    pub fn restored(backend: Arc<dyn Backend>, ram: Arc<GuestRam>, saved: &[StateSection]) -> Self {
        let restored = Self::with_ram(backend, ram);
        restored.device.pause();
        let mut state = StateSet::new(saved.to_vec()).unwrap();
        restored.device.restore(&mut state).unwrap();
        state.finish().unwrap();
        restored
    }

    /// Pauses the device, and returns what is saved of it.
    pub fn pause_and_save(&self) -> Vec<StateSection> {
        self.device.pause();
        self.device.drain(Instant::now() + PATIENCE).unwrap();
        self.device.save()
    }

    pub fn memory(&self) -> &GuestMemory {
        self.ram.memory()
    }

    pub fn write(&self, offset: u64, data: &[u8]) {
        self.device.write_bar(offset, data);
    }

    pub fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.device.read_bar(offset, &mut data);
        data
    }

    pub fn status(&self) -> u8 {
        self.read::<1>(0x14)[0]
    }

    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(0, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(4)))
        };
        half(0) | half(1) << 32
    }

    /// Returns where a queue's parts are: descriptors, available ring, used ring.
    pub fn queue(&self, number: u16) -> [u64; 3] {
        let start = QUEUE_STEP * (1 + u64::from(number));
        let available = start + 16 * u64::from(QUEUE_SIZE);
        let used = (available + 6 + 2 * u64::from(QUEUE_SIZE)).next_multiple_of(4);
        [start, available, used]
    }

    fn load<T: ByteValued>(&self, address: u64) -> T {
        self.memory().read_obj(GuestAddress(address)).unwrap()
    }

    pub fn store<T: ByteValued>(&self, address: u64, value: T) {
        self.memory()
            .write_obj(value, GuestAddress(address))
            .unwrap();
    }

    /// Sets the index of the available ring.
    pub fn set_available(&self, number: u16, index: u16) {
        self.store(self.queue(number)[1] + 2, index);
    }

    /// Resets the device and takes `features`; on to FEATURES_OK.
    pub fn agree(&self, features: u64) {
        self.write(0x14, &[0]);
        assert_eq!(self.status(), 0);
        self.write(0x14, &[3]);
        for (select, half) in [(0_u32, features), (1, features >> 32)] {
            self.write(8, &select.to_le_bytes());
            let half = u32::try_from(half & 0xffff_ffff).unwrap();
            self.write(0xc, &half.to_le_bytes());
        }
        self.write(0x14, &[0xb]);
    }

    /// Sets the device up as a well-behaved driver does.
    pub fn start(&self, features: u64) {
        self.agree(features | feature::VERSION_1);
        assert_eq!(self.status(), 0xb, "features refused");
        self.enable_msix();
        for number in 0..self.queues {
            let queue = self.queue(number);
            // Rings start empty. (The mock of virtio-queue has rings that overlap.)
            self.memory()
                .write_slice(&[0; 0x800], GuestAddress(queue[1]))
                .unwrap();
            self.place_queue(number, queue);
        }
        self.write(0x14, &[0xf]);
    }

    pub fn place_queue(&self, number: u16, addresses: [u64; 3]) {
        self.write(0x16, &number.to_le_bytes());
        self.write(0x18, &QUEUE_SIZE.to_le_bytes());
        self.write(0x1a, &number.to_le_bytes());
        for (at, address) in [0x20, 0x28, 0x30].into_iter().zip(addresses) {
            self.write(at, &address.to_le_bytes());
        }
        self.write(0x1c, &1_u16.to_le_bytes());
    }

    fn enable_msix(&self) {
        // MSI-X is the first capability.
        self.device.write_config(0x42, &0x8000_u16.to_le_bytes());
        for vector in 0..=self.queues {
            let base = 0x8000 + u64::from(vector) * 16;
            let entry = 0xfee0_0000_u64.to_le_bytes();
            self.write(base, &entry);
            self.write(base + 8, &(0x40 + u32::from(vector)).to_le_bytes());
            self.write(base + 12, &0_u32.to_le_bytes());
        }
        self.write(0x10, &self.queues.to_le_bytes());
    }

    pub fn kick(&self, number: u16) {
        self.write(0x3000 + u64::from(number) * 4, &number.to_le_bytes());
    }

    /// Puts descriptors at the start of the table, and makes the first one available.
    pub fn offer(&self, number: u16, descriptors: &[RawDescriptor]) {
        self.offer_at(number, 0, descriptors);
    }

    /// Puts descriptors into the table from `first` on, and makes that one available.
    pub fn offer_at(&self, number: u16, first: u16, descriptors: &[RawDescriptor]) {
        let table = self.queue(number)[0];
        for (at, descriptor) in (u64::from(first)..).zip(descriptors) {
            self.store(table + at * 16, *descriptor);
        }
        self.offer_head(number, first);
    }

    pub fn offer_head(&self, number: u16, head: u16) {
        let ring = self.queue(number)[1];
        let index: u16 = self.load(ring + 2);
        self.store(ring + 4 + 2 * u64::from(index % QUEUE_SIZE), head);
        self.set_available(number, index.wrapping_add(1));
        self.kick(number);
    }

    pub fn used(&self, number: u16) -> u16 {
        self.load(self.queue(number)[2] + 2)
    }

    /// Waits until the device has given back `count` requests, or has given up.
    pub fn wait_used(&self, number: u16, count: u16) -> Option<(u32, u32)> {
        self.wait(|| self.used(number) == count || self.status() & NEEDS_RESET != 0);
        if self.status() & NEEDS_RESET != 0 {
            return None;
        }
        let place = u64::from(count.wrapping_sub(1) % QUEUE_SIZE);
        let entry = self.queue(number)[2] + 4 + 8 * place;
        Some((self.load(entry), self.load(entry + 4)))
    }

    pub fn wait(&self, mut done: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done() {
            assert!(Instant::now() < deadline, "the device hangs");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}
