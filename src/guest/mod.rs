//! `Guest`: all that the engine needs of a virtual machine.
//!
//! Our own machine implements it, a fake does in tests, and so does a foreign VMM through the C
//! ABI. Nothing here knows KVM, devices or domain XML.

mod disk;
mod gate;
mod host_writes;
mod image;

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::page::{Gfn, PageRun};
use crate::state::{HostFacts, StateSection};
use crate::sys::mapping::GuestMapping;

pub use disk::{DiskFacts, FrozenDisk, GuestDisk, WriteObserver};
pub use gate::{GateTimeout, VcpuGate};
pub use host_writes::{Discard, DiscardObserver, HostWriteSource, HostWrites};
pub use image::{DiskImage, ImageError, ImageFormat};

/// What backs a region's memory on the host; decides which tracking is cheap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory, with transparent huge pages if `huge`.
    Anonymous {
        /// Whether transparent huge pages were asked for.
        huge: bool,
    },
    /// hugetlbfs pages of this many bytes.
    Hugetlb {
        /// Size of one huge page.
        page_bytes: u64,
    },
    /// A memfd, mapped shared.
    Memfd,
}

/// One region of guest memory: one KVM memslot.
#[derive(Clone, Debug)]
pub struct MemoryRegion {
    /// KVM memslot.
    pub slot: u32,
    /// First guest frame.
    pub start: Gfn,
    /// Length in pages.
    pub page_count: u64,
    /// Where the bytes are in this process; as long as the region.
    pub mapping: GuestMapping,
    /// What backs them.
    pub backing: Backing,
}

impl MemoryRegion {
    /// Returns the region's frames.
    pub fn run(&self) -> PageRun {
        PageRun {
            start: self.start,
            page_count: self.page_count,
        }
    }
}

/// The log of pages that the guest wrote: KVM's manual dirty log, or a fake's.
///
/// A set bit stays set until [`DirtyLog::rearm`] clears it. Whoever copies a page re-arms it
/// **first** and copies **second**: a store that races the copy then sets the bit again, so that
/// a torn copy is always followed by a whole one.
///
/// Calls may come from several threads, for different windows of a slot.
pub trait DirtyLog: Send + Sync {
    /// Starts logging. Every page then reads as dirty until it is re-armed once, and writes to
    /// pages never re-armed cost the guest nothing.
    fn start(&self) -> io::Result<()>;

    /// Ends logging and puts the slots' flags back as they were. Not logging is no error.
    fn stop(&self) -> io::Result<()>;

    /// Copies the slot's log to `bitmap` (one bit a page, whole `u64` words) and clears nothing.
    fn fetch(&self, slot: u32, bitmap: &mut [u64]) -> io::Result<()>;

    /// Clears the pages whose bits are set in `bits`, and write-protects them again.
    ///
    /// `first_page` counts from the region's start and is a multiple of 64; `bits` has the bit of
    /// `first_page` first; `page_count` is a multiple of 64 or ends at the region's end. On return
    /// every later store to these pages is logged.
    fn rearm(&self, slot: u32, first_page: u64, page_count: u64, bits: &[u64]) -> io::Result<()>;
}

/// Memory that comes to a guest while it runs.
pub trait MemoryFill: Send + Sync + std::fmt::Debug {
    /// Waits until all of it is there, and has it come faster meanwhile; false where it is not yet
    /// after `timeout`, or never will be.
    fn wait(&self, timeout: Duration) -> bool;
}

/// How long the parts of a pause took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseTiming {
    /// From the first kick until every vCPU was stopped and its pending exit complete.
    pub kick: Duration,
    /// Until every device was paused and drained.
    pub quiesce: Duration,
}

/// What an image says about the guest beside its memory and state.
#[derive(Clone, Debug)]
pub struct Description {
    /// The domain's name.
    pub name: String,
    /// The domain's UUID.
    pub uuid: Uuid,
    /// The domain XML that makes the same machine again; opaque for a foreign VMM.
    pub domain_xml: String,
    /// Number of vCPUs.
    pub vcpu_count: u32,
    /// The CPU that the guest sees and the KVM features that its state needs.
    pub facts: HostFacts,
}

/// A guest that cannot do what the engine asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GuestError {
    /// A vCPU did not stop in time.
    #[error(transparent)]
    Gate(#[from] GateTimeout),
    /// A device did not drain in time.
    #[error("device {device} still had requests in flight when the drain deadline passed")]
    Drain {
        /// Name of the device.
        device: String,
    },
    /// A part of the state could not be read.
    #[error("could not save {what}")]
    Save {
        /// What was being saved.
        what: String,
        /// Why.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A callback of the VMM's failed.
    #[error("the VMM could not {what}: it returned {status}")]
    Vmm {
        /// What it was asked to do.
        what: &'static str,
        /// What it returned.
        status: i32,
    },
    /// The guest has ended, or is not in a state where this can be done.
    #[error("the guest is {state}")]
    State {
        /// Its state.
        state: String,
    },
    /// The guest has something that cannot be checkpointed.
    #[error("{what} cannot be checkpointed: {why}")]
    NotCheckpointable {
        /// The device or memory.
        what: String,
        /// Why not.
        why: String,
    },
}

/// A virtual machine, as the checkpoint engine sees it.
///
/// Every method may be called from any thread.
pub trait Guest: Send + Sync {
    /// Returns the memory regions, sorted by frame and not overlapping.
    fn regions(&self) -> &[MemoryRegion];

    /// Returns the log of pages that vCPUs (and KVM itself) wrote.
    fn dirty_log(&self) -> &dyn DirtyLog;

    /// Returns the log of pages that the VMM wrote, and the notice of discards.
    fn host_writes(&self) -> &HostWrites;

    /// Fails where something in the guest cannot be checkpointed, before anything is paused.
    fn check_checkpointable(&self) -> Result<(), GuestError>;

    /// Stops every vCPU, completes their pending exits, then pauses and drains every device.
    ///
    /// On return neither vCPUs nor devices touch guest memory until [`Guest::resume`]. Pauses
    /// nest: a guest that its user has paused stays paused after the engine's resume. On an error
    /// everything runs again. Blocks for at most the implementation's deadline.
    fn pause(&self) -> Result<PauseTiming, GuestError>;

    /// Ends one pause: devices first, then vCPUs. Does not fail and does not block.
    fn resume(&self);

    /// Returns when the last vCPU went on after the last pause; `None` where that is not known, or
    /// has not happened. For the figures only.
    fn last_resumed(&self) -> Option<Instant> {
        None
    }

    /// Returns what still fills the guest's memory; `None` where all of it is there. Until then a
    /// page that is in no page table need not be zeros.
    fn filling(&self) -> Option<Arc<dyn MemoryFill>> {
        None
    }

    /// Saves everything but memory. Called between [`Guest::pause`] and [`Guest::resume`]; does
    /// not change the guest.
    fn save_state(&self) -> Result<Vec<StateSection>, GuestError>;

    /// Returns the disks. An image has the content of those that the guest writes.
    fn disks(&self) -> Vec<Arc<dyn GuestDisk>> {
        Vec::new()
    }

    /// Returns what an image needs to know about the guest.
    fn describe(&self) -> Description;
}
