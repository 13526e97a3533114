//! The signal mask of threads that we start.
#![expect(unsafe_code, reason = "pthread_sigmask has no safe wrapper in rustix")]

use std::mem::MaybeUninit;
use std::ptr;

/// Blocks every signal in the calling thread until dropped.
///
/// Threads started meanwhile inherit the full mask, so that no signal of the process that we live
/// in is ever handled by one of ours, not even in a thread's first instructions.
#[derive(Debug)]
pub struct SignalsBlocked {
    before: libc::sigset_t,
    // The mask is the thread's: the guard must not wander to another one.
    _not_send: std::marker::PhantomData<*const ()>,
}

impl SignalsBlocked {
    /// Blocks all signals that can be blocked.
    pub fn new() -> Self {
        let mut all = MaybeUninit::uninit();
        // SAFETY: `all` is writable; the call initializes it and cannot fail.
        unsafe { libc::sigfillset(all.as_mut_ptr()) };
        let mut before = MaybeUninit::uninit();
        // SAFETY: `all` was initialized above, `before` is writable.
        let failed =
            unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) };
        assert_eq!(failed, 0, "SIG_SETMASK is a valid request");
        Self {
            // SAFETY: the call above succeeded, and so wrote the old mask.
            before: unsafe { before.assume_init() },
            _not_send: std::marker::PhantomData,
        }
    }
}

impl Default for SignalsBlocked {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for SignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: `before` is a mask that the kernel gave; the old mask is not asked for.
        let failed = unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, ptr::null_mut())
        };
        debug_assert_eq!(failed, 0, "SIG_SETMASK is a valid request");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::thread;

    /// The calling thread's mask of blocked signals, as the kernel shows it.
    fn blocked() -> u64 {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let line = status
            .lines()
            .find(|line| line.starts_with("SigBlk:"))
            .unwrap();
        u64::from_str_radix(line.split_whitespace().nth(1).unwrap(), 16).unwrap()
    }

    #[test]
    fn a_thread_started_under_the_guard_blocks_signals_and_its_parent_gets_its_own_mask_back() {
        let before = blocked();
        let guard = SignalsBlocked::new();
        let child = thread::spawn(blocked).join().unwrap();
        drop(guard);
        let bit = |signal: i32| 1_u64 << (signal - 1);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGUSR1, libc::SIGRTMIN()] {
            assert_ne!(child & bit(signal), 0, "signal {signal}");
        }
        assert_eq!(blocked(), before);
    }
}
