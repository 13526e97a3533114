//! Buffers that outlive a checkpoint, for the next one.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::writer::Buffer;
use crate::sys::mapping::GuestMapping;

/// Memory that consecutive checkpoints of a guest reuse: memory never touched before costs the
/// host up to 12 µs a page, more than everything else that happens to it.
///
/// Cloning shares it. A checkpoint takes out what is there and makes the rest; two at a time do
/// not disturb each other.
#[derive(Clone, Default)]
pub struct Workspace {
    kept: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    buffers: Vec<Buffer>,
    staging: Option<(GuestMapping, usize)>,
}

impl fmt::Debug for Workspace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Workspace").finish_non_exhaustive()
    }
}

impl Workspace {
    /// Returns `count` buffers, kept or new.
    pub(crate) fn buffers(&self, count: usize) -> Result<Vec<Buffer>, CheckpointError> {
        self.buffers_while(count, || true)
    }

    /// Like [`Workspace::buffers`]; makes no more of them once `wanted` returns false.
    pub(crate) fn buffers_while(
        &self,
        count: usize,
        wanted: impl Fn() -> bool,
    ) -> Result<Vec<Buffer>, CheckpointError> {
        let mut buffers = {
            let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
            let keep = kept.buffers.len().saturating_sub(count);
            kept.buffers.split_off(keep)
        };
        while buffers.len() < count && wanted() {
            buffers.push(Buffer::new()?);
        }
        Ok(buffers)
    }

    /// Takes the kept staging memory and how many of its first bytes are populated.
    pub(crate) fn staging(&self) -> Option<(GuestMapping, usize)> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.staging.take()
    }

    /// Keeps buffers and staging memory for the next checkpoint.
    pub(crate) fn keep(&self, buffers: Vec<Buffer>, staging: Option<(GuestMapping, usize)>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.buffers.extend(buffers);
        if staging.is_some() {
            kept.staging = staging;
        }
    }
}
