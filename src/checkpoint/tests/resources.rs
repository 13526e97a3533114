//! Threads, descriptors and figures of a checkpoint.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};

use super::Bench;
use crate::checkpoint::fake::Operation;
use crate::checkpoint::{CheckpointError, Phase, Protocol};
use crate::store::{FileStorage, ImageReader};

/// Name and mask of blocked signals of every thread of ours.
fn engine_threads() -> Vec<(String, u64)> {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    let read = |path: std::path::PathBuf| -> Option<(String, u64)> {
        let status = fs::read_to_string(path.join("status")).ok()?;
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name))?;
            Some(line.split_whitespace().nth(1)?.to_owned())
        };
        let blocked = u64::from_str_radix(&field("SigBlk:")?, 16).ok()?;
        Some((field("Name:")?, blocked))
    };
    let threads = tasks.filter_map(|task| read(task.unwrap().path()));
    threads
        .filter(|(name, _)| name.starts_with("lvp-"))
        .collect()
}

#[test]
fn threads_are_named_and_block_every_signal() {
    let mut bench = Bench::new();
    bench.guest.fill();
    // Fewer buffers than the guest has pieces, so that the scan must wait.
    bench.options.threads = Some(1);
    bench.storage.block(Operation::Write);
    let job = bench.start();
    bench.storage.wait_for_blocked();
    // Other tests' threads may be among them; they must keep the rule as well.
    let wanted = [
        "lvp-session",
        "lvp-scan-0",
        "lvp-harvest",
        "lvp-write-0",
        "lvp-watchdog",
    ];
    let began = std::time::Instant::now();
    let threads = loop {
        let threads = engine_threads();
        let is_there = |wanted: &&str| threads.iter().any(|(name, _)| name == wanted);
        if wanted.iter().all(is_there) {
            break threads;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "{threads:?}");
    };
    for (name, blocked) in threads {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGALRM, libc::SIGRTMIN()] {
            assert_ne!(
                blocked >> (signal - 1) & 1,
                0,
                "{name} takes signal {signal}"
            );
        }
    }
    bench.storage.unblock();
    job.wait().unwrap();
}

#[test]
fn the_descriptor_tells_of_the_end_and_progress_ends_at_the_whole() {
    let bench = Bench::new();
    bench.guest.fill();
    bench.storage.delay_writes(Duration::from_millis(2));
    let job = bench.start();
    let mut seen = 0;
    let mut fds = [PollFd::new(&job, PollFlags::IN)];
    let tick = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 500_000,
    };
    while poll(&mut fds, Some(&tick)).unwrap() == 0 {
        let progress = job.progress();
        assert!(progress.scanned_bytes >= seen && progress.scanned_bytes <= progress.memory_bytes);
        seen = progress.scanned_bytes;
    }
    let report = job.wait().unwrap();
    let progress = job.progress();
    assert_eq!(progress.phase, Phase::Done);
    assert_eq!(progress.scanned_bytes, progress.memory_bytes);
    assert_eq!(progress.staged_bytes, 0);
    assert_eq!(progress.written_bytes, report.image.image_bytes);
}

#[test]
fn a_second_checkpoint_of_the_same_guest_is_refused_while_the_first_runs() {
    let bench = Bench::new();
    bench.guest.fill();
    bench.storage.block(Operation::Write);
    let job = bench.start();
    assert!(matches!(bench.try_start(), Err(CheckpointError::Busy)));
    bench.storage.unblock();
    job.wait().unwrap();
    bench.checkpoint();
}

#[test]
fn a_job_whose_handle_is_dropped_goes_on_to_its_end() {
    let bench = Bench::new();
    bench.guest.fill();
    drop(bench.start());
    let start = std::time::Instant::now();
    // There, and its writer has let go of it.
    while ImageReader::open(&FileStorage, &bench.path()).is_err() {
        assert!(start.elapsed() < Duration::from_secs(60));
        std::thread::sleep(Duration::from_millis(1));
    }
    bench.assert_image_is_the_moment();
}

#[test]
fn figures_add_up() {
    for protocol in Protocol::CAPTURING {
        let mut bench = Bench::new();
        bench.guest.fill();
        bench.options.protocol = protocol;
        let nap = Duration::from_millis(30);
        let hook = bench.options.at_pause.take().unwrap();
        bench.options.at_pause = Some(Arc::new(move |guest| {
            hook(guest);
            std::thread::sleep(nap);
        }));
        let statistics = bench.checkpoint().statistics;
        let down = statistics.downtime;
        let parts =
            down.kick_us + down.quiesce_us + down.state_us + down.last_pages_us + down.resume_us;
        assert!(parts <= down.total_us + 5, "{down:?}");
        assert!(down.hook_us >= 30_000, "{down:?}");
        assert!(statistics.live_us + down.total_us + down.hook_us <= statistics.total_us);
        assert!(statistics.cpu_us > 0);
        assert_eq!(statistics.memory_bytes, 2500 * 4096);
        assert_eq!(
            statistics.written.raw_bytes,
            statistics.written.stored_bytes
        );
        let listed: u64 = statistics.rounds.iter().map(|round| round.pages).sum();
        assert_eq!(listed, statistics.dirty_pages);
        assert_eq!(statistics.rounds.len() as u64, statistics.round_count);
    }
}

#[test]
fn a_workspace_is_used_again_by_the_next_checkpoint() {
    let bench = Bench::new();
    bench.guest.fill();
    bench.checkpoint();
    let kept = bench.options.workspace.staging().unwrap();
    let hva = kept.0.hva();
    bench.options.workspace.keep(Vec::new(), Some(kept));
    bench.checkpoint();
    bench.assert_image_is_the_moment();
    assert_eq!(bench.options.workspace.staging().unwrap().0.hva(), hva);
    assert!(
        !bench.options.workspace.buffers(1).unwrap()[0]
            .frames()
            .is_empty(),
        "a used buffer"
    );
}
