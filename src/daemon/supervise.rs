//! Watching workers: what their machines do, and how they end.

use std::process::Child;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::livepoint::Livepoint;
use super::managed::Managed;
use super::state::{self, Paused, RunState, Running, Shutoff};
use super::worker::{self, Boot, Process, Record};
use crate::host::control::ControlClient;
use crate::host::{DomainEvent, Ending, FinalState, MachineState};
use crate::rpc::{Code, Event, RpcError};

/// How long a worker that has said its last may take to end.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

impl Livepoint {
    /// Watches a worker in a thread of its own until it ends.
    pub(super) fn monitor(
        self: &Arc<Self>,
        domain: &Arc<Managed>,
        name: &str,
        pid: u32,
        child: Option<Child>,
        client: Option<ControlClient>,
    ) -> Result<(), RpcError> {
        let (driver, of_thread, name) = (self.clone(), domain.clone(), name.to_owned());
        let spawned = thread::Builder::new()
            .name("lvp-monitor".to_owned())
            .spawn(move || {
                let mut process = Process::new(pid, child);
                let mut client = client;
                loop {
                    let told = driver.follow(&of_thread, &name, client.take(), &mut process);
                    driver.see_off(&mut process);
                    worker::remove_socket(&driver.paths, &name);
                    match driver.boot_again(&of_thread, told.as_ref()) {
                        Some((next, connected)) => {
                            process = next;
                            client = connected;
                        }
                        None => return driver.ended(&of_thread, told),
                    }
                }
            });
        spawned.map(drop).map_err(|error| {
            RpcError::new(
                Code::SystemError,
                format!("no thread for the domain: {error}"),
            )
        })
    }

    /// Hears of what happens to a machine until it ends; returns how, if it was told.
    fn follow(
        &self,
        domain: &Managed,
        name: &str,
        mut client: Option<ControlClient>,
        process: &mut Process,
    ) -> Option<FinalState> {
        loop {
            if let Some(mut connected) = client.take() {
                let mut told = None;
                let heard = connected.set_timeout(None).and_then(|()| {
                    connected.events(|event| match event {
                        DomainEvent::Ended(state) => told = Some(state),
                        other => self.happened(domain, &other),
                    })
                });
                if told.is_some() {
                    return told;
                }
                log::debug!("domain {name}: {heard:?}");
            }
            if process.wait(Duration::from_millis(100)) {
                return None;
            }
            client = ControlClient::connect(&self.paths.runtime, name).ok();
        }
    }

    /// Notes a change of a running machine.
    fn happened(&self, domain: &Managed, event: &DomainEvent) {
        let tell = {
            let mut state = domain.lock();
            let Some(live) = &mut state.live else {
                return;
            };
            let paused = match event {
                DomainEvent::Now { state } => *state == MachineState::Paused,
                DomainEvent::Paused | DomainEvent::StartedPaused => true,
                DomainEvent::Resumed | DomainEvent::Started => false,
                DomainEvent::Reset => {
                    return drop_then(state, || self.notify(domain, &Event::Reboot));
                }
                _ => return,
            };
            if paused == live.run.is_paused() {
                return;
            }
            if paused {
                let why = live.next_pause.take().unwrap_or(Paused::User);
                live.run = RunState::Paused(why);
                state::suspended(why)
            } else {
                let why = live.next_resume.take().unwrap_or(Running::Unpaused);
                live.run = RunState::Running(why);
                state::resumed(why)
            }
        };
        domain.notify();
        self.notify(domain, &tell);
    }

    /// Waits for the process of a machine that has ended.
    fn see_off(&self, process: &mut Process) {
        if !process.wait(EXIT_TIMEOUT) {
            log::warn!("a worker that had ended its machine did not end: killed");
            process.kill();
            process.wait(EXIT_TIMEOUT);
        }
    }

    /// Starts a machine again that powered off since its user wanted it to reboot.
    fn boot_again(
        &self,
        domain: &Managed,
        told: Option<&FinalState>,
    ) -> Option<(Process, Option<ControlClient>)> {
        let (config, id) = {
            let mut state = domain.lock();
            let live = state.live.as_mut()?;
            let wanted = std::mem::take(&mut live.reboots) && live.stop_cause.is_none();
            if !wanted || told.is_none_or(|told| told.ending != Ending::PoweredOff) {
                return None;
            }
            (live.config.clone(), live.id)
        };
        let record = Record {
            id,
            why: Running::Booted,
        };
        let boot = Boot::Fresh(&config);
        let name = config.name.as_str();
        let started = self
            .launcher
            .start(domain.uuid, name, &record, &boot, false);
        match started {
            Ok((child, client)) => {
                let pid = child.id();
                if let Some(live) = &mut domain.lock().live {
                    live.pid = pid;
                    live.run = RunState::Running(Running::Booted);
                }
                self.notify(domain, &Event::Reboot);
                Some((Process::new(pid, Some(child)), client))
            }
            Err(error) => {
                log::error!("domain {name} did not reboot: {error}");
                None
            }
        }
    }

    /// Notes that a machine has ended.
    fn ended(&self, domain: &Managed, told: Option<FinalState>) {
        let told = told.or_else(|| worker::read_final_state(&self.paths, domain.uuid));
        worker::forget(&self.paths, domain.uuid);
        let reference = domain.reference();
        let mut events = Vec::new();
        let is_transient = {
            let mut state = domain.lock();
            let cause = state.live.take().and_then(|live| live.stop_cause);
            let (why, tell) = reason_of_end(told.as_ref(), cause);
            state.shutoff = why;
            match told.map(|told| told.ending) {
                Some(Ending::PoweredOff) => events.push(state::SHUTDOWN_GUEST),
                Some(Ending::Crashed) => events.push(state::CRASHED_PANICKED),
                _ => {}
            }
            events.push(state::stopped(tell));
            state.definition.is_none()
        };
        for event in &events {
            self.clients.notify(&reference, event);
        }
        if is_transient {
            self.drop_transient(domain);
        }
        domain.notify();
    }
}

fn drop_then<T>(held: T, then: impl FnOnce()) {
    drop(held);
    then();
}

/// Returns why a domain does not run, for its state and for the event.
pub(super) fn reason_of_end(
    told: Option<&FinalState>,
    cause: Option<Shutoff>,
) -> (Shutoff, Shutoff) {
    let Some(told) = told else {
        // As libvirt has it for a QEMU that is gone without a word.
        let why = cause.unwrap_or(Shutoff::Crashed);
        let tell = cause.unwrap_or(Shutoff::Failed);
        return (why, tell);
    };
    let why = match told.ending {
        Ending::Destroyed => cause.unwrap_or(Shutoff::Destroyed),
        Ending::PoweredOff | Ending::Reset => Shutoff::Shutdown,
        Ending::Crashed => Shutoff::Crashed,
        _ => Shutoff::Failed,
    };
    (why, why)
}
