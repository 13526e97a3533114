//! Charts as SVG, written by hand: bars in groups, and lines over time.

use std::fmt::Write as _;

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 420.0;
const LEFT: f64 = 70.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 50.0;
const BOTTOM: f64 = 100.0;

/// What a strip takes, with the gap above it; names stand to its left.
const STRIP: f64 = 58.0;
const STRIP_GAP: f64 = 12.0;
const STRIP_LEFT: f64 = 205.0;
const AXIS: f64 = 55.0;

/// What one entry of the legend takes.
const LEGEND_ENTRY: f64 = 205.0;
const LEGEND_LINE: f64 = 18.0;
const LEGEND_COLUMNS: usize = 4;

/// Colours that differ in lightness too.
const COLOURS: [&str; 10] = [
    "#1b4f72", "#e67e22", "#1e8449", "#c0392b", "#7d3c98", "#17a2b8", "#7f8c8d", "#d4ac0d",
    "#2e4053", "#e91e8c",
];

/// The colour of what was measured and says nothing.
const PALE: &str = "0.35";

/// One group of bars for each of `groups`, one bar in it for each of `series`.
#[derive(Clone, Debug)]
pub(super) struct BarChart {
    pub title: String,
    pub y_label: String,
    pub groups: Vec<Group>,
    pub series: Vec<BarSeries>,
    /// A line across, such as the height of the baseline.
    pub reference: Option<f64>,
}

#[derive(Clone, Debug)]
pub(super) struct Group {
    pub name: String,
    /// Drawn pale.
    pub pale: bool,
}

#[derive(Clone, Debug)]
pub(super) struct BarSeries {
    pub name: String,
    /// One for each group, where there is one.
    pub values: Vec<Option<f64>>,
}

/// A strip for each of `series`, one below the other over the same x axis: many lines in one plane
/// would hide each other.
#[derive(Clone, Debug)]
pub(super) struct StripChart {
    pub title: String,
    pub x_label: String,
    pub series: Vec<LineSeries>,
    /// Where the x axis begins and ends.
    pub x_range: (f64, f64),
    /// Where each strip's y axis ends; it begins at 0.
    pub y_max: f64,
    /// A line across each strip.
    pub reference: f64,
}

/// A line through points in order.
#[derive(Clone, Debug)]
pub(super) struct LineSeries {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

/// The plane of a chart: where a value is on the drawing.
struct Plane {
    x: (f64, f64),
    y: (f64, f64),
    left: f64,
    top: f64,
    bottom: f64,
}

impl Plane {
    fn new(x: (f64, f64), y: (f64, f64), legend_lines: usize) -> Self {
        let extra = LEGEND_LINE * to_f64(legend_lines.saturating_sub(1));
        // Where there is nothing to draw, the axes are there all the same.
        let some = |(from, to): (f64, f64)| (from, if to > from { to } else { from + 1.0 });
        Self {
            x: some(x),
            y: some(y),
            left: LEFT,
            top: TOP,
            bottom: HEIGHT - BOTTOM - extra,
        }
    }

    fn x_of(&self, value: f64) -> f64 {
        self.left + (value - self.x.0) / (self.x.1 - self.x.0) * (WIDTH - self.left - RIGHT)
    }

    fn y_of(&self, value: f64) -> f64 {
        let share = (value.clamp(self.y.0, self.y.1) - self.y.0) / (self.y.1 - self.y.0);
        self.bottom - share * (self.bottom - self.top)
    }
}

impl BarChart {
    pub fn render(&self) -> String {
        let values = self
            .series
            .iter()
            .flat_map(|one| one.values.iter().flatten());
        let extremes = values.copied().chain(self.reference);
        let (low, high) = extremes.fold((0.0, 0.0), |(low, high): (f64, f64), value| {
            (low.min(value), high.max(value))
        });
        let plane = Plane::new(
            (0.0, to_f64(self.groups.len().max(1))),
            (-nice(-low), nice(high)),
            legend_lines(self.series.len()),
        );
        let mut svg = begin(&self.title, HEIGHT);
        y_axis(&mut svg, &plane, &self.y_label);
        let slot = 0.8 / to_f64(self.series.len().max(1));
        for (index, group) in self.groups.iter().enumerate() {
            let left = to_f64(index) + 0.1;
            for (number, series) in self.series.iter().enumerate() {
                if let Some(value) = series.values.get(index).copied().flatten() {
                    let from = left + slot * to_f64(number);
                    bar(&mut svg, &plane, (from, slot), value, number, group.pale);
                }
            }
            let middle = plane.x_of(left + 0.4);
            text(
                &mut svg,
                (middle, plane.bottom + 18.0),
                "middle",
                13,
                &group.name,
            );
        }
        if let Some(reference) = self.reference {
            let y = plane.y_of(reference);
            let to = WIDTH - RIGHT;
            svg += &format!(
                "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{to}\" y2=\"{y:.1}\" stroke=\"#000\" \
                 stroke-dasharray=\"6 4\"/>\n"
            );
        }
        legend(&mut svg, &plane, self.series.iter().map(|one| &one.name));
        svg + "</svg>\n"
    }
}

impl StripChart {
    pub fn render(&self) -> String {
        let height = TOP + STRIP * to_f64(self.series.len()) + AXIS;
        let mut svg = begin(&self.title, height);
        let mut plane = Plane {
            x: self.x_range,
            y: (0.0, self.y_max),
            left: STRIP_LEFT,
            top: TOP,
            bottom: TOP,
        };
        for (number, series) in self.series.iter().enumerate() {
            plane.top = TOP + STRIP * to_f64(number) + STRIP_GAP;
            plane.bottom = TOP + STRIP * to_f64(number + 1);
            self.strip(&mut svg, &plane, series, colour(number));
        }
        x_axis(&mut svg, &plane, &self.x_label);
        svg + "</svg>\n"
    }

    fn strip(&self, svg: &mut String, plane: &Plane, series: &LineSeries, colour: &str) {
        let (left, right) = (plane.left, WIDTH - RIGHT);
        for (value, stroke) in [(0.0, "#000"), (self.reference, "#bbb")] {
            let y = plane.y_of(value);
            *svg += &format!(
                "<line x1=\"{left}\" y1=\"{y:.1}\" x2=\"{right}\" y2=\"{y:.1}\" \
                 stroke=\"{stroke}\"/>\n"
            );
            text(svg, (left - 5.0, y + 4.0), "end", 10, &short(value));
        }
        let (from, to) = self.x_range;
        let mut path = String::new();
        let seen = |point: &&(f64, f64)| (from..=to).contains(&point.0);
        for (x, y) in series.points.iter().filter(seen) {
            let (x, y) = (plane.x_of(*x), plane.y_of(*y));
            write!(path, "{x:.1},{y:.1} ").expect("writing to a string does not fail");
        }
        *svg += &format!(
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"1.6\"/>\n",
            path.trim_end()
        );
        let middle = f64::midpoint(plane.top, plane.bottom);
        text(svg, (12.0, middle + 4.0), "start", 12, &series.name);
    }
}

fn begin(title: &str, height: f64) -> String {
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"#fff\"/>\n"
    );
    text(&mut svg, (WIDTH / 2.0, 26.0), "middle", 16, title);
    svg
}

fn bar(
    svg: &mut String,
    plane: &Plane,
    (from, width): (f64, f64),
    value: f64,
    number: usize,
    pale: bool,
) {
    let (left, right) = (plane.x_of(from), plane.x_of(from + width));
    let (top, bottom) = (plane.y_of(value.max(0.0)), plane.y_of(value.min(0.0)));
    let opacity = if pale { PALE } else { "1" };
    *svg += &format!(
        "<rect x=\"{left:.1}\" y=\"{top:.1}\" width=\"{:.1}\" height=\"{:.1}\" fill=\"{}\" \
         fill-opacity=\"{opacity}\"/>\n",
        (right - left - 1.0).max(0.5),
        (bottom - top).max(0.5),
        colour(number)
    );
    let label = (f64::midpoint(left, right), top - 3.0);
    text(svg, label, "middle", 10, &short(value));
}

fn y_axis(svg: &mut String, plane: &Plane, label: &str) {
    for value in ticks(plane.y) {
        let y = plane.y_of(value);
        let to = WIDTH - RIGHT;
        *svg += &format!(
            "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{to}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\n"
        );
        text(svg, (LEFT - 6.0, y + 4.0), "end", 12, &short(value));
    }
    let y = f64::midpoint(TOP, plane.bottom);
    *svg += &format!(
        "<text x=\"18\" y=\"{y:.1}\" font-size=\"13\" text-anchor=\"middle\" \
         transform=\"rotate(-90 18 {y:.1})\">{}</text>\n",
        escape(label)
    );
}

fn x_axis(svg: &mut String, plane: &Plane, label: &str) {
    let y = plane.bottom;
    for value in ticks(plane.x) {
        let x = plane.x_of(value);
        *svg += &format!(
            "<line x1=\"{x:.1}\" y1=\"{y:.1}\" x2=\"{x:.1}\" y2=\"{:.1}\" stroke=\"#000\"/>\n",
            y + 5.0
        );
        text(svg, (x, y + 18.0), "middle", 12, &short(value));
    }
    let middle = f64::midpoint(plane.left, WIDTH - RIGHT);
    text(svg, (middle, y + 38.0), "middle", 13, label);
}

fn legend_lines(entries: usize) -> usize {
    entries.div_ceil(LEGEND_COLUMNS)
}

fn legend<'a>(svg: &mut String, plane: &Plane, names: impl Iterator<Item = &'a String>) {
    for (number, name) in names.enumerate() {
        let x = LEFT + LEGEND_ENTRY * to_f64(number % LEGEND_COLUMNS) - 20.0;
        let y = plane.bottom + 62.0 + LEGEND_LINE * to_f64(number / LEGEND_COLUMNS);
        *svg += &format!(
            "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"12\" height=\"12\" fill=\"{}\"/>\n",
            y - 10.0,
            colour(number)
        );
        text(svg, (x + 17.0, y), "start", 12, name);
    }
}

fn text(svg: &mut String, (x, y): (f64, f64), anchor: &str, size: u32, text: &str) {
    *svg += &format!(
        "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"{size}\" text-anchor=\"{anchor}\">{}</text>\n",
        escape(text)
    );
}

fn colour(number: usize) -> &'static str {
    COLOURS[number % COLOURS.len()]
}

fn escape(text: &str) -> String {
    let text = text.replace('&', "&amp;").replace('<', "&lt;");
    text.replace('>', "&gt;").replace('"', "&quot;")
}

/// Rounds up to 1, 2, 2.5 or 5 times a power of ten.
fn nice(value: f64) -> f64 {
    if value <= 0.0 {
        return 0.0;
    }
    let power = 10.0_f64.powf(value.log10().floor());
    let steps = [1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0];
    let step = steps.into_iter().find(|step| step * power >= value * 0.999);
    step.unwrap_or(10.0) * power
}

/// Returns some four to eight round values between two.
fn ticks((from, to): (f64, f64)) -> Vec<f64> {
    let raw = (to - from).max(f64::MIN_POSITIVE) / 6.0;
    let power = 10.0_f64.powf(raw.log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0]
        .into_iter()
        .map(|step| step * power)
        .find(|&step| step >= raw)
        .unwrap_or(raw);
    let first = (from / step - 1e-9).ceil();
    (0..20_u32)
        .map(|number| (first + f64::from(number)) * step)
        .take_while(|&value| value <= to + step * 1e-9)
        .collect()
}

/// Formats a value with as many digits as a chart has room for.
fn short(value: f64) -> String {
    let text = match value.abs() {
        0.0..0.1 => format!("{value:.3}"),
        0.1..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    };
    if !text.contains('.') {
        return text;
    }
    let trimmed = text.trim_end_matches('0').trim_end_matches('.');
    if trimmed == "-0" { "0" } else { trimmed }.to_owned()
}

#[expect(clippy::cast_precision_loss, reason = "a chart has few parts")]
fn to_f64(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bars() -> BarChart {
        let group = |name: &str| Group {
            name: name.to_owned(),
            pale: name == "FT",
        };
        BarChart {
            title: "a < b & c".to_owned(),
            y_label: "÷ stop".to_owned(),
            groups: vec![group("MG"), group("FT")],
            series: vec![
                BarSeries {
                    name: "stop".to_owned(),
                    values: vec![Some(1.0), Some(1.0)],
                },
                BarSeries {
                    name: "cow".to_owned(),
                    values: vec![Some(-0.1), None],
                },
            ],
            reference: Some(1.0),
        }
    }

    /// Returns the values of an attribute, in order.
    fn attributes(svg: &str, element: &str, name: &str) -> Vec<f64> {
        svg.lines()
            .filter(|line| line.starts_with(&format!("<{element} ")))
            .filter_map(|line| line.split_once(&format!(" {name}=\""))?.1.split('"').next())
            .map(|value| value.parse().unwrap())
            .collect()
    }

    #[test]
    fn a_chart_is_well_formed_and_its_texts_are_escaped() {
        let svg = bars().render();
        assert!(svg.contains("a &lt; b &amp; c"));
        let mut reader = quick_xml::Reader::from_str(&svg);
        while !matches!(reader.read_event().unwrap(), quick_xml::events::Event::Eof) {}
    }

    #[test]
    fn a_bar_is_as_high_as_its_value_and_a_missing_one_is_not_there() {
        let svg = bars().render();
        let heights = attributes(&svg, "rect", "height");
        // Background, three bars, two entries of the legend.
        assert_eq!(heights.len(), 1 + 3 + 2);
        let (one, tenth) = (heights[1], heights[2]);
        assert!((one / 10.0 - tenth).abs() < 0.2, "{one} {tenth}");
        assert_eq!(svg.matches("fill-opacity=\"0.35\"").count(), 1);
    }

    #[test]
    fn a_strip_leaves_out_what_is_beyond_the_axis() {
        let line = |name: &str| LineSeries {
            name: name.to_owned(),
            points: vec![(-1.0, 9.0), (0.0, 1.0), (0.5, 0.5), (1.0, 1.0), (2.0, 9.0)],
        };
        let chart = StripChart {
            title: "rate".to_owned(),
            x_label: "s".to_owned(),
            series: vec![line("stop"), line("cow")],
            x_range: (0.0, 1.0),
            y_max: 1.25,
            reference: 1.0,
        };
        let svg = chart.render();
        let lines: Vec<_> = svg
            .lines()
            .filter(|one| one.starts_with("<polyline"))
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0].matches(',').count(), 3);
        // Each in its own place.
        assert_ne!(lines[0].split('"').nth(1), lines[1].split('"').nth(1));
        assert!(svg.contains(">cow</text>"));
    }

    #[test]
    fn axes_have_round_numbers() {
        assert_eq!(
            ticks((0.0, 1.0)),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert!((nice(0.93) - 1.0).abs() < 1e-9);
        assert!((nice(1.3) - 1.5).abs() < 1e-9);
        assert_eq!(nice(0.0), 0.0);
        assert_eq!(short(0.6000000000000001), "0.6");
        assert_eq!(short(100.0), "100");
        assert_eq!(short(-0.0001), "0");
    }

    #[test]
    fn a_chart_of_nothing_is_drawn_too() {
        let empty = BarChart {
            groups: Vec::new(),
            series: Vec::new(),
            reference: None,
            ..bars()
        };
        assert!(!empty.render().contains("NaN"));
    }
}
