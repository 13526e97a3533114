//! Kernels, good and hostile.

use std::path::PathBuf;

use livepoint::machine::Machine;
use livepoint::machine::boot::{self, BootError};
use livepoint::machine::memory::GuestRam;
use livepoint::machine::spec::{
    BackingSpec, BootSpec, CpuidRegister, FeaturePolicy, FeatureRule, MemorySpec, Source,
};
use vm_memory::{Bytes, GuestAddress};

use crate::common::have_kvm;
use crate::guest_code::{LOAD_GPA, PATIENCE, assemble, elf, spec};

const RAM_BYTES: u64 = 16 << 20;

fn ram() -> GuestRam {
    GuestRam::new(&MemorySpec {
        bytes: RAM_BYTES,
        backing: BackingSpec::Anonymous,
        preallocate: false,
        locked: false,
        shared: None,
    })
    .unwrap()
}

fn bytes(name: &str, bytes: &[u8]) -> Source {
    Source::Bytes {
        name: name.to_owned(),
        bytes: bytes.into(),
    }
}

fn boot_spec(kernel: &[u8]) -> BootSpec {
    BootSpec {
        kernel: bytes("kernel.bin", kernel),
        initrd: None,
        cmdline: "a=b".to_owned(),
    }
}

fn load(ram: &GuestRam, spec: &BootSpec) -> Result<boot::Entry, BootError> {
    boot::load(ram.memory(), RAM_BYTES, spec)
}

/// A bzImage header with nothing behind it that runs.
fn bzimage() -> Vec<u8> {
    let mut file = vec![0_u8; 0x4000];
    file[0x1f1] = 4; // setup sectors
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x020f_u16.to_le_bytes());
    file[0x211] = 1; // loaded high
    file[0x214..0x218].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffff_u32.to_le_bytes());
    file[0x236..0x238].copy_from_slice(&1_u16.to_le_bytes()); // 64-bit entry
    file[0x238..0x23c].copy_from_slice(&2048_u32.to_le_bytes());
    file[0x258..0x260].copy_from_slice(&0x20_0000_u64.to_le_bytes());
    file[0x260..0x264].copy_from_slice(&0x10_0000_u32.to_le_bytes());
    file
}

#[test]
fn an_elf_file_starts_at_its_entry_and_a_bzimage_behind_its_start() {
    let entry = load(&ram(), &boot_spec(&elf(&[0xf4], 0x1000))).unwrap();
    assert_eq!(entry.rip, LOAD_GPA);
    let entry = load(&ram(), &boot_spec(&bzimage())).unwrap();
    assert_eq!(entry.rip, 0x10_0200);
}

#[test]
fn the_initial_ram_disk_is_high_whole_and_told() {
    let ram = ram();
    let mut spec = boot_spec(&bzimage());
    let disk: Vec<u8> = (0..5000_u32).map(|n| n.to_le_bytes()[0]).collect();
    spec.initrd = Some(bytes("initrd", &disk));
    load(&ram, &spec).unwrap();
    let at: u32 = ram.memory().read_obj(GuestAddress(0x7000 + 0x218)).unwrap();
    let len: u32 = ram.memory().read_obj(GuestAddress(0x7000 + 0x21c)).unwrap();
    assert_eq!((at, len), (0xff_e000, 5000));
    let mut read = vec![0; 5000];
    ram.memory()
        .read_slice(&mut read, GuestAddress(at.into()))
        .unwrap();
    assert_eq!(read, disk);
    spec.initrd = Some(bytes("initrd", &vec![0; 15 << 20]));
    let error = load(&ram, &spec).unwrap_err();
    assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
}

#[test]
fn wrong_kernels_are_named_and_say_what_is_wrong() {
    let good = elf(&[0xf4], 0x1000);
    let patched = |at: usize, with: &[u8]| {
        let mut file = good.clone();
        file[at..at + with.len()].copy_from_slice(with);
        file
    };
    let max = u64::MAX.to_le_bytes();
    let cases = [
        ("text", b"#!/bin/sh\n".to_vec(), "neither"),
        ("empty", Vec::new(), "neither"),
        ("cut", good[..40].to_vec(), "cut off"),
        ("32-bit", patched(4, &[1]), "64-bit"),
        ("ARM", patched(18, &[183]), "machine 183"),
        ("headers outside", patched(32, &max), "overflows"),
        (
            "segment outside the file",
            patched(64 + 8, &[0xff; 4]),
            "outside the file",
        ),
        ("segment low", patched(64 + 24, &[0; 8]), "lowest"),
        ("segment wraps", patched(64 + 24, &max), "overflows"),
        (
            "segment cut",
            patched(64 + 40, &[0; 8]),
            "longer in the file",
        ),
        ("entry outside", patched(24, &[0; 8]), "entry point"),
    ];
    for (what, file, why) in cases {
        let error = load(&ram(), &boot_spec(&file)).unwrap_err().to_string();
        assert!(error.contains("kernel.bin"), "{what}: {error}");
        assert!(error.contains(why), "{what}: {error}");
    }
    let huge = patched(64 + 40, &(1_u64 << 40).to_le_bytes());
    let error = load(&ram(), &boot_spec(&huge)).unwrap_err();
    assert!(matches!(error, BootError::NoRoom { .. }), "{error}");
    for path in ["/nonexistent/vmlinux", "/"] {
        let spec = BootSpec {
            kernel: Source::Path(PathBuf::from(path)),
            ..boot_spec(&[])
        };
        let error = load(&ram(), &spec).unwrap_err();
        assert!(matches!(&error, BootError::Read { .. }), "{error}");
        assert!(error.to_string().contains(path), "{error}");
    }
}

#[test]
fn a_command_line_that_does_not_fit_is_refused() {
    for (cmdline, kernel) in [
        ("x".repeat(2049), bzimage()),
        ("x".repeat(0x10000), elf(&[0xf4], 0x1000)),
        ("a\0b".to_owned(), bzimage()),
    ] {
        let spec = BootSpec {
            cmdline,
            ..boot_spec(&kernel)
        };
        assert!(matches!(
            load(&ram(), &spec),
            Err(BootError::Cmdline { .. })
        ));
    }
}

#[test]
fn mutated_kernels_never_panic() {
    let mut seed = 7_u64;
    let mut random = move |below: usize| {
        seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        usize::try_from(seed >> 33).unwrap() % below
    };
    let interesting = [0_u8, 1, 0x7f, 0x80, 0xff];
    let ram = ram();
    let mut note = elf(&[0xf4; 64], 0x1000);
    note[56] = 1;
    note[64] = 4; // a note instead of code
    for good in [elf(&[0xf4; 64], 0x1000), bzimage(), note] {
        let header = good.len().min(0x280);
        for _ in 0..3000 {
            let mut file = good.clone();
            for _ in 0..1 + random(6) {
                file[random(header)] = match random(2) {
                    0 => interesting[random(interesting.len())],
                    _ => random(256).to_le_bytes()[0],
                };
            }
            file.truncate(match random(4) {
                0 => random(good.len()),
                _ => good.len(),
            });
            // Refused or loaded; whoever loads a broken kernel gets a guest that crashes.
            if let Err(error) = load(&ram, &boot_spec(&file)) {
                assert!(!error.to_string().is_empty());
            }
        }
    }
}

#[test]
fn a_guest_finds_its_command_line_and_memory_map() {
    if !have_kvm() {
        return;
    }
    // Prints the command line that boot_params points to.
    let code = assemble(
        "mov 0x228(%rsi), %ebx
         mov $0x3f8, %dx
     1:  mov (%rbx), %al
         inc %rbx
         out %al, %dx
         test %al, %al
         jnz 1b
         mov $0x604, %dx; mov $0x2000, %ax; out %ax, %dx
     2:  jmp 2b",
    );
    let (mut spec, mut console) = spec(code);
    spec.boot.as_mut().unwrap().cmdline = "console=ttyS0 answer=42".to_owned();
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    assert_eq!(console.wait_for("\0"), "console=ttyS0 answer=42\0");
    machine.wait(Some(PATIENCE));
}

#[test]
fn a_required_feature_that_is_missing_is_named() {
    if !have_kvm() {
        return;
    }
    let (mut spec, _console) = spec(assemble("hlt"));
    spec.cpu.features.push(FeatureRule {
        name: "vmx".to_owned(),
        leaf: 1,
        subleaf: 0,
        register: CpuidRegister::Ecx,
        bit: 5,
        policy: FeaturePolicy::Require,
    });
    let error = Machine::build(spec).unwrap_err().to_string();
    assert!(error.contains("vmx"), "{error}");
}
