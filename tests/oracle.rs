//! The oracle on KVM: a live checkpoint restores to exactly the memory of its pause.
//!
//! The page writer runs at full speed; in the pause of each checkpoint the test copies all of
//! memory for itself. The image, restored into fresh memory, must equal that copy page by page,
//! and must by the guest's own page numbers be of a single moment.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::machines::pagewriter_spec;
use common::memory::{assert_same_memory, copy_at_pause, read_page, shadow};
use common::pagewriter::assert_single_moment;
use common::{have_kvm, long, wait_line};
use livepoint::checkpoint::{self, CheckpointOptions, Protocol, Workspace};
use livepoint::guest::{Guest, MemoryRegion};
use livepoint::machine::Machine;
use livepoint::machine::spec::BackingSpec;
use livepoint::restore::eager;
use livepoint::store::{Codec, FileStorage, ImageReader};
use livepoint::sys::anon;

const MIB: u64 = 1 << 20;

/// A guest that checkpoints are taken of.
#[derive(Clone, Copy, Debug)]
struct Case {
    memory_mib: u64,
    working_set_percent: u32,
    vcpus: u32,
    pages: &'static str,
    backing: BackingSpec,
}

const HUGETLB: BackingSpec = BackingSpec::Hugetlb {
    page_bytes: 2 << 20,
};

const CODECS: [Codec; 3] = [Codec::None, Codec::Lz4, Codec::Zstd { level: 1 }];

fn protocols() -> impl Iterator<Item = Protocol> {
    Protocol::CAPTURING.into_iter()
}

/// Every case of the long form: of the larger memory only what the smaller one cannot show.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for backing in [
        BackingSpec::Anonymous,
        BackingSpec::AnonymousSmallPages,
        HUGETLB,
        BackingSpec::Memfd,
    ] {
        for memory_mib in [512, 1024] {
            for working_set_percent in [10, 50, 90] {
                for vcpus in [1, 2] {
                    for pages in ["2m", "4k"] {
                        cases.push(Case {
                            memory_mib,
                            working_set_percent,
                            vcpus,
                            pages,
                            backing,
                        });
                    }
                }
            }
        }
    }
    cases.retain(|case| case.backing == BackingSpec::Anonymous || case.memory_mib == 512);
    cases
}

/// The short form has each value of each dimension, not their product.
fn short_cases() -> Vec<Case> {
    let case = |working_set_percent, vcpus, pages, backing| Case {
        memory_mib: 512,
        working_set_percent,
        vcpus,
        pages,
        backing,
    };
    vec![
        case(50, 1, "2m", BackingSpec::Anonymous),
        case(90, 2, "4k", BackingSpec::Anonymous),
        case(10, 2, "2m", BackingSpec::AnonymousSmallPages),
        case(50, 1, "4k", HUGETLB),
        case(10, 1, "2m", BackingSpec::Memfd),
    ]
}

/// Huge pages of the host for the length of a test; the number that was there is put back.
struct HugePages {
    before: String,
}

const NR_HUGEPAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

impl HugePages {
    /// Asks for enough for a guest of so many MiB; says where they cannot be had.
    fn new(memory_mib: u64) -> Result<Self, String> {
        let before = fs::read_to_string(NR_HUGEPAGES).map_err(|error| error.to_string())?;
        let pages = Self { before };
        let count: u64 = pages.before.trim().parse().unwrap();
        let wanted = count + memory_mib / 2;
        fs::write(NR_HUGEPAGES, wanted.to_string()).map_err(|error| error.to_string())?;
        let got: u64 = fs::read_to_string(NR_HUGEPAGES)
            .unwrap()
            .trim()
            .parse()
            .unwrap();
        if got < wanted {
            return Err(format!("the host has {got} of {wanted} huge pages"));
        }
        Ok(pages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        fs::write(NR_HUGEPAGES, self.before.trim()).unwrap();
    }
}

fn start(case: Case, console: &Path) -> Arc<Machine> {
    let mut spec = pagewriter_spec(
        case.memory_mib * MIB,
        case.vcpus,
        case.pages,
        case.working_set_percent,
        console,
    );
    spec.memory.preallocate = true;
    spec.memory.backing = case.backing;
    let machine = Arc::new(Machine::build(spec).unwrap());
    machine.start(false).unwrap();
    wait_line(console, Duration::from_secs(120), |line| {
        line.starts_with("pagewriter: ready")
    });
    machine
}

/// Memory of the test's own, made once for guests of one size: fresh memory is slow to touch.
struct Shadows {
    memory_mib: u64,
    /// What the guest's memory was in the pause.
    copy: Arc<Vec<MemoryRegion>>,
    /// What the image restores to.
    restored: Vec<MemoryRegion>,
    workspace: Workspace,
}

impl Shadows {
    fn of(machine: &Machine, case: Case) -> Self {
        let copy = shadow(machine.regions());
        for region in &copy {
            anon::populate(&region.mapping, 0, region.mapping.len()).unwrap();
        }
        Self {
            memory_mib: case.memory_mib,
            copy: Arc::new(copy),
            restored: shadow(machine.regions()),
            workspace: Workspace::default(),
        }
    }
}

/// Takes a checkpoint by each protocol of one run and compares each; returns how many. Codecs take
/// turns, beginning with one that depends on `number`.
fn check(case: Case, number: usize, dir: &Path, kept: &mut Option<Shadows>) -> usize {
    let _pages = (case.backing == HUGETLB).then(|| HugePages::new(case.memory_mib));
    if let Some(Err(why)) = &_pages {
        common::skip("oracle on hugetlb memory", why);
        return 0;
    }
    let machine = start(case, &dir.join("console"));
    let fitting = kept
        .take()
        .filter(|kept| kept.memory_mib == case.memory_mib);
    let shadows = kept.insert(fitting.unwrap_or_else(|| Shadows::of(&machine, case)));
    let mut taken = 0;
    for (protocol, turn) in protocols().zip(number..) {
        let codec = CODECS[turn % CODECS.len()];
        check_one(&machine, protocol, codec, &dir.join("image.lpi"), shadows);
        taken += 1;
    }
    println!("{case:?}: {taken} compared");
    machine.destroy();
    taken
}

fn check_one(
    machine: &Arc<Machine>,
    protocol: Protocol,
    codec: Codec,
    path: &Path,
    shadows: &Shadows,
) {
    let (copy, restored) = (&shadows.copy, &shadows.restored);
    let hooked = Arc::new(Mutex::new(0));
    let mut options = CheckpointOptions::default();
    options.protocol = protocol;
    options.codec = codec;
    options.durable = false;
    options.workspace = shadows.workspace.clone();
    // The copy for the test takes its time, inside the pause.
    options.pause_limit = Duration::from_secs(30);
    let (copy_memory, calls) = (copy_at_pause(copy.clone()), hooked.clone());
    options.at_pause = Some(Arc::new(move |guest: &dyn Guest| {
        *calls.lock().unwrap() += 1;
        copy_memory(guest);
    }));
    let job = checkpoint::start(machine.clone(), Arc::new(FileStorage), path, options).unwrap();
    let report = job
        .wait()
        .unwrap_or_else(|error| panic!("{protocol} {codec}: {error:?}"));
    assert_eq!(*hooked.lock().unwrap(), 1);
    assert_eq!(report.statistics.fallback, None);
    let reader = ImageReader::open(&FileStorage, path).unwrap();
    let fill = eager::FillOptions {
        threads: 2,
        memory_is_fresh: false,
    };
    eager::fill(&reader, restored, &fill).unwrap();
    assert_same_memory(restored, copy);
    let seen = assert_single_moment(|gpa, out| read_page(restored, gpa, out), 61);
    assert!(
        seen.working_set_pages > 0 && seen.fill_pages > 0,
        "{seen:?}"
    );
}

#[test]
fn checkpoints_of_every_protocol_restore_to_exactly_the_memory_of_their_pause() {
    if !have_kvm() {
        return;
    }
    let cases = if long() { cases() } else { short_cases() };
    let mut taken = 0;
    let mut shadows = None;
    for (number, case) in cases.into_iter().enumerate() {
        let dir = tempfile::tempdir().unwrap();
        taken += check(case, number, dir.path(), &mut shadows);
    }
    println!("{taken} checkpoints compared");
    assert!(taken >= protocols().count() * 4);
}
