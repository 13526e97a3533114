//! The signals that ask a program to end, taken by a thread rather than a handler.
#![expect(unsafe_code, reason = "sigwait has no safe wrapper")]

use std::io;
use std::mem::MaybeUninit;
use std::ptr;
use std::thread;

use libc::{c_int, sigset_t};

/// SIGINT, SIGTERM and SIGHUP, blocked in this thread and in all that it starts from now on.
///
/// For programs, not for the library: make it at the start of `main`.
#[derive(Debug)]
pub struct TerminationSignals {
    _blocked: (),
}

impl TerminationSignals {
    /// Blocks the signals in the calling thread.
    pub fn block() -> io::Result<Self> {
        let set = set();
        // SAFETY: the set is initialized; a null old set is allowed.
        let error =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, ptr::null_mut()) };
        if error == 0 {
            Ok(Self { _blocked: () })
        } else {
            Err(io::Error::from_raw_os_error(error))
        }
    }

    /// Calls `action` in a thread of its own whenever one of the signals comes.
    pub fn on_signal(&self, action: impl Fn() + Send + 'static) -> io::Result<()> {
        thread::Builder::new()
            .name("lvp-signals".to_owned())
            .spawn(move || {
                let set = set();
                let mut signal: c_int = 0;
                // SAFETY: both point to live locals; the signals are blocked in this thread, which
                // inherited its mask.
                while unsafe { libc::sigwait(&raw const set, &raw mut signal) } == 0 {
                    log::info!("signal {signal}");
                    action();
                }
            })?;
        Ok(())
    }
}

fn set() -> sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set it is given, which is ours.
    unsafe { libc::sigemptyset(set.as_mut_ptr()) };
    // SAFETY: initialized by the call above.
    let mut set = unsafe { set.assume_init() };
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the set is initialized and the signal exists.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    set
}
