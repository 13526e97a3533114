//! Status codes, error text and the guard around every exported function.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::host::{ErrorCode, HostError};

symbol_versions!("0.1":
    lvp_error_message,
);

/// What came of a call. Negative values are errors; a program must expect values that it does not
/// know, since later versions may add some. Values are never reused.
pub type lvp_status = i32;

/// Done.
pub const LVP_OK: lvp_status = 0;
/// An argument is NULL or malformed.
pub const LVP_E_INVALID: lvp_status = -10;
/// Not supported (yet).
pub const LVP_E_UNSUPPORTED: lvp_status = -11;
/// There is no such thing.
pub const LVP_E_NOT_FOUND: lvp_status = -12;
/// The machine's state does not allow it.
pub const LVP_E_STATE: lvp_status = -20;
/// Somebody else uses the machine, image or file.
pub const LVP_E_BUSY: lvp_status = -21;
/// A callback of the caller's failed; the text has what it returned.
pub const LVP_E_CALLBACK: lvp_status = -22;
/// This host lacks a device, a kernel feature or a permission.
pub const LVP_E_HOST: lvp_status = -30;
/// A system call on a file failed.
pub const LVP_E_IO: lvp_status = -31;
/// An image is damaged, or not an image.
pub const LVP_E_CORRUPT: lvp_status = -40;
/// An image needs what this host lacks.
pub const LVP_E_INCOMPATIBLE: lvp_status = -41;
/// The job was cancelled.
pub const LVP_E_CANCELLED: lvp_status = -50;
/// Not done in time.
pub const LVP_E_TIMEOUT: lvp_status = -51;
/// A bug in livepoint.
pub const LVP_E_INTERNAL: lvp_status = -90;

thread_local! {
    static LAST_ERROR: RefCell<CString> = RefCell::new(CString::default());
}

/// Returns the text of the last error on this thread, in English, on one line.
///
/// Owned by the library; valid until the next `lvp_` call on this thread. Empty when none has
/// failed. Never NULL. A call that succeeds leaves it as it was. Does not block. Thread-safe:
/// every thread has its own.
///
/// Since: 0.1
#[unsafe(no_mangle)]
pub extern "C" fn lvp_error_message() -> *const c_char {
    LAST_ERROR.with_borrow(|text| text.as_ptr())
}

/// An error on its way to the caller.
#[derive(Debug)]
pub(super) struct Failure {
    status: lvp_status,
    message: String,
}

impl Failure {
    pub fn invalid(message: impl Into<String>) -> Self {
        Self {
            status: LVP_E_INVALID,
            message: message.into(),
        }
    }

    pub fn state(message: impl Into<String>) -> Self {
        Self {
            status: LVP_E_STATE,
            message: message.into(),
        }
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self {
            status: LVP_E_NOT_FOUND,
            message: message.into(),
        }
    }

    pub fn timeout(message: impl Into<String>) -> Self {
        Self {
            status: LVP_E_TIMEOUT,
            message: message.into(),
        }
    }

    /// Keeps the message for [`lvp_error_message`] and returns the status.
    pub fn report(self) -> lvp_status {
        let text = CString::new(self.message.replace('\0', "?"))
            .expect("every zero byte has just been replaced");
        LAST_ERROR.set(text);
        self.status
    }
}

impl From<HostError> for Failure {
    fn from(error: HostError) -> Self {
        Self {
            status: status_of(error.code()),
            message: error.full_message(),
        }
    }
}

pub(super) fn status_of(code: ErrorCode) -> lvp_status {
    match code {
        ErrorCode::Invalid => LVP_E_INVALID,
        ErrorCode::Unsupported => LVP_E_UNSUPPORTED,
        ErrorCode::NotFound => LVP_E_NOT_FOUND,
        ErrorCode::State => LVP_E_STATE,
        ErrorCode::Busy => LVP_E_BUSY,
        ErrorCode::Host => LVP_E_HOST,
        ErrorCode::Io => LVP_E_IO,
        ErrorCode::Corrupt => LVP_E_CORRUPT,
        ErrorCode::Incompatible => LVP_E_INCOMPATIBLE,
        ErrorCode::Callback => LVP_E_CALLBACK,
        ErrorCode::Cancelled => LVP_E_CANCELLED,
        ErrorCode::Timeout => LVP_E_TIMEOUT,
        ErrorCode::Internal => LVP_E_INTERNAL,
    }
}

/// Runs the body of an exported function: its error becomes a status and the thread's message,
/// and a panic becomes `LVP_E_INTERNAL`, since none may unwind into C.
pub(super) fn guard(body: impl FnOnce() -> Result<(), Failure>) -> lvp_status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => LVP_OK,
        Ok(Err(failure)) => failure.report(),
        Err(panic) => {
            let said = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_default();
            let message = format!("a bug in livepoint: {said}");
            Failure {
                status: LVP_E_INTERNAL,
                message,
            }
            .report()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn message() -> String {
        // SAFETY: the pointer is to this thread's CString, which nothing changes meanwhile.
        unsafe { CStr::from_ptr(lvp_error_message()) }
            .to_str()
            .unwrap()
            .to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_and_a_message() {
        assert_eq!(guard(|| panic!("boom")), LVP_E_INTERNAL);
        assert_eq!(message(), "a bug in livepoint: boom");
    }

    #[test]
    fn a_success_leaves_the_last_message() {
        assert_eq!(guard(|| Err(Failure::invalid("first"))), LVP_E_INVALID);
        assert_eq!(guard(|| Ok(())), LVP_OK);
        assert_eq!(message(), "first");
    }

    #[test]
    fn a_zero_byte_does_not_cut_a_message() {
        assert_eq!(guard(|| Err(Failure::invalid("a\0b"))), LVP_E_INVALID);
        assert_eq!(message(), "a?b");
    }
}
