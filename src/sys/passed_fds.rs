//! Descriptors that a service manager passed to the program.
#![expect(unsafe_code, reason = "a descriptor's number becomes its owner")]

use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::{FdFlags, fcntl_setfd};

/// The first of them (SD_LISTEN_FDS_START).
const FIRST: i32 = 3;

/// Takes the descriptors 3 to 3 + `count` - 1, and keeps them from programs that are started.
///
/// For the start of `main`, where nothing else can have taken these numbers. Only the first call
/// returns any; numbers that are not open are left out.
pub fn take(count: usize) -> Vec<OwnedFd> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Vec::new();
    }
    (FIRST..)
        .take(count)
        .filter_map(|number| {
            // SAFETY: it only asks whether the number is open.
            if unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
                return None;
            }
            // SAFETY: it is open, as was just asked, and the caller promises by calling this at
            // its start that nobody else owns it; no number is taken twice.
            let owned = unsafe { OwnedFd::from_raw_fd(number) };
            fcntl_setfd(&owned, FdFlags::CLOEXEC).ok()?;
            Some(owned)
        })
        .collect()
}
