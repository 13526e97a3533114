//! Saving a domain to a file and stopping it, and bringing it back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{XattrFlags, getxattr, setxattr};
use uuid::Uuid;

use super::jobs::checkpoint;
use super::lifecycle::claim;
use super::{Answer, DriverCall, Livepoint, check_flags, parse_domain};
use crate::daemon::error::failed;
use crate::daemon::job::JobKind;
use crate::daemon::livepoint::Start;
use crate::daemon::managed::Managed;
use crate::daemon::paths::remove;
use crate::daemon::state::{Paused, Running, Shutoff};
use crate::daemon::worker::Boot;
use crate::host::{CheckpointRequest, DomainConfig, Image, Protocol};
use crate::rpc::{Code, DomainRef, List, Procedure, RpcError, TypedParam, TypedValue, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(54, Slow, restore),
    procedure!(55, Slow, save),
    procedure!(182, Slow, managed_save),
    procedure!(183, Quick, has_managed_save),
    procedure!(184, Slow, managed_save_remove),
    procedure!(232, Slow, save_flags),
    procedure!(233, Slow, restore_flags),
    procedure!(235, Slow, image_xml),
    procedure!(388, Slow, managed_save_xml),
    procedure!(440, Slow, save_params),
    procedure!(441, Slow, restore_params),
];

/// Flags of saves and restores (`virDomainSaveRestoreFlags`).
const BYPASS_CACHE: u32 = 1;
const RUNNING: u32 = 2;
const PAUSED: u32 = 4;
const RESET_NVRAM: u32 = 8;
const SAVE_FLAGS: u32 = BYPASS_CACHE | RUNNING | PAUSED | RESET_NVRAM;

/// Attribute of an image's file that says that the domain was paused when it was saved.
const PAUSED_ATTRIBUTE: &str = "user.livepoint.paused";

/// Returns whether the domain of an image is to stay paused after its restore.
pub(super) fn was_paused(image: &Path) -> bool {
    let mut value = [0_u8; 1];
    getxattr(image, PAUSED_ATTRIBUTE, &mut value).is_ok_and(|_| value == *b"1")
}

fn note_paused(image: &Path) {
    if let Err(error) = setxattr(image, PAUSED_ATTRIBUTE, b"1", XattrFlags::empty()) {
        log::warn!(
            "{}: cannot note that the domain was paused ({error}): it will run once restored",
            image.display()
        );
    }
}

/// Refuses what cannot be both, and a path that the daemon could not find again.
fn check(path: &str, flags: u32, function: &str) -> Answer<PathBuf> {
    check_flags(flags, SAVE_FLAGS, function)?;
    if flags & RUNNING != 0 && flags & PAUSED != 0 {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!(
                "flags VIR_DOMAIN_SAVE_RUNNING and VIR_DOMAIN_SAVE_PAUSED in function {function} are mutually exclusive"
            ),
        ));
    }
    if !path.starts_with('/') {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("'{path}' is not an absolute path"),
        ));
    }
    Ok(PathBuf::from(path))
}

fn no_other_xml(xml: Option<&String>) -> Answer<()> {
    match xml {
        None => Ok(()),
        Some(_) => Err(RpcError::new(
            Code::ArgumentUnsupported,
            "an image is restored with the document that it holds, not with another one",
        )),
    }
}

/// Saves a running domain and stops it: what is saved is the last that it did.
fn save_to(driver: &Livepoint, domain: &Arc<Managed>, out: &Path, flags: u32) -> Answer<()> {
    let guard = domain.begin(JobKind::Save)?;
    let was_paused = {
        let state = domain.lock();
        state.active()?.run.is_paused()
    };
    if !was_paused {
        driver.pause(domain, Paused::Save)?;
    }
    let mut request = CheckpointRequest::new(Protocol::Stop);
    request.out = Some(out.to_owned());
    if let Err(error) = checkpoint(driver, domain, &guard.job, request) {
        if !was_paused && domain.lock().live.is_some() {
            driver.resume(domain, Running::SaveCanceled)?;
        }
        return Err(error);
    }
    if flags & PAUSED != 0 || (was_paused && flags & RUNNING == 0) {
        note_paused(out);
    }
    driver.stop(domain, Shutoff::Saved)
}

fn save(call: &DriverCall<'_>, (wanted, to): (DomainRef, String)) -> Answer<()> {
    save_flags(call, (wanted, to, None, 0))
}

fn save_flags(
    call: &DriverCall<'_>,
    (wanted, to, xml, flags): (DomainRef, String, Option<String>, u32),
) -> Answer<()> {
    no_other_xml(xml.as_ref())?;
    let out = check(&to, flags, "virDomainSaveFlags")?;
    let domain = call.driver.registry.find(&wanted)?;
    save_to(call.driver, &domain, &out, flags)
}

/// Reads the parameters of a save or a restore; returns the file.
fn file_param(params: List<TypedParam, 64>) -> Answer<String> {
    let mut file = None;
    for param in params.0 {
        match (param.field.as_str(), param.value) {
            ("file", TypedValue::Text(path)) => file = Some(path),
            (field, _) => {
                return Err(RpcError::new(
                    Code::ArgumentUnsupported,
                    format!("parameter '{field}' not supported"),
                ));
            }
        }
    }
    file.ok_or_else(|| RpcError::new(Code::InvalidArg, "missing parameter 'file'"))
}

type Params = List<TypedParam, 64>;

fn save_params(
    call: &DriverCall<'_>,
    (wanted, params, flags): (DomainRef, Params, u32),
) -> Answer<()> {
    let file = file_param(params)?;
    save_flags(call, (wanted, file, None, flags))
}

fn restore_params(call: &DriverCall<'_>, (params, flags): (Params, u32)) -> Answer<()> {
    restore_flags(call, (file_param(params)?, None, flags))
}

fn restore(call: &DriverCall<'_>, (from,): (String,)) -> Answer<()> {
    restore_flags(call, (from, None, 0))
}

fn restore_flags(
    call: &DriverCall<'_>,
    (from, xml, flags): (String, Option<String>, u32),
) -> Answer<()> {
    no_other_xml(xml.as_ref())?;
    let image = check(&from, flags, "virDomainRestoreFlags")?;
    let driver = call.driver;
    let config = Arc::new(config_of(&image)?);
    let (domain, _job) = claim(driver, &config, JobKind::Restore)?;
    let start = Start {
        boot: Boot::Image(&image),
        paused: flags & PAUSED != 0 || (flags & RUNNING == 0 && was_paused(&image)),
        why: Running::Restored,
        owner: None,
    };
    if let Err(error) = driver.start(&domain, &config, &start) {
        driver.drop_transient(&domain);
        return Err(error);
    }
    Ok(())
}

/// Returns the domain that an image holds.
pub(super) fn config_of(image: &Path) -> Answer<DomainConfig> {
    let image = Image::open(image).map_err(|error| failed(&error))?;
    parse_domain(image.domain_xml())
}

fn image_xml(_: &DriverCall<'_>, (file, flags): (String, u32)) -> Answer<String> {
    let image = check(&file, 0, "virDomainSaveImageGetXMLDesc")?;
    check_flags(flags, 1, "virDomainSaveImageGetXMLDesc")?;
    let image = Image::open(&image).map_err(|error| failed(&error))?;
    Ok(image.domain_xml().to_owned())
}

fn managed_save(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<()> {
    let driver = call.driver;
    let domain = driver.registry.find(&wanted)?;
    let out = driver.paths.managed_save(domain.uuid);
    check(&out.to_string_lossy(), flags, "virDomainManagedSave")?;
    {
        let state = domain.lock();
        state.active()?;
        if state.definition.is_none() {
            return Err(RpcError::new(
                Code::OperationInvalid,
                "cannot do managed save for transient domain",
            ));
        }
    }
    save_to(driver, &domain, &out, flags)
}

fn has_managed_save(call: &DriverCall<'_>, (wanted, _): (DomainRef, u32)) -> Answer<i32> {
    let domain = call.driver.registry.find(&wanted)?;
    Ok(i32::from(
        call.driver.managed_save_file(domain.uuid).is_some(),
    ))
}

pub(super) fn remove_managed(driver: &Livepoint, uuid: Uuid) -> Answer<()> {
    Ok(remove(&driver.paths.managed_save(uuid))?)
}

fn managed_save_remove(call: &DriverCall<'_>, (wanted, _): (DomainRef, u32)) -> Answer<()> {
    let domain = call.driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    remove_managed(call.driver, domain.uuid)
}

fn managed_save_xml(call: &DriverCall<'_>, (wanted, _): (DomainRef, u32)) -> Answer<String> {
    let domain = call.driver.registry.find(&wanted)?;
    let Some(image) = call.driver.managed_save_file(domain.uuid) else {
        return Err(RpcError::new(
            Code::OperationInvalid,
            "domain does not have managed save image",
        ));
    };
    let image = Image::open(&image).map_err(|error| failed(&error))?;
    Ok(image.domain_xml().to_owned())
}
