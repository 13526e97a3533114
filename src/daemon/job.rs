//! What is being done to a domain, how far it is, and what the last one cost.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::host::{CheckpointSummary, JobProgress};
use crate::rpc::{TypedParam, TypedValue};

/// Bytes of a page of guest memory.
const PAGE_BYTES: u64 = 4096;

/// A kind of change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobKind {
    /// One that takes a moment.
    Modify,
    Start,
    Restore,
    Save,
    Snapshot,
    Revert,
    Dump,
}

impl JobKind {
    /// Returns the word for messages.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Modify => "modify",
            Self::Start => "start",
            Self::Restore => "restore",
            Self::Save => "save",
            Self::Snapshot => "snapshot",
            Self::Revert => "snapshot revert",
            Self::Dump => "dump",
        }
    }

    /// Returns libvirt's number (`virDomainJobOperation`).
    fn operation(self) -> i32 {
        match self {
            Self::Modify => 0,
            Self::Start => 1,
            Self::Save => 2,
            Self::Restore => 3,
            Self::Snapshot => 6,
            Self::Revert => 7,
            Self::Dump => 8,
        }
    }

    /// Returns whether clients are told of it as a job: it copies memory.
    pub(super) fn is_shown(self) -> bool {
        matches!(self, Self::Save | Self::Snapshot | Self::Dump)
    }
}

/// A change that is under way.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) kind: JobKind,
    started: Instant,
    copy: Mutex<Copying>,
    cancelled: AtomicBool,
}

#[derive(Debug, Default, Clone)]
struct Copying {
    /// The worker's number of the checkpoint.
    worker_job: Option<u64>,
    progress: Option<JobProgress>,
}

impl Job {
    pub(super) fn new(kind: JobKind) -> Self {
        Self {
            kind,
            started: Instant::now(),
            copy: Mutex::default(),
            cancelled: AtomicBool::new(false),
        }
    }

    fn copy(&self) -> Copying {
        let copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
        copy.clone()
    }

    pub(super) fn set_worker_job(&self, id: u64) {
        let mut copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
        copy.worker_job = Some(id);
    }

    pub(super) fn worker_job(&self) -> Option<u64> {
        self.copy().worker_job
    }

    pub(super) fn set_progress(&self, progress: &JobProgress) {
        let mut copy = self.copy.lock().unwrap_or_else(PoisonError::into_inner);
        copy.progress = Some(progress.clone());
    }

    pub(super) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    pub(super) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    pub(super) fn elapsed(&self) -> Duration {
        self.started.elapsed()
    }

    /// Returns how far it is.
    pub(super) fn figures(&self) -> Figures {
        let progress = self.copy().progress;
        let total = progress.as_ref().map_or(0, |progress| progress.total_bytes);
        let done = progress
            .as_ref()
            .map_or(0, |progress| progress.scanned_bytes);
        Figures {
            operation: self.kind.operation(),
            elapsed_ms: millis(self.elapsed()),
            remaining_ms: progress
                .as_ref()
                .and_then(|progress| progress.eta_ms)
                .unwrap_or(0),
            total,
            processed: done,
            written: progress
                .as_ref()
                .map_or(0, |progress| progress.bytes_written),
        }
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// A job in figures, under way or done.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Figures {
    pub(super) operation: i32,
    pub(super) elapsed_ms: u64,
    pub(super) remaining_ms: u64,
    pub(super) total: u64,
    pub(super) processed: u64,
    pub(super) written: u64,
}

impl Figures {
    /// Returns them by libvirt's names.
    pub(super) fn params(&self) -> Vec<TypedParam> {
        let remaining = self.total.saturating_sub(self.processed);
        vec![
            TypedParam::new("operation", TypedValue::Int(self.operation)),
            TypedParam::ulong("time_elapsed", self.elapsed_ms),
            TypedParam::ulong("time_remaining", self.remaining_ms),
            TypedParam::ulong("data_total", self.total),
            TypedParam::ulong("data_processed", self.processed),
            TypedParam::ulong("data_remaining", remaining),
            TypedParam::ulong("memory_total", self.total),
            TypedParam::ulong("memory_processed", self.processed),
            TypedParam::ulong("memory_remaining", remaining),
            TypedParam::ulong("livepoint.bytes_written", self.written),
        ]
    }
}

/// A job that has ended.
#[derive(Clone, Debug)]
pub(super) struct Completed {
    pub(super) params: Vec<TypedParam>,
}

impl Completed {
    /// Returns what a checkpoint cost, in libvirt's order and with our own figures after them.
    pub(super) fn of(job: &Job, summary: &CheckpointSummary) -> Self {
        let figures = &summary.figures;
        let memory = figures.memory_bytes;
        let elapsed_ms = millis(job.elapsed());
        let seconds_us = figures.total_us.max(1);
        let bps = u128::from(memory) * 1_000_000 / u128::from(seconds_us);
        let normal = (memory / PAGE_BYTES).saturating_sub(figures.zero_pages);
        let params = vec![
            TypedParam::new("operation", TypedValue::Int(job.kind.operation())),
            TypedParam::ulong("time_elapsed", elapsed_ms),
            // Rounded up: a pause of half a millisecond is not none.
            TypedParam::ulong("downtime", figures.downtime_us.div_ceil(1000)),
            TypedParam::ulong("data_total", memory),
            TypedParam::ulong("data_processed", memory),
            TypedParam::ulong("data_remaining", 0),
            TypedParam::ulong("memory_total", memory),
            TypedParam::ulong("memory_processed", memory),
            TypedParam::ulong("memory_remaining", 0),
            TypedParam::ulong("memory_bps", u64::try_from(bps).unwrap_or(u64::MAX)),
            TypedParam::ulong("memory_constant", figures.zero_pages),
            TypedParam::ulong("memory_normal", normal),
            TypedParam::ulong("memory_normal_bytes", normal * PAGE_BYTES),
            TypedParam::ulong("memory_page_size", PAGE_BYTES),
            TypedParam::ulong("livepoint.downtime_us", figures.downtime_us),
            TypedParam::ulong("livepoint.total_us", figures.total_us),
            TypedParam::ulong("livepoint.image_bytes", summary.image_bytes),
            TypedParam::ulong("livepoint.staging_peak_bytes", figures.staging_peak_bytes),
            TypedParam::ulong("livepoint.spilled_pages", figures.spilled_pages),
            TypedParam::new(
                "livepoint.protocol",
                TypedValue::Text(summary.protocol.to_string()),
            ),
        ];
        Self { params }
    }
}
