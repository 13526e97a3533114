//! When a device's thread is to look again though nothing tells it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// Readable when it has expired, until it is set again or asked.
#[derive(Debug)]
pub(super) struct Timer(OwnedFd);

impl Timer {
    /// Makes a timer that is not set.
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Has it expire once after `time`, or never.
    pub(super) fn set(&self, time: Option<Duration>) {
        self.start(time, Duration::ZERO);
    }

    /// Has it expire at once, and again each time `period` has passed; never where that is zero.
    pub(super) fn set_every(&self, period: Duration) {
        let first = (!period.is_zero()).then_some(Duration::ZERO);
        self.start(first, period);
    }

    fn start(&self, first: Option<Duration>, period: Duration) {
        // A time of zero would stop the timer.
        let first = first.map_or(Duration::ZERO, |time| time.max(Duration::from_micros(1)));
        let setting = Itimerspec {
            it_interval: timespec(period),
            it_value: timespec(first),
        };
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &setting) {
            log::warn!("could not set a device's timer: {error}");
        }
    }

    /// Returns whether it has expired since it was last set or asked.
    pub(super) fn take_expired(&self) -> bool {
        let mut count = [0; 8];
        rustix::io::read(&self.0, &mut count).is_ok()
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn timespec(time: Duration) -> Timespec {
    Timespec {
        tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    }
}
