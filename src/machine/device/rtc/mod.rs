//! The real-time clock of a PC (MC146818), and its battery-backed memory.
//!
//! It runs with the host's wall clock, at an offset. Its alarm and its interrupt once a second are
//! there; the periodic one is not: Linux makes that by a timer of its own.

mod calendar;

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::{Device, DrainTimeout, Quiesce};
use crate::kvmstate::ClockPolicy;
use crate::machine::bus::{GuestRequest, Registers};
use crate::machine::spec::ClockSpec;
use crate::state::device::RtcV1;
use crate::state::{SectionPayload, StateError, StateSection, StateSet};
use crate::sys::sigmask::SignalsBlocked;
use calendar::{Format, OF_TIME, alarm_fits, civil, parse};

/// Index register, then data register.
pub const PORT: u64 = 0x70;
/// How many ports they take.
pub const PORTS: u64 = 2;
/// Its ISA interrupt line.
pub const LINE: u32 = 8;
/// Where the century is, among the memory.
pub const CENTURY: u8 = 0x32;

const CMOS_BYTES: usize = 128;

const STATUS_A: u8 = 0xa;
const STATUS_B: u8 = 0xb;
const STATUS_C: u8 = 0xc;
const STATUS_D: u8 = 0xd;

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
/// Status B: interrupts of the update, of the alarm and of the period, and the square wave.
const B_INTERRUPTS: u8 = 0x78;
/// Statuses B and C: the time has changed.
const UPDATE: u8 = 0x10;
/// Statuses B and C: the alarm went off.
const ALARM: u8 = 0x20;
/// Status C: something that status B enables has happened.
const C_INTERRUPT: u8 = 0x80;
/// Status D: the battery is good.
const D_VALID: u8 = 0x80;

const NS_PER_SECOND: i64 = 1_000_000_000;

/// The most seconds that are looked at for a missed alarm: a day has every time of day.
const SECONDS_LOOKED_AT_MAX: i64 = 86_400;

/// Raises or lowers the interrupt line.
pub type Line = Box<dyn Fn(bool) + Send + Sync>;

/// The real-time clock.
#[derive(Debug)]
pub struct Rtc {
    shared: Arc<Shared>,
    after_restore: ClockPolicy,
    /// There once the guest has asked for an interrupt.
    thread: Mutex<Option<JoinHandle<()>>>,
}

struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
    line: Line,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("inner", &self.inner)
            .finish_non_exhaustive()
    }
}

#[derive(Debug)]
struct Inner {
    index: u8,
    cmos: [u8; CMOS_BYTES],
    /// By how much the clock is ahead of the host's.
    offset_ns: i64,
    /// The last second that was looked at for interrupts.
    last_second: i64,
    paused: bool,
    ended: bool,
}

/// Returns the host's wall clock.
fn host_ns() -> i64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_nanos());
    i64::try_from(since).unwrap_or(i64::MAX)
}

impl Rtc {
    /// Makes a clock that shows what `spec` says.
    pub fn new(spec: &ClockSpec, line: Line) -> Self {
        let mut cmos = [0; CMOS_BYTES];
        cmos[usize::from(STATUS_A)] = A_INITIAL;
        cmos[usize::from(STATUS_B)] = B_HOURS_24;
        let inner = Inner {
            index: 0,
            cmos,
            offset_ns: spec.rtc_offset_seconds.saturating_mul(NS_PER_SECOND),
            last_second: 0,
            paused: true,
            ended: false,
        };
        Self {
            shared: Arc::new(Shared {
                inner: Mutex::new(inner),
                changed: Condvar::new(),
                line,
            }),
            after_restore: spec.after_restore,
            thread: Mutex::default(),
        }
    }

    /// Starts or wakes the thread that interrupts, where the guest wants interrupts.
    fn serve_interrupts(&self) {
        if !self.shared.lock().wants_interrupts() {
            return;
        }
        self.shared.changed.notify_all();
        let mut thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner);
        if thread.is_some() {
            return;
        }
        let shared = self.shared.clone();
        let _blocked = SignalsBlocked::new();
        let spawned = thread::Builder::new()
            .name("lvp-rtc".to_owned())
            .spawn(move || shared.serve());
        match spawned {
            Ok(spawned) => *thread = Some(spawned),
            Err(error) => log::warn!("the real-time clock will not interrupt: {error}"),
        }
    }
}

impl Drop for Rtc {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_all();
        let thread = self.thread.lock().map_or(None, |mut thread| thread.take());
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the thread of the real-time clock panicked");
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Interrupts until the clock is gone.
    fn serve(&self) {
        let mut inner = self.lock();
        while !inner.ended {
            if inner.paused || !inner.wants_interrupts() {
                let waited = self.changed.wait(inner);
                inner = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            inner.look_at_seconds();
            self.update_line(&inner);
            let left = NS_PER_SECOND - inner.clock_ns().rem_euclid(NS_PER_SECOND);
            let left = Duration::from_nanos(left.unsigned_abs());
            let waited = self.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn update_line(&self, inner: &Inner) {
        (self.line)(inner.cmos[usize::from(STATUS_C)] & C_INTERRUPT != 0);
    }
}

impl Inner {
    fn status_b(&self) -> u8 {
        self.cmos[usize::from(STATUS_B)]
    }

    fn is_setting(&self) -> bool {
        self.status_b() & B_SET != 0
    }

    fn wants_interrupts(&self) -> bool {
        self.status_b() & (UPDATE | ALARM) != 0 && !self.is_setting()
    }

    fn clock_ns(&self) -> i64 {
        host_ns().saturating_add(self.offset_ns)
    }

    /// Begins to look for interrupts from now on.
    fn look_from_now(&mut self) {
        self.last_second = self.clock_ns().div_euclid(NS_PER_SECOND);
    }

    /// Notes what happened in the seconds since the last look.
    fn look_at_seconds(&mut self) {
        let now = self.clock_ns().div_euclid(NS_PER_SECOND);
        let first = (self.last_second + 1).max(now - SECONDS_LOOKED_AT_MAX);
        // A host whose clock went back has no new second for a while.
        self.last_second = now;
        if first > now {
            return;
        }
        let mut happened = UPDATE;
        if (first..=now).any(|second| alarm_fits(&self.cmos, civil(second * NS_PER_SECOND))) {
            happened |= ALARM;
        }
        let enabled = self.status_b() & (UPDATE | ALARM);
        let status = &mut self.cmos[usize::from(STATUS_C)];
        *status |= happened;
        if *status & enabled != 0 {
            *status |= C_INTERRUPT;
        }
    }

    /// Notes the time in the registers, where it stands still.
    fn latch(&mut self) {
        let (format, now) = (Format(self.status_b()), civil(self.clock_ns()));
        for register in OF_TIME {
            self.cmos[usize::from(register)] = format.show(register, now);
        }
    }

    /// Sets the clock to what the registers say.
    fn set_from_registers(&mut self) {
        match parse(&self.cmos) {
            Some(clock_ns) => self.offset_ns = clock_ns.saturating_sub(host_ns()),
            None => log::debug!("the guest set its real-time clock to no date"),
        }
        self.look_from_now();
    }

    fn read(&mut self) -> u8 {
        let register = self.index;
        match register {
            _ if OF_TIME.contains(&register) && !self.is_setting() => {
                Format(self.status_b()).show(register, civil(self.clock_ns()))
            }
            STATUS_A => {
                let ahead = NS_PER_SECOND - self.clock_ns().rem_euclid(NS_PER_SECOND);
                let updates = !self.is_setting() && ahead <= UPDATE_NS;
                let flag = if updates { A_UPDATING } else { 0 };
                self.cmos[usize::from(STATUS_A)] & !A_UPDATING | flag
            }
            STATUS_C => std::mem::take(&mut self.cmos[usize::from(STATUS_C)]),
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
                self.look_from_now();
            }
            STATUS_C | STATUS_D => {}
            _ => self.cmos[usize::from(register)] = value,
        }
    }
}

impl Registers for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut inner = self.shared.lock();
        for (at, byte) in (offset..).zip(data) {
            *byte = if at == 1 { inner.read() } else { 0xff };
        }
        if inner.index == STATUS_C {
            self.shared.update_line(&inner);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest> {
        let mut inner = self.shared.lock();
        for (at, &byte) in (offset..).zip(data) {
            match at {
                // The highest bit masks NMIs, which there are none of.
                0 => inner.index = byte & 0x7f,
                1 => inner.write(byte),
                _ => {}
            }
        }
        let has_changed = offset == 1 && inner.index == STATUS_B;
        drop(inner);
        if has_changed {
            self.serve_interrupts();
        }
        None
    }
}

impl Quiesce for Rtc {
    fn pause(&self) {
        self.shared.lock().paused = true;
    }

    fn drain(&self, _deadline: Instant) -> Result<(), DrainTimeout> {
        // The thread works under the lock, and not while it is paused.
        Ok(())
    }

    fn resume(&self) {
        self.shared.lock().paused = false;
        self.serve_interrupts();
    }
}

impl Device for Rtc {
    fn name(&self) -> String {
        "rtc.0".to_owned()
    }

    fn save(&self) -> Vec<StateSection> {
        let inner = self.shared.lock();
        let realtime_ns = host_ns();
        let state = RtcV1 {
            index: inner.index,
            cmos: inner.cmos.to_vec(),
            clock_ns: realtime_ns.saturating_add(inner.offset_ns),
            realtime_ns,
        };
        vec![StateSection::encode(0, &state)]
    }

    fn restore(&self, state: &mut StateSet) -> Result<(), StateError> {
        let saved: RtcV1 = state.take(0)?;
        let malformed = StateError::Malformed {
            kind: RtcV1::KIND,
            instance: 0,
            source: None,
        };
        let mut inner = self.shared.lock();
        inner.cmos = saved.cmos.try_into().map_err(|_| malformed)?;
        inner.index = saved.index & 0x7f;
        // Behind the host by the time between, or as far ahead as it was.
        let host = match self.after_restore {
            ClockPolicy::Continue => host_ns(),
            ClockPolicy::Realtime => saved.realtime_ns,
        };
        inner.offset_ns = saved.clock_ns.saturating_sub(host);
        inner.last_second = saved.clock_ns.div_euclid(NS_PER_SECOND);
        // The level of a line is in no controller's state.
        self.shared.update_line(&inner);
        Ok(())
    }

    fn reset(&self) {
        // It has a battery; only its interrupts end.
        let mut inner = self.shared.lock();
        inner.cmos[usize::from(STATUS_B)] &= !B_INTERRUPTS;
        inner.cmos[usize::from(STATUS_C)] = 0;
        self.shared.update_line(&inner);
    }
}

#[cfg(test)]
mod tests;
