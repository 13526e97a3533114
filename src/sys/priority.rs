//! Scheduling of this process's threads (sched(7)).
#![expect(unsafe_code, reason = "rustix sets no scheduling policy")]

use std::fs;
use std::io;
use std::time::Duration;

use rustix::process::{Resource, geteuid, getrlimit};
use rustix::thread::Pid;

/// Returns the calling thread.
pub fn this_thread() -> Pid {
    rustix::thread::gettid()
}

/// Lets every other thread that wants the CPU go before the calling one: `SCHED_IDLE`.
///
/// Fails with `PermissionDenied` for a process that could not take it back later.
pub fn run_when_idle(nice: u8) -> io::Result<()> {
    // A process without privilege may leave SCHED_IDLE only for a niceness that its limit allows.
    let allowed = getrlimit(Resource::Nice).current.unwrap_or(u64::MAX);
    if !geteuid().is_root() && allowed < u64::from(20_u8.saturating_sub(nice)) {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    set_policy(this_thread(), libc::SCHED_IDLE)
}

/// Has a thread of this process take turns with others, by niceness: the ordinary policy.
pub fn run_in_turn(thread: Pid) -> io::Result<()> {
    set_policy(thread, libc::SCHED_OTHER)
}

/// Gives a thread of this process the niceness of 0, which takes privilege if it has a higher one.
pub fn run_as_equal(thread: Pid) -> io::Result<()> {
    // On Linux niceness is a thread's own, and a thread's number is taken for its process's.
    Ok(rustix::process::setpriority_process(Some(thread), 0)?)
}

fn set_policy(thread: Pid, policy: libc::c_int) -> io::Result<()> {
    let param = libc::sched_param { sched_priority: 0 };
    let thread = thread.as_raw_nonzero().get();
    // SAFETY: the kernel reads `param` during the call.
    let result = unsafe { libc::sched_setscheduler(thread, policy, &raw const param) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What a thread does, and how long it has been on a CPU since it began.
#[derive(Clone, Copy, Debug, Default)]
pub struct Turns {
    /// It runs, or waits for a CPU that others have.
    pub wants_cpu: bool,
    /// Time on a CPU.
    pub ran: Duration,
}

/// Looks at a thread of this process; `None` where it has ended, or the kernel does not tell.
pub fn turns(thread: Pid) -> Option<Turns> {
    let read = |file: &str| {
        let thread = thread.as_raw_nonzero();
        fs::read_to_string(format!("/proc/self/task/{thread}/{file}")).ok()
    };
    // Time on a CPU first (Documentation/scheduler/sched-stats.rst). The time spent waiting, which
    // follows, is of no use here: it is counted when the wait is over.
    let ran = read("schedstat")?.split_whitespace().next()?.parse().ok()?;
    // The state follows the name, which may hold anything (proc_pid_stat(5)).
    let stat = read("stat")?;
    let (_, state) = stat.rsplit_once(')')?;
    Some(Turns {
        wants_cpu: state.trim_start().starts_with('R'),
        ran: Duration::from_nanos(ran),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_gave_way_can_take_turns_again() {
        std::thread::spawn(|| {
            if run_when_idle(10).is_ok() {
                run_in_turn(this_thread()).unwrap();
                run_as_equal(this_thread()).unwrap();
            }
            let before = turns(this_thread()).unwrap();
            assert!(before.wants_cpu);
            assert!(turns(this_thread()).unwrap().ran >= before.ran);
        })
        .join()
        .unwrap();
    }
}
