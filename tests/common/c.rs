//! C and C++ programs against the library of this build and the committed header.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use livepoint::guests;

/// Returns the project's folder.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns the shared library that belongs to this build.
pub fn library() -> PathBuf {
    // The test is target/PROFILE/deps/NAME-HASH. `cargo build` puts the library one level up too,
    // `cargo test` does not: the newer one is of this build.
    let test = std::env::current_exe().unwrap();
    let deps = test.parent().unwrap();
    let found = [deps, deps.parent().unwrap()]
        .into_iter()
        .map(|dir| dir.join("liblivepoint.so"))
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .max_by_key(|(modified, _)| *modified)
        .map(|(_, path)| path);
    found.unwrap_or_else(|| panic!("no liblivepoint.so beside {}: cargo build", test.display()))
}

/// Runs a command, which must succeed.
pub fn run(command: &mut Command) -> Output {
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

/// A whole image of a guest, made by an older build.
pub fn golden() -> PathBuf {
    root().join("tests/golden/format-0.1-lz4.lpi")
}

/// How gcc checks the C side.
pub const SANITIZERS: [&str; 2] = ["-fsanitize=address,undefined", "-fno-sanitize-recover"];

/// Returns the command that runs a program that was compiled with [`SANITIZERS`].
///
/// Without their search for leaks, which valgrind does: at the end of the program it stops every
/// thread by ptrace, those of the kernel's KVM among them, and a thread that closes a VM then waits
/// for one of these for ever.
pub fn sanitized(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env("ASAN_OPTIONS", "detect_leaks=0");
    command
}

/// Returns the command that runs `program` under valgrind's memcheck.
pub fn memcheck(program: &Path) -> Command {
    let mut command = Command::new("valgrind");
    let known = root().join("ffi-tests/valgrind.supp");
    command
        .args(["--quiet", "--leak-check=full", "--error-exitcode=99"])
        .args([
            "--show-leak-kinds=definite,indirect,possible",
            "--errors-for-leak-kinds=definite,indirect,possible",
        ])
        .arg(format!("--suppressions={}", known.display()))
        .arg(program);
    command
}

/// Runs a command that must succeed, for so many seconds at most.
pub fn run_for(seconds: u32, command: &Command) -> Output {
    let mut bounded = Command::new("timeout");
    bounded
        .args(["-k", "10", &seconds.to_string()])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        bounded.env(name, value.unwrap());
    }
    run(&mut bounded)
}

/// Puts the library into `dir`, by the names that linkers and loaders look for.
fn put_library(dir: &Path) {
    for name in ["liblivepoint.so.0", "liblivepoint.so"] {
        if !dir.join(name).exists() {
            symlink(library(), dir.join(name)).unwrap();
        }
    }
}

/// Compiles a C program of the project, and puts the library beside it.
pub fn compile(dir: &Path, source: &str, flags: &[&str]) -> PathBuf {
    put_library(dir);
    let source = root().join(source);
    let out = dir.join(source.file_stem().unwrap());
    run(Command::new("gcc")
        .args(["-std=c11", "-Wall", "-Wextra", "-Wpedantic"])
        .args(["-Wconversion", "-Werror", "-g", "-O1", "-pthread", "-o"])
        .arg(&out)
        .args(flags)
        .arg("-I")
        .arg(root().join("include"))
        .arg(&source)
        .arg("-L")
        .arg(dir)
        .args(["-llivepoint", "-Wl,-rpath,$ORIGIN"]));
    out
}

/// Writes one of the built-in guests to `dir`.
pub fn guest_file(dir: &Path, name: &str) -> PathBuf {
    let file = dir.join(format!("{name}.elf"));
    fs::write(&file, guests::find(name).unwrap().elf).unwrap();
    file
}
