//! The built library as linkers and loaders see it.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::c::{library, root, run};

fn text_of(command: &mut Command) -> String {
    String::from_utf8(run(command).stdout).unwrap()
}

/// Returns what the library exports, as `NAME@@VERSION`.
fn exports() -> Vec<String> {
    let symbols = text_of(
        Command::new("nm")
            .args(["-D", "--defined-only"])
            .arg(library()),
    );
    let mut exported: Vec<_> = symbols
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        // The versions themselves are absolute symbols.
        .filter(|words| words[1] != "A")
        .map(|words| words[2].to_owned())
        .collect();
    exported.sort_unstable();
    exported
}

#[test]
fn the_library_has_its_name_and_stays_loaded() {
    let dynamic = text_of(Command::new("readelf").arg("-dW").arg(library()));
    assert!(
        dynamic.contains("Library soname: [liblivepoint.so.0]"),
        "{dynamic}"
    );
    assert!(dynamic.contains("NODELETE"), "{dynamic}");
}

#[test]
fn what_only_the_command_needs_is_not_in_the_library() {
    // The compiler makes one of functions that are the same to the byte, and keeps any one's name: of
    // such short ones, and of what drops a box, a name says nothing.
    const SHORT_BYTES: u64 = 64;
    let symbols = text_of(Command::new("nm").args(["--demangle", "-S"]).arg(library()));
    assert!(symbols.contains("livepoint::checkpoint::"), "not stripped");
    let long_name = |line| {
        let [_, bytes, _, name] = fields(line)?;
        let bytes = u64::from_str_radix(bytes, 16).ok()?;
        (bytes > SHORT_BYTES).then_some(name)
    };
    let long: Vec<_> = symbols.lines().filter_map(long_name).collect();
    let is_of = |name: &str, place: &str| name.trim_start_matches('<').starts_with(place);
    assert!(long.iter().any(|name| is_of(name, "livepoint::capi::")));
    for of_the_command in ["imago::", "clap_builder::"] {
        let found = long.iter().find(|name| is_of(name, of_the_command));
        assert_eq!(found, None);
    }
}

/// Returns a symbol's address, size, kind and name.
fn fields(line: &str) -> Option<[&str; 4]> {
    let fields: Vec<_> = line.splitn(4, ' ').collect();
    fields.try_into().ok()
}

#[test]
fn exactly_the_committed_functions_are_exported_each_with_its_version() {
    let exported = exports();
    let unversioned: Vec<_> = exported
        .iter()
        .filter(|name| !name.contains("@@LIVEPOINT_"))
        .collect();
    assert!(unversioned.is_empty(), "without a version: {unversioned:?}");
    let committed = fs::read_to_string(root().join("ffi-tests/exports.txt")).unwrap();
    assert_eq!(exported, committed.lines().collect::<Vec<_>>());
}

#[test]
fn the_header_declares_exactly_what_is_exported() {
    let header = fs::read_to_string(root().join("include/livepoint.h")).unwrap();
    let mut declared: Vec<_> = prototypes(&header)
        .iter()
        .map(|prototype| {
            let name = prototype.split('(').next().unwrap();
            let start = name.rfind([' ', '*']).unwrap() + 1;
            name[start..].to_owned()
        })
        .collect();
    declared.sort_unstable();
    let exported: Vec<_> = exports()
        .iter()
        .map(|name| name.split('@').next().unwrap().to_owned())
        .collect();
    assert_eq!(declared, exported);
}

#[test]
fn a_program_is_linked_against_the_versions() {
    let dir = tempfile::tempdir().unwrap();
    let program = common::c::compile(dir.path(), "ffi-tests/every.c", &[]);
    let wanted = text_of(Command::new("readelf").arg("-VW").arg(program));
    assert!(
        wanted.contains("File: liblivepoint.so.0") && wanted.contains("Name: LIVEPOINT_0.1"),
        "{wanted}"
    );
}

/// Writes what a header says of types and functions.
fn dump(dir: &Path, header: &str) -> PathBuf {
    fs::write(dir.join("livepoint.h"), header).unwrap();
    let out = dir.join("now.abi");
    let script = root().join("ffi-tests/abi-dump");
    run(Command::new(script).arg(dir).arg(&out));
    out
}

/// Returns what abidiff finds between the committed ABI and a header that a caller of before would
/// notice. New functions, and new members at the end of a struct that has `struct_size`, are none.
fn breaks(header: &str) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("abidiff")
        .arg("--no-added-syms")
        .arg(root().join("ffi-tests/livepoint-0.1.abi"))
        .arg(dump(dir.path(), header))
        .output()
        .unwrap();
    // 1 and 2: the tool failed, or was called wrongly.
    let code = output.status.code().unwrap();
    assert!(code & 3 == 0, "{output:?}");
    let report = String::from_utf8(output.stdout).unwrap();
    let said = |line: &&str| {
        [
            "offset changed",
            "type of '",
            "deletion",
            "return type changed",
            "type name changed",
            "parameter type changed",
            "was removed",
            "was added",
            "[D]",
        ]
        .iter()
        .any(|words| line.contains(words))
    };
    let mut found: Vec<_> = report.lines().filter(said).map(str::to_owned).collect();
    if found.is_empty() && code & 8 != 0 {
        found.push(report);
    }
    found
}

#[test]
fn programs_of_before_find_the_abi_that_they_were_compiled_for() {
    let header = fs::read_to_string(root().join("include/livepoint.h")).unwrap();
    let broken = breaks(&header);
    assert!(broken.is_empty(), "{broken:#?}");
    let changed = |from: &str, to: &str| {
        assert_eq!(header.matches(from).count(), 1, "{from}");
        header.replacen(from, to, 1)
    };
    // What may change, and what may not.
    let count = "  size_t console_count;\n";
    let grown = changed(
        "} lvp_machine_options;",
        "  uint64_t more;\n} lvp_machine_options;",
    );
    assert!(breaks(&grown).is_empty(), "{:#?}", breaks(&grown));
    let version = "uint32_t lvp_version(void);";
    for broken in [
        changed(count, "  int first;\n  size_t console_count;\n"),
        changed(count, ""),
        changed(version, ""),
        changed(version, "uint64_t lvp_version(void);"),
        changed(version, "uint32_t lvp_version(int more);"),
    ] {
        assert!(!breaks(&broken).is_empty());
    }
}

/// Returns the declarations of functions in a header, without the semicolon.
fn prototypes(header: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = String::new();
    for line in header.lines() {
        let begins = open.is_empty()
            && line.starts_with(|c: char| c.is_ascii_alphabetic())
            && line.contains("lvp_")
            && line.contains('(')
            && !line.starts_with("typedef");
        if begins || !open.is_empty() {
            open.push_str(line.trim());
            open.push(' ');
        }
        if open.trim_end().ends_with(");") {
            let whole = std::mem::take(&mut open);
            found.push(whole.trim_end().trim_end_matches(';').to_owned());
        }
    }
    found
}
