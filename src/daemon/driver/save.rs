//! Saving a domain to a file and stopping it, and bringing it back.

use std::io;
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
    procedure!(236, Slow, define_image),
    procedure!(388, Slow, managed_save_xml),
    procedure!(389, Slow, define_managed_save),
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

fn set_paused(image: &Path) -> io::Result<()> {
    Ok(setxattr(
        image,
        PAUSED_ATTRIBUTE,
        b"1",
        XattrFlags::empty(),
    )?)
}

fn note_paused(image: &Path) {
    if let Err(error) = set_paused(image) {
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

/// Saves a running domain and stops it: what is saved is the last that it did. Where there is another
/// document, it is restored by that.
fn save_to(
    driver: &Livepoint,
    domain: &Arc<Managed>,
    out: &Path,
    xml: Option<&str>,
    flags: u32,
) -> Answer<()> {
    let guard = domain.begin(JobKind::Save)?;
    let (was_paused, config) = {
        let state = domain.lock();
        let live = state.active()?;
        (live.run.is_paused(), live.config.clone())
    };
    if let Some(xml) = xml {
        // Before anything is done.
        let other = config.check_same_guest(&parse_domain(xml)?);
        other.map_err(|error| failed(&error.into()))?;
    }
    if !was_paused {
        driver.pause(domain, Paused::Save)?;
    }
    let mut request = CheckpointRequest::new(Protocol::Stop);
    request.out = Some(out.to_owned());
    let saved = checkpoint(driver, domain, &guard.job, request).and_then(|_| match xml {
        None => Ok(()),
        Some(xml) => {
            let replaced = Image::replace_document(out, xml, |_| Ok(()));
            replaced.map_err(|error| failed(&error))
        }
    });
    if let Err(error) = saved {
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
    let out = check(&to, flags, "virDomainSaveFlags")?;
    let domain = call.driver.registry.find(&wanted)?;
    save_to(call.driver, &domain, &out, xml.as_deref(), flags)
}

type Params = List<TypedParam, 64>;

/// Reads the parameters of a save or a restore: the file, and another document.
fn read_params(params: Params) -> Answer<(String, Option<String>)> {
    let (mut file, mut xml) = (None, None);
    for param in params.0 {
        match (param.field.as_str(), param.value) {
            ("file", TypedValue::Text(path)) => file = Some(path),
            ("dxml", TypedValue::Text(document)) => xml = Some(document),
            (field, _) => {
                return Err(RpcError::new(
                    Code::ArgumentUnsupported,
                    format!("parameter '{field}' not supported"),
                ));
            }
        }
    }
    let file = file.ok_or_else(|| RpcError::new(Code::InvalidArg, "missing parameter 'file'"))?;
    Ok((file, xml))
}

fn save_params(
    call: &DriverCall<'_>,
    (wanted, params, flags): (DomainRef, Params, u32),
) -> Answer<()> {
    let (file, xml) = read_params(params)?;
    save_flags(call, (wanted, file, xml, flags))
}

fn restore_params(call: &DriverCall<'_>, (params, flags): (Params, u32)) -> Answer<()> {
    let (file, xml) = read_params(params)?;
    restore_flags(call, (file, xml, flags))
}

fn restore(call: &DriverCall<'_>, (from,): (String,)) -> Answer<()> {
    restore_flags(call, (from, None, 0))
}

fn restore_flags(
    call: &DriverCall<'_>,
    (from, xml, flags): (String, Option<String>, u32),
) -> Answer<()> {
    let image = check(&from, flags, "virDomainRestoreFlags")?;
    let driver = call.driver;
    let config = Arc::new(match &xml {
        None => config_of(&image)?,
        Some(xml) => other_config_of(&image, xml)?,
    });
    let (domain, _job) = claim(driver, &config, JobKind::Restore)?;
    let start = Start {
        boot: match &xml {
            None => Boot::Image(&image),
            Some(_) => Boot::ImageAs(&image, &config),
        },
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

/// Returns the domain that an image is to be restored as.
fn other_config_of(image: &Path, xml: &str) -> Answer<DomainConfig> {
    let image = Image::open(image).map_err(|error| failed(&error))?;
    image.check_document(xml).map_err(|error| failed(&error))
}

/// Replaces the document of an image, and whether its domain is to stay paused.
fn redefine(image: &Path, xml: &str, flags: u32) -> Answer<()> {
    let was = was_paused(image);
    let paused = flags & PAUSED != 0 || (was && flags & RUNNING == 0);
    if paused == was && config_of(image)? == other_config_of(image, xml)? {
        return Ok(());
    }
    let prepare = |new: &Path| if paused { set_paused(new) } else { Ok(()) };
    Image::replace_document(image, xml, prepare).map_err(|error| failed(&error))
}

fn define_image(_: &DriverCall<'_>, (file, xml, flags): (String, String, u32)) -> Answer<()> {
    let function = "virDomainSaveImageDefineXML";
    check_flags(flags, RUNNING | PAUSED, function)?;
    redefine(&check(&file, flags, function)?, &xml, flags)
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
    save_to(driver, &domain, &out, None, flags)
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

/// Returns the image of a domain that has one.
fn managed_image(driver: &Livepoint, domain: &Managed) -> Answer<PathBuf> {
    driver.managed_save_file(domain.uuid).ok_or_else(|| {
        RpcError::new(
            Code::OperationInvalid,
            "domain does not have managed save image",
        )
    })
}

fn managed_save_xml(call: &DriverCall<'_>, (wanted, _): (DomainRef, u32)) -> Answer<String> {
    let domain = call.driver.registry.find(&wanted)?;
    let image = managed_image(call.driver, &domain)?;
    let image = Image::open(&image).map_err(|error| failed(&error))?;
    Ok(image.domain_xml().to_owned())
}

fn define_managed_save(
    call: &DriverCall<'_>,
    (wanted, xml, flags): (DomainRef, Option<String>, u32),
) -> Answer<()> {
    let function = "virDomainManagedSaveDefineXML";
    check_flags(flags, RUNNING | PAUSED, function)?;
    let domain = call.driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let image = managed_image(call.driver, &domain)?;
    let image = check(&image.to_string_lossy(), flags, function)?;
    let xml = xml.ok_or_else(|| RpcError::new(Code::InvalidArg, "a document is needed"))?;
    redefine(&image, &xml, flags)
}
