//! The machine that is measured: what it is, and how much memory it has to spare.

use std::fs;
use std::num::NonZeroUsize;

use serde::Serialize;

/// What a reader of the figures wants to know of the machine.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Host {
    pub cpus: usize,
    pub cpu_model: String,
    pub kernel: String,
    pub memory_bytes: u64,
    pub transparent_huge_pages: String,
    pub livepoint: &'static str,
}

impl Host {
    pub fn look() -> Self {
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo
            .lines()
            .find_map(|line| line.strip_prefix("model name"))
            .map(|rest| rest.trim_start_matches([' ', '\t', ':']));
        let thp = read("/sys/kernel/mm/transparent_hugepage/enabled");
        Self {
            cpus: std::thread::available_parallelism().map_or(1, NonZeroUsize::get),
            cpu_model: model.unwrap_or("unknown").to_owned(),
            kernel: read("/proc/sys/kernel/osrelease"),
            memory_bytes: meminfo(&read("/proc/meminfo"), "MemTotal").unwrap_or(0),
            transparent_huge_pages: chosen(&thp).unwrap_or("none").to_owned(),
            livepoint: env!("CARGO_PKG_VERSION"),
        }
    }
}

/// Returns how many bytes of memory can be had without pressure; none where that cannot be told.
pub(super) fn available_bytes() -> Option<u64> {
    meminfo(&read("/proc/meminfo"), "MemAvailable")
}

fn read(path: &str) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.trim().to_owned()
}

fn meminfo(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib * 1024)
}

/// Returns the choice in brackets, as in `always [madvise] never`.
fn chosen(text: &str) -> Option<&str> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_own_tables_are_understood() {
        let text = "MemTotal:       24684384 kB\nMemAvailable:   1024 kB\n";
        assert_eq!(meminfo(text, "MemAvailable"), Some(1 << 20));
        assert_eq!(meminfo(text, "Swap"), None);
        assert_eq!(chosen("always [madvise] never"), Some("madvise"));
        assert_eq!(chosen("what"), None);
        assert!(Host::look().cpus >= 1);
    }
}
