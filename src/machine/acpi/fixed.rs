//! The tables of a fixed form (ACPI 6.4, section 5.2).

use acpi_tables::Aml;
use acpi_tables::facs::FACS;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::machine::device::{i8042, pm, rtc};

/// Where KVM's interrupt controllers are.
const LOCAL_APIC: u32 = 0xfee0_0000;
const IO_APIC: u32 = 0xfec0_0000;

/// MADT flag: there are 8259s too.
const PCAT_COMPATIBLE: u32 = 1;
/// Interrupt flags: active high, level-triggered.
const HIGH_LEVEL: u16 = 0xd;
/// All processors.
const ANY_PROCESSOR: u8 = 0xff;

/// What a PC of old has (IA-PC boot architecture flags): devices on the legacy ports are there;
/// no VGA, and no keyboard controller beyond its reset line.
const LEGACY_DEVICES: u16 = 1;
const NO_VGA: u16 = 1 << 2;

fn bytes_of(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Returns ports as a register block.
fn ports(start: u64, len_bytes: u8) -> GAS {
    GAS::new(
        AddressSpace::SystemIo,
        len_bytes * 8,
        0,
        AccessSize::Undefined,
        start,
    )
}

fn narrow(port: u64) -> u32 {
    u32::try_from(port).expect("ports and tables are below 1 MiB")
}

/// Returns the fixed description: power management, reset, and where the DSDT is.
pub(super) fn fadt(dsdt: u64, facs: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_32(narrow(dsdt))
        .firmware_ctrl_32(narrow(facs))
        // There is a power button, in fixed hardware; the flag of a sleep button says that there
        // is none.
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::ResetRegSup)
        .gpe_info(narrow(pm::GPE_PORT), 0, pm::GPE_PORTS, 0, 0);
    fadt.sci_int = u16::try_from(pm::SCI).expect("an ISA interrupt").into();
    fadt.pm1a_evt_blk = narrow(pm::PORT).into();
    fadt.pm1_evt_len = 4;
    fadt.x_pm1a_evt_blk = ports(pm::PORT, 4);
    fadt.pm1a_cnt_blk = narrow(pm::CONTROL_PORT).into();
    fadt.pm1_cnt_len = 2;
    fadt.x_pm1a_cnt_blk = ports(pm::CONTROL_PORT, 2);
    fadt.x_gpe0_blk = ports(pm::GPE_PORT, pm::GPE_PORTS);
    // Beyond 100 and 1000 microseconds: the CPU has neither C2 nor C3.
    fadt.p_lvl2_lat = 101.into();
    fadt.p_lvl3_lat = 1001.into();
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = (LEGACY_DEVICES | NO_VGA).into();
    fadt.reset_reg = ports(i8042::PORT + i8042::COMMAND, 1);
    fadt.reset_value = i8042::PULSE_RESET;
    bytes_of(&fadt.finalize())
}

/// Returns the interrupt controllers.
pub(super) fn madt(apic_ids: &[u32]) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", 44, 5, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.write_u32(36, LOCAL_APIC);
    madt.write_u32(40, PCAT_COMPATIBLE);
    for (number, id) in (0_u8..).zip(apic_ids) {
        let id = u8::try_from(*id).expect("APIC ids have 8 bits");
        let apic = ProcessorLocalApic::new(number, id, EnabledStatus::Enabled);
        madt.append_slice(&bytes_of(&apic));
    }
    madt.append_slice(&bytes_of(&IoApic::new(0, IO_APIC, 0)));
    // ISA interrupts are edge-triggered, but for the system control interrupt.
    let sci = u8::try_from(pm::SCI).expect("an ISA interrupt");
    let [flags_low, flags_high] = HIGH_LEVEL.to_le_bytes();
    madt.append_slice(&[2, 10, 0, sci, sci, 0, 0, 0, flags_low, flags_high]);
    // NMI is at the second local interrupt pin of every processor.
    madt.append_slice(&[4, 6, ANY_PROCESSOR, 0, 0, 1]);
    madt.as_slice().to_vec()
}

/// Returns the list of tables.
pub(super) fn xsdt(entries: &[u64]) -> Vec<u8> {
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(*entry);
    }
    bytes_of(&xsdt)
}

pub(super) fn facs() -> Vec<u8> {
    bytes_of(&FACS::new())
}

pub(super) fn rsdp(xsdt: u64) -> Vec<u8> {
    bytes_of(&Rsdp::new(OEM_ID, xsdt))
}
