//! The protocols: how memory gets from the guest into the image.
//!
//! Each is a function from a session and an empty image to a captured moment. It owns the guest's
//! pauses and the threads that capture; the session owns everything before and after.

mod cow;
mod harvest;
mod precopy;
mod scan;
mod stop;
mod threaded;

pub use cow::ArmingStatistics;

use std::thread;
use std::time::Duration;

use jiff::Timestamp;

use crate::checkpoint::error::{CheckpointError, Halt};
use crate::checkpoint::options::Protocol;
use crate::checkpoint::session::Session;
use crate::checkpoint::tracker::{Logging, Unprotectable};
use crate::state::StateSection;

/// What a protocol returns, once every page of the moment is in the image, nothing but the session
/// holds the image any more, and the guest runs.
pub(crate) struct Captured {
    pub(crate) sections: Vec<StateSection>,
    /// The captured moment.
    pub(crate) moment: Timestamp,
}

/// Captures the guest. On an error the guest runs as well, and its dirty log is off.
pub(crate) fn capture(session: &mut Session) -> Result<Captured, Halt> {
    match session.options.protocol {
        Protocol::Stop => stop::capture(session),
        Protocol::Precopy => precopy::capture(session),
        Protocol::Threaded => threaded::capture(session),
        Protocol::Auto => unreachable!("the plan has chosen"),
        Protocol::Cow => capture_cow(session),
    }
}

fn capture_cow(session: &mut Session) -> Result<Captured, Halt> {
    if let Some(captured) = cow::small_increment(session)? {
        return Ok(captured);
    }
    match cow::prepare(session) {
        Ok(protection) => cow::capture(session, protection),
        Err(reason) => fall_back(session, &reason),
    }
}

/// Ends dirty logging some milliseconds after the resume.
///
/// Ending it takes KVM 2 to 3 ms a GiB, in which vCPUs that fault wait. Right after the resume the
/// guest would see one outage of both; so it sees more, each no longer than it must be: our own
/// machines have slots of 256 MiB, whose logs end one after the other.
///
/// Where a chain goes on from here the log does as well.
fn end_log_after_resume(session: &mut Session, logging: Logging) -> Result<(), CheckpointError> {
    const APART: Duration = Duration::from_millis(5);
    if session.chain_goes_on() {
        session.keep_log(logging);
        return Ok(());
    }
    thread::sleep(APART);
    logging.stop()
}

/// Takes `threaded` in the place of `cow`, and says why.
fn fall_back(session: &mut Session, reason: &Unprotectable) -> Result<Captured, Halt> {
    log::warn!("cow is not possible, threaded is taken: {reason}");
    session.options.protocol = Protocol::Threaded;
    session.statistics.protocol = Protocol::Threaded;
    session.statistics.fallback = Some(reason.to_string());
    threaded::capture(session)
}
