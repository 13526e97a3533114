//! Kicking vCPU threads out of the guest.
//!
//! No handler is installed. The kick signal is blocked in the thread and let through only while
//! the thread is inside `KVM_RUN` (see [`crate::sys::kvm::set_signal_mask`]); there a pending
//! kick ends the ioctl with `EINTR`, and [`consume`] takes it off the thread's queue.
#![expect(
    unsafe_code,
    reason = "thread-directed signals have no wrapper without a handler"
)]

use std::io;
use std::ptr;

use libc::{c_int, c_long};

/// Signals in the kernel's own set: one bit each, signal 1 in bit 0.
pub const KERNEL_SIGSET_BYTES: usize = 8;

/// The highest signal number of Linux.
const SIGNAL_MAX: c_int = 64;

/// Returns the signal that kicks vCPUs unless the caller chose another: the first real-time one.
pub fn default_kick() -> c_int {
    libc::SIGRTMIN()
}

/// Returns the set of all signals but `signal`, as the kernel lays it out.
///
/// # Panics
/// When `signal` is no signal.
pub fn all_but(signal: c_int) -> u64 {
    assert!(
        (1..=SIGNAL_MAX).contains(&signal),
        "{signal} is not a signal"
    );
    !(1_u64 << (signal - 1))
}

/// Changes the calling thread's mask; returns what it was.
fn change_mask(how: c_int, set: u64) -> io::Result<u64> {
    let mut before = 0_u64;
    // SAFETY: both sets are `KERNEL_SIGSET_BYTES` long, as the last argument says, and live over
    // the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            how,
            &raw const set,
            &raw mut before,
            KERNEL_SIGSET_BYTES,
        )
    };
    if result == 0 {
        Ok(before)
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Blocks `signal` in the calling thread, and returns the mask that it had (signal 1 in bit 0).
pub fn block(signal: c_int) -> io::Result<u64> {
    change_mask(libc::SIG_BLOCK, !all_but(signal))
}

/// Unblocks `signal` in the calling thread.
pub fn unblock(signal: c_int) -> io::Result<()> {
    change_mask(libc::SIG_UNBLOCK, !all_but(signal)).map(|_| ())
}

/// Takes every pending `signal` off the calling thread's queue; none pending is no error.
pub fn consume(signal: c_int) {
    let set: u64 = !all_but(signal);
    let zero = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    loop {
        // SAFETY: the set is `KERNEL_SIGSET_BYTES` long, as the last argument says, and lives
        // over the call, as does the timeout; a null siginfo is allowed.
        let taken = unsafe {
            libc::syscall(
                libc::SYS_rt_sigtimedwait,
                &raw const set,
                ptr::null_mut::<libc::siginfo_t>(),
                &raw const zero,
                KERNEL_SIGSET_BYTES,
            )
        };
        if taken != c_long::from(signal) {
            return;
        }
    }
}

/// Sends `signal` to thread `tid` of this process.
///
/// The caller knows that the thread lives: the number of an ended thread may be given to another,
/// whose default action for the signal could end the process.
pub fn send_to_thread(tid: i32, signal: c_int) -> io::Result<()> {
    let pid = c_long::from(rustix::process::getpid().as_raw_nonzero().get());
    // SAFETY: tgkill takes plain numbers and touches no memory of ours.
    let result = unsafe {
        libc::syscall(
            libc::SYS_tgkill,
            pid,
            c_long::from(tid),
            c_long::from(signal),
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blocked_signal_waits_until_it_is_consumed() {
        std::thread::spawn(|| {
            let _blocked = super::super::sigmask::SignalsBlocked::new();
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            let kick = default_kick();
            send_to_thread(tid, kick).unwrap();
            send_to_thread(tid, kick).unwrap();
            consume(kick);
            consume(kick);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_signal_is_blocked_and_unblocked_alone() {
        std::thread::spawn(|| {
            let kick = default_kick();
            let before = block(kick).unwrap();
            assert_eq!(before & !all_but(kick), 0);
            assert_eq!(block(kick).unwrap(), before | !all_but(kick));
            unblock(kick).unwrap();
            assert_eq!(block(kick).unwrap(), before);
        })
        .join()
        .unwrap();
    }

    #[test]
    fn the_kernel_set_leaves_out_one_signal() {
        assert_eq!(all_but(1), !1);
        assert_eq!(all_but(64), !(1 << 63));
    }

    #[test]
    #[should_panic(expected = "not a signal")]
    fn a_number_that_is_no_signal_is_refused() {
        all_but(65);
    }
}
