//! Checkpoints and restores of VMs that another VMM runs.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::checkpoint::{self, Workspace};
use crate::foreign::{ForeignGuest, SavedState};
use crate::host::image::default_threads;
use crate::host::{CheckpointRequest, HostError, Image, Job};
use crate::restore::eager::{self, FillError};
use crate::store::FileStorage;

/// Most threads that read an image: beyond it memory and disk are the limit.
const FILL_THREADS_MAX: usize = 8;

/// A VM that another VMM runs, with its checkpoints. Every method may be called from any thread.
#[derive(Debug)]
pub struct ForeignVm {
    guest: ForeignGuest,
    // Buffers that one checkpoint leaves for the next.
    workspace: Workspace,
    last: Mutex<Option<Job>>,
}

impl ForeignVm {
    /// Wraps a registered guest.
    pub fn new(guest: ForeignGuest) -> Self {
        Self {
            guest,
            workspace: Workspace::default(),
            last: Mutex::default(),
        }
    }

    /// Returns the guest.
    pub fn guest(&self) -> &ForeignGuest {
        &self.guest
    }

    /// Starts a checkpoint into an image at `out`; the guest runs on. One at a time.
    pub fn start_checkpoint(
        &self,
        out: &Path,
        request: &CheckpointRequest,
    ) -> Result<Job, HostError> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(job) = last.as_ref().filter(|job| !job.is_done()) {
            return Err(HostError::JobRunning { job: job.id() });
        }
        let options = request.engine_options(self.workspace.clone());
        let started = self.guest.with_view(|guest| {
            let started = checkpoint::start(guest, Arc::new(FileStorage), out, options);
            started.map_err(HostError::from)
        })?;
        let id = last.as_ref().map_or(1, |job| job.id() + 1);
        let job = Job::new(id, started);
        *last = Some(job.clone());
        Ok(job)
    }

    /// Fills the guest's registered memory from an image. No vCPU runs meanwhile.
    ///
    /// `is_fresh` promises that all of it is zeros still, so that zeros need not be written.
    pub fn fill(
        &self,
        image: &Image,
        threads: Option<usize>,
        is_fresh: bool,
    ) -> Result<(), HostError> {
        let options = eager::FillOptions {
            threads: threads.unwrap_or_else(|| default_threads(FILL_THREADS_MAX)),
            memory_is_fresh: is_fresh,
        };
        match eager::fill(image.reader(), &self.guest.regions(), &options) {
            Ok(_) => Ok(()),
            // Not the image is wrong here, but what the caller registered.
            Err(error @ FillError::Layout { .. }) => Err(HostError::Invalid(error.to_string())),
            Err(error) => Err(error.into()),
        }
    }

    /// Ends a checkpoint that runs, and waits until nothing here touches the guest any more.
    pub fn close(&self) {
        let last = self
            .last
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(job) = last {
            job.cancel();
            // However it ends.
            drop(job.wait());
        }
        self.guest.close();
    }
}

impl Image {
    /// Reads every state section, checked.
    pub fn state(&self) -> Result<SavedState, HostError> {
        Ok(SavedState::new(self.reader().sections()?))
    }
}
