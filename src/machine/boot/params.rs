//! The zero page, and the tables with which the first vCPU enters 64-bit mode.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::{Bytes, GuestAddress};

use super::{BOOT_PARAMS_GPA, CMDLINE_GPA, GDT_GPA, PAGE_TABLES_GPA};
use crate::machine::acpi::RSDP_GPA;
use crate::machine::memory::{GuestMemory, HOLE_END, layout};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Where conventional memory ends: the last KiB below 640 KiB is for the BIOS.
const CONVENTIONAL_END: u64 = 0x9_fc00;
const MIB: u64 = 1 << 20;

/// A boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// Present, writable, accessed.
const TABLE: u64 = 0x23;
/// And dirty, 2 MiB. Accessed and dirty are set beforehand, so that the CPU never writes here.
const LARGE_PAGE: u64 = 0xe3;

/// Flat 64-bit code and data at selectors 0x10 and 0x18, where the boot protocol wants them.
pub const GDT: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// Returns the memory map: address, length and type of each range.
pub(super) fn e820(ram_bytes: u64) -> Vec<(u64, u64, u32)> {
    let ranges = layout(ram_bytes);
    let low_end = ranges[0].1;
    let mut map = vec![
        (0, CONVENTIONAL_END, E820_RAM),
        (CONVENTIONAL_END, MIB - CONVENTIONAL_END, E820_RESERVED),
    ];
    if low_end > MIB {
        map.push((MIB, low_end - MIB, E820_RAM));
    }
    if let Some((_, high)) = ranges.get(1) {
        map.push((HOLE_END, *high, E820_RAM));
    }
    map
}

/// Writes the zero page.
pub(super) fn write(
    memory: &GuestMemory,
    ram_bytes: u64,
    header: Option<setup_header>,
    cmdline_bytes: u32,
    initrd: Option<(u32, u32)>,
) {
    let mut header = header.unwrap_or(setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        kernel_alignment: KERNEL_ALIGNMENT,
        ..Default::default()
    });
    header.type_of_loader = LOADER_UNDEFINED;
    header.cmd_line_ptr = u32::try_from(CMDLINE_GPA).expect("in the first MiB");
    header.cmdline_size = cmdline_bytes;
    if let Some((at, bytes)) = initrd {
        header.ramdisk_image = at;
        header.ramdisk_size = bytes;
    }
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: RSDP_GPA,
        ..Default::default()
    };
    let map = e820(ram_bytes);
    for (entry, (addr, size, kind)) in params.e820_table.iter_mut().zip(&map) {
        *entry = boot_e820_entry {
            addr: *addr,
            size: *size,
            r#type: *kind,
        };
    }
    params.e820_entries = u8::try_from(map.len()).expect("at most four entries");
    memory
        .write_obj(params, GuestAddress(BOOT_PARAMS_GPA))
        .expect("the first MiB is there");
}

/// Writes the segment descriptors, and page tables that map the first 4 GiB to themselves.
pub(super) fn write_tables(memory: &GuestMemory) {
    let put = |gpa: u64, value: u64| {
        memory
            .write_obj(value, GuestAddress(gpa))
            .expect("the first MiB is there");
    };
    for (gpa, descriptor) in (GDT_GPA..).step_by(8).zip(GDT) {
        put(gpa, descriptor);
    }
    let pointers = PAGE_TABLES_GPA + 0x1000;
    put(PAGE_TABLES_GPA, pointers | TABLE);
    for gib in 0..4 {
        let directory = pointers + 0x1000 * (gib + 1);
        put(pointers + 8 * gib, directory | TABLE);
        for page in 0..512 {
            put(directory + 8 * page, gib << 30 | page << 21 | LARGE_PAGE);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_has_the_legacy_area_and_the_hole() {
        let ends = |bytes| -> Vec<(u64, u64, u32)> {
            e820(bytes)
                .into_iter()
                .map(|(start, len, kind)| (start, start + len, kind))
                .collect()
        };
        assert_eq!(
            ends(5 << 30),
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, MIB, 2),
                (MIB, 3 << 30, 1),
                (4 << 30, 6 << 30, 1)
            ]
        );
        assert_eq!(ends(MIB).len(), 2);
    }
}
