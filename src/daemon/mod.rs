//! livepointd: domains that outlive whoever started them, for stock libvirt clients.
//!
//! The daemon owns definitions, snapshots and the list of domains (`livepoint`, `managed`); each
//! running domain is a worker process of its own, which is what `livepoint run` is, and the daemon
//! is its client (`worker`). It can end at any moment: workers go on, and the next daemon finds
//! them by their control sockets. `driver` says what each procedure of libvirt's protocol does.

mod adopt;
mod args;
mod definitions;
mod driver;
mod error;
mod guests;
mod job;
mod livepoint;
mod managed;
mod outbox;
mod paths;
mod registry;
mod snapshots;
mod sockets;
mod state;
mod supervise;
mod systemd;
mod texts;
mod worker;
mod xml;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser as _};

use crate::host::{LockFile, TerminationSignals};
use crate::rpc::{Clients, serve};
use args::Arguments;
pub use driver::coverage;
use livepoint::Livepoint;
use sockets::SocketFile;
use worker::Launcher;

/// How often the daemon looks whether it has been of no use for long enough to end.
const IDLE_POLL: Duration = Duration::from_millis(200);

/// Returns the parser of the daemon's arguments, for its man page and completions.
pub fn command() -> clap::Command {
    Arguments::command()
}

/// Parses the process's arguments, serves clients, and returns the exit status.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    env_logger::Builder::new()
        .filter_level(arguments.log_level())
        .parse_env("LIVEPOINT_LOG")
        .format_timestamp_micros()
        .init();
    let done = match &arguments.command {
        Some(command) => guests::run(&arguments, command),
        None => run(&arguments),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("livepointd: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let signals = TerminationSignals::block().context("could not block signals")?;
    let (ended, end) = crossbeam_channel::bounded(1);
    signals.on_signal(move || {
        // Full: it has been told already.
        let _ = ended.try_send(());
    })?;
    let (_lock, driver) = take_over(arguments)?;
    let clients = driver.clients.clone();
    let sockets = sockets::listen(arguments)?;
    for (listener, read_only) in sockets.listeners {
        serve(listener, read_only, &clients, &driver).context("could not serve a socket")?;
    }
    systemd::notify("READY=1");
    driver.autostart();
    wait_for_end(arguments.timeout(), &end, &driver);
    systemd::notify("STOPPING=1");
    // Workers go on; the sockets' files go with the daemon.
    drop(sockets.files);
    Ok(())
}

/// Finds all domains, and keeps other daemons from them.
fn take_over(arguments: &Arguments) -> anyhow::Result<(LockFile, Arc<Livepoint>)> {
    let paths = arguments.paths()?;
    paths.prepare()?;
    let lock = sockets::only_daemon(&paths)?;
    let launcher = Launcher {
        program: arguments.worker()?,
        paths: paths.clone(),
        in_scopes: systemd::is_our_manager(),
        confinement: arguments.confinement()?,
    };
    let driver = Livepoint::new(paths, launcher, Arc::new(Clients::default()))?;
    driver.resolve_pending();
    driver.watch_workers()?;
    Ok((lock, driver))
}

/// A daemon in this process, for a command of its own, until this is dropped at the process's end.
struct Own {
    _file: SocketFile,
    _lock: LockFile,
}

/// Serves a socket from this process where no daemon runs that would.
fn serve_own(arguments: &Arguments, socket: &Path) -> anyhow::Result<Own> {
    let (lock, driver) = take_over(arguments)?;
    let (listener, file) = sockets::bind(socket, 0o600, None)?;
    serve(listener, false, &driver.clients, &driver)?;
    Ok(Own {
        _file: file,
        _lock: lock,
    })
}

/// Waits for a signal, or until nobody needed the daemon for `timeout`. Who comes after that is not
/// taken, and finds the next daemon.
fn wait_for_end(
    timeout: Option<Duration>,
    end: &crossbeam_channel::Receiver<()>,
    driver: &Livepoint,
) {
    let mut idle_since = Instant::now();
    while end.recv_timeout(IDLE_POLL).is_err() {
        if !driver.is_idle() {
            idle_since = Instant::now();
        }
        let is_over = timeout.is_some_and(|timeout| idle_since.elapsed() >= timeout);
        if is_over && driver.clients.close_if(|| driver.is_idle()) {
            log::info!("nobody is there: the daemon ends");
            return;
        }
        // A channel without a sender would make this loop spin.
        thread::yield_now();
    }
    driver.clients.close_if(|| true);
}
