//! Virtio consoles on KVM: a guest of ours sends back what is typed at each.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::io::{ErrorKind, Read as _, Write as _};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::have_kvm;
use livepoint::checkpoint::{self, CheckpointOptions, Protocol};
use livepoint::guests;
use livepoint::machine::Machine;
use livepoint::machine::spec::{
    BootSpec, MachineSpec, PciDevice, PciDeviceSpec, SerialBackend, SerialSpec, Source,
};
use livepoint::restore::eager;
use livepoint::store::{FileStorage, ImageReader};
use rustix::io::ioctl_fionread;

const PATIENCE: Duration = Duration::from_secs(60);
/// What has been typed and has not come back, at most: less than a socket holds, so that the guest
/// never waits for this test, however late it reads.
const UNDER_WAY_BYTES_MAX: usize = 32 << 10;

/// Bytes of a line of what is typed.
const LINE_BYTES: usize = 16;

/// Returns a part of the endless text that is typed at a console. No two of its lines are the same.
fn text(console: usize, part: Range<usize>) -> Vec<u8> {
    let lines = part.start / LINE_BYTES..=part.end / LINE_BYTES;
    let lines: String = lines
        .map(|line| format!("{console} {line:013}\n"))
        .collect();
    let skipped = part.start % LINE_BYTES;
    lines.as_bytes()[skipped..skipped + part.len()].to_vec()
}

/// Who types at one console, and sees what comes back.
struct Typist {
    console: usize,
    socket: UnixStream,
    /// The machine's end.
    other: Arc<OwnedFd>,
    typed: usize,
    seen: usize,
}

impl Typist {
    /// Types from byte `typed` on; the first that comes back is to be byte `seen`.
    fn new(console: usize, (typed, seen): (usize, usize)) -> Self {
        let (socket, other) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        Self {
            console,
            socket,
            other: Arc::new(other.into()),
            typed,
            seen,
        }
    }

    /// Types what it may, and compares what came back.
    fn work(&mut self) {
        let end = self.seen + UNDER_WAY_BYTES_MAX;
        if end - self.typed >= 1024 {
            match self.socket.write(&text(self.console, self.typed..end)) {
                Ok(count) => self.typed += count,
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
        let mut bytes = [0; 4096];
        match self.socket.read(&mut bytes) {
            Ok(count) => {
                let expected = text(self.console, self.seen..self.seen + count);
                assert_eq!(
                    String::from_utf8_lossy(&bytes[..count]),
                    String::from_utf8_lossy(&expected),
                    "from byte {} on",
                    self.seen
                );
                self.seen += count;
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }

    /// Returns how much the machine has taken, and how much it has sent. It is in a pause.
    fn taken_and_sent(&self) -> (usize, usize) {
        let unread = |count: rustix::io::Result<u64>| usize::try_from(count.unwrap()).unwrap();
        (
            self.typed - unread(ioctl_fionread(&self.other)),
            self.seen + unread(ioctl_fionread(&self.socket)),
        )
    }
}

fn spec(console: &Path, typists: &[Typist]) -> MachineSpec {
    let kernel = Source::Bytes {
        name: "virtio".to_owned(),
        bytes: guests::find("virtio").unwrap().elf.into(),
    };
    let boot = BootSpec {
        kernel,
        initrd: None,
        cmdline: String::new(),
    };
    let mut spec = MachineSpec::new(64 << 20, Some(boot));
    let backend = SerialBackend::File {
        path: console.to_owned(),
        append: true,
    };
    spec.serials.push(SerialSpec { port: 0, backend });
    for (slot, typist) in (3..).zip(typists) {
        let backend = SerialBackend::Stream(typist.other.clone());
        let device = PciDevice::Console(backend);
        spec.pci.push(PciDeviceSpec { slot, device });
    }
    spec
}

/// Works until so many bytes more have come back at each console.
fn converse(typists: &Mutex<Vec<Typist>>, bytes: usize) {
    let goals: Vec<_> = typists
        .lock()
        .unwrap()
        .iter()
        .map(|it| it.seen + bytes)
        .collect();
    let start = Instant::now();
    loop {
        let mut typists = typists.lock().unwrap();
        typists.iter_mut().for_each(Typist::work);
        let is_done = |(typist, goal): (&Typist, &usize)| typist.seen >= *goal;
        if typists.iter().zip(&goals).all(is_done) {
            return;
        }
        drop(typists);
        assert!(start.elapsed() < PATIENCE, "nothing comes back");
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[test]
fn what_is_typed_comes_back_once_over_a_live_checkpoint_by_every_protocol_and_a_restore() {
    if !have_kvm() {
        return;
    }
    let typists = |from: [(usize, usize); 2]| -> Vec<_> {
        let from = from.into_iter().enumerate();
        from.map(|(console, from)| Typist::new(console, from))
            .collect()
    };
    let dir = tempfile::tempdir().unwrap();
    for protocol in Protocol::CAPTURING {
        let at = typists([(0, 0); 2]);
        let machine = Machine::build(spec(&dir.path().join("console"), &at)).unwrap();
        let (machine, at) = (Arc::new(machine), Arc::new(Mutex::new(at)));
        machine.start(false).unwrap();
        converse(&at, 100_000);
        let captured = Arc::new(Mutex::new(None));
        let mut options = CheckpointOptions::default();
        options.protocol = protocol;
        options.pause_limit = Duration::from_secs(30);
        let (typists_too, noted) = (at.clone(), captured.clone());
        options.at_pause = Some(Arc::new(move |_| {
            let typists = typists_too.lock().unwrap();
            let of_each = [0, 1].map(|console: usize| typists[console].taken_and_sent());
            assert!(noted.lock().unwrap().replace(of_each).is_none());
        }));
        let image = dir.path().join("image.lpi");
        let job = checkpoint::start(machine.clone(), Arc::new(FileStorage), &image, options);
        let job = job.unwrap();
        while !job.is_finished() {
            converse(&at, 4096);
        }
        job.wait().unwrap();
        // The guest goes on meanwhile, and then is gone.
        converse(&at, 100_000);
        drop(machine);
        let from = captured.lock().unwrap().take().unwrap();
        for (console, (taken, sent)) in from.into_iter().enumerate() {
            let inside = taken.checked_sub(sent).expect("more went out than came in");
            println!("{protocol}: console {console} had {inside} bytes inside");
        }
        let at = Mutex::new(typists(from));
        let reader = ImageReader::open(&FileStorage, &image).unwrap();
        let console = dir.path().join("console");
        let unfilled = Machine::build_for_restore(spec(&console, &at.lock().unwrap())).unwrap();
        let fill = eager::FillOptions {
            threads: 2,
            memory_is_fresh: true,
        };
        eager::fill(&reader, unfilled.regions(), &fill).unwrap();
        let restored = unfilled.finish(reader.sections().unwrap()).unwrap();
        restored.start(false).unwrap();
        converse(&at, 100_000);
    }
}
