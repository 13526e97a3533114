//! ACPI fixed hardware: the power button, and the register that powers off.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::{Device, DrainTimeout, IrqLine, Quiesce};
use crate::machine::bus::{GuestRequest, Registers};
use crate::state::device::PmV1;
use crate::state::{StateError, StateSection, StateSet};

/// PM1 event block (status and enable), then PM1 control.
pub const PORT: u64 = 0x600;
/// How many ports it takes.
pub const PORTS: u64 = 6;
/// The system control interrupt.
pub const SCI: u32 = 9;

const POWER_BUTTON: u16 = 1 << 8;
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;
const SLEEP_TYPE: u16 = 7 << 10;

/// Power-management registers.
#[derive(Debug)]
pub struct PowerManagement {
    registers: Mutex<PmV1>,
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

    fn lock(&self) -> MutexGuard<'_, PmV1> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn update(&self, registers: &PmV1) {
        let active = registers.status & registers.enable != 0;
        if let Err(error) = self.sci.set(active) {
            log::warn!("could not set the system control interrupt: {error}");
        }
    }
}

const INITIAL: PmV1 = PmV1 {
    status: 0,
    enable: 0,
    control: SCI_ENABLED,
};

impl Registers for PowerManagement {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let registers = self.lock();
        let bytes = [registers.status, registers.enable, registers.control]
            .map(u16::to_le_bytes)
            .concat();
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
                _ => {}
            }
        }
        self.update(&registers);
        // SLP_EN reads as zero always; SLP_TYP 0 is S5 here.
        let sleeps = control_written && registers.control & SLEEP_ENABLE != 0;
        registers.control &= !SLEEP_ENABLE;
        (sleeps && registers.control & SLEEP_TYPE == 0).then_some(GuestRequest::PowerOff)
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

    fn save(&self) -> StateSection {
        StateSection::encode(0, &*self.lock())
    }

    fn restore(&self, state: &mut StateSet) -> Result<(), StateError> {
        let saved: PmV1 = state.take(0)?;
        let mut registers = self.lock();
        *registers = PmV1 {
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
