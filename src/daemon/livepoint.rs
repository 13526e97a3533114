//! The driver: all domains, and what is done to them.

use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::definitions;
use super::driver::Consoles;
use super::error::DaemonError;
use super::job::JobKind;
use super::managed::{Live, Managed, State};
use super::paths::{Paths, write_whole};
use super::registry::Registry;
use super::snapshots::Snapshots;
use super::state::{self, Paused, RunState, Running, Shutoff};
use super::worker::{self, Boot, Launcher, Process, Record};
use crate::host::DomainConfig;
use crate::host::control::protocol::Method;
use crate::rpc::{Clients, Code, DomainRef, Event, RpcError};

/// How long a machine may take to end once it is told to.
const DESTROY_TIMEOUT: Duration = Duration::from_secs(15);
/// How long a change of state may take to be heard of.
const STATE_TIMEOUT: Duration = Duration::from_secs(10);

/// The driver of `livepoint:///`.
#[derive(Debug)]
pub(super) struct Livepoint {
    pub(super) paths: Paths,
    pub(super) registry: Registry,
    pub(super) launcher: Launcher,
    /// Whether it is an ordinary user's own.
    pub(super) is_session: bool,
    pub(super) consoles: Consoles,
    pub(super) clients: Arc<Clients>,
    pub(super) last_id: AtomicU32,
    /// Held while domains are added or removed or get another name.
    membership: Mutex<()>,
}

/// How a domain is started.
#[derive(Debug)]
pub(super) struct Start<'a> {
    pub(super) boot: Boot<'a>,
    pub(super) paused: bool,
    pub(super) why: Running,
    pub(super) owner: Option<u64>,
}

impl Livepoint {
    /// Makes the driver, with every domain that is defined or runs.
    pub(super) fn new(
        paths: Paths,
        launcher: Launcher,
        clients: Arc<Clients>,
    ) -> Result<Arc<Self>, DaemonError> {
        let driver = Arc::new(Self {
            registry: Registry::default(),
            is_session: !rustix::process::geteuid().is_root(),
            launcher,
            consoles: Consoles::default(),
            clients,
            last_id: AtomicU32::new(0),
            membership: Mutex::default(),
            paths,
        });
        for found in definitions::load(&driver.paths)? {
            let config = Arc::new(found.config);
            let snapshots = Snapshots::load(&driver.paths, config.uuid);
            let domain = Managed::new(config.uuid, config.name.as_str(), snapshots);
            {
                let mut state = domain.lock();
                state.definition = Some(config);
                state.autostart = found.autostart;
            }
            driver.registry.insert(Arc::new(domain));
        }
        driver.find_workers();
        driver.note_what_ended();
        Ok(driver)
    }

    /// Tells the clients.
    pub(super) fn notify(&self, domain: &Managed, event: &Event) {
        self.clients.notify(&domain.reference(), event);
    }

    /// Tells the clients of a domain that may have another name now, or be gone.
    pub(super) fn notify_as(&self, domain: &DomainRef, event: &Event) {
        self.clients.notify(domain, event);
    }

    /// Runs `change` while no domain is added, removed or renamed by anybody else.
    pub(super) fn with_membership<T>(&self, change: impl FnOnce() -> T) -> T {
        let held = self.membership.lock();
        let _held = held.unwrap_or_else(PoisonError::into_inner);
        change()
    }

    /// Starts a domain that does not run. The caller holds a job of it.
    pub(super) fn start(
        self: &Arc<Self>,
        domain: &Arc<Managed>,
        config: &Arc<DomainConfig>,
        start: &Start<'_>,
    ) -> Result<(), RpcError> {
        let name = config.name.as_str();
        if domain.lock().live.is_some() {
            return Err(RpcError::new(
                Code::OperationInvalid,
                "domain is already running",
            ));
        }
        let record = Record {
            id: self.last_id.fetch_add(1, Ordering::AcqRel) + 1,
            why: start.why,
        };
        let started = self
            .launcher
            .start(domain.uuid, name, &record, &start.boot, start.paused);
        let (child, client) = match started {
            Ok(started) => started,
            Err(error) => {
                worker::forget(&self.paths, domain.uuid);
                domain.lock().shutoff = Shutoff::Failed;
                return Err(error);
            }
        };
        let pid = child.id();
        let run = if start.paused {
            RunState::Paused(match start.why {
                Running::FromSnapshot => Paused::FromSnapshot,
                _ => Paused::User,
            })
        } else {
            RunState::Running(start.why)
        };
        domain.lock().live = Some(Live {
            id: record.id,
            pid,
            config: config.clone(),
            run,
            next_pause: None,
            next_resume: None,
            reboots: false,
            stop_cause: None,
            has_dirty_rate: false,
            owner: start.owner,
        });
        domain.notify();
        self.notify(domain, &state::started(start.why));
        if let RunState::Paused(why) = run {
            self.notify(domain, &state::suspended(why));
        }
        self.monitor(domain, name, pid, Some(child), client)
    }

    /// Takes a transient domain off the list, unless it was defined or started meanwhile.
    pub(super) fn drop_transient(&self, domain: &Managed) {
        self.with_membership(|| {
            let mut state = domain.lock();
            // A revert starts it again in a moment.
            let is_kept = state.definition.is_some() || state.live.is_some();
            let reverts = state
                .job
                .as_ref()
                .is_some_and(|job| job.kind == JobKind::Revert);
            if is_kept || reverts || state.is_gone {
                return;
            }
            state.is_gone = true;
            if let Err(error) = state.snapshots.forget_all() {
                log::warn!("domain {}: {error}", state.name);
            }
            drop(state);
            self.registry.remove(domain.uuid);
            super::outbox::discard(&self.paths, domain.uuid);
        });
    }

    /// Ends a running machine, for a reason that clients will be told.
    pub(super) fn stop(&self, domain: &Managed, why: Shutoff) -> Result<(), RpcError> {
        let (name, id, pid) = {
            let mut state = domain.lock();
            let name = state.name.clone();
            let Some(live) = &mut state.live else {
                return Err(super::managed::not_running());
            };
            live.stop_cause = Some(why);
            (name, live.id, live.pid)
        };
        let process = Process::new(pid, None);
        if let Err(error) = worker::run(&self.paths, &name, Method::Destroy) {
            // It may have ended by itself, or be past answering.
            log::info!("domain {name}: {error}");
        }
        let is_over = |state: &State| state.live.as_ref().is_none_or(|live| live.id != id);
        if domain.wait_until(DESTROY_TIMEOUT, is_over) {
            return Ok(());
        }
        log::warn!("domain {name} does not end: its process is killed");
        process.kill();
        if domain.wait_until(DESTROY_TIMEOUT, is_over) {
            return Ok(());
        }
        Err(RpcError::new(
            Code::OperationTimeout,
            format!("process {pid} of the domain does not end"),
        ))
    }

    /// Pauses a running machine.
    pub(super) fn pause(&self, domain: &Managed, why: Paused) -> Result<(), RpcError> {
        let name = {
            let mut state = domain.lock();
            let name = state.name.clone();
            state.active()?;
            if let Some(live) = &mut state.live {
                live.next_pause = Some(why);
            }
            name
        };
        worker::run(&self.paths, &name, Method::Pause)?;
        domain.wait_until(STATE_TIMEOUT, |state| {
            state.live.as_ref().is_none_or(|live| live.run.is_paused())
        });
        Ok(())
    }

    /// Lets a paused machine run on.
    pub(super) fn resume(&self, domain: &Managed, why: Running) -> Result<(), RpcError> {
        let name = {
            let mut state = domain.lock();
            let name = state.name.clone();
            state.active()?;
            if let Some(live) = &mut state.live {
                live.next_resume = Some(why);
            }
            name
        };
        worker::run(&self.paths, &name, Method::Resume)?;
        domain.wait_until(STATE_TIMEOUT, |state| {
            state.live.as_ref().is_none_or(|live| !live.run.is_paused())
        });
        Ok(())
    }

    /// Ends what a client wanted to end with it.
    pub(super) fn client_left(&self, client: u64) {
        for domain in self.registry.all() {
            let is_owned = domain
                .lock()
                .live
                .as_ref()
                .is_some_and(|live| live.owner == Some(client));
            if is_owned && let Err(error) = self.stop(&domain, Shutoff::Destroyed) {
                log::warn!("a domain that was to end with its client: {error}");
            }
        }
    }

    /// Starts what is to start with the host: once, so that a daemon that is started again leaves off
    /// what has been shut down since.
    pub(super) fn autostart(self: &Arc<Self>) {
        let started = self.paths.autostarted();
        if started.exists() {
            return;
        }
        self.autostart_all();
        if let Err(error) = write_whole(&started, b"") {
            log::warn!("{error}");
        }
    }

    fn autostart_all(self: &Arc<Self>) {
        for domain in self.registry.all() {
            let wanted = {
                let state = domain.lock();
                state.autostart && state.live.is_none()
            };
            if !wanted {
                continue;
            }
            let started = domain
                .begin(JobKind::Start)
                .and_then(|_job| super::driver::start_defined(self, &domain, false, None));
            if let Err(error) = started {
                log::error!("domain {} did not start: {error}", domain.lock().name);
            }
        }
    }

    /// Returns whether anything runs or is being done.
    pub(super) fn is_idle(&self) -> bool {
        let is_idle = |domain: &Arc<Managed>| {
            let state = domain.lock();
            state.live.is_none() && state.job.is_none()
        };
        self.clients.count() == 0 && self.registry.all().iter().all(is_idle)
    }

    pub(super) fn managed_save_file(&self, uuid: Uuid) -> Option<std::path::PathBuf> {
        let file = self.paths.managed_save(uuid);
        Path::new(&file).exists().then_some(file)
    }
}
