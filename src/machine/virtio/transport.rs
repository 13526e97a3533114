//! Virtio over PCI: the registers in a device's BAR, and what follows from them.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET,
};
use virtio_queue::QueueT;

use super::registers::{Interrupts, QueueSetup, merge};
use super::{Backend, Engine, Virtqueue, feature};
use crate::guest::GuestDisk;
use crate::machine::device::{Device, DrainTimeout, Quiesce};
use crate::machine::memory::GuestRam;
use crate::machine::pci::config::{COMMAND_MEMORY, ConfigSpace, Identity};
use crate::machine::pci::layout::{MMIO_END, MMIO_START, VIRTIO_BAR_BYTES, initial_bar};
use crate::machine::pci::{PciFunction, Platform};
use crate::state::virtio::VirtioPciV1;
use crate::state::{SectionPayload, StateError, StateSection, StateSet};

/// Vendor of virtio devices, and the number that is added to a device type (section 4.1.2).
const VENDOR: u16 = 0x1af4;
const DEVICE_BASE: u16 = 0x1040;

// Where the parts are in the BAR.
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x8000;
const MSIX_PENDING: u64 = 0xc000;
const PART_BYTES: u32 = 0x1000;
/// Bytes between the notification registers of two queues.
const NOTIFY_STEP: u32 = 4;

// Capabilities, and the parts that those of virtio name (section 4.1.4).
const CAP_VENDOR: u8 = 0x09;
const CAP_MSIX: u8 = 0x11;
const PART_COMMON: u8 = 1;
const PART_NOTIFY: u8 = 2;
const PART_ISR: u8 = 3;
const PART_DEVICE: u8 = 4;
const PART_ACCESS: u8 = 5;

const MSIX_ENABLED: u16 = 1 << 15;
const MSIX_MASKED: u16 = 1 << 14;

const DRIVER_OK: u8 = narrow(VIRTIO_CONFIG_S_DRIVER_OK);
const FEATURES_OK: u8 = narrow(VIRTIO_CONFIG_S_FEATURES_OK);
const NEEDS_RESET: u8 = narrow(VIRTIO_CONFIG_S_NEEDS_RESET);

const fn narrow(bits: u32) -> u8 {
    assert!(bits <= 0xff, "the status has 8 bits");
    bits.to_le_bytes()[0]
}

/// A device that cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("could not {what}")]
pub struct DeviceError {
    /// What was tried.
    pub what: String,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// What the driver has set.
#[derive(Debug)]
struct Registers {
    config: ConfigSpace,
    msix_at: usize,
    access_at: usize,
    status: u8,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    /// Where the notification registers set events now.
    attached: Option<u64>,
}

/// A virtio device on PCI.
#[derive(Debug)]
pub struct VirtioPci {
    slot: u8,
    backend: Arc<dyn Backend>,
    platform: Arc<dyn Platform>,
    interrupts: Arc<Interrupts>,
    ram: Arc<GuestRam>,
    registers: Mutex<Registers>,
    engine: Engine,
}

impl VirtioPci {
    /// Makes the device in `slot`, and starts its thread, named after `name`. It is paused.
    pub fn new(
        slot: u8,
        name: &str,
        backend: Arc<dyn Backend>,
        ram: Arc<GuestRam>,
        platform: Arc<dyn Platform>,
    ) -> Result<Arc<Self>, DeviceError> {
        let queue_count = u16::try_from(backend.queue_sizes().len()).expect("a few queues");
        let interrupts = Arc::new(Interrupts::new(platform.clone(), queue_count));
        let engine = Engine::new(backend.clone(), ram.clone(), interrupts.clone(), name);
        let engine = engine.map_err(|source| DeviceError {
            what: format!("start the thread of {name}"),
            source,
        })?;
        let (config, msix_at, access_at) = configuration(slot, &*backend);
        let registers = Registers {
            config,
            msix_at,
            access_at,
            status: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: fresh_queues(&*backend),
            attached: None,
        };
        Ok(Arc::new(Self {
            slot,
            backend,
            platform,
            interrupts,
            ram,
            registers: Mutex::new(registers),
            engine,
        }))
    }

    /// Returns the device's slot.
    pub fn slot(&self) -> u8 {
        self.slot
    }

    /// Returns the disk that it is, for checkpoints.
    pub fn disk(&self) -> Option<Arc<dyn GuestDisk>> {
        self.backend.disk()
    }

    /// Tells the driver that the device's configuration has changed.
    pub fn notify_config(&self) {
        self.interrupts.signal_config();
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn device_features(&self) -> u64 {
        let common = feature::VERSION_1 | feature::INDIRECT | feature::EVENT_INDEX;
        self.backend.features() | common
    }

    /// Returns the status as the driver reads it.
    fn status(&self, registers: &Registers) -> u8 {
        if self.engine.has_failed() {
            registers.status | NEEDS_RESET
        } else {
            registers.status
        }
    }

    /// Takes a write to the status register.
    fn set_status(&self, registers: &mut Registers, status: u8) {
        if status == 0 {
            self.reset_virtio(registers);
            return;
        }
        let mut status = status & !NEEDS_RESET;
        let was = registers.status;
        if status & !was & FEATURES_OK != 0 {
            let taken = registers.driver_features;
            let offered = taken & !self.device_features() == 0;
            if !offered || taken & feature::VERSION_1 == 0 {
                // How a driver learns that its choice is refused.
                status &= !FEATURES_OK;
            }
        }
        registers.status = status;
        if status & !was & DRIVER_OK != 0 && status & FEATURES_OK != 0 {
            self.activate(registers, None);
        }
    }

    /// Lets the device's thread have the queues that the driver set up; `next` is where each one
    /// went on.
    fn activate(&self, registers: &Registers, next: Option<&[(u16, u16)]>) {
        let event_index = registers.driver_features & feature::EVENT_INDEX != 0;
        let mut queues = Vec::new();
        for (at, setup) in registers.queues.iter().enumerate() {
            let number = u16::try_from(at).expect("a few queues");
            if !setup.enabled {
                queues.push(None);
                continue;
            }
            let next = next.and_then(|next| next.get(at)).copied();
            let made = setup
                .make(self.size_max(number), event_index, next.unwrap_or_default())
                .filter(|queue| queue.is_valid(self.ram.memory()));
            let Some(queue) = made else {
                let name = self.name();
                log::warn!("{name}: queue {number} is not in memory; it stops until it is reset");
                self.engine.fail();
                return;
            };
            let interrupts = self.interrupts.clone();
            queues.push(Some(Virtqueue::new(queue, number, interrupts)));
        }
        self.engine.activate(queues, registers.driver_features);
    }

    fn size_max(&self, queue: u16) -> u16 {
        let sizes = self.backend.queue_sizes();
        sizes.get(usize::from(queue)).copied().unwrap_or(0)
    }

    /// Puts virtio's part back to where it was; the guest's PCI settings stay.
    fn reset_virtio(&self, registers: &mut Registers) {
        self.engine.deactivate();
        self.backend.reset();
        self.interrupts.lock().reset();
        registers.status = 0;
        registers.device_feature_select = 0;
        registers.driver_feature_select = 0;
        registers.driver_features = 0;
        registers.queue_select = 0;
        registers.queues = fresh_queues(&*self.backend);
    }

    /// Follows a change of the command register, the BAR, or MSI-X's control.
    fn follow_config(&self, registers: &mut Registers) {
        let control = registers.config.word(registers.msix_at + 2);
        let mut vectors = self.interrupts.lock();
        let (enabled, masked) = (control & MSIX_ENABLED != 0, control & MSIX_MASKED != 0);
        if (enabled, masked) != (vectors.msix.is_enabled(), vectors.msix.is_masked()) {
            vectors.msix.set_control(enabled, masked);
        }
        drop(vectors);
        let bar = mapped(&registers.config);
        if bar == registers.attached {
            return;
        }
        for (event, step) in self.engine.kicks().iter().zip(0..) {
            let offset = NOTIFY + step * u64::from(NOTIFY_STEP);
            if let Some(old) = registers.attached {
                self.platform.detach(event, old + offset);
            }
            if let Some(new) = bar {
                self.platform.attach(event, new + offset);
            }
        }
        registers.attached = bar;
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        let vectors = self.interrupts.lock();
        let select = registers.queue_select;
        let queue = registers.queues.get(usize::from(select)).copied();
        let setup = queue.unwrap_or_default();
        let half = |features: u64, select: u32| match select {
            0 => features & 0xffff_ffff,
            1 => features >> 32,
            _ => 0,
        };
        let word = |value: u16| u64::from(value);
        let offered = half(self.device_features(), registers.device_feature_select);
        let taken = half(registers.driver_features, registers.driver_feature_select);
        let queue_vector = vectors.queues.get(usize::from(select)).copied();
        // Offset, bytes, value.
        let fields: [(u64, u64, u64); 16] = [
            (0x00, 4, registers.device_feature_select.into()),
            (0x04, 4, offered),
            (0x08, 4, registers.driver_feature_select.into()),
            (0x0c, 4, taken),
            (0x10, 2, word(vectors.config)),
            (0x12, 2, registers.queues.len() as u64),
            (0x14, 1, self.status(&registers).into()),
            (0x15, 1, 0),
            (0x16, 2, word(select)),
            (0x18, 2, word(setup.size)),
            (0x1a, 2, word(queue_vector.unwrap_or(u16::MAX))),
            (0x1c, 2, setup.enabled.into()),
            (0x1e, 2, word(select)),
            (0x20, 8, setup.descriptors),
            (0x28, 8, setup.driver_ring),
            (0x30, 8, setup.device_ring),
        ];
        for (at, byte) in (offset..).zip(data) {
            let field = fields
                .iter()
                .find(|(start, len, _)| (*start..start + len).contains(&at));
            *byte = field.map_or(0, |(start, _, value)| {
                value.to_le_bytes()[usize::try_from(at - start).expect("inside the field")]
            });
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        let registers = &mut *registers;
        // Features and queues are the driver's until it says that it is ready.
        let ready = registers.status & DRIVER_OK != 0;
        let agreed = registers.status & FEATURES_OK != 0;
        let select = usize::from(registers.queue_select);
        let long = |value: u32, start: u64| {
            u32::from_le_bytes(merge(value.to_le_bytes(), offset - start, data))
        };
        let word = |start: u64| u16::from_le_bytes(merge([0; 2], offset - start, data));
        match offset {
            0x00..0x04 => {
                registers.device_feature_select = long(registers.device_feature_select, 0);
            }
            0x08..0x0c => {
                registers.driver_feature_select = long(registers.driver_feature_select, 8);
            }
            0x0c..0x10 if !agreed && registers.driver_feature_select < 2 => {
                let shift = registers.driver_feature_select * 32;
                let half = registers.driver_features >> shift & 0xffff_ffff;
                let half = long(u32::try_from(half).expect("32 bits"), 0xc);
                registers.driver_features &= !(0xffff_ffff << shift);
                registers.driver_features |= u64::from(half) << shift;
            }
            0x10 => {
                let mut vectors = self.interrupts.lock();
                vectors.config = vectors.checked(word(0x10));
            }
            0x14 => self.set_status(registers, data.first().copied().unwrap_or(0)),
            0x16 => registers.queue_select = word(0x16),
            0x1a => {
                let mut vectors = self.interrupts.lock();
                let vector = vectors.checked(word(0x1a));
                if let Some(queue) = vectors.queues.get_mut(select) {
                    *queue = vector;
                }
            }
            0x18..0x38 if !ready => self.write_queue(registers, offset, data),
            _ => {}
        }
    }

    /// Takes a write to the registers of the queue that is shown.
    fn write_queue(&self, registers: &mut Registers, offset: u64, data: &[u8]) {
        let select = registers.queue_select;
        let size_max = self.size_max(select);
        let Some(setup) = registers.queues.get_mut(usize::from(select)) else {
            return;
        };
        let word = |start: u64| u16::from_le_bytes(merge([0; 2], offset - start, data));
        let address = |value: u64, start: u64| {
            u64::from_le_bytes(merge(value.to_le_bytes(), offset - start, data))
        };
        match offset {
            0x18 => {
                let size = word(0x18);
                // Another size is refused, which the driver reads back.
                if size.is_power_of_two() && size <= size_max {
                    setup.size = size;
                }
            }
            0x1c => setup.enabled = setup.enabled || word(0x1c) == 1,
            0x20..0x28 => setup.descriptors = address(setup.descriptors, 0x20),
            0x28..0x30 => setup.driver_ring = address(setup.driver_ring, 0x28),
            0x30..0x38 => setup.device_ring = address(setup.device_ring, 0x30),
            _ => {}
        }
    }

    /// Returns where the configuration access capability points, if `at` is its data register.
    fn access_window(&self, at: usize, len: usize) -> Option<(u64, usize)> {
        let registers = self.lock();
        let (config, access) = (&registers.config, registers.access_at);
        let inside = at >= access + 16 && at + len <= access + 20;
        let mut bar = [0];
        config.read(access + 4, &mut bar);
        let (offset, window) = (config.long(access + 8), config.long(access + 12));
        let window = usize::try_from(window).unwrap_or(usize::MAX);
        let valid = bar == [0] && [1, 2, 4].contains(&window) && len >= window;
        (inside && valid).then_some((u64::from(offset), window))
    }

    fn save_registers(&self) -> VirtioPciV1 {
        let registers = self.lock();
        let vectors = self.interrupts.lock();
        let saved_queue = |at: usize, queue: Option<&Virtqueue>| {
            let vector = vectors.queues.get(at).copied().unwrap_or(u16::MAX);
            registers.queues[at].save(queue.map(Virtqueue::queue), vector)
        };
        let in_use = self.engine.with_queues(|queues| {
            let numbered = queues.iter().enumerate();
            numbered
                .map(|(at, queue)| saved_queue(at, queue.as_ref()))
                .collect()
        });
        let queues = in_use.unwrap_or_else(|| {
            let all = 0..registers.queues.len();
            all.map(|at| saved_queue(at, None)).collect()
        });
        let config = &registers.config;
        let mut access_bar = [0];
        config.read(registers.access_at + 4, &mut access_bar);
        VirtioPciV1 {
            device_type: self.backend.kind().device_type,
            command: config.command(),
            bar: config.bar(),
            interrupt_line: config.interrupt_line(),
            access_window: (
                access_bar[0],
                config.long(registers.access_at + 8),
                config.long(registers.access_at + 12),
            ),
            msix_enabled: vectors.msix.is_enabled(),
            msix_masked: vectors.msix.is_masked(),
            vectors: vectors.msix.vectors().to_vec(),
            status: self.status(&registers),
            device_feature_select: registers.device_feature_select,
            driver_feature_select: registers.driver_feature_select,
            driver_features: registers.driver_features,
            device_features: self.device_features(),
            config_vector: vectors.config,
            queue_select: registers.queue_select,
            queues,
        }
    }

    /// Takes a saved state; says what of it cannot be.
    fn restore_registers(&self, saved: &VirtioPciV1) -> Result<(), &'static str> {
        if saved.device_type != self.backend.kind().device_type {
            return Err("another kind of device is in this slot");
        }
        let agreed = saved.status & FEATURES_OK != 0;
        if agreed && saved.driver_features & !self.device_features() != 0 {
            return Err("its driver uses features that this device does not have");
        }
        let mut registers = self.lock();
        // A build that knew less of the device had fewer: those that are new stay unused.
        let mut queues = fresh_queues(&*self.backend);
        if saved.queues.len() > queues.len() {
            return Err("it has more queues than this device");
        }
        for (queue, saved) in queues.iter_mut().zip(&saved.queues) {
            *queue = QueueSetup::from_saved(saved);
        }
        let mut vectors = self.interrupts.lock();
        if !vectors
            .msix
            .restore(&saved.vectors, saved.msix_enabled, saved.msix_masked)
        {
            return Err("it has more interrupts than this device");
        }
        vectors.reset();
        vectors.config = vectors.checked(saved.config_vector);
        for (at, queue) in saved.queues.iter().enumerate() {
            let vector = vectors.checked(queue.vector);
            vectors.queues[at] = vector;
        }
        drop(vectors);
        let (msix_at, access_at) = (registers.msix_at, registers.access_at);
        let config = &mut registers.config;
        config.set_command(saved.command);
        config.set_bar(saved.bar);
        config.set_interrupt_line(saved.interrupt_line);
        let control = (u16::from(saved.msix_enabled) * MSIX_ENABLED)
            | (u16::from(saved.msix_masked) * MSIX_MASKED);
        config.write(msix_at + 2, &control.to_le_bytes());
        config.write(access_at + 4, &[saved.access_window.0]);
        config.write(access_at + 8, &saved.access_window.1.to_le_bytes());
        config.write(access_at + 12, &saved.access_window.2.to_le_bytes());
        registers.status = saved.status & !NEEDS_RESET;
        registers.device_feature_select = saved.device_feature_select;
        registers.driver_feature_select = saved.driver_feature_select;
        registers.driver_features = saved.driver_features;
        registers.queue_select = saved.queue_select;
        registers.queues = queues;
        self.follow_config(&mut registers);
        if saved.status & NEEDS_RESET != 0 {
            self.engine.set_failed();
        } else if registers.status & DRIVER_OK != 0 {
            let next: Vec<_> = saved
                .queues
                .iter()
                .map(|queue| (queue.next_available, queue.next_used))
                .collect();
            self.activate(&registers, Some(&next));
        }
        Ok(())
    }
}

/// Returns where the BAR answers.
fn mapped(config: &ConfigSpace) -> Option<u64> {
    let bar = u64::from(config.bar());
    let inside = (MMIO_START..=MMIO_END - VIRTIO_BAR_BYTES).contains(&bar);
    (inside && config.command() & COMMAND_MEMORY != 0).then_some(bar)
}

fn fresh_queues(backend: &dyn Backend) -> Vec<QueueSetup> {
    let sizes = backend.queue_sizes().iter();
    sizes
        .map(|&size| QueueSetup {
            size,
            ..QueueSetup::default()
        })
        .collect()
}

/// Returns the configuration, and where MSI-X and the configuration access capability are in it.
fn configuration(slot: u8, backend: &dyn Backend) -> (ConfigSpace, usize, usize) {
    let kind = backend.kind();
    let bar_bytes = u32::try_from(VIRTIO_BAR_BYTES).expect("a small BAR");
    let mut config = ConfigSpace::new(Identity {
        id: (VENDOR, DEVICE_BASE + kind.device_type),
        // At least 1: not a transitional device.
        revision: 1,
        class: kind.class,
        subsystem: (VENDOR, 0x1100),
    })
    .with_bar(initial_bar(slot), bar_bytes);
    let offset = |offset: u64| u32::try_from(offset).expect("inside the BAR").to_le_bytes();
    let queue_count = u16::try_from(backend.queue_sizes().len()).expect("a few queues");
    // The table has a vector for each queue and one more; its size field is one less.
    let control = queue_count.to_le_bytes();
    let msix = [&control[..], &offset(MSIX_TABLE), &offset(MSIX_PENDING)].concat();
    let writable = (MSIX_ENABLED | MSIX_MASKED).to_le_bytes();
    let msix_at = config.add_capability(CAP_MSIX, &msix, &writable);
    let part = |kind: u8, start: u64, len: u32, more: &[u8]| {
        let cap_len = u8::try_from(16 + more.len()).expect("20 at most");
        let head = [cap_len, kind, 0, 0, 0, 0];
        [&head[..], &offset(start), &len.to_le_bytes(), more].concat()
    };
    for (kind, start) in [
        (PART_COMMON, COMMON),
        (PART_ISR, ISR),
        (PART_DEVICE, DEVICE),
    ] {
        config.add_capability(CAP_VENDOR, &part(kind, start, PART_BYTES, &[]), &[]);
    }
    let notify = part(PART_NOTIFY, NOTIFY, PART_BYTES, &NOTIFY_STEP.to_le_bytes());
    config.add_capability(CAP_VENDOR, &notify, &[]);
    let access = part(PART_ACCESS, 0, 0, &[0; 4]);
    // BAR, offset and length.
    let mut writable = [0; 14];
    writable[2] = 0xff;
    writable[6..14].fill(0xff);
    let access_at = config.add_capability(CAP_VENDOR, &access, &writable);
    (config, msix_at, access_at)
}

impl PciFunction for VirtioPci {
    fn read_config(&self, at: usize, data: &mut [u8]) {
        if let Some((offset, len)) = self.access_window(at, data.len()) {
            data.fill(0);
            self.read_bar(offset, &mut data[..len]);
            return;
        }
        self.lock().config.read(at, data);
    }

    fn write_config(&self, at: usize, data: &[u8]) {
        if let Some((offset, len)) = self.access_window(at, data.len()) {
            self.write_bar(offset, &data[..len]);
            return;
        }
        let mut registers = self.lock();
        registers.config.write(at, data);
        self.follow_config(&mut registers);
    }

    fn bar(&self) -> Option<u64> {
        mapped(&self.lock().config)
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        match offset {
            COMMON..ISR => self.read_common(offset, data),
            ISR => data.fill(self.interrupts.lock().take_isr()),
            DEVICE..NOTIFY => self.backend.read_config(offset - DEVICE, data),
            MSIX_TABLE..MSIX_PENDING => {
                let vectors = self.interrupts.lock();
                vectors.msix.read_table(offset - MSIX_TABLE, data);
            }
            MSIX_PENDING.. => {
                let vectors = self.interrupts.lock();
                vectors.msix.read_pending(offset - MSIX_PENDING, data);
            }
            _ => {}
        }
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        match offset {
            COMMON..ISR => self.write_common(offset, data),
            DEVICE..NOTIFY => self.backend.write_config(offset - DEVICE, data),
            NOTIFY..MSIX_TABLE => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_STEP);
                let kick = usize::try_from(queue).ok();
                if let Some(event) = kick.and_then(|queue| self.engine.kicks().get(queue)) {
                    event.set();
                }
            }
            MSIX_TABLE..MSIX_PENDING => {
                let mut vectors = self.interrupts.lock();
                vectors.msix.write_table(offset - MSIX_TABLE, data);
            }
            _ => {}
        }
    }
}

impl Quiesce for VirtioPci {
    fn pause(&self) {
        self.engine.pause();
    }

    fn drain(&self, deadline: Instant) -> Result<(), DrainTimeout> {
        if self.engine.drain(deadline) {
            Ok(())
        } else {
            Err(DrainTimeout {
                device: self.name(),
            })
        }
    }

    fn resume(&self) {
        self.engine.resume();
    }
}

impl Device for VirtioPci {
    fn name(&self) -> String {
        format!("virtio-{}.{}", self.backend.kind().name, self.slot)
    }

    fn save(&self) -> Vec<StateSection> {
        let instance = self.slot.into();
        let registers = StateSection::encode(instance, &self.save_registers());
        let of_kind = self.backend.save(instance);
        [registers].into_iter().chain(of_kind).collect()
    }

    fn restore(&self, state: &mut StateSet) -> Result<(), StateError> {
        let instance = self.slot.into();
        // First what the backend has: with the registers its thread may begin.
        self.backend.restore(instance, state)?;
        let saved: VirtioPciV1 = state.take(instance)?;
        self.restore_registers(&saved).map_err(|why| {
            log::warn!("{}: {why}", self.name());
            StateError::Malformed {
                kind: VirtioPciV1::KIND,
                instance,
                source: None,
            }
        })
    }

    fn reset(&self) {
        let mut registers = self.lock();
        self.reset_virtio(&mut registers);
        self.interrupts.lock().msix.reset();
        (registers.config, _, _) = configuration(self.slot, &*self.backend);
        self.follow_config(&mut registers);
    }
}
