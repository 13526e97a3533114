//! SMBIOS tables: the machine's UUID and maker, where management tools look for them.

use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress};

use super::memory::GuestMemory;

/// Where a BIOS has the entry point, and where kernels look for it.
const ENTRY_POINT_GPA: u64 = 0xf_0000;
const TABLE_GPA: u64 = 0xf_0020;

/// BIOS characteristics: none are said.
const NOT_SAID: u64 = 1 << 3;
/// Second extension byte of the characteristics: this is a virtual machine.
const VIRTUAL_MACHINE: u8 = 1 << 4;
/// How the machine was woken: by its power switch.
const POWER_SWITCH: u8 = 6;
/// Where a BIOS of 64 KiB starts, as a segment.
const BIOS_SEGMENT: u16 = 0xf000;

/// Appends one structure: its formatted part, whose length is written in, and its strings.
fn structure(table: &mut Vec<u8>, handle: u16, kind: u8, fields: &[u8], strings: &[&str]) {
    let len = u8::try_from(4 + fields.len()).expect("structures are short");
    table.extend([kind, len]);
    table.extend(handle.to_le_bytes());
    table.extend(fields);
    for string in strings {
        table.extend(string.bytes());
        table.push(0);
    }
    if strings.is_empty() {
        table.push(0);
    }
    table.push(0);
}

fn table(uuid: Uuid) -> Vec<u8> {
    let mut table = Vec::new();
    let version = env!("CARGO_PKG_VERSION");
    // Strings are named by their number, from 1; 0 is none.
    let mut bios = vec![1, 2];
    bios.extend(BIOS_SEGMENT.to_le_bytes());
    bios.extend([3, 0]);
    bios.extend(NOT_SAID.to_le_bytes());
    bios.extend([0, VIRTUAL_MACHINE, 0, 0, 0xff, 0xff]);
    structure(
        &mut table,
        0,
        0,
        &bios,
        &["livepoint", version, "01/01/2026"],
    );
    let mut system = vec![1, 2, 3, 0];
    // The first three fields are little-endian, since SMBIOS 2.6.
    system.extend(uuid.to_bytes_le());
    system.extend([POWER_SWITCH, 0, 0]);
    let names = ["livepoint", "livepoint virtual machine", version];
    structure(&mut table, 1, 1, &system, &names);
    structure(&mut table, 2, 127, &[], &[]);
    table
}

fn entry_point(table_bytes: usize) -> Vec<u8> {
    let mut entry = b"_SM3_".to_vec();
    // Checksum; length; version 3.0 of the specification; revision of the entry point.
    entry.extend([0, 24, 3, 0, 0, 1, 0]);
    let len = u32::try_from(table_bytes).expect("the table is short");
    entry.extend(len.to_le_bytes());
    entry.extend(TABLE_GPA.to_le_bytes());
    let sum = entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    entry[5] = sum.wrapping_neg();
    entry
}

/// Writes the tables into guest memory.
pub(super) fn write(memory: &GuestMemory, uuid: Uuid) {
    let table = table(uuid);
    for (gpa, bytes) in [
        (ENTRY_POINT_GPA, entry_point(table.len())),
        (TABLE_GPA, table),
    ] {
        memory
            .write_slice(&bytes, GuestAddress(gpa))
            .expect("the first MiB is there");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_entry_point_is_whole() {
        let entry = entry_point(100);
        assert_eq!(entry.len(), 24);
        assert_eq!(usize::from(entry[6]), entry.len());
        assert_eq!(
            entry.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)),
            0
        );
    }

    #[test]
    fn structures_follow_one_another_to_the_end() {
        let uuid = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        let table = table(uuid);
        let mut kinds = Vec::new();
        let mut at = 0;
        while at < table.len() {
            kinds.push(table[at]);
            if table[at] == 1 {
                assert_eq!(table[at + 8..at + 24], uuid.to_bytes_le());
            }
            let strings = at + usize::from(table[at + 1]);
            let end = table[strings..].windows(2).position(|pair| pair == [0, 0]);
            at = strings + end.unwrap() + 2;
        }
        assert_eq!(kinds, [0, 1, 127]);
        assert_eq!(at, table.len());
    }
}
