//! The page writer's account of itself: what it wrote, and how long it was kept from running.

use std::ops::RangeInclusive;

use anyhow::{Context as _, ensure};

use super::super::console_log::number;
use super::super::output::to_f64;

/// One `tick` line. Times are in cycles of the TSC, and count up from the guest's start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tick {
    pub tsc: u64,
    /// Pages written.
    pub pages: u64,
    /// Time spent printing the ticks before this one.
    pub printing: u64,
    /// Longest time without a look at the TSC since the last tick, printing left out.
    pub max_gap: u64,
    /// When that ended.
    pub at: u64,
}

/// Ticks of the guest's vCPU 0, and the rate of its TSC.
#[derive(Clone, Debug)]
pub(super) struct Ticks {
    pub ticks: Vec<Tick>,
    khz: u64,
}

impl Ticks {
    /// Reads what a guest has printed.
    pub fn parse(console: &str) -> anyhow::Result<Self> {
        let layout = console
            .lines()
            .find(|line| line.starts_with("pagewriter: layout"))
            .context("the guest has printed no layout")?;
        let khz = number(layout, "tsc_khz")?;
        ensure!(khz > 0, "the guest does not know the rate of its TSC");
        let ticks = console
            .lines()
            .filter(|line| line.starts_with("tick cpu=0 "))
            .map(tick)
            .collect::<anyhow::Result<_>>()?;
        Ok(Self { ticks, khz })
    }

    /// Returns the largest gap after the first `seen` ticks, in µs; `None` where none came.
    pub fn largest_gap_us(&self, seen: usize) -> Option<f64> {
        let gaps = self.ticks.iter().skip(seen).map(|tick| tick.max_gap);
        gaps.max().map(|gap| self.us(gap))
    }

    /// Returns the largest gap after the first `seen` ticks that reaches into `window`, in µs. Of
    /// each tick only the largest gap is known, so there may be none.
    pub fn gap_in_us(&self, seen: usize, window: &RangeInclusive<u64>) -> Option<f64> {
        let after = self.ticks.iter().skip(seen);
        let reaching = after.filter(|tick| {
            tick.at >= *window.start() && tick.at.saturating_sub(tick.max_gap) <= *window.end()
        });
        reaching.map(|tick| self.us(tick.max_gap)).reduce(f64::max)
    }

    /// Returns the cycles of `us` µs.
    pub fn cycles(&self, us: u64) -> u64 {
        us.saturating_mul(self.khz) / 1000
    }

    /// Returns cycles in seconds.
    pub fn seconds(&self, cycles: u64) -> f64 {
        to_f64(cycles) / to_f64(self.khz) / 1e3
    }

    fn us(&self, cycles: u64) -> f64 {
        self.seconds(cycles) * 1e6
    }
}

fn tick(line: &str) -> anyhow::Result<Tick> {
    Ok(Tick {
        tsc: number(line, "tsc")?,
        pages: number(line, "pages")?,
        printing: number(line, "printing")?,
        max_gap: number(line, "max_gap")?,
        at: number(line, "at")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "\
pagewriter: layout header=0x100000 vcpus=1 tsc_khz=1000
pagewriter: ready tsc=5 fill_pages=0
tick cpu=0 tsc=1000 pass=1 pages=10 printing=0 max_gap=300 at=900
tick cpu=1 tsc=1500 pass=1 pages=10 printing=0 max_gap=9000 at=900
tick cpu=0 tsc=2000 pass=1 pages=30 printing=50 max_gap=100 at=1900
";

    #[test]
    fn ticks_of_the_first_vcpu_are_read() {
        let ticks = Ticks::parse(CONSOLE).unwrap();
        assert_eq!(ticks.ticks.len(), 2);
        assert_eq!((ticks.ticks[1].pages, ticks.ticks[1].printing), (30, 50));
        assert_eq!(ticks.largest_gap_us(0), Some(300.0));
        assert_eq!(ticks.largest_gap_us(1), Some(100.0));
        assert_eq!(ticks.largest_gap_us(2), None);
        assert_eq!(ticks.cycles(7), 7);
    }

    #[test]
    fn a_gap_belongs_to_a_moment_that_it_reaches_into() {
        let ticks = Ticks::parse(CONSOLE).unwrap();
        assert_eq!(ticks.gap_in_us(0, &(500..=700)), Some(300.0));
        assert_eq!(ticks.gap_in_us(0, &(500..=599)), None);
        assert_eq!(ticks.gap_in_us(1, &(500..=700)), None);
        assert_eq!(ticks.gap_in_us(0, &(1850..=1860)), Some(100.0));
    }

    #[test]
    fn a_console_without_a_rate_is_refused() {
        assert!(Ticks::parse("tick cpu=0 tsc=1").is_err());
        let unknown = CONSOLE.replace("tsc_khz=1000", "tsc_khz=0");
        let error = Ticks::parse(&unknown).unwrap_err().to_string();
        assert!(error.contains("rate of its TSC"), "{error}");
    }
}
