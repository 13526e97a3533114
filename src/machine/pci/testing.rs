//! A machine around a function, for tests.

use std::sync::Mutex;

use super::Platform;
use crate::sys::event::Event;

/// Notes what a function asks for.
#[derive(Debug, Default)]
pub struct Recorder {
    messages: Mutex<Vec<(u64, u32)>>,
    attached: Mutex<Vec<u64>>,
}

impl Recorder {
    /// Returns the messages sent so far.
    pub fn messages(&self) -> Vec<(u64, u32)> {
        self.messages.lock().unwrap().clone()
    }

    /// Returns the addresses whose writes set an event.
    pub fn attached(&self) -> Vec<u64> {
        self.attached.lock().unwrap().clone()
    }
}

impl Platform for Recorder {
    fn send_msi(&self, address: u64, data: u32) {
        self.messages.lock().unwrap().push((address, data));
    }

    fn attach(&self, _event: &Event, gpa: u64) {
        self.attached.lock().unwrap().push(gpa);
    }

    fn detach(&self, _event: &Event, gpa: u64) {
        self.attached.lock().unwrap().retain(|&other| other != gpa);
    }
}
