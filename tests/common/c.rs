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
