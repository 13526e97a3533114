//! Disks on KVM: a guest of ours writes numbered records to a virtio disk, flushes, reads back.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs::{self, File};
use std::time::Duration;

use common::disk_bench::{self, DiskBench, wait_for_end};
use common::have_kvm;
use livepoint::checkpoint::Protocol;
use livepoint::guest::Guest as _;
use livepoint::machine::{Machine, MachineError};
use livepoint::restore::disks;

#[test]
fn records_written_by_every_cache_mode_are_read_back_and_in_the_file() {
    if !have_kvm() {
        return;
    }
    disk_bench::run_every_cache_mode(
        || DiskBench::new(1),
        |bench, header, _| assert_eq!(header.check(&bench.disk), 0),
    );
}

#[test]
fn a_disk_is_locked_for_one_machine_and_the_refusal_names_it() {
    if !have_kvm() {
        return;
    }
    let bench = DiskBench::new(1);
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

#[test]
fn a_disk_and_the_memory_of_one_pause_fit_each_other_by_every_protocol() {
    if !have_kvm() {
        return;
    }
    let mut in_flight = 0;
    for (protocol, number) in Protocol::CAPTURING.into_iter().zip(1..) {
        let bench = DiskBench::new(16);
        let machine = bench.start("batch=16 tick=1000000", bench.disk_spec(&bench.disk));
        bench.wait_line("console", "virtio: blk ready");
        bench.wait_acknowledged(&machine, 64);
        std::thread::sleep(Duration::from_millis(37 * number));
        let (from, to) = (bench.disk.clone(), bench.path("copy.raw"));
        let (reader, _) = bench.checkpoint(&machine, protocol, move |_| {
            fs::copy(&from, &to).unwrap();
        });
        // The guest has written on since the pause: the image has what was there then.
        let disk = File::create_new(bench.path("from-image.raw")).unwrap();
        disks::write(&reader, 0, &disk).unwrap();
        let read = |name: &str| fs::read(bench.path(name)).unwrap();
        assert!(read("from-image.raw") == read("copy.raw"), "{protocol}");
        // The guest goes on meanwhile, and then is gone.
        let last = bench.header(machine.regions()).acknowledged;
        bench.wait_acknowledged(&machine, last + 1);
        drop(machine);
        let restored = bench.restore(&bench.path("from-image.raw"));
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
