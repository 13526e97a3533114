//! Guests around a shutdown of the host: `livepointd stop-guests` saves them or shuts them down,
//! and `start-guests` starts those again that ran. Both are clients of the daemon.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, Subcommand, ValueEnum};
use uuid::Uuid;

use super::args::Arguments;
use super::paths::{make_dir, remove, write_whole};
use super::{Own, sockets};
use crate::rpc::{CallError, Caller, DomainRef, List};

/// Numbers of the procedures that are called.
const DOMAIN_CREATE: i32 = 9;
const DOMAIN_LOOKUP_BY_UUID: i32 = 24;
const DOMAIN_SHUTDOWN: i32 = 33;
const DOMAIN_IS_PERSISTENT: i32 = 151;
const DOMAIN_MANAGED_SAVE: i32 = 182;
const DOMAIN_GET_STATE: i32 = 212;
const LIST_ALL_DOMAINS: i32 = 273;

/// A domain's states (`virDomainState`).
const PAUSED: i32 = 3;
const SHUTOFF: i32 = 5;

/// How often a guest that shuts down is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// What the daemon's program does besides being the daemon.
#[derive(Clone, Debug, Subcommand)]
pub(super) enum Command {
    /// Save or shut down all guests, as before a shutdown of the host.
    StopGuests(StopArgs),
    /// Start the guests that ran when `stop-guests` stopped them.
    StartGuests,
}

#[derive(Clone, Debug, Args)]
pub(super) struct StopArgs {
    /// What to do with them. Those that are paused are saved, those that are transient shut down.
    #[arg(long, value_enum, default_value_t = How::Save)]
    how: How,
    /// How many guests at a time.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=256))]
    parallel: u16,
    /// How many seconds a guest may take to shut down; it is left running after that.
    #[arg(long, value_name = "SECONDS", default_value_t = 300)]
    timeout: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum How {
    /// Save them (`virsh managedsave`): they go on where they were.
    Save,
    /// Press their power buttons (`virsh shutdown`).
    Shutdown,
}

/// A connection to the daemon that the arguments name.
struct Daemon {
    socket: PathBuf,
    uri: &'static str,
}

impl Daemon {
    fn of(arguments: &Arguments) -> anyhow::Result<Self> {
        let socket = match arguments.socket.first() {
            Some(given) => given.clone(),
            None => sockets::default_socket()?,
        };
        let is_root = super::args::is_root();
        let uri = if is_root {
            "livepoint:///system"
        } else {
            "livepoint:///session"
        };
        Ok(Self { socket, uri })
    }

    fn connect(&self) -> anyhow::Result<Caller> {
        Caller::open(&self.socket, self.uri)
            .with_context(|| format!("no daemon answers at {}", self.socket.display()))
    }

    /// Has this process be the daemon where none answers: guests outlive it, and no service is started
    /// any more when the host shuts down.
    fn replace_if_gone(&mut self, arguments: &Arguments) -> anyhow::Result<Option<Own>> {
        let Err(error) = self.connect() else {
            return Ok(None);
        };
        let socket = arguments.paths()?.workers().join("guests.sock");
        let own = super::serve_own(arguments, &socket).context(error)?;
        self.socket = socket;
        Ok(Some(own))
    }
}

/// Carries out a command. Fails where a guest was not stopped or started.
pub(super) fn run(arguments: &Arguments, command: &Command) -> anyhow::Result<()> {
    let mut daemon = Daemon::of(arguments)?;
    let list = arguments.paths()?.state.join("guests.json");
    let failed = match command {
        Command::StopGuests(args) => {
            let _own = daemon.replace_if_gone(arguments)?;
            stop_all(&daemon, &list, args)?
        }
        Command::StartGuests => start_all(&daemon, &list)?,
    };
    anyhow::ensure!(failed == 0, "{failed} guests failed");
    Ok(())
}

/// Stops every guest that runs; returns how many did not stop.
fn stop_all(daemon: &Daemon, list: &Path, args: &StopArgs) -> anyhow::Result<usize> {
    /// `VIR_CONNECT_LIST_DOMAINS_ACTIVE`.
    const ACTIVE: u32 = 1;
    let mut caller = daemon.connect()?;
    let (guests, _): (List<DomainRef, 16_384>, u32) =
        caller.call(LIST_ALL_DOMAINS, &(1_i32, ACTIVE))?;
    let mut persistent = Vec::new();
    for guest in &guests.0 {
        if caller.call::<i32>(DOMAIN_IS_PERSISTENT, guest)? == 1 {
            persistent.push(guest.uuid);
        }
    }
    // Before anything stops: a host that loses its power now starts them all again.
    let dir = list.parent().unwrap_or(Path::new("/"));
    make_dir(dir)?;
    write_whole(list, &serde_json::to_vec(&persistent)?)?;
    let next = std::sync::Mutex::new(guests.0.iter());
    let stop_some = || {
        let mut failed = 0;
        loop {
            let taken = next.lock().ok().and_then(|mut next| next.next());
            let Some(guest) = taken else {
                return failed;
            };
            let name = &guest.name;
            match stop(daemon, guest, persistent.contains(&guest.uuid), args) {
                Ok(done) => println!("{name}: {done}"),
                Err(error) => {
                    failed += 1;
                    eprintln!("{name}: {error:#}");
                }
            }
        }
    };
    Ok(thread::scope(|scope| {
        let threads: Vec<_> = (0..args.parallel).map(|_| scope.spawn(stop_some)).collect();
        // A thread that panicked is a guest that was not stopped.
        threads.into_iter().map(|it| it.join().unwrap_or(1)).sum()
    }))
}

/// Stops a guest; returns what was done.
fn stop(
    daemon: &Daemon,
    guest: &DomainRef,
    is_persistent: bool,
    args: &StopArgs,
) -> anyhow::Result<&'static str> {
    let mut caller = daemon.connect()?;
    let is_paused = state(&mut caller, guest)? == PAUSED;
    if is_persistent && (args.how == How::Save || is_paused) {
        let flags = 0_u32;
        match caller.call::<()>(DOMAIN_MANAGED_SAVE, &(guest, flags)) {
            Ok(()) => return Ok("saved"),
            // It ended by itself meanwhile.
            Err(_) if state(&mut caller, guest).is_ok_and(|state| state == SHUTOFF) => {
                return Ok("off already");
            }
            Err(error) if is_paused => return Err(error.into()),
            Err(error) => eprintln!("{}: not saved: {error}: shutting it down", guest.name),
        }
    }
    caller.call::<()>(DOMAIN_SHUTDOWN, guest)?;
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(args.timeout) {
        match state(&mut caller, guest) {
            Ok(SHUTOFF) => return Ok("shut down"),
            Ok(_) => thread::sleep(LOOK),
            // One that was transient is gone.
            Err(CallError::Refused { .. }) => return Ok("shut down"),
            Err(error) => return Err(error.into()),
        }
    }
    anyhow::bail!(
        "it did not shut down within {} s, and still runs",
        args.timeout
    )
}

fn state(caller: &mut Caller, guest: &DomainRef) -> Result<i32, CallError> {
    let (state, _reason): (i32, i32) = caller.call(DOMAIN_GET_STATE, &(guest, 0_u32))?;
    Ok(state)
}

/// Starts the guests of the list that do not run; returns how many did not start.
fn start_all(daemon: &Daemon, list: &Path) -> anyhow::Result<usize> {
    let Ok(json) = fs::read(list) else {
        return Ok(0);
    };
    let guests: Vec<Uuid> =
        serde_json::from_slice(&json).with_context(|| list.display().to_string())?;
    let mut caller = daemon.connect()?;
    let mut failed = 0;
    for uuid in guests {
        let found = caller.call::<DomainRef>(DOMAIN_LOOKUP_BY_UUID, &uuid);
        let Ok(guest) = found else {
            // Undefined since.
            continue;
        };
        if guest.id >= 0 {
            continue;
        }
        match caller.call::<()>(DOMAIN_CREATE, &guest) {
            Ok(()) => println!("{}: started", guest.name),
            // It starts with the host anyway, and has just done so.
            Err(_) if state(&mut caller, &guest).is_ok_and(|state| state != SHUTOFF) => {}
            Err(error) => {
                failed += 1;
                eprintln!("{}: {error}", guest.name);
            }
        }
    }
    // Those that failed are not tried at every start.
    remove(list)?;
    Ok(failed)
}
