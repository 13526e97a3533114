//! A console as a stream.

use std::collections::{HashMap, VecDeque};
use std::fs::OpenOptions;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, OpenOptionsExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::error::failed;
use crate::daemon::{worker, xml};
use crate::host::control::protocol::Method;
use crate::rpc::{Code, DomainRef, Pace, Procedure, Reply, RpcError, StreamEnd, StreamSender};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[Procedure {
    number: 201,
    pace: Pace::Slow,
    run: open,
}];

/// Flags of an open (`virDomainConsoleFlags`).
const FORCE: u32 = 1;
const SAFE: u32 = 2;
/// What a client has typed and the guest has not read yet, at most.
const TYPED_BYTES_MAX: usize = 1 << 20;
/// How long whoever is at a console may take to leave it to another.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);
/// How often a client that takes nothing is looked after.
const FULL_POLL: Duration = Duration::from_millis(50);

/// The consoles that somebody is at, by path.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Consoles {
    open: Mutex<HashMap<PathBuf, Arc<Console>>>,
}

impl Consoles {
    fn lock(&self) -> MutexGuard<'_, HashMap<PathBuf, Arc<Console>>> {
        // Every change is one call, so a panic leaves nothing half-changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a console; from whoever has it, if `force`.
    fn take(&self, path: &Path, console: &Arc<Console>, force: bool) -> Answer<()> {
        let other = self.lock().get(path).cloned();
        if let Some(other) = other {
            if !force {
                return Err(RpcError::new(
                    Code::OperationFailed,
                    "Active console session exists for this domain",
                ));
            }
            other.end(Cause::Replaced);
            // Two who read one terminal would each get a part.
            let start = Instant::now();
            while !other.has_left.load(Ordering::Acquire) && start.elapsed() < LEAVE_TIMEOUT {
                thread::sleep(Duration::from_millis(1));
            }
        }
        self.lock().insert(path.to_owned(), console.clone());
        Ok(())
    }

    fn give_back(&self, path: &Path, console: &Arc<Console>) {
        let mut open = self.lock();
        if open
            .get(path)
            .is_some_and(|current| Arc::ptr_eq(current, console))
        {
            open.remove(path);
        }
    }
}

/// Why a session at a console ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    /// The client has had enough: it has been answered.
    Client,
    /// Another client took the console.
    Replaced,
}

/// A session at a console: what the client has typed, until the guest takes it.
#[derive(Debug)]
struct Console {
    typed: Mutex<VecDeque<u8>>,
    ended: Mutex<Option<Cause>>,
    is_over: AtomicBool,
    has_left: AtomicBool,
    wake: OwnedFd,
}

impl Console {
    fn wake(&self) {
        // It fails only where a wake-up is pending already.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    fn end(&self, cause: Cause) {
        let mut ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
        ended.get_or_insert(cause);
        drop(ended);
        self.is_over.store(true, Ordering::Release);
        self.wake();
    }

    fn cause(&self) -> Option<Cause> {
        *self.ended.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn typed(&self) -> MutexGuard<'_, VecDeque<u8>> {
        self.typed.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl StreamEnd for Console {
    fn receive(&self, data: &[u8]) -> bool {
        let mut typed = self.typed();
        if typed.len() + data.len() > TYPED_BYTES_MAX {
            return false;
        }
        typed.extend(data);
        drop(typed);
        self.wake();
        true
    }

    fn finish(&self) {
        self.end(Cause::Client);
    }

    fn abort(&self) {
        self.end(Cause::Client);
    }
}

/// What a console is reached by.
enum Line {
    Terminal(std::fs::File),
    Socket(UnixStream),
}

impl Line {
    fn open(path: &Path) -> std::io::Result<Self> {
        if path.metadata()?.file_type().is_socket() {
            let socket = UnixStream::connect(path)?;
            socket.set_nonblocking(true)?;
            return Ok(Self::Socket(socket));
        }
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
        let mut options = OpenOptions::new();
        let file = options
            .read(true)
            .write(true)
            .custom_flags(flags)
            .open(path)?;
        Ok(Self::Terminal(file))
    }

    fn read(&self, into: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Terminal(file) => (&*file).read(into),
            Self::Socket(socket) => (&*socket).read(into),
        }
    }

    fn write(&self, from: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Terminal(file) => (&*file).write(from),
            Self::Socket(socket) => (&*socket).write(from),
        }
    }
}

impl AsFd for Line {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Terminal(file) => file.as_fd(),
            Self::Socket(socket) => socket.as_fd(),
        }
    }
}

fn open(call: &DriverCall<'_>) -> Answer<Reply> {
    let (wanted, device, flags): (DomainRef, Option<String>, u32) = call.arguments()?;
    check_flags(flags, FORCE | SAFE, "virDomainOpenConsole")?;
    let driver = call.driver;
    let domain = driver.registry.find(&wanted)?;
    let name = {
        let state = domain.lock();
        state.active()?;
        state.name.clone()
    };
    let mut worker = worker::connect(&driver.paths, &name)?;
    let document: String = worker
        .call(Method::DumpXml)
        .map_err(|error| failed(&error))?;
    let device = device.as_deref().filter(|device| !device.is_empty());
    let path = find_line(&document, device)?;
    let broken = |error: std::io::Error| {
        RpcError::new(
            Code::SystemError,
            format!("cannot open {}: {error}", path.display()),
        )
    };
    let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
    let console = Arc::new(Console {
        typed: Mutex::default(),
        ended: Mutex::default(),
        is_over: AtomicBool::new(false),
        has_left: AtomicBool::new(false),
        wake: wake.map_err(|error| broken(error.into()))?,
    });
    driver.consoles.take(&path, &console, flags & FORCE != 0)?;
    let line = Line::open(&path);
    let sender = call.stream();
    let opened = line.map_err(broken).and_then(|line| {
        sender.open(console.clone())?;
        Ok(line)
    });
    let line = opened.inspect_err(|_| driver.consoles.give_back(&path, &console))?;
    let driver = driver.clone();
    Ok(Reply::of(&()).then(move || {
        let (of_thread, sender_too) = (console.clone(), sender.clone());
        let spawned = thread::Builder::new()
            .name("lvp-console".to_owned())
            .spawn(move || {
                converse(&line, &of_thread, &sender_too);
                of_thread.has_left.store(true, Ordering::Release);
                driver.consoles.give_back(&path, &of_thread);
            });
        if let Err(error) = spawned {
            console.end(Cause::Client);
            sender.fail(&RpcError::new(
                Code::SystemError,
                format!("no thread: {error}"),
            ));
        }
    }))
}

/// Finds where a console or serial port can be reached by the document of a running domain: the one
/// of that name, or the first.
fn find_line(document: &str, name: Option<&str>) -> Answer<PathBuf> {
    let wrong = |what: String| RpcError::new(Code::InternalError, what);
    let domain = xml::read(document, "domain")?;
    let devices = domain.child("devices").map(|devices| &devices.children);
    let find = |kind: &str| {
        devices?.iter().find(|device| {
            let alias = device.child("alias");
            let alias = alias.and_then(|alias| alias.attribute("name"));
            device.name == kind && (name.is_none() || name == alias)
        })
    };
    let which = name.unwrap_or("default");
    let line = find("console").or_else(|| find("serial"));
    let line = line.ok_or_else(|| wrong(format!("cannot find console device '{which}'")))?;
    let source = line.child("source");
    let listens = source.and_then(|source| source.attribute("mode")) == Some("bind");
    let can_open = match line.attribute("type") {
        Some("pty") => true,
        Some("unix") => listens,
        _ => false,
    };
    let path = source.and_then(|source| source.attribute("path"));
    path.filter(|_| can_open).map(PathBuf::from).ok_or_else(|| {
        wrong(format!(
            "console device '{which}' is neither a terminal nor a socket that listens"
        ))
    })
}

/// Carries bytes in both directions until one side ends.
fn converse(line: &Line, console: &Console, sender: &StreamSender) {
    let mut bytes = [0_u8; 16 << 10];
    while !console.is_over.load(Ordering::Acquire) {
        let has_room = sender.has_room();
        let mut wanted = PollFlags::empty();
        wanted.set(PollFlags::IN, has_room);
        wanted.set(PollFlags::OUT, !console.typed().is_empty());
        let mut fds = [
            PollFd::from_borrowed_fd(line.as_fd(), wanted),
            PollFd::new(&console.wake, PollFlags::IN),
        ];
        let timeout = Timespec::try_from(FULL_POLL).ok().filter(|_| !has_room);
        if poll(&mut fds, timeout.as_ref()).is_err() {
            continue;
        }
        let [of_line, of_wake] = &fds;
        if !of_wake.revents().is_empty() {
            // Nothing to read only means that it was taken already.
            let _ = rustix::io::read(&console.wake, &mut [0; 8]);
        }
        if of_line.revents().contains(PollFlags::OUT) && !write_typed(line, console) {
            break;
        }
        let gone = PollFlags::HUP | PollFlags::ERR;
        if of_line.revents().intersects(PollFlags::IN | gone) {
            match line.read(&mut bytes) {
                Ok(0) => break,
                Ok(count) => sender.data(bytes.get(..count).unwrap_or_default()),
                Err(error) if is_momentary(&error) => {}
                // A terminal's other side is gone: the machine has ended.
                Err(_) => break,
            }
        }
    }
    match console.cause() {
        Some(Cause::Client) => {}
        Some(Cause::Replaced) => sender.fail(&RpcError::new(
            Code::OperationAborted,
            "the console was taken by another client",
        )),
        None => sender.finish(),
    }
}

/// Gives the guest what was typed, as far as it takes it; `false` where nobody is there.
fn write_typed(line: &Line, console: &Console) -> bool {
    let mut typed = console.typed();
    let (first, _) = typed.as_slices();
    if first.is_empty() {
        return true;
    }
    match line.write(first) {
        Ok(count) => {
            typed.drain(..count);
            true
        }
        Err(error) => is_momentary(&error),
    }
}

fn is_momentary(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
