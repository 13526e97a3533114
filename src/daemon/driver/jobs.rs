//! Checkpoints as jobs: how far they are, what they cost, and how to end them; and the hatch for
//! what libvirt has no word for.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::error::failed;
use crate::daemon::job::{Completed, Job, JobKind};
use crate::daemon::managed::{Limits, Managed};
use crate::daemon::{outbox, worker};
use crate::host::control::ControlClient;
use crate::host::control::protocol::{JobId, Method};
use crate::host::{CheckpointRequest, CheckpointSummary, ErrorCode, HostError};
use crate::rpc::{
    Code, DomainRef, Event, List, Procedure, RpcError, TypedParam, TypedValue, procedure,
};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(163, Quick, job_info),
    procedure!(164, Slow, abort),
    procedure!(166, Quick, set_max_downtime),
    procedure!(207, Quick, set_max_speed),
    procedure!(242, Quick, max_speed),
    procedure!(298, Quick, job_stats),
    procedure!(387, Quick, max_downtime),
    procedure!(442, Slow, abort_flags),
];

/// What is of QEMU in libvirt.
pub(super) const QEMU_TABLE: &[Procedure<Livepoint>] = &[procedure!(1, Slow, monitor_command)];

/// Types of jobs (`virDomainJobType`).
const JOB_NONE: i32 = 0;
const JOB_BOUNDED: i32 = 1;
const JOB_COMPLETED: i32 = 3;

/// How long a checkpoint waits for what one before it still holds, and how often it looks.
const BUSY_TIMEOUT: Duration = Duration::from_secs(15);
const BUSY_POLL: Duration = Duration::from_millis(100);

/// Takes a checkpoint of a running domain, as the job that the caller holds.
pub(super) fn checkpoint(
    driver: &Livepoint,
    domain: &Managed,
    job: &Job,
    mut request: CheckpointRequest,
) -> Answer<CheckpointSummary> {
    let (name, limits) = {
        let state = domain.lock();
        state.active()?;
        (state.name.clone(), state.limits)
    };
    apply(limits, job.kind, &mut request);
    let wanted = request.out.clone();
    let is_kept = |out: &PathBuf| {
        let own = driver.paths.outbox(domain.uuid);
        driver.launcher.confinement.keeps_from(out) && !out.starts_with(own)
    };
    let moved_to = wanted.filter(is_kept);
    if moved_to.is_some() {
        outbox::prepare(
            &driver.paths,
            domain.uuid,
            driver.launcher.confinement.user.as_ref(),
        )?;
        request.out = Some(outbox::image(&driver.paths, domain.uuid));
    }
    let summary =
        run_checkpoint(driver, domain, &name, job, &request).map_err(|error| {
            match error.code() {
                ErrorCode::Cancelled => RpcError::new(
                    Code::OperationAborted,
                    format!("{} job: canceled by client", job.kind.name()),
                ),
                _ => failed(&error),
            }
        })?;
    if let Some(to) = &moved_to {
        outbox::move_to(&driver.paths, domain.uuid, to)?;
    }
    let completed = Completed::of(job, &summary);
    let params = completed.params.clone();
    domain.lock().completed = Some(completed);
    driver.notify(domain, &Event::JobCompleted { params });
    Ok(summary)
}

/// Has a worker take a checkpoint, and waits for its end.
fn run_checkpoint(
    driver: &Livepoint,
    domain: &Managed,
    name: &str,
    job: &Job,
    request: &CheckpointRequest,
) -> Result<CheckpointSummary, HostError> {
    let deadline = Instant::now() + BUSY_TIMEOUT;
    let mut worker = ControlClient::connect(&driver.paths.runtime, name)?;
    loop {
        // One that an earlier daemon had asked for, and did not come to move.
        if let Err(error) = outbox::clear(&driver.paths, domain.uuid) {
            log::warn!("{error}");
        }
        let done = worker.start_checkpoint(request.clone()).and_then(|id| {
            job.set_worker_job(id.job);
            // An abort that came before there was anything to cancel.
            if job.is_cancelled() {
                let mut other = ControlClient::connect(&driver.paths.runtime, name)?;
                other.run(Method::JobCancel(id))?;
            }
            worker.wait(id, |progress| job.set_progress(progress))
        });
        match done {
            // A job that was cancelled has ended before its last write has, and holds its file.
            Err(error) if error.code() == ErrorCode::Busy && Instant::now() < deadline => {
                thread::sleep(BUSY_POLL);
            }
            done => return done,
        }
    }
}

/// Puts promises that were made for all checkpoints of a domain in a request that makes none.
fn apply(limits: Limits, kind: JobKind, request: &mut CheckpointRequest) {
    // A save ends with the guest stopped: it has no downtime to keep short.
    if kind == JobKind::Snapshot {
        let downtime_us = limits.max_downtime_ms.map(|ms| ms.saturating_mul(1000));
        request.max_downtime_us = request.max_downtime_us.or(downtime_us);
    }
    let bandwidth = limits.max_speed_mib.map(|mib| mib.saturating_mul(1 << 20));
    request.max_bandwidth = request.max_bandwidth.or(bandwidth);
}

type JobInfo = (
    i32,
    (u64, u64),
    (u64, u64, u64),
    (u64, u64, u64),
    (u64, u64, u64),
);

fn job_info(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<JobInfo> {
    let domain = call.driver.registry.find(&wanted)?;
    let state = domain.lock();
    let none = (0, 0, 0);
    let Some(job) = state.job.as_ref().filter(|job| job.kind.is_shown()) else {
        return Ok((JOB_NONE, (0, 0), none, none, none));
    };
    let figures = job.figures();
    let memory = (
        figures.total,
        figures.processed,
        figures.total.saturating_sub(figures.processed),
    );
    Ok((
        JOB_BOUNDED,
        (figures.elapsed_ms, figures.remaining_ms),
        memory,
        memory,
        none,
    ))
}

fn job_stats(
    call: &DriverCall<'_>,
    (wanted, flags): (DomainRef, u32),
) -> Answer<(i32, List<TypedParam, 64>)> {
    const COMPLETED: u32 = 1;
    const KEEP_COMPLETED: u32 = 2;
    check_flags(flags, COMPLETED | KEEP_COMPLETED, "virDomainGetJobStats")?;
    let domain = call.driver.registry.find(&wanted)?;
    let mut state = domain.lock();
    if flags & COMPLETED != 0 {
        let completed = if flags & KEEP_COMPLETED != 0 {
            state.completed.clone()
        } else {
            state.completed.take()
        };
        return Ok(match completed {
            Some(completed) => (JOB_COMPLETED, List(completed.params)),
            None => (JOB_NONE, List(Vec::new())),
        });
    }
    let job = state.job.as_ref().filter(|job| job.kind.is_shown());
    Ok(match job {
        Some(job) => (JOB_BOUNDED, List(job.figures().params())),
        None => {
            state.active()?;
            let operation = TypedParam::new("operation", TypedValue::Int(0));
            (JOB_NONE, List(vec![operation]))
        }
    })
}

fn abort(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<()> {
    abort_flags(call, (wanted, 0))
}

fn abort_flags(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<()> {
    check_flags(flags, 0, "virDomainAbortJobFlags")?;
    let domain = call.driver.registry.find(&wanted)?;
    let (name, job) = {
        let state = domain.lock();
        state.active()?;
        let job = state
            .job
            .as_ref()
            .filter(|job| job.kind.is_shown())
            .cloned();
        (state.name.clone(), job)
    };
    let job =
        job.ok_or_else(|| RpcError::new(Code::OperationInvalid, "no job is active on the domain"))?;
    job.cancel();
    match job.worker_job() {
        Some(job) => worker::run(&call.driver.paths, &name, Method::JobCancel(JobId { job })),
        None => Ok(()),
    }
}

fn with_limits(
    call: &DriverCall<'_>,
    wanted: &DomainRef,
    change: impl FnOnce(&mut Limits),
) -> Answer<()> {
    let domain = call.driver.registry.find(wanted)?;
    let mut state = domain.lock();
    state.active()?;
    change(&mut state.limits);
    Ok(())
}

fn set_max_downtime(call: &DriverCall<'_>, (wanted, ms, _): (DomainRef, u64, u32)) -> Answer<()> {
    with_limits(call, &wanted, |limits| {
        limits.max_downtime_ms = Some(ms).filter(|&ms| ms > 0);
    })
}

fn max_downtime(call: &DriverCall<'_>, (wanted, _): (DomainRef, u32)) -> Answer<u64> {
    let domain = call.driver.registry.find(&wanted)?;
    let limits = domain.lock().limits;
    Ok(limits.max_downtime_ms.unwrap_or(0))
}

fn set_max_speed(call: &DriverCall<'_>, (wanted, mib, _): (DomainRef, u64, u32)) -> Answer<()> {
    with_limits(call, &wanted, |limits| {
        limits.max_speed_mib = Some(mib).filter(|&mib| mib > 0);
    })
}

fn max_speed(call: &DriverCall<'_>, (wanted, _): (DomainRef, u32)) -> Answer<u64> {
    let domain = call.driver.registry.find(&wanted)?;
    let limits = domain.lock().limits;
    Ok(limits.max_speed_mib.unwrap_or(0))
}

/// Commands begin with this; the rest is a method of the control protocol.
const COMMAND_PREFIX: &str = "livepoint-";
/// Methods that may be called; the others have a call of libvirt's that keeps the state right.
const COMMANDS: [&str; 6] = [
    "status",
    "dump-xml",
    "checkpoint",
    "job-progress",
    "job-cancel",
    "job-wait",
];

fn monitor_command(
    call: &DriverCall<'_>,
    (wanted, command, flags): (DomainRef, String, u32),
) -> Answer<String> {
    if flags != 0 {
        return Err(RpcError::new(
            Code::ArgumentUnsupported,
            "commands are JSON; there is no human monitor",
        ));
    }
    let domain = call.driver.registry.find(&wanted)?;
    let name = {
        let state = domain.lock();
        state.active()?;
        state.name.clone()
    };
    let answer = match method_of(&command) {
        Ok(method) => {
            let mut worker = worker::connect(&call.driver.paths, &name)?;
            match worker.call::<Value>(method) {
                Ok(value) => json!({ "return": value }),
                Err(error) => refusal(&error.full_message()),
            }
        }
        Err(why) => refusal(&why),
    };
    Ok(answer.to_string())
}

fn refusal(why: &str) -> Value {
    json!({ "error": { "class": "GenericError", "desc": why } })
}

/// Reads a command, `{"execute": "livepoint-METHOD", "arguments": PARAMS}`.
fn method_of(command: &str) -> Result<Method, String> {
    let command: Value = serde_json::from_str(command).map_err(|error| error.to_string())?;
    let name = command
        .get("execute")
        .and_then(Value::as_str)
        .unwrap_or_default();
    let method = name
        .strip_prefix(COMMAND_PREFIX)
        .filter(|name| COMMANDS.contains(name));
    let Some(method) = method else {
        let known = COMMANDS
            .map(|name| format!("{COMMAND_PREFIX}{name}"))
            .join(", ");
        return Err(format!(
            "The command {name:?} has not been found; there are {known}"
        ));
    };
    let mut call = json!({ "method": method });
    if let (Some(arguments), Some(call)) = (command.get("arguments"), call.as_object_mut()) {
        call.insert("params".to_owned(), arguments.clone());
    }
    serde_json::from_value(call).map_err(|error| error.to_string())
}
