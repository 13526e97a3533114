//! Builds what the crate embeds, the C header, and the shared library's name.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[path = "guests/build.rs"]
mod guests;

/// Changes when the C ABI breaks.
const SO_VERSION: u32 = 0;

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
    println!("cargo::rustc-cdylib-link-arg=-Wl,-soname,liblivepoint.so.{SO_VERSION}");
    // Rust's standard library leaves thread-local destructors on its callers' threads: code that
    // dlclose() took away would then run.
    println!("cargo::rustc-cdylib-link-arg=-Wl,-z,nodelete");
    // The nodes that symbol_versions! in src/capi names. It takes lld, which Rust links with on
    // x86_64 by default: GNU ld refuses them beside the list of exports that rustc makes.
    println!("cargo::rerun-if-changed=src/capi/livepoint.map");
    let root = env::var("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR");
    println!("cargo::rustc-cdylib-link-arg=-Wl,--version-script={root}/src/capi/livepoint.map");
    if let Err(error) = write_header(&out_dir.join("livepoint.h")) {
        println!("cargo::error=Could not make livepoint.h: {error}");
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// Generates the C header from `src/capi/`; `make header` copies it to `include/`.
fn write_header(path: &Path) -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=src/capi");
    let mut config = cbindgen::Config {
        language: cbindgen::Language::C,
        style: cbindgen::Style::Type,
        cpp_compat: true,
        no_includes: true,
        sys_includes: vec!["stddef.h".to_owned(), "stdint.h".to_owned()],
        include_guard: Some("LIVEPOINT_H".to_owned()),
        autogen_warning: Some("/* Generated from src/capi/ by cbindgen. */".to_owned()),
        header: Some(HEADER.to_owned()),
        after_includes: Some(version_macros()?),
        usize_is_size_t: true,
        ..cbindgen::Config::default()
    };
    config.export.exclude = vec!["Options".to_owned(), "SizedOut".to_owned()];
    let mut builder = cbindgen::Builder::new().with_config(config);
    for file in [
        "version",
        "status",
        "log",
        "options",
        "domain",
        "machine",
        "machine_query",
        "chain",
        "events",
        "job",
        "image",
        "state",
        "callbacks",
        "guest",
        "guest_vcpu",
    ] {
        builder = builder.with_src(format!("src/capi/{file}.rs"));
    }
    let mut rendered = Vec::new();
    builder.generate()?.write(&mut rendered);
    std::fs::write(path, tidy(&String::from_utf8(rendered)?))?;
    Ok(())
}

const HEADER: &str = "\
/*
 * livepoint: virtual machines on KVM that are saved while they keep running.
 *
 * Link with -llivepoint. Every function may be called from any thread. Text is UTF-8. Threads
 * that the library starts have every signal blocked; it installs no signal handler, keeps no
 * global state but each thread's last error text and lvp_log_set()'s, and never ends the process.
 *
 * Option and result structs start with struct_size: zero the struct, set struct_size to its
 * sizeof, then call. A library newer than the header then leaves out what the caller does not
 * know; an older one refuses what it does not know, unless it is zero.
 *
 * SPDX-License-Identifier: Apache-2.0 OR MIT
 */";

/// Returns the version macros; one source, so that the parts and the sum cannot drift apart.
fn version_macros() -> Result<String, Box<dyn Error>> {
    let part = |name: &str| -> Result<u32, Box<dyn Error>> {
        Ok(env::var(format!("CARGO_PKG_VERSION_{name}"))?.parse()?)
    };
    let (major, minor, patch) = (part("MAJOR")?, part("MINOR")?, part("PATCH")?);
    Ok(format!(
        "\n/** The version of this header. */\n\
         #define LVP_VERSION_MAJOR {major}\n\
         #define LVP_VERSION_MINOR {minor}\n\
         #define LVP_VERSION_PATCH {patch}\n\
         /** (major << 16 | minor << 8 | patch); compare with lvp_version(). */\n\
         #define LVP_VERSION_NUMBER {}\n\
         #define LVP_VERSION_STRING \"{major}.{minor}.{patch}\"",
        major << 16 | minor << 8 | patch
    ))
}

/// Takes Rust's own safety headings out of the C documentation, which says the same in C's words.
fn tidy(header: &str) -> String {
    let mut out = String::new();
    let mut in_safety = false;
    for line in header.lines() {
        if line.trim() == "* # Safety" {
            in_safety = true;
            // The empty line before the heading goes too.
            if out.ends_with(" *\n") {
                out.truncate(out.len() - " *\n".len());
            }
        }
        if line.trim() == "*/" {
            in_safety = false;
        }
        if !in_safety {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}
