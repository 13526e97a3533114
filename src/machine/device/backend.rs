//! Where the bytes of a serial port or a console go to and come from.
//!
//! Nothing of a backend blocks: what does not go out at once is the device's to keep.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::io::ioctl_fionread;
use rustix::net::{RecvFlags, SendFlags, SocketFlags};
use rustix::pty::OpenptFlags;
use rustix::termios::{OptionalActions, tcgetattr, tcsetattr};

use crate::machine::spec::SerialBackend;

/// How often a terminal is looked at for somebody who opens it: nothing tells.
pub(in crate::machine) const REOPEN_INTERVAL: Duration = Duration::from_millis(100);

/// How long a vCPU waits, once, for a reader that has stopped reading, before output is dropped.
pub(in crate::machine) const STALL_MAX: Duration = Duration::from_millis(100);

/// How often a reader must be found to have read all: the kernel passes output on by a thread of its
/// own, before which there seems to be nothing.
const READ_TIMES: u32 = 3;

/// How long it takes until the next look.
const READ_INTERVAL: Duration = Duration::from_millis(2);

/// What goes to standard output at once: a pipe that polls as writable takes as much.
const STDOUT_CHUNK: usize = 4096;

/// A backend that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("could not {what}")]
pub struct BackendError {
    what: String,
    #[source]
    source: io::Error,
}

impl BackendError {
    pub(in crate::machine) fn new(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self { what, source }
    }
}

/// What became of bytes on their way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::machine) enum Sent {
    /// So many went out.
    Bytes(usize),
    /// The other side takes none now.
    Full,
    /// Nobody is there, or the file is full: they are gone.
    Discarded,
}

/// What came in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::machine) enum Received {
    /// So many bytes.
    Bytes(usize),
    /// None yet.
    Nothing,
    /// None any more, from whoever was there.
    Ended,
}

#[derive(Debug)]
enum Kind {
    Null,
    File(File),
    Stdio {
        input: Arc<OwnedFd>,
        output: Arc<OwnedFd>,
        ended: bool,
    },
    Pty {
        master: Arc<OwnedFd>,
    },
    Listener {
        listener: Arc<OwnedFd>,
        client: Option<Arc<OwnedFd>>,
    },
    Stream {
        socket: Arc<OwnedFd>,
        ended: bool,
    },
}

/// An open backend.
#[derive(Debug)]
pub(in crate::machine) struct Backend {
    kind: Kind,
    path: Option<PathBuf>,
}

/// A socket's file goes with the machine that made it.
impl Drop for Backend {
    fn drop(&mut self) {
        if let (Kind::Listener { .. }, Some(path)) = (&self.kind, &self.path)
            && let Err(error) = fs::remove_file(path)
        {
            log::debug!("could not remove {}: {error}", path.display());
        }
    }
}

impl Backend {
    pub(in crate::machine) fn open(spec: &SerialBackend) -> Result<Self, BackendError> {
        let (kind, path) = match spec {
            SerialBackend::Null => (Kind::Null, None),
            SerialBackend::Stdio => {
                let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map(Arc::new);
                let failed = || BackendError::new("use standard input and output");
                let kind = Kind::Stdio {
                    input: own(io::stdin().as_fd()).map_err(failed())?,
                    output: own(io::stdout().as_fd()).map_err(failed())?,
                    ended: false,
                };
                (kind, None)
            }
            SerialBackend::File { path, append } => {
                let file = OpenOptions::new()
                    .create(true)
                    .write(true)
                    .append(*append)
                    .truncate(!append)
                    .open(path)
                    .map_err(BackendError::new(format!("open {}", path.display())))?;
                (Kind::File(file), Some(path.clone()))
            }
            SerialBackend::Pty { mode } => {
                let (master, path) =
                    open_pty(*mode).map_err(BackendError::new("make a pseudo-terminal"))?;
                let master = Arc::new(master);
                (Kind::Pty { master }, Some(path))
            }
            SerialBackend::UnixListen { path } => {
                let listener = listen(path)
                    .map_err(BackendError::new(format!("listen at {}", path.display())))?;
                let kind = Kind::Listener {
                    listener: Arc::new(listener.into()),
                    client: None,
                };
                (kind, Some(path.clone()))
            }
            SerialBackend::UnixConnect { path } => {
                let socket = UnixStream::connect(path)
                    .map_err(BackendError::new(format!("connect to {}", path.display())))?;
                let kind = Kind::Stream {
                    socket: Arc::new(socket.into()),
                    ended: false,
                };
                (kind, Some(path.clone()))
            }
            SerialBackend::Stream(socket) => {
                let kind = Kind::Stream {
                    socket: socket.clone(),
                    ended: false,
                };
                (kind, None)
            }
        };
        Ok(Self { kind, path })
    }

    /// Returns the terminal, file or socket of the host, where there is one.
    pub(in crate::machine) fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Returns whether a thread has to wait for input, clients, or room for output.
    pub(super) fn needs_thread(&self) -> bool {
        !matches!(self.kind, Kind::Null | Kind::File(_))
    }

    /// Sends what goes out without blocking.
    pub(in crate::machine) fn send(&mut self, bytes: &[u8]) -> Sent {
        match &mut self.kind {
            Kind::Null => Sent::Discarded,
            Kind::File(file) => match file.write_all(bytes) {
                Ok(()) => Sent::Bytes(bytes.len()),
                Err(error) => {
                    log::warn!("output is lost: {error}");
                    Sent::Discarded
                }
            },
            Kind::Stdio { output, .. } => {
                // Not made non-blocking: that would change it for other processes too.
                if !is_ready(output.as_fd(), PollFlags::OUT) {
                    return Sent::Full;
                }
                let chunk = &bytes[..bytes.len().min(STDOUT_CHUNK)];
                sent(rustix::io::write(&*output, chunk))
            }
            Kind::Pty { master } => {
                // Written without a reader, the terminal would keep the oldest 4 KiB for whoever
                // opens it next.
                if is_ready(master.as_fd(), PollFlags::HUP) {
                    return Sent::Discarded;
                }
                sent(rustix::io::write(&*master, bytes))
            }
            // One that takes nothing any more may have left input: only its end ends a client.
            Kind::Listener { client, .. } => client
                .as_ref()
                .map_or(Sent::Discarded, |it| send_to_socket(it.as_fd(), bytes)),
            Kind::Stream { socket, .. } => send_to_socket(socket.as_fd(), bytes),
        }
    }

    /// Returns whether it is a pseudo-terminal.
    pub(in crate::machine) fn is_terminal(&self) -> bool {
        matches!(self.kind, Kind::Pty { .. })
    }

    /// Returns whether somebody has the terminal open who has not read all that was sent. It would
    /// be lost with the terminal.
    pub(in crate::machine) fn is_unread(&self) -> bool {
        let (Kind::Pty { master }, Some(path)) = (&self.kind, &self.path) else {
            return false;
        };
        if is_ready(master.as_fd(), PollFlags::HUP) {
            return false;
        }
        // Only the reader's side tells.
        let flags = OFlags::RDONLY | OFlags::NOCTTY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let terminal = rustix::fs::open(path, flags, Mode::empty());
        terminal.is_ok_and(|terminal| ioctl_fionread(terminal).is_ok_and(|unread| unread > 0))
    }

    /// Returns what to poll for. The descriptors stay open while somebody polls them: closed
    /// under a poll, their numbers could become other files'.
    pub(in crate::machine) fn poll_for(
        &self,
        input: bool,
        output: bool,
    ) -> Vec<(Arc<OwnedFd>, PollFlags)> {
        let when = |wanted: bool, flags| {
            if wanted { flags } else { PollFlags::empty() }
        };
        let both = when(input, PollFlags::IN) | when(output, PollFlags::OUT);
        let fds = match &self.kind {
            Kind::Stdio {
                input: stdin,
                output: stdout,
                ended,
            } => vec![
                (stdin, when(input && !ended, PollFlags::IN)),
                (stdout, when(output, PollFlags::OUT)),
            ],
            // A terminal without a reader polls as hung up, at once and always.
            Kind::Pty { master } if !is_ready(master.as_fd(), PollFlags::HUP) => {
                vec![(master, both)]
            }
            Kind::Listener {
                client: Some(client),
                ..
            } => vec![(client, both)],
            Kind::Listener { listener, .. } => vec![(listener, PollFlags::IN)],
            Kind::Stream {
                socket,
                ended: false,
            } => vec![(socket, both)],
            _ => Vec::new(),
        };
        // Without flags, poll would report only a hang-up, and that again and again.
        fds.into_iter()
            .filter(|(_, flags)| !flags.is_empty())
            .map(|(fd, flags)| (fd.clone(), flags))
            .collect()
    }

    /// Takes a client that waits, if none is there.
    pub(in crate::machine) fn accept(&mut self) {
        if let Kind::Listener { listener, client } = &mut self.kind
            && client.is_none()
            && let Ok(socket) = rustix::net::accept_with(&*listener, SocketFlags::CLOEXEC)
        {
            *client = Some(Arc::new(socket));
        }
    }

    /// Receives what is there, without blocking.
    pub(in crate::machine) fn receive(&mut self, buffer: &mut [u8]) -> Received {
        match &mut self.kind {
            Kind::Null | Kind::File(_) => Received::Nothing,
            Kind::Stdio { input, ended, .. } => {
                if *ended || !is_ready(input.as_fd(), PollFlags::IN | PollFlags::HUP) {
                    return Received::Nothing;
                }
                let result = received(rustix::io::read(&*input, buffer));
                *ended = result == Received::Ended;
                result
            }
            // EIO is a terminal that nobody has open: somebody may open it again.
            Kind::Pty { master } => match received(rustix::io::read(&*master, buffer)) {
                Received::Ended => Received::Nothing,
                result => result,
            },
            Kind::Listener { client, .. } => {
                let Some(socket) = client else {
                    return Received::Nothing;
                };
                let result = receive_from_socket(socket.as_fd(), buffer);
                if result == Received::Ended {
                    *client = None;
                }
                result
            }
            Kind::Stream { socket, ended } => {
                let result = receive_from_socket(socket.as_fd(), buffer);
                *ended |= result == Received::Ended;
                result
            }
        }
    }
}

/// Waits until a terminal's reader has read all, by [`Backend::is_unread`], or until `deadline`.
pub(in crate::machine) fn wait_until_read(deadline: Instant, is_unread: impl Fn() -> bool) {
    let mut read = 0;
    while read < READ_TIMES && Instant::now() < deadline {
        read = if is_unread() { 0 } else { read + 1 };
        thread::sleep(READ_INTERVAL);
    }
}

/// Returns whether one of `flags` is up now.
fn is_ready(fd: BorrowedFd<'_>, flags: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, flags)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok() && fds[0].revents().intersects(flags)
}

fn sent(result: rustix::io::Result<usize>) -> Sent {
    use rustix::io::Errno;
    match result {
        Ok(bytes) => Sent::Bytes(bytes),
        Err(Errno::AGAIN | Errno::INTR) => Sent::Full,
        Err(_) => Sent::Discarded,
    }
}

fn received(result: rustix::io::Result<usize>) -> Received {
    use rustix::io::Errno;
    match result {
        Ok(0) => Received::Ended,
        Ok(bytes) => Received::Bytes(bytes),
        Err(Errno::AGAIN | Errno::INTR) => Received::Nothing,
        Err(_) => Received::Ended,
    }
}

fn send_to_socket(socket: BorrowedFd<'_>, bytes: &[u8]) -> Sent {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sent(rustix::net::send(socket, bytes, flags))
}

fn receive_from_socket(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Received {
    received(rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT).map(|(bytes, _)| bytes))
}

/// Makes a raw terminal that polls as hung up until somebody opens it.
fn open_pty(mode: u32) -> io::Result<(OwnedFd, PathBuf)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let master = rustix::pty::openpt(flags)?;
    rustix::pty::grantpt(&master)?;
    rustix::pty::unlockpt(&master)?;
    let name = rustix::pty::ptsname(&master, Vec::new())?;
    let path = PathBuf::from(name.into_string().map_err(io::Error::other)?);
    let mut settings = tcgetattr(&master)?;
    settings.make_raw();
    tcsetattr(&master, OptionalActions::Now, &settings)?;
    fs::set_permissions(&path, Permissions::from_mode(mode))?;
    rustix::io::ioctl_fionbio(&master, true)?;
    // Opened and closed once, it counts as one that its reader has left.
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    drop(rustix::fs::open(&path, flags, Mode::empty())?);
    Ok((master, path))
}

/// Listens at `path`, where a socket that nobody listens at may be left over.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == ErrorKind::AddrInUse && is_stale(path) => {
            fs::remove_file(path)?;
            UnixListener::bind(path)?
        }
        result => result?,
    };
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn is_stale(path: &Path) -> bool {
    let is_socket = fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    let refused = |error: io::Error| error.kind() == ErrorKind::ConnectionRefused;
    is_socket && UnixStream::connect(path).is_err_and(refused)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[test]
    fn a_terminal_tells_whether_its_reader_has_read_all() {
        use std::io::Read as _;
        let mut backend = Backend::open(&SerialBackend::Pty { mode: 0o600 }).unwrap();
        assert!(!backend.is_unread(), "nobody has it open");
        let path = backend.path().unwrap().to_owned();
        let mut reader = OpenOptions::new().read(true).open(path).unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        while backend.send(b"last") != Sent::Bytes(4) {
            assert!(Instant::now() < deadline, "the reader is not noticed");
        }
        // The kernel passes it on by a thread of its own.
        while !backend.is_unread() {
            assert!(Instant::now() < deadline, "nothing arrives");
        }
        reader.read_exact(&mut [0; 4]).unwrap();
        assert!(!backend.is_unread());
    }

    #[test]
    fn what_a_client_wrote_before_it_left_comes_in_though_output_failed_meanwhile() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let mut backend = Backend::open(&SerialBackend::UnixListen { path: path.clone() }).unwrap();
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(b"crash").unwrap();
        drop(client);
        backend.accept();
        assert_eq!(backend.send(b"ready"), Sent::Discarded);
        let mut buffer = [0; 16];
        assert_eq!(backend.receive(&mut buffer), Received::Bytes(5));
        assert_eq!(&buffer[..5], b"crash");
        assert_eq!(backend.receive(&mut buffer), Received::Ended);

        let _next = UnixStream::connect(&path).unwrap();
        backend.accept();
        assert_eq!(backend.send(b"ready"), Sent::Bytes(5));
    }
}
