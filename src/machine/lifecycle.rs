//! The states of a machine, and who is told of their changes.

use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What a machine is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineState {
    /// Built, and never started.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its user has paused it.
    Paused,
    /// It has ended.
    Shutoff {
        /// Why.
        reason: ShutoffReason,
    },
    /// It has stopped for good, and is kept to be looked at.
    Crashed {
        /// Why.
        reason: String,
    },
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Created => f.write_str("not started"),
            Self::Running => f.write_str("running"),
            Self::Paused => f.write_str("paused"),
            Self::Shutoff { reason } => write!(f, "shut off: {reason}"),
            Self::Crashed { reason } => write!(f, "crashed: {reason}"),
        }
    }
}

impl MachineState {
    /// Returns whether the machine's vCPUs run no more.
    pub fn has_ended(&self) -> bool {
        matches!(self, Self::Shutoff { .. } | Self::Crashed { .. })
    }
}

/// Why a machine has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ShutoffReason {
    /// The guest powered off.
    PoweredOff,
    /// The guest reset itself, and the machine ends on that.
    Reset,
    /// The user ended it.
    Destroyed,
    /// The guest crashed.
    Crashed(String),
    /// The machine itself could not go on.
    Failed(String),
}

impl fmt::Display for ShutoffReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Reset => f.write_str("the guest reset itself"),
            Self::Destroyed => f.write_str("destroyed"),
            Self::Crashed(why) => write!(f, "the guest crashed: {why}"),
            Self::Failed(why) => write!(f, "the machine failed: {why}"),
        }
    }
}

/// What changes a state, and what listeners are told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// vCPUs were started.
    Started,
    /// The machine was started, but its vCPUs wait for a resume.
    StartedPaused,
    /// The user paused it.
    Paused,
    /// The user resumed it.
    Resumed,
    /// It starts over.
    Reset,
    /// It was put back to a saved state.
    Rewound,
    /// It has ended.
    Shutoff(ShutoffReason),
    /// It has stopped for good, and is kept.
    Crashed(String),
}

/// A change that the state does not allow.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the machine is {state}")]
pub struct WrongState {
    /// The state that it is in.
    pub state: MachineState,
}

/// Returns the state after `event`, or an error where it cannot happen in `state`.
fn transition(state: &MachineState, event: &MachineEvent) -> Result<MachineState, WrongState> {
    use MachineEvent as Event;
    use MachineState as State;
    Ok(match (state, event) {
        (State::Created, Event::Started) | (State::Paused, Event::Resumed) => State::Running,
        (State::Created, Event::StartedPaused) | (State::Running, Event::Paused) => State::Paused,
        (State::Running | State::Paused, Event::Reset | Event::Rewound) => state.clone(),
        (State::Created | State::Running | State::Paused, Event::Crashed(reason)) => {
            State::Crashed {
                reason: reason.clone(),
            }
        }
        // A machine that crashed and was kept is destroyed in the end.
        (
            State::Created | State::Running | State::Paused | State::Crashed { .. },
            Event::Shutoff(reason),
        ) => State::Shutoff {
            reason: reason.clone(),
        },
        _ => {
            return Err(WrongState {
                state: state.clone(),
            });
        }
    })
}

/// The state of one machine.
pub(super) struct Lifecycle {
    state: Mutex<MachineState>,
    changed: Condvar,
    listeners: Mutex<Vec<EventListener>>,
}

/// Told of every event, in their order; returns whether it wants to hear more. Must not block, and
/// must not change the machine's state.
pub type EventListener = Box<dyn Fn(&MachineEvent) -> bool + Send>;

impl fmt::Debug for Lifecycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lifecycle")
            .field("state", &self.state)
            .finish_non_exhaustive()
    }
}

impl Lifecycle {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(MachineState::Created),
            changed: Condvar::new(),
            listeners: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, MachineState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn state(&self) -> MachineState {
        self.lock().clone()
    }

    /// Fails where `event` cannot happen now; changes nothing.
    pub(super) fn check(&self, event: &MachineEvent) -> Result<(), WrongState> {
        transition(&self.lock(), event).map(|_| ())
    }

    /// Changes the state and tells the listeners.
    pub(super) fn apply(&self, event: &MachineEvent) -> Result<(), WrongState> {
        // Held over the change, so that all hear of two changes in the order in which they came.
        let mut listeners = self.lock_listeners();
        {
            let mut state = self.lock();
            *state = transition(&state, event)?;
            self.changed.notify_all();
        }
        listeners.retain(|listener| listener(event));
        Ok(())
    }

    /// Adds a listener for what comes from now on.
    pub(super) fn listen(&self, listener: EventListener) {
        self.lock_listeners().push(listener);
    }

    fn lock_listeners(&self) -> MutexGuard<'_, Vec<EventListener>> {
        self.listeners
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the machine has ended, or `timeout` has passed; returns the state then.
    pub(super) fn wait_for_end(&self, timeout: Option<Duration>) -> MachineState {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut state = self.lock();
        while !state.has_ended() {
            let Some(deadline) = deadline else {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            state = self
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        state.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ended_machine_changes_no_more() {
        let lifecycle = Lifecycle::new();
        let (tell, events) = std::sync::mpsc::channel();
        lifecycle.listen(Box::new(move |event| tell.send(event.clone()).is_ok()));
        lifecycle.apply(&MachineEvent::Started).unwrap();
        assert!(lifecycle.apply(&MachineEvent::Resumed).is_err());
        lifecycle
            .apply(&MachineEvent::Crashed("why".to_owned()))
            .unwrap();
        assert!(lifecycle.apply(&MachineEvent::Reset).is_err());
        lifecycle
            .apply(&MachineEvent::Shutoff(ShutoffReason::Destroyed))
            .unwrap();
        for event in [
            MachineEvent::Started,
            MachineEvent::Paused,
            MachineEvent::Shutoff(ShutoffReason::Destroyed),
        ] {
            assert!(lifecycle.apply(&event).is_err());
        }
        assert_eq!(events.try_iter().count(), 3);
        assert_eq!(
            lifecycle.wait_for_end(None),
            MachineState::Shutoff {
                reason: ShutoffReason::Destroyed
            }
        );
    }

    #[test]
    fn a_wait_ends_at_its_timeout() {
        let lifecycle = Lifecycle::new();
        let state = lifecycle.wait_for_end(Some(Duration::from_millis(5)));
        assert_eq!(state, MachineState::Created);
    }
}
