//! The plots of a report.

use super::lost_work::LostWork;
use super::npb::{Figures, Kernel, Npb, TargetFigures};
use super::svg::{BarChart, BarSeries, Group, LineSeries, StripChart};

/// A plot and the name of its file.
#[derive(Debug)]
pub(super) struct Plot {
    pub file: String,
    pub about: String,
    pub svg: String,
}

/// How much of a guest's rate is shown before the request, in seconds.
const BEFORE_S: f64 = 0.3;

/// How much is shown after it, at most.
const AFTER_S: f64 = 6.0;

/// What is shown ends when no rate is below this any more: less is noise.
const AT_SPEED: f64 = 0.5;

/// A rate above this is shown as this.
const RATE_MAX: f64 = 1.3;

/// What is compared with `stop`.
struct Measure {
    file: &'static str,
    title: &'static str,
    ratio: fn(&Figures) -> Option<f64>,
}

const MEASURES: [Measure; 3] = [
    Measure {
        file: "overhead",
        title: "Added run time",
        ratio: |figures| figures.overhead_to_stop,
    },
    Measure {
        file: "outage",
        title: "Longest outage seen by the guest",
        ratio: |figures| figures.gap_to_stop,
    },
    Measure {
        file: "total",
        title: "Time of the checkpoint",
        ratio: |figures| figures.total_to_stop,
    },
];

/// Draws a chart for each measure and target: a group of bars for each kernel.
pub(super) fn npb_plots(npb: &Npb) -> Vec<Plot> {
    let kernels: Vec<&Kernel> = npb
        .kernels()
        .iter()
        .filter(|kernel| !kernel.targets.is_empty())
        .collect();
    let Some(first) = kernels.first() else {
        return Vec::new();
    };
    let mut plots = Vec::new();
    for measure in &MEASURES {
        for (index, target) in first.targets.iter().enumerate() {
            let columns: Vec<(&str, &TargetFigures)> = kernels
                .iter()
                .map(|kernel| (kernel.kernel.as_str(), &kernel.targets[index]))
                .collect();
            plots.push(npb_plot(measure, target.target, &columns));
        }
    }
    plots
}

fn npb_plot(measure: &Measure, target: &str, columns: &[(&str, &TargetFigures)]) -> Plot {
    let series = columns
        .first()
        .map_or(&[][..], |column| &column.1.protocols);
    let chart = BarChart {
        title: format!("{}, image in {target}", measure.title),
        y_label: "÷ stop".to_owned(),
        groups: columns
            .iter()
            .map(|(kernel, figures)| Group {
                name: kernel.to_uppercase() + if figures.judged { "" } else { " (not judged)" },
                pale: !figures.judged,
            })
            .collect(),
        series: series
            .iter()
            .enumerate()
            .map(|(number, figures)| BarSeries {
                name: figures.protocol.to_string(),
                values: columns
                    .iter()
                    .map(|(_, figures)| (measure.ratio)(&figures.protocols[number]))
                    .collect(),
            })
            .collect(),
        reference: Some(1.0),
    };
    Plot {
        file: format!("npb-{}-{target}.svg", measure.file),
        about: format!("{}, relative to stop, image in {target}", measure.title),
        svg: chart.render(),
    }
}

/// Draws, for each target, the guest's rate through one checkpoint of each contender.
pub(super) fn lost_work_plots(lost_work: &LostWork) -> Vec<Plot> {
    let plot = |(target, traces): (&str, Vec<(String, &[super::loss::Point])>)| {
        let series: Vec<LineSeries> = traces
            .into_iter()
            .map(|(name, trace)| LineSeries {
                name,
                points: steps(trace),
            })
            .collect();
        let chart = StripChart {
            title: format!(
                "The guest's rate through a checkpoint, as a share of the undisturbed one; image \
                 in {target}"
            ),
            x_label: "seconds from the request".to_owned(),
            x_range: (-BEFORE_S, shown_until(&series)),
            y_max: RATE_MAX,
            reference: 1.0,
            series,
        };
        Plot {
            file: format!("rate-{target}.svg"),
            about: format!("the guest's rate through a checkpoint, image in {target}"),
            svg: chart.render(),
        }
    };
    lost_work.traces().map(plot).collect()
}

/// Returns the corners of a line that keeps each interval's rate from its begin to its end.
fn steps(trace: &[super::loss::Point]) -> Vec<(f64, f64)> {
    let corners = trace.windows(2).flat_map(|pair| {
        let (begin, end) = (pair[0].until_s, pair[1].until_s);
        [(begin, pair[1].rate), (end, pair[1].rate)]
    });
    corners.collect()
}

/// Returns when the last of the lines is at its height again.
fn shown_until(series: &[LineSeries]) -> f64 {
    let low = series.iter().flat_map(|one| &one.points);
    let last = low
        .filter(|point| point.1 < AT_SPEED)
        .map(|point| point.0)
        .fold(0.5, f64::max);
    (last + BEFORE_S).min(AFTER_S)
}

#[cfg(test)]
mod tests {
    use super::super::loss::Point;
    use super::*;

    #[test]
    fn a_rate_is_drawn_in_steps_until_all_are_at_their_speed() {
        let point = |until_s, rate| Point { until_s, rate };
        let trace = [point(0.0, 1.0), point(1.0, 0.4), point(1.5, 1.0)];
        let points = steps(&trace);
        assert_eq!(points, [(0.0, 0.4), (1.0, 0.4), (1.0, 1.0), (1.5, 1.0)]);
        let series = [LineSeries {
            name: String::new(),
            points,
        }];
        assert!((shown_until(&series) - 1.3).abs() < 1e-9);
        assert!((shown_until(&[]) - 0.8).abs() < 1e-9);
    }
}
