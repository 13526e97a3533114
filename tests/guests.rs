//! The built-in guests as files, and their computations as host processes.
#![cfg(feature = "cli")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use livepoint::guests::{self, BuiltinGuest};

const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
const XEN_ELFNOTE_PHYS32_ENTRY: u64 = 18;

/// Reads a little-endian number of `bytes` bytes.
fn number(image: &[u8], offset: usize, bytes: usize) -> u64 {
    let digits = image[offset..offset + bytes].iter().rev();
    digits.fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn index(value: u64) -> usize {
    usize::try_from(value).expect("an offset in a small file")
}

struct Segment {
    kind: u64,
    offset: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
}

impl Segment {
    fn holds(&self, address: u64) -> bool {
        let end = self.address + self.memory_bytes;
        self.kind == PT_LOAD && (self.address..end).contains(&address)
    }
}

fn segments(elf: &[u8]) -> Vec<Segment> {
    let table = index(number(elf, 32, 8));
    let count = index(number(elf, 56, 2));
    (0..count)
        .map(|i| table + i * 56)
        .map(|at| Segment {
            kind: number(elf, at, 4),
            offset: number(elf, at + 8, 8),
            address: number(elf, at + 24, 8),
            file_bytes: number(elf, at + 32, 8),
            memory_bytes: number(elf, at + 40, 8),
        })
        .collect()
}

/// Returns the address in the image's PVH note.
fn pvh_entry(elf: &[u8]) -> Option<u64> {
    let segments = segments(elf);
    for notes in segments.iter().filter(|segment| segment.kind == PT_NOTE) {
        let mut at = index(notes.offset);
        let end = index(notes.offset + notes.file_bytes);
        while at + 12 <= end {
            let name_bytes = index(number(elf, at, 4).next_multiple_of(4));
            let value_bytes = index(number(elf, at + 4, 4).next_multiple_of(4));
            let is_entry = number(elf, at + 8, 4) == XEN_ELFNOTE_PHYS32_ENTRY;
            let value = at + 12 + name_bytes;
            if is_entry && elf[at + 12..value] == *b"Xen\0" {
                return Some(number(elf, value, 4));
            }
            at = value + value_bytes;
        }
    }
    None
}

fn check_both_entries_are_loaded(guest: &BuiltinGuest) {
    let segments = segments(guest.elf);
    let entry = number(guest.elf, 24, 8);
    let pvh_entry = pvh_entry(guest.elf).expect("a PVH note");

    for address in [entry, pvh_entry] {
        let loaded = segments.iter().any(|segment| segment.holds(address));
        assert!(loaded, "{}: {address:#x}", guest.name);
    }
    for segment in segments.iter().filter(|segment| segment.kind == PT_LOAD) {
        assert!(segment.address >= 2 << 20, "{}: below 2 MiB", guest.name);
    }
}

#[test]
fn both_entries_of_every_guest_are_loaded() {
    for guest in guests::ALL {
        check_both_entries_are_loaded(guest);
    }
}

fn temporary_file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// Builds the benchmarks as a host program, with the generator of random numbers
/// that `random` has. A file of its own for each test, since tests run at the
/// same time.
fn build_native_npb_with(random: &Path, name: &str) -> PathBuf {
    let program = temporary_file(name);
    let sources = [
        "native/native.c",
        "common/args.c",
        "common/features.c",
        "common/format.c",
        "npb/npb.c",
        "npb/cg.c",
        "npb/ep.c",
        "npb/ft.c",
        "npb/is.c",
        "npb/mg.c",
    ];
    let status = Command::new("gcc")
        .args(["-std=gnu11", "-O3", "-Wall", "-Wextra", "-Werror"])
        .args(["-I", "guests/common", "-I", "guests/npb", "-o"])
        .arg(&program)
        .args(sources.map(|source| format!("guests/{source}")))
        .arg(random)
        .status()
        .expect("gcc is installed");
    assert!(status.success());
    program
}

fn build_native_npb(name: &str) -> PathBuf {
    build_native_npb_with(Path::new("guests/npb/random.c"), name)
}

/// Runs a program; returns whether it succeeded, and what it printed.
fn run(program: &Path, args: &[&str]) -> (bool, String) {
    let output = Command::new(program)
        .args(args)
        .output()
        .expect("just built");
    let text = String::from_utf8(output.stdout).expect("guests print ASCII");
    (output.status.success(), text)
}

fn check_native_npb(kernel: &str, simd: &str) {
    let program = build_native_npb(&format!("npb-{kernel}-{simd}"));
    let kernel = format!("kernel={kernel}");
    let simd = format!("simd={simd}");
    for class in ["class=S", "class=W"] {
        let (success, text) = run(&program, &[&kernel, class, &simd, "repeat=2"]);

        assert!(success, "{text}");
        let verified = text.matches("Verification = SUCCESSFUL").count();
        assert_eq!(verified, 2, "{text}");
        assert!(text.contains("\nnpb: done runs=2 failed=0 "), "{text}");
    }
}

#[test]
fn cg_verifies_as_a_host_process() {
    check_native_npb("cg", "auto");
}

#[test]
fn ep_verifies_as_a_host_process() {
    check_native_npb("ep", "auto");
}

#[test]
fn ft_verifies_as_a_host_process() {
    check_native_npb("ft", "auto");
}

#[test]
fn ft_verifies_without_avx2_too() {
    check_native_npb("ft", "sse2");
}

#[test]
fn is_verifies_as_a_host_process() {
    check_native_npb("is", "auto");
}

#[test]
fn mg_verifies_as_a_host_process() {
    check_native_npb("mg", "auto");
}

#[test]
fn mg_verifies_without_avx2_too() {
    check_native_npb("mg", "sse2");
}

/// Other random numbers make another problem, whose result must not pass for
/// that of the right one.
#[test]
fn no_kernel_verifies_a_wrong_result() {
    let random = temporary_file("wrong-random.c");
    let generator = r#"
        #include "npb.h"

        double randlc(uint64_t *x, uint64_t a)
        {
            *x = *x * (a + 8) & NPB_MODULUS_MASK;
            return (double)*x * 0x1p-46;
        }
    "#;
    fs::write(&random, generator).expect("a directory for it");
    let program = build_native_npb_with(&random, "npb-wrong");

    for kernel in ["cg", "ep", "ft", "is", "mg"] {
        let (success, text) = run(&program, &[&format!("kernel={kernel}"), "class=S"]);

        assert!(success, "{text}");
        assert!(text.contains("Verification = UNSUCCESSFUL"), "{text}");
        assert!(text.contains("\nnpb: done runs=1 failed=1 "), "{text}");
    }
}

#[test]
fn a_kernel_that_does_not_exist_is_named() {
    let (success, text) = run(&build_native_npb("npb-none"), &["kernel=xyz"]);

    assert!(!success);
    assert_eq!(text, "npb: error: no kernel xyz\n");
}
