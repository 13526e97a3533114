//! A domain as the daemon knows it: what is defined, what runs, and what is being done to it.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::job::{Completed, Job, JobKind};
use super::snapshots::Snapshots;
use super::state::{Paused, RunState, Running, Shutoff};
use crate::host::DomainConfig;
use crate::rpc::{Code, DomainRef, RpcError};

/// How long a change waits for the one before it to end; libvirt's own limit.
const JOB_WAIT: Duration = Duration::from_secs(30);

/// A domain. Its lock is held for moments only, never while anything is waited for.
#[derive(Debug)]
pub(super) struct Managed {
    pub(super) uuid: Uuid,
    state: Mutex<State>,
    changed: Condvar,
}

/// All that is known of a domain.
#[derive(Debug)]
pub(super) struct State {
    /// Its name.
    pub(super) name: String,
    /// Its definition; none for a transient domain.
    pub(super) definition: Option<Arc<DomainConfig>>,
    /// Its machine, if it runs.
    pub(super) live: Option<Live>,
    /// Why it does not run.
    pub(super) shutoff: Shutoff,
    /// Whether it starts with the daemon.
    pub(super) autostart: bool,
    /// What is being done to it.
    pub(super) job: Option<Arc<Job>>,
    /// The figures of the last job, until somebody reads them.
    pub(super) completed: Option<Completed>,
    /// Its snapshots.
    pub(super) snapshots: Snapshots,
    /// Promises that its checkpoints are to keep.
    pub(super) limits: Limits,
    /// Whether it has been taken out of the list.
    pub(super) is_gone: bool,
}

/// What was set by migrate-setmaxdowntime and migrate-setspeed, for checkpoints.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Limits {
    pub(super) max_downtime_ms: Option<u64>,
    pub(super) max_speed_mib: Option<u64>,
}

/// A running machine.
#[derive(Clone, Debug)]
pub(super) struct Live {
    /// Its number among those that run.
    pub(super) id: u32,
    /// The worker.
    pub(super) pid: u32,
    /// What it was started with.
    pub(super) config: Arc<DomainConfig>,
    /// What it is doing.
    pub(super) run: RunState,
    /// Why it will pause or go on next, where a call asks for that.
    pub(super) next_pause: Option<Paused>,
    pub(super) next_resume: Option<Running>,
    /// Whether it is to start again once the guest powers off.
    pub(super) reboots: bool,
    /// Why it will end, where a call asks for that.
    pub(super) stop_cause: Option<Shutoff>,
    /// Whether its worker was ever asked for its dirty rate.
    pub(super) has_dirty_rate: bool,
    /// The client that it ends with (`VIR_DOMAIN_START_AUTODESTROY`).
    pub(super) owner: Option<u64>,
}

impl State {
    /// Returns the configuration that is in force: the running machine's, else the definition.
    pub(super) fn current(&self) -> Option<&Arc<DomainConfig>> {
        let live = self.live.as_ref().map(|live| &live.config);
        live.or(self.definition.as_ref())
    }

    /// Returns the running machine, or the error of calls that need one.
    pub(super) fn active(&self) -> Result<&Live, RpcError> {
        self.live.as_ref().ok_or_else(not_running)
    }

    /// Returns the state and its reason as clients know them.
    pub(super) fn run_state(&self) -> RunState {
        let live = self.live.as_ref().map(|live| live.run);
        live.unwrap_or(RunState::Shutoff(self.shutoff))
    }
}

/// The error of calls that need a running domain, in libvirt's words.
pub(super) fn not_running() -> RpcError {
    RpcError::new(Code::OperationInvalid, "domain is not running")
}

impl Managed {
    pub(super) fn new(uuid: Uuid, name: &str, snapshots: Snapshots) -> Self {
        Self {
            uuid,
            state: Mutex::new(State {
                name: name.to_owned(),
                definition: None,
                live: None,
                shutoff: Shutoff::Unknown,
                autostart: false,
                job: None,
                completed: None,
                snapshots,
                limits: Limits::default(),
                is_gone: false,
            }),
            changed: Condvar::new(),
        }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // Every change leaves the state whole before anything can panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells those who wait that the state has changed.
    pub(super) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Returns the domain as answers name it.
    pub(super) fn reference(&self) -> DomainRef {
        self.reference_in(&self.lock())
    }

    pub(super) fn reference_in(&self, state: &State) -> DomainRef {
        let id = state.live.as_ref().map(|live| live.id);
        DomainRef {
            name: state.name.clone(),
            uuid: self.uuid,
            id: id.and_then(|id| i32::try_from(id).ok()).unwrap_or(-1),
        }
    }

    /// Waits until `done`, but no longer than `timeout`; tells whether it came.
    pub(super) fn wait_until(
        &self,
        timeout: Duration,
        mut done: impl FnMut(&State) -> bool,
    ) -> bool {
        let state = self.lock();
        let (state, _) = self
            .changed
            .wait_timeout_while(state, timeout, |state| !done(state))
            .unwrap_or_else(PoisonError::into_inner);
        done(&state)
    }

    /// Begins to change the domain, once nobody else does; the change ends with what is returned.
    pub(super) fn begin(self: &Arc<Self>, kind: JobKind) -> Result<JobGuard, RpcError> {
        let deadline = Instant::now() + JOB_WAIT;
        let mut state = self.lock();
        while let Some(job) = &state.job {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let held = job.kind.name();
                return Err(RpcError::new(
                    Code::OperationTimeout,
                    format!("cannot acquire state change lock (held by {held})"),
                ));
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        if state.is_gone {
            return Err(no_domain(&state.name, self.uuid));
        }
        let job = Arc::new(Job::new(kind));
        state.job = Some(job.clone());
        Ok(JobGuard {
            domain: self.clone(),
            job,
        })
    }
}

/// The error for a domain that does not exist.
pub(super) fn no_domain(name: &str, uuid: Uuid) -> RpcError {
    RpcError::new(
        Code::NoDomain,
        format!("no domain with matching uuid '{uuid}' ({name})"),
    )
}

/// A change of a domain that is under way.
#[derive(Debug)]
pub(super) struct JobGuard {
    domain: Arc<Managed>,
    pub(super) job: Arc<Job>,
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        self.domain.lock().job = None;
        self.domain.notify();
    }
}
