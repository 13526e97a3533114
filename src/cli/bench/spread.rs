//! Figures of several runs: least, middle and most.

use serde::Serialize;

/// Minimum, median and maximum of the runs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(super) struct Spread {
    pub min: f64,
    pub median: f64,
    pub max: f64,
    pub runs: usize,
}

impl Spread {
    /// Returns the spread of `values`, if there are any.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Some(Self {
            min: *values.first()?,
            median: quantile(&values, 0.5),
            max: *values.last()?,
            runs: values.len(),
        })
    }

    /// Formats it as `median (min–max)`, each value divided by `unit`.
    pub fn cell(&self, unit: f64, decimals: usize) -> String {
        if self.runs == 1 {
            return format!("{:.decimals$}", self.median / unit);
        }
        format!(
            "{:.decimals$} ({:.decimals$}–{:.decimals$})",
            self.median / unit,
            self.min / unit,
            self.max / unit
        )
    }
}

/// Returns the middle of `values`, if there are any.
pub(super) fn median(values: impl IntoIterator<Item = f64>) -> Option<f64> {
    Spread::of(values).map(|spread| spread.median)
}

/// Returns the value that a quarter of `values` are below, and the one that a quarter are above.
pub(super) fn quartiles(values: impl IntoIterator<Item = f64>) -> Option<(f64, f64)> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    (!values.is_empty()).then(|| (quantile(&values, 0.25), quantile(&values, 0.75)))
}

/// Returns the value below which a `share` of the `sorted` values is, between two of them if need
/// be.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the position is between 0 and the number of runs"
)]
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    let below = sorted[at.floor() as usize];
    let above = sorted[at.ceil() as usize];
    below + (above - below) * at.fract()
}

/// Formats a spread that may be missing.
pub(super) fn cell(spread: Option<&Spread>, unit: f64, decimals: usize) -> String {
    spread.map_or_else(String::new, |spread| spread.cell(unit, decimals))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_of_an_even_count_is_between_the_middle_two() {
        let spread = Spread::of([4.0, 1.0, 3.0, 2.0]).unwrap();
        let wanted = Spread {
            min: 1.0,
            median: 2.5,
            max: 4.0,
            runs: 4,
        };
        assert_eq!(spread, wanted);
        assert_eq!(median([7.0]), Some(7.0));
        assert_eq!(Spread::of([]), None);
    }

    #[test]
    fn one_value_far_off_does_not_move_the_quartiles() {
        assert_eq!(quartiles([1.0, 2.0, 3.0, 4.0, 100.0]), Some((2.0, 4.0)));
        assert_eq!(quartiles([5.0]), Some((5.0, 5.0)));
        assert_eq!(quartiles([]), None);
    }

    #[test]
    fn a_cell_shows_the_median_first() {
        let spread = Spread::of([1000.0, 2000.0, 4000.0]);
        assert_eq!(cell(spread.as_ref(), 1e3, 1), "2.0 (1.0–4.0)");
        assert_eq!(cell(Spread::of([2.5]).as_ref(), 1.0, 1), "2.5");
        assert_eq!(cell(None, 1.0, 1), "");
    }
}
