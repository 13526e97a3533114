//! What `make install` puts in place, used as a stranger would: by pkg-config, CMake and man.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::c::{library, root, run};
use common::installation;

/// Installs this build below `dir`, as a packager would.
fn install(dir: &Path) -> PathBuf {
    let destination = dir.join("root");
    run(&mut make("install-built", dir, &destination));
    destination
}

/// Returns a make for Debian's places, with a multi-architecture directory.
fn make(target: &str, dir: &Path, destination: &Path) -> Command {
    let mut command = installation::make(target, dir, destination);
    command.args(["PREFIX=/usr", "LIBDIR=/usr/lib/x86_64-linux-gnu"]);
    command
}

const LIBDIR: &str = "usr/lib/x86_64-linux-gnu";

/// Returns an example in C: it says which library it runs with, and checks an image.
fn c_program() -> String {
    fs::read_to_string(root().join("examples/c/inspect_image.c")).unwrap()
}

/// The same in C++, with the header for it.
const CPP_PROGRAM: &str = r#"
#include <livepoint.hpp>
#include <iostream>
int main(int argc, char **argv)
{
    try {
        livepoint::image image(argc < 2 ? "" : argv[1]);
        image.verify();
    } catch (const std::exception &error) {
        std::cerr << error.what() << '\n';
        return 1;
    }
    std::cout << "livepoint " << lvp_version_string() << "\nevery digest holds\n";
}
"#;

/// Runs a program that was built against an installation, on a whole image and on a broken one.
fn assert_verifies(program: &Path, destination: &Path, dir: &Path) {
    let golden = root().join("tests/golden/format-0.1-lz4.lpi");
    let with_library = |image: &Path| {
        let mut command = Command::new(program);
        command
            .env("LD_LIBRARY_PATH", destination.join(LIBDIR))
            .arg(image);
        command
    };
    let said = String::from_utf8(run(&mut with_library(&golden)).stdout).unwrap();
    let wanted = concat!("livepoint ", env!("CARGO_PKG_VERSION"), "\n");
    assert!(
        said.starts_with(wanted) && said.ends_with("every digest holds\n"),
        "{said}"
    );
    let mut bytes = fs::read(golden).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    let damaged = dir.join("damaged.lpi");
    fs::write(&damaged, bytes).unwrap();
    let refused = with_library(&damaged).output().unwrap();
    assert_eq!(refused.status.code(), Some(1), "{refused:?}");
}

#[test]
fn c_and_cpp_programs_build_by_pkg_config_against_an_installation() {
    let dir = tempfile::tempdir().unwrap();
    let destination = install(dir.path());
    let answer = run(Command::new("pkg-config")
        .env("PKG_CONFIG_SYSROOT_DIR", &destination)
        .env(
            "PKG_CONFIG_LIBDIR",
            destination.join(LIBDIR).join("pkgconfig"),
        )
        .args(["--cflags", "--libs", "livepoint"]));
    let flags = String::from_utf8(answer.stdout).unwrap();
    for (compiler, name, text) in [
        ("gcc", "a.c", c_program()),
        ("g++", "b.cpp", CPP_PROGRAM.to_owned()),
    ] {
        let source = dir.path().join(name);
        fs::write(&source, text).unwrap();
        let program = source.with_extension("out");
        run(Command::new(compiler)
            .args(["-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program)
            .arg(&source)
            .args(flags.split_whitespace()));
        assert_verifies(&program, &destination, dir.path());
    }
}

#[test]
fn c_and_cpp_programs_build_by_cmake_against_an_installation() {
    let dir = tempfile::tempdir().unwrap();
    let destination = install(dir.path());
    let project = dir.path().join("project");
    fs::create_dir(&project).unwrap();
    fs::write(project.join("a.c"), c_program()).unwrap();
    fs::write(project.join("b.cpp"), CPP_PROGRAM).unwrap();
    let lists = "cmake_minimum_required(VERSION 3.16)\n\
                 project(stranger C CXX)\n\
                 set(CMAKE_CXX_STANDARD 17)\n\
                 find_package(livepoint 0.1 REQUIRED)\n\
                 add_executable(a a.c)\n\
                 target_link_libraries(a PRIVATE livepoint::livepoint)\n\
                 add_executable(b b.cpp)\n\
                 target_link_libraries(b PRIVATE livepoint::livepoint)\n";
    fs::write(project.join("CMakeLists.txt"), lists).unwrap();
    let build = dir.path().join("build");
    let configure = |prefix: &Path| {
        let mut command = Command::new("cmake");
        command
            .arg("-S")
            .arg(&project)
            .arg("-B")
            .arg(&build)
            .arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display()))
            .arg("-DCMAKE_LIBRARY_ARCHITECTURE=x86_64-linux-gnu");
        command
    };
    run(&mut configure(&destination.join("usr")));
    run(Command::new("cmake").arg("--build").arg(&build));
    for name in ["a", "b"] {
        assert_verifies(&build.join(name), &destination, dir.path());
    }
    // A version that is not there is not found.
    fs::write(
        project.join("CMakeLists.txt"),
        lists.replace("livepoint 0.1", "livepoint 99.0"),
    )
    .unwrap();
    let refused = configure(&destination.join("usr")).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && said.contains("99.0"), "{said}");
}

/// Returns all files below a directory, as paths in it.
fn files(dir: &Path) -> BTreeSet<String> {
    let listed = run(Command::new("find")
        .current_dir(dir)
        .args([".", "!", "-type", "d", "-printf", "%P\n"]));
    let listed = String::from_utf8(listed.stdout).unwrap();
    listed.lines().map(str::to_owned).collect()
}

#[test]
fn an_installation_is_complete_and_can_be_taken_away() {
    let dir = tempfile::tempdir().unwrap();
    let destination = install(dir.path());
    let found = files(&destination);
    for wanted in [
        "usr/bin/livepoint",
        "usr/bin/livepointd",
        "usr/include/livepoint.h",
        "usr/include/livepoint.hpp",
        "usr/lib/systemd/system/livepoint-guests.service",
        "usr/lib/systemd/system/livepointd.service",
        "usr/lib/systemd/system/virtlivepointd.socket",
        "usr/share/man/man1/livepoint.1",
        "usr/share/man/man8/livepointd.8",
        "usr/share/bash-completion/completions/livepoint",
        "usr/share/zsh/site-functions/_livepoint",
        "usr/share/fish/vendor_completions.d/livepointd.fish",
        "usr/share/doc/livepoint/c-api.md",
        "usr/share/doc/livepoint/examples/c/own_vmm.c",
    ] {
        assert!(found.contains(wanted), "{wanted} is missing: {found:#?}");
    }
    let libdir = destination.join(LIBDIR);
    let points_to = |name: &str| fs::read_link(libdir.join(name)).unwrap();
    assert_eq!(points_to("liblivepoint.so"), Path::new("liblivepoint.so.0"));
    let versioned = concat!("liblivepoint.so.", env!("CARGO_PKG_VERSION"));
    assert_eq!(points_to("liblivepoint.so.0"), Path::new(versioned));
    // No file was left with a place to be filled in, or with a place of the build's.
    for name in found.iter().filter(|name| {
        [".pc", ".cmake", ".service", ".socket"]
            .iter()
            .any(|ending| name.ends_with(ending))
    }) {
        let text = fs::read_to_string(destination.join(name)).unwrap();
        let build = dir.path().to_str().unwrap();
        assert!(
            !text.contains('@') && !text.contains(build),
            "{name}: {text}"
        );
    }
    fs::write(destination.join("usr/bin/other"), "").unwrap();
    run(&mut make("uninstall", dir.path(), &destination));
    let left: Vec<_> = files(&destination).into_iter().collect();
    assert_eq!(left, ["usr/bin/other"]);
}

#[test]
fn every_exported_function_has_a_man_page_and_no_page_has_a_mistake() {
    let dir = tempfile::tempdir().unwrap();
    run(Command::new(env!("CARGO_BIN_EXE_livepoint-manual")).arg(dir.path()));
    let man = dir.path().join("man");
    let exports = fs::read_to_string(root().join("ffi-tests/exports.txt")).unwrap();
    let names = exports.lines().filter_map(|line| line.split('@').next());
    for name in names {
        let page = fs::read_to_string(man.join(format!("man3/{name}.3"))).unwrap();
        for heading in [".SH NAME", ".SH SYNOPSIS", ".SH DESCRIPTION", ".SH HISTORY"] {
            assert!(page.contains(heading), "{name}: no {heading}:\n{page}");
        }
    }
    let pages = files(&man);
    assert!(pages.contains("man1/livepoint-checkpoint.1"), "{pages:?}");
    for name in pages {
        let page = man.join(name);
        run(Command::new("mandoc")
            .args(["-T", "lint", "-W", "warning"])
            .arg(&page));
        // It warns and ends well.
        let formatted = run(Command::new("groff")
            .args(["-man", "-T", "utf8", "-w", "w", "-z"])
            .arg(&page));
        let said = String::from_utf8_lossy(&formatted.stderr);
        assert!(said.is_empty(), "{said}");
    }
}

#[test]
fn bash_completes_commands_and_their_options() {
    let dir = tempfile::tempdir().unwrap();
    let destination = install(dir.path());
    let complete = |words: &str, current: &str| {
        let completion = destination.join("usr/share/bash-completion/completions/livepoint");
        // What bash itself sets when the tabulator is pressed.
        let script = format!(
            "source {}; COMP_WORDS=({words} {current}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); \
             _livepoint livepoint {current} ''; echo \"${{COMPREPLY[*]}}\"",
            completion.display()
        );
        let answer = run(Command::new("bash").args(["--norc", "-c", &script]));
        String::from_utf8(answer.stdout).unwrap()
    };
    assert_eq!(complete("livepoint", "che").trim(), "checkpoint");
    let options = complete("livepoint checkpoint", "--max-d");
    assert_eq!(options.trim(), "--max-downtime");
}

#[test]
fn man_pages_are_the_same_for_the_same_day() {
    let dir = tempfile::tempdir().unwrap();
    let pages = |name: &str, epoch: &str| {
        let out = dir.path().join(name);
        run(Command::new(env!("CARGO_BIN_EXE_livepoint-manual"))
            .env("SOURCE_DATE_EPOCH", epoch)
            .arg(&out));
        fs::read_to_string(out.join("man/man3/lvp_machine_new.3")).unwrap()
    };
    let first = pages("first", "1000000000");
    assert!(first.contains("2001-09-09"), "{first}");
    assert_eq!(first, pages("second", "1000000001"));
    let refused = Command::new(env!("CARGO_BIN_EXE_livepoint-manual"))
        .env("SOURCE_DATE_EPOCH", "yesterday")
        .arg(dir.path().join("third"))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert!(said.contains("SOURCE_DATE_EPOCH"), "{said}");
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn the_debian_packages_have_the_version_of_the_crate_and_the_name_of_the_library() {
    let packaging = root().join("packaging/debian");
    let changelog = fs::read_to_string(packaging.join("changelog")).unwrap();
    let wanted = concat!("livepoint (", env!("CARGO_PKG_VERSION"), "-");
    assert!(changelog.starts_with(wanted), "{changelog}");
    let dynamic = run(Command::new("readelf").arg("-dW").arg(library()));
    let dynamic = String::from_utf8(dynamic.stdout).unwrap();
    let symbols = fs::read_to_string(packaging.join("liblivepoint0.symbols")).unwrap();
    let (name, package) = symbols.split_once(' ').unwrap();
    assert!(dynamic.contains(&format!("[{name}]")), "{name}: {dynamic}");
    assert!(package.starts_with("liblivepoint0 "), "{symbols}");
}
