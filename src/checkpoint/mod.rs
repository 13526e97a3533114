//! The engine: captures a running guest into an image.
//!
//! [`start`] returns a [`Job`]. Behind it, a session thread runs one of the [`Protocol`]s on a few
//! more threads, all of them named `lvp-…` and deaf to signals:
//!
//! | thread | does | ends |
//! |---|---|---|
//! | `lvp-session` | decides, pauses and resumes the guest | with the checkpoint |
//! | `lvp-scan-N` | copies memory, piece by piece | after the scan and the last set |
//! | `lvp-harvest` | collects dirty pages into staging | when the last set is small |
//! | `lvp-rounds` | sends dirty pages to the image, round by round (`precopy`) | when the rest is small, or does not shrink |
//! | `lvp-fault-N` | captures what a vCPU waits to write (`cow`) | when all is captured |
//! | `lvp-stalls` | lets writers go if the engine hangs (`cow`) | when all is captured |
//! | `lvp-write-N` | compresses, hashes, writes | when all is written |
//! | `lvp-create`, `lvp-commit` | begin and commit the image | then |
//! | `lvp-watchdog` | resumes the guest if the engine hangs | with the session |
//!
//! A byte's way: guest memory → (`capture`) a chunk buffer, or the staging table and later a chunk
//! buffer → (`writer`) the image. What to copy, and in what order, is the `tracker`'s business;
//! when to pause is the `policy`'s.
//!
//! Two rules make a live image the memory of one moment. **Re-arm first, copy second**: a store
//! that races a copy is reported again (`threaded`), or waits for it (`cow`). **The newest epoch wins**: the highest, never the last to
//! arrive. They are stated again where they are kept.
//!
//! # Failure
//! Whatever fails, the guest runs on, its dirty log is off, nothing of the image is left, and an
//! older image at the same path is whole. A thread that is stuck in storage is abandoned: it ends
//! when the kernel lets it go, and its temporary file goes with it.

mod capture;
mod chain;
mod commit;
mod control;
mod crew;
mod dirty_rate;
mod disks;
mod error;
mod job;
mod layout;
mod options;
mod phase;
mod plan;
mod policy;
mod polite;
mod protocol;
mod rewind;
mod sample;
mod session;
mod stalls;
mod stats;
mod tracker;
mod watchdog;
mod workspace;
mod writer;

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;

pub use chain::{Chain, IncrementStatistics};
pub use dirty_rate::{DirtyRate, DirtyRateMode, measure_dirty_rate};
pub use error::CheckpointError;
pub use job::{Job, Progress, Report};
pub use options::{CheckpointOptions, PauseHook, Protocol, THREADS_MAX};
pub use phase::Phase;
pub use plan::{Contract, Plan};
pub use policy::ClosingReason;
pub use protocol::ArmingStatistics;
pub use rewind::Rewind;
pub use session::start;
pub use stalls::StallStatistics;
pub(crate) use stats::micros;
pub use stats::{
    DiskMethod, DiskStatistics, Downtime, Round, StagingStatistics, Statistics, WriteStatistics,
};
pub use workspace::Workspace;
