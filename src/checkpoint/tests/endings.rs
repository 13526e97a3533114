//! However a checkpoint ends, the guest runs on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::Bench;
use crate::checkpoint::fake::{Call, FakeGuest, Operation};
use crate::checkpoint::{CheckpointError, Phase, Protocol};

/// What is prompt: far less than those take that a cancelled checkpoint must not wait for. How fast
/// it is on a machine that has nothing else to do is for `livepoint bench` to say.
const PROMPT: Duration = Duration::from_secs(3);

/// How long anything may take that must not hang.
const PATIENCE: Duration = Duration::from_secs(20);

/// Cancels a checkpoint that `block` stops in `phase`; returns how long the answer took.
fn cancel_in(phase: Phase, protocol: Protocol, block: impl Fn(&mut Bench)) -> Duration {
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.checkpoint();
    let before = bench.files();
    bench.options.protocol = protocol;
    bench.options.pause_limit = PATIENCE;
    bench.options.durable = true;
    let running = bench.guest.run(2, 1);
    running.assert_progress();
    block(&mut bench);
    let job = bench.start();
    bench.storage.wait_for_blocked();
    let start = Instant::now();
    while job.progress().phase != phase {
        assert!(
            start.elapsed() < PATIENCE,
            "blocked in {:?}",
            job.progress().phase
        );
        std::thread::yield_now();
    }
    let cancelled = Instant::now();
    assert!(job.cancel());
    let error = job.wait_timeout(PATIENCE).expect("it ends").unwrap_err();
    let took = cancelled.elapsed();
    assert!(error.is_cancelled(), "{error}");
    assert_eq!(job.progress().phase, Phase::Cancelled);
    running.assert_progress();
    bench.assert_nothing_is_left(&before);
    took
}

fn cancel_is_prompt_in(phase: Phase, protocol: Protocol, block: impl Fn(&mut Bench)) {
    let took = cancel_in(phase, protocol, block);
    assert!(took <= PROMPT, "a cancel in {phase} took {took:?}");
}

#[test]
fn cancel_while_starting_leaves_the_guest_running_and_no_file() {
    cancel_is_prompt_in(Phase::Starting, Protocol::Threaded, |bench| {
        bench.storage.block(Operation::Create);
    });
}

#[test]
fn cancel_while_live_leaves_the_guest_running_and_no_file() {
    cancel_is_prompt_in(Phase::Live, Protocol::Threaded, |bench| {
        // Fewer buffers than the guest has pieces, so that the scan must wait.
        bench.options.threads = Some(1);
        bench.storage.block(Operation::Write);
    });
}

#[test]
fn cancel_while_the_rounds_of_precopy_wait_for_the_disk_leaves_the_guest_running_and_no_file() {
    cancel_is_prompt_in(Phase::Live, Protocol::Precopy, |bench| {
        bench.options.threads = Some(1);
        bench.storage.block(Operation::Write);
    });
}

#[test]
fn cancel_in_the_pause_of_precopy_leaves_the_guest_running_and_no_file() {
    cancel_is_prompt_in(Phase::Pausing, Protocol::Precopy, |bench| {
        bench.options.threads = Some(1);
        let storage = bench.storage.clone();
        bench.guest.on(Call::Save, move |guest| {
            storage.block(Operation::Write);
            (0..guest.page_count()).for_each(|page| guest.write_page(page, 3));
        });
    });
}

#[test]
fn cancel_while_writers_wait_for_the_staging_of_cow_leaves_the_guest_running_and_no_file() {
    cancel_is_prompt_in(Phase::Draining, Protocol::Cow, |bench| {
        // Four buffers for five pieces, and a disk that takes none.
        bench.options.max_staging_bytes = Some(64 << 10);
        bench.options.threads = Some(1);
        bench.storage.block(Operation::Write);
    });
}

#[test]
fn cancel_in_the_pause_of_stop_leaves_the_guest_running_and_no_file() {
    cancel_is_prompt_in(Phase::Pausing, Protocol::Stop, |bench| {
        bench.storage.block(Operation::Write);
    });
}

#[test]
fn cancel_in_the_pause_of_threaded_leaves_the_guest_running_and_no_file() {
    cancel_is_prompt_in(Phase::Pausing, Protocol::Threaded, |bench| {
        // More dirty pages than staging and all buffers hold, and a disk that takes none.
        bench.options.max_staging_bytes = Some(64 << 10);
        bench.options.threads = Some(1);
        let storage = bench.storage.clone();
        bench.guest.on(Call::Save, move |guest| {
            storage.block(Operation::Write);
            (0..guest.page_count()).for_each(|page| guest.write_page(page, 3));
        });
    });
}

#[test]
fn cancel_while_draining_leaves_the_guest_running_and_no_file() {
    for protocol in [Protocol::Threaded, Protocol::Cow] {
        cancel_is_prompt_in(Phase::Draining, protocol, |bench| {
            let storage = bench.storage.clone();
            bench.options.at_pause = Some(Arc::new(move |_| storage.block(Operation::Write)));
        });
    }
}

#[test]
fn cancel_while_committing_leaves_the_guest_running_and_no_file() {
    for protocol in Protocol::CAPTURING {
        cancel_is_prompt_in(Phase::Committing, protocol, |bench| {
            bench.storage.block(Operation::Sync);
        });
    }
}

#[test]
fn cancel_at_any_moment_of_every_protocol_leaves_the_guest_running_and_no_file() {
    const MOMENTS: u32 = 16;
    for protocol in Protocol::CAPTURING {
        let mut bench = Bench::new();
        bench.guest.fill();
        bench.options.protocol = protocol;
        bench.options.at_pause = None;
        let running = bench.guest.run(2, 7);
        running.assert_progress();
        let began = Instant::now();
        bench.start().wait().unwrap();
        let whole = began.elapsed();
        for moment in 0..MOMENTS {
            // But for what a thread that was abandoned by the cancel before may still make and remove.
            let mut before = bench.files();
            before.retain(|path, _| *path == bench.path());
            let job = bench.start();
            std::thread::sleep(whole * moment / MOMENTS);
            let cancelled = Instant::now();
            if !job.cancel() {
                job.wait().unwrap();
                continue;
            }
            let error = job.wait_timeout(PATIENCE).expect("it ends").unwrap_err();
            let took = cancelled.elapsed();
            assert!(error.is_cancelled(), "{error}");
            assert!(took <= PROMPT, "a cancel of {protocol:?} took {took:?}");
            running.assert_progress();
            bench.assert_nothing_is_left(&before);
        }
    }
}

#[test]
fn a_cancel_that_comes_after_the_commit_is_refused() {
    let bench = Bench::new();
    bench.guest.fill();
    let job = bench.start();
    job.wait().unwrap();
    assert!(!job.cancel());
    assert!(job.wait().is_ok());
    assert_eq!(job.progress().phase, Phase::Done);
}

#[test]
fn a_removal_that_blocks_does_not_hold_up_the_end() {
    let bench = Bench::new();
    bench.guest.fill();
    bench.storage.block(Operation::Write);
    bench.storage.block(Operation::Remove);
    let job = bench.start();
    bench.storage.wait_for_blocked();
    assert!(job.cancel());
    let error = job.wait_timeout(PATIENCE).expect("it ends").unwrap_err();
    assert!(error.is_cancelled());
    bench.assert_nothing_is_left(&Default::default());
}

/// Fails unless the checkpoint fails and leaves the guest running; returns the error.
fn fails(bench: &Bench) -> CheckpointError {
    let before = bench.files();
    let running = bench.guest.run(2, 2);
    running.assert_progress();
    let job = bench.start();
    let error = job.wait_timeout(PATIENCE).expect("it ends").unwrap_err();
    assert_eq!(job.progress().phase, Phase::Failed, "{error}");
    running.assert_progress();
    bench.assert_nothing_is_left(&before);
    // And the next one works.
    error
}

#[test]
fn a_blocked_storage_never_leaves_the_guest_paused() {
    for protocol in Protocol::CAPTURING {
        let mut bench = Bench::new();
        bench.guest.fill();
        bench.options.protocol = protocol;
        bench.options.pause_limit = Duration::from_secs(1);
        bench.options.max_staging_bytes = Some(64 << 10);
        bench.options.threads = Some(1);
        let storage = bench.storage.clone();
        bench.guest.on(Call::Save, move |guest| {
            storage.block(Operation::Write);
            (0..guest.page_count()).for_each(|page| guest.write_page(page, 3));
        });
        match fails(&bench) {
            CheckpointError::PauseExpired {
                limit_ms: 1000,
                waiting,
            } if protocol != Protocol::Cow => assert!(waiting.contains("written"), "{waiting}"),
            CheckpointError::StallExpired { limit_ms: 750 } if protocol == Protocol::Cow => {}
            error => panic!("{error}"),
        }
    }
}

/// Returns the longest time in which no vCPU wrote anything, until `ended` says so.
fn longest_standstill(guest: &FakeGuest, ended: impl Fn() -> bool) -> Duration {
    let mut longest = Duration::ZERO;
    let mut seen = (guest.stores.load(Ordering::Relaxed), Instant::now());
    while !ended() {
        let stores = guest.stores.load(Ordering::Relaxed);
        if stores == seen.0 {
            longest = longest.max(seen.1.elapsed());
        } else {
            seen = (stores, Instant::now());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    longest
}

#[test]
fn a_disk_that_blocks_holds_no_writer_up_for_good() {
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.options.protocol = Protocol::Cow;
    bench.options.max_staging_bytes = Some(64 << 10);
    bench.options.threads = Some(1);
    bench.storage.block(Operation::Write);
    let running = bench.guest.run(2, 7);
    running.assert_progress();
    let job = bench.start();
    let longest = longest_standstill(&bench.guest, || job.is_finished());
    let error = job.wait().unwrap_err();
    assert!(
        matches!(error, CheckpointError::StallExpired { .. }),
        "{error}"
    );
    running.assert_progress();
    assert!(longest <= PROMPT, "{longest:?}");
}

#[test]
fn a_session_that_hangs_in_the_guests_own_code_is_ended_by_the_watchdog() {
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.options.pause_limit = Duration::from_millis(50);
    let hang = Arc::new(AtomicBool::new(true));
    let hanging = hang.clone();
    bench.guest.on(Call::Save, move |_| {
        while hanging.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let running = bench.guest.run(2, 2);
    let job = bench.start();
    let error = job
        .wait_timeout(PATIENCE)
        .expect("the watchdog ends it")
        .unwrap_err();
    assert!(
        matches!(error, CheckpointError::PauseExpired { .. }),
        "{error}"
    );
    running.assert_progress();
    assert!(
        matches!(bench.try_start(), Err(CheckpointError::Busy)),
        "the session lives"
    );
    hang.store(false, Ordering::SeqCst);
    let start = Instant::now();
    while matches!(
        bench.try_start().map(|job| job.wait()),
        Err(CheckpointError::Busy)
    ) {
        assert!(start.elapsed() < PATIENCE);
        std::thread::yield_now();
    }
}

#[test]
fn a_full_disk_fails_the_checkpoint_and_not_the_guest() {
    for protocol in Protocol::CAPTURING {
        for good_writes in [0, 3] {
            let mut bench = Bench::new();
            bench.guest.fill();
            bench.options.protocol = protocol;
            bench.checkpoint();
            bench
                .storage
                .fail_writes(good_writes, io::ErrorKind::StorageFull);
            let error = fails(&bench);
            let CheckpointError::Store { source, .. } = error else {
                panic!("{error}");
            };
            assert!(source.is_no_space());
        }
    }
}

#[test]
fn an_io_error_fails_the_checkpoint_and_not_the_guest_and_the_next_one_works() {
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.storage.fail_writes(2, io::ErrorKind::Other);
    assert!(matches!(fails(&bench), CheckpointError::Store { .. }));
    bench.storage = Default::default();
    bench.checkpoint();
    bench.assert_image_is_the_moment();
}

fn assert_panic_of(error: &CheckpointError, names: &[&str]) {
    let CheckpointError::Panicked { thread, .. } = error else {
        panic!("{error}");
    };
    assert!(
        names.iter().any(|name| thread.starts_with(name)),
        "{thread}"
    );
}

#[test]
fn a_panicking_thread_fails_the_checkpoint_and_the_guest_runs_on() {
    for protocol in [Protocol::Precopy, Protocol::Threaded, Protocol::Cow] {
        let mut bench = Bench::new();
        bench.guest.fill();
        bench.options.protocol = protocol;
        bench.storage.panic_in_writes(1);
        // Those that capture for `cow` write too.
        assert_panic_of(&fails(&bench), &["lvp-write", "lvp-through"]);
    }

    let bench = Bench::new();
    bench.guest.fill();
    bench.guest.on(Call::Rearm, |_| panic!("on purpose"));
    assert_panic_of(&fails(&bench), &["lvp-"]);

    let bench = Bench::new();
    bench.guest.fill();
    bench.guest.on(Call::Fetch, |_| panic!("on purpose"));
    assert_panic_of(&fails(&bench), &["lvp-harvest"]);
}

#[test]
fn a_panic_in_the_pause_resumes_the_guest() {
    for protocol in Protocol::CAPTURING {
        let mut bench = Bench::new();
        bench.guest.fill();
        bench.options.protocol = protocol;
        bench.guest.on(Call::Save, |_| panic!("on purpose"));
        assert_panic_of(&fails(&bench), &["lvp-session"]);

        let mut bench = Bench::new();
        bench.guest.fill();
        bench.options.protocol = protocol;
        bench.options.at_pause = Some(Arc::new(|_| panic!("on purpose")));
        assert_panic_of(&fails(&bench), &["lvp-session"]);
    }
    let mut bench = Bench::new();
    bench.guest.fill();
    bench.options.protocol = Protocol::Stop;
    bench.storage.panic_in_writes(1);
    assert_panic_of(&fails(&bench), &["lvp-scan"]);
}
