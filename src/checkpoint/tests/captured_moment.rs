//! The image is the memory of one moment: that of the pause.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::Bench;
use crate::checkpoint::fake::{Call, FakeGuest, Operation};
use crate::checkpoint::{CheckpointError, ClosingReason, Protocol};
use crate::store::{Codec, FileStorage, ImageReader};

fn image_equals_memory(
    protocol: Protocol,
    threads: usize,
    staging: Option<u64>,
    codec: Codec,
    seed: u64,
) {
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.options.protocol = protocol;
    bench.options.threads = Some(threads);
    bench.options.max_staging_bytes = staging;
    bench.options.codec = codec;
    bench.storage.delay_writes(Duration::from_micros(500));
    let running = bench.guest.run(2, seed);
    running.assert_progress();
    let report = bench.checkpoint();
    running.assert_progress();
    drop(running);
    bench.assert_image_is_the_moment();
    let statistics = report.statistics;
    if protocol == Protocol::Threaded {
        assert!(statistics.dirty_pages > 0, "the guest raced nothing");
        let copied = statistics.written.pages + statistics.staging.replaced_pages;
        assert!(copied >= bench.guest.page_count());
    }
}

#[test]
fn image_equals_memory_at_the_pause_of_stop() {
    for (seed, codec) in (1..).zip([Codec::None, Codec::Lz4, Codec::Zstd { level: 1 }]) {
        for threads in [1, 3] {
            image_equals_memory(Protocol::Stop, threads, None, codec, seed);
        }
    }
}

#[test]
fn image_equals_memory_at_the_pause_of_threaded() {
    for (seed, threads) in (1..=8).zip([1, 2, 4].into_iter().cycle()) {
        image_equals_memory(Protocol::Threaded, threads, None, Codec::None, seed);
    }
    image_equals_memory(Protocol::Threaded, 2, None, Codec::Zstd { level: 1 }, 9);
}

#[test]
fn image_equals_memory_at_the_pause_with_little_staging() {
    for (seed, pages) in (11..).zip([16, 17, 64, 200, 600, 16, 33, 128]) {
        let codec = if seed % 2 == 0 {
            Codec::Lz4
        } else {
            Codec::None
        };
        image_equals_memory(Protocol::Threaded, 2, Some(pages * 4096), codec, seed);
    }
}

#[test]
fn image_equals_memory_at_the_pause_of_precopy() {
    for (seed, threads) in (1..=4).zip([1, 2, 4].into_iter().cycle()) {
        image_equals_memory(Protocol::Precopy, threads, None, Codec::None, seed);
    }
}

#[test]
fn precopy_that_does_not_converge_says_so_and_keeps_a_promised_downtime() {
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.options.protocol = Protocol::Precopy;
    bench.options.downtime_budget = Some(Duration::ZERO);
    bench.storage.delay_writes(Duration::from_micros(500));
    // Something is dirty at every harvest, however seldom the host lets the vCPUs run.
    bench.guest.on(Call::Fetch, |guest| guest.write_page(3, 7));
    let running = bench.guest.run(2, 1);
    running.assert_progress();
    let report = bench.checkpoint();
    bench.assert_image_is_the_moment();
    assert_eq!(report.statistics.converged, Some(false));
    assert_ne!(report.statistics.closing, Some(ClosingReason::FitsBudget));
    bench.options.max_downtime = Some(Duration::from_millis(10));
    let error = bench.start().wait().unwrap_err();
    assert!(
        matches!(
            error,
            CheckpointError::NotConverged { limit_ms: 10, .. } | CheckpointError::Refused { .. }
        ),
        "{error}"
    );
    running.assert_progress();
}

#[test]
fn image_equals_memory_at_the_pause_of_cow() {
    for (seed, threads) in (1..=8).zip([1, 2, 4].into_iter().cycle()) {
        image_equals_memory(Protocol::Cow, threads, None, Codec::None, seed);
    }
    image_equals_memory(Protocol::Cow, 2, None, Codec::Zstd { level: 1 }, 9);
    // Four buffers: writers wait for the disk.
    for seed in 10..14 {
        image_equals_memory(Protocol::Cow, 2, Some(64 << 10), Codec::Lz4, seed);
    }
}

#[test]
fn state_that_writes_memory_while_it_is_saved_is_in_the_image() {
    // `save_state` of the fake writes page 0.
    for protocol in Protocol::CAPTURING {
        let mut bench = Bench::new();
        bench.guest.fill();
        bench.options.protocol = protocol;
        bench.checkpoint();
        let memory = super::read_image(&bench.path(), &bench.guest);
        assert_eq!(super::words_of(&memory[..4096]), [0xc10c; 8]);
        bench.assert_image_is_the_moment();
    }
}

#[test]
fn a_guest_that_writes_nothing_is_captured_once_and_closes_at_once() {
    let bench = Bench::new();
    bench.guest.fill();
    let report = bench.checkpoint();
    bench.assert_image_is_the_moment();
    let statistics = report.statistics;
    assert_eq!(statistics.closing, Some(ClosingReason::FitsBudget));
    // Page 0 is written while the state is saved.
    assert_eq!(statistics.dirty_pages, 1);
    assert_eq!(statistics.written.duplicate_pages, 1);
    let image = ImageReader::open(&FileStorage, &bench.path()).unwrap();
    assert_eq!(image.manifest().protocol, "threaded");
    assert_eq!(image.manifest().guest.name, "fake");
    let rounds = &image.manifest().statistics["rounds"];
    assert_eq!(rounds.as_array().unwrap().len(), statistics.rounds.len());
}

#[test]
fn pages_never_touched_are_zeros_in_the_image_and_stay_untouched() {
    for protocol in Protocol::CAPTURING {
        let mut bench = Bench::with(FakeGuest::new(&[1500, 1000], 1));
        bench.options.protocol = protocol;
        for page in [3, 700, 701, 1499, 1500, 2499] {
            bench.guest.write_page(page, page);
        }
        assert_eq!(bench.guest.untouched_pages(), 2494);
        let report = bench.checkpoint();
        // Page 0 was touched by saving the state.
        assert_eq!(bench.guest.untouched_pages(), 2493);
        bench.assert_image_is_the_moment();
        let untouched = report.statistics.untouched_pages;
        assert!((2493..=2494).contains(&untouched), "{untouched}");
        assert_eq!(report.statistics.written.raw_bytes / 4096, 7);
    }
}

#[test]
fn spilled_pages_are_counted_and_staging_never_grows() {
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.options.max_staging_bytes = Some(64 * 4096);
    // More than staging holds, all at once.
    bench.guest.on(Call::Save, |guest| {
        (100..400).for_each(|page| guest.write_page(page, 7));
    });
    let running = bench.guest.run(2, 5);
    running.assert_progress();
    let report = bench.checkpoint();
    drop(running);
    bench.assert_image_is_the_moment();
    let staging = report.statistics.staging;
    assert_eq!(staging.capacity_bytes, 64 * 4096);
    assert!(staging.peak_bytes <= staging.capacity_bytes);
    assert!(staging.spilled_in_pause_pages >= 300 - 64, "{staging:?}");
    assert!(staging.spilled_pages >= staging.spilled_in_pause_pages);
}

#[test]
fn a_device_write_behind_a_scan_that_waits_is_captured() {
    let mut bench = Bench::with(FakeGuest::new(&[512, 8 * 512], 1));
    bench.guest.fill();
    // Four buffers: the scan is stopped by the disk inside a window, three pieces of it copied.
    bench.options.threads = Some(1);
    bench.storage.block(Operation::Write);
    let harvests = Arc::new(AtomicU32::new(0));
    let counted = harvests.clone();
    bench.guest.on(Call::Fetch, move |_| {
        counted.fetch_add(1, Ordering::SeqCst);
    });
    let job = bench.start();
    bench.storage.wait_for_blocked();
    let wait_for_harvests = |count: u32| {
        let target = harvests.load(Ordering::SeqCst) + count;
        let began = Instant::now();
        while harvests.load(Ordering::SeqCst) < target {
            assert!(began.elapsed() < Duration::from_secs(60), "no harvests");
            thread::yield_now();
        }
    };
    wait_for_harvests(100);
    (512..512 + 3 * 512).for_each(|page| bench.guest.device_write(page, 77));
    wait_for_harvests(10);
    bench.storage.unblock();
    job.wait().unwrap();
    bench.assert_image_is_the_moment();
}
