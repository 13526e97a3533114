//! Serial consoles by descriptor: sockets that the program hands in, and terminals that it opens.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use crate::host::{Domain, DomainOptions, HostError};
use crate::machine::spec::{MachineSpec, SerialBackend};

impl DomainOptions {
    /// Serves the first serial ports at the sockets that the program gave.
    pub(super) fn attach_consoles(&self, spec: &mut MachineSpec) -> Result<(), HostError> {
        let (given, ports) = (self.consoles.len(), spec.serials.len());
        if given > ports {
            return Err(HostError::Invalid(format!(
                "{given} console sockets are given, and the domain has {ports} serial ports"
            )));
        }
        for (number, socket) in self.consoles.iter().enumerate() {
            let kind = rustix::net::sockopt::socket_type(socket);
            if kind != Ok(rustix::net::SocketType::STREAM) {
                return Err(HostError::Invalid(format!(
                    "the descriptor for console {number} is not a stream socket"
                )));
            }
            spec.serials[number].backend = SerialBackend::Stream(socket.clone());
        }
        Ok(())
    }
}

impl Domain {
    /// Opens serial console `number` of a machine that runs, for reading and writing: its
    /// terminal, or a connection to its socket.
    pub fn open_console(&self, number: usize) -> Result<OwnedFd, HostError> {
        let machine = self.machine()?;
        let spec = machine.spec().serials.get(number);
        let console = machine.consoles().into_iter().nth(number);
        let (Some(spec), Some(console)) = (spec, console) else {
            let count = machine.spec().serials.len();
            return Err(HostError::NoConsole { number, count });
        };
        let path = console.path.as_deref();
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| HostError::Path {
                action: "open the console",
                path,
                source,
            }
        };
        match (&spec.backend, path) {
            (SerialBackend::Pty { .. }, Some(path)) => open_terminal(path).map_err(failed(path)),
            (SerialBackend::UnixListen { .. }, Some(path)) => UnixStream::connect(path)
                .map(OwnedFd::from)
                .map_err(failed(path)),
            _ => Err(HostError::Unsupported(format!(
                "console {number} is neither a terminal nor a socket that listens"
            ))),
        }
    }
}

/// Opens a terminal without making it the process's own.
fn open_terminal(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

/// Takes a copy of a descriptor that the program keeps.
pub fn duplicate(fd: impl AsFd) -> Result<OwnedFd, HostError> {
    fd.as_fd()
        .try_clone_to_owned()
        .map_err(|source| HostError::Resource {
            what: "a copy of a descriptor",
            source,
        })
}
