//! What the library has to say beyond errors.

use std::cell::Cell;
use std::ffi::{CString, c_char, c_void};
use std::sync::{PoisonError, RwLock};

use super::status::{Failure, guard, lvp_status};

symbol_versions!("0.1":
    lvp_log_set,
);

/// How important a message is: the lower, the more.
pub type lvp_log_level = u32;
/// Nothing at all.
pub const LVP_LOG_NONE: lvp_log_level = 0;
/// Something failed that no call could report.
pub const LVP_LOG_ERROR: lvp_log_level = 1;
/// Something is not as it should be.
pub const LVP_LOG_WARNING: lvp_log_level = 2;
/// Something that a user may want to know.
pub const LVP_LOG_INFO: lvp_log_level = 3;
/// What helps to find a bug.
pub const LVP_LOG_DEBUG: lvp_log_level = 4;

/// Receives a message: `target` is the part of the library that says it, `message` is one line of
/// English. Both are the library's and valid during the call. Called from any thread, several at a
/// time, also while the library holds locks of its own: must not call the library but for
/// lvp_version(), and must not unwind or longjmp() out.
pub type lvp_log_callback = Option<
    unsafe extern "C" fn(
        user_data: *mut c_void,
        level: lvp_log_level,
        target: *const c_char,
        message: *const c_char,
    ),
>;

struct Sink {
    callback: unsafe extern "C" fn(*mut c_void, lvp_log_level, *const c_char, *const c_char),
    user_data: *mut c_void,
}

// SAFETY: the header says that the callback is called, with `user_data`, from any thread; whoever
// registers it promises that it may be.
unsafe impl Send for Sink {}
// SAFETY: as above; it is said to be called several times at a time.
unsafe impl Sync for Sink {}

/// The one logger that the crate `log` can have, and where it goes to now.
struct Logger(RwLock<Option<Sink>>);

static LOGGER: Logger = Logger(RwLock::new(None));

thread_local! {
    /// Whether this thread is in the callback.
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Marks the thread as in the callback until dropped.
struct Inside;

impl Inside {
    fn enter() -> Option<Self> {
        (!INSIDE.replace(true)).then_some(Self)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.set(false);
    }
}

impl log::Log for Logger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        // Crates below the library have things of their own to say: not to its users.
        if !self.enabled(record.metadata()) || !record.target().starts_with("livepoint") {
            return;
        }
        // What the callback makes the library say would call it again without end.
        let Some(_inside) = Inside::enter() else {
            return;
        };
        let sink = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(sink) = sink.as_ref() else {
            return;
        };
        let text = |text: String| {
            CString::new(text.replace(['\0', '\n'], "?")).expect("zero bytes have been replaced")
        };
        let target = text(record.target().to_owned());
        let message = text(record.args().to_string());
        let level = match record.level() {
            log::Level::Error => LVP_LOG_ERROR,
            log::Level::Warn => LVP_LOG_WARNING,
            log::Level::Info => LVP_LOG_INFO,
            log::Level::Debug | log::Level::Trace => LVP_LOG_DEBUG,
        };
        // SAFETY: the caller's function and data, valid until lvp_log_set() has replaced them,
        // which waits for this lock; the texts live over the call.
        unsafe {
            (sink.callback)(sink.user_data, level, target.as_ptr(), message.as_ptr());
        }
    }

    fn flush(&self) {}
}

/// Says where the library's messages go. Without this call they go nowhere.
///
/// This is the one setting that the whole process shares, not a handle: some messages belong to no
/// handle. It is this library's alone: no other library's logger is touched.
///
/// @param callback   receives the messages; NULL: they go nowhere again
/// @param user_data  handed to the callback; not looked at
/// @param level      the least important ones that are wanted: an LVP_LOG_ value
///
/// Returns LVP_OK, and the callback that was set before is called no more; LVP_E_INVALID;
/// LVP_E_STATE (called from the callback, or the library is part of a Rust program that has a
/// logger). Blocks while calls of the former callback are under way. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// The callback and `user_data` stay valid until another call has replaced them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_log_set(
    callback: lvp_log_callback,
    user_data: *mut c_void,
    level: lvp_log_level,
) -> lvp_status {
    guard(|| {
        let filter = match level {
            LVP_LOG_NONE => log::LevelFilter::Off,
            LVP_LOG_ERROR => log::LevelFilter::Error,
            LVP_LOG_WARNING => log::LevelFilter::Warn,
            LVP_LOG_INFO => log::LevelFilter::Info,
            LVP_LOG_DEBUG => log::LevelFilter::Debug,
            other => return Err(Failure::invalid(format!("there is no log level {other}"))),
        };
        if INSIDE.get() {
            return Err(Failure::state("called from the log callback"));
        }
        let mut sink = LOGGER.0.write().unwrap_or_else(PoisonError::into_inner);
        let is_ours = || std::ptr::addr_eq(log::logger(), &raw const LOGGER);
        // The second time it is set already.
        if log::set_logger(&LOGGER).is_err() && !is_ours() {
            return Err(Failure::state("the process has a logger already"));
        }
        *sink = callback.map(|callback| Sink {
            callback,
            user_data,
        });
        let wanted = if sink.is_some() {
            filter
        } else {
            log::LevelFilter::Off
        };
        log::set_max_level(wanted);
        Ok(())
    })
}
