//! Builds the freestanding guests under `guests/` with gcc and ld.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Linked into every guest. Relative to `guests/`, as all sources here.
const RUNTIME: &[&str] = &[
    "common/entry.S",
    "common/traps.S",
    "common/apic.c",
    "common/args.c",
    "common/boot.c",
    "common/cpu.c",
    "common/features.c",
    "common/format.c",
    "common/memory.c",
    "common/power.c",
    "common/serial.c",
    "common/smp.c",
    "common/string.c",
    "common/tsc.c",
];

/// What sources include or the linker reads.
const READ_BY_ALL: &[&str] = &[
    "common/layout.h",
    "common/link.ld",
    "common/machine.h",
    "common/runtime.h",
    "npb/elementary.h",
    "npb/npb.h",
    "pagewriter/pagewriter.h",
    "virtio/guest.h",
    "virtio/virtio.h",
];

const PROGRAMS: &[Program] = &[
    Program {
        name: "echo",
        sources: &["echo/echo.c"],
        flags: &[],
    },
    Program {
        name: "npb",
        sources: &[
            "npb/npb.c",
            "npb/random.c",
            "npb/cg.c",
            "npb/ep.c",
            "npb/ft.c",
            "npb/is.c",
            "npb/mg.c",
        ],
        // The kernels' loops are worth vectorizing.
        flags: &["-O3"],
    },
    Program {
        name: "pagewriter",
        sources: &[
            "pagewriter/main.c",
            "pagewriter/layout.c",
            "pagewriter/content.c",
        ],
        // Vectors of 64 bytes are passed between inlined functions only.
        flags: &["-Wno-psabi"],
    },
    Program {
        name: "virtio",
        sources: &[
            "virtio/main.c",
            "virtio/blk.c",
            "virtio/console.c",
            "virtio/pci.c",
            "virtio/queue.c",
        ],
        flags: &[],
    },
];

const FLAGS: &[&str] = &[
    "-std=gnu11",
    "-O2",
    "-Wall",
    "-Wextra",
    "-ffreestanding",
    "-fno-pic",
    "-mno-red-zone",
    "-mcmodel=small",
    "-fcf-protection=none",
    "-fno-stack-protector",
    "-fno-asynchronous-unwind-tables",
];

const LINK_FLAGS: &[&str] = &[
    "-static",
    "-nostdlib",
    "--build-id=none",
    "-z",
    "max-page-size=4096",
    "-z",
    "noexecstack",
];

struct Program {
    name: &'static str,
    sources: &'static [&'static str],
    flags: &'static [&'static str],
}

/// Why the guests could not be built.
pub enum Error {
    /// A program is not installed, or cannot be run.
    Run {
        program: &'static str,
        source: io::Error,
    },
    /// A program ran and said no; it has printed why.
    Failed {
        program: &'static str,
        input: PathBuf,
    },
    /// A directory for the results could not be made.
    MakeDirectory { path: PathBuf, source: io::Error },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Run { program, source } if source.kind() == io::ErrorKind::NotFound => write!(
                f,
                "Could not find {program}, which builds the guests in guests/. \
                 On Debian: apt-get install gcc binutils. \
                 A build without the `cli` feature does not need it"
            ),
            Self::Run { program, source } => write!(f, "Could not run {program}: {source}"),
            Self::Failed { program, input } => {
                write!(f, "{program} failed on {}", input.display())
            }
            Self::MakeDirectory { path, source } => {
                write!(f, "Could not make {}: {source}", path.display())
            }
        }
    }
}

/// Builds `<name>.elf` in `out_dir` for every guest.
pub fn build(out_dir: &Path) -> Result<(), Error> {
    let guests = Path::new("guests");
    for file in READ_BY_ALL.iter().chain(RUNTIME) {
        rerun_if_changed(&guests.join(file));
    }
    println!("cargo::rerun-if-changed=guests/build.rs");

    let runtime = compile(guests, RUNTIME, &[], &out_dir.join("guests/common"))?;
    for program in PROGRAMS {
        for source in program.sources {
            rerun_if_changed(&guests.join(source));
        }
        let directory = out_dir.join("guests").join(program.name);
        let mut objects = compile(guests, program.sources, program.flags, &directory)?;
        objects.extend_from_slice(&runtime);
        link(
            guests,
            &objects,
            &out_dir.join(program.name).with_extension("elf"),
        )?;
    }
    Ok(())
}

fn rerun_if_changed(path: &Path) {
    println!("cargo::rerun-if-changed={}", path.display());
}

fn compile(
    guests: &Path,
    sources: &[&str],
    flags: &[&str],
    directory: &Path,
) -> Result<Vec<PathBuf>, Error> {
    fs::create_dir_all(directory).map_err(|source| Error::MakeDirectory {
        path: directory.to_owned(),
        source,
    })?;
    let mut objects = Vec::new();
    for source in sources {
        let source = guests.join(source);
        let name = source.file_name().unwrap_or(OsStr::new("source"));
        let object = directory.join(name).with_extension("o");
        let mut gcc = Command::new("gcc");
        gcc.args(FLAGS)
            .args(flags)
            .arg("-I")
            .arg(guests.join("common"));
        gcc.arg("-c").arg("-o").arg(&object).arg(&source);
        run("gcc", gcc, &source)?;
        objects.push(object);
    }
    Ok(objects)
}

fn link(guests: &Path, objects: &[PathBuf], output: &Path) -> Result<(), Error> {
    let mut ld = Command::new("ld");
    ld.args(LINK_FLAGS)
        .arg("-T")
        .arg(guests.join("common/link.ld"));
    ld.arg("-o").arg(output).args(objects);
    run("ld", ld, output)
}

fn run(program: &'static str, mut command: Command, input: &Path) -> Result<(), Error> {
    let status = command
        .status()
        .map_err(|source| Error::Run { program, source })?;
    if status.success() {
        Ok(())
    } else {
        Err(Error::Failed {
            program,
            input: input.to_owned(),
        })
    }
}
