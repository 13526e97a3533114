//! Memory that the VMM gives back to the host.

use std::sync::Arc;

use super::{ForeignError, ForeignGuest};
use crate::page::PageRun;

impl ForeignGuest {
    /// Runs `discard`, which gives memory back to the host, at a time at which that is safe: a
    /// checkpoint that still needs the memory captures it before, one that begins meanwhile waits
    /// until it is done, and each takes it as changed. A change of the regions waits too.
    ///
    /// `discard` must not change the regions, close the guest, or discard more of it.
    pub fn discard<T>(
        &self,
        gpa: u64,
        bytes: u64,
        discard: impl FnOnce() -> T,
    ) -> Result<T, ForeignError> {
        let run = PageRun::touching(gpa, bytes);
        let mut discard = Some(discard);
        loop {
            // A view now, if there is none: a checkpoint that begins meanwhile must use the same.
            let view = self.view()?;
            let under_way = view.host_writes.will_discard(run);
            // Regions may have changed before that held them up; checkpoints are of others now.
            let now = self.current_view();
            if now.is_none_or(|now| !Arc::ptr_eq(&now, &view)) {
                continue;
            }
            let discard = discard.take().expect("taken only by the turn that returns");
            let result = discard();
            drop(under_way);
            return Ok(result);
        }
    }
}
