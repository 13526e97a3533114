//! The states of the machine's devices.

use serde::{Deserialize, Serialize};

use super::SectionPayload;

/// A 16550 serial port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialV1 {
    /// Divisor latch, low byte.
    pub divisor_low: u8,
    /// Divisor latch, high byte.
    pub divisor_high: u8,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Bytes received and not yet read by the guest, oldest first.
    pub received: Vec<u8>,
}

impl SectionPayload for SerialV1 {
    const KIND: &'static str = "serial";
    const VERSION: u16 = 1;
}

/// ACPI power-management hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmV2 {
    /// PM1 status.
    pub status: u16,
    /// PM1 enable.
    pub enable: u16,
    /// PM1 control.
    pub control: u16,
    /// General-purpose events that have happened.
    pub gpe_status: u8,
    /// General-purpose events that interrupt.
    pub gpe_enable: u8,
}

impl SectionPayload for PmV2 {
    const KIND: &'static str = "pm";
    const VERSION: u16 = 2;
}

/// The real-time clock and its battery-backed memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcV1 {
    /// The byte that the next access is to.
    pub index: u8,
    /// 128 bytes: alarm, control registers and memory; the bytes of the time are those that the
    /// guest is setting, if it is.
    pub cmos: Vec<u8>,
    /// The clock's time, in nanoseconds since 1970 as if it showed UTC.
    pub clock_ns: i64,
    /// The host's wall clock at that moment, in nanoseconds since 1970.
    pub realtime_ns: i64,
}

impl SectionPayload for RtcV1 {
    const KIND: &'static str = "rtc";
    const VERSION: u16 = 1;
}
