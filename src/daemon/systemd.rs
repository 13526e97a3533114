//! What systemd gives a service, and wants to hear from it (sd_listen_fds(3), sd_notify(3)).

use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

use crate::host::take_passed_descriptors;

/// What systemd tells this process in its environment, and is for no other.
pub(super) const VARIABLES: [&str; 4] = [
    "NOTIFY_SOCKET",
    "LISTEN_PID",
    "LISTEN_FDS",
    "LISTEN_FDNAMES",
];

/// Returns whether this process is a service of a running systemd.
pub(super) fn is_our_manager() -> bool {
    std::env::var_os("INVOCATION_ID").is_some() && Path::new("/run/systemd/system").is_dir()
}

/// Takes the sockets that systemd listens at for us, each with its name.
pub(super) fn passed_sockets() -> Vec<(OwnedFd, String)> {
    let variable = |name| std::env::var(name).ok();
    let is_for_us = variable("LISTEN_PID") == Some(std::process::id().to_string());
    let count = variable("LISTEN_FDS").and_then(|count| count.parse::<usize>().ok());
    let Some(count) = count.filter(|&count| is_for_us && count <= 64) else {
        return Vec::new();
    };
    let names = variable("LISTEN_FDNAMES").unwrap_or_default();
    let names = names.split(':').map(str::to_owned);
    let names = names.chain(std::iter::repeat(String::new()));
    take_passed_descriptors(count)
        .into_iter()
        .zip(names)
        .collect()
}

/// Tells systemd how the service is doing, where it wants to know.
pub(super) fn notify(state: &str) {
    let Ok(socket) = std::env::var("NOTIFY_SOCKET") else {
        return;
    };
    let sent = UnixDatagram::unbound().and_then(|from| {
        let address = match socket.strip_prefix('@') {
            Some(name) => SocketAddr::from_abstract_name(name)?,
            None => SocketAddr::from_pathname(&socket)?,
        };
        from.send_to_addr(state.as_bytes(), &address)
    });
    if let Err(error) = sent {
        log::warn!("could not tell systemd {state}: {error}");
    }
}
