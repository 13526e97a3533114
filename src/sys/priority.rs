//! Scheduling of the calling thread (sched(7)).
#![expect(unsafe_code, reason = "rustix sets no scheduling policy")]

use std::fs;
use std::io;
use std::time::Duration;

use rustix::process::{Resource, geteuid, getrlimit};

/// Lets every other thread that wants the CPU go first: `SCHED_IDLE`.
///
/// Fails with `PermissionDenied` for a process that could not take it back later.
pub fn run_when_idle(nice: u8) -> io::Result<()> {
    // A process without privilege may leave SCHED_IDLE only for a niceness that its limit allows.
    let allowed = getrlimit(Resource::Nice).current.unwrap_or(u64::MAX);
    if !geteuid().is_root() && allowed < u64::from(20_u8.saturating_sub(nice)) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    set_policy(libc::SCHED_IDLE)
}

/// Takes turns with other threads, by niceness: the ordinary policy.
pub fn run_in_turn() -> io::Result<()> {
    set_policy(libc::SCHED_OTHER)
}

fn set_policy(policy: libc::c_int) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: the kernel reads `param` during the call; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, policy, &raw const param) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Returns how long the calling thread has waited for a CPU that others had, since it began;
/// `None` where the kernel does not count that.
pub fn waited_for_cpu() -> Option<Duration> {
    // Time on a CPU, time waiting for one, turns (Documentation/scheduler/sched-stats.rst).
    let text = fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    let waited = text.split_whitespace().nth(1)?;
    waited.parse().ok().map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_gave_way_can_take_turns_again() {
        std::thread::spawn(|| {
            if run_when_idle(10).is_ok() {
                run_in_turn().unwrap();
            }
            if let Some(before) = waited_for_cpu() {
                assert!(waited_for_cpu().unwrap() >= before);
            }
        })
        .join()
        .unwrap();
    }
}
