//! What happens to a machine: by a descriptor to poll, or by a callback.

use std::ffi::{c_char, c_int, c_void};
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::machine::{lvp_machine, lvp_machine_state, state_number};
use super::out::{SizedOut, fill};
use super::status::{Failure, LVP_OK, guard, lvp_status, status_of};
use super::{check_out, handle, write_out};
use crate::host::{Ending, Happening, HostError, Notice, Watch, Watched};
use crate::sys::sigmask::SignalsBlocked;

symbol_versions!("0.1":
    lvp_machine_events,
    lvp_events_fd,
    lvp_events_next,
    lvp_events_free,
);

/// What has happened. A program must expect values that it does not know.
pub type lvp_event_kind = u32;
/// The machine was started; its state tells whether it waits for lvp_machine_resume().
pub const LVP_EVENT_STARTED: lvp_event_kind = 1;
/// lvp_machine_pause() has stopped it. A checkpoint's own pause is no event.
pub const LVP_EVENT_PAUSED: lvp_event_kind = 2;
/// lvp_machine_resume() lets it go on.
pub const LVP_EVENT_RESUMED: lvp_event_kind = 3;
/// It starts over: by lvp_machine_reset(), or because the guest asked for it.
pub const LVP_EVENT_RESET: lvp_event_kind = 4;
/// It has ended; `reason` says in which way.
pub const LVP_EVENT_ENDED: lvp_event_kind = 5;
/// A checkpoint has begun; `job` is its number.
pub const LVP_EVENT_CHECKPOINT_STARTED: lvp_event_kind = 6;
/// A checkpoint has ended; `status` is LVP_OK where its image is whole.
pub const LVP_EVENT_CHECKPOINT_ENDED: lvp_event_kind = 7;
/// It was put back to an image.
pub const LVP_EVENT_REWOUND: lvp_event_kind = 8;

/// In which way a machine has ended. A program must expect values that it does not know.
pub type lvp_end_reason = u32;
/// It has not.
pub const LVP_END_NONE: lvp_end_reason = 0;
/// The guest powered off.
pub const LVP_END_POWERED_OFF: lvp_end_reason = 1;
/// The guest reset itself, and its domain XML has it end then.
pub const LVP_END_RESET: lvp_end_reason = 2;
/// lvp_machine_destroy() or lvp_machine_free() ended it.
pub const LVP_END_DESTROYED: lvp_end_reason = 3;
/// The guest crashed.
pub const LVP_END_CRASHED: lvp_end_reason = 4;
/// The machine itself could not go on.
pub const LVP_END_FAILED: lvp_end_reason = 5;

/// Room for an event's text, with the zero byte that ends it.
pub const LVP_EVENT_TEXT_SIZE: usize = 256;

/// Something that has happened to a machine. Set struct_size before lvp_events_next(). A later
/// version of the library may have more members than the header that a callback was compiled with.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_event {
    /// sizeof(lvp_event), as the caller was compiled.
    pub struct_size: usize,
    /// Counts what happened to the machine, from 1. A gap is what the reader was too slow for.
    pub number: u64,
    /// An LVP_EVENT_ value.
    pub kind: lvp_event_kind,
    /// What the machine was doing from then on: an LVP_MACHINE_ value.
    pub state: lvp_machine_state,
    /// LVP_EVENT_ENDED: an LVP_END_ value; else LVP_END_NONE.
    pub reason: lvp_end_reason,
    /// LVP_EVENT_CHECKPOINT_ENDED: how, as lvp_job_wait() tells it; else LVP_OK.
    pub status: lvp_status,
    /// Events of a checkpoint: lvp_job_number() of its job; else 0.
    pub job: u64,
    /// The reason or the error in English, ended by a zero byte; empty where there is none. Cut
    /// where it is longer.
    pub text: [c_char; LVP_EVENT_TEXT_SIZE],
}

impl SizedOut for lvp_event {
    const SIZE_FIRST: usize = 40 + LVP_EVENT_TEXT_SIZE;
    fn set_size(&mut self, size: usize) {
        self.struct_size = size;
    }
}

impl lvp_event {
    fn new(notice: &Notice) -> Self {
        let mut event = Self {
            struct_size: size_of::<Self>(),
            number: notice.number,
            kind: 0,
            state: state_number(notice.state),
            reason: LVP_END_NONE,
            status: LVP_OK,
            job: 0,
            text: [0; LVP_EVENT_TEXT_SIZE],
        };
        event.kind = match &notice.what {
            Happening::Started => LVP_EVENT_STARTED,
            Happening::Paused => LVP_EVENT_PAUSED,
            Happening::Resumed => LVP_EVENT_RESUMED,
            Happening::Reset => LVP_EVENT_RESET,
            Happening::Rewound => LVP_EVENT_REWOUND,
            Happening::Ended(end) => {
                event.reason = reason_number(end.ending);
                event.set_text(&end.why);
                LVP_EVENT_ENDED
            }
            Happening::CheckpointStarted { job } => {
                event.job = *job;
                LVP_EVENT_CHECKPOINT_STARTED
            }
            Happening::CheckpointEnded { job, failure } => {
                event.job = *job;
                if let Some((code, why)) = failure {
                    event.status = status_of(*code);
                    event.set_text(why);
                }
                LVP_EVENT_CHECKPOINT_ENDED
            }
        };
        event
    }

    /// Puts as much of `text` as has room, in whole characters.
    fn set_text(&mut self, text: &str) {
        let cut = text.floor_char_boundary(LVP_EVENT_TEXT_SIZE - 1);
        for (to, &from) in self.text.iter_mut().zip(&text.as_bytes()[..cut]) {
            *to = c_char::from_ne_bytes([if from == 0 { b'?' } else { from }]);
        }
    }
}

fn reason_number(ending: Ending) -> lvp_end_reason {
    match ending {
        Ending::PoweredOff => LVP_END_POWERED_OFF,
        Ending::Reset => LVP_END_RESET,
        Ending::Destroyed => LVP_END_DESTROYED,
        Ending::Crashed => LVP_END_CRASHED,
        Ending::Failed => LVP_END_FAILED,
    }
}

/// Called for each event, in their order, by one thread of the library's, which has every signal
/// blocked. `event` is the library's and valid during the call. May call every function, also
/// lvp_events_free() for these very events; must not unwind or longjmp() out.
pub type lvp_event_callback =
    Option<unsafe extern "C" fn(user_data: *mut c_void, event: *const lvp_event)>;

/// The events of a machine from some moment on. Opaque; made by lvp_machine_events(), released by
/// lvp_events_free(). Every function may be called from any thread at any time, but none after or
/// while the handle is freed.
#[derive(Debug)]
pub struct lvp_events {
    watch: Arc<Watch>,
    /// The thread that calls back, if there is a callback.
    thread: Option<JoinHandle<()>>,
}

/// What a thread that calls back takes with it.
struct Caller {
    callback: unsafe extern "C" fn(user_data: *mut c_void, event: *const lvp_event),
    user_data: *mut c_void,
}

// SAFETY: the header says that the callback is called, with `user_data`, from a thread of the
// library's; whoever registers it promises that it may be.
unsafe impl Send for Caller {}

impl Caller {
    fn call(&self, event: &lvp_event) {
        // SAFETY: the caller's function and data, valid until lvp_events_free() by the header.
        unsafe { (self.callback)(self.user_data, event) }
    }
}

/// Watches a machine: its starts, pauses, resets and end, also over restarts, and its checkpoints.
///
/// @param callback    called for each event; or NULL: take events by lvp_events_next() then, and
///                    poll lvp_events_fd()
/// @param user_data   handed to the callback; not looked at
/// @param events_out  receives the events; release them with lvp_events_free()
///
/// Events that are not taken are kept, 1024 at most: then the oldest is lost.
///
/// Returns LVP_OK; LVP_E_INVALID; LVP_E_HOST (no descriptor or no thread is to be had). Does not
/// block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument; the callback and `user_data` stay valid until
/// lvp_events_free() returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_machine_events(
    machine: *mut lvp_machine,
    callback: lvp_event_callback,
    user_data: *mut c_void,
    events_out: *mut *mut lvp_events,
) -> lvp_status {
    guard(|| {
        check_out(events_out, "events_out")?;
        // SAFETY: the caller's contract.
        let machine = unsafe { handle(machine, "machine") }?;
        let watch = Arc::new(machine.domain.watch()?);
        let thread = match callback {
            None => None,
            Some(callback) => {
                let caller = Caller {
                    callback,
                    user_data,
                };
                Some(start_calling(watch.clone(), caller)?)
            }
        };
        let events = Box::into_raw(Box::new(lvp_events { watch, thread }));
        // SAFETY: checked above not to be null; writable by the caller's contract.
        unsafe { write_out(events_out, events, "events_out") }
    })
}

/// Starts the thread that calls back until the watch ends.
fn start_calling(watch: Arc<Watch>, caller: Caller) -> Result<JoinHandle<()>, Failure> {
    let _blocked = SignalsBlocked::new();
    let spawned = thread::Builder::new()
        .name("lvp-events".to_owned())
        .spawn(move || {
            while let Watched::Notice(notice) = watch.next(None) {
                caller.call(&lvp_event::new(&notice));
            }
        });
    spawned.map_err(|source| {
        let what = "a thread";
        HostError::Resource { what, source }.into()
    })
}

/// Returns a descriptor that is readable while an event waits, and when none will come any more,
/// for poll(2) and the like.
///
/// Owned by the events: do not read, write or close it; it is closed by lvp_events_free(). Returns
/// -1 when `events` is NULL, or has a callback. Does not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `events` is NULL or a live handle.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_events_fd(events: *const lvp_events) -> c_int {
    let mut fd = -1;
    let _status = guard(|| {
        // SAFETY: the caller's contract.
        let events = unsafe { handle(events, "events") }?;
        if events.thread.is_none() {
            fd = events.watch.as_fd().as_raw_fd();
        }
        Ok(())
    });
    fd
}

/// Takes the next event.
///
/// @param timeout_ms  most milliseconds to wait for one; 0: only look; negative: for ever
/// @param event_out   receives the event; set event_out->struct_size first
///
/// Returns LVP_OK; LVP_E_TIMEOUT (none came); LVP_E_NOT_FOUND (none will come: the machine was
/// freed); LVP_E_STATE (the events go to a callback); LVP_E_INVALID. Each event is taken once, also
/// where several threads ask. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// `events` is NULL or a live handle; `event_out` is NULL or has `struct_size` writable bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_events_next(
    events: *mut lvp_events,
    timeout_ms: i64,
    event_out: *mut lvp_event,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let events = unsafe { handle(events, "events") }?;
        if events.thread.is_some() {
            return Err(Failure::state("the events go to a callback"));
        }
        // Before an event is taken that could not be handed over.
        // SAFETY: the caller's contract.
        unsafe { super::out::check_size(event_out, "event_out") }?;
        let timeout = u64::try_from(timeout_ms).ok().map(Duration::from_millis);
        match events.watch.next(timeout) {
            // SAFETY: the caller's contract.
            Watched::Notice(notice) => unsafe {
                fill(event_out, lvp_event::new(&notice), "event_out")
            },
            Watched::Nothing => Err(Failure::timeout("nothing has happened")),
            Watched::Over => Err(Failure::not_found("the machine was freed")),
        }
    })
}

/// Releases events. NULL is ignored. On return the callback is called no more: blocks while a call
/// of it is under way, unless this is called from the callback itself. No other call on this
/// handle may run or follow. The machine may have been freed before.
///
/// Since: 0.1
///
/// # Safety
/// `events` is NULL or a live handle that nothing else uses any more.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_events_free(events: *mut lvp_events) {
    if events.is_null() {
        return;
    }
    let _status = guard(|| {
        // SAFETY: it came from `Box::into_raw`, and the caller gives it up.
        let events = unsafe { Box::from_raw(events) };
        events.watch.close();
        if let Some(thread) = events.thread
            && thread.thread().id() != thread::current().id()
        {
            // It catches nothing that C could do, and does nothing else that could panic.
            drop(thread.join());
        }
        Ok(())
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{ErrorCode, MachineState};
    use std::ffi::CStr;

    fn text(event: &lvp_event) -> &str {
        // SAFETY: `set_text` leaves the last byte zero, and the array lives as long as the event.
        unsafe { CStr::from_ptr(event.text.as_ptr()) }
            .to_str()
            .unwrap()
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        let why = "é".repeat(LVP_EVENT_TEXT_SIZE);
        let what = Happening::CheckpointEnded {
            job: 3,
            failure: Some((ErrorCode::Cancelled, why.clone())),
        };
        let event = lvp_event::new(&Notice {
            number: 7,
            state: MachineState::Running,
            what,
        });
        assert_eq!((event.number, event.job), (7, 3));
        assert_eq!(event.status, super::super::status::LVP_E_CANCELLED);
        assert_eq!(text(&event), &why[..LVP_EVENT_TEXT_SIZE - 2]);
    }
}
