//! Who may use whom: the table in docs/architecture.md, checked against the source.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each module and what it may use of ours. A module that is not listed here is an error.
const MAY_USE: &[(&str, &[&str])] = &[
    ("sync", &[]),
    ("page", &["sync"]),
    ("sys", &["page"]),
    ("guests", &[]),
    ("state", &["page"]),
    ("guest", &["page", "state", "sync", "sys"]),
    ("qcow2", &["guest", "sys"]),
    ("domain", &["page", "state"]),
    ("store", &["page", "state", "sync", "sys"]),
    ("kvmstate", &["guest", "page", "state", "sys"]),
    (
        "foreign",
        &["guest", "kvmstate", "page", "state", "sync", "sys"],
    ),
    (
        "machine",
        &["domain", "guest", "kvmstate", "page", "state", "sys"],
    ),
    (
        "checkpoint",
        &["guest", "page", "state", "store", "sync", "sys"],
    ),
    ("restore", &["guest", "page", "state", "store", "sys"]),
    (
        "host",
        &[
            "checkpoint",
            "domain",
            "foreign",
            "guest",
            "kvmstate",
            "machine",
            "page",
            "qcow2",
            "restore",
            "state",
            "store",
            "sync",
            "sys",
        ],
    ),
    ("capi", &["host", "sys"]),
    ("cli", &["host", "guests", "qcow2"]),
    ("rpc", &[]),
    ("daemon", &["host", "rpc"]),
];

fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            into.push(path);
        }
    }
}

/// Returns the module of ours that a source file belongs to; `None` for lib.rs and the binaries.
fn module_of(source: &Path, file: &Path) -> Option<String> {
    let inside = file.strip_prefix(source).unwrap();
    let first = inside
        .components()
        .next()
        .unwrap()
        .as_os_str()
        .to_str()
        .unwrap();
    let name = first.strip_suffix(".rs").unwrap_or(first);
    (!["lib", "bin"].contains(&name)).then(|| name.to_owned())
}

/// Returns the names that follow `crate::` in the code before the file's unit tests.
fn used_modules(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let mut used = BTreeSet::new();
    for line in code
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
    {
        for (at, _) in line.match_indices("crate::") {
            let rest = &line[at + "crate::".len()..];
            let name: String = rest
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            used.insert(name);
        }
    }
    used
}

#[test]
fn modules_use_only_what_the_architecture_allows() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let allowed: BTreeMap<_, _> = MAY_USE.iter().copied().collect();
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    let mut wrong = Vec::new();
    for file in files {
        let Some(module) = module_of(&source, &file) else {
            continue;
        };
        let text = fs::read_to_string(&file).unwrap();
        let Some(may_use) = allowed.get(module.as_str()) else {
            wrong.push(format!("{module}: not in the table"));
            continue;
        };
        for used in used_modules(&text) {
            let known = allowed.contains_key(used.as_str());
            if known && used != module && !may_use.contains(&used.as_str()) {
                wrong.push(format!("{}: {module} may not use {used}", file.display()));
            }
            // `use crate::{a, b}` would hide what is used from this check.
            if used.is_empty() {
                wrong.push(format!("{}: name the module after crate::", file.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_code_is_allowed_only_where_the_architecture_says() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&source, &mut files);
    for file in files {
        let text = fs::read_to_string(&file).unwrap();
        let opts_in = text.contains("expect(unsafe_code") || text.contains("allow(unsafe_code");
        let inside = file.strip_prefix(&source).unwrap();
        let may = inside.starts_with("sys")
            || inside.starts_with("capi")
            || inside == Path::new("machine/memory.rs");
        assert!(!opts_in || may, "{} opts in to unsafe code", file.display());
    }
}
