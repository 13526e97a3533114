//! The threads that a vCPU waits for when it writes a piece that is not captured.
//!
//! A handler allocates nothing, logs nothing, and takes no lock that is held by code which may
//! touch guest memory. It waits for storage only where staging is full, which is counted, and
//! which the [watch](super::watch) bounds.

use std::sync::Arc;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::capture::CopyOnWrite;
use super::protection_failed;
use super::watch::StallWatch;
use crate::checkpoint::error::Halt;
use crate::checkpoint::stalls::StallCounter;

/// How often a handler without work looks whether it is still wanted.
const IDLE: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 10_000_000,
};

/// Faults that may be told at once: no more than there are threads that write guest memory.
const FAULTS: usize = 64;

/// One handler; see the module.
pub(super) struct FaultHandler {
    cow: Arc<CopyOnWrite>,
    watch: Arc<StallWatch>,
    number: usize,
    addresses: Vec<usize>,
    stalls: StallCounter,
}

impl FaultHandler {
    pub(super) fn new(cow: Arc<CopyOnWrite>, watch: Arc<StallWatch>, number: usize) -> Self {
        Self {
            cow,
            watch,
            number,
            addresses: Vec::with_capacity(FAULTS),
            stalls: StallCounter::new(),
        }
    }

    /// Serves faults until memory is released; returns how long each took.
    pub(super) fn run(mut self) -> Result<StallCounter, Halt> {
        while !self.cow.is_released() {
            if self.cow.control().check().is_err() {
                // Whoever stopped the checkpoint may be stuck: writers must not wait for that.
                self.cow.protection().end();
                return Err(Halt::Stopped);
            }
            self.wait()?;
            let began = Instant::now();
            self.addresses.clear();
            let userfault = self.cow.protection().userfault();
            let found = userfault.read_faults(&mut self.addresses);
            if found.map_err(protection_failed)? {
                self.serve(began)?;
            }
        }
        Ok(self.stalls)
    }

    fn wait(&self) -> Result<(), Halt> {
        let mut fds = [
            PollFd::new(self.cow.protection().userfault(), PollFlags::IN),
            PollFd::new(self.cow.wake_up(), PollFlags::IN),
        ];
        match poll(&mut fds, Some(&IDLE)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(protection_failed(error.into()).into()),
        }
    }

    fn serve(&mut self, began: Instant) -> Result<(), Halt> {
        self.watch.begin(self.number);
        for &address in &self.addresses {
            // An address outside every region is one of a mapping that was given up.
            let Some(piece) = self.cow.layout().piece_at(address) else {
                continue;
            };
            let waited = self.cow.let_write(piece)?;
            self.stalls.waited_for_staging += u64::from(waited);
            self.stalls.add(began.elapsed());
            self.watch.served(self.number);
        }
        self.watch.end(self.number);
        Ok(())
    }
}
