//! What checkpoints cost. Run alone, in release: `cargo test --release cost -- --ignored --nocapture`.

use std::fs::File;
use std::io::Write;
use std::time::{Duration, Instant};

use super::Bench;
use crate::checkpoint::Protocol;
use crate::checkpoint::fake::{Dice, FakeGuest};
use crate::guest::Guest;
use crate::page::{PAGE_BYTES, PIECE_BYTES};

const PAGES: u64 = (1 << 30) / PAGE_BYTES as u64;

/// A guest of 1 GiB that nothing compresses.
fn incompressible() -> Bench {
    let guest = FakeGuest::new(&[PAGES], 2);
    let mut dice = Dice::new(1);
    let mut piece = vec![0; PIECE_BYTES];
    for at in (0..1 << 30).step_by(PIECE_BYTES) {
        for word in piece.chunks_exact_mut(8) {
            word.copy_from_slice(&dice.bits().to_ne_bytes());
        }
        guest.regions()[0].mapping.copy_in(at, &piece);
    }
    let mut bench = Bench::with(guest);
    bench.options.at_pause = None;
    bench.options.interval = Duration::from_millis(100);
    bench
}

/// Writes the guest's memory to a new file as plainly as can be.
fn plain_write(bench: &Bench) -> Duration {
    let path = bench.dir.path().join("plain");
    let mut piece = vec![1; PIECE_BYTES];
    let began = Instant::now();
    let mut file = File::create(&path).unwrap();
    for at in (0..1 << 30).step_by(PIECE_BYTES) {
        bench.guest.regions()[0].mapping.copy_out(at, &mut piece);
        file.write_all(&piece).unwrap();
    }
    let took = began.elapsed();
    std::fs::remove_file(&path).unwrap();
    took
}

#[test]
#[ignore = "measures: wants a quiet machine and a release build"]
fn the_pause_of_stop_is_close_to_a_plain_write() {
    let mut bench = incompressible();
    bench.options.protocol = Protocol::Stop;
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let plain = plain_write(&bench);
        let statistics = bench.checkpoint().statistics;
        let pause = Duration::from_micros(statistics.downtime.total_us);
        let ratio = pause.as_secs_f64() / plain.as_secs_f64();
        println!(
            "plain {plain:?}, pause {pause:?}, ratio {ratio:.2}, cpu {} us",
            statistics.cpu_us
        );
        best = best.min(ratio);
        std::fs::remove_file(bench.path()).unwrap();
    }
    assert!(best <= 1.3, "ratio {best}");
}

#[test]
#[ignore = "measures: wants a quiet machine and a release build"]
fn threaded_on_a_guest_that_writes() {
    for running in [false, true] {
        let bench = incompressible();
        let guest = running.then(|| bench.guest.run(1, 1));
        for _ in 0..3 {
            let began = Instant::now();
            let statistics = bench.checkpoint().statistics;
            println!(
                "guest writes: {running}; total {:?}, live {} us, {:?}, closing {:?}, rounds {}, dirty {} pages ({}/s), {:?}, log stop {} us, drain {} us, cpu {} us",
                began.elapsed(),
                statistics.live_us,
                statistics.downtime,
                statistics.closing,
                statistics.round_count,
                statistics.dirty_pages,
                statistics.dirty_pages_per_s,
                statistics.staging,
                statistics.log_stop_us,
                statistics.drain_us,
                statistics.cpu_us,
            );
        }
        drop(guest);
    }
}
