//! The host's end of a network device: a tap, or a socket that the program has.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crate::machine::spec::{NetPort, NetSpec};
use crate::sys::tap::Tap;

/// Name of a tap that the document does not name: the lowest free number of libvirt's names.
const NEW_NAME: &str = "vnet%d";
/// First byte of the address of a tap: above those of guests, so that no bridge takes it for its
/// own.
const TAP_ADDRESS_START: u8 = 0xfe;

/// A network device's host end that cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The tap cannot be opened or made.
    #[error("could not {what} tap {name:?}{hint}")]
    Tap {
        /// What was tried.
        what: &'static str,
        /// Name of the tap.
        name: String,
        /// What may help; empty, or with its own separator.
        hint: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// There is no such tap, and it is not to be made.
    #[error("there is no tap {name:?}, and managed='no' says not to make it")]
    NoTap {
        /// Its name.
        name: String,
    },
    /// The tap cannot be put on a bridge.
    #[error("could not put tap {name:?} on bridge {bridge:?}{hint}")]
    Bridge {
        /// Name of the tap.
        name: String,
        /// Name of the bridge.
        bridge: String,
        /// What may help; empty, or with its own separator.
        hint: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// The host's end.
#[derive(Debug)]
pub enum Port {
    /// A tap interface.
    Tap(Tap),
    /// A socket of packets.
    Socket(Arc<OwnedFd>),
}

fn hint(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EBUSY) => ": another program uses it",
        Some(libc::EPERM | libc::EACCES) => {
            ": making one needs CAP_NET_ADMIN; with managed='no' it is enough to own it"
        }
        Some(libc::EINVAL) => ": is it another kind of interface, or one of several queues?",
        Some(libc::ENOENT | libc::ENODEV) => ": is the module tun loaded?",
        _ => "",
    }
}

impl Port {
    pub(super) fn open(spec: &NetSpec) -> Result<Self, NetError> {
        match &spec.port {
            NetPort::Socket(socket) => Ok(Self::Socket(socket.clone())),
            NetPort::Tap { name, make: false } => {
                let name = name.as_deref().unwrap_or_default();
                let there = Tap::exists(name);
                if !there.map_err(failed("look for", name))? {
                    let name = name.to_owned();
                    return Err(NetError::NoTap { name });
                }
                Ok(Self::Tap(Tap::open(name).map_err(failed("open", name))?))
            }
            NetPort::Tap { name, make: true } => {
                Ok(Self::Tap(new_tap(name.as_deref(), spec.mac, None)?))
            }
            NetPort::Bridge { bridge, name } => {
                Ok(Self::Tap(new_tap(name.as_deref(), spec.mac, Some(bridge))?))
            }
        }
    }

    pub(super) fn interface(&self) -> Option<&str> {
        match self {
            Self::Tap(tap) => Some(tap.name()),
            Self::Socket(_) => None,
        }
    }

    pub(super) fn set_partial_checksums(&self, takes: bool) -> io::Result<()> {
        match self {
            Self::Tap(tap) => tap.set_partial_checksums(takes),
            // Its other end sees to that.
            Self::Socket(_) => Ok(()),
        }
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tap(tap) => tap.as_fd(),
            Self::Socket(socket) => socket.as_fd(),
        }
    }
}

fn failed(what: &'static str, name: &str) -> impl FnOnce(io::Error) -> NetError {
    move |source| NetError::Tap {
        what,
        name: name.to_owned(),
        hint: hint(&source),
        source,
    }
}

/// Makes a tap that is gone when the machine is.
fn new_tap(name: Option<&str>, mac: [u8; 6], bridge: Option<&str>) -> Result<Tap, NetError> {
    let name = name.unwrap_or(NEW_NAME);
    let tap = Tap::open(name).map_err(failed("make", name))?;
    let name = tap.name();
    let mut address = mac;
    address[0] = TAP_ADDRESS_START;
    let set = tap.set_address(address);
    set.map_err(failed("set the address of", name))?;
    if let Some(bridge) = bridge {
        tap.join_bridge(bridge).map_err(|source| NetError::Bridge {
            name: name.to_owned(),
            bridge: bridge.to_owned(),
            hint: match source.raw_os_error() {
                Some(libc::ENODEV) => ": there is no such bridge",
                Some(libc::EOPNOTSUPP) => ": it is an interface, but no bridge",
                Some(libc::EPERM) => ": that needs CAP_NET_ADMIN",
                _ => "",
            },
            source,
        })?;
    }
    tap.bring_up().map_err(failed("bring up", name))?;
    Ok(tap)
}
