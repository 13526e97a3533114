//! Errors as libvirt's clients know them: a code, where it comes from, and the full text.

use super::xdr::{Encode, Encoder};

/// What went wrong (`virErrorNumber`). Clients act on some of these, such as [`Code::NoDomain`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Code {
    /// Anything that no other code fits.
    InternalError = 1,
    /// The driver does not have the function.
    NoSupport = 3,
    /// The driver does not know the URI.
    NoConnect = 5,
    /// An argument is malformed.
    InvalidArg = 8,
    /// What was asked for was tried, and failed.
    OperationFailed = 9,
    /// A document is malformed.
    XmlError = 27,
    /// The connection is read-only.
    OperationDenied = 29,
    /// A system call failed.
    SystemError = 38,
    /// The call itself is malformed.
    Rpc = 39,
    /// There is no such domain.
    NoDomain = 42,
    /// There is no such network.
    NoNetwork = 43,
    /// There is no such storage pool.
    NoStoragePool = 49,
    /// The domain's state does not allow it.
    OperationInvalid = 55,
    /// The configuration asks for what the driver does not have.
    ConfigUnsupported = 67,
    /// Something took too long.
    OperationTimeout = 68,
    /// There is no such snapshot.
    NoDomainSnapshot = 72,
    /// An argument is understood, and not supported.
    ArgumentUnsupported = 74,
    /// A revert would lose what cannot be had back.
    SnapshotRevertRisky = 77,
    /// The user ended it.
    OperationAborted = 78,
    /// The domain has no such metadata.
    NoDomainMetadata = 80,
    /// The operation is not supported in this state or configuration.
    OperationUnsupported = 84,
    /// The domain has no such device.
    DeviceMissing = 99,
    /// There is no such disk checkpoint.
    NoDomainCheckpoint = 103,
}

/// Where an error comes from (`virErrorDomain`): it chooses the prefix that clients print.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Origin {
    /// The protocol.
    Rpc = 7,
    /// The driver.
    Domain = 20,
}

/// An error that a call is answered with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// What went wrong.
    pub code: Code,
    /// Where it comes from.
    pub origin: Origin,
    /// The full text; clients add nothing to it.
    pub message: String,
}

impl RpcError {
    /// Makes an error of the driver, with the words that libvirt puts before the details.
    pub fn new(code: Code, details: impl Into<String>) -> Self {
        let details = details.into();
        let message = match prefix(code) {
            Some(prefix) => format!("{prefix}: {details}"),
            None => details,
        };
        Self {
            code,
            origin: Origin::Domain,
            message,
        }
    }

    /// Makes an error of the protocol itself.
    pub fn protocol(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            origin: Origin::Rpc,
            message: message.into(),
        }
    }
}

/// What libvirt's messages begin with, by code (`virErrorMsg`).
fn prefix(code: Code) -> Option<&'static str> {
    Some(match code {
        Code::InternalError => "internal error",
        Code::NoSupport => "this function is not supported by the connection driver",
        Code::NoConnect => "no connection driver available for",
        Code::InvalidArg => "invalid argument",
        Code::OperationFailed => "operation failed",
        Code::XmlError => "XML error",
        Code::OperationDenied => "operation forbidden",
        Code::SystemError | Code::Rpc => return None,
        Code::NoDomain => "Domain not found",
        Code::NoNetwork => "Network not found",
        Code::NoStoragePool => "Storage pool not found",
        Code::OperationInvalid => "Requested operation is not valid",
        Code::ConfigUnsupported => "unsupported configuration",
        Code::OperationTimeout => "Timed out during operation",
        Code::NoDomainSnapshot => "Domain snapshot not found",
        Code::ArgumentUnsupported => "argument unsupported",
        Code::SnapshotRevertRisky => "revert requires force",
        Code::OperationAborted => "operation aborted",
        Code::NoDomainMetadata => "metadata not found",
        Code::OperationUnsupported => "Operation not supported",
        Code::DeviceMissing => "device not found",
        Code::NoDomainCheckpoint => "Domain checkpoint not found",
    })
}

/// Level of an error, other than a warning (`VIR_ERR_ERROR`).
const LEVEL_ERROR: i32 = 2;

impl Encode for RpcError {
    fn encode(&self, out: &mut Encoder) {
        let absent = None::<i32>;
        (self.code as i32, self.origin as i32, Some(&*self.message)).encode(out);
        // The domain that it is about: clients know which one they asked for.
        (LEVEL_ERROR, absent).encode(out);
        // libvirt has its message's format string here, and its arguments.
        (Some("%s"), Some(&*self.message), None::<&str>).encode(out);
        (-1_i32, -1_i32, absent).encode(out);
    }
}
