//! A virtqueue in use, and the buffers of one request.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{GuestMemoryBackend, VolatileSlice};

use super::registers::Interrupts;
use crate::machine::memory::{GuestMemory, MarkHostWritesPart};

/// A guest that breaks the rules of virtio.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("queue {queue}: {what}")]
pub struct Fault {
    /// Number of the queue.
    pub queue: u16,
    /// Which rule.
    pub what: &'static str,
}

/// A queue that the driver has enabled.
#[derive(Debug)]
pub struct Virtqueue {
    queue: Queue,
    number: u16,
    interrupts: Arc<Interrupts>,
}

/// Guest memory in pieces, in order.
#[derive(Clone, Debug, Default)]
pub struct Slices<'m>(VecDeque<VolatileSlice<'m, MarkHostWritesPart<'m>>>);

/// The buffers of one request.
#[derive(Clone, Debug)]
pub struct Chain<'m> {
    /// What the device reads.
    pub readable: Slices<'m>,
    /// What the device writes.
    pub writable: Slices<'m>,
    head: u16,
}

impl Virtqueue {
    pub(super) fn new(queue: Queue, number: u16, interrupts: Arc<Interrupts>) -> Self {
        Self {
            queue,
            number,
            interrupts,
        }
    }

    pub(super) fn queue(&self) -> &Queue {
        &self.queue
    }

    /// Makes a fault of this queue.
    pub fn fault(&self, what: &'static str) -> Fault {
        Fault {
            queue: self.number,
            what,
        }
    }

    /// Takes the next request; `None` when there is none, and the driver is going to tell of the
    /// next one.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, Fault> {
        while !self.is_behind(memory)? {
            let more = self.queue.enable_notification(memory);
            if !more.map_err(|_| self.fault("the used ring cannot be written"))? {
                return Ok(None);
            }
        }
        let disorder = |_| Fault {
            queue: self.number,
            what: "the available ring is not in order",
        };
        let next = self.queue.iter(memory).map_err(disorder)?.next();
        match next {
            Some(chain) => self.gather(memory, chain).map(Some),
            // It had a request just before.
            None => Err(self.fault("the available ring cannot be read")),
        }
    }

    /// Returns whether there are requests that have not been taken.
    fn is_behind(&self, memory: &GuestMemory) -> Result<bool, Fault> {
        let index = self.queue.avail_idx(memory, Ordering::Acquire);
        let index = index.map_err(|_| self.fault("the available ring cannot be read"))?;
        Ok(index.0 != self.queue.next_avail())
    }

    /// Puts a request back that has not been begun.
    pub fn put_back(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Tells the driver that the request is done, and that the device wrote `written` bytes.
    pub fn complete(
        &mut self,
        memory: &GuestMemory,
        chain: &Chain<'_>,
        written: u32,
    ) -> Result<(), Fault> {
        let failed = |_| Fault {
            queue: self.number,
            what: "the used ring cannot be written",
        };
        self.queue
            .add_used(memory, chain.head, written)
            .map_err(failed)?;
        if self.queue.needs_notification(memory).map_err(failed)? {
            self.interrupts.signal_queue(self.number);
        }
        Ok(())
    }

    /// Looks up the buffers of a request, and holds it to the rules.
    fn gather<'m>(
        &self,
        memory: &'m GuestMemory,
        mut chain: DescriptorChain<&'m GuestMemory>,
    ) -> Result<Chain<'m>, Fault> {
        let mut found = Chain {
            readable: Slices::default(),
            writable: Slices::default(),
            head: chain.head_index(),
        };
        let mut ends = false;
        for descriptor in chain.by_ref() {
            ends = !descriptor.has_next();
            let into = if descriptor.is_write_only() {
                &mut found.writable
            } else if found.writable.is_empty() {
                &mut found.readable
            } else {
                return Err(self.fault("a readable buffer follows a writable one"));
            };
            let len = usize::try_from(descriptor.len()).unwrap_or(usize::MAX);
            for slice in memory.get_slices(descriptor.addr(), len) {
                let slice = slice.map_err(|_| self.fault("a buffer is outside of memory"))?;
                into.0.push_back(slice);
            }
        }
        if ends {
            Ok(found)
        } else {
            // A loop, an index out of range, a table of descriptors that is none.
            Err(self.fault("a chain of descriptors does not end"))
        }
    }
}

impl<'m> Slices<'m> {
    /// Returns whether no byte is left.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns how many bytes are left: less than 4 GiB, by the rules for chains.
    pub fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// Splits off the first `len` bytes, or all where there are fewer.
    pub fn take_front(&mut self, len: usize) -> Self {
        let mut front = VecDeque::new();
        let mut left = len;
        while left > 0
            && let Some(slice) = self.0.pop_front()
        {
            if slice.len() > left {
                let (first, rest) = slice.split_at(left).expect("inside the slice");
                front.push_back(first);
                self.0.push_front(rest);
                break;
            }
            left -= slice.len();
            front.push_back(slice);
        }
        Self(front)
    }

    /// Copies the first bytes to `into` and takes them off; false where there are too few.
    #[must_use = "bytes that are missing must not be taken for zeros"]
    pub fn read(&mut self, into: &mut [u8]) -> bool {
        let front = self.take_front(into.len());
        let mut at = 0;
        for slice in &front.0 {
            at += slice.copy_to(&mut into[at..]);
        }
        at == into.len()
    }

    /// Copies `from` to the first bytes and takes them off; returns how many there was room for.
    pub fn write(&mut self, from: &[u8]) -> usize {
        let front = self.take_front(from.len());
        let mut at = 0;
        for slice in &front.0 {
            let part = &from[at..at + slice.len()];
            slice.copy_from(part);
            at += slice.len();
        }
        at
    }

    /// Returns the pieces, for system calls that take guest memory.
    pub fn as_slices(&mut self) -> &[VolatileSlice<'m, MarkHostWritesPart<'m>>] {
        self.0.make_contiguous()
    }
}
