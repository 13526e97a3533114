//! The time as the registers show it: in BCD or binary, of a 12-hour or a 24-hour clock.

use jiff::Timestamp;
use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;

use super::{B_BINARY, B_HOURS_24, CENTURY, CMOS_BYTES, STATUS_B};

pub(super) const SECONDS: u8 = 0;
pub(super) const MINUTES: u8 = 2;
pub(super) const HOURS: u8 = 4;
pub(super) const WEEKDAY: u8 = 6;
pub(super) const DAY: u8 = 7;
pub(super) const MONTH: u8 = 8;
pub(super) const YEAR: u8 = 9;

/// Registers that show the time.
pub(super) const OF_TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

/// Registers of the time of day; the alarm's are the ones behind them.
const OF_DAY: [u8; 3] = [SECONDS, MINUTES, HOURS];
/// An alarm's register with both highest bits set fits any time.
const ANY: u8 = 0xc0;

/// Hours of a 12-hour clock: afternoon.
const AFTERNOON: u8 = 0x80;

/// Returns the date and time of a clock.
pub(super) fn civil(clock_ns: i64) -> DateTime {
    Timestamp::from_nanosecond(i128::from(clock_ns))
        .unwrap_or_default()
        .to_zoned(TimeZone::UTC)
        .datetime()
}

/// How a guest wants to see numbers: status register B.
#[derive(Clone, Copy, Debug)]
pub(super) struct Format(pub u8);

impl Format {
    fn encode(self, value: u8) -> u8 {
        if self.0 & B_BINARY == 0 {
            ((value / 10) << 4) | (value % 10)
        } else {
            value
        }
    }

    fn decode(self, value: u8) -> u8 {
        if self.0 & B_BINARY == 0 {
            (value >> 4) * 10 + (value & 0xf)
        } else {
            value
        }
    }

    fn encode_hour(self, hour: u8) -> u8 {
        if self.0 & B_HOURS_24 != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { AFTERNOON } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(self, value: u8) -> u8 {
        if self.0 & B_HOURS_24 != 0 {
            return self.decode(value);
        }
        let afternoon = if value & AFTERNOON == 0 { 0 } else { 12 };
        self.decode(value & !AFTERNOON) % 12 + afternoon
    }

    /// Returns what a register of the time shows at `now`.
    pub fn show(self, register: u8, now: DateTime) -> u8 {
        let narrow = |value: i8| u8::try_from(value).unwrap_or_default();
        let year = u16::try_from(now.year()).unwrap_or_default();
        let of_year = |value: u16| self.encode(u8::try_from(value % 100).unwrap_or_default());
        match register {
            SECONDS => self.encode(narrow(now.second())),
            MINUTES => self.encode(narrow(now.minute())),
            HOURS => self.encode_hour(narrow(now.hour())),
            WEEKDAY => self.encode(narrow(now.weekday().to_sunday_one_offset())),
            DAY => self.encode(narrow(now.day())),
            MONTH => self.encode(narrow(now.month())),
            YEAR => of_year(year),
            _ => of_year(year / 100),
        }
    }
}

/// Returns the time that the registers say, in nanoseconds since 1970; `None` where it is none.
pub(super) fn parse(cmos: &[u8; CMOS_BYTES]) -> Option<i64> {
    let at = |register: u8| cmos[usize::from(register)];
    let format = Format(at(STATUS_B));
    let number = |register: u8| format.decode(at(register));
    let signed = |value: u8| i8::try_from(value).unwrap_or(-1);
    let year = i16::from(number(CENTURY)) * 100 + i16::from(number(YEAR));
    let date = Date::new(year, signed(number(MONTH)), signed(number(DAY))).ok()?;
    let hour = signed(format.decode_hour(at(HOURS)));
    let time = Time::new(hour, signed(number(MINUTES)), signed(number(SECONDS)), 0).ok()?;
    let zoned = DateTime::from_parts(date, time)
        .to_zoned(TimeZone::UTC)
        .ok()?;
    i64::try_from(zoned.timestamp().as_nanosecond()).ok()
}

/// Returns whether the alarm goes off at `now`.
pub(super) fn alarm_fits(cmos: &[u8; CMOS_BYTES], now: DateTime) -> bool {
    let format = Format(cmos[usize::from(STATUS_B)]);
    OF_DAY.into_iter().all(|register| {
        let alarm = cmos[usize::from(register) + 1];
        alarm >= ANY || alarm == format.show(register, now)
    })
}
