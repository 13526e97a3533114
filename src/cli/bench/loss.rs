//! The work that a guest loses to a checkpoint.
//!
//! A guest that is slowed to half its speed for a second has lost as much as one that stood
//! still for half a second: ∫ (1 − rate ÷ base rate) dt, from just before the request until the
//! guest is back at its speed. Time that the guest spends printing its ticks is not work, and not
//! lost.

use serde::Serialize;

use super::spread::{median, quartiles};
use super::ticks::{Tick, Ticks};

/// The guest is back at its speed when so many intervals in a row have ..
const RECOVERED_INTERVALS: usize = 5;

/// .. this share of the base rate, taken together, or what three quarters of the intervals before
/// the request had, where the host is noisy. Else the noise of a quiet guest would count as loss
/// for as long as it is unlucky ..
const RECOVERED_SHARE: f64 = 0.97;

/// .. but no less than this.
const RECOVERED_SHARE_MIN: f64 = 0.8;

/// Printing that takes longer than so many times what it does on a quiet machine contains an
/// outage, which is loss.
const PRINTING_FACTOR: f64 = 4.0;

/// The shortest outage that is shown by itself in the rate over time.
const SHOWN_GAP_S: f64 = 0.015;

/// Where a checkpoint is among a guest's ticks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Ticks from this one on, and before the request, are of a quiet guest.
    pub quiet_from: usize,
    /// Ticks that were there when the checkpoint was asked for.
    pub requested: usize,
    /// Ticks that were there when it was complete.
    pub done: usize,
}

/// What a checkpoint cost the guest.
#[derive(Clone, Debug)]
pub(super) struct Loss {
    /// Work lost from the request until the guest was back at its speed, as time at the base
    /// rate.
    pub lost_s: f64,
    /// The same over all that was watched: longer than the undisturbed guest would have taken.
    pub difference_s: f64,
    /// Time from the request until the guest was back at its speed.
    pub disturbed_s: f64,
    /// Tick from which the guest was back at its speed; `None` where it never was.
    pub recovered: Option<usize>,
    /// Its largest gap until then, in µs.
    pub largest_gap_us: f64,
    /// Rate over time.
    pub trace: Vec<Point>,
}

/// The guest's rate in one interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Point {
    /// When it ended, from the request on.
    pub until_s: f64,
    /// Share of the base rate.
    pub rate: f64,
}

impl Point {
    /// Rounds: a thousandth is more than the measurement tells.
    fn new(until_s: f64, rate: f64) -> Self {
        let round = |value: f64| (value * 1e4).round() / 1e4;
        Self {
            until_s: round(until_s),
            rate: round(rate),
        }
    }
}

/// What happened between two ticks.
#[derive(Clone, Copy, Debug)]
struct Interval {
    took_s: f64,
    /// The longest time in which the guest did not run, from the interval's begin on.
    gap_s: (f64, f64),
    printing_s: f64,
    /// Time that was there for work.
    work_s: f64,
    pages: f64,
}

/// Computes what the checkpoint at `place` cost; `None` where too few ticks are there to tell.
pub(super) fn lost_work(ticks: &Ticks, place: Place) -> Option<Loss> {
    let first = place.requested.checked_sub(1)?;
    let mut intervals = intervals(ticks);
    let quiet = intervals.get(place.quiet_from..first)?;
    let printing = median(quiet.iter().map(|interval| interval.printing_s))?;
    for interval in &mut intervals {
        let counted = if interval.printing_s > PRINTING_FACTOR * printing {
            printing
        } else {
            interval.printing_s
        };
        interval.work_s = interval.took_s - counted;
    }
    let before = &intervals[place.quiet_from..first];
    let before_rate = rate_of(before.iter().copied())?;
    let recovered = (place.done..intervals.len()).find(|&at| {
        let next = intervals.get(at..at + RECOVERED_INTERVALS);
        next.is_some_and(|next| mean_rate(next) >= recovered_share(before) * before_rate)
    });
    let end = recovered.unwrap_or(intervals.len());
    let base = rate_of(before.iter().chain(&intervals[end..]).copied())?;
    let lost = |part: &[Interval]| -> f64 {
        let lost = part.iter().map(|one| one.work_s - one.pages / base);
        lost.sum()
    };
    let disturbed = intervals.get(first..end)?;
    let gaps = ticks.ticks.get(place.requested..=end)?;
    Some(Loss {
        lost_s: lost(disturbed),
        difference_s: lost(&intervals[first..]),
        disturbed_s: disturbed.iter().map(|interval| interval.took_s).sum(),
        recovered,
        largest_gap_us: gaps
            .iter()
            .map(|tick| ticks.seconds(tick.max_gap) * 1e6)
            .fold(0.0, f64::max),
        trace: trace(&intervals, place.quiet_from, first, base),
    })
}

/// Returns the share of its usual rate at which a guest counts as being back at it.
fn recovered_share(quiet: &[Interval]) -> f64 {
    let rates = || quiet.iter().map(|one| one.pages / one.work_s);
    let low = quartiles(rates()).zip(median(rates()));
    let share = low.map_or(1.0, |((low, _), middle)| low / middle);
    share.clamp(RECOVERED_SHARE_MIN, RECOVERED_SHARE)
}

fn intervals(ticks: &Ticks) -> Vec<Interval> {
    let between = |pair: &[Tick]| {
        let seconds = |from: u64, to: u64| ticks.seconds(to.saturating_sub(from));
        Interval {
            took_s: seconds(pair[0].tsc, pair[1].tsc),
            gap_s: (
                seconds(pair[0].tsc, pair[1].at.saturating_sub(pair[1].max_gap)),
                seconds(pair[0].tsc, pair[1].at),
            ),
            printing_s: seconds(pair[0].printing, pair[1].printing),
            work_s: 0.0,
            pages: super::super::output::to_f64(pair[1].pages.saturating_sub(pair[0].pages)),
        }
    };
    ticks.ticks.windows(2).map(between).collect()
}

/// Returns the median of the intervals' rates.
fn rate_of(intervals: impl Iterator<Item = Interval>) -> Option<f64> {
    let rates = intervals.filter(|one| one.work_s > 0.0);
    median(rates.map(|one| one.pages / one.work_s)).filter(|&rate| rate > 0.0)
}

fn mean_rate(intervals: &[Interval]) -> f64 {
    let pages: f64 = intervals.iter().map(|interval| interval.pages).sum();
    let work: f64 = intervals.iter().map(|interval| interval.work_s).sum();
    pages / work
}

fn trace(intervals: &[Interval], from: usize, request: usize, base: f64) -> Vec<Point> {
    let before: f64 = intervals[from..request].iter().map(|one| one.took_s).sum();
    let mut begin_s = -before;
    let mut points = Vec::new();
    for interval in &intervals[from..] {
        let (gap_from, gap_to) = interval.gap_s;
        let gap = gap_to - gap_from;
        // An outage stands out; what is shorter is noise, and in the mean.
        let shown = gap >= SHOWN_GAP_S && gap < interval.work_s;
        let work = interval.work_s - if shown { gap } else { 0.0 };
        let rate = interval.pages / work / base;
        if shown {
            points.push(Point::new(begin_s + gap_from, rate));
            points.push(Point::new(begin_s + gap_to, 0.0));
        }
        begin_s += interval.took_s;
        points.push(Point::new(begin_s, rate));
    }
    points
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ticks every 30 ms that print for 3 ms, with a rate for each interval: 1 is full speed.
    fn ticks(rates: &[f64]) -> Ticks {
        let mut text = "pagewriter: layout tsc_khz=1000\n".to_owned();
        let (mut tsc, mut pages, mut printing) = (0, 0, 0);
        for rate in [&[1.0], rates].concat() {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "small positive numbers of a test"
            )]
            let written = (27_000.0 * rate) as u64;
            (tsc, pages, printing) = (tsc + 30_000, pages + written, printing + 3_000);
            text += &format!(
                "tick cpu=0 tsc={tsc} pass=1 pages={pages} printing={printing} max_gap={} at={tsc}\n",
                30_000 - written
            );
        }
        Ticks::parse(&text).unwrap()
    }

    fn near(value: f64, wanted: f64) -> bool {
        (value - wanted).abs() < 0.002
    }

    const PLACE: Place = Place {
        quiet_from: 0,
        requested: 11,
        done: 21,
    };

    #[test]
    fn a_quiet_guest_loses_nothing() {
        let loss = lost_work(&ticks(&[1.0; 40]), PLACE).unwrap();
        assert!(near(loss.lost_s, 0.0) && near(loss.difference_s, 0.0));
        assert_eq!(loss.recovered, Some(21));
    }

    #[test]
    fn half_the_speed_for_ten_intervals_loses_five_of_them() {
        let rates = [[1.0; 10], [0.5; 10], [1.0; 10], [1.0; 10]].concat();
        let loss = lost_work(&ticks(&rates), PLACE).unwrap();
        // Printing is no work in either case.
        assert!(near(loss.lost_s, 5.0 * 0.027), "{}", loss.lost_s);
        assert!(near(loss.difference_s, loss.lost_s));
        assert!(near(loss.largest_gap_us / 1e6, 0.0165));
    }

    #[test]
    fn what_is_slow_after_the_end_counts_until_the_guest_is_back() {
        let rates = [[1.0; 10], [1.0; 10], [0.2; 10], [1.0; 10]].concat();
        let loss = lost_work(&ticks(&rates), PLACE).unwrap();
        assert!(near(loss.lost_s, 8.0 * 0.027), "{}", loss.lost_s);
        assert_eq!(loss.recovered, Some(30));
        assert!(near(loss.disturbed_s, 20.0 * 0.030));
    }

    #[test]
    fn the_noise_of_a_quiet_guest_does_not_keep_it_from_being_back() {
        let noisy: Vec<f64> = (0..40).map(|i| [1.0, 0.85, 1.0, 1.1][i % 4]).collect();
        let loss = lost_work(&ticks(&noisy), PLACE).unwrap();
        assert_eq!(loss.recovered, Some(21));
        assert!(loss.lost_s.abs() < 0.01, "{}", loss.lost_s);
    }

    #[test]
    fn a_guest_that_stays_slow_is_reported_so() {
        let rates = [[1.0; 10], [0.5; 10], [0.5; 10], [0.5; 10]].concat();
        let loss = lost_work(&ticks(&rates), PLACE).unwrap();
        assert_eq!(loss.recovered, None);
        assert!(near(loss.lost_s, 15.0 * 0.027), "{}", loss.lost_s);
    }

    #[test]
    fn an_outage_while_the_guest_prints_is_loss() {
        let mut ticks = ticks(&[1.0; 40]);
        for tick in ticks.ticks.iter_mut().skip(15) {
            tick.tsc += 200_000;
            tick.printing += 200_000;
        }
        let loss = lost_work(&ticks, PLACE).unwrap();
        assert!(near(loss.lost_s, 0.2), "{}", loss.lost_s);
    }

    #[test]
    fn an_outage_stands_out_of_the_rate_over_time() {
        let rates = [[1.0; 10], [1.0; 10], [1.0; 10]].concat();
        let mut ticks = ticks(&rates);
        for (number, tick) in ticks.ticks.iter_mut().enumerate() {
            tick.max_gap = 0;
            if number >= 15 {
                tick.tsc += 50_000;
            }
        }
        let hit = &mut ticks.ticks[15];
        (hit.max_gap, hit.at) = (50_000, hit.tsc - 10_000);
        let trace = lost_work(&ticks, PLACE).unwrap().trace;
        let at = trace.iter().position(|point| point.rate == 0.0).unwrap();
        let around: Vec<_> = trace[at - 1..=at + 1]
            .iter()
            .map(|one| one.until_s)
            .collect();
        assert_eq!(around, [0.14, 0.19, 0.2]);
        assert!(
            trace
                .iter()
                .all(|one| one.rate == 0.0 || near(one.rate, 1.0))
        );
    }

    #[test]
    fn too_few_ticks_tell_nothing() {
        let few = ticks(&[1.0; 5]);
        assert!(lost_work(&few, PLACE).is_none());
        let at_once = Place {
            quiet_from: 0,
            requested: 0,
            done: 1,
        };
        assert!(lost_work(&few, at_once).is_none());
    }
}
