//! Text for people, JSON for programs.

use std::fmt;
use std::io::Write as _;
use std::time::Duration;

use serde::Serialize;
use tabled::builder::Builder;
use tabled::settings::object::Columns;
use tabled::settings::{Alignment, Style};

/// How results are printed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Output {
    json: bool,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Self { json }
    }

    /// Returns whether stdout takes one JSON object and nothing else.
    pub fn is_json(self) -> bool {
        self.json
    }

    /// Prints `value` as JSON, or what `text` makes of it.
    pub fn print<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) {
        if self.json {
            let json = serde_json::to_string_pretty(value)
                .expect("our own results are plain data with string keys");
            self.line(json);
        } else {
            self.line(text(value));
        }
    }

    /// Says what is being done; silent for programs.
    pub fn say(self, text: impl fmt::Display) {
        if !self.json {
            self.line(text);
        }
    }

    /// Prints a line. A reader that has gone away, such as `head`, is no failure.
    pub fn line(self, text: impl fmt::Display) {
        if let Err(error) = writeln!(std::io::stdout(), "{text}") {
            log::debug!("could not print: {error}");
        }
    }
}

/// Lays out rows under a header: the first column to the left, the others to the right.
pub(super) fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let mut builder = Builder::default();
    builder.push_record(header.iter().copied());
    for row in rows {
        builder.push_record(row);
    }
    let mut table = builder.build();
    table
        .with(Style::markdown())
        .modify(Columns::new(1..), Alignment::right());
    table.to_string()
}

/// Formats bytes in binary units.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = to_f64(count) / 1024.0;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// Formats microseconds in the unit that suits them.
pub(super) fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} µs"),
        1_000..1_000_000 => format!("{:.1} ms", to_f64(us) / 1e3),
        _ => format!("{:.2} s", to_f64(us) / 1e6),
    }
}

/// Formats a duration in the unit that suits it.
pub(super) fn duration(time: Duration) -> String {
    micros(u64::try_from(time.as_micros()).unwrap_or(u64::MAX))
}

/// Converts a count for display or statistics; exact up to 2^53.
#[expect(
    clippy::cast_precision_loss,
    reason = "figures for people need no 53rd bit"
)]
pub(super) fn to_f64(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_suit_the_size() {
        assert_eq!(bytes(12), "12 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 30), "3.0 GiB");
        assert_eq!(micros(999), "999 µs");
        assert_eq!(micros(1_500), "1.5 ms");
        assert_eq!(micros(2_500_000), "2.50 s");
    }
}
