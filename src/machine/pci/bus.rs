//! The bus: configuration mechanism 1, and the window that BARs are in.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::PciFunction;
use super::config::{ConfigSpace, Identity};
use super::layout::{MMIO_START, SLOTS, VIRTIO_BAR_BYTES};
use crate::machine::bus::{GuestRequest, Registers};
use crate::machine::device::{Device, DrainTimeout, Quiesce};
use crate::state::virtio::PciV1;
use crate::state::{StateError, StateSection, StateSet};

/// A generic host bridge: Red Hat's, which QEMU shows too.
const HOST_BRIDGE: Identity = Identity {
    id: (0x1b36, 0x0008),
    revision: 0,
    class: 0x06_0000,
    subsystem: (0x1af4, 0x1100),
};

/// Address register: configuration is meant.
const ENABLE: u32 = 1 << 31;

/// The one bus.
#[derive(Debug)]
pub struct PciBus {
    host_bridge: ConfigSpace,
    functions: Vec<Option<Arc<dyn PciFunction>>>,
    address: Mutex<u32>,
}

/// The window of memory that BARs are in.
#[derive(Debug)]
pub struct PciWindow(pub Arc<PciBus>);

impl PciBus {
    /// Makes a bus with `functions`, each in its slot.
    ///
    /// # Panics
    /// When a slot is 0, out of range, or taken: the machine's layout has been checked.
    pub fn new(functions: impl IntoIterator<Item = (u8, Arc<dyn PciFunction>)>) -> Self {
        let mut slots = vec![None; SLOTS.into()];
        for (slot, function) in functions {
            let place: &mut Option<_> = &mut slots[usize::from(slot)];
            assert!(slot != 0 && place.is_none(), "slot {slot} is taken");
            *place = Some(function);
        }
        Self {
            host_bridge: ConfigSpace::new(HOST_BRIDGE),
            functions: slots,
            address: Mutex::new(0),
        }
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.address.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns slot and register that the address register names; `None` where nothing can be.
    fn target(&self) -> Option<(usize, usize)> {
        let address = *self.lock();
        // Bus and function: there is only bus 0, and no device has more than one function.
        if address & ENABLE == 0 || address & 0xff_0700 != 0 {
            return None;
        }
        let slot = usize::try_from(address >> 11 & 0x1f).expect("5 bits");
        Some((slot, usize::try_from(address & 0xfc).expect("8 bits")))
    }

    fn function(&self, slot: usize) -> Option<&dyn PciFunction> {
        self.functions.get(slot)?.as_deref()
    }

    fn read_config(&self, within: u64, data: &mut [u8]) {
        data.fill(0xff);
        let (Some((slot, register)), Ok(within)) = (self.target(), usize::try_from(within)) else {
            return;
        };
        if slot == 0 {
            self.host_bridge.read(register + within, data);
        } else if let Some(function) = self.function(slot) {
            function.read_config(register + within, data);
        }
    }

    fn write_config(&self, within: u64, data: &[u8]) {
        if let (Some((slot, register)), Ok(within)) = (self.target(), usize::try_from(within))
            && let Some(function) = self.function(slot)
        {
            function.write_config(register + within, data);
        }
    }

    /// Returns the function whose BAR has `gpa`, and where in it.
    fn at(&self, gpa: u64) -> Option<(&dyn PciFunction, u64)> {
        self.functions.iter().flatten().find_map(|function| {
            let offset = gpa.checked_sub(function.bar()?)?;
            (offset < VIRTIO_BAR_BYTES).then_some((&**function, offset))
        })
    }
}

impl Registers for PciBus {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            (0, 4) => data.copy_from_slice(&self.lock().to_le_bytes()),
            (4.., len) if offset + len as u64 <= 8 => self.read_config(offset - 4, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest> {
        match (offset, data) {
            (0, &[a, b, c, d]) => *self.lock() = u32::from_le_bytes([a, b, c, d]),
            (4.., data) if offset + data.len() as u64 <= 8 => self.write_config(offset - 4, data),
            _ => {}
        }
        None
    }
}

impl Registers for PciWindow {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.0.at(MMIO_START + offset) {
            Some((function, offset)) => function.read_bar(offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest> {
        if let Some((function, offset)) = self.0.at(MMIO_START + offset) {
            function.write_bar(offset, data);
        }
        None
    }
}

impl Quiesce for PciBus {
    fn pause(&self) {}

    fn drain(&self, _deadline: Instant) -> Result<(), DrainTimeout> {
        // Only vCPUs use it, and those are paused.
        Ok(())
    }

    fn resume(&self) {}
}

impl Device for PciBus {
    fn name(&self) -> String {
        "pci.0".to_owned()
    }

    fn save(&self) -> Vec<StateSection> {
        let config_address = *self.lock();
        vec![StateSection::encode(0, &PciV1 { config_address })]
    }

    fn restore(&self, state: &mut StateSet) -> Result<(), StateError> {
        let saved: PciV1 = state.take(0)?;
        *self.lock() = saved.config_address;
        Ok(())
    }

    fn reset(&self) {
        *self.lock() = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Fake {
        config: Mutex<Vec<(usize, Vec<u8>)>>,
        bar: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl PciFunction for Fake {
        fn read_config(&self, at: usize, data: &mut [u8]) {
            data.fill(u8::try_from(at).unwrap());
        }
        fn write_config(&self, at: usize, data: &[u8]) {
            self.config.lock().unwrap().push((at, data.to_vec()));
        }
        fn bar(&self) -> Option<u64> {
            Some(MMIO_START + 0x5_0000)
        }
        fn read_bar(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write_bar(&self, offset: u64, data: &[u8]) {
            self.bar.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn select(bus: &PciBus, address: u32) {
        bus.write(0, &address.to_le_bytes());
    }

    fn long(bus: &PciBus) -> u32 {
        let mut data = [0; 4];
        bus.read(4, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn configuration_is_found_by_slot_and_nothing_elsewhere() {
        let fake = Arc::new(Fake::default());
        let function: Arc<dyn PciFunction> = fake.clone();
        let bus = PciBus::new([(3, function)]);
        assert_eq!(long(&bus), u32::MAX, "not enabled");
        select(&bus, ENABLE);
        assert_eq!(long(&bus), 0x0008_1b36);
        select(&bus, ENABLE | 3 << 11 | 0x10);
        assert_eq!(long(&bus), 0x1010_1010);
        let mut byte = [0];
        bus.read(6, &mut byte);
        assert_eq!(byte, [0x12]);
        bus.write(5, &[7]);
        assert_eq!(*fake.config.lock().unwrap(), [(0x11, vec![7])]);
        for elsewhere in [4 << 11, 3 << 11 | 1 << 8, 3 << 11 | 1 << 16] {
            select(&bus, ENABLE | elsewhere);
            assert_eq!(long(&bus), u32::MAX, "{elsewhere:#x}");
        }
        // Accesses that are no long word do not change the address register.
        bus.write(0, &[0, 0]);
        bus.write(7, &[0; 4]);
        let mut address = [0; 4];
        bus.read(0, &mut address);
        assert_eq!(u32::from_le_bytes(address), ENABLE | 3 << 11 | 1 << 16);
    }

    #[test]
    fn the_window_finds_the_bar_where_it_is() {
        let fake = Arc::new(Fake::default());
        let function: Arc<dyn PciFunction> = fake.clone();
        let window = PciWindow(Arc::new(PciBus::new([(1, function)])));
        let mut data = [0; 2];
        window.read(0x5_0007, &mut data);
        assert_eq!(data, [7; 2]);
        window.read(0x4_ffff, &mut data);
        assert_eq!(data, [0xff; 2]);
        window.write(0x6_0000, &[1]);
        window.write(0x5_ffff, &[2]);
        assert_eq!(*fake.bar.lock().unwrap(), [(0xffff, vec![2])]);
    }

    #[test]
    fn the_address_register_comes_back() {
        let bus = PciBus::new([]);
        select(&bus, 0x8000_1234);
        let saved = bus.save();
        bus.reset();
        let mut state = StateSet::new(saved).unwrap();
        bus.restore(&mut state).unwrap();
        assert_eq!(*bus.lock(), 0x8000_1234);
    }
}
