//! ACPI hardware: the power button, the register that powers off, and general-purpose events.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{Device, DrainTimeout, IrqLine, Quiesce};
use crate::machine::bus::{GuestRequest, Registers};
use crate::state::device::PmV2;
use crate::state::{StateError, StateSection, StateSet};

/// PM1 event block (status and enable), then PM1 control, and the block of general-purpose events.
pub const PORT: u64 = 0x600;
/// How many ports they take.
pub const PORTS: u64 = 10;
/// PM1 control.
pub const CONTROL_PORT: u64 = PORT + 4;
/// General-purpose events: a byte of status and a byte of enables.
pub const GPE_PORT: u64 = PORT + 8;
/// How many ports they take.
pub const GPE_PORTS: u8 = 2;
/// The system control interrupt.
pub const SCI: u32 = 9;

const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE: u16 = 7 << 10;
/// What the tables have the guest write there to power off.
pub const SLEEP_TYPE_OFF: u8 = 0;

/// Power-management registers.
#[derive(Debug)]
pub struct PowerManagement {
    registers: Mutex<PmV2>,
    sci: IrqLine,
}

impl PowerManagement {
    /// Makes the registers as they are when the machine is new. The machine is in ACPI mode from
    /// the start: there is no firmware to switch from.
    pub fn new(sci: IrqLine) -> Self {
        Self {
            registers: Mutex::new(INITIAL),
            sci,
        }
    }

    /// Presses the power button. Returns whether the guest has asked to be told.
    pub fn press_power_button(&self) -> bool {
        let mut registers = self.lock();
        registers.status |= POWER_BUTTON;
        self.update(&registers);
        registers.enable & POWER_BUTTON != 0
    }

    /// Raises general-purpose event `number`, from 0 to 7. A guest that has not enabled it finds
    /// it once it does.
    pub fn raise_event(&self, number: u8) {
        let mut registers = self.lock();
        registers.gpe_status |= 1 << number;
        self.update(&registers);
    }

    fn lock(&self) -> MutexGuard<'_, PmV2> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, registers: &PmV2) {
        let active = registers.status & registers.enable != 0
            || registers.gpe_status & registers.gpe_enable != 0;
        if let Err(error) = self.sci.set(active) {
            log::warn!("could not set the system control interrupt: {error}");
        }
    }
}

const INITIAL: PmV2 = PmV2 {
    status: 0,
    enable: 0,
    control: SCI_ENABLED,
    gpe_status: 0,
    gpe_enable: 0,
};

impl Registers for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        let [status, enable, control] =
            [registers.status, registers.enable, registers.control].map(u16::to_le_bytes);
        let gpe = [registers.gpe_status, registers.gpe_enable];
        let bytes = [status, enable, control, [0xff; 2], gpe].concat();
        for (at, byte) in (offset..).zip(data) {
            *byte = usize::try_from(at)
                .ok()
                .and_then(|at| bytes.get(at).copied())
                .unwrap_or(0xff);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest> {
        let mut registers = self.lock();
        let mut control_written = false;
        for (at, &byte) in (offset..).zip(data) {
            let shift = if at % 2 == 0 { 0 } else { 8 };
            let value = u16::from(byte) << shift;
            let keep = !(0xff << shift);
            match at {
                // A one clears the event.
                0 | 1 => registers.status &= !value,
                2 | 3 => registers.enable = registers.enable & keep | value,
                4 | 5 => {
                    control_written = true;
                    registers.control = registers.control & keep | value | SCI_ENABLED;
                }
                8 => registers.gpe_status &= !byte,
                9 => registers.gpe_enable = byte,
                _ => {}
            }
        }
        self.update(&registers);
        // SLP_EN reads as zero always.
        let sleeps = control_written && registers.control & SLEEP_ENABLE != 0;
        registers.control &= !SLEEP_ENABLE;
        let off = u16::from(SLEEP_TYPE_OFF) << 10;
        (sleeps && registers.control & SLEEP_TYPE == off).then_some(GuestRequest::PowerOff)
    }
}

impl Quiesce for PowerManagement {
    fn pause(&self) {}

    fn drain(&self, _deadline: Instant) -> Result<(), DrainTimeout> {
        // It has no backend: the button is pressed under the registers' lock.
        Ok(())
    }

    fn resume(&self) {}
}

impl Device for PowerManagement {
    fn name(&self) -> String {
        "pm.0".to_owned()
    }

    fn save(&self) -> Vec<StateSection> {
        vec![StateSection::encode(0, &*self.lock())]
    }

    fn restore(&self, state: &mut StateSet) -> Result<(), StateError> {
        let saved: PmV2 = state.take(0)?;
        let mut registers = self.lock();
        *registers = PmV2 {
            control: saved.control & !SLEEP_ENABLE | SCI_ENABLED,
            ..saved
        };
        // The level of a line is in no controller's state.
        self.update(&registers);
        Ok(())
    }

    fn reset(&self) {
        let mut registers = self.lock();
        *registers = INITIAL;
        self.update(&registers);
    }
}
