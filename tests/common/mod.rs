//! What several test programs share.
#![allow(
    dead_code,
    unused_imports,
    reason = "each test program uses its own part"
)]

pub mod booted;
pub mod c;
pub mod disk_bench;
pub mod gated;
pub mod installation;
pub mod livepointd;
pub mod machines;
pub mod memory;
pub mod pagewriter;
pub mod records;
pub mod rpc_client;
mod sample;
pub mod terminal;
pub mod victim;

use std::fs::OpenOptions;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

pub use sample::*;

/// Returns whether `/dev/kvm` can be used; fails with the reason where it cannot, unless
/// `LIVEPOINT_NO_KVM=1` asks to skip, which is then counted under the test's name.
pub fn have_kvm() -> bool {
    let thread = std::thread::current();
    // The test harness names each test's thread after it.
    let test = thread.name().unwrap_or("a test");
    if std::env::var_os("LIVEPOINT_NO_KVM").is_some_and(|value| value == "1") {
        skip(test, "LIVEPOINT_NO_KVM=1");
        return false;
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        panic!("{test} needs /dev/kvm: {error}; LIVEPOINT_NO_KVM=1 skips such tests");
    }
    true
}

/// Counts a test as skipped.
pub fn skip(test: &str, why: &str) {
    println!("skipped: {test}: {why}");
    if let Some(path) = std::env::var_os("LIVEPOINT_SKIPS") {
        let mut file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(path)
            .unwrap();
        writeln!(file, "{test}: {why}").unwrap();
    }
}

/// Returns whether the long forms are asked for.
pub fn long() -> bool {
    std::env::var_os("LIVEPOINT_LONG").is_some_and(|value| value == "1")
}

/// A small generator of numbers that look random: the same ones for the same seed.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        // Steele et al., "Fast Splittable Pseudorandom Number Generators" (OOPSLA 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Returns a number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Leaves out the last line where it has not ended: it may lack digits.
pub fn whole_lines(text: &str) -> &str {
    text.rfind('\n').map_or("", |end| &text[..=end])
}

/// Waits until a file holds a line that fits, and returns the line.
pub fn wait_line(path: &Path, timeout: Duration, fits: impl Fn(&str) -> bool) -> String {
    let start = Instant::now();
    loop {
        let text = std::fs::read_to_string(path)
            .unwrap_or_default()
            .replace('\r', "");
        if let Some(line) = whole_lines(&text).lines().find(|line| fits(line)) {
            return line.to_owned();
        }
        assert!(
            start.elapsed() < timeout,
            "the line did not come; there is:\n{text}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}
