//! A machine whose `virtio` guest writes numbered records to its disk.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use livepoint::checkpoint::{self, CheckpointOptions, Protocol, Statistics};
use livepoint::guest::{Guest, MemoryRegion};
use livepoint::guests;
use livepoint::machine::spec::{
    BootSpec, DiskCache, DiskFormat, DiskSpec, MachineSpec, PciDevice, PciDeviceSpec,
    SerialBackend, SerialSpec, Source,
};
use livepoint::machine::{Machine, MachineError, MachineState};
use livepoint::restore::eager;
use livepoint::store::{FileStorage, ImageReader};

use super::records::{DiskHeader, header_address};
use super::wait_line;

pub const MIB: u64 = 1 << 20;
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A directory with a disk, and where the console of its machine goes.
pub struct DiskBench {
    dir: tempfile::TempDir,
    pub disk: PathBuf,
    pub format: DiskFormat,
}

impl DiskBench {
    /// Makes a raw disk of so many MiB.
    pub fn new(disk_mib: u64) -> Self {
        let bench = Self::without_disk("disk.raw", DiskFormat::Raw);
        let disk = File::create(&bench.disk).unwrap();
        disk.set_len(disk_mib * MIB).unwrap();
        bench
    }

    /// Makes the directory; the disk `name` in it is the caller's to make.
    pub fn without_disk(name: &str, format: DiskFormat) -> Self {
        Self::inside(&std::env::temp_dir(), name, format)
    }

    /// The same below another directory.
    pub fn inside(parent: &Path, name: &str, format: DiskFormat) -> Self {
        let dir = tempfile::tempdir_in(parent).unwrap();
        let disk = dir.path().join(name);
        Self { dir, disk, format }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn disk_spec(&self, disk: &Path) -> DiskSpec {
        DiskSpec {
            name: "vda".to_owned(),
            path: disk.to_owned(),
            format: self.format,
            read_only: false,
            serial: "LP-0001".to_owned(),
            cache: DiskCache::WriteBack,
            discard: true,
        }
    }

    pub fn spec(&self, cmdline: &str, disk: DiskSpec, console: &str) -> MachineSpec {
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

    pub fn start(&self, cmdline: &str, disk: DiskSpec) -> Arc<Machine> {
        let machine = Machine::build(self.spec(cmdline, disk, "console")).unwrap();
        machine.start(false).unwrap();
        Arc::new(machine)
    }

    pub fn wait_line(&self, console: &str, start: &str) -> String {
        wait_line(&self.path(console), PATIENCE, |line| {
            assert!(!line.contains("WRONG") && !line.contains("PANIC"), "{line}");
            line.starts_with(start)
        })
    }

    /// Waits until the guest's disk has so many records for good.
    pub fn wait_acknowledged(&self, machine: &Machine, count: u64) {
        let deadline = Instant::now() + PATIENCE;
        while self.header(machine.regions()).acknowledged < count {
            let console = || fs::read_to_string(self.path("restored")).unwrap_or_default();
            assert_eq!(machine.state(), MachineState::Running, "{}", console());
            assert!(Instant::now() < deadline, "the guest hangs");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn header(&self, regions: &[MemoryRegion]) -> DiskHeader {
        let console = fs::read_to_string(self.path("console")).unwrap();
        let gpa = usize::try_from(header_address(&console)).unwrap();
        let mut bytes = [0; 64];
        regions[0].mapping.copy_out(gpa, &mut bytes);
        DiskHeader::read(&bytes)
    }

    /// Takes a checkpoint to `image.lpi`, and calls `in_pause` in its pause.
    pub fn checkpoint(
        &self,
        machine: &Arc<Machine>,
        protocol: Protocol,
        in_pause: impl Fn(&dyn Guest) + Send + Sync + 'static,
    ) -> (ImageReader, Arc<Statistics>) {
        let called = Arc::new(AtomicU32::new(0));
        let mut options = CheckpointOptions::default();
        options.protocol = protocol;
        options.pause_limit = Duration::from_secs(30);
        let calls = called.clone();
        options.at_pause = Some(Arc::new(move |guest: &dyn Guest| {
            in_pause(guest);
            calls.fetch_add(1, Ordering::Relaxed);
        }));
        let image = self.path("image.lpi");
        let job = checkpoint::start(machine.clone(), Arc::new(FileStorage), &image, options);
        let report = job.unwrap().wait();
        let report = report.unwrap_or_else(|error| panic!("{protocol}: {error:?}"));
        assert_eq!(called.load(Ordering::Relaxed), 1);
        let reader = ImageReader::open(&FileStorage, &image).unwrap();
        assert_eq!(reader.manifest().disks.len(), 1);
        reader.verify(2).unwrap();
        (reader, report.statistics)
    }

    /// Restores `image.lpi` with its disk at `disk`; the console is `restored`.
    pub fn restore(&self, disk: &Path) -> Machine {
        let reader = ImageReader::open(&FileStorage, &self.path("image.lpi")).unwrap();
        let spec = self.spec("", self.disk_spec(disk), "restored");
        let unfilled = Machine::build_for_restore(spec).unwrap();
        let fill = eager::FillOptions {
            threads: 2,
            memory_is_fresh: true,
        };
        eager::fill(&reader, unfilled.regions(), &fill).unwrap();
        unfilled.finish(reader.sections().unwrap()).unwrap()
    }
}

pub fn wait_for_end(machine: &Machine) {
    let state = machine.wait(Some(PATIENCE));
    assert!(matches!(state, MachineState::Shutoff { .. }), "{state}");
}

/// Has the guest write and read back its records by each cache mode, on a disk of its own; `look`
/// then sees what is on the disk of the machine that is gone.
pub fn run_every_cache_mode(
    make: impl Fn() -> DiskBench,
    look: impl Fn(&DiskBench, &DiskHeader, DiskCache),
) {
    for cache in [
        DiskCache::WriteBack,
        DiskCache::WriteThrough,
        DiskCache::None,
        DiskCache::DirectSync,
        DiskCache::Unsafe,
    ] {
        let bench = make();
        let disk = DiskSpec {
            cache,
            ..bench.disk_spec(&bench.disk)
        };
        let machine = match Machine::build(bench.spec("records=600 tick=40", disk, "console")) {
            // tmpfs of older kernels has no direct I/O.
            Err(MachineError::Disk { source, .. })
                if [DiskCache::None, DiskCache::DirectSync].contains(&cache) =>
            {
                super::skip("direct I/O", &source.to_string());
                continue;
            }
            machine => machine.unwrap(),
        };
        machine.start(false).unwrap();
        wait_for_end(&machine);
        bench.wait_line("console", "virtio: blk done records=600");
        let header = bench.header(machine.regions());
        assert_eq!((header.acknowledged, header.writing), (600, false));
        drop(machine);
        look(&bench, &header, cache);
    }
}
