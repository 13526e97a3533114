//! Why a checkpoint failed, or could not start.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use crate::checkpoint::stats::{Statistics, micros};
use crate::guest::GuestError;
use crate::store::StoreError;

/// A checkpoint that failed. The guest runs on in every case, with dirty logging off, and nothing
/// of the image is left; an older image at the same path is untouched.
///
/// Sources are shared, so that everybody who holds the job can have the error.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The caller cancelled it.
    #[error("the checkpoint was cancelled")]
    Cancelled,
    /// Another checkpoint of the same guest has its dirty log.
    #[error("another checkpoint of this guest is running")]
    Busy,
    /// The options contradict one another or are out of bounds.
    #[error("{option} is {value}; it must be {wanted}")]
    InvalidOption {
        /// Name of the option.
        option: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        wanted: &'static str,
    },
    /// The guest could not do its part.
    #[error("could not {action}")]
    Guest {
        /// What the guest was asked for.
        action: &'static str,
        /// Why it could not.
        #[source]
        source: Arc<GuestError>,
    },
    /// The dirty log failed.
    #[error("could not {action} the dirty log")]
    DirtyLog {
        /// What was being done to it.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: Arc<io::Error>,
    },
    /// The image could not be written.
    #[error("could not {action} the image")]
    Store {
        /// What was being done to it.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: Arc<StoreError>,
    },
    /// A disk of the guest could not be read. The guest's own writes are not affected.
    #[error("could not copy disk {disk}")]
    Disk {
        /// Its name.
        disk: String,
        /// Why it could not be read.
        #[source]
        source: Arc<io::Error>,
    },
    /// The host refused memory, a thread or a descriptor.
    #[error("could not get {what}")]
    Resource {
        /// What was asked for.
        what: String,
        /// Why it was refused.
        #[source]
        source: Arc<io::Error>,
    },
    /// The watchdog resumed the guest, because the pause made no progress.
    #[error("the guest was resumed: nothing moved for {limit_ms} ms of its pause, while {waiting}")]
    PauseExpired {
        /// How long the watchdog waits for a sign of life.
        limit_ms: u64,
        /// What the engine was doing.
        waiting: &'static str,
    },
    /// Guest memory could not be write-protected.
    #[error("could not write-protect the guest's memory")]
    Protection {
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
    /// The watchdog resumed the guest, because the downtime that was allowed was about to end.
    #[error(
        "the guest was resumed after {limit_ms} ms, before its downtime became too long, while {waiting}"
    )]
    DowntimeExceeded {
        /// When it was resumed.
        limit_ms: u64,
        /// What the engine was doing.
        waiting: &'static str,
    },
    /// A promise that was asked for cannot be made; nothing was begun.
    #[error("{promise} of {wanted_ms} ms cannot be promised: {needed_ms} ms are expected")]
    Refused {
        /// Name of the option.
        promise: &'static str,
        /// What it was.
        wanted_ms: u64,
        /// What would be needed.
        needed_ms: u64,
    },
    /// The rounds did not get the rest below the downtime that was allowed. The guest was not
    /// paused.
    #[error(
        "did not converge: after {rounds} rounds the guest dirties {dirty_pages_per_s} pages a \
         second, and copying the rest would take longer than {limit_ms} ms"
    )]
    NotConverged {
        /// The downtime that was allowed.
        limit_ms: u64,
        /// Rounds that were made.
        rounds: u64,
        /// How fast the guest dirtied pages in the last round.
        dirty_pages_per_s: u64,
    },
    /// The watch let all writers go, because one of them waited too long.
    #[error(
        "the guest was let go: it waited for {limit_ms} ms to write memory that was not captured yet"
    )]
    StallExpired {
        /// How long one may wait.
        limit_ms: u64,
    },
    /// A bug in the engine, or in the guest or storage that it was given.
    #[error("thread {thread} panicked: {message}")]
    Panicked {
        /// Name of the thread.
        thread: String,
        /// What the panic said.
        message: String,
    },
}

impl CheckpointError {
    /// Returns whether the caller asked for this end.
    pub fn is_cancelled(&self) -> bool {
        matches!(self, Self::Cancelled)
    }

    /// The rounds of `statistics` did not bring a downtime of `limit` about.
    pub(crate) fn not_converged(limit: Duration, statistics: &Statistics) -> Self {
        let last = statistics.rounds.last();
        Self::NotConverged {
            limit_ms: micros(limit) / 1000,
            rounds: statistics.round_count,
            dirty_pages_per_s: last.map_or(0, |round| round.dirty_pages_per_s),
        }
    }

    pub(crate) fn guest(action: &'static str) -> impl FnOnce(GuestError) -> Self {
        move |source| Self::Guest {
            action,
            source: Arc::new(source),
        }
    }

    pub(crate) fn dirty_log(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::DirtyLog {
            action,
            source: Arc::new(source),
        }
    }

    pub(crate) fn store(action: &'static str) -> impl FnOnce(StoreError) -> Self {
        move |source| Self::Store {
            action,
            source: Arc::new(source),
        }
    }

    pub(crate) fn resource(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Resource {
            what: what.into(),
            source: Arc::new(source),
        }
    }
}

/// Why a part of the engine ends before its work is done.
#[derive(Debug)]
pub(crate) enum Halt {
    /// Somebody else failed or cancelled; the reason is in `Control`.
    Stopped,
    /// This part failed.
    Failed(CheckpointError),
}

impl From<CheckpointError> for Halt {
    fn from(error: CheckpointError) -> Self {
        Self::Failed(error)
    }
}
