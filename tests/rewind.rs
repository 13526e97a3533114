//! A running domain that is put back to an image is what it was then, and goes on from there.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use common::memory::read_page;
use common::pagewriter::assert_single_moment;
use common::{Random, have_kvm, long, machine_memory, wait_line};
use livepoint::guest::MemoryRegion;
use livepoint::guests;
use livepoint::host::{
    BuiltinKernel, CheckpointRequest, Domain, DomainOptions, ErrorCode, Image, MachineState,
    Protocol, RuntimeDir,
};
use livepoint::page::{PAGE_BYTES, PIECE_BYTES};
use livepoint::restore::eager;
use livepoint::store::{Codec, FileStorage, ImageReader};

const PATIENCE: Duration = Duration::from_secs(120);

/// Frames that a machine gets anew when it is put back: its generation id and its UUID.
const IDENTITY: [u64; 2] = [0xef, 0xf0];

struct Bench {
    dir: tempfile::TempDir,
    images: PathBuf,
    console: PathBuf,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let images = dir.path().join("images");
        fs::create_dir(&images).unwrap();
        let console = dir.path().join("console");
        Self {
            images,
            console,
            dir,
        }
    }

    fn define(&self, name: &str, guest: &str, mib: u64, vcpus: u32, cmdline: &str) -> Domain {
        self.define_with(name, guest, mib, vcpus, cmdline, "")
    }

    fn define_with(
        &self,
        name: &str,
        guest: &str,
        mib: u64,
        vcpus: u32,
        cmdline: &str,
        device: &str,
    ) -> Domain {
        let console = self.console.display();
        let xml = format!(
            "<domain type='kvm'><name>{name}</name><memory unit='MiB'>{mib}</memory>\
             <vcpu>{vcpus}</vcpu><os><type arch='x86_64'>hvm</type>\
             <kernel>builtin:{guest}</kernel><cmdline>{cmdline}</cmdline></os>\
             <devices><serial type='file'><source path='{console}' append='on'/>\
             <target port='0'/></serial>{device}<memballoon model='none'/></devices></domain>"
        );
        let runtime = RuntimeDir::at(self.dir.path().join("run")).unwrap();
        let mut options = DomainOptions::new(runtime);
        options.builtin_kernels = guests::ALL
            .iter()
            .map(|guest| BuiltinKernel {
                name: guest.name,
                elf: guest.elf,
            })
            .collect();
        Domain::define(&xml, options).unwrap()
    }

    fn pagewriter(&self, working_set_percent: u32) -> Domain {
        self.pagewriter_with(working_set_percent, "")
    }

    fn pagewriter_with(&self, working_set_percent: u32, device: &str) -> Domain {
        let cmdline = format!(
            "ws_percent={working_set_percent} vcpus=2 pages=2m pattern=random write=page \
             fill=incompressible tick_ms=0"
        );
        let domain = self.define_with("back", "pagewriter", 64, 2, &cmdline, device);
        domain.start(false).unwrap();
        wait_line(&self.console, PATIENCE, |line| {
            line.starts_with("pagewriter: ready")
        });
        domain
    }
}

fn save(domain: &Domain, protocol: Protocol, out: &Path, incremental: bool) -> PathBuf {
    let mut request = CheckpointRequest::new(protocol);
    request.out = Some(out.to_owned());
    request.codec = Codec::None;
    request.durable = false;
    request.incremental = incremental;
    let job = domain.start_checkpoint(&request).unwrap();
    job.wait().unwrap().image
}

fn memory_of(image: &Path) -> Vec<MemoryRegion> {
    let reader = ImageReader::open(&FileStorage, image).unwrap();
    let regions = machine_memory(&reader.manifest().regions, 0);
    eager::fill(&reader, &regions, &eager::FillOptions::default()).unwrap();
    regions
}

/// Fails at the first page, but for those of `except`, that the images do not have alike.
fn assert_same(got: &Path, want: &Path, except: &[u64]) {
    let (got, want) = (memory_of(got), memory_of(want));
    let (mut a, mut b) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
    for (got, want) in got.iter().zip(&want) {
        for offset in (0..want.mapping.len()).step_by(PIECE_BYTES) {
            let len = PIECE_BYTES.min(want.mapping.len() - offset);
            got.mapping.copy_out(offset, &mut a[..len]);
            want.mapping.copy_out(offset, &mut b[..len]);
            let first = want.start.0 + (offset / PAGE_BYTES) as u64;
            let pages = a[..len].chunks(PAGE_BYTES).zip(b.chunks(PAGE_BYTES));
            for (gfn, (a, b)) in (first..).zip(pages) {
                assert!(a == b || except.contains(&gfn), "page {gfn:#x} is another");
            }
        }
    }
}

/// Puts the domain, which is paused, back to `to`, and compares its memory with the image's, page by
/// page; then lets it run a little, and has its next increment compared with all of its memory.
fn check(bench: &Bench, domain: &Domain, to: &Path, tracked: bool) {
    domain.pause().unwrap();
    let summary = domain.rewind(Some(to)).unwrap();
    assert_eq!(domain.state(), MachineState::Paused);
    assert_eq!(summary.pages < summary.memory_pages, tracked, "{summary:?}");
    let now = save(domain, Protocol::Stop, &bench.images, tracked);
    assert_same(&now, to, &IDENTITY);
    let memory = memory_of(&now);
    let seen = assert_single_moment(|gpa, out| read_page(&memory, gpa, out), 7);
    assert!(seen.working_set_pages > 0, "{seen:?}");
    domain.resume().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    if tracked {
        let next = save(domain, Protocol::Threaded, &bench.images, true);
        let reader = ImageReader::open(&FileStorage, &next).unwrap();
        assert!(reader.layer_paths().count() > 0, "it is an increment");
        let memory = memory_of(&next);
        assert_single_moment(|gpa, out| read_page(&memory, gpa, out), 7);
    }
}

#[test]
fn a_domain_put_back_has_exactly_the_memory_of_the_image() {
    if !have_kvm() {
        return;
    }
    let rounds = if long() { 10 } else { 1 };
    for round in 0..rounds {
        let bench = Bench::new();
        let domain = bench.pagewriter([30, 10, 50][round % 3]);
        let mut images = Vec::new();
        for protocol in Protocol::CAPTURING {
            std::thread::sleep(Duration::from_millis(15));
            images.push(save(&domain, protocol, &bench.images, true));
        }
        // The last one, one of its ancestors, forward again to a descendant, and the first.
        for at in [3, 1, 2, 0] {
            check(&bench, &domain, &images[at], true);
        }
        // To one of a branch that the guest left.
        check(&bench, &domain, &images[3], true);
        domain.destroy().unwrap();
    }
}

#[test]
fn memory_in_two_slots_is_put_back_across_the_place_where_they_touch() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    // The working set ends beyond the 256 MiB of the first slot.
    let cmdline = "ws_percent=85 vcpus=2 pages=2m pattern=random write=page rate=64M \
                   fill=incompressible tick_ms=0";
    let domain = bench.define("back", "pagewriter", 320, 2, cmdline);
    domain.start(false).unwrap();
    wait_line(&bench.console, PATIENCE, |line| {
        line.starts_with("pagewriter: ready")
    });
    let mut images = Vec::new();
    for protocol in [Protocol::Cow, Protocol::Threaded] {
        std::thread::sleep(Duration::from_millis(100));
        images.push(save(&domain, protocol, &bench.images, true));
    }
    for at in [1, 0] {
        check(&bench, &domain, &images[at], true);
    }
    domain.destroy().unwrap();
}

#[test]
fn increments_after_a_rewind_have_all_that_the_guest_wrote() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    let whole = bench.dir.path().join("whole");
    fs::create_dir(&whole).unwrap();
    let domain = bench.pagewriter(20);
    let first = save(&domain, Protocol::Cow, &bench.images, true);
    for protocol in Protocol::CAPTURING {
        save(&domain, protocol, &bench.images, true);
        domain.rewind(None).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        domain.rewind(Some(&first)).unwrap();
        std::thread::sleep(Duration::from_millis(10));
        domain.pause().unwrap();
        // The first continues the image that it was put back to; the second does without the log.
        let increment = save(&domain, protocol, &bench.images, true);
        let all = save(&domain, Protocol::Stop, &whole, false);
        assert_same(&increment, &all, &[]);
        domain.resume().unwrap();
        save(&domain, protocol, &bench.images, true);
    }
    domain.destroy().unwrap();
}

#[test]
fn a_domain_that_is_not_tracked_gets_all_of_its_memory_back() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    let domain = bench.pagewriter(10);
    let image = save(&domain, Protocol::Threaded, &bench.images, false);
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(20));
        check(&bench, &domain, &image, false);
    }
    let error = domain.rewind(None).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Invalid, "{error}");
    domain.destroy().unwrap();
}

#[test]
fn a_computation_that_is_put_back_at_random_moments_finishes_and_verifies() {
    if !have_kvm() {
        return;
    }
    let rewinds = if long() { 20 } else { 3 };
    let bench = Bench::new();
    let domain = bench.define("npb", "npb", 128, 1, "kernel=mg class=W repeat=48");
    domain.start(false).unwrap();
    wait_line(&bench.console, PATIENCE, |line| line.contains(" ready "));
    let mut random = Random::new(7);
    let mut images = vec![save(&domain, Protocol::Cow, &bench.images, true)];
    for turn in 0..rewinds {
        std::thread::sleep(Duration::from_millis(random.below(60)));
        // Most go back to the last image, some to an earlier one, and some to a new one's parent.
        let to = match random.below(4) {
            0 => Some(random.below(images.len() as u64)),
            1 => {
                images.push(save(&domain, Protocol::Threaded, &bench.images, true));
                Some(images.len() as u64 - 2)
            }
            _ => None,
        };
        let to = to.map(|at| images[usize::try_from(at).unwrap()].as_path());
        let summary = domain
            .rewind(to)
            .unwrap_or_else(|error| panic!("rewind {turn}: {}", error.full_message()));
        assert!(summary.pages < summary.memory_pages, "{summary:?}");
    }
    assert!(domain.wait_timeout(Some(PATIENCE)).unwrap().is_some());
    let said = fs::read_to_string(&bench.console).unwrap();
    assert!(said.contains("npb: done runs=48 failed=0"), "{said}");
    assert!(!said.contains("UNSUCCESSFUL"), "{said}");
}

#[test]
fn what_cannot_be_put_back_is_refused_and_the_domain_goes_on() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    let domain = bench.pagewriter(10);
    let image = save(&domain, Protocol::Stop, &bench.images, true);
    let refused = |to: &Path, code: ErrorCode, words: &str| {
        let error = domain.rewind(Some(to)).unwrap_err();
        let said = error.full_message();
        assert_eq!(error.code(), code, "{said}");
        assert!(said.contains(words), "{said}");
        assert_eq!(domain.state(), MachineState::Running);
    };
    refused(Path::new("relative"), ErrorCode::Invalid, "absolute");
    refused(Path::new("/nowhere.lpi"), ErrorCode::NotFound, "nowhere");
    // Of another domain.
    let other = Bench::new();
    let stranger = other.pagewriter(10);
    let foreign = save(&stranger, Protocol::Stop, &other.images, false);
    stranger.destroy().unwrap();
    refused(&foreign, ErrorCode::Invalid, "another domain");
    // A flipped bit in memory that has to come back: named before anything has changed.
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(&image)
        .unwrap();
    let mut flipped = Vec::new();
    for offset in (4096..48 << 20).step_by(PAGE_BYTES) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], offset).unwrap();
        flipped.push((offset, byte));
    }
    std::thread::sleep(Duration::from_millis(20));
    refused(&image, ErrorCode::Corrupt, "chunk");
    for (offset, byte) in flipped {
        file.write_all_at(&byte, offset).unwrap();
    }
    Image::open(&image).unwrap().verify().unwrap();
    // What it wrote is tracked still: its next increment has it.
    let next = save(&domain, Protocol::Threaded, &bench.images, true);
    let memory = memory_of(&next);
    assert_single_moment(|gpa, out| read_page(&memory, gpa, out), 7);
    domain.rewind(Some(&image)).unwrap();
    domain.destroy().unwrap();
    let error = domain.rewind(Some(&image)).unwrap_err();
    assert_eq!(error.code(), ErrorCode::State, "{error}");
}

/// Returns a disk of 4 MiB, as the domain's document has it.
fn disk(path: &Path, more: &str) -> String {
    fs::File::create(path).unwrap().set_len(4 << 20).unwrap();
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='{}'/>\
         <target dev='vda' bus='virtio'/>{more}</disk>",
        path.display()
    )
}

#[test]
fn a_disk_that_the_guest_writes_is_refused_by_name_and_stays_as_it_is() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    let file = bench.dir.path().join("disk.raw");
    let domain = bench.pagewriter_with(10, &disk(&file, ""));
    let image = save(&domain, Protocol::Stop, &bench.images, true);
    for to in [None, Some(image.as_path())] {
        let error = domain.rewind(to).unwrap_err();
        assert_eq!(error.code(), ErrorCode::Unsupported, "{error}");
        assert!(error.to_string().contains("disk"), "{error}");
        assert!(error.to_string().contains("vda"), "{error}");
        assert_eq!(domain.state(), MachineState::Running);
    }
    // What it wrote is tracked still, and its next increment has it.
    let next = save(&domain, Protocol::Threaded, &bench.images, true);
    let memory = memory_of(&next);
    assert_single_moment(|gpa, out| read_page(&memory, gpa, out), 7);
    domain.destroy().unwrap();
}

#[test]
fn a_disk_that_is_only_read_must_be_what_it_was() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    let file = bench.dir.path().join("disk.raw");
    let domain = bench.pagewriter_with(10, &disk(&file, "<readonly/>"));
    let image = save(&domain, Protocol::Cow, &bench.images, true);
    std::thread::sleep(Duration::from_millis(20));
    check(&bench, &domain, &image, true);
    let changed = fs::File::options().write(true).open(&file).unwrap();
    changed.write_all_at(b"other", 512).unwrap();
    // Also where the clock of files is coarse.
    let later = std::time::SystemTime::now() + Duration::from_secs(5);
    changed.set_modified(later).unwrap();
    let error = domain.rewind(Some(&image)).unwrap_err();
    assert_eq!(error.code(), ErrorCode::Invalid, "{error}");
    assert!(error.to_string().contains("disk vda"), "{error}");
    assert_eq!(domain.state(), MachineState::Running);
    domain.destroy().unwrap();
}
