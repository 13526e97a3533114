//! Copying pages out of the guest: whole pieces to the writers, dirty pages into staging.

mod captured;
mod last_set;
mod piece;
mod staging;
mod untouched;

pub(crate) use captured::{CapturedPieces, Finish};
pub(crate) use last_set::{LastSet, PageCopy};
pub(crate) use piece::{PieceReader, copy_piece, touched_pages};
pub(crate) use staging::{Staged, Staging, slot_offset};
pub(crate) use untouched::UntouchedPages;
