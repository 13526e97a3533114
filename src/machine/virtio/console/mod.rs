//! A virtio console: one terminal, without the extension to several ports.
//!
//! The device keeps no bytes. What the host does not take yet stays in the guest's ring, and what
//! the guest has no room for stays in the host: over a pause nothing is under way but a request of
//! which a part has gone out, and the state says how much. Linux waits for each request that it
//! prints, with interrupts off, so a reader that takes nothing holds it up for [`STALL_MAX`] once;
//! then output is dropped until the reader goes on, as a serial port's is.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::event::epoll::{self, EventData, EventFlags};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;

use super::timer::Timer;
use super::{Backend, Fault, Kind, Stop, Virtqueue, Work};
use crate::machine::device::BackendError;
use crate::machine::device::backend::{
    Backend as HostEnd, REOPEN_INTERVAL, Received, STALL_MAX, Sent, wait_until_read,
};
use crate::machine::memory::GuestMemory;
use crate::machine::spec::SerialBackend;
use crate::state::virtio::VirtioConsoleV1;
use crate::state::{StateError, StateSection, StateSet};

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 64;
/// What goes over at once.
const CHUNK_BYTES: usize = 4096;

/// A console.
#[derive(Debug)]
pub struct Console {
    path: Option<PathBuf>,
    line: Mutex<Line>,
    /// Readable when the host's end is ready for what is wanted of it.
    ready: OwnedFd,
    /// Expires when the host's end is to be looked at again. Part of `ready`.
    timer: Timer,
}

/// The host's side.
#[derive(Debug)]
struct Line {
    host: HostEnd,
    /// Bytes of the next request that have gone out.
    taken: usize,
    /// Since when the host takes nothing.
    full_since: Option<Instant>,
    /// For how long that holds the guest up.
    stall_max: Duration,
    /// What `ready` waits for now, besides the timer.
    watched: Vec<Arc<OwnedFd>>,
}

/// Why one direction does not go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waits {
    /// For the driver, which tells.
    Queue,
    /// For the host's end.
    Host,
    /// For the other direction to have its turn.
    Turn,
}

impl Console {
    /// Opens the host's end and makes the device.
    pub fn open(backend: &SerialBackend) -> Result<Self, BackendError> {
        Self::with_stall_max(backend, STALL_MAX)
    }

    fn with_stall_max(backend: &SerialBackend, stall_max: Duration) -> Result<Self, BackendError> {
        let wait_at = || -> io::Result<_> {
            let ready = epoll::create(epoll::CreateFlags::CLOEXEC)?;
            let timer = Timer::new()?;
            epoll::add(&ready, &timer, EventData::new_u64(0), EventFlags::IN)?;
            Ok((ready, timer))
        };
        let (ready, timer) =
            wait_at().map_err(BackendError::new("make what a console waits at"))?;
        let host = HostEnd::open(backend)?;
        Ok(Self {
            path: host.path().map(Into::into),
            line: Mutex::new(Line {
                host,
                taken: 0,
                full_since: None,
                stall_max,
                watched: Vec::new(),
            }),
            ready,
            timer,
        })
    }

    /// Returns the terminal, file or socket of the host, where there is one.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Waits until who has the terminal open has read what the guest wrote, or until `deadline`.
    pub fn flush_until(&self, deadline: Instant) {
        let is_terminal = self.lock().host.is_terminal();
        if is_terminal {
            wait_until_read(deadline, || self.lock().host.is_unread());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Line> {
        self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `ready` tell when the host's end has input, or takes output.
    fn watch(&self, line: &mut Line, [input, output]: [bool; 2]) {
        for fd in line.watched.drain(..) {
            // Fails only where it was not added.
            epoll::delete(&self.ready, &fd).ok();
        }
        let fds = line.host.poll_for(input, output);
        let look_again = fds.is_empty() && input && line.host.is_terminal();
        for (fd, wanted) in fds {
            let mut events = EventFlags::empty();
            events.set(EventFlags::IN, wanted.contains(PollFlags::IN));
            events.set(EventFlags::OUT, wanted.contains(PollFlags::OUT));
            match epoll::add(&self.ready, &fd, EventData::new_u64(1), events) {
                Ok(()) => line.watched.push(fd),
                Err(error) => log::debug!("a console's end cannot be waited for: {error}"),
            }
        }
        // A reader that takes nothing is given up after a while.
        let again = output.then_some(line.stall_max);
        self.timer
            .set(again.or(look_again.then_some(REOPEN_INTERVAL)));
    }
}

impl Line {
    /// Carries what the guest prints to the host.
    fn transmit(
        &mut self,
        queue: &mut Virtqueue,
        memory: &GuestMemory,
        stop: &Stop,
    ) -> Result<Waits, Fault> {
        for _ in 0..QUEUE_SIZE {
            if stop.is_set() {
                return Ok(Waits::Queue);
            }
            let Some(chain) = queue.pop(memory)? else {
                return Ok(Waits::Queue);
            };
            let mut rest = chain.readable.clone();
            drop(rest.take_front(self.taken));
            while !rest.is_empty() {
                match self.send(&rest) {
                    Sent::Bytes(sent) if sent > 0 => {
                        drop(rest.take_front(sent));
                        self.taken += sent;
                        self.full_since = None;
                    }
                    Sent::Bytes(_) | Sent::Full if !self.has_stalled() => {
                        queue.put_back();
                        return Ok(Waits::Host);
                    }
                    Sent::Bytes(_) | Sent::Full | Sent::Discarded => break,
                }
                if stop.is_set() && !rest.is_empty() {
                    queue.put_back();
                    return Ok(Waits::Queue);
                }
            }
            self.taken = 0;
            queue.complete(memory, &chain, 0)?;
        }
        Ok(Waits::Turn)
    }

    /// Returns whether the host has taken nothing for too long.
    fn has_stalled(&mut self) -> bool {
        let since = *self.full_since.get_or_insert_with(Instant::now);
        since.elapsed() >= self.stall_max
    }

    /// Sends the first bytes.
    fn send(&mut self, from: &super::Slices<'_>) -> Sent {
        let mut bytes = [0; CHUNK_BYTES];
        let count = from.len().min(CHUNK_BYTES);
        let bytes = &mut bytes[..count];
        let whole = from.clone().read(bytes);
        debug_assert!(whole, "there are as many");
        self.host.send(bytes)
    }

    /// Carries what the host has to the guest, as far as it has buffers.
    fn receive(
        &mut self,
        queue: &mut Virtqueue,
        memory: &GuestMemory,
        stop: &Stop,
    ) -> Result<Waits, Fault> {
        for _ in 0..QUEUE_SIZE {
            if stop.is_set() {
                return Ok(Waits::Queue);
            }
            let Some(chain) = queue.pop(memory)? else {
                return Ok(Waits::Queue);
            };
            let mut bytes = [0; CHUNK_BYTES];
            let room = chain.writable.len().min(CHUNK_BYTES);
            if room == 0 {
                return Err(queue.fault("a buffer has no room for a byte"));
            }
            let Received::Bytes(count) = self.host.receive(&mut bytes[..room]) else {
                queue.put_back();
                return Ok(Waits::Host);
            };
            let written = chain.writable.clone().write(&bytes[..count]);
            let written = u32::try_from(written).expect("at most a chunk");
            queue.complete(memory, &chain, written)?;
        }
        Ok(Waits::Turn)
    }
}

impl Backend for Console {
    fn kind(&self) -> Kind {
        Kind {
            device_type: u16::try_from(VIRTIO_ID_CONSOLE).expect("a small number"),
            class: 0x07_8000,
            name: "console",
        }
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn process(&self, work: &mut Work<'_>) -> Result<(), Fault> {
        let mut line = self.lock();
        // Buffers for what is typed, and what the guest prints.
        let [receive, transmit] = &mut *work.queues else {
            return Ok(());
        };
        let (memory, stop) = (work.memory, work.stop);
        let waits = loop {
            line.host.accept();
            let sent = match transmit {
                Some(queue) => line.transmit(queue, memory, stop)?,
                None => Waits::Queue,
            };
            let received = match receive {
                Some(queue) => line.receive(queue, memory, stop)?,
                None => Waits::Queue,
            };
            if stop.is_set() || ![sent, received].contains(&Waits::Turn) {
                break [received, sent].map(|waits| waits == Waits::Host);
            }
        };
        self.watch(&mut line, waits);
        Ok(())
    }

    fn poll_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        Some((self.ready.as_fd(), PollFlags::IN))
    }

    fn save(&self, instance: u32) -> Option<StateSection> {
        let taken = u32::try_from(self.lock().taken).expect("a chain has less than 4 GiB");
        Some(StateSection::encode(instance, &VirtioConsoleV1 { taken }))
    }

    fn restore(&self, instance: u32, state: &mut StateSet) -> Result<(), StateError> {
        let saved: VirtioConsoleV1 = state.take(instance)?;
        self.lock().taken = saved.taken as usize;
        Ok(())
    }

    fn reset(&self) {
        self.lock().taken = 0;
    }
}
