//! A connected client: what is to be sent to it, and what it asked for.

use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};
use uuid::Uuid;

use super::events::Event;
use super::frame::{Header, Kind, PROGRAM_REMOTE, Status, packet};
use super::stream::StreamEnd;
use super::types::DomainRef;
use super::xdr::Encoder;
use super::{Code, RpcError};

/// Bytes that wait for a client to take them, at most: more than the longest answer. One that
/// lets more pile up is cut off.
const OUTBOX_BYTES_MAX: usize = 80 << 20;
/// Events and answers that wait for a client to take them, at most.
const OUTBOX_PACKETS_MAX: usize = 20_000;
/// Above this many bytes, a client's own calls and streams wait until it takes some.
pub(super) const OUTBOX_BYTES_HIGH: usize = 4 << 20;
/// Events that one client may ask for, at most: each costs a packet an event.
const SUBSCRIPTIONS_MAX: usize = 4096;
/// Streams that one client may have open.
const STREAMS_MAX: usize = 64;

/// Who is at the other end of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its process.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
}

/// A connected client. Every method may be called from any thread; none waits for the client.
#[derive(Debug)]
pub struct Client {
    id: u64,
    peer: Option<Peer>,
    opened: AtomicBool,
    read_only: AtomicBool,
    keepalive: AtomicBool,
    pub(super) calls_in_flight: AtomicUsize,
    outbox: Mutex<Outbox>,
    pub(super) wake: OwnedFd,
    subscriptions: Mutex<Subscriptions>,
    streams: Mutex<HashMap<u32, Arc<dyn StreamEnd>>>,
}

#[derive(Debug, Default)]
struct Outbox {
    packets: VecDeque<Vec<u8>>,
    bytes: usize,
    closing: Option<Closing>,
}

/// How a connection is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closing {
    /// Once everything is sent.
    AfterSending,
    /// At once.
    Now,
}

#[derive(Debug, Default)]
struct Subscriptions {
    last_id: i32,
    list: Vec<Subscription>,
}

#[derive(Debug)]
struct Subscription {
    id: i32,
    event: i32,
    domain: Option<Uuid>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every change is one call, so a panic leaves nothing half-changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Client {
    pub(super) fn new(id: u64, peer: Option<Peer>, read_only: bool) -> rustix::io::Result<Self> {
        Ok(Self {
            id,
            peer,
            opened: AtomicBool::new(false),
            read_only: AtomicBool::new(read_only),
            keepalive: AtomicBool::new(false),
            calls_in_flight: AtomicUsize::new(0),
            outbox: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            subscriptions: Mutex::default(),
            streams: Mutex::default(),
        })
    }

    /// Returns its number, which no other client of this process had.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns who it is, where the kernel told.
    pub fn peer(&self) -> Option<Peer> {
        self.peer
    }

    /// Returns whether it has opened a connection to the hypervisor.
    pub fn is_open(&self) -> bool {
        self.opened.load(Ordering::Acquire)
    }

    /// Opens the connection. Read-only stays read-only.
    pub fn open(&self, read_only: bool) -> Result<(), RpcError> {
        if self.opened.swap(true, Ordering::AcqRel) {
            return Err(RpcError::new(
                Code::InternalError,
                "connection already open",
            ));
        }
        if read_only {
            self.read_only.store(true, Ordering::Release);
        }
        Ok(())
    }

    /// Returns whether calls that change anything are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only.load(Ordering::Acquire)
    }

    /// Notes that it answers keepalive messages.
    pub fn enable_keepalive(&self) {
        self.keepalive.store(true, Ordering::Release);
        self.wake();
    }

    pub(super) fn has_keepalive(&self) -> bool {
        self.keepalive.load(Ordering::Acquire)
    }

    /// Ends the connection once everything is sent.
    pub fn close_after_sending(&self) {
        locked(&self.outbox)
            .closing
            .get_or_insert(Closing::AfterSending);
        self.wake();
    }

    pub(super) fn close_now(&self) {
        let mut outbox = locked(&self.outbox);
        outbox.closing = Some(Closing::Now);
        outbox.packets.clear();
        outbox.bytes = 0;
        drop(outbox);
        self.wake();
    }

    pub(super) fn closing(&self) -> Option<Closing> {
        locked(&self.outbox).closing
    }

    pub(super) fn wake(&self) {
        // It fails only where a wake-up is pending already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Queues a packet. A client that does not take what it is sent is cut off.
    pub(super) fn send(&self, packet: Vec<u8>) {
        let mut outbox = locked(&self.outbox);
        if outbox.closing == Some(Closing::Now) {
            return;
        }
        outbox.bytes += packet.len();
        outbox.packets.push_back(packet);
        if outbox.bytes > OUTBOX_BYTES_MAX || outbox.packets.len() > OUTBOX_PACKETS_MAX {
            log::warn!(
                "client {} takes nothing of what it is sent: cut off",
                self.id
            );
            outbox.closing = Some(Closing::Now);
            outbox.packets.clear();
            outbox.bytes = 0;
        }
        drop(outbox);
        self.wake();
    }

    pub(super) fn outbox_bytes(&self) -> usize {
        locked(&self.outbox).bytes
    }

    /// Takes the packet that is to be sent next.
    pub(super) fn next_packet(&self) -> Option<Vec<u8>> {
        let mut outbox = locked(&self.outbox);
        let packet = outbox.packets.pop_front()?;
        outbox.bytes -= packet.len();
        Some(packet)
    }

    pub(super) fn answer(&self, call: &Header, result: Result<Vec<u8>, RpcError>) {
        let (status, payload) = match result {
            Ok(payload) => (Status::Ok, payload),
            Err(error) => (Status::Error, Encoder::of(&error)),
        };
        self.send(packet(&call.answer(Kind::Reply, status), &payload));
    }

    /// Asks for events of a kind, of one domain or of all; returns what to end it by.
    pub fn subscribe(&self, event: i32, domain: Option<Uuid>) -> Result<i32, RpcError> {
        let mut subscriptions = locked(&self.subscriptions);
        if subscriptions.list.len() >= SUBSCRIPTIONS_MAX {
            return Err(RpcError::new(
                Code::OperationFailed,
                format!("more than {SUBSCRIPTIONS_MAX} event callbacks"),
            ));
        }
        let id = subscriptions.last_id;
        subscriptions.last_id += 1;
        subscriptions.list.push(Subscription { id, event, domain });
        Ok(id)
    }

    /// Ends what [`Client::subscribe`] began.
    pub fn unsubscribe(&self, id: i32) -> Result<(), RpcError> {
        let mut subscriptions = locked(&self.subscriptions);
        let Some(at) = subscriptions.list.iter().position(|one| one.id == id) else {
            return Err(RpcError::new(
                Code::InternalError,
                format!("domain event callback {id} not registered"),
            ));
        };
        subscriptions.list.swap_remove(at);
        Ok(())
    }

    /// Sends an event to this client, once for each time that it asked for it.
    pub fn notify(&self, domain: &DomainRef, event: &Event) {
        let subscriptions = locked(&self.subscriptions);
        for wanted in &subscriptions.list {
            let this_domain = wanted.domain.is_none_or(|uuid| uuid == domain.uuid);
            if wanted.event == event.id() && this_domain {
                let header = Header::message(PROGRAM_REMOTE, event.procedure(), 1);
                self.send(packet(&header, &event.payload(wanted.id, domain)));
            }
        }
    }

    /// Puts what takes a stream's data in place, by the serial of the call that opened it.
    pub(super) fn add_stream(&self, serial: u32, end: Arc<dyn StreamEnd>) -> Result<(), RpcError> {
        let mut streams = locked(&self.streams);
        if streams.len() >= STREAMS_MAX || streams.contains_key(&serial) {
            return Err(RpcError::new(
                Code::OperationFailed,
                format!("more than {STREAMS_MAX} streams, or one serial used twice"),
            ));
        }
        streams.insert(serial, end);
        Ok(())
    }

    pub(super) fn stream(&self, serial: u32) -> Option<Arc<dyn StreamEnd>> {
        locked(&self.streams).get(&serial).cloned()
    }

    pub(super) fn remove_stream(&self, serial: u32) {
        locked(&self.streams).remove(&serial);
    }

    /// Ends all streams, since the client is gone.
    pub(super) fn abort_streams(&self) {
        let streams = std::mem::take(&mut *locked(&self.streams));
        for stream in streams.into_values() {
            stream.abort();
        }
    }
}
