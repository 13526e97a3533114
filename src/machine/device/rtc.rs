//! The real-time clock of a PC (MC146818), and its battery-backed memory.
//!
//! It runs with the host's wall clock, at an offset. Its interrupts are not there: Linux makes
//! alarms and updates by reading it where none comes.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use jiff::Timestamp;
use jiff::civil::{Date, DateTime, Time};
use jiff::tz::TimeZone;

use super::{Device, DrainTimeout, Quiesce};
use crate::kvmstate::ClockPolicy;
use crate::machine::bus::{GuestRequest, Registers};
use crate::machine::spec::ClockSpec;
use crate::state::device::RtcV1;
use crate::state::{SectionPayload, StateError, StateSection, StateSet};

/// Index register, then data register.
pub const PORT: u64 = 0x70;
/// How many ports they take.
pub const PORTS: u64 = 2;
/// Its ISA interrupt line.
pub const LINE: u32 = 8;
/// Where the century is, among the memory.
pub const CENTURY: u8 = 0x32;

const CMOS_BYTES: usize = 128;

const SECONDS: u8 = 0;
const MINUTES: u8 = 2;
const HOURS: u8 = 4;
const WEEKDAY: u8 = 6;
const DAY: u8 = 7;
const MONTH: u8 = 8;
const YEAR: u8 = 9;
const STATUS_A: u8 = 0xa;
const STATUS_B: u8 = 0xb;
const STATUS_C: u8 = 0xc;
const STATUS_D: u8 = 0xd;

/// Registers that show the time.
const OF_TIME: [u8; 8] = [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY];

/// Status A: 32.768 kHz, and a periodic rate of 1024 Hz, as a BIOS leaves it.
const A_INITIAL: u8 = 0x26;
/// Status A: the time is about to change.
const A_UPDATING: u8 = 0x80;
/// For how long before the change.
const UPDATE_NS: i64 = 244_000;
/// Status B: 24 hours.
const B_HOURS_24: u8 = 2;
/// Status B: binary, not BCD.
const B_BINARY: u8 = 4;
/// Status B: the guest is setting the time; it stands still.
const B_SET: u8 = 0x80;
/// Status B: the interrupts, and the square wave.
const B_INTERRUPTS: u8 = 0x78;
/// Status D: the battery is good.
const D_VALID: u8 = 0x80;
/// Hours of a 12-hour clock: afternoon.
const AFTERNOON: u8 = 0x80;

const NS_PER_SECOND: i64 = 1_000_000_000;

/// The real-time clock.
#[derive(Debug)]
pub struct Rtc {
    inner: Mutex<Inner>,
    after_restore: ClockPolicy,
}

#[derive(Debug)]
struct Inner {
    index: u8,
    cmos: [u8; CMOS_BYTES],
    /// By how much the clock is ahead of the host's.
    offset_ns: i64,
}

/// Returns the host's wall clock.
fn host_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    i64::try_from(since).unwrap_or(i64::MAX)
}

fn civil(clock_ns: i64) -> DateTime {
    Timestamp::from_nanosecond(i128::from(clock_ns))
        .unwrap_or_default()
        .to_zoned(TimeZone::UTC)
        .datetime()
}

impl Rtc {
    /// Makes a clock that shows what `spec` says.
    pub fn new(spec: &ClockSpec) -> Self {
        let mut cmos = [0; CMOS_BYTES];
        cmos[usize::from(STATUS_A)] = A_INITIAL;
        cmos[usize::from(STATUS_B)] = B_HOURS_24;
        Self {
            inner: Mutex::new(Inner {
                index: 0,
                cmos,
                offset_ns: spec.rtc_offset_seconds.saturating_mul(NS_PER_SECOND),
            }),
            after_restore: spec.after_restore,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn status_b(&self) -> u8 {
        self.cmos[usize::from(STATUS_B)]
    }

    fn is_setting(&self) -> bool {
        self.status_b() & B_SET != 0
    }

    fn clock_ns(&self) -> i64 {
        host_ns().saturating_add(self.offset_ns)
    }

    /// Returns a number as the guest wants to see it.
    fn encode(&self, value: u8) -> u8 {
        if self.status_b() & B_BINARY == 0 {
            ((value / 10) << 4) | (value % 10)
        } else {
            value
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.status_b() & B_BINARY == 0 {
            (value >> 4) * 10 + (value & 0xf)
        } else {
            value
        }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.status_b() & B_HOURS_24 != 0 {
            return self.encode(hour);
        }
        let afternoon = if hour >= 12 { AFTERNOON } else { 0 };
        self.encode((hour + 11) % 12 + 1) | afternoon
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.status_b() & B_HOURS_24 != 0 {
            return self.decode(value);
        }
        let afternoon = if value & AFTERNOON == 0 { 0 } else { 12 };
        self.decode(value & !AFTERNOON) % 12 + afternoon
    }

    fn shown(&self, register: u8, now: DateTime) -> u8 {
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

    /// Notes the time in the registers, where it stands still.
    fn latch(&mut self) {
        let now = civil(self.clock_ns());
        for register in OF_TIME {
            self.cmos[usize::from(register)] = self.shown(register, now);
        }
    }

    /// Sets the clock to what the registers say.
    fn set_from_registers(&mut self) {
        let at = |register: u8| self.cmos[usize::from(register)];
        let number = |register: u8| self.decode(at(register));
        let signed = |value: u8| i8::try_from(value).unwrap_or(-1);
        let year = i16::from(number(CENTURY)) * 100 + i16::from(number(YEAR));
        let date = Date::new(year, signed(number(MONTH)), signed(number(DAY)));
        let hour = signed(self.decode_hour(at(HOURS)));
        let time = Time::new(hour, signed(number(MINUTES)), signed(number(SECONDS)), 0);
        let wanted = date.and_then(|date| {
            let zoned = DateTime::from_parts(date, time?).to_zoned(TimeZone::UTC)?;
            Ok(zoned.timestamp().as_nanosecond())
        });
        match wanted.map(i64::try_from) {
            Ok(Ok(clock_ns)) => self.offset_ns = clock_ns.saturating_sub(host_ns()),
            _ => log::debug!("the guest set its real-time clock to no date"),
        }
    }

    fn read(&self) -> u8 {
        let register = self.index;
        match register {
            _ if OF_TIME.contains(&register) && !self.is_setting() => {
                self.shown(register, civil(self.clock_ns()))
            }
            STATUS_A => {
                let ahead = NS_PER_SECOND - self.clock_ns().rem_euclid(NS_PER_SECOND);
                let updates = !self.is_setting() && ahead <= UPDATE_NS;
                let flag = if updates { A_UPDATING } else { 0 };
                self.cmos[usize::from(STATUS_A)] & !A_UPDATING | flag
            }
            STATUS_C => 0,
            STATUS_D => D_VALID,
            _ => self.cmos[usize::from(register)],
        }
    }

    fn write(&mut self, value: u8) {
        let register = self.index;
        let was_setting = self.is_setting();
        match register {
            _ if OF_TIME.contains(&register) && !was_setting => {
                self.latch();
                self.cmos[usize::from(register)] = value;
                self.set_from_registers();
            }
            STATUS_B => {
                if !was_setting && value & B_SET != 0 {
                    self.latch();
                }
                self.cmos[usize::from(STATUS_B)] = value;
                if was_setting && value & B_SET == 0 {
                    self.set_from_registers();
                }
            }
            STATUS_C | STATUS_D => {}
            _ => self.cmos[usize::from(register)] = value,
        }
    }
}

impl Registers for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = if at == 1 { self.lock().read() } else { 0xff };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest> {
        let mut inner = self.lock();
        for (at, &byte) in (offset..).zip(data) {
            match at {
                // The highest bit masks NMIs, which there are none of.
                0 => inner.index = byte & 0x7f,
                1 => inner.write(byte),
                _ => {}
            }
        }
        None
    }
}

impl Quiesce for Rtc {
    fn pause(&self) {}

    fn drain(&self, _deadline: Instant) -> Result<(), DrainTimeout> {
        // Nothing happens in it but what vCPUs do.
        Ok(())
    }

    fn resume(&self) {}
}

impl Device for Rtc {
    fn name(&self) -> String {
        "rtc.0".to_owned()
    }

    fn save(&self) -> StateSection {
        let inner = self.lock();
        let realtime_ns = host_ns();
        let state = RtcV1 {
            index: inner.index,
            cmos: inner.cmos.to_vec(),
            clock_ns: realtime_ns.saturating_add(inner.offset_ns),
            realtime_ns,
        };
        StateSection::encode(0, &state)
    }

    fn restore(&self, state: &mut StateSet) -> Result<(), StateError> {
        let saved: RtcV1 = state.take(0)?;
        let malformed = StateError::Malformed {
            kind: RtcV1::KIND,
            instance: 0,
            source: None,
        };
        let mut inner = self.lock();
        inner.cmos = saved.cmos.try_into().map_err(|_| malformed)?;
        inner.index = saved.index & 0x7f;
        // Behind the host by the time between, or as far ahead as it was.
        let host = match self.after_restore {
            ClockPolicy::Continue => host_ns(),
            ClockPolicy::Realtime => saved.realtime_ns,
        };
        inner.offset_ns = saved.clock_ns.saturating_sub(host);
        Ok(())
    }

    fn reset(&self) {
        // It has a battery; only its interrupts end.
        self.lock().cmos[usize::from(STATUS_B)] &= !B_INTERRUPTS;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clock(offset_seconds: i64, after_restore: ClockPolicy) -> Rtc {
        Rtc::new(&ClockSpec {
            rtc_offset_seconds: offset_seconds,
            after_restore,
            ..ClockSpec::default()
        })
    }

    fn get(rtc: &Rtc, register: u8) -> u8 {
        let mut data = [0];
        rtc.write(0, &[register]);
        rtc.read(1, &mut data);
        data[0]
    }

    fn set(rtc: &Rtc, register: u8, value: u8) {
        rtc.write(0, &[register]);
        rtc.write(1, &[value]);
    }

    /// Sets the time as Linux does, and returns what is shown just after.
    fn set_time(rtc: &Rtc, values: &[(u8, u8)]) {
        let status_b = get(rtc, STATUS_B);
        set(rtc, STATUS_B, status_b | B_SET);
        for (register, value) in values {
            set(rtc, *register, *value);
        }
        set(rtc, STATUS_B, status_b);
    }

    const LEAP_DAY: [(u8, u8); 7] = [
        (SECONDS, 0x30),
        (MINUTES, 0x59),
        (HOURS, 0x23),
        (DAY, 0x29),
        (MONTH, 0x02),
        (YEAR, 0x28),
        (CENTURY, 0x20),
    ];

    #[test]
    fn a_new_clock_shows_the_hosts_time_in_bcd() {
        let rtc = clock(0, ClockPolicy::Continue);
        let before = civil(host_ns());
        let (year, day) = (get(&rtc, YEAR), get(&rtc, DAY));
        let after = civil(host_ns());
        let shows = |now: DateTime| {
            i16::from(year >> 4) * 10 + i16::from(year & 15) == now.year() % 100
                && (day >> 4) * 10 + (day & 15) == u8::try_from(now.day()).unwrap()
        };
        assert!(shows(before) || shows(after));
        assert_eq!(get(&rtc, CENTURY), 0x20);
        assert_eq!(get(&rtc, STATUS_D), D_VALID);
        let mut index = [0];
        rtc.read(0, &mut index);
        assert_eq!(index, [0xff]);
    }

    #[test]
    fn an_offset_is_added() {
        let year = 366 * 86_400;
        let (now, later) = (
            clock(0, ClockPolicy::Continue),
            clock(year, ClockPolicy::Continue),
        );
        assert_ne!(get(&now, YEAR), get(&later, YEAR));
    }

    #[test]
    fn the_time_that_a_guest_sets_runs_on_and_is_saved() {
        let rtc = clock(0, ClockPolicy::Continue);
        set_time(&rtc, &LEAP_DAY);
        assert_eq!((get(&rtc, HOURS), get(&rtc, MINUTES)), (0x23, 0x59));
        // 29 February 2028 is a Tuesday.
        assert_eq!((get(&rtc, DAY), get(&rtc, WEEKDAY)), (0x29, 3));
        let other = clock(12_345, ClockPolicy::Continue);
        let mut state = StateSet::new(vec![rtc.save()]).unwrap();
        other.restore(&mut state).unwrap();
        state.finish().unwrap();
        assert_eq!((get(&other, MONTH), get(&other, YEAR)), (0x02, 0x28));
    }

    #[test]
    fn both_forms_of_hours_and_numbers_are_there() {
        let rtc = clock(0, ClockPolicy::Continue);
        set_time(&rtc, &LEAP_DAY);
        set(&rtc, STATUS_B, 0);
        assert_eq!(get(&rtc, HOURS), 0x11 | AFTERNOON);
        set(&rtc, STATUS_B, B_BINARY);
        assert_eq!(get(&rtc, HOURS), 11 | AFTERNOON);
        assert_eq!(get(&rtc, MINUTES), 59);
        set_time(&rtc, &[(HOURS, 12), (MINUTES, 5)]);
        set(&rtc, STATUS_B, B_BINARY | B_HOURS_24);
        assert_eq!((get(&rtc, HOURS), get(&rtc, MINUTES)), (0, 5));
    }

    #[test]
    fn no_date_leaves_the_clock_as_it_is() {
        let rtc = clock(0, ClockPolicy::Continue);
        set_time(&rtc, &LEAP_DAY);
        set_time(&rtc, &[(MONTH, 0x13), (DAY, 0xff)]);
        assert_eq!((get(&rtc, MONTH), get(&rtc, DAY)), (0x02, 0x29));
    }

    #[test]
    fn a_restored_clock_goes_on_or_catches_up_as_asked() {
        let saved = RtcV1 {
            index: 0,
            cmos: vec![0; CMOS_BYTES],
            clock_ns: 1_000 * NS_PER_SECOND,
            realtime_ns: host_ns() - 500 * NS_PER_SECOND,
        };
        let restored = |policy| {
            let rtc = clock(0, policy);
            let section = StateSection::encode(0, &saved);
            let mut state = StateSet::new(vec![section]).unwrap();
            rtc.restore(&mut state).unwrap();
            rtc.lock().clock_ns() / NS_PER_SECOND
        };
        assert!((1_000..1_010).contains(&restored(ClockPolicy::Continue)));
        assert!((1_500..1_510).contains(&restored(ClockPolicy::Realtime)));
    }

    #[test]
    fn memory_of_another_size_is_refused() {
        let rtc = clock(0, ClockPolicy::Continue);
        let section = StateSection::encode(
            0,
            &RtcV1 {
                index: 0,
                cmos: vec![0; 5],
                clock_ns: 0,
                realtime_ns: 0,
            },
        );
        let mut state = StateSet::new(vec![section]).unwrap();
        assert!(rtc.restore(&mut state).is_err());
    }
}
