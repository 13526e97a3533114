//! The sockets, and who is connected.

use std::collections::HashMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::client::{Client, Peer};
use super::connection::Connection;
use super::dispatch::Driver;
use super::events::Event;
use super::types::DomainRef;

/// Clients connected at once; each has a thread. libvirtd's default is 5000.
const CLIENTS_MAX: usize = 1000;

/// The connected clients.
#[derive(Debug, Default)]
pub struct Clients {
    connected: Mutex<HashMap<u64, Arc<Client>>>,
    last_id: AtomicU64,
    /// Whether no more are taken; held while one is.
    closed: Mutex<bool>,
}

impl Clients {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Arc<Client>>> {
        // Every change is one call, so a panic leaves nothing half-changed.
        self.connected
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns how many there are.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Takes no more clients for the rest of the process, if `is_time` says so while none is being
    /// taken; returns whether it does. Those who come wait in their socket, whose next process serves
    /// them where systemd made it.
    pub fn close_if(&self, is_time: impl FnOnce() -> bool) -> bool {
        let closed = self.closed.lock();
        let mut closed = closed.unwrap_or_else(PoisonError::into_inner);
        *closed = *closed || is_time();
        *closed
    }

    /// Sends an event to all who asked for it. Does not wait for any of them.
    pub fn notify(&self, domain: &DomainRef, event: &Event) {
        for client in self.lock().values() {
            client.notify(domain, event);
        }
    }

    fn add(&self, socket: &UnixStream, read_only: bool) -> io::Result<Arc<Client>> {
        let peer = rustix::net::sockopt::socket_peercred(socket).ok();
        let peer = peer.map(|peer| Peer {
            pid: peer.pid.as_raw_nonzero().get(),
            uid: peer.uid.as_raw(),
        });
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let mut connected = self.lock();
        if connected.len() >= CLIENTS_MAX {
            return Err(io::Error::other(format!(
                "{CLIENTS_MAX} clients are connected"
            )));
        }
        let client = Arc::new(Client::new(id, peer, read_only)?);
        connected.insert(id, client.clone());
        match peer {
            Some(Peer { pid, uid }) => {
                log::info!("client {id}: process {pid} of user {uid}, read-only: {read_only}");
            }
            None => log::info!("client {id}, read-only: {read_only}"),
        }
        Ok(client)
    }

    fn remove(&self, id: u64) {
        self.lock().remove(&id);
    }
}

/// Serves whoever connects to `listener`, in threads of its own, for as long as the process runs.
pub fn serve<D: Driver>(
    listener: UnixListener,
    read_only: bool,
    clients: &Arc<Clients>,
    driver: &Arc<D>,
) -> io::Result<()> {
    let (clients, driver) = (clients.clone(), driver.clone());
    // Another process may take the client that was waiting.
    listener.set_nonblocking(true)?;
    thread::Builder::new()
        .name("lvp-accept".to_owned())
        .spawn(move || {
            loop {
                match take(&listener, read_only, &clients, &driver) {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => {
                        log::warn!("could not take a client: {error}");
                        // Out of descriptors or threads, most likely: give others time to end.
                        thread::sleep(Duration::from_millis(50));
                    }
                }
            }
        })?;
    Ok(())
}

/// Waits for a client, and begins to serve it; tells whether there can be more.
fn take<D: Driver>(
    listener: &UnixListener,
    read_only: bool,
    clients: &Arc<Clients>,
    driver: &Arc<D>,
) -> io::Result<bool> {
    let mut waiting = [PollFd::new(listener, PollFlags::IN)];
    match poll(&mut waiting, None) {
        Err(Errno::INTR) => return Ok(true),
        polled => polled?,
    };
    let closed = clients.closed.lock();
    let closed = closed.unwrap_or_else(PoisonError::into_inner);
    if *closed {
        return Ok(false);
    }
    match listener.accept() {
        Ok((socket, _)) => begin(socket, read_only, clients, driver).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(true),
        Err(error) => Err(error),
    }
}

fn begin<D: Driver>(
    socket: UnixStream,
    read_only: bool,
    clients: &Arc<Clients>,
    driver: &Arc<D>,
) -> io::Result<()> {
    let client = clients.add(&socket, read_only)?;
    let id = client.id();
    let (of_thread, driver) = (clients.clone(), driver.clone());
    let spawned = Connection::new(socket, client, driver).and_then(|connection| {
        thread::Builder::new()
            .name("lvp-client".to_owned())
            .spawn(move || {
                connection.serve();
                of_thread.remove(id);
            })
    });
    if spawned.is_err() {
        clients.remove(id);
    }
    spawned.map(drop)
}
