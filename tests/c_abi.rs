//! C programs against the built library and the committed header.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::c::{
    SANITIZERS, compile, golden, guest_file, library, memcheck, root, run, run_for, sanitized,
};
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
fn story(command: impl FnOnce(&Path) -> Command, repeat: u32) {
    let dir = tempfile::tempdir().unwrap();
    let source = "ffi-tests/story.c";
    let program = compile(dir.path(), source, &["-D_POSIX_C_SOURCE=200809L"]);
    let xml = domain(dir.path(), repeat);
    let output = run(command(&program)
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
        story(|program| Command::new(program), LONG_ENOUGH);
    }
}

#[test]
fn valgrind_finds_no_error_and_no_leak_in_the_story() {
    if !have_kvm() {
        return;
    }
    story(memcheck, LONG_ENOUGH);
}

/// Runs the machine whose console and events a C program has.
fn machine(flags: &[&str], command: impl FnOnce(&Path) -> Command) {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "ffi-tests/machine.c", flags);
    let mut command = command(&program);
    command.arg(guest_file(dir.path(), "echo")).arg(dir.path());
    let output = run_for(300, &command);
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    assert!(said.ends_with("machine: done\n"), "{said}");
}

#[test]
fn a_machine_has_its_console_and_its_events_by_descriptor_and_by_callback() {
    if have_kvm() {
        machine(&[], |program| Command::new(program));
        machine(&SANITIZERS, sanitized);
    }
}

#[test]
fn valgrind_finds_no_error_and_no_leak_in_a_machine_with_watchers() {
    if have_kvm() {
        machine(&[], memcheck);
    }
}

#[test]
fn a_chain_is_grown_gone_back_on_and_shared_from_c() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("images")).unwrap();
    let program = compile(dir.path(), "ffi-tests/chain.c", &[]);
    let mut command = Command::new(&program);
    let output = run(command.arg(guest_file(dir.path(), "npb")).arg(dir.path()));
    assert!(String::from_utf8_lossy(&output.stdout).ends_with("chain: done\n"));
    let console = std::fs::read_to_string(dir.path().join("console")).unwrap();
    // The original, the one restored lazily, and two that share memory.
    let done = console.matches("npb: done runs=48 failed=0").count();
    assert_eq!(done, 4, "{console}");
}

#[test]
fn every_function_refuses_what_it_must_and_says_why() {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "ffi-tests/every.c", &[]);
    run(Command::new(&program).arg(golden()).arg(dir.path()));
    // The same under valgrind.
    run(memcheck(&program).arg(golden()).arg(dir.path()));
    // And the C side with gcc's sanitizers.
    let checked = compile(dir.path(), "ffi-tests/every.c", &SANITIZERS);
    run(sanitized(&checked).arg(golden()).arg(dir.path()));
}

/// The C programs, as text.
fn sources() -> String {
    let sources = [
        "ffi-tests/every.c",
        "ffi-tests/foreign.c",
        "ffi-tests/machine.c",
        "ffi-tests/story.c",
        "examples/c/own_vmm.c",
    ];
    let read = |source: &&str| fs::read_to_string(root().join(source)).unwrap();
    sources.iter().map(read).collect()
}

#[test]
fn every_struct_that_may_grow_is_tried_as_other_headers_have_it() {
    let header = fs::read_to_string(root().join("include/livepoint.h")).unwrap();
    let text = sources();
    let structs = header.split("typedef struct {").skip(1);
    let mut count = 0;
    for body in structs.filter(|body| body.contains("size_t struct_size;")) {
        let name = body
            .split("\n} ")
            .nth(1)
            .unwrap()
            .split(';')
            .next()
            .unwrap();
        let tried = ["OPTIONS_GROW", "RESULT_GROWS"]
            .iter()
            .any(|how| text.contains(&format!("{how}({name}, ")));
        assert!(tried, "{name}");
        count += 1;
    }
    assert!(count >= 12, "only {count} are found");
}

#[test]
fn every_exported_function_is_called_by_a_c_program() {
    let text = sources();
    let exports = fs::read_to_string(root().join("ffi-tests/exports.txt")).unwrap();
    let names = exports.lines().map(|line| line.split('@').next().unwrap());
    let uncalled: Vec<_> = names
        .filter(|name| !text.contains(&format!("{name}(")))
        .collect();
    assert!(uncalled.is_empty(), "never called: {uncalled:?}");
}

#[test]
fn a_program_compiled_against_an_older_header_runs() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    // Its option structs are shorter. Found before the header of now.
    let old = root().join("ffi-tests/old");
    let flags = ["-D_POSIX_C_SOURCE=200809L", "-I", old.to_str().unwrap()];
    let program = compile(dir.path(), "ffi-tests/story.c", &flags);
    let xml = domain(dir.path(), LONG_ENOUGH);
    run(Command::new(program)
        .arg(xml)
        .arg(dir.path())
        .arg(dir.path().join("run")));
}

#[test]
fn python_reads_an_image() {
    let script = root().join("examples/python/read_image.py");
    let python = |arguments: &[&str]| {
        let output = run(Command::new("python3")
            .env("LIBLIVEPOINT", library())
            .arg(&script)
            .arg(golden())
            .args(arguments));
        String::from_utf8(output.stdout).unwrap()
    };
    let said = python(&[]);
    assert!(said.contains("memory  slot 0"), "{said}");
    assert!(said.contains("state   "), "{said}");
    let gpa = said
        .split(" bytes at ")
        .nth(1)
        .and_then(|rest| rest.lines().next());
    let bytes = python(&[gpa.unwrap(), "16"]);
    assert_eq!(bytes.split_whitespace().count(), 16, "{bytes}");
}

#[test]
fn python_finds_how_far_a_saved_computation_was() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "examples/c/own_vmm.c", &[]);
    let image = dir.path().join("npb.lpi");
    run(Command::new(program)
        .arg(guest_file(dir.path(), "npb"))
        .arg(format!("kernel=mg class=S repeat={LONG_ENOUGH}"))
        .args([image.as_path(), Path::new("stop")]));
    let output = run(Command::new("python3")
        .env("LIBLIVEPOINT", library())
        .arg(root().join("examples/python/read_image.py"))
        .arg(image));
    let said = String::from_utf8(output.stdout).unwrap();
    let progress = said.lines().find(|line| line.starts_with("NPB "));
    assert!(
        progress.is_some_and(|line| line.ends_with(" of 4")),
        "MG of class S has four iterations: {said}"
    );
}

#[test]
fn the_cpp_example_compiles_and_says_what_is_wrong() {
    let dir = tempfile::tempdir().unwrap();
    // For the library beside it.
    compile(dir.path(), "ffi-tests/every.c", &[]);
    let program = dir.path().join("monitor");
    run(Command::new("g++")
        .args(["-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Werror"])
        .arg("-I")
        .arg(root().join("include"))
        .arg(root().join("examples/cpp/monitor.cpp"))
        .arg("-L")
        .arg(dir.path())
        .args(["-llivepoint", "-Wl,-rpath,$ORIGIN", "-o"])
        .arg(&program));
    let xml = dir.path().join("wrong.xml");
    fs::write(&xml, "<domain type='kvm'><nonsense/></domain>").unwrap();
    let refused = Command::new(program).arg(&xml).arg("x").output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1));
    assert!(
        said.contains("nonsense") && said.contains("status -1"),
        "{said}"
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
        ("gcc", "-std=c17"),
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
