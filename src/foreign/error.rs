//! What can go wrong with a VM that another VMM runs.

use std::io;

use crate::kvmstate::KvmStateError;
use crate::state::StateError;

/// A call about somebody else's VM that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ForeignError {
    /// An argument is malformed; says which and how.
    #[error("{0}")]
    Invalid(String),
    /// /dev/kvm, the VM or a vCPU refused.
    #[error("could not {what}")]
    Kvm {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// A checkpoint of this guest runs, and its memory cannot change meanwhile.
    #[error("a checkpoint of this guest runs: {what} must wait for its end")]
    Busy {
        /// What must wait.
        what: &'static str,
    },
    /// Somebody else uses what the engine needs for itself.
    #[error("memory slot {slot} has {what}, which a checkpoint needs for itself")]
    InUse {
        /// The slot.
        slot: u32,
        /// What is used.
        what: &'static str,
    },
    /// The vCPU's thread has not entered, or has left.
    #[error("no thread has entered as vCPU {vcpu}")]
    NotEntered {
        /// Number of the vCPU.
        vcpu: usize,
    },
    /// Another thread runs this vCPU.
    #[error("vCPU {vcpu} belongs to another thread")]
    OtherThread {
        /// Number of the vCPU.
        vcpu: usize,
    },
    /// State could not be saved or set.
    #[error(transparent)]
    State(#[from] KvmStateError),
}

impl From<StateError> for ForeignError {
    fn from(error: StateError) -> Self {
        Self::State(error.into())
    }
}

impl ForeignError {
    pub(super) fn kvm(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }
}
