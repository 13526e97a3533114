//! What a caller asks for, and what comes back: plain data, the same for every edge.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::checkpoint::{self, CheckpointOptions, Protocol, Report, Statistics, Workspace};
use crate::host::HostError;
use crate::machine::{self, ShutoffReason};
use crate::store::Codec;

/// Most threads that copy and write memory: beyond it memory and disk are the limit.
const THREADS_MAX: usize = 64;

/// A number of threads: from 1 to 64.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "usize", into = "usize")]
pub struct ThreadCount(usize);

impl ThreadCount {
    /// Checks a number of threads.
    pub fn new(count: usize) -> Result<Self, HostError> {
        if (1..=THREADS_MAX).contains(&count) {
            Ok(Self(count))
        } else {
            Err(HostError::Invalid(format!(
                "{count} threads: from 1 to {THREADS_MAX} are allowed"
            )))
        }
    }

    /// Returns the number.
    pub fn get(self) -> usize {
        self.0
    }
}

impl TryFrom<usize> for ThreadCount {
    type Error = HostError;

    fn try_from(count: usize) -> Result<Self, HostError> {
        Self::new(count)
    }
}

impl From<ThreadCount> for usize {
    fn from(count: ThreadCount) -> Self {
        count.0
    }
}

/// A checkpoint, as it is asked for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[non_exhaustive]
pub struct CheckpointRequest {
    /// How to capture memory.
    pub protocol: Protocol,
    /// Absolute path of the image file, or of a directory that an image is added to; the
    /// domain's own directory where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out: Option<PathBuf>,
    /// How to compress memory, as users write it: `none`, `lz4`, `zstd:3`.
    #[serde(default = "default_codec", with = "codec_text")]
    pub codec: Codec,
    /// Threads that copy and write memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threads: Option<ThreadCount>,
    /// Milliseconds between two harvests of dirty pages.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval_ms: Option<u64>,
    /// Most bytes of memory for staged copies.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_staging_bytes: Option<u64>,
    /// Longest acceptable downtime in microseconds: refused, or failed, where it cannot be kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_downtime_us: Option<u64>,
    /// Milliseconds that the checkpoint may take: refused where more are expected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline_ms: Option<u64>,
    /// Most bytes a second that are written to the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_bandwidth: Option<u64>,
    /// Microseconds that the last copy in the pause should take at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub downtime_budget_us: Option<u64>,
    /// Absolute path of a file in the image's directory that is given up and written over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spare: Option<PathBuf>,
    /// Milliseconds without a sign of life after which a pause is ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_limit_ms: Option<u64>,
    /// Whether to wait until the image is on stable storage.
    #[serde(default = "default_durable")]
    pub durable: bool,
    /// Whether the image has only what was written since the domain's last incremental one in the
    /// same directory, where there is one. The guest's writes are tracked from then on.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub incremental: bool,
    /// How many of the domain's images to keep in the directory; older ones are removed once the
    /// new one is whole, as far as no kept one needs them. All where it is not given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep: Option<u32>,
}

/// What `<checkpoint>` may say in a document.
const ATTRIBUTES: [&str; 10] = [
    "protocol",
    "codec",
    "threads",
    "interval_ms",
    "max_staging_bytes",
    "max_downtime_us",
    "deadline_ms",
    "max_bandwidth",
    "pause_limit_ms",
    "durable",
];

/// Codecs travel as the text that users write.
mod codec_text {
    use serde::de::Error as _;
    use serde::{Deserialize as _, Deserializer, Serializer};

    use crate::store::Codec;

    #[expect(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde passes fields by reference"
    )]
    pub(super) fn serialize<S: Serializer>(codec: &Codec, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(codec)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Codec, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

fn default_codec() -> Codec {
    Codec::Lz4
}

fn default_durable() -> bool {
    true
}

impl CheckpointRequest {
    /// Makes a request with every default.
    pub fn new(protocol: Protocol) -> Self {
        Self {
            protocol,
            out: None,
            codec: default_codec(),
            threads: None,
            interval_ms: None,
            max_staging_bytes: None,
            max_downtime_us: None,
            deadline_ms: None,
            max_bandwidth: None,
            downtime_budget_us: None,
            spare: None,
            pause_limit_ms: None,
            durable: default_durable(),
            incremental: false,
            keep: None,
        }
    }

    /// Makes a request of attributes, as `<checkpoint>` in a document has them: members of this
    /// type, of those that say how a checkpoint is taken. `auto` where no protocol is among them.
    pub fn from_attributes(attributes: &[(String, String)]) -> Result<Self, HostError> {
        let invalid = |why: &dyn fmt::Display| HostError::Invalid(format!("<checkpoint>: {why}"));
        let mut members = serde_json::Map::new();
        members.insert("protocol".to_owned(), serde_json::json!(Protocol::Auto));
        for (name, value) in attributes {
            if !ATTRIBUTES.contains(&name.as_str()) {
                let known = ATTRIBUTES.join(", ");
                return Err(invalid(&format!("no attribute {name}; there are {known}")));
            }
            let number = value.parse::<u64>().map(serde_json::Value::from);
            let value = match value.as_str() {
                "true" | "yes" => true.into(),
                "false" | "no" => false.into(),
                text => number.unwrap_or_else(|_| text.into()),
            };
            members.insert(name.clone(), value);
        }
        serde_json::from_value(members.into()).map_err(|error| invalid(&error))
    }

    /// Returns the request as the engine takes it.
    pub(super) fn engine_options(&self, workspace: Workspace) -> CheckpointOptions {
        let mut options = CheckpointOptions {
            protocol: self.protocol,
            codec: self.codec,
            durable: self.durable,
            threads: self.threads.map(|threads| threads.get()),
            max_staging_bytes: self.max_staging_bytes,
            max_downtime: self.max_downtime_us.map(Duration::from_micros),
            deadline: self.deadline_ms.map(Duration::from_millis),
            max_bandwidth: self.max_bandwidth,
            spare: self.spare.clone(),
            workspace,
            ..CheckpointOptions::default()
        };
        if let Some(ms) = self.interval_ms {
            options.interval = Duration::from_millis(ms);
        }
        if let Some(ms) = self.pause_limit_ms {
            options.pause_limit = Duration::from_millis(ms);
        }
        if let Some(us) = self.downtime_budget_us {
            options.downtime_budget = Some(Duration::from_micros(us));
        }
        options
    }
}

/// A checkpoint that is complete.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct CheckpointSummary {
    /// Path of the image file.
    pub image: PathBuf,
    /// Its size in bytes.
    pub image_bytes: u64,
    /// Its own UUID.
    pub image_uuid: Uuid,
    /// How memory was captured.
    pub protocol: Protocol,
    /// What it cost, in the figures that every version reports.
    pub figures: Figures,
    /// Everything that this version measured.
    pub statistics: serde_json::Value,
}

impl CheckpointSummary {
    /// Returns all of it as JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a summary is plain data")
    }
}

/// What a checkpoint cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    /// Microseconds in which no vCPU ran, from the first kick to the last resume.
    pub downtime_us: u64,
    /// Microseconds from the start until the image was committed.
    pub total_us: u64,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// Most bytes of memory that staged copies took.
    pub staging_peak_bytes: u64,
    /// Staged pages that were written early, since staging was full.
    pub spilled_pages: u64,
    /// Pages that were all zeros, and take no room.
    pub zero_pages: u64,
}

impl From<&Statistics> for Figures {
    fn from(statistics: &Statistics) -> Self {
        Self {
            downtime_us: statistics.downtime.total_us,
            total_us: statistics.total_us,
            memory_bytes: statistics.memory_bytes,
            staging_peak_bytes: statistics.staging.peak_bytes,
            spilled_pages: statistics.staging.spilled_pages,
            zero_pages: statistics.written.zero_pages,
        }
    }
}

impl From<Report> for CheckpointSummary {
    fn from(report: Report) -> Self {
        let statistics = &*report.statistics;
        Self {
            figures: Figures::from(statistics),
            protocol: statistics.protocol,
            statistics: serde_json::to_value(statistics)
                .expect("our own statistics are plain data with string keys"),
            image: report.image.path,
            image_bytes: report.image.image_bytes,
            image_uuid: report.image.image_uuid,
        }
    }
}

/// How far a job is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobProgress {
    /// What it is doing: one word, for people.
    pub phase: String,
    /// Bytes of guest memory that the scan has passed.
    pub scanned_bytes: u64,
    /// Bytes of guest memory in all.
    pub total_bytes: u64,
    /// Bytes written to the image so far.
    pub bytes_written: u64,
    /// Expected milliseconds to the end of the scan, where they can be told.
    pub eta_ms: Option<u64>,
}

impl From<checkpoint::Progress> for JobProgress {
    fn from(progress: checkpoint::Progress) -> Self {
        Self {
            phase: progress.phase.to_string(),
            scanned_bytes: progress.scanned_bytes,
            total_bytes: progress.memory_bytes,
            bytes_written: progress.written_bytes,
            eta_ms: progress
                .eta
                .and_then(|eta| u64::try_from(eta.as_millis()).ok()),
        }
    }
}

/// What a domain's machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MachineState {
    /// Defined, and never started.
    Created,
    /// Its vCPUs run.
    Running,
    /// Its vCPUs are held by its user.
    Paused,
    /// It has ended.
    Shutoff,
    /// It has ended by a fault of the guest.
    Crashed,
}

impl From<&machine::MachineState> for MachineState {
    fn from(state: &machine::MachineState) -> Self {
        match state {
            machine::MachineState::Created => Self::Created,
            machine::MachineState::Running => Self::Running,
            machine::MachineState::Paused => Self::Paused,
            machine::MachineState::Shutoff {
                reason: ShutoffReason::Crashed(_),
            }
            | machine::MachineState::Crashed { .. } => Self::Crashed,
            machine::MachineState::Shutoff { .. } => Self::Shutoff,
        }
    }
}

/// How a machine has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EndReason {
    /// By itself, or by its user; says which.
    Shutoff(String),
    /// By a fault of the guest or of the host; says which.
    Crashed(String),
}

impl EndReason {
    /// Returns how a machine in `state` has ended, if it has.
    pub(super) fn of(state: &machine::MachineState) -> Option<Self> {
        match state {
            machine::MachineState::Shutoff { reason } => Some(match reason {
                ShutoffReason::Crashed(_) | ShutoffReason::Failed(_) => {
                    Self::Crashed(reason.to_string())
                }
                _ => Self::Shutoff(reason.to_string()),
            }),
            machine::MachineState::Crashed { reason } => Some(Self::Crashed(reason.clone())),
            _ => None,
        }
    }
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "not started",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Shutoff => "shut off",
            Self::Crashed => "crashed",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_takes_its_defaults_from_json_that_names_only_the_protocol() {
        let request: CheckpointRequest = serde_json::from_str(r#"{"protocol":"stop"}"#).unwrap();
        assert_eq!(request.protocol, Protocol::Stop);
        assert_eq!(request.codec, Codec::Lz4);
        assert!(request.durable);
    }

    #[test]
    fn no_threads_and_too_many_are_refused_in_json_too() {
        for threads in ["0", "65"] {
            let json = format!(r#"{{"protocol":"stop","threads":{threads}}}"#);
            assert!(serde_json::from_str::<CheckpointRequest>(&json).is_err());
        }
    }
}
