//! The table of devices that no bus finds: their ports and interrupts, in ACPI's machine language.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Method, Name, Notify,
    Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, aml};

use super::{GENERATION_EVENT, GENERATION_ID_GPA, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::machine::device::{pm, rtc, serial};
use crate::machine::pci::layout::{CONFIG_PORT, CONFIG_PORTS, MMIO_END, MMIO_START};

/// The event that a generation id device sends its driver (Virtual Machine Generation ID, 2012).
const GENERATION_CHANGED: u8 = 0x80;

fn append(table: &mut Sdt, term: &dyn Aml) {
    let mut bytes = Vec::new();
    term.to_aml_bytes(&mut bytes);
    table.append_slice(&bytes);
}

fn port(port: u64) -> u16 {
    u16::try_from(port).expect("ports have 16 bits")
}

/// Returns a block of ports at a fixed place.
fn ports(start: u64, len: u64) -> IO {
    let len = u8::try_from(len).expect("devices have few ports");
    IO::new(port(start), port(start), 1, len)
}

/// Returns an ISA interrupt: edge-triggered, active high, not shared.
fn interrupt(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

fn add_pci(table: &mut Sdt) {
    let bus = AddressSpace::new_bus_number(0_u16, 0);
    let config = ports(CONFIG_PORT, CONFIG_PORTS);
    let low_ports = AddressSpace::new_io(0, port(CONFIG_PORT - 1), None);
    let high_ports = AddressSpace::new_io(port(CONFIG_PORT + CONFIG_PORTS), u16::MAX, None);
    let address = |at: u64| u32::try_from(at).expect("the window is below 4 GiB");
    let window = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        address(MMIO_START),
        address(MMIO_END - 1),
        None,
    );
    append(
        table,
        &Device::new(
            Path::new("_SB_.PCI0"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0A03")),
                &Name::new(Path::new("_UID"), &aml::ZERO),
                &Name::new(Path::new("_BBN"), &aml::ZERO),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&bus, &config, &low_ports, &window, &high_ports]),
                ),
            ],
        ),
    );
}

fn add_serial_port(table: &mut Sdt, number: u32) {
    let place = usize::try_from(number).expect("there are four serial ports");
    let (start, line) = serial::ADDRESSES[place];
    append(
        table,
        &Device::new(
            Path::new(&format!("_SB_.COM{}", number + 1)),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
                &Name::new(Path::new("_UID"), &(number + 1)),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![&ports(start, serial::PORTS), &interrupt(line)]),
                ),
            ],
        ),
    );
}

fn add_clock(table: &mut Sdt) {
    append(
        table,
        &Device::new(
            Path::new("_SB_.RTC_"),
            vec![
                &Name::new(Path::new("_HID"), &EISAName::new("PNP0B00")),
                &Name::new(
                    Path::new("_CRS"),
                    &ResourceTemplate::new(vec![
                        &ports(rtc::PORT, rtc::PORTS),
                        &interrupt(rtc::LINE),
                    ]),
                ),
            ],
        ),
    );
}

/// Adds the generation id, and the event that tells of a new one.
fn add_generation_id(table: &mut Sdt) {
    let low = u32::try_from(GENERATION_ID_GPA).expect("in the first MiB");
    // Drivers know the device by any of these.
    let ids: [&'static str; 3] = ["VM_Gen_Counter", "VM_GEN_COUNTER", "VMGENCTR"];
    append(
        table,
        &Device::new(
            Path::new("_SB_.VGEN"),
            vec![
                &Name::new(Path::new("_HID"), &"LVPT0001"),
                &Name::new(
                    Path::new("_CID"),
                    &Package::new(vec![&ids[0], &ids[1], &ids[2]]),
                ),
                &Name::new(Path::new("_DDN"), &ids[0]),
                &Name::new(Path::new("ADDR"), &Package::new(vec![&low, &aml::ZERO])),
            ],
        ),
    );
    let device = Path::new("\\_SB_.VGEN");
    let notify = Notify::new(&device, &GENERATION_CHANGED);
    let name = format!("_E{GENERATION_EVENT:02X}");
    let method = Method::new(Path::new(&name), 0, false, vec![&notify]);
    append(table, &Scope::new(Path::new("\\_GPE"), vec![&method]));
}

/// Returns the table of a machine with these serial ports.
pub(super) fn table(serial_ports: &[u32]) -> Vec<u8> {
    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    add_pci(&mut table);
    for number in serial_ports {
        add_serial_port(&mut table, *number);
    }
    add_clock(&mut table);
    add_generation_id(&mut table);
    // Off is the only sleeping state.
    let sleep_type = pm::SLEEP_TYPE_OFF;
    let off = Package::new(vec![&sleep_type, &sleep_type, &aml::ZERO, &aml::ZERO]);
    append(&mut table, &Name::new(Path::new("_S5_"), &off));
    table.as_slice().to_vec()
}
