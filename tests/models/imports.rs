//! A file that is included here is modelled only as far as it imports `crate::sync`.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Fails where a file that is included takes something shared from elsewhere.
pub(crate) fn check() -> Result<(), String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let included = included(&root.join("tests/models"));
    assert!(included.len() > 10, "only {included:?} are found");
    let wrong: Vec<_> = included.iter().flat_map(|file| wrong_lines(file)).collect();
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "not from crate::sync, so not modelled:\n{}",
            wrong.join("\n")
        ))
    }
}

/// Returns the files of `src/` that a `#[path]` names, with those below a `mod.rs`.
fn included(models: &Path) -> BTreeSet<PathBuf> {
    let mut found = BTreeSet::new();
    for file in files(models) {
        let text = fs::read_to_string(&file).unwrap();
        let paths = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("#[path = \"")?.strip_suffix("\"]"));
        for path in paths.filter(|path| path.contains("../src/")) {
            let path = file.parent().unwrap().join(path).canonicalize().unwrap();
            if path.ends_with("mod.rs") {
                found.extend(files(path.parent().unwrap()));
            } else {
                found.insert(path);
            }
        }
    }
    found
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn wrong_lines(file: &Path) -> Vec<String> {
    let text = fs::read_to_string(file).unwrap();
    let code = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let wrong = code.lines().enumerate().filter(|(_, line)| {
        let elsewhere = ["std::sync", "std::thread", "crossbeam_channel"];
        let names = elsewhere.iter().any(|name| line.contains(name));
        // Arcs are plain here: who holds one is no question that a model asks.
        names && !line.trim_start().starts_with("//") && *line != "use std::sync::Arc;"
    });
    wrong
        .map(|(at, line)| format!("{}:{}: {line}", file.display(), at + 1))
        .collect()
}
