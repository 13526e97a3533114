//! C programs against the built library and the committed header.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::have_kvm;
use livepoint::guests;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the shared library that belongs to this build.
fn library() -> PathBuf {
    // This test is target/PROFILE/deps/c_abi-HASH; the library is one or two levels up.
    let test = std::env::current_exe().unwrap();
    let deps = test.parent().unwrap();
    let found = [deps.parent().unwrap(), deps]
        .into_iter()
        .map(|dir| dir.join("liblivepoint.so"))
        .find(|path| path.exists());
    found.unwrap_or_else(|| panic!("no liblivepoint.so beside {}: cargo build", test.display()))
}

fn run(command: &mut Command) -> Output {
    let output = command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(
        output.status.success(),
        "{command:?} ended with {}\n{}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

/// Compiles a C program of ffi-tests/ and puts the library, by its SONAME, beside it.
fn build(dir: &Path, program: &str) -> PathBuf {
    let library = library();
    symlink(&library, dir.join("liblivepoint.so.0")).unwrap();
    symlink(&library, dir.join("liblivepoint.so")).unwrap();
    let out = dir.join(program);
    run(Command::new("gcc")
        .args([
            "-std=c11",
            "-D_POSIX_C_SOURCE=200809L",
            "-Wall",
            "-Wextra",
            "-Wpedantic",
        ])
        .args(["-Wconversion", "-Werror", "-g", "-O1", "-o"])
        .arg(&out)
        .arg("-I")
        .arg(root().join("include"))
        .arg(root().join("ffi-tests").join(format!("{program}.c")))
        .arg("-L")
        .arg(dir)
        .arg("-llivepoint")
        .arg("-Wl,-rpath,$ORIGIN"));
    out
}

/// Writes the domain that the story runs: a computation that checks itself, on a console file.
fn domain(dir: &Path, repeat: u32) -> PathBuf {
    let kernel = dir.join("npb.elf");
    fs::write(&kernel, guests::find("npb").unwrap().elf).unwrap();
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

/// Runs the story and checks that each of its two restored guests verified its result.
fn story(wrapper: &[&str], repeat: u32) {
    let dir = tempfile::tempdir().unwrap();
    let program = build(dir.path(), "story");
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
        story(&[], 600);
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
        600,
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
