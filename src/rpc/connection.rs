//! One client's connection: a thread that reads, dispatches and sends.

use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::client::{Client, Closing, OUTBOX_BYTES_HIGH};
use super::dispatch::{self, Call, Driver, Pace, Procedure};
use super::frame::{
    EARLY_PACKET_BYTES_MAX, FrameReader, Header, Kind, PACKET_BYTES_MAX, PROGRAM_KEEPALIVE, Status,
    packet,
};
use super::{Code, RpcError};

/// Slow calls of one client that run at once; while there are as many, nothing more is read from
/// it. libvirtd's default.
const CALLS_IN_FLIGHT_MAX: usize = 5;
/// How often a silent client is asked whether it is there, if it answers such messages.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// How many such messages may stay unanswered. libvirtd's default.
const KEEPALIVE_MISSES_MAX: u32 = 5;
/// How long a client may take to read its last answers once it has said goodbye.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(10);
/// Procedures of the keepalive program.
const PING: i32 = 1;
const PONG: i32 = 2;

/// A connection in its own thread.
pub(super) struct Connection<D> {
    socket: UnixStream,
    client: Arc<Client>,
    driver: Arc<D>,
    incoming: FrameReader,
    /// What is left of the packet that is being sent.
    outgoing: Vec<u8>,
    sent: usize,
    /// When the client was last heard of.
    heard: Instant,
    pinged: Option<Instant>,
    pings_unanswered: u32,
    closing_since: Option<Instant>,
}

/// Why a connection ends.
enum End {
    Closed,
    Failed(String),
}

impl<D: Driver> Connection<D> {
    pub fn new(socket: UnixStream, client: Arc<Client>, driver: Arc<D>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            client,
            driver,
            incoming: FrameReader::default(),
            outgoing: Vec::new(),
            sent: 0,
            heard: Instant::now(),
            pinged: None,
            pings_unanswered: 0,
            closing_since: None,
        })
    }

    /// Serves the client until it is gone.
    pub fn serve(mut self) {
        let end = loop {
            if let Err(end) = self.step() {
                break end;
            }
        };
        match end {
            End::Closed => log::debug!("client {} is gone", self.client.id()),
            End::Failed(why) => log::info!("client {}: {why}", self.client.id()),
        }
        self.client.close_now();
        self.client.abort_streams();
        self.driver.disconnected(&self.client);
    }

    fn step(&mut self) -> Result<(), End> {
        self.dispatch_all()?;
        self.flush()?;
        match self.client.closing() {
            Some(Closing::Now) => return Err(End::Closed),
            Some(Closing::AfterSending) => {
                let since = *self.closing_since.get_or_insert_with(Instant::now);
                if !self.is_sending() || since.elapsed() > FAREWELL_TIMEOUT {
                    return Err(End::Closed);
                }
            }
            None => {}
        }
        let timeout = self.keepalive()?;
        let (readable, woken) = self.wait(timeout)?;
        if woken {
            let mut count = [0_u8; 8];
            // Nothing to read only means that somebody else was quicker.
            let _ = rustix::io::read(&self.client.wake, &mut count);
        }
        if readable {
            self.receive()?;
        }
        Ok(())
    }

    fn is_sending(&self) -> bool {
        self.sent < self.outgoing.len() || self.client.outbox_bytes() > 0
    }

    /// Returns whether the client may ask for more now.
    fn takes_calls(&self) -> bool {
        self.client.calls_in_flight.load(Ordering::Acquire) < CALLS_IN_FLIGHT_MAX
            && self.client.outbox_bytes() < OUTBOX_BYTES_HIGH
            && self.client.closing().is_none()
    }

    /// Waits for something to do; tells whether the socket has bytes, and whether somebody woke us.
    fn wait(&self, timeout: Option<Duration>) -> Result<(bool, bool), End> {
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, self.takes_calls());
        wanted.set(PollFlags::OUT, self.is_sending());
        let mut fds = [
            PollFd::from_borrowed_fd(self.socket.as_fd(), wanted),
            PollFd::from_borrowed_fd(self.client.wake.as_fd(), PollFlags::IN),
        ];
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(End::Failed(format!("poll: {error}"))),
        }
        let [socket, wake] = &fds;
        let gone = PollFlags::HUP | PollFlags::ERR;
        // Bytes that came before the end are still to be read, unless we do not read now.
        if socket.revents().intersects(gone) && !wanted.contains(PollFlags::IN) {
            return Err(End::Closed);
        }
        let readable = socket.revents().intersects(PollFlags::IN | gone);
        Ok((readable, !wake.revents().is_empty()))
    }

    fn receive(&mut self) -> Result<(), End> {
        let mut bytes = [0; 64 << 10];
        match self.socket.read(&mut bytes) {
            Ok(0) => Err(End::Closed),
            Ok(count) => {
                self.heard = Instant::now();
                self.pings_unanswered = 0;
                self.incoming.push(bytes.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) if is_momentary(&error) => Ok(()),
            Err(error) => Err(End::Failed(format!("could not read: {error}"))),
        }
    }

    fn flush(&mut self) -> Result<(), End> {
        loop {
            if self.sent == self.outgoing.len() {
                let Some(packet) = self.client.next_packet() else {
                    self.outgoing = Vec::new();
                    self.sent = 0;
                    return Ok(());
                };
                self.outgoing = packet;
                self.sent = 0;
            }
            let rest = self.outgoing.get(self.sent..).unwrap_or_default();
            match self.socket.write(rest) {
                Ok(count) => self.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if is_momentary(&error) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(End::Closed),
                Err(error) => return Err(End::Failed(format!("could not write: {error}"))),
            }
        }
    }

    /// Asks a silent client whether it is there; returns when to look again.
    fn keepalive(&mut self) -> Result<Option<Duration>, End> {
        if self.closing_since.is_some() {
            return Ok(Some(Duration::from_secs(1)));
        }
        if !self.client.has_keepalive() {
            return Ok(None);
        }
        let last = self.pinged.map_or(self.heard, |at| at.max(self.heard));
        if last.elapsed() >= KEEPALIVE_INTERVAL {
            // While nothing is read from it, its answers are not seen either.
            if self.takes_calls() {
                if self.pings_unanswered >= KEEPALIVE_MISSES_MAX {
                    return Err(End::Failed("does not answer any more".to_owned()));
                }
                self.pings_unanswered += 1;
            }
            self.pinged = Some(Instant::now());
            let ping = Header::message(PROGRAM_KEEPALIVE, PING, 0);
            self.client.send(packet(&ping, &[]));
            self.flush()?;
            return Ok(Some(KEEPALIVE_INTERVAL));
        }
        Ok(Some(KEEPALIVE_INTERVAL.saturating_sub(last.elapsed())))
    }

    fn dispatch_all(&mut self) -> Result<(), End> {
        while self.takes_calls() {
            let limit = if self.client.is_open() {
                PACKET_BYTES_MAX
            } else {
                EARLY_PACKET_BYTES_MAX
            };
            match self.incoming.next(limit) {
                Ok(Some((header, payload))) => self.dispatch(&header, payload)?,
                Ok(None) => return Ok(()),
                Err(error) => return Err(End::Failed(error.to_string())),
            }
        }
        Ok(())
    }

    fn dispatch(&mut self, header: &Header, payload: Vec<u8>) -> Result<(), End> {
        const CALL: i32 = Kind::Call as i32;
        const STREAM: i32 = Kind::Stream as i32;
        const MESSAGE: i32 = Kind::Message as i32;
        const CALL_WITH_FDS: i32 = 4;
        match header.kind {
            CALL => self.call(header, payload),
            STREAM => self.stream(header, &payload),
            MESSAGE if header.program == PROGRAM_KEEPALIVE && header.procedure == PING => {
                let pong = Header::message(PROGRAM_KEEPALIVE, PONG, 0);
                self.client.send(packet(&pong, &[]));
            }
            CALL_WITH_FDS => {
                // The descriptors' own bytes follow, of which only the payload tells the number.
                let error = RpcError::new(
                    Code::OperationUnsupported,
                    "file descriptors are not taken; SUPPORTS_FEATURE says so",
                );
                self.client.answer(header, Err(error));
                self.client.close_after_sending();
            }
            // Real servers ignore what only a server sends, too.
            _ => {}
        }
        Ok(())
    }

    fn call(&self, header: &Header, payload: Vec<u8>) {
        let procedure = match dispatch::find::<D>(&self.client, header) {
            Ok(procedure) => procedure,
            Err(error) => return self.client.answer(header, Err(error)),
        };
        if procedure.pace != Pace::Slow {
            let call = Call {
                driver: &self.driver,
                client: &self.client,
                header,
                payload: &payload,
            };
            return dispatch::run(procedure, &call);
        }
        let flight = InFlight::begin(self.client.clone());
        let (driver, of_call) = (self.driver.clone(), header.clone());
        let spawned = thread::Builder::new()
            .name("lvp-call".to_owned())
            .spawn(move || run_slowly(procedure, &driver, &flight, &of_call, &payload));
        if let Err(error) = spawned {
            let error = RpcError::new(
                Code::SystemError,
                format!("no thread for the call: {error}"),
            );
            self.client.answer(header, Err(error));
        }
    }

    fn stream(&self, header: &Header, payload: &[u8]) {
        // One that is not open may have been ended by us a moment ago.
        let Some(end) = self.client.stream(header.serial) else {
            if header.status != Status::Continue as i32 {
                // The client ends its half, too, and waits for the answer.
                let done = header.answer(Kind::Stream, Status::Ok);
                self.client.send(packet(&done, &[]));
            }
            return;
        };
        const DATA: i32 = Status::Continue as i32;
        const FINISH: i32 = Status::Ok as i32;
        match header.status {
            DATA if !payload.is_empty() => {
                if !end.receive(payload) {
                    self.client.remove_stream(header.serial);
                    end.abort();
                    let error = RpcError::new(Code::OperationFailed, "the stream takes no more");
                    let failed = header.answer(Kind::Stream, Status::Error);
                    let payload = super::xdr::Encoder::of(&error);
                    self.client.send(packet(&failed, &payload));
                }
            }
            DATA => {}
            status => {
                self.client.remove_stream(header.serial);
                if status == FINISH {
                    end.finish();
                } else {
                    end.abort();
                }
                // The client waits for this before it goes on.
                let done = header.answer(Kind::Stream, Status::Ok);
                self.client.send(packet(&done, &[]));
            }
        }
    }
}

fn run_slowly<D: Driver>(
    procedure: &Procedure<D>,
    driver: &Arc<D>,
    flight: &InFlight,
    header: &Header,
    payload: &[u8],
) {
    let call = Call {
        driver,
        client: &flight.client,
        header,
        payload,
    };
    dispatch::run(procedure, &call);
}

/// A slow call that runs; it counts until it is dropped.
struct InFlight {
    client: Arc<Client>,
}

impl InFlight {
    fn begin(client: Arc<Client>) -> Self {
        client.calls_in_flight.fetch_add(1, Ordering::AcqRel);
        Self { client }
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.client.calls_in_flight.fetch_sub(1, Ordering::AcqRel);
        self.client.wake();
    }
}

fn is_momentary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
