//! Which of a guest's memory is not that of an image, for putting it back.
//!
//! Where the guest's writes are tracked, only what was written since the chain's last image can
//! differ from it, and another image of the chain differs from that one where their indexes do.

use std::sync::Arc;

use crate::checkpoint::chain::Chain;
use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::layout::Layout;
use crate::checkpoint::session::Claim;
use crate::checkpoint::tracker::{DirtySet, Tracker};
use crate::guest::Guest;
use crate::page::PageRun;
use crate::store::ImageReader;

/// A guest whose memory is about to become that of an image. No checkpoint of it runs meanwhile.
///
/// Dropped before [`Rewind::finish`], it leaves the chain as it was: what was written since the
/// chain's last image counts as written still.
pub struct Rewind {
    guest: Arc<dyn Guest>,
    chain: Chain,
    tracker: Option<Tracker>,
    _claim: Claim,
}

impl std::fmt::Debug for Rewind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Rewind")
            .field("chain", &self.chain)
            .field("tracked", &self.tracker.is_some())
            .finish_non_exhaustive()
    }
}

impl Rewind {
    /// Keeps checkpoints of `guest` from starting; fails while one runs.
    pub fn begin(guest: &Arc<dyn Guest>, chain: &Chain) -> Result<Self, CheckpointError> {
        Ok(Self {
            guest: guest.clone(),
            chain: chain.clone(),
            tracker: None,
            _claim: Claim::new(guest.clone())?,
        })
    }

    /// Returns the chain's last image and the pages that were written since, sorted; `None` where
    /// the guest's writes are not tracked, so that any page may be another.
    ///
    /// Called while the guest is paused, once. Until [`Rewind::finish`] nothing but the memory that
    /// is put back may change.
    #[expect(clippy::type_complexity, reason = "an image and pages")]
    pub fn written(&mut self) -> Result<Option<(Arc<ImageReader>, Vec<PageRun>)>, CheckpointError> {
        let Some(parent) = self.chain.parent_of(&self.guest) else {
            return Ok(None);
        };
        let layout = Arc::new(Layout::new(self.guest.regions()));
        let tracker = Tracker::since_parent(self.guest.clone(), &layout);
        let tracker = self.tracker.insert(tracker);
        let mut set = DirtySet::new(&layout);
        let taken = tracker
            .collect(&mut set)
            .and_then(|()| tracker.rearm_all(&set));
        taken.map_err(|halt| match halt {
            Halt::Failed(error) => error,
            Halt::Stopped => CheckpointError::Cancelled,
        })?;
        Ok(Some((parent, runs_of(&layout, &set))))
    }

    /// Has the chain go on from `image`, whose memory the guest's was put back to. The guest may run
    /// already: what it has written since [`Rewind::written`] counts as written since the image.
    pub fn finish(mut self, image: Arc<ImageReader>) {
        if self.tracker.take().is_some() {
            self.chain.advance(&self.guest, image);
        }
    }
}

impl Drop for Rewind {
    fn drop(&mut self) {
        if let Some(tracker) = self.tracker.take() {
            tracker.give_back();
        }
    }
}

/// Returns the pages of a set as runs of frames, sorted.
fn runs_of(layout: &Layout, set: &DirtySet) -> Vec<PageRun> {
    let mut runs = Vec::new();
    for page in set.windows().flat_map(|window| set.pages(window)) {
        let run = PageRun {
            start: layout.frame(page),
            page_count: 1,
        };
        run.append_to(&mut runs);
    }
    runs
}
