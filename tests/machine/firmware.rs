//! What a machine's firmware would leave, as a guest finds it.

use livepoint::guest::Guest;
use livepoint::machine::acpi::{GENERATION_ID_GPA, RSDP_GPA};
use livepoint::machine::boot::{self, Protocol};
use livepoint::machine::memory::GuestRam;
use livepoint::machine::spec::{BackingSpec, BootSpec, MemorySpec, Source};
use livepoint::machine::{Machine, MachineState};
use livepoint::state::StateSet;

use crate::common::have_kvm;
use crate::guest_code::{LOAD_GPA, PATIENCE, assemble, elf, spec};

/// Adds Xen's note with an entry point to a kernel of one segment.
fn with_pvh_note(code: &[u8], entry: u32) -> Vec<u8> {
    let mut file = elf(code, 0x10_0000);
    let header_bytes = 56;
    // One header more, so that all behind moves.
    file[56] = 2;
    let moved = |at: u64| at + header_bytes;
    file[72..80].copy_from_slice(&moved(120).to_le_bytes());
    let note_at = moved(120) + code.len() as u64;
    let mut note: Vec<u8> = [4_u32, 4, 18].map(u32::to_le_bytes).concat();
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    let bytes = note.len() as u64;
    let mut header: Vec<u8> = [4_u32, 4].map(u32::to_le_bytes).concat();
    header.extend(
        [note_at, 0, 0, bytes, bytes, 4]
            .map(u64::to_le_bytes)
            .concat(),
    );
    file.splice(120..120, header);
    file.extend(note);
    file
}

fn flat(source: &str) -> Vec<u8> {
    assemble(source)[120..].to_vec()
}

#[test]
fn a_kernel_with_a_pvh_note_starts_in_protected_mode_with_a_start_info() {
    if !have_kvm() {
        return;
    }
    // Says Y where EBX leads to the start info, that to the RSDP, and that to its signature.
    let code = flat(
        ".code32
         movl $'N', %eax
         cmpl $0x336ec578, (%ebx)
         jne 1f
         movl 32(%ebx), %ecx
         cmpl $0x20445352, (%ecx)
         jne 1f
         movl $'Y', %eax
      1: movl $0x3f8, %edx
         outb %al, %dx
         movl $0x604, %edx
         movl $0x2000, %eax
         outw %ax, %dx
      2: jmp 2b",
    );
    let kernel = with_pvh_note(&code, u32::try_from(LOAD_GPA).unwrap());
    let (spec, mut console) = spec(kernel);
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    assert_eq!(console.wait_for("Y"), "Y");
    assert!(machine.wait(Some(PATIENCE)).has_ended());
}

#[test]
fn a_pvh_entry_outside_of_the_kernel_is_refused() {
    let ram = GuestRam::new(&MemorySpec {
        bytes: 16 << 20,
        backing: BackingSpec::Anonymous,
        preallocate: false,
        locked: false,
        shared: None,
    })
    .unwrap();
    let load = |entry| {
        let kernel = Source::Bytes {
            name: "kernel.bin".to_owned(),
            bytes: with_pvh_note(&[0xf4], entry).into(),
        };
        let spec = BootSpec {
            kernel,
            initrd: None,
            cmdline: String::new(),
        };
        boot::load(ram.memory(), 16 << 20, &spec)
    };
    let inside = u32::try_from(LOAD_GPA).unwrap();
    assert_eq!(load(inside).unwrap().protocol, Protocol::Pvh);
    for outside in [0, 0xffff_fff0] {
        let error = load(outside).unwrap_err().to_string();
        assert!(error.contains("PVH entry point"), "{error}");
    }
}

/// Answers each character with the next one.
const NEXT: &str = "
    1:  movl $0x3fd, %edx
        inb %dx, %al
        testb $1, %al
        jz 1b
        movl $0x3f8, %edx
        inb %dx, %al
        incb %al
        outb %al, %dx
        jmp 1b";

fn bytes_at(machine: &Machine, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let at = usize::try_from(gpa).unwrap();
    machine.regions()[0].mapping.copy_out(at, &mut bytes);
    bytes
}

#[test]
fn a_restored_machine_has_its_tables_another_generation_id_and_the_input_that_came_early() {
    if !have_kvm() {
        return;
    }
    let (first_spec, mut console) = spec(assemble(NEXT));
    let machine = Machine::build(first_spec).unwrap();
    let first_id = bytes_at(&machine, GENERATION_ID_GPA, 16);
    machine.start(false).unwrap();
    console.send("A");
    console.wait_for("B");
    machine.reset().unwrap();
    assert_eq!(bytes_at(&machine, GENERATION_ID_GPA, 16), first_id);
    console.send("C");
    console.wait_for("D");
    machine.pause().unwrap();
    let memory = bytes_at(&machine, 0, 16 << 20);
    let state = StateSet::new(machine.save_state().unwrap()).unwrap();
    machine.resume();
    machine.destroy();

    let (spec, mut console) = spec(assemble(NEXT));
    console.send("E");
    let unfilled = Machine::build_for_restore(spec).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    unfilled.regions()[0].mapping.copy_in(0, &memory);
    let restored = unfilled.finish(state).unwrap();
    assert_eq!(restored.state(), MachineState::Created);
    assert_eq!(bytes_at(&restored, RSDP_GPA, 8), b"RSD PTR ");
    assert_ne!(bytes_at(&restored, GENERATION_ID_GPA, 16), first_id);
    restored.start(false).unwrap();
    console.wait_for("F");
}
