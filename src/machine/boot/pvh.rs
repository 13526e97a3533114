//! What the PVH boot protocol has a kernel find (Xen's `public/arch-x86/hvm/start_info.h`).

use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress};

use super::{CMDLINE_GPA, START_INFO_GPA, params};
use crate::machine::acpi::RSDP_GPA;
use crate::machine::memory::GuestMemory;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
/// Behind the structure itself.
const MODULES_GPA: u64 = START_INFO_GPA + 0x40;
const MEMORY_MAP_GPA: u64 = START_INFO_GPA + 0x80;

/// Writes the start info and what it points to.
pub(super) fn write(memory: &GuestMemory, ram_bytes: u64, initrd: Option<(u32, u32)>) {
    let map = params::e820(ram_bytes);
    let info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        nr_modules: initrd.map_or(0, |_| 1),
        modlist_paddr: initrd.map_or(0, |_| MODULES_GPA),
        cmdline_paddr: CMDLINE_GPA,
        rsdp_paddr: RSDP_GPA,
        memmap_paddr: MEMORY_MAP_GPA,
        memmap_entries: u32::try_from(map.len()).expect("at most four entries"),
        ..Default::default()
    };
    let there = "the first MiB is there";
    memory
        .write_obj(info, GuestAddress(START_INFO_GPA))
        .expect(there);
    if let Some((at, bytes)) = initrd {
        let module = hvm_modlist_entry {
            paddr: at.into(),
            size: bytes.into(),
            ..Default::default()
        };
        memory
            .write_obj(module, GuestAddress(MODULES_GPA))
            .expect(there);
    }
    let entry_bytes = size_of::<hvm_memmap_table_entry>();
    for (gpa, (addr, size, kind)) in (MEMORY_MAP_GPA..).step_by(entry_bytes).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_: kind,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(gpa)).expect(there);
    }
}
