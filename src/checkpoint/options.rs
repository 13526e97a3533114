//! What the caller chooses.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::checkpoint::chain::Chain;
use crate::checkpoint::error::CheckpointError;
use crate::checkpoint::workspace::Workspace;
use crate::guest::Guest;
use crate::page::PAGE_BYTES;
use crate::store::Codec;

/// The most capture threads: above it memory bandwidth is the limit, not threads.
pub const THREADS_MAX: usize = 64;

/// The longest interval between two harvests.
const INTERVAL_MAX: Duration = Duration::from_secs(60);

/// The shortest watch over a pause: below it a loaded host looks dead.
const PAUSE_LIMIT_MIN: Duration = Duration::from_millis(10);

/// The longest watch over a pause.
const PAUSE_LIMIT_MAX: Duration = Duration::from_secs(60);

/// The lowest cap on bandwidth: below it a checkpoint of any guest takes hours.
const BANDWIDTH_MIN: u64 = 1 << 20;

/// The smallest staging table.
const STAGING_BYTES_MIN: u64 = 16 * PAGE_BYTES as u64;

/// How memory is captured. All protocols write the same image format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Protocol {
    /// Pauses the guest, writes all memory, resumes it: the traditional baseline.
    Stop,
    /// Copies memory while the guest runs, and in rounds what it dirties, until the rest fits the
    /// downtime budget: live migration to a file. The image is the moment of the pause at the
    /// end. A guest that writes faster than the disk never converges.
    Precopy,
    /// Scans memory while the guest runs and harvests what it dirties; the image is the moment of
    /// a short pause at the end.
    #[default]
    Threaded,
    /// Write-protects memory in a short pause and copies each part of it before its first write;
    /// the image is the moment of that pause, at the start.
    Cow,
    /// `threaded` or `cow`: whichever is expected to cost the guest less, by a sample of its
    /// writes. The statistics say which, and why.
    Auto,
}

impl Protocol {
    /// Every protocol.
    pub const ALL: [Self; 5] = [
        Self::Stop,
        Self::Precopy,
        Self::Threaded,
        Self::Cow,
        Self::Auto,
    ];

    /// Every protocol that captures memory itself: all but `auto`.
    pub const CAPTURING: [Self; 4] = [Self::Stop, Self::Precopy, Self::Threaded, Self::Cow];

    /// Returns the protocol's name, as users write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Precopy => "precopy",
            Self::Threaded => "threaded",
            Self::Cow => "cow",
            Self::Auto => "auto",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Protocol {
    type Err = CheckpointError;

    fn from_str(text: &str) -> Result<Self, CheckpointError> {
        Self::ALL
            .into_iter()
            .find(|protocol| protocol.name() == text)
            .ok_or_else(|| CheckpointError::InvalidOption {
                option: "protocol",
                value: text.to_owned(),
                wanted: "stop, precopy, threaded, cow or auto",
            })
    }
}

/// Called inside the pause.
pub type PauseHook = Arc<dyn Fn(&dyn Guest) + Send + Sync>;

/// How a checkpoint is taken. Begin with `default()` and change what matters.
#[derive(Clone)]
#[non_exhaustive]
pub struct CheckpointOptions {
    /// How memory is captured.
    pub protocol: Protocol,
    /// How chunks are compressed.
    pub codec: Codec,
    /// Whether the image survives a power cut once the job is done.
    pub durable: bool,
    /// Threads that capture, and threads that write; `None` takes one a CPU, at most four.
    pub threads: Option<usize>,
    /// Pause between two harvests of `threaded`.
    pub interval: Duration,
    /// How long the copy of the last dirty pages may take in the pause; `None` for 3 ms
    /// (`threaded`) or 300 ms (`precopy`). They go on collecting until it fits, as long as that
    /// helps; a target, not a promise.
    pub downtime_budget: Option<Duration>,
    /// The longest downtime that is acceptable: a checkpoint that cannot keep it is refused or
    /// fails, and the guest runs on.
    pub max_downtime: Option<Duration>,
    /// How long the checkpoint may take: one that is expected to take longer is refused before
    /// anything is begun. One that takes longer all the same is completed, and says by how much.
    pub deadline: Option<Duration>,
    /// The most memory between capture and disk; `None` takes 10 % of the guest's memory, at
    /// least 64 MiB.
    pub max_staging_bytes: Option<u64>,
    /// The most bytes a second that are written to the image; `None` for as many as it takes.
    pub max_bandwidth: Option<u64>,
    /// The watchdog resumes the guest, and fails the checkpoint, when a pause shows no sign of
    /// life for this long.
    pub pause_limit: Duration,
    /// A file in the image's directory that is given up and written over: faster than new room.
    /// Gone whatever becomes of the checkpoint.
    pub spare: Option<PathBuf>,
    /// Fails the start where the file system has less room than the touched pages may take.
    pub check_space: bool,
    /// Runs inside the pause, after the last pages are captured and while nothing runs; its time
    /// is counted out of the downtime figure, not out of `pause_limit`. For tests that compare
    /// memory with the image, and for work that a tool must do at the captured moment.
    pub at_pause: Option<PauseHook>,
    /// The chain that the image belongs to: it has what was written since the image before it, and
    /// the guest's writes are tracked from then on. `None` for a whole image and no tracking after.
    pub chain: Option<Chain>,
    /// Has an image of a chain needed by no more than so many after it: each writes that part of
    /// the memory which it would not have to. `None` lets images be needed for ever.
    pub span: Option<u32>,
    /// Keeps so many of the guest's images in the directory, the newest, and what they need; removes
    /// older ones once this one is whole. `None` keeps all.
    pub keep: Option<u32>,
    /// Buffers kept from one checkpoint to the next; clone one into each of a guest's checkpoints.
    pub workspace: Workspace,
}

impl Default for CheckpointOptions {
    fn default() -> Self {
        Self {
            protocol: Protocol::default(),
            codec: Codec::None,
            durable: true,
            threads: None,
            interval: Duration::from_millis(100),
            downtime_budget: None,
            max_downtime: None,
            deadline: None,
            max_staging_bytes: None,
            max_bandwidth: None,
            pause_limit: Duration::from_secs(1),
            spare: None,
            check_space: true,
            at_pause: None,
            chain: None,
            span: None,
            keep: None,
            workspace: Workspace::default(),
        }
    }
}

impl fmt::Debug for CheckpointOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointOptions")
            .field("protocol", &self.protocol)
            .field("codec", &self.codec)
            .field("durable", &self.durable)
            .field("threads", &self.threads)
            .field("interval", &self.interval)
            .field("downtime_budget", &self.downtime_budget)
            .field("max_downtime", &self.max_downtime)
            .field("deadline", &self.deadline)
            .field("max_staging_bytes", &self.max_staging_bytes)
            .field("max_bandwidth", &self.max_bandwidth)
            .field("pause_limit", &self.pause_limit)
            .field("chain", &self.chain)
            .field("span", &self.span)
            .field("keep", &self.keep)
            .finish_non_exhaustive()
    }
}

impl CheckpointOptions {
    /// Fails where a value is out of bounds.
    pub(crate) fn validate(&self) -> Result<(), CheckpointError> {
        let invalid = |option, value: String, wanted| {
            Err(CheckpointError::InvalidOption {
                option,
                value,
                wanted,
            })
        };
        if let Some(threads) = self
            .threads
            .filter(|count| !(1..=THREADS_MAX).contains(count))
        {
            return invalid("threads", threads.to_string(), "from 1 to 64");
        }
        if self.interval > INTERVAL_MAX {
            return invalid("interval", format!("{:?}", self.interval), "60 s or less");
        }
        if !(PAUSE_LIMIT_MIN..=PAUSE_LIMIT_MAX).contains(&self.pause_limit) {
            let value = format!("{:?}", self.pause_limit);
            return invalid("pause_limit", value, "from 10 ms to 60 s");
        }
        if let Some(bytes) = self
            .max_staging_bytes
            .filter(|&bytes| bytes < STAGING_BYTES_MIN)
        {
            return invalid("max_staging_bytes", bytes.to_string(), "64 KiB or more");
        }
        if let Some(rate) = self.max_bandwidth.filter(|&rate| rate < BANDWIDTH_MIN) {
            return invalid("max_bandwidth", rate.to_string(), "1 MiB/s or more");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_values_out_of_bounds_are_named() {
        CheckpointOptions::default().validate().unwrap();
        type Change = fn(&mut CheckpointOptions);
        let wrong: [(&str, Change); 6] = [
            ("threads", |options| options.threads = Some(0)),
            ("threads", |options| options.threads = Some(THREADS_MAX + 1)),
            ("interval", |options| options.interval = Duration::MAX),
            ("pause_limit", |options| {
                options.pause_limit = Duration::ZERO;
            }),
            ("max_staging_bytes", |options| {
                options.max_staging_bytes = Some(1);
            }),
            ("max_bandwidth", |options| options.max_bandwidth = Some(0)),
        ];
        for (name, change) in wrong {
            let mut options = CheckpointOptions::default();
            change(&mut options);
            let error = options.validate().unwrap_err().to_string();
            assert!(error.starts_with(name), "{error}");
        }
    }

    #[test]
    fn a_protocol_is_read_back_from_its_name() {
        for protocol in Protocol::ALL {
            assert_eq!(protocol.to_string().parse::<Protocol>().unwrap(), protocol);
        }
        assert!("fast".parse::<Protocol>().is_err());
    }
}
