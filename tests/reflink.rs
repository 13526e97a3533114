//! Disks on a file system that lets files share their blocks: XFS, on a loop device of the test's own.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::disk_bench::{DiskBench, MIB};
use common::have_kvm;
use common::livepointd::Daemon;
use livepoint::checkpoint::{DiskMethod, Protocol};
use livepoint::guest::{Guest as _, GuestDisk as _};
use livepoint::machine::spec::DiskFormat;
use livepoint::machine::virtio::blk::Disk;
use livepoint::qcow2::Qcow2Format;
use livepoint::restore::disks;

/// Longest that a mount, or the making of a file system, may take.
const MOUNT_SECONDS: &str = "60";

/// XFS in a file, mounted for as long as this lives.
struct Mounted {
    dir: tempfile::TempDir,
}

impl Mounted {
    /// Returns `None`, counted as skipped, where nothing can be mounted here.
    fn new(test: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("xfs.img");
        File::create(&image).unwrap().set_len(512 << 20).unwrap();
        let made = Command::new("timeout")
            .args([MOUNT_SECONDS, "mkfs.xfs", "-q", "-m", "reflink=1"])
            .arg(&image)
            .status();
        let made = made.unwrap();
        assert!(made.success(), "mkfs.xfs, of the package xfsprogs: {made}");
        let at = dir.path().join("mounted");
        fs::create_dir(&at).unwrap();
        let mounted = Command::new("timeout")
            .args([MOUNT_SECONDS, "mount", "-o", "loop"])
            .args([&image, &at])
            .stderr(Stdio::piped())
            .output()
            .unwrap();
        if mounted.status.success() {
            return Some(Self { dir });
        }
        let said = String::from_utf8_lossy(&mounted.stderr);
        common::skip(test, &format!("no loop mount: {}", said.trim()));
        None
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("mounted")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // What is still open goes with the process.
        drop(Command::new("umount").arg("-l").arg(self.path()).status());
    }
}

/// Returns whether a file shares blocks with another.
fn is_shared(path: &Path) -> bool {
    let output = Command::new("filefrag").arg("-v").arg(path).output();
    let output = output.expect("filefrag, of the Debian package e2fsprogs");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).contains("shared")
}

/// Reads a disk as the engine does.
fn copy_disk(disk: &Disk, to: &Path) {
    let mut all = vec![0; usize::try_from(disk.facts().bytes).unwrap()];
    disk.read_at(&mut all, 0).unwrap();
    fs::write(to, all).unwrap();
}

#[test]
fn a_disk_is_frozen_at_the_pause_and_a_restored_one_shares_the_images_blocks() {
    if !have_kvm() {
        return;
    }
    let Some(xfs) = Mounted::new("a disk on XFS") else {
        return;
    };
    let formats = [DiskFormat::Raw, DiskFormat::Image(&Qcow2Format)];
    for (protocol, format) in Protocol::CAPTURING
        .into_iter()
        .zip(formats.into_iter().cycle())
    {
        let bench = DiskBench::inside(&xfs.path(), "disk", format);
        let file = File::create_new(&bench.disk).unwrap();
        match format {
            DiskFormat::Raw => file.set_len(16 * MIB).unwrap(),
            DiskFormat::Image(format) => {
                let mut options = File::options();
                let file = options.read(true).write(true).open(&bench.disk).unwrap();
                drop(format.create(file, &bench.disk, 16 * MIB, None).unwrap());
            }
        }
        let machine = bench.start("batch=16 tick=1000000", bench.disk_spec(&bench.disk));
        bench.wait_line("console", "virtio: blk ready");
        bench.wait_acknowledged(&machine, 64);
        let (disk, copy) = (machine.disks()[0].clone(), bench.path("copy.raw"));
        let (reader, statistics) = bench.checkpoint(&machine, protocol, move |_| {
            copy_disk(&disk, &copy);
        });
        assert_eq!(
            statistics.disks[0].method,
            DiskMethod::Reflink,
            "{protocol}"
        );
        // The guest went on, and the image has what was there in the pause.
        let last = bench.header(machine.regions()).acknowledged;
        bench.wait_acknowledged(&machine, last + 64);
        let path = bench.path("from-image.raw");
        let restored = File::create_new(&path).unwrap();
        disks::write(&reader, 0, &restored).unwrap();
        let read = |name: &str| fs::read(bench.path(name)).unwrap();
        assert!(read("from-image.raw") == read("copy.raw"), "{protocol}");
        assert!(is_shared(&path), "{protocol}");
        // What is written to it is not in the image.
        restored.write_all_at(&[0x55; 4096], 0).unwrap();
        reader.verify(2).unwrap();
        drop(machine);
        // Nothing is left of what the disk was frozen in.
        let names = fs::read_dir(bench.path(".")).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        let expected = ["console", "copy.raw", "disk", "from-image.raw", "image.lpi"];
        assert_eq!(names, expected);
    }
}

/// Has a domain's own process write an image, and returns how it captured the domain's disk.
fn method_of_checkpoint(daemon: &Daemon, image: &Path) -> String {
    let run = |method: &str, arguments: serde_json::Value| {
        let command = serde_json::json!({ "execute": method, "arguments": arguments });
        let answer = daemon.ok(&["qemu-monitor-command", "d", &command.to_string()]);
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        assert_eq!(answer.get("error"), None, "{}", daemon.log());
        answer["return"].clone()
    };
    let arguments = serde_json::json!({ "protocol": "threaded", "out": image });
    let started = run("livepoint-checkpoint", arguments);
    let done = run("livepoint-job-wait", started);
    let method = done["statistics"]["disks"][0]["method"].as_str();
    method.unwrap_or_else(|| panic!("{done}")).to_owned()
}

#[test]
fn a_confined_process_freezes_its_disks_too() {
    if !have_kvm() {
        return;
    }
    let Some(xfs) = Mounted::new("disks of a confined process on XFS") else {
        return;
    };
    for (format, disk) in [("raw", "d.raw"), ("qcow2", "d.qcow2")] {
        let disk = xfs.path().join(disk);
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", format])
            .arg(&disk)
            .arg("16M")
            .status();
        assert!(made.expect("qemu-img").success());
        // Confined as daemons do it by default, with no right to the disk's directory.
        let images = tempfile::tempdir().unwrap();
        let daemon = Daemon::with(&["--image-dir", images.path().to_str().unwrap()]);
        let devices = format!(
            "<disk type='file' device='disk'><driver name='qemu' type='{format}'/>\
             <source file='{}'/><target dev='vda' bus='virtio'/></disk><serial type='null'/>",
            disk.display(),
        );
        let file = daemon.domain("d", "virtio batch=16", 64, &devices);
        daemon.ok(&["define", file.to_str().unwrap()]);
        daemon.ok(&["start", "d"]);
        // Each takes the room that the one before it gave back.
        for number in 0..2 {
            let image = images.path().join(format!("{number}.lpi"));
            assert_eq!(method_of_checkpoint(&daemon, &image), "reflink", "{format}");
            assert!(image.exists());
        }
        daemon.ok(&["destroy", "d"]);
    }
}
