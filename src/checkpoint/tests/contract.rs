//! What is promised is kept, or refused before the start.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Bench;
use crate::checkpoint::fake::{Call, FakeGuest, Operation};
use crate::checkpoint::{CheckpointError, Protocol};

/// A guest that runs, and options without the hook, so that the pause is the engine's alone.
fn bench(protocol: Protocol) -> Bench {
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.options.protocol = protocol;
    bench.options.at_pause = None;
    bench
}

/// Fails unless the checkpoint is refused for `promise`, with no pause and no file.
fn assert_refused(bench: &Bench, promise: &str) {
    let before = bench.files();
    let pauses = bench.guest.pauses.load(Ordering::SeqCst);
    let error = bench.start().wait().unwrap_err();
    let CheckpointError::Refused { promise: named, .. } = error else {
        panic!("{error}");
    };
    assert_eq!(named, promise);
    assert_eq!(bench.guest.pauses.load(Ordering::SeqCst), pauses);
    bench.assert_nothing_is_left(&before);
}

#[test]
fn a_downtime_below_what_stopping_vcpus_takes_is_refused_by_every_protocol() {
    for protocol in Protocol::ALL {
        let mut bench = bench(protocol);
        bench.options.max_downtime = Some(Duration::from_micros(100));
        assert_refused(&bench, "max_downtime");
    }
}

#[test]
fn a_pause_of_stop_that_the_disk_makes_too_long_is_refused() {
    let mut bench = bench(Protocol::Stop);
    // 10 MB at 2 MB/s.
    bench.options.max_bandwidth = Some(2 << 20);
    bench.options.max_downtime = Some(Duration::from_millis(500));
    assert_refused(&bench, "max_downtime");
}

#[test]
fn a_guest_that_outwrites_disk_and_staging_is_refused_a_bounded_downtime() {
    for protocol in [Protocol::Precopy, Protocol::Threaded] {
        let mut bench = bench(protocol);
        bench.options.max_bandwidth = Some(1 << 20);
        bench.options.max_staging_bytes = Some(64 << 10);
        bench.options.max_downtime = Some(Duration::from_millis(20));
        let running = bench.guest.run(2, 3);
        running.assert_progress();
        let pauses = bench.guest.pauses.load(Ordering::SeqCst);
        let error = bench.start().wait().unwrap_err();
        assert!(matches!(error, CheckpointError::Refused { .. }), "{error}");
        assert_eq!(bench.guest.pauses.load(Ordering::SeqCst), pauses);
        running.assert_progress();
    }
}

#[test]
fn a_deadline_that_the_disk_cannot_keep_is_refused_by_every_protocol() {
    for protocol in Protocol::ALL {
        let mut bench = bench(protocol);
        bench.options.max_bandwidth = Some(1 << 20);
        bench.options.deadline = Some(Duration::from_secs(2));
        assert_refused(&bench, "deadline");
    }
}

#[test]
fn promises_that_can_be_kept_are_kept_and_reported() {
    for protocol in Protocol::ALL {
        let mut bench = bench(protocol);
        bench.options.max_downtime = Some(Duration::from_secs(5));
        bench.options.deadline = Some(Duration::from_secs(60));
        bench.options.max_bandwidth = Some(1 << 30);
        bench.options.max_staging_bytes = Some(64 << 20);
        let running = bench.guest.run(2, 4);
        running.assert_progress();
        for _ in 0..if protocol == Protocol::Stop { 2 } else { 5 } {
            let statistics = bench.checkpoint().statistics;
            assert!(statistics.contract.kept, "{:?}", statistics.contract);
            assert_eq!(statistics.contract.max_downtime_us, Some(5_000_000));
            assert_eq!(statistics.contract.deadline_us, Some(60_000_000));
            assert!(statistics.staging.peak_bytes <= 64 << 20);
            assert!(statistics.plan.is_some());
        }
    }
}

#[test]
fn a_pause_that_becomes_too_long_is_ended_by_the_watchdog() {
    let mut bench = bench(Protocol::Threaded);
    bench.options.max_downtime = Some(Duration::from_millis(50));
    bench.options.max_staging_bytes = Some(64 << 10);
    bench.options.threads = Some(1);
    let storage = bench.storage.clone();
    // More than staging holds, at the last moment, and a disk that takes nothing.
    bench.guest.on(Call::Save, move |guest| {
        storage.block(Operation::Write);
        (0..guest.page_count()).for_each(|page| guest.write_page(page, 3));
    });
    let before = bench.files();
    let error = bench.start().wait().unwrap_err();
    assert!(
        matches!(
            error,
            CheckpointError::DowntimeExceeded { limit_ms: 45, .. }
        ),
        "{error}"
    );
    bench.assert_nothing_is_left(&before);
}

#[test]
fn a_staging_table_without_room_does_not_make_a_bounded_pause_wait_for_the_disk() {
    let mut bench = bench(Protocol::Threaded);
    bench.options.max_downtime = Some(Duration::from_millis(500));
    bench.options.max_staging_bytes = Some(64 << 10);
    bench.storage.delay_writes(Duration::from_millis(1));
    let running = bench.guest.run(2, 5);
    running.assert_progress();
    for _ in 0..5 {
        match bench.start().wait() {
            Ok(report) => assert!(report.statistics.contract.kept),
            Err(CheckpointError::Refused { .. } | CheckpointError::NotConverged { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    running.assert_progress();
}

#[test]
fn auto_says_what_it_chose_and_why_and_captures_the_moment() {
    let mut bench = Bench::with(FakeGuest::new(&[4096], 2));
    bench.guest.fill();
    bench.options.protocol = Protocol::Auto;
    for writes in [false, true] {
        // No device: it would give pages back, and fewer would be touched.
        let running = writes.then(|| bench.guest.run_vcpus(2, 6));
        let statistics = bench.checkpoint().statistics;
        drop(running);
        bench.assert_image_is_the_moment();
        assert!([Protocol::Threaded, Protocol::Cow].contains(&statistics.protocol));
        let plan = statistics.plan.as_ref().unwrap();
        assert!(plan.reason.is_some());
        assert_eq!(plan.touched_pages, 4096);
        if !writes {
            assert_eq!(plan.dirty_pages_per_s, Some(0));
        }
    }
}
