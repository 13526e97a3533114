//! The oracle on KVM, for chains: every increment restores to exactly the memory of its pause.
//!
//! As in `oracle.rs`: the page writer runs, the test copies all of memory in each pause, and what
//! an image restores to must equal that copy. Here each image has only what was written since the
//! one before it, chains branch, and guests go on from images of them.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::machines::pagewriter_spec;
use common::memory::{assert_same_memory, copy_at_pause, shadow};
use common::{have_kvm, long, wait_line};
use livepoint::checkpoint::{self, Chain, CheckpointOptions, Protocol, Report, Workspace};
use livepoint::guest::{Guest, MemoryRegion};
use livepoint::machine::Machine;
use livepoint::machine::spec::MachineSpec;
use livepoint::restore::eager;
use livepoint::store::{Codec, FileStorage, ImageReader};
use livepoint::sys::anon;

const MEMORY_BYTES: u64 = 64 << 20;

fn spec(console: &Path, working_set_percent: u32) -> MachineSpec {
    pagewriter_spec(MEMORY_BYTES, 2, "2m", working_set_percent, console)
}

fn started(console: &Path, working_set_percent: u32) -> Arc<Machine> {
    let machine = Arc::new(Machine::build(spec(console, working_set_percent)).unwrap());
    machine.start(false).unwrap();
    wait_line(console, Duration::from_secs(120), |line| {
        line.starts_with("pagewriter: ready")
    });
    machine
}

/// Memory of the test's own.
struct Shadows {
    copy: Arc<Vec<MemoryRegion>>,
    restored: Vec<MemoryRegion>,
}

impl Shadows {
    fn of(regions: &[MemoryRegion]) -> Self {
        let copy = shadow(regions);
        for region in &copy {
            anon::populate(&region.mapping, 0, region.mapping.len()).unwrap();
        }
        Self {
            copy: Arc::new(copy),
            restored: shadow(regions),
        }
    }

    /// Takes a checkpoint into `dir` and compares what it restores to with memory at the pause.
    fn check(
        &self,
        machine: &Arc<Machine>,
        chain: &Chain,
        workspace: &Workspace,
        protocol: Protocol,
        dir: &Path,
    ) -> Report {
        let mut options = CheckpointOptions::default();
        options.protocol = protocol;
        options.codec = Codec::None;
        options.durable = false;
        options.chain = Some(chain.clone());
        options.workspace = workspace.clone();
        // The copy for the test takes its time, inside the pause.
        options.pause_limit = Duration::from_secs(30);
        options.at_pause = Some(copy_at_pause(self.copy.clone()));
        let job = checkpoint::start(machine.clone(), Arc::new(FileStorage), dir, options).unwrap();
        let report = job
            .wait()
            .unwrap_or_else(|error| panic!("{protocol}: {error:?}"));
        assert_same_memory(self.restore(&report.image.path), &self.copy);
        report
    }

    fn restore(&self, image: &Path) -> &[MemoryRegion] {
        let reader = ImageReader::open(&FileStorage, image).unwrap();
        let fill = eager::FillOptions {
            threads: 2,
            memory_is_fresh: false,
        };
        eager::fill(&reader, &self.restored, &fill).unwrap();
        &self.restored
    }
}

/// Restores `image` into a machine that tracks its writes from the first on.
fn go_on_from(image: &Path, console: &Path) -> (Arc<Machine>, Chain) {
    let reader = Arc::new(ImageReader::open(&FileStorage, image).unwrap());
    let unfilled = Machine::build_for_restore(spec(console, 10)).unwrap();
    eager::fill(&reader, unfilled.regions(), &eager::FillOptions::default()).unwrap();
    let machine = unfilled.finish_tracked(reader.sections().unwrap()).unwrap();
    let machine = Arc::new(machine);
    let chain = Chain::default();
    let guest: Arc<dyn Guest> = machine.clone();
    chain.adopt(&guest, reader);
    machine.start(false).unwrap();
    (machine, chain)
}

fn verify_all(images: &[PathBuf]) {
    for image in images {
        let reader = ImageReader::open(&FileStorage, image).unwrap();
        reader.verify(2).unwrap();
    }
}

#[test]
fn every_increment_of_a_chain_is_exactly_the_memory_of_its_pause() {
    if !have_kvm() {
        return;
    }
    let length = if long() { 20 } else { 3 };
    let mut compared = 0;
    for (protocol, working_set) in Protocol::CAPTURING.into_iter().zip([10, 10, 30, 50]) {
        let dir = tempfile::tempdir().unwrap();
        let machine = started(&dir.path().join("console"), working_set);
        let shadows = Shadows::of(machine.regions());
        let (chain, workspace) = (Chain::default(), Workspace::default());
        let mut images = Vec::new();
        for number in 0..length {
            let report = shadows.check(&machine, &chain, &workspace, protocol, dir.path());
            let increment = report.statistics.increment.as_ref().unwrap();
            assert_eq!(increment.parent.is_some(), number > 0, "{increment:?}");
            let image = ImageReader::open(&FileStorage, &report.image.path).unwrap();
            let written = image.manifest().working_set.len();
            assert!(number == 0 || written > 0, "{protocol}: no working set");
            images.push(report.image.path.clone());
            compared += 1;
        }
        verify_all(&images);
        machine.destroy();
    }
    println!("{compared} images compared");
}

#[test]
fn guests_that_go_on_from_images_of_a_chain_make_a_tree_of_it() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let console = dir.path().join("console");
    let machine = started(&console, 10);
    let shadows = Shadows::of(machine.regions());
    let (chain, workspace) = (Chain::default(), Workspace::default());
    let mut images = Vec::new();
    for protocol in [Protocol::Cow, Protocol::Threaded, Protocol::Stop] {
        let report = shadows.check(&machine, &chain, &workspace, protocol, dir.path());
        images.push(report.image.path.clone());
    }
    machine.destroy();
    drop(machine);
    drop(chain);
    let mut leaves = Vec::new();
    for (number, from) in images.clone().iter().enumerate() {
        let (machine, chain) = go_on_from(from, &console);
        let parent = ImageReader::open(&FileStorage, from).unwrap().image_uuid();
        for (turn, protocol) in Protocol::CAPTURING.into_iter().enumerate() {
            let report = shadows.check(&machine, &chain, &workspace, protocol, dir.path());
            let increment = report.statistics.increment.as_ref().unwrap();
            if turn == 0 {
                assert_eq!(increment.parent, Some(parent), "branch {number}");
            }
            images.push(report.image.path.clone());
        }
        leaves.push(images.last().unwrap().clone());
        machine.destroy();
    }
    verify_all(&images);
    // Each branch is still what its guest was, with the others beside it.
    for leaf in &leaves {
        shadows.restore(leaf);
    }
}
