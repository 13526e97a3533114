//! What can go wrong in the daemon itself; calls are answered with [`RpcError`]s.

use std::io;
use std::path::{Path, PathBuf};

use crate::host::{ErrorCode, HostError};
use crate::rpc::{Code, RpcError};

/// Why the daemon could not do something for itself.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// A file, directory or socket could not be used.
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
    /// A part of livepoint failed.
    #[error(transparent)]
    Host(#[from] HostError),
    /// Something else that the message tells.
    #[error("{0}")]
    Other(String),
}

impl DaemonError {
    pub(super) fn path(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Path {
            action,
            path: path.to_owned(),
            source,
        }
    }
}

impl From<DaemonError> for RpcError {
    fn from(error: DaemonError) -> Self {
        match error {
            DaemonError::Host(error) => failed(&error),
            DaemonError::Path { ref source, .. } => {
                Self::new(Code::SystemError, format!("{error}: {source}"))
            }
            DaemonError::Other(message) => Self::new(Code::InternalError, message),
        }
    }
}

/// Returns what a client is told of an error of livepoint.
pub(super) fn failed(error: &HostError) -> RpcError {
    let code = match error.code() {
        ErrorCode::Invalid => Code::InvalidArg,
        ErrorCode::Unsupported | ErrorCode::Incompatible => Code::ConfigUnsupported,
        ErrorCode::State => Code::OperationInvalid,
        ErrorCode::Cancelled => Code::OperationAborted,
        ErrorCode::Timeout => Code::OperationTimeout,
        ErrorCode::Internal => Code::InternalError,
        _ => Code::OperationFailed,
    };
    RpcError::new(code, error.full_message())
}

/// Returns what a client is told of a domain document that is refused.
pub(super) fn refused(error: &crate::host::DomainError) -> RpcError {
    let code = if error.is_unsupported() {
        Code::ConfigUnsupported
    } else {
        Code::XmlError
    };
    RpcError::new(code, error.to_string())
}
