//! The worker's side of the control protocol: one thread a connection.

use std::collections::HashMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
use serde::Serialize;
use serde_json::Value;

use super::protocol::{
    Call, ErrorReply, Greeting, JobId, LINE_BYTES_MAX, Method, Outcome, PROTOCOL_VERSION,
    PROTOCOL_VERSION_MIN, Reply,
};
use crate::host::runtime::RuntimeDir;
use crate::host::{Domain, DomainEvent, HostError};
use crate::sys::sigmask::SignalsBlocked;

/// Connections served at once: each costs a thread, and no tool needs more than a few. One more
/// takes the place of the one that has been silent longest.
const CONNECTIONS_MAX: usize = 16;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// A client that takes no bytes for this long is dropped, so that it cannot keep a thread.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a waiting client hears of the job's progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(200);

/// How often a client that waits for events is looked after.
const PEER_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How long the end of the server waits for calls that are being answered.
const LAST_ANSWERS_TIMEOUT: Duration = Duration::from_secs(2);

/// Serves a domain's control socket until it is dropped, which removes the socket.
///
/// Threads of open connections end with their clients, or with the process.
#[derive(Debug)]
pub struct ControlServer {
    socket: PathBuf,
    clients: Arc<Clients>,
}

impl ControlServer {
    /// Listens at `socket` and serves `domain`.
    ///
    /// A socket file left over by a dead process is replaced; the caller holds the domain's locks,
    /// so no living one can be at it.
    pub fn start(domain: Arc<Domain>, socket: &Path) -> Result<Self, HostError> {
        Self::start_at(domain, ControlSocket::bind(socket)?)
    }

    /// Serves `domain` at a socket that was bound before.
    pub fn start_at(domain: Arc<Domain>, socket: ControlSocket) -> Result<Self, HostError> {
        let ControlSocket { fd, path } = socket;
        let failed = |source| HostError::path("listen at the control socket", &path, source);
        rustix::net::listen(&fd, BACKLOG).map_err(|error| failed(error.into()))?;
        let listener = UnixListener::from(fd);
        let clients = Arc::new(Clients::default());
        let _blocked = SignalsBlocked::new();
        let served = clients.clone();
        thread::Builder::new()
            .name("lvp-control".to_owned())
            .spawn(move || accept(&listener, &domain, &served))
            .map_err(failed)?;
        Ok(Self {
            socket: path,
            clients,
        })
    }
}

/// A socket with a path, at which nobody can connect yet: for a process that will have lost the
/// right to make it when it comes to listen.
#[derive(Debug)]
pub struct ControlSocket {
    fd: OwnedFd,
    path: PathBuf,
}

impl ControlSocket {
    /// Makes it at `path`, where one that was left over is replaced.
    pub fn bind(path: &Path) -> Result<Self, HostError> {
        let bind = || -> io::Result<OwnedFd> {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let flags = SocketFlags::CLOEXEC;
            let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::bind(&fd, &SocketAddrUnix::new(path)?)?;
            RuntimeDir::restrict(path)?;
            Ok(fd)
        };
        let fd = bind()
            .map_err(|source| HostError::path("listen at the control socket", path, source))?;
        Ok(Self {
            fd,
            path: path.to_owned(),
        })
    }
}

impl Drop for ControlServer {
    fn drop(&mut self) {
        // Nobody is left to tell when the file cannot be removed; the next start replaces it.
        drop(fs::remove_file(&self.socket));
        // The process ends now, and whoever asked for that should hear that it was done.
        self.clients.wait_for_answers(LAST_ANSWERS_TIMEOUT);
    }
}

/// The open connections.
#[derive(Debug, Default)]
struct Clients {
    open: Mutex<HashMap<u64, Client>>,
    changed: Condvar,
}

#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// Whether a call is being answered.
    busy: bool,
    /// When it last did something.
    active: Instant,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Client>> {
        // Every change is one assignment, so a panic leaves nothing half-changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a connection; waits for room where there is none, after making it if that can be.
    fn add(&self, id: u64, stream: UnixStream) {
        let mut open = self.lock();
        while open.len() >= CONNECTIONS_MAX {
            let silent = open.values().filter(|client| !client.busy);
            if let Some(oldest) = silent.min_by_key(|client| client.active) {
                log::warn!("hung up on the most silent of {CONNECTIONS_MAX} control connections");
                // Its thread reads the end of the stream and takes it away.
                drop(oldest.stream.shutdown(Shutdown::Both));
            }
            open = self
                .changed
                .wait(open)
                .unwrap_or_else(PoisonError::into_inner);
        }
        open.insert(
            id,
            Client {
                stream,
                busy: false,
                active: Instant::now(),
            },
        );
    }

    fn set_busy(&self, id: u64, busy: bool) {
        if let Some(client) = self.lock().get_mut(&id) {
            client.busy = busy;
            client.active = Instant::now();
        }
        self.changed.notify_all();
    }

    fn remove(&self, id: u64) {
        self.lock().remove(&id);
        self.changed.notify_all();
    }

    fn wait_for_answers(&self, timeout: Duration) {
        let open = self.lock();
        let waited = self.changed.wait_timeout_while(open, timeout, |open| {
            open.values().any(|client| client.busy)
        });
        drop(waited);
    }
}

fn accept(listener: &UnixListener, domain: &Arc<Domain>, clients: &Arc<Clients>) {
    for (id, stream) in (0_u64..).zip(listener.incoming()) {
        let accepted = stream.and_then(|stream| Ok((stream.try_clone()?, stream)));
        let (stream, registered) = match accepted {
            Ok(pair) => pair,
            Err(error) => {
                // Out of descriptors, most likely: give others time to close some.
                log::warn!("could not accept a control connection: {error}");
                thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        clients.add(id, registered);
        let (domain, kept) = (domain.clone(), clients.clone());
        let spawned = thread::Builder::new()
            .name("lvp-client".to_owned())
            .spawn(move || {
                if let Err(error) = Connection::serve(&domain, &stream, &kept, id) {
                    log::debug!("a control connection ended: {error}");
                }
                kept.remove(id);
            });
        if let Err(error) = spawned {
            log::warn!("could not start a thread for a control connection: {error}");
            clients.remove(id);
        }
    }
}

struct Connection<'a> {
    domain: &'a Arc<Domain>,
    out: &'a UnixStream,
}

impl Connection<'_> {
    fn serve(
        domain: &Arc<Domain>,
        stream: &UnixStream,
        clients: &Clients,
        id: u64,
    ) -> io::Result<()> {
        stream.set_write_timeout(Some(WRITE_TIMEOUT))?;
        let connection = Connection {
            domain,
            out: stream,
        };
        connection.send(&Greeting {
            livepoint_control: PROTOCOL_VERSION,
            livepoint_control_min: PROTOCOL_VERSION_MIN,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            name: domain.name().to_owned(),
            uuid: domain.uuid(),
            pid: std::process::id(),
        })?;
        let mut lines = BufReader::new(stream);
        let mut line = Vec::new();
        while read_line(&mut lines, &mut line)? {
            clients.set_busy(id, true);
            let answered = connection.answer(&line);
            clients.set_busy(id, false);
            answered?;
        }
        Ok(())
    }

    fn answer(&self, line: &[u8]) -> io::Result<()> {
        match serde_json::from_slice::<Call>(line) {
            Ok(call) => {
                let id = call.id;
                let done = self.call(call)?;
                self.reply(id, done)
            }
            Err(error) => {
                // The id of a call that is not understood may still be readable.
                let id = serde_json::from_slice::<Value>(line)
                    .ok()
                    .and_then(|value| value.get("id")?.as_u64())
                    .unwrap_or(0);
                let wrong = HostError::Invalid(format!("the call was not understood: {error}"));
                self.reply(id, Err(wrong))
            }
        }
    }

    /// Does one call. The outer error means that the client is gone.
    fn call(&self, call: Call) -> io::Result<Result<Value, HostError>> {
        let domain = self.domain;
        let nothing = |done: Result<(), HostError>| done.map(|()| Value::Null);
        Ok(match call.method {
            Method::Status => Ok(json(&domain.status())),
            Method::DumpXml => Ok(json(&domain.xml())),
            Method::Pause => nothing(domain.pause()),
            Method::Resume => nothing(domain.resume()),
            Method::Shutdown => nothing(domain.shutdown()),
            Method::Reset => nothing(domain.reset()),
            Method::InjectNmi => nothing(domain.inject_nmi()),
            Method::Destroy => nothing(domain.destroy()),
            Method::Checkpoint(request) => domain
                .start_checkpoint(&request)
                .map(|job| json(&JobId { job: job.id() })),
            Method::JobProgress(id) => domain.job(id.job).map(|job| json(&job.progress())),
            Method::JobCancel(id) => nothing(domain.job(id.job).map(|job| job.cancel())),
            Method::JobWait(id) => return self.wait(call.id, id),
            Method::Rewind(to) => domain
                .rewind(to.image.as_deref())
                .map(|summary| json(&summary)),
            Method::Events => return self.events(call.id),
            Method::SetMemory(size) => nothing(domain.set_memory(size.bytes)),
            Method::SetMemoryStatsPeriod(period) => {
                let period = Duration::from_secs(period.seconds.into());
                nothing(domain.ask_for_memory_use_every(period))
            }
            Method::SetTexts(texts) => nothing(domain.set_texts(texts)),
            Method::MeasureDirtyRate(how) => nothing(domain.measure_dirty_rate(how)),
        })
    }

    fn wait(&self, call: u64, id: JobId) -> io::Result<Result<Value, HostError>> {
        let job = match self.domain.job(id.job) {
            Ok(job) => job,
            Err(error) => return Ok(Err(error)),
        };
        loop {
            if let Some(done) = job.wait_timeout(PROGRESS_INTERVAL) {
                return Ok(done.map(|summary| json(&summary)));
            }
            self.send(&Reply {
                id: call,
                outcome: Outcome::Progress(job.progress()),
            })?;
        }
    }

    fn events(&self, call: u64) -> io::Result<Result<Value, HostError>> {
        let (state, events) = match self.domain.events() {
            Ok(events) => events,
            Err(error) => return Ok(Err(error)),
        };
        let tell = |event| {
            self.send(&Reply {
                id: call,
                outcome: Outcome::Event(event),
            })
        };
        tell(DomainEvent::Now { state })?;
        // It may have ended before the subscription.
        let mut ended = self.domain.final_state().map(DomainEvent::Ended);
        loop {
            let next = ended.take().or_else(|| events.next(PEER_CHECK_INTERVAL));
            let Some(event) = next else {
                if has_hung_up(self.out) {
                    return Err(io::ErrorKind::ConnectionAborted.into());
                }
                continue;
            };
            let is_last = matches!(event, DomainEvent::Ended(_));
            tell(event)?;
            if is_last {
                return Ok(Ok(Value::Null));
            }
        }
    }

    fn reply(&self, id: u64, done: Result<Value, HostError>) -> io::Result<()> {
        let outcome = match done {
            Ok(value) => Outcome::Result(value),
            Err(error) => Outcome::Error(ErrorReply {
                code: error.code(),
                message: error.full_message(),
            }),
        };
        self.send(&Reply { id, outcome })
    }

    fn send(&self, message: &impl Serialize) -> io::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        let mut out = self.out;
        out.write_all(&line)
    }
}

/// Returns whether nobody reads what is sent any more.
fn has_hung_up(socket: &UnixStream) -> bool {
    let mut fds = [PollFd::new(socket, PollFlags::RDHUP)];
    let now = Timespec::default();
    poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0)
}

fn json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("our own messages are plain data with string keys")
}

/// Reads one line of at most [`LINE_BYTES_MAX`] bytes; `false` at the end of the stream.
pub(super) fn read_line(from: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    let most = LINE_BYTES_MAX as u64 + 1;
    let read = from.take(most).read_until(b'\n', line)?;
    if line.last() == Some(&b'\n') {
        line.pop();
        return Ok(true);
    }
    if read > LINE_BYTES_MAX {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a line is longer than {LINE_BYTES_MAX} bytes"),
        ));
    }
    if read == 0 {
        return Ok(false);
    }
    Err(io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the connection ended inside a line",
    ))
}
