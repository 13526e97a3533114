//! ACPI tables: what a distribution's kernel is told of the machine.
//!
//! They are written where a BIOS has them, below 1 MiB, once when the machine is new and again when
//! it starts over. A restored machine has them in its memory. Their content follows from the
//! machine's parts alone, so that the same machine has the same tables.

mod dsdt;
mod fixed;

use vm_memory::{Bytes, GuestAddress};

use super::memory::GuestMemory;

/// The root pointer, where kernels that are not told its address look for it.
pub const RSDP_GPA: u64 = 0xe_0000;
/// Firmware's control structure; kernels want it aligned to 64 bytes.
const FACS_GPA: u64 = 0xe_0040;
/// All other tables, one after the other.
const TABLES_GPA: u64 = 0xe_0080;
/// Where the tables end; behind are the generation id and the SMBIOS tables.
const TABLES_END: u64 = 0xe_f000;

/// 16 bytes that change when the machine's past becomes that of another one as well.
pub const GENERATION_ID_GPA: u64 = 0xe_f000;

/// The general-purpose event that tells of a new generation id.
pub const GENERATION_EVENT: u8 = 0;

const OEM_ID: [u8; 6] = *b"LIVEPT";
const OEM_TABLE_ID: [u8; 8] = *b"LIVEPT01";
const OEM_REVISION: u32 = 1;

/// The machine's parts that the tables tell of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parts {
    /// APIC ids of the vCPUs, in their order.
    pub apic_ids: Vec<u32>,
    /// Numbers of the serial ports, from 0.
    pub serial_ports: Vec<u32>,
}

/// Returns the tables of such a machine, each with its address.
fn tables(parts: &Parts) -> Vec<(u64, Vec<u8>)> {
    let mut next = TABLES_GPA;
    let mut written = Vec::new();
    let mut place = |bytes: Vec<u8>| {
        let at = next;
        next = (at + bytes.len() as u64).next_multiple_of(16);
        assert!(next <= TABLES_END, "the ACPI tables of 254 vCPUs fit");
        written.push((at, bytes));
        at
    };
    let dsdt = place(dsdt::table(&parts.serial_ports));
    let fadt = place(fixed::fadt(dsdt, FACS_GPA));
    let madt = place(fixed::madt(&parts.apic_ids));
    let xsdt = place(fixed::xsdt(&[fadt, madt]));
    written.push((FACS_GPA, fixed::facs()));
    written.push((RSDP_GPA, fixed::rsdp(xsdt)));
    written
}

/// Writes the tables into guest memory.
pub fn write(memory: &GuestMemory, parts: &Parts) {
    for (gpa, bytes) in tables(parts) {
        memory
            .write_slice(&bytes, GuestAddress(gpa))
            .expect("the first MiB is there");
    }
}

/// Writes the generation id into guest memory.
pub fn write_generation_id(memory: &GuestMemory, id: uuid::Uuid) {
    memory
        .write_slice(&id.to_bytes_le(), GuestAddress(GENERATION_ID_GPA))
        .expect("the first MiB is there");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parts(vcpus: u32) -> Parts {
        Parts {
            apic_ids: (0..vcpus).collect(),
            serial_ports: vec![0, 1],
        }
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table(tables: &[(u64, Vec<u8>)], gpa: u64) -> Vec<u8> {
        let (_, bytes) = tables.iter().find(|(at, _)| *at == gpa).unwrap();
        bytes.clone()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn every_table_is_reached_from_the_root_and_has_its_checksum() {
        let all = tables(&parts(4));
        let rsdp = table(&all, RSDP_GPA);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
        let xsdt = table(&all, u64_at(&rsdp, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let fadt = table(&all, u64_at(&xsdt, 36));
        let madt = table(&all, u64_at(&xsdt, 44));
        let dsdt = table(&all, u64::from(u32_at(&fadt, 40)));
        let facs = table(&all, u64::from(u32_at(&fadt, 36)));
        for (name, bytes) in [
            (b"XSDT", &xsdt),
            (b"FACP", &fadt),
            (b"APIC", &madt),
            (b"DSDT", &dsdt),
        ] {
            assert_eq!(&bytes[..4], name);
            assert_eq!(u32_at(bytes, 4) as usize, bytes.len());
            assert_eq!(sum(bytes), 0, "{}", String::from_utf8_lossy(name));
        }
        assert_eq!(&facs[..4], b"FACS");
    }

    #[test]
    fn no_two_tables_overlap_even_with_the_most_vcpus() {
        let mut all = tables(&parts(254));
        all.sort_by_key(|(gpa, _)| *gpa);
        for pair in all.windows(2) {
            assert!(pair[0].0 + pair[0].1.len() as u64 <= pair[1].0);
        }
    }

    #[test]
    fn every_vcpu_has_a_local_apic() {
        let all = tables(&Parts {
            apic_ids: vec![0, 1, 2, 4, 5, 6],
            serial_ports: Vec::new(),
        });
        let (_, madt) = all
            .iter()
            .find(|(_, bytes)| bytes.starts_with(b"APIC"))
            .unwrap();
        let mut ids = Vec::new();
        let mut at = 44;
        while at < madt.len() {
            if madt[at] == 0 {
                ids.push(madt[at + 3]);
            }
            at += usize::from(madt[at + 1]);
        }
        assert_eq!(at, madt.len());
        assert_eq!(ids, [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn the_same_machine_has_the_same_tables() {
        assert_eq!(tables(&parts(2)), tables(&parts(2)));
        assert_ne!(tables(&parts(2)), tables(&parts(3)));
    }
}
