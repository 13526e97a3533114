//! Builds what the crate embeds.

use std::env;
use std::path::PathBuf;
use std::process::ExitCode;

#[path = "guests/build.rs"]
mod guests;

fn main() -> ExitCode {
    println!("cargo::rerun-if-changed=build.rs");
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));

    // Guests belong to the command; a build of the library needs no gcc.
    if env::var_os("CARGO_FEATURE_CLI").is_some()
        && let Err(error) = guests::build(&out_dir)
    {
        println!("cargo::error={error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}
