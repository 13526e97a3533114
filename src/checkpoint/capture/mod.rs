//! Copying pages out of the guest: whole pieces to the writers, dirty pages into staging.

mod last_set;
mod piece;
mod staging;

pub(crate) use last_set::{LastSet, PageCopy};
pub(crate) use piece::{PieceReader, touched_pages};
pub(crate) use staging::{Staged, Staging, slot_offset};
