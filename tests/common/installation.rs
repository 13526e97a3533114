//! `make install-built` with the programs and the library of this build.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::c::{library, root};

/// Returns a make that knows this build, which it finds in `dir`, and installs below `destination`.
pub fn make(target: &str, dir: &Path, destination: &Path) -> Command {
    let built = dir.join("built");
    if !built.exists() {
        fs::create_dir(&built).unwrap();
        for (name, from) in [
            ("livepoint", PathBuf::from(env!("CARGO_BIN_EXE_livepoint"))),
            (
                "livepointd",
                PathBuf::from(env!("CARGO_BIN_EXE_livepointd")),
            ),
            (
                "livepoint-manual",
                PathBuf::from(env!("CARGO_BIN_EXE_livepoint-manual")),
            ),
            ("liblivepoint.so", library()),
        ] {
            symlink(from, built.join(name)).unwrap();
        }
    }
    let mut command = Command::new("make");
    command
        .current_dir(root())
        // What a make around this test passes on is not for this one.
        .env_remove("MAKEFLAGS")
        .env_remove("MAKELEVEL")
        .arg(target)
        .arg(format!("BUILT={}", built.display()))
        .arg(format!("DESTDIR={}", destination.display()));
    command
}
