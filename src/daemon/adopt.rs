//! Finding workers that an earlier daemon, or `livepoint run`, has started.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use super::error::{failed, refused};
use super::livepoint::Livepoint;
use super::managed::{Live, Managed};
use super::snapshots::Snapshots;
use super::state::{Paused, RunState, Running, Shutoff};
use super::supervise::reason_of_end;
use super::worker;
use crate::host::control::ControlClient;
use crate::host::control::protocol::{Method, Status};
use crate::host::{DomainConfig, MachineState};
use crate::rpc::RpcError;

/// How often the runtime directory is searched for workers that somebody else started.
const SEARCH_INTERVAL: Duration = Duration::from_millis(500);

impl Livepoint {
    /// Looks for workers that somebody else starts, for as long as the process runs.
    pub(super) fn watch_workers(self: &Arc<Self>) -> std::io::Result<()> {
        let driver = self.clone();
        thread::Builder::new()
            .name("lvp-search".to_owned())
            .spawn(move || {
                loop {
                    thread::sleep(SEARCH_INTERVAL);
                    driver.find_workers();
                }
            })?;
        Ok(())
    }

    /// Takes in every worker that runs and is not known.
    pub(super) fn find_workers(self: &Arc<Self>) {
        let sockets = match self.paths.runtime.sockets() {
            Ok(sockets) => sockets,
            Err(error) => return log::warn!("{}", error.full_message()),
        };
        for (name, socket) in sockets {
            let known = self.registry.by_name(&name);
            let is_busy = |domain: &Arc<Managed>| {
                let state = domain.lock();
                state.live.is_some() || state.job.is_some()
            };
            if known.as_ref().is_some_and(is_busy) {
                continue;
            }
            let adopted = ControlClient::connect_to(&socket)
                .map_err(|error| failed(&error))
                .and_then(|client| self.adopt(client));
            if let Err(error) = adopted {
                log::debug!("{}: {error}", socket.display());
                // Of one that ended while no daemon was there; a confined one leaves its socket.
                worker::remove_socket(&self.paths, &name);
            }
        }
    }

    /// Takes in a worker that somebody else started.
    fn adopt(self: &Arc<Self>, mut client: ControlClient) -> Result<(), RpcError> {
        let call_failed = |error| failed(&error);
        client
            .set_timeout(Some(Duration::from_secs(5)))
            .map_err(call_failed)?;
        let status: Status = client.status().map_err(call_failed)?;
        if !matches!(status.state, MachineState::Running | MachineState::Paused) {
            return Ok(());
        }
        let xml: String = client.call(Method::DumpXml).map_err(call_failed)?;
        let config = DomainConfig::parse(&xml).map_err(|error| refused(&error))?;
        let domain = self.with_membership(|| {
            self.registry.by_uuid(status.uuid).unwrap_or_else(|| {
                let snapshots = Snapshots::load(&self.paths, status.uuid);
                let domain = Arc::new(Managed::new(status.uuid, &status.name, snapshots));
                self.registry.insert(domain.clone());
                domain
            })
        });
        let record = worker::read_record(&self.paths, status.uuid);
        let why = record.map_or(Running::Unknown, |record| record.why);
        let id = status.id.unwrap_or(status.pid);
        self.last_id.fetch_max(id, Ordering::AcqRel);
        {
            let mut state = domain.lock();
            if state.live.is_some() || state.job.is_some() {
                return Ok(());
            }
            state.live = Some(Live {
                id,
                pid: status.pid,
                config: Arc::new(config),
                run: match status.state {
                    MachineState::Paused => RunState::Paused(Paused::User),
                    _ => RunState::Running(why),
                },
                next_pause: None,
                next_resume: None,
                reboots: false,
                stop_cause: None,
                has_dirty_rate: status.dirty_rate.is_some(),
                owner: None,
            });
        }
        log::info!("domain {} runs in process {}", status.name, status.pid);
        self.monitor(&domain, &status.name, status.pid, None, Some(client))
    }

    /// Notes which machines have ended while no daemon was there.
    pub(super) fn note_what_ended(&self) {
        for domain in self.registry.all() {
            let mut state = domain.lock();
            if state.live.is_some() {
                continue;
            }
            if let Some(told) = worker::read_final_state(&self.paths, domain.uuid) {
                state.shutoff = reason_of_end(Some(&told), None).0;
            } else if worker::read_record(&self.paths, domain.uuid).is_some() {
                // Its worker may only just have been started: the search finds it then.
                state.shutoff = Shutoff::Unknown;
            }
        }
    }
}
