//! What can go wrong at the facade, with a code for programs.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::CheckpointError;
use crate::domain::{DomainError, OtherGuest};
use crate::foreign::ForeignError;
use crate::guest::{GuestError, ImageError};
use crate::kvmstate::KvmStateError;
use crate::machine::virtio::blk::DiskError;
use crate::machine::virtio::net::NetError;
use crate::machine::{MachineError, describe_chain};
use crate::restore::core::CoreError;
use crate::restore::eager::FillError as RestoreError;
use crate::state::StateError;
use crate::store::StoreError;
use crate::sys::lock::LockError;

/// The kind of an error: what a program can react to. The message says the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// An argument, a domain XML or a call is malformed.
    Invalid,
    /// What was asked for is not supported (yet).
    Unsupported,
    /// No such domain, job or file.
    NotFound,
    /// The domain's state does not allow it.
    State,
    /// Somebody else uses the domain, image or file.
    Busy,
    /// A device, kernel feature or permission is missing on this host.
    Host,
    /// A system call on a file or socket failed.
    Io,
    /// An image is damaged or not an image.
    Corrupt,
    /// The image needs what this host lacks.
    Incompatible,
    /// A callback of the caller's failed.
    Callback,
    /// The work was cancelled.
    Cancelled,
    /// Something took longer than it may.
    Timeout,
    /// A bug in livepoint.
    Internal,
}

/// What went wrong at the facade.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// An argument is malformed.
    #[error("{0}")]
    Invalid(String),
    /// It is understood, and not supported yet.
    #[error("{0}")]
    Unsupported(String),
    /// A file or directory could not be used.
    #[error("could not {action} {}", path.display())]
    Path {
        /// What was tried.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The domain XML is refused.
    #[error("{}", match path { Some(path) => format!("{}", path.display()), None => "domain XML".to_owned() })]
    Domain {
        /// The file it came from, if any.
        path: Option<PathBuf>,
        /// Why, with line and element.
        #[source]
        source: Box<DomainError>,
    },
    /// The machine could not be built or driven.
    #[error(transparent)]
    Machine(Box<MachineError>),
    /// The checkpoint failed.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The image could not be used.
    #[error(transparent)]
    Store(Box<StoreError>),
    /// The image could not be restored.
    #[error(transparent)]
    Restore(Box<RestoreError>),
    /// The image could not be written as a core file.
    #[error(transparent)]
    Core(Box<CoreError>),
    /// The image that has a disk could not be used.
    #[error(transparent)]
    Disk(#[from] ImageError),
    /// A call about another VMM's VM failed.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// A document describes another machine than the one that a guest is in.
    #[error(transparent)]
    OtherGuest(#[from] OtherGuest),
    /// The domain, its name or its UUID is in use.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The domain's state does not allow it.
    #[error("the domain is {state}: {wanted}")]
    State {
        /// The state that it is in.
        state: String,
        /// What would be needed.
        wanted: &'static str,
    },
    /// A checkpoint of the domain runs already.
    #[error("checkpoint job {job} of this domain still runs; wait for it or cancel it")]
    JobRunning {
        /// Its number.
        job: u64,
    },
    /// The process ran out of something.
    #[error("could not make {what}")]
    Resource {
        /// What was to be made.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The domain has no serial console of this number.
    #[error("there is no console {number}: the domain has {count}")]
    NoConsole {
        /// The number asked for.
        number: usize,
        /// How many there are.
        count: usize,
    },
    /// The domain is being put back to an image.
    #[error("the domain is being put back to an image; wait for that")]
    Rewinding,
    /// The domain's dirty rate is being measured.
    #[error("the domain's dirty rate is being measured; wait for that")]
    MeasuringDirtyRate,
    /// The domain's incremental checkpoints need the log of its writes.
    #[error("the domain's writes are tracked for its next incremental checkpoint")]
    Tracked,
    /// An image has no guest memory at an address.
    #[error("the image has no memory at guest physical address {gpa:#x}")]
    NoMemoryAt {
        /// The first such address.
        gpa: u64,
    },
    /// No job has this number.
    #[error("there is no job {job}")]
    NoSuchJob {
        /// The number asked for.
        job: u64,
    },
    /// No process runs the domain.
    #[error("no domain {name:?} is running")]
    NotRunning {
        /// The name asked for.
        name: String,
    },
    /// This host lacks what an image needs.
    #[error("this host cannot run the image: {}", .0.join("; "))]
    Incompatible(Vec<String>),
    /// The domain's process sent something that is not of the protocol.
    #[error("the domain's control socket: {0}")]
    Protocol(String),
    /// The connection to the domain's process broke.
    #[error("the connection to the domain's process broke")]
    Connection {
        /// How.
        #[source]
        source: io::Error,
    },
    /// The domain's process refused or failed.
    #[error("{message}")]
    Remote {
        /// The kind of error.
        code: ErrorCode,
        /// The process's own words.
        message: String,
    },
}

// Boxed, so that every result of the facade stays small.
impl From<MachineError> for HostError {
    fn from(error: MachineError) -> Self {
        Self::Machine(Box::new(error))
    }
}

impl From<StoreError> for HostError {
    fn from(error: StoreError) -> Self {
        Self::Store(Box::new(error))
    }
}

impl From<RestoreError> for HostError {
    fn from(error: RestoreError) -> Self {
        Self::Restore(Box::new(error))
    }
}

impl From<CoreError> for HostError {
    fn from(error: CoreError) -> Self {
        Self::Core(Box::new(error))
    }
}

impl HostError {
    /// Makes an error about a path.
    pub fn path(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Path {
            action,
            path: path.to_owned(),
            source,
        }
    }

    /// Returns the kind of the error.
    pub fn code(&self) -> ErrorCode {
        match self {
            Self::Invalid(_) => ErrorCode::Invalid,
            Self::JobRunning { .. }
            | Self::Rewinding
            | Self::MeasuringDirtyRate
            | Self::Tracked => ErrorCode::Busy,
            Self::NotRunning { .. }
            | Self::NoSuchJob { .. }
            | Self::NoConsole { .. }
            | Self::NoMemoryAt { .. } => ErrorCode::NotFound,
            Self::Resource { .. } => ErrorCode::Host,
            Self::Unsupported(_) | Self::OtherGuest(_) => ErrorCode::Unsupported,
            Self::Path { source, .. } | Self::Connection { source } => io_code(source),
            Self::Domain { source, .. } if source.is_unsupported() => ErrorCode::Unsupported,
            Self::Domain { .. } => ErrorCode::Invalid,
            Self::Machine(error) => machine_code(error),
            Self::Checkpoint(error) => checkpoint_code(error),
            Self::Store(error) => store_code(error),
            Self::Restore(error) => match &**error {
                RestoreError::Layout { .. } => ErrorCode::Corrupt,
                RestoreError::NotLazy { .. } => ErrorCode::Invalid,
                RestoreError::Late(error) => store_code(error),
                RestoreError::Store(error) => store_code(error),
            },
            Self::Core(error) => match &**error {
                CoreError::Store(error) => store_code(error),
                CoreError::State(_) => ErrorCode::Corrupt,
                CoreError::Write(error) => io_code(error),
            },
            Self::Disk(error) => image_code(error),
            Self::Foreign(error) => foreign_code(error),
            Self::Lock(LockError::Held { .. }) => ErrorCode::Busy,
            Self::Lock(LockError::Io { source, .. }) => io_code(source),
            Self::State { .. } => ErrorCode::State,
            Self::Incompatible(_) => ErrorCode::Incompatible,
            Self::Protocol(_) => ErrorCode::Internal,
            Self::Remote { code, .. } => *code,
        }
    }

    /// Names the file that a refused domain came from.
    pub fn in_file(self, file: &Path) -> Self {
        match self {
            Self::Domain { source, .. } => Self::Domain {
                path: Some(file.to_owned()),
                source,
            },
            other => other,
        }
    }

    /// Returns the error and its causes as one line.
    pub fn full_message(&self) -> String {
        describe_chain(self)
    }
}

fn io_code(error: &io::Error) -> ErrorCode {
    match error.kind() {
        io::ErrorKind::NotFound => ErrorCode::NotFound,
        _ => ErrorCode::Io,
    }
}

fn foreign_code(error: &ForeignError) -> ErrorCode {
    match error {
        ForeignError::Invalid(_) => ErrorCode::Invalid,
        ForeignError::Kvm { .. } => ErrorCode::Host,
        ForeignError::Busy { .. } | ForeignError::InUse { .. } => ErrorCode::Busy,
        ForeignError::NotEntered { .. } | ForeignError::OtherThread { .. } => ErrorCode::State,
        ForeignError::State(KvmStateError::State(StateError::Duplicate { .. })) => {
            ErrorCode::Invalid
        }
        ForeignError::State(KvmStateError::State(StateError::Missing { .. })) => {
            ErrorCode::NotFound
        }
        ForeignError::State(KvmStateError::State(_)) => ErrorCode::Corrupt,
        ForeignError::State(_) => ErrorCode::Incompatible,
    }
}

fn machine_code(error: &MachineError) -> ErrorCode {
    match error {
        MachineError::Rewind { source } => rewind_code(source.as_ref()),
        MachineError::NoKvm { .. }
        | MachineError::MissingCapability { .. }
        | MachineError::Kvm { .. }
        | MachineError::Thread(_)
        | MachineError::NotConfined(_)
        | MachineError::Memory(_)
        | MachineError::Cpuid(_) => ErrorCode::Host,
        MachineError::Spec { .. } | MachineError::NothingToBoot | MachineError::Boot(_) => {
            ErrorCode::Invalid
        }
        MachineError::OtherMachine { .. } | MachineError::State(_) => ErrorCode::Corrupt,
        MachineError::Disk { source, .. } => disk_code(source),
        MachineError::Net { source, .. } => net_code(source),
        MachineError::Serial { .. } | MachineError::Console { .. } | MachineError::Device(_) => {
            ErrorCode::Io
        }
        MachineError::KvmState(_) => ErrorCode::Incompatible,
        MachineError::WrongState(_) => ErrorCode::State,
        MachineError::Gate(_) | MachineError::Drain(_) => ErrorCode::Timeout,
    }
}

fn rewind_code(error: &(dyn std::error::Error + Send + Sync + 'static)) -> ErrorCode {
    if let Some(error) = error.downcast_ref() {
        return store_code(error);
    }
    if let Some(error) = error.downcast_ref() {
        return checkpoint_code(error);
    }
    match error.downcast_ref() {
        Some(RestoreError::Store(error)) => store_code(error),
        Some(RestoreError::Late(error)) => store_code(error),
        Some(RestoreError::Layout { .. }) => ErrorCode::Invalid,
        _ => ErrorCode::Internal,
    }
}

fn disk_code(error: &DiskError) -> ErrorCode {
    match error {
        DiskError::NoDisk { .. } => ErrorCode::Invalid,
        DiskError::File(error) => image_code(error),
    }
}

fn image_code(error: &ImageError) -> ErrorCode {
    match error {
        ImageError::InUse { .. } => ErrorCode::Busy,
        ImageError::Unusable { .. } => ErrorCode::Invalid,
        ImageError::Io { source, .. } => io_code(source),
    }
}

fn net_code(error: &NetError) -> ErrorCode {
    match error {
        NetError::NoTap { .. } => ErrorCode::NotFound,
        NetError::Bridge { source, .. } | NetError::Tap { source, .. } => match source.kind() {
            std::io::ErrorKind::ResourceBusy => ErrorCode::Busy,
            std::io::ErrorKind::PermissionDenied => ErrorCode::Host,
            _ => io_code(source),
        },
    }
}

fn checkpoint_code(error: &CheckpointError) -> ErrorCode {
    match error {
        CheckpointError::Cancelled => ErrorCode::Cancelled,
        CheckpointError::Busy => ErrorCode::Busy,
        CheckpointError::InvalidOption { .. } => ErrorCode::Invalid,
        CheckpointError::Guest { source, .. } => match &**source {
            GuestError::State { .. } => ErrorCode::State,
            GuestError::Gate(_) | GuestError::Drain { .. } => ErrorCode::Timeout,
            GuestError::NotCheckpointable { .. } => ErrorCode::Unsupported,
            GuestError::Save { .. } => ErrorCode::Host,
            GuestError::Vmm { .. } => ErrorCode::Callback,
        },
        CheckpointError::Store { source, .. } => store_code(source),
        CheckpointError::Disk { source, .. } => io_code(source),
        CheckpointError::DirtyLog { .. } | CheckpointError::Resource { .. } => ErrorCode::Host,
        CheckpointError::PauseExpired { .. } => ErrorCode::Timeout,
        CheckpointError::Protection { .. } => ErrorCode::Host,
        CheckpointError::StallExpired { .. }
        | CheckpointError::DowntimeExceeded { .. }
        | CheckpointError::Refused { .. }
        | CheckpointError::NotConverged { .. } => ErrorCode::Timeout,
        CheckpointError::Panicked { .. } => ErrorCode::Internal,
    }
}

fn store_code(error: &StoreError) -> ErrorCode {
    match error {
        StoreError::Io { source, .. } => io_code(source),
        StoreError::Damaged { .. } | StoreError::State { .. } => ErrorCode::Corrupt,
        StoreError::InUse { .. } | StoreError::Named { .. } => ErrorCode::Busy,
        StoreError::Layer { source, .. } => store_code(source),
        StoreError::EmptyChain { .. } => ErrorCode::NotFound,
        StoreError::NotReplaceable { .. } => ErrorCode::Invalid,
        StoreError::NoSpace { .. } => ErrorCode::Io,
        StoreError::Unwritable { .. }
        | StoreError::OutsideRegions { .. }
        | StoreError::Uncovered { .. }
        | StoreError::Incomplete { .. } => ErrorCode::Internal,
    }
}
