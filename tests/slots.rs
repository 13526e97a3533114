//! Memory in several of KVM's slots: what holds inside of one holds across the place where they touch.
//!
//! A machine of ours has a slot for each 256 MiB. The page writer's working set lies on both sides of
//! the first such place.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::machines::{checkpoint_and_compare, pagewriter_spec};
use common::memory::{assert_same_memory, shadow};
use common::{have_kvm, wait_line};
use livepoint::checkpoint::{Chain, Protocol};
use livepoint::guest::Guest;
use livepoint::machine::Machine;
use livepoint::machine::spec::MachineSpec;
use livepoint::page::Gfn;
use livepoint::restore::eager;
use livepoint::restore::lazy::{LazyFill, wait_for};
use livepoint::store::{FileStorage, ImageReader};

const PATIENCE: Duration = Duration::from_secs(120);

const MEMORY_BYTES: u64 = 320 << 20;
const VCPUS: u32 = 2;

/// Where the first slot ends and the second begins.
const BORDER: Gfn = Gfn(256 << 20 >> 12);

/// Pages that are written between two images: no piece of the working set's 136 is left out.
const BETWEEN: u64 = 4000;

/// The page writer's live page of vCPU 0; guests/README.md has its words.
const LIVE_GPA: usize = 0x10_1000;
const PROGRESS_WORD: usize = 2;

fn spec(console: &Path) -> MachineSpec {
    let mut spec = pagewriter_spec(MEMORY_BYTES, VCPUS, "2m", 85, console);
    // Of two the last one counts. What is written in an interval is a small part of memory.
    spec.boot.as_mut().unwrap().cmdline += " rate=64M";
    spec
}

fn started(console: &Path) -> Arc<Machine> {
    let machine = Arc::new(Machine::build(spec(console)).unwrap());
    machine.start(false).unwrap();
    wait_line(console, PATIENCE, |line| {
        line.starts_with("pagewriter: ready")
    });
    let regions = machine.regions();
    assert_eq!(regions[0].run().end(), BORDER);
    assert_eq!(regions[1].run().start, BORDER);
    machine
}

/// Returns how many pages the guest has written so far.
fn progress(machine: &Machine) -> u64 {
    let of_vcpu = |vcpu: u32| {
        let live = LIVE_GPA + vcpu as usize * 4096;
        let mut word = [0; 8];
        let mapping = &machine.regions()[0].mapping;
        mapping.copy_out(live + PROGRESS_WORD * 8, &mut word);
        u64::from_le_bytes(word)
    };
    (0..VCPUS).map(of_vcpu).sum()
}

fn wait_for_writes(machine: &Machine) {
    let (began, before) = (Instant::now(), progress(machine));
    while progress(machine) < before + BETWEEN {
        assert!(began.elapsed() < PATIENCE, "the guest writes nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Fails unless the image's working set has pieces on both sides of the border, in runs of their own.
fn assert_working_set_is_of_both_slots(image: &ImageReader) {
    let runs = &image.manifest().working_set;
    assert!(runs.iter().any(|run| run.end() == BORDER), "{runs:?}");
    assert!(runs.iter().any(|run| run.start == BORDER), "{runs:?}");
}

fn open(image: &Path) -> Arc<ImageReader> {
    Arc::new(ImageReader::open(&FileStorage, image).unwrap())
}

/// Fails unless what comes by and by is what an eager restore has.
fn assert_comes_lazily(machine: &Machine, image: &Path) {
    let (lazy, eager) = (shadow(machine.regions()), shadow(machine.regions()));
    let image = open(image);
    eager::fill(&image, &eager, &eager::FillOptions::default()).unwrap();
    let fill = LazyFill::start(image, &lazy).unwrap();
    wait_for(&fill);
    assert!(fill.is_complete());
    assert_same_memory(&lazy, &eager);
}

#[test]
fn whole_images_and_increments_across_slots_are_exactly_the_memory_of_their_pause() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let machine = started(&dir.path().join("console"));
    for protocol in Protocol::CAPTURING {
        let images = dir.path().join(protocol.to_string());
        std::fs::create_dir(&images).unwrap();
        let chain = Chain::default();
        let mut last = PathBuf::new();
        for number in 0..2 {
            wait_for_writes(&machine);
            let report = checkpoint_and_compare(&machine, Some(&chain), protocol, &images);
            let increment = report.statistics.increment.as_ref().unwrap();
            assert_eq!(increment.parent.is_some(), number > 0, "{increment:?}");
            last.clone_from(&report.image.path);
            if number > 0 {
                assert_working_set_is_of_both_slots(&open(&last));
            }
        }
        assert_comes_lazily(&machine, &last);
        drop(chain);
        std::fs::remove_dir_all(&images).unwrap();
    }
    machine.destroy();
}

#[test]
fn a_guest_whose_memory_comes_lazily_into_two_slots_goes_on_and_is_checkpointed() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let console = dir.path().join("console");
    let images = dir.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let machine = started(&console);
    wait_for_writes(&machine);
    let base = checkpoint_and_compare(&machine, None, Protocol::Threaded, &images);
    machine.destroy();
    drop(machine);
    for protocol in Protocol::CAPTURING {
        let image = open(&base.image.path);
        let unfilled = Machine::build_for_restore(spec(&console)).unwrap();
        let state = image.sections().unwrap();
        let fill = LazyFill::start(image.clone(), unfilled.regions()).unwrap();
        let machine = Arc::new(unfilled.finish_tracked(state).unwrap());
        machine.set_filling(fill.clone());
        let chain = Chain::default();
        let guest: Arc<dyn Guest> = machine.clone();
        chain.adopt(&guest, image.clone());
        machine.start(false).unwrap();
        wait_for_writes(&machine);
        let report = checkpoint_and_compare(&machine, Some(&chain), protocol, &images);
        let parent = report.statistics.increment.as_ref().unwrap().parent;
        assert_eq!(parent, Some(image.image_uuid()), "{protocol}");
        wait_for(&fill);
        // The guest checks each page before it writes it, and says what it finds.
        wait_for_writes(&machine);
        machine.destroy();
    }
    let said = std::fs::read_to_string(&console).unwrap();
    assert!(!said.contains("CORRUPT"), "{said}");
}
