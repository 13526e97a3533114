//! What the VMM writes to guest memory by vm-memory is marked, so that no checkpoint misses it.

use std::sync::Arc;

use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};

use crate::guest::HostWrites;

/// Tells [`HostWrites`] of what the VMM writes. vm-memory calls it after the write.
#[derive(Clone, Debug)]
pub struct MarkHostWrites {
    pub(super) writes: Arc<HostWrites>,
    pub(super) gpa: u64,
}

/// A part of [`MarkHostWrites`].
#[derive(Clone, Copy, Debug)]
pub struct MarkHostWritesPart<'a> {
    writes: &'a HostWrites,
    gpa: u64,
}

impl MarkHostWritesPart<'_> {
    /// Returns where in guest memory the part begins.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }
}

impl<'a> WithBitmapSlice<'a> for MarkHostWrites {
    type S = MarkHostWritesPart<'a>;
}

impl Bitmap for MarkHostWrites {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.slice_at(offset).mark_dirty(0, len);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        // The engine takes the marks from `HostWrites`; nobody asks here.
        false
    }

    fn slice_at(&self, offset: usize) -> MarkHostWritesPart<'_> {
        MarkHostWritesPart {
            writes: &self.writes,
            gpa: self.gpa + offset as u64,
        }
    }
}

impl<'part> WithBitmapSlice<'_> for MarkHostWritesPart<'part> {
    // A part of a part lives as long as the whole: vm-memory asks for one type of slices.
    type S = MarkHostWritesPart<'part>;
}

impl BitmapSlice for MarkHostWritesPart<'_> {}

impl<'part> Bitmap for MarkHostWritesPart<'part> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        self.writes.mark_dirty(self.gpa + offset as u64, len as u64);
    }

    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }

    fn slice_at(&self, offset: usize) -> MarkHostWritesPart<'part> {
        MarkHostWritesPart {
            writes: self.writes,
            gpa: self.gpa + offset as u64,
        }
    }
}
