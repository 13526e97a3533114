//! The messages of the control protocol; docs/control-protocol.md is its reference.
//!
//! One JSON object a line. The server speaks first with a [`Greeting`]; then every [`Call`] gets
//! exactly one [`Reply`] with its id, in order, after any number of [`Progress`] lines.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::host::{
    CheckpointRequest, CheckpointSummary, DirtyRateRequest, DirtyRateStatus, DomainEvent,
    DomainTexts, ErrorCode, GuestMemoryUse, JobProgress, MachineState, PeriodicStatus,
};

/// The newest protocol version that this build speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// The oldest protocol version that this build speaks.
pub const PROTOCOL_VERSION_MIN: u32 = 1;

/// The longest line, in bytes: domain XML is at most 1 MiB, and JSON escapes may double it.
pub const LINE_BYTES_MAX: usize = 4 << 20;

/// The first line of a connection, from the server.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Greeting {
    /// Newest protocol version that the server speaks.
    pub livepoint_control: u32,
    /// Oldest protocol version that the server speaks.
    pub livepoint_control_min: u32,
    /// The server's own version, for people.
    pub version: String,
    /// The domain's name.
    pub name: String,
    /// The domain's UUID.
    pub uuid: Uuid,
    /// The process that runs the domain.
    pub pid: u32,
}

/// A request, from the client.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    /// Chosen by the client; comes back in the reply.
    pub id: u64,
    /// What to do.
    #[serde(flatten)]
    pub method: Method,
}

/// What a client can ask for.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "method", content = "params", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Method {
    /// The domain's state; answered with [`Status`].
    Status,
    /// The domain's XML as it runs; answered with a string.
    DumpXml,
    /// Stops the vCPUs until `resume`.
    Pause,
    /// Undoes `pause`.
    Resume,
    /// Presses the ACPI power button.
    Shutdown,
    /// Resets the machine, as its reset button would.
    Reset,
    /// Gives each vCPU a non-maskable interrupt.
    InjectNmi,
    /// Ends the machine at once.
    Destroy,
    /// Starts a checkpoint; answered with a [`JobStarted`] at once.
    Checkpoint(CheckpointRequest),
    /// The current job's progress; answered with a [`JobProgress`].
    JobProgress(JobId),
    /// Cancels a job; answered once the cancel is asked for.
    JobCancel(JobId),
    /// Waits for a job's end with progress lines meanwhile; answered with a
    /// [`CheckpointSummary`], or with the job's error.
    JobWait(JobId),
    /// Puts the domain back to an image; answered with a [`RewindSummary`] once it goes on.
    ///
    /// [`RewindSummary`]: crate::host::RewindSummary
    Rewind(RewindTo),
    /// Tells what happens to the domain until it ends, in lines of their own; answered then.
    Events,
    /// Asks the guest to use so much memory, by its balloon.
    SetMemory(MemoryBytes),
    /// Asks the guest every so many seconds how it uses its memory; `status` has its answer.
    SetMemoryStatsPeriod(Seconds),
    /// Replaces the document's title, description and metadata.
    SetTexts(DomainTexts),
    /// Begins to measure how fast the domain writes its memory; `status` has what comes of it.
    MeasureDirtyRate(DirtyRateRequest),
}

/// Which image a domain is put back to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RewindTo {
    /// Absolute path of the image, or of a directory: then its newest image. Where it is not given,
    /// the last incremental checkpoint of the domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<PathBuf>,
}

/// Names a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobId {
    /// Number of the job within this process, from 1.
    pub job: u64,
}

/// A size of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryBytes {
    /// In bytes.
    pub bytes: u64,
}

/// A length of time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seconds {
    /// In seconds; 0 for never.
    pub seconds: u32,
}

/// The answer to [`Method::Checkpoint`].
pub type JobStarted = JobId;

/// The answer to [`Method::Status`].
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The domain's name.
    pub name: String,
    /// The domain's UUID.
    pub uuid: Uuid,
    /// Its number among those that run.
    #[serde(default)]
    pub id: Option<u32>,
    /// The process that runs it.
    pub pid: u32,
    /// Its state.
    pub state: MachineState,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// How much of it the guest has given back by its balloon; none where it has no balloon.
    #[serde(default)]
    pub given_bytes: Option<u64>,
    /// How the guest uses its memory, by its own account; none where it has no balloon, or no
    /// driver of it that answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_use: Option<GuestMemoryUse>,
    /// Where each console can be reached, serial ports first: a pty's or a socket's path.
    pub consoles: Vec<PathBuf>,
    /// What the guest has asked of each disk.
    #[serde(default)]
    pub disks: Vec<DiskUse>,
    /// What passed each network interface, in the order of their slots.
    #[serde(default)]
    pub interfaces: Vec<InterfaceUse>,
    /// What came of the checkpoints that its document asks for; none where it asks for none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub periodic: Option<PeriodicStatus>,
    /// The job that runs, if any.
    pub job: Option<JobId>,
    /// How fast the domain writes its memory, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dirty_rate: Option<DirtyRateStatus>,
}

/// What a guest has asked of a disk since its machine was started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskUse {
    /// The disk's name, as in `vda`.
    pub target: String,
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes written.
    pub written_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Requests that storage did not carry out.
    pub errors: u64,
    /// Nanoseconds that the reads took.
    #[serde(default)]
    pub read_ns: u64,
    /// Nanoseconds that the writes took.
    #[serde(default)]
    pub write_ns: u64,
    /// Nanoseconds that the flushes took.
    #[serde(default)]
    pub flush_ns: u64,
}

/// What passed a network interface since its machine was started; from the guest's side.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InterfaceUse {
    /// Its hardware address.
    pub mac: String,
    /// The host's interface.
    pub tap: Option<String>,
    /// Packets that the guest received.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Packets that the guest had no room for, or that came while the link was down.
    pub received_dropped: u64,
    /// Packets that the guest sent.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Packets of the guest that the host refused.
    pub sent_errors: u64,
    /// Packets of the guest while the link was down.
    pub sent_dropped: u64,
}

/// The answer to a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Reply {
    /// The call's id.
    pub id: u64,
    /// What came of it.
    #[serde(flatten)]
    pub outcome: Outcome,
}

/// What came of a call.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It was done; the method says what the value is.
    Result(serde_json::Value),
    /// It was not.
    Error(ErrorReply),
    /// Not the answer yet: how far a [`Method::JobWait`]'s job is.
    Progress(JobProgress),
    /// Not the answer yet: what a [`Method::Events`] waits for.
    Event(DomainEvent),
}

/// Why a call was not done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ErrorReply {
    /// The kind of error, for programs.
    pub code: ErrorCode,
    /// What went wrong, for people: the whole chain of causes.
    pub message: String,
}

/// The answer to [`Method::JobWait`].
pub type JobDone = CheckpointSummary;
