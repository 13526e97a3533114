//! Core files of running domains.

use std::path::PathBuf;

use super::jobs::checkpoint;
use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::error::failed;
use crate::daemon::job::JobKind;
use crate::daemon::outbox;
use crate::daemon::paths::remove;
use crate::daemon::state::{Paused, Running, Shutoff};
use crate::host::control::protocol::Method;
use crate::host::{CheckpointRequest, Image, Protocol};
use crate::rpc::{Code, DomainRef, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(53, Slow, dump),
    procedure!(334, Slow, dump_with_format),
];

/// Flags of a dump (`virDomainCoreDumpFlags`).
const CRASH: u32 = 1;
const LIVE: u32 = 2;
const BYPASS_CACHE: u32 = 4;
const RESET: u32 = 8;
const MEMORY_ONLY: u32 = 16;

fn dump(call: &DriverCall<'_>, (wanted, to, flags): (DomainRef, String, u32)) -> Answer<()> {
    dump_with_format(call, (wanted, to, 0, flags))
}

fn dump_with_format(
    call: &DriverCall<'_>,
    (wanted, to, format, flags): (DomainRef, String, u32, u32),
) -> Answer<()> {
    const RAW: u32 = 0;
    check_flags(
        flags,
        CRASH | LIVE | BYPASS_CACHE | RESET | MEMORY_ONLY,
        "virDomainCoreDumpWithFormat",
    )?;
    if format != RAW {
        return Err(RpcError::new(
            Code::OperationUnsupported,
            "a core file is ELF, uncompressed",
        ));
    }
    if flags & MEMORY_ONLY == 0 {
        return Err(RpcError::new(
            Code::OperationUnsupported,
            "a dump holds memory and registers: use --memory-only, or save for all of the machine",
        ));
    }
    if !to.starts_with('/') {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("'{to}' is not an absolute path"),
        ));
    }
    let driver = call.driver;
    let domain = driver.registry.find(&wanted)?;
    let guard = domain.begin(JobKind::Dump)?;
    let (name, was_paused) = {
        let state = domain.lock();
        (state.name.clone(), state.active()?.run.is_paused())
    };
    // Unless it is to be live, the guest stands still meanwhile, as clients expect.
    let pauses = flags & (LIVE | CRASH) == 0 && !was_paused;
    if pauses {
        driver.pause(&domain, Paused::Dump)?;
    }
    let beside = PathBuf::from(format!("{to}.lpi"));
    // Where the domain's process can write it.
    let image = if driver.launcher.confinement.keeps_from(&beside) {
        let user = driver.launcher.confinement.user.as_ref();
        outbox::prepare(&driver.paths, domain.uuid, user)?;
        outbox::image(&driver.paths, domain.uuid)
    } else {
        beside
    };
    let mut request = CheckpointRequest::new(Protocol::Auto);
    request.out = Some(image.clone());
    request.durable = false;
    let dumped = checkpoint(driver, &domain, &guard.job, request).and_then(|_| {
        let core = Image::open(&image).and_then(|image| image.write_core(to.as_ref()));
        core.map_err(|error| failed(&error))
    });
    let removed = remove(&image);
    if pauses && domain.lock().live.is_some() {
        driver.resume(&domain, Running::Unpaused)?;
    }
    dumped?;
    removed?;
    if flags & CRASH != 0 {
        return driver.stop(&domain, Shutoff::Crashed);
    }
    if flags & RESET != 0 {
        return crate::daemon::worker::run(&driver.paths, &name, Method::Reset);
    }
    Ok(())
}
