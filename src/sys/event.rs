//! An eventfd that KVM can set by itself, and that a thread polls.
#![expect(
    unsafe_code,
    reason = "vmm-sys-util's eventfd, which kvm-ioctls asks for, cannot be borrowed as a descriptor"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// An event: set by whoever has work, cleared by whoever does it.
#[derive(Debug)]
pub struct Event(EventFd);

impl Event {
    /// Makes an event that is not set.
    pub fn new() -> io::Result<Self> {
        // vmm-sys-util does not set FD_CLOEXEC by itself.
        EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC).map(Self)
    }

    /// Sets the event.
    pub fn set(&self) {
        // Fails only where the counter is full, and then the event is set already.
        if let Err(error) = self.0.write(1) {
            log::debug!("an event is set already: {error}");
        }
    }

    /// Clears the event; one that is not set stays so.
    pub fn clear(&self) {
        if let Err(error) = self.0.read()
            && error.kind() != io::ErrorKind::WouldBlock
        {
            log::debug!("could not clear an event: {error}");
        }
    }

    /// Returns the form that kvm-ioctls takes.
    pub fn for_kvm(&self) -> &EventFd {
        &self.0
    }
}

impl AsFd for Event {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: `self.0` owns the descriptor, and outlives the borrow of `self`.
        unsafe { BorrowedFd::borrow_raw(self.0.as_raw_fd()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    fn is_set(event: &Event) -> bool {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&now)).unwrap() == 1
    }

    #[test]
    fn an_event_is_set_until_it_is_cleared() {
        let event = Event::new().unwrap();
        assert!(!is_set(&event));
        event.clear();
        event.set();
        event.set();
        assert!(is_set(&event));
        event.clear();
        assert!(!is_set(&event));
    }
}
