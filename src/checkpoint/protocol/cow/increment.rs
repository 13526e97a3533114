//! `cow` of a small increment: what was written since the chain's last image is copied, and the
//! pause copies the last of it.
//!
//! With the chain's log on, KVM has the guest's memory in pages of 4 KiB, and protecting it takes
//! longer than copying a few thousand pages. Where these lie all over memory most of them are copied
//! ahead of the pause, while the guest runs, as `precopy` does it.

use std::time::Instant;

use crate::checkpoint::error::Halt;
use crate::checkpoint::layout::PIECE;
use crate::checkpoint::phase::Phase;
use crate::checkpoint::policy::PageCost;
use crate::checkpoint::protocol::Captured;
use crate::checkpoint::protocol::precopy::{Rounds, report};
use crate::checkpoint::session::Session;
use crate::checkpoint::tracker::DirtySet;
use crate::checkpoint::writer::Buffers;
use crate::page::PAGE_BYTES;

/// How often so many pages are copied as were written when it began: ahead of the pause, once more
/// for those of them that were written again, and in the pause, which must not wait for the disk.
const COPIES: u64 = 3;

/// Returns how many pages were written since the chain's last image, where it is an increment and
/// they are so few that memory need not be protected.
pub(super) fn small(session: &Session) -> Result<Option<u64>, Halt> {
    if !session.tracker.is_since_parent() {
        return Ok(None);
    }
    let dirty = session.tracker.peek(&mut DirtySet::new(&session.layout))?;
    let is_short = PageCost::of_copying().of(dirty) <= session.policy.downtime_budget;
    let fits = dirty.saturating_mul(2) <= most_pages(session);
    Ok((is_short && fits).then_some(dirty))
}

/// Returns how many pages may be held at once.
fn most_pages(session: &Session) -> u64 {
    let most_bytes = session.options.max_staging_bytes;
    most_bytes.map_or(u64::MAX, |bytes| bytes / PAGE_BYTES as u64)
}

/// `dirty` is how many pages were written so far.
pub(super) fn capture(session: &mut Session, dirty: u64) -> Result<Captured, Halt> {
    session.statistics.mechanism = "kvm-dirty-log";
    let pages = dirty.saturating_mul(COPIES).min(most_pages(session));
    let pieces = usize::try_from(pages).unwrap_or(usize::MAX) / PIECE;
    let all = session
        .options
        .workspace
        .buffers(pieces + session.policy.buffers)?;
    let (queue, returned) = session.start_writers(Buffers::alike(all))?;
    session.job.enter(Phase::Live)?;
    let mut rounds = Rounds::new(session, queue);
    rounds.ahead(session.policy.arming_budget)?;
    let lease = session.lease.clone();
    let pause = session.in_pause(|_| rounds.last(&lease))?;
    let resumed = Instant::now();
    session.job.enter(Phase::Draining)?;
    report(session, &rounds);
    drop(rounds);
    session.join_writers(&returned, resumed)?;
    Ok(Captured {
        sections: pause.sections,
        moment: pause.moment,
    })
}
