//! Disks in qcow2 images on KVM, and what QEMU's tools say of them.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::disk_bench::{self, DiskBench, MIB, PATIENCE};
use common::records::newest;
use common::victim::livepoint;
use common::{Random, have_kvm, whole_lines};
use livepoint::checkpoint::Protocol;
use livepoint::guest::{Guest, GuestDisk, ImageFormat as _};
use livepoint::machine::spec::{DiskFormat, DiskSpec};
use livepoint::machine::virtio::blk::Disk;

use livepoint::qcow2::Qcow2Format;
use livepoint::restore::disks;
use livepoint::store::{FileStorage, ImageReader};
use serde_json::Value;

/// Runs QEMU's tool, which must be content.
fn qemu_img(args: &[&dyn AsRef<OsStr>]) -> Output {
    let mut command = Command::new("qemu-img");
    args.iter().for_each(|arg| {
        command.arg(arg);
    });
    let output = command
        .output()
        .expect("qemu-img, of the Debian package qemu-utils");
    assert!(output.status.success(), "{command:?}: {output:?}");
    output
}

fn create(path: &Path, size: &str) {
    qemu_img(&[&"create", &"-q", &"-f", &"qcow2", &path, &size]);
}

/// Nothing is wrong, and nothing is lost.
fn check(path: &Path) {
    qemu_img(&[&"check", &"-q", &"-f", &"qcow2", &path]);
}

/// Both have the same disk, as QEMU sees them.
fn assert_same_disk(one: (&str, &Path), other: (&str, &Path)) {
    let args: [&dyn AsRef<OsStr>; 7] =
        [&"compare", &"-f", &one.0, &"-F", &other.0, &one.1, &other.1];
    qemu_img(&args);
}

/// Returns the disk as a raw file.
fn as_raw(path: &Path) -> PathBuf {
    let raw = path.with_extension("converted");
    qemu_img(&[&"convert", &"-f", &"qcow2", &"-O", &"raw", &path, &raw]);
    raw
}

fn bench(size: &str) -> DiskBench {
    let bench = DiskBench::without_disk("disk.qcow2", DiskFormat::Image(&Qcow2Format));
    create(&bench.disk, size);
    bench
}

/// Reads a disk as the engine does.
fn copy_disk(disk: &dyn GuestDisk, to: &Path) {
    let bytes = disk.facts().bytes;
    let mut all = vec![0; usize::try_from(bytes).unwrap()];
    for (piece, number) in all.chunks_mut(1 << 20).zip(0..) {
        disk.read_at(piece, number << 20).unwrap();
    }
    fs::write(to, all).unwrap();
}

#[test]
fn records_in_an_image_are_there_by_every_cache_mode() {
    if !have_kvm() {
        return;
    }
    disk_bench::run_every_cache_mode(
        || bench("1M"),
        |bench, header, cache| {
            check(&bench.disk);
            assert_eq!(header.check(&as_raw(&bench.disk)), 0, "{cache:?}");
        },
    );
}

#[test]
fn what_the_guest_flushed_is_in_the_image_of_a_process_that_was_killed() {
    if !have_kvm() {
        return;
    }
    let bench = bench("1M");
    let mut guest = Process::run(&bench, "tick=8");
    // What it says is flushed.
    bench.wait_line("console", "virtio: blk record=512 ");
    guest.kill();
    let text = fs::read_to_string(bench.path("console")).unwrap();
    let mut said = whole_lines(&text)
        .lines()
        .filter_map(|line| line.strip_prefix("virtio: blk record="));
    let last: u64 = said
        .next_back()
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap();
    // Room that nobody uses is no error.
    let checked = Command::new("qemu-img")
        .args(["check", "-q", "-f", "qcow2"])
        .arg(&bench.disk)
        .status()
        .unwrap();
    assert!([Some(0), Some(3)].contains(&checked.code()), "{checked}");
    let newest = newest(&as_raw(&bench.disk));
    assert!(newest >= last, "{newest} of {last}");
}

#[test]
fn an_image_and_the_memory_of_one_pause_fit_each_other_by_every_protocol() {
    if !have_kvm() {
        return;
    }
    for (protocol, number) in Protocol::CAPTURING.into_iter().zip(1..) {
        let bench = bench("16M");
        let machine = bench.start("batch=16 tick=1000000", bench.disk_spec(&bench.disk));
        bench.wait_line("console", "virtio: blk ready");
        bench.wait_acknowledged(&machine, 64);
        std::thread::sleep(Duration::from_millis(37 * number));
        let disk = machine.disks()[0].clone();
        let paths = ["disk.qcow2", "copy.qcow2", "copy.raw"].map(|name| bench.path(name));
        let (reader, _) = bench.checkpoint(&machine, protocol, move |_: &dyn Guest| {
            copy_disk(&*disk, &paths[2]);
            // What QEMU sees of the file itself, when nothing is in memory only.
            disk.flush().unwrap();
            fs::copy(&paths[0], &paths[1]).unwrap();
        });
        let raw = File::create_new(bench.path("from-image.raw")).unwrap();
        disks::write(&reader, 0, &raw).unwrap();
        let read = |name: &str| fs::read(bench.path(name)).unwrap();
        assert!(read("from-image.raw") == read("copy.raw"), "{protocol}");
        let copy = bench.path("copy.qcow2");
        check(&copy);
        assert_same_disk(("qcow2", &copy), ("raw", &bench.path("from-image.raw")));
        let restored_disk = bench.path("restored.qcow2");
        let mut options = File::options();
        options.read(true).write(true).create_new(true);
        let file = options.open(&restored_disk).unwrap();
        let image = Qcow2Format
            .create(file, &restored_disk, 16 * MIB, None)
            .unwrap();
        disks::write_image(&reader, 0, &*image).unwrap();
        drop(image);
        check(&restored_disk);
        assert_same_disk(("qcow2", &copy), ("qcow2", &restored_disk));
        let last = bench.header(machine.regions()).acknowledged;
        bench.wait_acknowledged(&machine, last + 1);
        machine.pause_by_user().unwrap();
        let header = bench.header(machine.regions());
        drop(machine);
        check(&bench.disk);
        header.check(&as_raw(&bench.disk));
        runs_on(&bench, &restored_disk, last);
    }
}

/// Restores the machine with its disk; both fit each other, and the guest goes on.
fn runs_on(bench: &DiskBench, disk: &Path, last: u64) {
    let restored = bench.restore(disk);
    let header = bench.header(restored.regions());
    assert!((64..=last).contains(&header.acknowledged));
    header.check(&as_raw(disk));
    restored.start(false).unwrap();
    bench.wait_acknowledged(&restored, header.acknowledged + 200);
    restored.pause_by_user().unwrap();
    let header = bench.header(restored.regions());
    drop(restored);
    check(disk);
    header.check(&as_raw(disk));
}

/// A domain in a process of its own, which ends with this.
struct Process(Child);

impl Process {
    /// Runs the guest; it prints to `console`.
    fn run(bench: &DiskBench, cmdline: &str) -> Self {
        let xml = bench.path("domain.xml");
        fs::write(&xml, domain_xml(&bench.disk, cmdline)).unwrap();
        let console = File::create(bench.path("console")).unwrap();
        let mut command = livepoint(&bench.path("run"));
        command.arg("run").arg(xml).stdout(console);
        Self(command.spawn().unwrap())
    }

    /// Restores an image, and does not let the guest run; its disk is there on return.
    fn restore(bench: &DiskBench, image: &str, args: &[&OsStr]) -> Self {
        let mut command = livepoint(&bench.path("run"));
        command.args(["restore", "--paused"]).args(args).arg(image);
        let mut restored = Self(command.stdout(Stdio::null()).spawn().unwrap());
        let began = Instant::now();
        while json(bench, &["list"]).as_array().is_none_or(Vec::is_empty) {
            assert!(restored.0.try_wait().unwrap().is_none(), "it has ended");
            assert!(began.elapsed() < PATIENCE, "it does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
        restored
    }

    fn kill(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn domain_xml(disk: &Path, cmdline: &str) -> String {
    format!(
        "<domain type='kvm'><name>victim</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64'>hvm</type><kernel>builtin:virtio</kernel>\
         <cmdline>{cmdline}</cmdline></os>\
         <devices><disk type='file' device='disk'><driver name='qemu' type='qcow2'/>\
         <source file='{}'/><target dev='vda' bus='virtio'/></disk>\
         <serial type='stdio'><target port='0'/></serial><memballoon model='none'/></devices>\
         </domain>",
        disk.display()
    )
}

/// Runs the command, which must be content.
fn json(bench: &DiskBench, args: &[&str]) -> Value {
    let output = livepoint(&bench.path("run"))
        .arg("--json")
        .args(args)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{args:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap_or_default()
}

/// Returns which file an image is based on.
fn backing_of(path: &Path) -> Option<String> {
    let output = qemu_img(&[&"info", &"--output=json", &path]);
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    info["backing-filename"].as_str().map(str::to_owned)
}

#[test]
fn a_restore_puts_an_image_back_on_its_base_or_makes_one_that_needs_none() {
    if !have_kvm() {
        return;
    }
    let bench = DiskBench::without_disk("disk.qcow2", DiskFormat::Image(&Qcow2Format));
    // The guest uses the first half; the other is in the base alone.
    let base = bench.path("base.raw");
    let mut random = Random::new(7);
    let mut content = vec![0_u8; 4 << 20];
    content[2 << 20..].fill_with(|| random.next().to_le_bytes()[0]);
    fs::write(&base, &content).unwrap();
    qemu_img(&[
        &"create",
        &"-q",
        &"-f",
        &"qcow2",
        &"-F",
        &"raw",
        &"-b",
        &"base.raw",
        &bench.disk,
    ]);
    let mut guest = Process::run(&bench, "places=512 tick=64");
    bench.wait_line("console", "virtio: blk record=512 ");
    // Nobody writes to what others are based on.
    let writable = DiskSpec {
        format: DiskFormat::Raw,
        ..bench.disk_spec(&base)
    };
    let error = Disk::open(&writable).unwrap_err().to_string();
    assert!(error.contains("base.raw is in use by process"), "{error}");
    let image = bench.path("image.lpi");
    let image = image.to_str().unwrap();
    json(&bench, &["checkpoint", "victim", "--out", image]);
    guest.kill();
    let raw = bench.path("image.raw");
    let reader = ImageReader::open(&FileStorage, Path::new(image)).unwrap();
    disks::write(&reader, 0, &File::create_new(&raw).unwrap()).unwrap();
    let new = bench.path("new");
    fs::create_dir(&new).unwrap();
    let as_new: [&OsStr; 2] = ["--disks".as_ref(), new.as_ref()];
    // In place, what was written since is lost.
    for (args, disk, on) in [
        (&as_new[..0], bench.disk.clone(), Some("base.raw")),
        (&as_new[..], new.join("vda.qcow2"), None),
    ] {
        let mut restored = Process::restore(&bench, image, args);
        restored.kill();
        check(&disk);
        assert_eq!(backing_of(&disk).as_deref(), on);
        assert_same_disk(("qcow2", &disk), ("raw", &raw));
        let is_small = fs::metadata(&disk).unwrap().len() < 3 * MIB;
        assert_eq!(is_small, on.is_some(), "only what differs from the base");
    }
    assert!(fs::read(&base).unwrap() == content, "never written");
}

#[test]
fn a_domain_whose_image_is_damaged_does_not_start_and_the_error_names_it() {
    if !have_kvm() {
        return;
    }
    let bench = bench("1M");
    let xml = bench.path("domain.xml");
    fs::write(&xml, domain_xml(&bench.disk, "")).unwrap();
    let mut bytes = fs::read(&bench.disk).unwrap();
    // The place of its L1 table.
    bytes[40..48].copy_from_slice(&u64::MAX.to_be_bytes());
    fs::write(&bench.disk, bytes).unwrap();
    let output = livepoint(&bench.path("run"))
        .arg("run")
        .arg(&xml)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && !errors.contains("panicked"),
        "{errors}"
    );
    assert!(
        errors.contains("disk.qcow2") && errors.contains("L1 table"),
        "{errors}"
    );
}
