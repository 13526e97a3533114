//! A virtio network device: packets between a guest's queues and a tap of the host.

mod port;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::event::PollFlags;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use super::{Backend, Chain, Fault, Kind, Virtqueue, Work};
use crate::machine::memory::GuestMemory;
use crate::machine::spec::NetSpec;
use crate::state::virtio::VirtioNetV1;
use crate::state::{StateError, StateSection, StateSet};
use crate::sys::volatile_io;

pub use port::{NetError, Port};

/// Descriptors of each queue.
const QUEUE_SIZE: u16 = 256;
/// Bytes before each packet: `struct virtio_net_hdr_v1`.
const HEADER_BYTES: usize = 12;
/// Where in it is in how many buffers the packet is.
const BUFFER_COUNT_AT: usize = 10;
/// Packets of one direction before it is the other's turn.
const BATCH: usize = 64;

/// What passed a network device since the machine was started. Bytes are without headers of
/// virtio.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Packets to the guest.
    pub received: AtomicU64,
    /// Their bytes.
    pub received_bytes: AtomicU64,
    /// Packets to the guest that had no room in its buffers, or came while its link was down.
    pub received_dropped: AtomicU64,
    /// Packets from the guest.
    pub sent: AtomicU64,
    /// Their bytes.
    pub sent_bytes: AtomicU64,
    /// Packets from the guest that the host refused.
    pub sent_errors: AtomicU64,
    /// Packets from the guest while its link was down.
    pub sent_dropped: AtomicU64,
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Ordering::Relaxed);
}

/// What the device's thread knows of the host's end.
#[derive(Debug)]
struct HostEnd {
    /// What the thread waits for besides its queues.
    wanted: PollFlags,
    /// Whether packets may come with checksums that are to be filled in; `None` before it was told.
    partial_checksums: Option<bool>,
    /// The host's end is gone, and never comes back.
    gone: bool,
}

/// Whether there may be more to do in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    More,
    /// Nothing is left, or the queue has no room: its driver tells when that changes.
    Queue,
    /// The host's end has to become ready.
    Host,
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    name: String,
    mac: [u8; 6],
    link_up: bool,
    port: Port,
    host_end: Mutex<HostEnd>,
    counters: NetCounters,
}

impl Net {
    /// Opens the host's end and makes the device.
    pub fn open(spec: &NetSpec) -> Result<Self, NetError> {
        Ok(Self {
            name: spec.name.clone(),
            mac: spec.mac,
            link_up: spec.link_up,
            port: Port::open(spec)?,
            host_end: Mutex::new(HostEnd {
                wanted: PollFlags::empty(),
                partial_checksums: None,
                gone: false,
            }),
            counters: NetCounters::default(),
        })
    }

    /// Returns its name, as in `net0`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns its hardware address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Returns the name of the host's interface; `None` where the host's end is a socket.
    pub fn interface(&self) -> Option<&str> {
        self.port.interface()
    }

    /// Returns what passed.
    pub fn counters(&self) -> &NetCounters {
        &self.counters
    }

    fn host_end(&self) -> MutexGuard<'_, HostEnd> {
        // Each change is one assignment.
        self.host_end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the host's end send what the driver takes.
    fn agree(&self, host_end: &mut HostEnd, features: u64) {
        let takes = features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0;
        if host_end.partial_checksums == Some(takes) {
            return;
        }
        if let Err(error) = self.port.set_partial_checksums(takes) {
            log::warn!("{}: could not set what checksums come: {error}", self.name);
        }
        host_end.partial_checksums = Some(takes);
    }

    /// Notes that the host's end is gone, as where its interface was deleted.
    fn is_gone(&self, host_end: &mut HostEnd, error: &io::Error) -> bool {
        if error.raw_os_error() != Some(libc::EBADFD) {
            return false;
        }
        if !host_end.gone {
            log::warn!("{}: the host's interface is gone", self.name);
        }
        host_end.gone = true;
        true
    }

    /// Carries packets of the guest to the host.
    fn transmit(
        &self,
        host_end: &mut HostEnd,
        queue: &mut Virtqueue,
        work: (&GuestMemory, &super::Stop),
    ) -> Result<Progress, Fault> {
        let (memory, stop) = work;
        for _ in 0..BATCH {
            if stop.is_set() {
                return Ok(Progress::Queue);
            }
            let Some(chain) = queue.pop(memory)? else {
                return Ok(Progress::Queue);
            };
            let mut packet = chain.readable.clone();
            let Some(bytes) = packet.len().checked_sub(HEADER_BYTES) else {
                return Err(queue.fault("a packet has no header"));
            };
            if self.link_up {
                match volatile_io::send(&self.port, packet.as_slices()) {
                    Ok(()) => {
                        add(&self.counters.sent, 1);
                        add(&self.counters.sent_bytes, bytes);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        queue.put_back();
                        return Ok(Progress::Host);
                    }
                    Err(error) => {
                        // As on a wire: whoever is owed the packet asks for it again.
                        if !self.is_gone(host_end, &error) {
                            log::debug!("{}: a packet was refused: {error}", self.name);
                        }
                        add(&self.counters.sent_errors, 1);
                    }
                }
            } else {
                add(&self.counters.sent_dropped, 1);
            }
            queue.complete(memory, &chain, 0)?;
        }
        Ok(Progress::More)
    }

    /// Carries packets of the host to the guest. A packet is only taken from the host when the
    /// guest has a buffer for it: what is not taken waits there, over a pause as well.
    fn receive(
        &self,
        host_end: &mut HostEnd,
        queue: &mut Virtqueue,
        work: (&GuestMemory, &super::Stop),
    ) -> Result<Progress, Fault> {
        let (memory, stop) = work;
        for _ in 0..BATCH {
            if stop.is_set() || host_end.gone {
                return Ok(Progress::Queue);
            }
            let Some(chain) = queue.pop(memory)? else {
                return Ok(Progress::Queue);
            };
            if chain.writable.len() < HEADER_BYTES {
                return Err(queue.fault("a buffer has no room for a header"));
            }
            match volatile_io::receive(&self.port, chain.writable.clone().as_slices()) {
                Ok(Some(bytes)) if bytes > HEADER_BYTES && self.link_up => {
                    self.deliver(queue, memory, &chain, bytes)?;
                }
                Ok(Some(0)) => {
                    // The other end of a socket is closed.
                    queue.put_back();
                    host_end.gone = true;
                }
                Ok(_) => {
                    queue.put_back();
                    add(&self.counters.received_dropped, 1);
                }
                Err(error) => {
                    queue.put_back();
                    if error.kind() == io::ErrorKind::WouldBlock {
                        return Ok(Progress::Host);
                    }
                    if !self.is_gone(host_end, &error) {
                        log::debug!("{}: a packet was lost: {error}", self.name);
                        add(&self.counters.received_dropped, 1);
                    }
                }
            }
        }
        Ok(Progress::More)
    }

    fn deliver(
        &self,
        queue: &mut Virtqueue,
        memory: &GuestMemory,
        chain: &Chain<'_>,
        bytes: usize,
    ) -> Result<(), Fault> {
        let mut header = chain.writable.clone();
        drop(header.take_front(BUFFER_COUNT_AT));
        header.write(&1_u16.to_le_bytes());
        add(&self.counters.received, 1);
        add(&self.counters.received_bytes, bytes - HEADER_BYTES);
        let written = u32::try_from(bytes).expect("a packet, by the rules for chains");
        queue.complete(memory, chain, written)
    }
}

impl Backend for Net {
    fn kind(&self) -> Kind {
        Kind {
            device_type: u16::try_from(VIRTIO_ID_NET).expect("a small number"),
            class: 0x02_0000,
            name: "net",
        }
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
            | 1 << VIRTIO_NET_F_HOST_TSO4
            | 1 << VIRTIO_NET_F_HOST_TSO6
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE; 2]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let status = if self.link_up {
            VIRTIO_NET_S_LINK_UP
        } else {
            0
        };
        let status = u16::try_from(status).expect("a flag of 16 bits");
        super::read_from(
            &[&self.mac[..], &status.to_le_bytes()].concat(),
            offset,
            data,
        );
    }

    fn process(&self, work: &mut Work<'_>) -> Result<(), Fault> {
        let mut host_end = self.host_end();
        let host_end = &mut *host_end;
        self.agree(host_end, work.features);
        let with = (work.memory, work.stop);
        // Buffers for packets to the guest, and packets from it.
        let [receive, transmit] = work.queues else {
            return Ok(());
        };
        loop {
            let sent = match transmit {
                Some(queue) => self.transmit(host_end, queue, with)?,
                None => Progress::Queue,
            };
            let received = match receive {
                Some(queue) => self.receive(host_end, queue, with)?,
                None => Progress::Queue,
            };
            host_end.wanted.set(PollFlags::OUT, sent == Progress::Host);
            host_end
                .wanted
                .set(PollFlags::IN, received == Progress::Host);
            if sent != Progress::More && received != Progress::More {
                return Ok(());
            }
        }
    }

    fn poll_for(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        let host_end = self.host_end();
        // Of an end that is gone poll always has something to tell.
        let waits = !host_end.gone && !host_end.wanted.is_empty();
        waits.then(|| (self.port.as_fd(), host_end.wanted))
    }

    fn save(&self, instance: u32) -> Option<StateSection> {
        let mac = self.mac;
        Some(StateSection::encode(instance, &VirtioNetV1 { mac }))
    }

    fn restore(&self, instance: u32, state: &mut StateSet) -> Result<(), StateError> {
        let saved: VirtioNetV1 = state.take(instance)?;
        if saved.mac != self.mac {
            log::info!(
                "{}: its driver uses another address until it is loaded again",
                self.name
            );
        }
        Ok(())
    }
}
