//! C programs against the built library and the committed header.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::c::{compile, guest_file, library, root, run};
use common::have_kvm;

/// Writes the domain that the story runs: a computation that checks itself, on a console file.
fn domain(dir: &Path, repeat: u32) -> PathBuf {
    let kernel = guest_file(dir, "npb");
    let xml = dir.join("domain.xml");
    let text = format!(
        "<domain type='kvm'>\
           <name>story</name>\
           <memory unit='MiB'>128</memory>\
           <os><type arch='x86_64'>hvm</type><kernel>{}</kernel>\
             <cmdline>kernel=mg class=S repeat={repeat}</cmdline></os>\
           <devices><serial type='file'><source path='{}' append='on'/></serial>\
             <memballoon model='none'/></devices>\
         </domain>",
        kernel.display(),
        dir.join("console").display()
    );
    fs::write(&xml, text).unwrap();
    xml
}

/// Runs of the guest's computation that outlast the story's checkpoints: some 10 ms each, and a
/// checkpoint by a library that is not optimised takes seconds.
const LONG_ENOUGH: u32 = if cfg!(debug_assertions) { 2000 } else { 600 };

/// Runs the story and checks that each of its two restored guests verified its result.
fn story(wrapper: &[&str], repeat: u32) {
    let dir = tempfile::tempdir().unwrap();
    let source = "ffi-tests/story.c";
    let program = compile(dir.path(), source, &["-D_POSIX_C_SOURCE=200809L"]);
    let xml = domain(dir.path(), repeat);
    let mut command = match wrapper.split_first() {
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(&program);
            command
        }
        None => Command::new(&program),
    };
    let output = run(command
        .arg(&xml)
        .arg(dir.path())
        .arg(dir.path().join("run")));
    print!("{}", String::from_utf8_lossy(&output.stdout));
    let console = fs::read_to_string(dir.path().join("console")).unwrap();
    let ends = console
        .lines()
        .filter(|line| line.starts_with("npb: done"))
        .count();
    assert_eq!(ends, 2, "both restored guests finish:\n{console}");
    assert!(console.contains("Verification = SUCCESSFUL"));
    assert!(!console.contains("UNSUCCESSFUL"), "{console}");
}

#[test]
fn the_story_from_c_holds_with_both_protocols() {
    if have_kvm() {
        story(&[], LONG_ENOUGH);
    }
}

#[test]
fn valgrind_finds_no_error_and_no_leak_in_the_story() {
    if !have_kvm() {
        return;
    }
    let known = format!(
        "--suppressions={}",
        root().join("ffi-tests/valgrind.supp").display()
    );
    story(
        &[
            "valgrind",
            "--quiet",
            &known,
            "--leak-check=full",
            "--show-leak-kinds=definite,indirect,possible",
            "--errors-for-leak-kinds=definite,indirect,possible",
            "--error-exitcode=99",
        ],
        LONG_ENOUGH,
    );
}

#[test]
fn the_header_compiles_as_c_and_as_cpp_by_itself() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("only.c");
    fs::write(
        &source,
        "#include <livepoint.h>\nint main(void) { return (int)LVP_OK; }\n",
    )
    .unwrap();
    for (compiler, standard) in [
        ("gcc", "-std=c99"),
        ("gcc", "-std=c11"),
        ("gcc", "-std=c2x"),
        ("g++", "-std=c++17"),
    ] {
        let language = if compiler == "gcc" { "c" } else { "c++" };
        run(Command::new(compiler)
            .args([
                standard,
                "-Wall",
                "-Wextra",
                "-Wpedantic",
                "-Werror",
                "-fsyntax-only",
            ])
            .args(["-x", language, "-I"])
            .arg(root().join("include"))
            .arg(&source));
    }
}

#[test]
fn the_committed_header_is_the_generated_one() {
    let committed = fs::read_to_string(root().join("include/livepoint.h")).unwrap();
    let generated = include_str!(concat!(env!("OUT_DIR"), "/livepoint.h"));
    assert!(
        committed == generated,
        "include/livepoint.h is out of date: run `make header`"
    );
}

#[test]
fn the_library_has_its_name_and_exports_only_its_own_functions() {
    let library = library();
    let dynamic = run(Command::new("readelf").arg("-dW").arg(&library));
    let dynamic = String::from_utf8(dynamic.stdout).unwrap();
    assert!(
        dynamic.contains("Library soname: [liblivepoint.so.0]"),
        "{dynamic}"
    );
    assert!(dynamic.contains("NODELETE"), "{dynamic}");
    let symbols = run(Command::new("nm")
        .args(["-D", "--defined-only"])
        .arg(&library));
    let symbols = String::from_utf8(symbols.stdout).unwrap();
    let mut exported: Vec<_> = symbols
        .lines()
        .filter_map(|line| line.split_whitespace().last())
        .collect();
    exported.sort_unstable();
    let wanted = fs::read_to_string(root().join("ffi-tests/exports.txt")).unwrap();
    assert_eq!(exported, wanted.lines().collect::<Vec<_>>());
}
