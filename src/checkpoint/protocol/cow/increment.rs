//! `cow` of a small increment: what was written since the chain's last image is copied in the pause.
//!
//! With the chain's log on, KVM has the guest's memory in pages of 4 KiB, and protecting it takes
//! longer than copying a few thousand pages.

use std::time::Instant;

use crate::checkpoint::error::Halt;
use crate::checkpoint::layout::PIECE;
use crate::checkpoint::phase::Phase;
use crate::checkpoint::protocol::Captured;
use crate::checkpoint::protocol::precopy::{Rounds, report};
use crate::checkpoint::session::Session;
use crate::checkpoint::writer::Buffers;

/// `dirty` is how many pages were written so far.
pub(super) fn capture(session: &mut Session, dirty: u64) -> Result<Captured, Halt> {
    session.statistics.mechanism = "kvm-dirty-log";
    // Twice as many as are needed now: the pause must not wait for the disk.
    let pieces = usize::try_from(dirty).unwrap_or(usize::MAX) / PIECE * 2;
    let all = session
        .options
        .workspace
        .buffers(pieces + session.policy.buffers)?;
    let (queue, returned) = session.start_writers(Buffers::alike(all))?;
    session.job.enter(Phase::Live)?;
    let mut rounds = Rounds::new(session, queue);
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
