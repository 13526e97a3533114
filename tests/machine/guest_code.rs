//! Tiny guests, assembled by gcc, and the machines that run them.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use livepoint::machine::Machine;
use livepoint::machine::spec::{BootSpec, MachineSpec, SerialBackend, SerialSpec, Source};

/// Where a tiny guest is loaded and starts.
pub const LOAD_GPA: u64 = 0x10_0000;

/// Longer than any machine here takes on a busy host.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Assembles `source` (AT&T syntax) and wraps it into an ELF kernel.
pub fn assemble(source: &str) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (text, object, flat) = (
        dir.path().join("guest.S"),
        dir.path().join("guest.o"),
        dir.path().join("guest.bin"),
    );
    std::fs::write(&text, format!(".text\n{source}\n")).unwrap();
    let run = |program: &str, args: &[&std::ffi::OsStr]| {
        let output = Command::new(program).args(args).output();
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{program}: {errors}");
    };
    run(
        "gcc",
        &["-c".as_ref(), text.as_ref(), "-o".as_ref(), object.as_ref()],
    );
    let raw = ["-O", "binary", "-j", ".text"].map(std::ffi::OsStr::new);
    run(
        "objcopy",
        &[&raw[..], &[object.as_ref(), flat.as_ref()]].concat(),
    );
    elf(&std::fs::read(flat).unwrap(), 0x10_0000)
}

/// Wraps code into an ELF file with one segment of `memory_bytes` and the code at its start.
pub fn elf(code: &[u8], memory_bytes: u64) -> Vec<u8> {
    let mut file = Vec::new();
    file.extend(b"\x7fELF\x02\x01\x01");
    file.resize(16, 0);
    file.extend([2_u16, 62].map(u16::to_le_bytes).concat());
    file.extend(1_u32.to_le_bytes());
    file.extend([LOAD_GPA, 64, 0].map(u64::to_le_bytes).concat());
    file.extend(0_u32.to_le_bytes());
    file.extend([64_u16, 56, 1, 64, 0, 0].map(u16::to_le_bytes).concat());
    file.extend([1_u32, 7].map(u32::to_le_bytes).concat());
    let bytes = code.len() as u64;
    file.extend(
        [120, LOAD_GPA, LOAD_GPA, bytes, memory_bytes, 0x1000]
            .map(u64::to_le_bytes)
            .concat(),
    );
    file.extend(code);
    file
}

/// Returns a machine of 16 MiB that starts `kernel`, and the other end of its serial port.
pub fn spec(kernel: Vec<u8>) -> (MachineSpec, Console) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut spec = MachineSpec::new(
        16 << 20,
        Some(BootSpec {
            kernel: Source::Bytes {
                name: "test guest".to_owned(),
                bytes: kernel.into(),
            },
            initrd: None,
            cmdline: String::new(),
        }),
    );
    spec.serials.push(SerialSpec {
        port: 0,
        backend: SerialBackend::Stream(Arc::new(OwnedFd::from(theirs))),
    });
    (spec, Console(ours))
}

/// Starts a machine that runs `source`.
pub fn start(source: &str) -> (Machine, Console) {
    let (spec, console) = spec(assemble(source));
    let machine = Machine::build(spec).unwrap();
    machine.start(false).unwrap();
    (machine, console)
}

/// The other end of a guest's serial port.
pub struct Console(UnixStream);

impl Console {
    /// Reads until `text` has come; returns everything read.
    pub fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = String::new();
        self.0
            .set_read_timeout(Some(Duration::from_millis(100)))
            .unwrap();
        while !seen.contains(text) {
            assert!(Instant::now() < deadline, "{text:?} never came: {seen:?}");
            let mut buffer = [0; 256];
            if let Ok(bytes) = self.0.read(&mut buffer) {
                assert!(bytes > 0, "the port was closed: {seen:?}");
                seen.push_str(&String::from_utf8_lossy(&buffer[..bytes]));
            }
        }
        seen
    }

    /// Sends `text` to the guest.
    pub fn send(&mut self, text: &str) {
        self.0.write_all(text.as_bytes()).unwrap();
    }
}
