//! C programs whose threads call the library at random.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::path::Path;
use std::process::Command;

use common::c::{SANITIZERS, compile, golden, guest_file, memcheck, run_for, sanitized};
use common::{have_kvm, long};

/// What a loaded machine may take for the last calls, by far.
const ENDING_SECONDS: u32 = 300;

/// Lets eight threads call for so many seconds.
fn stress(flags: &[&str], command: impl FnOnce(&Path) -> Command, seconds: u32) {
    let dir = tempfile::tempdir().unwrap();
    let program = compile(dir.path(), "ffi-tests/stress.c", flags);
    // The same calls each time in the short form, others each time in the long one.
    let seed = if long() { std::process::id() } else { 1 };
    let seconds = if long() { 60 } else { seconds };
    let mut command = command(&program);
    command
        .arg(golden())
        .arg(guest_file(dir.path(), "echo"))
        .arg(dir.path())
        .args([seconds.to_string(), seed.to_string()]);
    let output = run_for(seconds + ENDING_SECONDS, &command);
    let said = String::from_utf8_lossy(&output.stdout);
    print!("{said}");
    assert!(said.contains(" calls, "), "{said}");
}

#[test]
fn threads_that_call_at_random_find_no_bug() {
    if have_kvm() {
        stress(&[], |program| Command::new(program), 4);
    }
}

#[test]
fn threads_that_call_at_random_find_no_bug_in_the_c_side() {
    if have_kvm() {
        stress(&SANITIZERS, sanitized, 4);
    }
}

#[test]
fn threads_that_call_at_random_find_no_error_and_no_leak_under_valgrind() {
    if have_kvm() {
        stress(&[], memcheck, 10);
    }
}
