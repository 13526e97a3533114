//! Disks on KVM: a guest of ours writes numbered records to a virtio disk, flushes, reads back.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::records::{DiskHeader, header_address};
use common::{have_kvm, wait_line};
use livepoint::checkpoint::{self, CheckpointOptions, Protocol};
use livepoint::guest::{Guest, MemoryRegion};
use livepoint::guests;
use livepoint::machine::spec::{
    BootSpec, DiskCache, DiskSpec, MachineSpec, PciDevice, PciDeviceSpec, SerialBackend,
    SerialSpec, Source,
};
use livepoint::machine::{Machine, MachineError, MachineState};
use livepoint::restore::{disks, eager};
use livepoint::store::{FileStorage, ImageReader};

const MIB: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

/// A machine with a disk, and where its console goes.
struct Bench {
    dir: tempfile::TempDir,
    disk: PathBuf,
}

impl Bench {
    fn new(disk_mib: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk.raw");
        File::create(&disk)
            .unwrap()
            .set_len(disk_mib * MIB)
            .unwrap();
        Self { dir, disk }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn disk_spec(&self, disk: &Path) -> DiskSpec {
        DiskSpec {
            name: "vda".to_owned(),
            path: disk.to_owned(),
            read_only: false,
            serial: "LP-0001".to_owned(),
            cache: DiskCache::WriteBack,
            discard: true,
        }
    }

    fn spec(&self, cmdline: &str, disk: DiskSpec, console: &str) -> MachineSpec {
        let elf = guests::find("virtio").unwrap().elf;
        let kernel = Source::Bytes {
            name: "virtio".to_owned(),
            bytes: elf.into(),
        };
        let boot = BootSpec {
            kernel,
            initrd: None,
            cmdline: cmdline.to_owned(),
        };
        let mut spec = MachineSpec::new(64 * MIB, Some(boot));
        let backend = SerialBackend::File {
            path: self.path(console),
            append: false,
        };
        spec.serials.push(SerialSpec { port: 0, backend });
        spec.pci.push(PciDeviceSpec {
            slot: 3,
            device: PciDevice::Disk(disk),
        });
        spec
    }

    fn start(&self, cmdline: &str, disk: DiskSpec) -> Arc<Machine> {
        let machine = Machine::build(self.spec(cmdline, disk, "console")).unwrap();
        machine.start(false).unwrap();
        Arc::new(machine)
    }

    fn wait_line(&self, console: &str, start: &str) -> String {
        wait_line(&self.path(console), PATIENCE, |line| {
            assert!(!line.contains("WRONG") && !line.contains("PANIC"), "{line}");
            line.starts_with(start)
        })
    }

    /// Waits until the guest's disk has so many records for good.
    fn wait_acknowledged(&self, machine: &Machine, count: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.header(machine.regions()).acknowledged < count {
            let console = || fs::read_to_string(self.path("restored")).unwrap_or_default();
            assert_eq!(machine.state(), MachineState::Running, "{}", console());
            assert!(Instant::now() < deadline, "the guest hangs");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn header(&self, regions: &[MemoryRegion]) -> DiskHeader {
        let console = fs::read_to_string(self.path("console")).unwrap();
        let gpa = usize::try_from(header_address(&console)).unwrap();
        let mut bytes = [0; 64];
        regions[0].mapping.copy_out(gpa, &mut bytes);
        DiskHeader::read(&bytes)
    }
}

fn wait_for_end(machine: &Machine) {
    let state = machine.wait(Some(PATIENCE));
    assert!(matches!(state, MachineState::Shutoff { .. }), "{state}");
}

#[test]
fn records_written_by_every_cache_mode_are_read_back_and_in_the_file() {
    if !have_kvm() {
        return;
    }
    for cache in [
        DiskCache::WriteBack,
        DiskCache::WriteThrough,
        DiskCache::None,
        DiskCache::DirectSync,
        DiskCache::Unsafe,
    ] {
        let bench = Bench::new(1);
        let disk = DiskSpec {
            cache,
            ..bench.disk_spec(&bench.disk)
        };
        let machine = match Machine::build(bench.spec("records=600 tick=40", disk, "console")) {
            // tmpfs of older kernels has no direct I/O.
            Err(MachineError::Disk { source, .. })
                if [DiskCache::None, DiskCache::DirectSync].contains(&cache) =>
            {
                common::skip("direct I/O", &source.to_string());
                continue;
            }
            machine => machine.unwrap(),
        };
        machine.start(false).unwrap();
        wait_for_end(&machine);
        bench.wait_line("console", "virtio: blk done records=600");
        let header = bench.header(machine.regions());
        assert_eq!((header.acknowledged, header.writing), (600, false));
        assert_eq!(header.check(&bench.disk), 0);
    }
}

#[test]
fn a_disk_is_locked_for_one_machine_and_the_refusal_names_it() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new(1);
    let machine = bench.start("", bench.disk_spec(&bench.disk));
    let second = bench.spec("", bench.disk_spec(&bench.disk), "second");
    let error = Machine::build(second).unwrap_err();
    let MachineError::Disk { source, .. } = &error else {
        panic!("{error:?}");
    };
    let text = source.to_string();
    assert!(text.contains("disk.raw is in use by process"), "{text}");
    drop(machine);
    let again = bench.start("records=4", bench.disk_spec(&bench.disk));
    wait_for_end(&again);
}

/// Takes a checkpoint, and copies the disk in its pause: the image must have the same disk.
fn checkpoint_with_disk(bench: &Bench, machine: &Arc<Machine>, protocol: Protocol) {
    let copied = Arc::new(Mutex::new(0_u32));
    let mut options = CheckpointOptions::default();
    options.protocol = protocol;
    options.pause_limit = Duration::from_secs(30);
    let (from, to, calls) = (bench.disk.clone(), bench.path("copy.raw"), copied.clone());
    options.at_pause = Some(Arc::new(move |_: &dyn Guest| {
        fs::copy(&from, &to).unwrap();
        *calls.lock().unwrap() += 1;
    }));
    let storage = Arc::new(FileStorage);
    let image = bench.path("image.lpi");
    let job = checkpoint::start(machine.clone(), storage, &image, options).unwrap();
    job.wait()
        .unwrap_or_else(|error| panic!("{protocol}: {error:?}"));
    // The guest has written on since the pause: the image has what was there then.
    let reader = ImageReader::open(&FileStorage, &image).unwrap();
    assert_eq!(reader.manifest().disks.len(), 1);
    let disk = File::create_new(bench.path("from-image.raw")).unwrap();
    disks::write(&reader, 0, &disk).unwrap();
    let read = |name: &str| fs::read(bench.path(name)).unwrap();
    assert!(read("from-image.raw") == read("copy.raw"), "{protocol}");
    reader.verify(2).unwrap();
    assert_eq!(*copied.lock().unwrap(), 1);
}

fn restore(bench: &Bench, image: &Path, disk: &Path) -> Machine {
    let reader = ImageReader::open(&FileStorage, image).unwrap();
    let spec = bench.spec("", bench.disk_spec(disk), "restored");
    let unfilled = Machine::build_for_restore(spec).unwrap();
    let fill = eager::FillOptions {
        threads: 2,
        memory_is_fresh: true,
    };
    eager::fill(&reader, unfilled.regions(), &fill).unwrap();
    unfilled.finish(reader.sections().unwrap()).unwrap()
}

#[test]
fn a_disk_and_the_memory_of_one_pause_fit_each_other_by_every_protocol() {
    if !have_kvm() {
        return;
    }
    let mut in_flight = 0;
    for (protocol, number) in Protocol::CAPTURING.into_iter().zip(1..) {
        let bench = Bench::new(16);
        let machine = bench.start("batch=16 tick=1000000", bench.disk_spec(&bench.disk));
        bench.wait_line("console", "virtio: blk ready");
        bench.wait_acknowledged(&machine, 64);
        std::thread::sleep(Duration::from_millis(37 * number));
        checkpoint_with_disk(&bench, &machine, protocol);
        // The guest goes on meanwhile, and then is gone.
        let last = bench.header(machine.regions()).acknowledged;
        bench.wait_acknowledged(&machine, last + 1);
        drop(machine);
        let restored = restore(
            &bench,
            &bench.path("image.lpi"),
            &bench.path("from-image.raw"),
        );
        let header = bench.header(restored.regions());
        assert!((64..=last).contains(&header.acknowledged));
        in_flight += header.check(&bench.path("from-image.raw"));
        restored.start(true).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(bench.header(restored.regions()), header, "started paused");
        restored.resume_by_user().unwrap();
        bench.wait_acknowledged(&restored, header.acknowledged + 200);
        restored.pause_by_user().unwrap();
        bench
            .header(restored.regions())
            .check(&bench.path("from-image.raw"));
    }
    println!("{in_flight} records were on their way");
}
