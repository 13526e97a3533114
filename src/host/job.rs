//! Jobs: checkpoints of a domain, by number.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use crate::checkpoint;
use crate::host::{CheckpointSummary, ErrorCode, HostError, JobProgress};

/// A checkpoint of a domain, under way or done. Every method may be called from any thread.
#[derive(Clone, Debug)]
pub struct Job {
    id: u64,
    inner: checkpoint::Job,
}

impl Job {
    pub(super) fn new(id: u64, inner: checkpoint::Job) -> Self {
        Self { id, inner }
    }

    /// Returns the job's number within its domain, from 1.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Returns whether the job has ended.
    pub fn is_done(&self) -> bool {
        self.inner.is_finished()
    }

    /// Returns how far it is. Does not block.
    pub fn progress(&self) -> JobProgress {
        self.inner.progress().into()
    }

    /// Asks it to end without an image. Does not block; the job ends within 100 ms. One that has
    /// ended, or whose image is whole, stays as it is.
    pub fn cancel(&self) {
        self.inner.cancel();
    }

    /// Waits for the end and returns what came of it; every caller gets it.
    pub fn wait(&self) -> Result<CheckpointSummary, HostError> {
        Ok(self.inner.wait()?.into())
    }

    /// Has `listener` told when the job has ended, and why there is no image if there is none; at
    /// once where it has. It must neither block nor wait for the job.
    pub(super) fn when_ended(
        &self,
        listener: impl FnOnce(Option<(ErrorCode, String)>) + Send + 'static,
    ) {
        self.inner.when_ended(|error| {
            let failure = error.map(HostError::from);
            listener(failure.map(|error| (error.code(), error.full_message())));
        });
    }

    /// Waits for the end, but no longer than `timeout`; `None` where it has not come by then.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Result<CheckpointSummary, HostError>> {
        let result = self.inner.wait_timeout(timeout)?;
        Some(result.map(CheckpointSummary::from).map_err(HostError::from))
    }
}

impl AsFd for Job {
    /// Returns a descriptor that becomes readable when the job has ended; do not read from it.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inner.as_fd()
    }
}
