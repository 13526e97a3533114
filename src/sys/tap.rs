//! Tap interfaces: network interfaces of the host whose other end is a program.
#![expect(
    unsafe_code,
    reason = "the ioctls of tap interfaces, which no crate of ours has"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

/// Longest name of an interface, in bytes.
pub const NAME_BYTES_MAX: usize = libc::IFNAMSIZ - 1;
/// Bytes before each packet: `struct virtio_net_hdr_v1`.
const HEADER_BYTES: libc::c_int = 12;
/// Adds an interface to a bridge (linux/sockios.h).
const SIOCBRADDIF: libc::Ioctl = 0x89a2;

/// A tap interface that this process has the other end of. Reads and writes do not block; each is
/// one packet, with a `virtio_net_hdr` of 12 bytes before it.
///
/// One that was made by [`Tap::open`] is gone once this is dropped.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
}

impl Tap {
    /// Opens the interface `name`, made where it is not there. `%d` in the name stands for the
    /// lowest number that makes it a new one.
    ///
    /// Making one needs `CAP_NET_ADMIN`; opening one that is there needs to be its owner.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::ResourceBusy`]: another program has its other end.
    pub fn open(name: &str) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open("/dev/net/tun")?;
        let mut request = request(name)?;
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = flags.try_into().expect("the flags have 16 bits");
        // SAFETY: TUNSETIFF reads and writes one `ifreq`, which the borrow keeps alive.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        check(set)?;
        let bytes = HEADER_BYTES;
        // SAFETY: TUNSETVNETHDRSZ reads one `int`.
        let set = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) };
        check(set)?;
        let name = name_in(&request);
        Ok(Self { file, name })
    }

    /// Returns whether there is an interface of this name.
    pub fn exists(name: &str) -> io::Result<bool> {
        let mut request = request(name)?;
        match on_interface(libc::SIOCGIFFLAGS as libc::Ioctl, &mut request) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Returns the interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Says whether the reader takes packets whose checksum is still to be filled in.
    pub fn set_partial_checksums(&self, takes: bool) -> io::Result<()> {
        let offload = if takes { libc::TUN_F_CSUM } else { 0 };
        // SAFETY: TUNSETOFFLOAD takes its flags by value, as wide as a pointer.
        let set = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(offload),
            )
        };
        check(set)
    }

    /// Gives the interface a hardware address. Needs `CAP_NET_ADMIN`.
    pub fn set_address(&self, address: [u8; 6]) -> io::Result<()> {
        let mut request = request(&self.name)?;
        // SAFETY: a `sockaddr` is plain bytes, for which zeros are a value.
        let mut hardware: libc::sockaddr = unsafe { mem::zeroed() };
        hardware.sa_family = libc::ARPHRD_ETHER;
        for (byte, value) in hardware.sa_data.iter_mut().zip(address) {
            *byte = value.cast_signed();
        }
        request.ifr_ifru.ifru_hwaddr = hardware;
        on_interface(libc::SIOCSIFHWADDR as libc::Ioctl, &mut request)
    }

    /// Lets packets pass. Needs `CAP_NET_ADMIN`.
    pub fn bring_up(&self) -> io::Result<()> {
        let mut request = request(&self.name)?;
        on_interface(libc::SIOCGIFFLAGS as libc::Ioctl, &mut request)?;
        let up = libc::c_short::try_from(libc::IFF_UP).expect("a flag of 16 bits");
        // SAFETY: SIOCGIFFLAGS has written this member of the union.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | up;
        on_interface(libc::SIOCSIFFLAGS as libc::Ioctl, &mut request)
    }

    /// Makes the interface a port of a bridge. Needs `CAP_NET_ADMIN`.
    ///
    /// # Errors
    ///
    /// `ENODEV`: there is no such bridge; `EOPNOTSUPP`: it is no bridge.
    pub fn join_bridge(&self, bridge: &str) -> io::Result<()> {
        let mut asked = request(&self.name)?;
        on_interface(libc::SIOCGIFINDEX as libc::Ioctl, &mut asked)?;
        // SAFETY: SIOCGIFINDEX has written this member of the union.
        let index = unsafe { asked.ifr_ifru.ifru_ifindex };
        let mut request = request(bridge)?;
        request.ifr_ifru.ifru_ifindex = index;
        on_interface(SIOCBRADDIF, &mut request)
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Makes a request that names an interface.
fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('\0') {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: an `ifreq` is plain bytes, for which zeros are a value.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (byte, value) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *byte = value.cast_signed();
    }
    Ok(request)
}

fn name_in(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().map(|byte| byte.cast_unsigned());
    let name: Vec<u8> = bytes.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&name).into_owned()
}

/// Asks the kernel something about the interface, or the bridge, that the request names.
fn on_interface(what: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // Any socket will do.
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    // SAFETY: each request used here reads and writes one `ifreq`, which the borrow keeps alive.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), what, &raw mut *request) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused() {
        for name in ["", "a-name-of-16-byte", "a\0b"] {
            let error = Tap::open(name).unwrap_err();
            // Without /dev/net/tun that is told first.
            assert_ne!(error.kind(), io::ErrorKind::ResourceBusy, "{name}");
            Tap::exists(name).unwrap_err();
        }
        assert!(Tap::exists("lo").unwrap());
        assert!(!Tap::exists("lvp-no-such").unwrap());
    }
}
