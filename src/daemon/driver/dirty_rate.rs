//! How fast domains write their memory.

use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::job::JobKind;
use crate::daemon::worker;
use crate::host::control::protocol::{Method, Status};
use crate::host::{DIRTY_RATE_SECONDS, DirtyRateMode, DirtyRateRequest};
use crate::rpc::{Code, DomainRef, Procedure, RpcError, TypedParam, TypedValue, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[procedure!(427, Slow, start)];

/// Flags of a measurement (`virDomainDirtyRateCalcFlags`); without one it is by samples.
const DIRTY_BITMAP: u32 = 1;
const DIRTY_RING: u32 = 2;

/// States of a measurement (`virDomainDirtyRateStatus`).
const UNSTARTED: i32 = 0;
const MEASURING: i32 = 1;
const MEASURED: i32 = 2;

fn start(call: &DriverCall<'_>, (wanted, seconds, flags): (DomainRef, i32, u32)) -> Answer<()> {
    check_flags(
        flags,
        DIRTY_BITMAP | DIRTY_RING,
        "virDomainStartDirtyRateCalc",
    )?;
    let mode = match flags {
        0 => DirtyRateMode::PageSampling,
        DIRTY_BITMAP => DirtyRateMode::DirtyBitmap,
        DIRTY_RING => {
            return Err(RpcError::new(
                Code::OperationUnsupported,
                "dirty-ring calculation mode requires dirty-ring feature enabled.",
            ));
        }
        _ => {
            return Err(RpcError::new(
                Code::InvalidArg,
                "flags VIR_DOMAIN_DIRTYRATE_MODE_DIRTY_BITMAP and VIR_DOMAIN_DIRTYRATE_MODE_DIRTY_RING in function virDomainStartDirtyRateCalc are mutually exclusive",
            ));
        }
    };
    let within = u32::try_from(seconds).ok();
    let Some(seconds) = within.filter(|seconds| DIRTY_RATE_SECONDS.contains(seconds)) else {
        let (min, max) = DIRTY_RATE_SECONDS.into_inner();
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("seconds={seconds} is invalid, please choose value within [{min}, {max}]."),
        ));
    };
    let domain = call.driver.registry.find(&wanted)?;
    // After whatever is being done to the domain: both need the log of its writes.
    let _job = domain.begin(JobKind::Modify)?;
    let name = {
        let state = domain.lock();
        state.active()?;
        state.name.clone()
    };
    let request = DirtyRateRequest { seconds, mode };
    worker::run(&call.driver.paths, &name, Method::MeasureDirtyRate(request))?;
    if let Some(live) = &mut domain.lock().live {
        live.has_dirty_rate = true;
    }
    Ok(())
}

/// Adds what is known of a running domain's dirty rate. `status` is of its worker.
pub(super) fn add_stats(status: Option<&Status>, params: &mut Vec<TypedParam>) {
    let last = status.and_then(|status| status.dirty_rate.as_ref());
    let measured = last.and_then(|last| last.measured);
    let state = match (last, measured) {
        (None, _) => UNSTARTED,
        (Some(_), None) => MEASURING,
        (Some(_), Some(_)) => MEASURED,
    };
    let number =
        |name: &str, value| TypedParam::new(format!("dirtyrate.{name}"), TypedValue::Int(value));
    let long =
        |name: &str, value| TypedParam::new(format!("dirtyrate.{name}"), TypedValue::Long(value));
    params.push(number("calc_status", state));
    params.push(long(
        "calc_start_time",
        last.map_or(0, |last| last.started_seconds),
    ));
    let seconds = last.map_or(0, |last| last.request.seconds);
    params.push(number("calc_period", i32::try_from(seconds).unwrap_or(0)));
    if let Some(measured) = measured {
        let mib = measured.bytes_per_second >> 20;
        let mib = i64::try_from(mib).unwrap_or(i64::MAX);
        params.push(long("megabytes_per_second", mib));
    }
    let mode = match last.map_or(DirtyRateMode::default(), |last| last.request.mode) {
        DirtyRateMode::PageSampling => "page-sampling",
        DirtyRateMode::DirtyBitmap => "dirty-bitmap",
    };
    params.push(TypedParam::new(
        "dirtyrate.calc_mode",
        TypedValue::Text(mode.to_owned()),
    ));
}
