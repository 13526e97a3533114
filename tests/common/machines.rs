//! Machines of the test's own with the page writer, and checkpoints of them that are compared.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use livepoint::checkpoint::{self, Chain, CheckpointOptions, Protocol, Report};
use livepoint::guest::Guest as _;
use livepoint::guests;
use livepoint::machine::Machine;
use livepoint::machine::spec::{BootSpec, MachineSpec, SerialBackend, SerialSpec, Source};
use livepoint::restore::eager;
use livepoint::store::{FileStorage, ImageReader};

use super::memory::{assert_same_memory, copy_at_pause, shadow};

/// Returns a machine whose page writer writes whole pages of its working set at random, at full
/// speed, and prints to the file `console`.
pub fn pagewriter_spec(
    memory_bytes: u64,
    vcpus: u32,
    pages: &str,
    working_set_percent: u32,
    console: &Path,
) -> MachineSpec {
    let kernel = Source::Bytes {
        name: "pagewriter".to_owned(),
        bytes: guests::find("pagewriter").unwrap().elf.into(),
    };
    let cmdline = format!(
        "ws_percent={working_set_percent} vcpus={vcpus} pages={pages} pattern=random write=page \
         fill=incompressible tick_ms=0"
    );
    let boot = BootSpec {
        kernel,
        initrd: None,
        cmdline,
    };
    let mut spec = MachineSpec::new(memory_bytes, Some(boot));
    spec.cpu.vcpu_count = vcpus;
    let backend = SerialBackend::File {
        path: console.to_owned(),
        append: true,
    };
    spec.serials.push(SerialSpec { port: 0, backend });
    spec
}

/// Takes a checkpoint into `dir` and compares what it restores to with memory at the pause.
pub fn checkpoint_and_compare(
    machine: &Arc<Machine>,
    chain: Option<&Chain>,
    protocol: Protocol,
    dir: &Path,
) -> Report {
    let copy = Arc::new(shadow(machine.regions()));
    let mut options = CheckpointOptions::default();
    options.protocol = protocol;
    options.durable = false;
    options.chain = chain.cloned();
    // The copy for the test takes its time, inside the pause.
    options.pause_limit = Duration::from_secs(30);
    options.at_pause = Some(copy_at_pause(copy.clone()));
    let job = checkpoint::start(machine.clone(), Arc::new(FileStorage), dir, options).unwrap();
    let report = job
        .wait()
        .unwrap_or_else(|error| panic!("{protocol}: {error:?}"));
    let reader = ImageReader::open(&FileStorage, &report.image.path).unwrap();
    let restored = shadow(machine.regions());
    eager::fill(&reader, &restored, &eager::FillOptions::default()).unwrap();
    assert_same_memory(&restored, &copy);
    report
}
