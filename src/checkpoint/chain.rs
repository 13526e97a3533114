//! A guest's chain of images: what the log of its writes has run since.
//!
//! The log runs from the captured moment of one image to that of the next. What it has then is all
//! that the next image needs; the rest is where the earlier image has it. Whatever goes wrong, the
//! log never knows less than was written since the chain's last image: a checkpoint that comes to
//! nothing gives back what it took, and where it cannot, the chain ends, and the next image is whole.

use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::Serialize;
use uuid::Uuid;

use crate::guest::Guest;
use crate::store::{ImageReader, LeafDigests, Storage, StoreError};

/// Continues one image of a guest with the next. Clones are the same chain.
///
/// Given to each checkpoint of the guest ([`CheckpointOptions::chain`]). The first writes all
/// memory and leaves the guest's dirty log on, which costs the guest a fault for each page that it
/// writes; each after it writes what was written since the one before. Dropping the last clone
/// ends the log. While it runs, no checkpoint of the guest may be taken without the chain: end it
/// first ([`Chain::end`]).
///
/// [`CheckpointOptions::chain`]: crate::checkpoint::CheckpointOptions::chain
#[derive(Clone, Default)]
pub struct Chain {
    state: Arc<Mutex<State>>,
    leaves: Arc<LeafDigests>,
}

#[derive(Default)]
struct State {
    tracked: Option<Tracked>,
}

/// A guest whose log has run since an image.
struct Tracked {
    guest: Weak<dyn Guest>,
    /// Leased: nobody removes it, or what it needs.
    parent: Arc<ImageReader>,
}

impl Tracked {
    fn is_of(&self, guest: &Arc<dyn Guest>) -> bool {
        std::ptr::addr_eq(self.guest.as_ptr(), Arc::as_ptr(guest))
    }
}

impl Drop for Tracked {
    fn drop(&mut self) {
        let Some(guest) = self.guest.upgrade() else {
            return;
        };
        if let Err(error) = guest.dirty_log().stop() {
            log::error!("could not stop the dirty log: {error}");
        }
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("parent", &self.parent())
            .finish_non_exhaustive()
    }
}

/// How an image continues another, in its statistics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct IncrementStatistics {
    /// The image that it continues; `None` where it is whole.
    pub parent: Option<Uuid>,
    /// Why it is whole.
    pub whole_because: Option<&'static str>,
    /// Pages copied from earlier images, so that those are not needed for ever.
    pub carried_pages: u64,
}

impl Chain {
    /// Has the chain go on from an image that `guest` was just restored from. Its dirty log runs
    /// already, with every page armed, since before anything wrote memory after the restore.
    pub fn adopt(&self, guest: &Arc<dyn Guest>, parent: Arc<ImageReader>) {
        self.lock().tracked = Some(Tracked {
            guest: Arc::downgrade(guest),
            parent,
        });
    }

    /// Ends the chain, and the log of the guest's writes: the next image is whole.
    pub fn end(&self) {
        self.lock().tracked = None;
        self.leaves.clear();
    }

    /// Returns where the digests of the leaves of the chain's chunks are, so that the guest can be
    /// put back to an image without reading all of each chunk. Readers of its images use it too.
    pub fn leaves(&self) -> &Arc<LeafDigests> {
        &self.leaves
    }

    /// Returns the UUID of the image that the next one continues.
    pub fn parent(&self) -> Option<Uuid> {
        let state = self.lock();
        state
            .tracked
            .as_ref()
            .map(|tracked| tracked.parent.image_uuid())
    }

    /// Returns the image that the guest's log has run since; `None` where it does not run.
    pub fn parent_of(&self, guest: &Arc<dyn Guest>) -> Option<Arc<ImageReader>> {
        let state = self.lock();
        let tracked = state.tracked.as_ref()?;
        tracked.is_of(guest).then(|| tracked.parent.clone())
    }

    /// Returns the image that an image of `guest` in `dir` can continue, or why there is none.
    pub(crate) fn parent_for(
        &self,
        guest: &Arc<dyn Guest>,
        storage: &dyn Storage,
        path: &Path,
    ) -> Result<Result<Arc<ImageReader>, &'static str>, StoreError> {
        let parent = {
            let state = self.lock();
            let Some(tracked) = &state.tracked else {
                return Ok(Err("it is the first of its chain"));
            };
            if !tracked.is_of(guest) {
                return Ok(Err("the guest was started anew"));
            }
            tracked.parent.clone()
        };
        if parent.is_beside(storage, path)? {
            Ok(Ok(parent))
        } else {
            Ok(Err("the image before it is gone, or in another directory"))
        }
    }

    /// Has the chain go on from a new image of `guest`, whose log has run since its moment.
    pub(crate) fn advance(&self, guest: &Arc<dyn Guest>, parent: Arc<ImageReader>) {
        self.leaves.forget_others(parent.chunks());
        let mut state = self.lock();
        match &mut state.tracked {
            Some(tracked) => tracked.parent = parent,
            none => {
                *none = Some(Tracked {
                    guest: Arc::downgrade(guest),
                    parent,
                });
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
