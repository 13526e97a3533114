//! Defining, starting, stopping domains.

use std::sync::Arc;

use super::{Answer, DriverCall, Livepoint, check_flags, parse_domain};
use crate::daemon::job::JobKind;
use crate::daemon::livepoint::Start;
use crate::daemon::managed::{JobGuard, Managed, not_running};
use crate::daemon::snapshots::Snapshots;
use crate::daemon::state::{self, Paused, RunState, Running, Shutoff};
use crate::daemon::worker::{self, Boot};
use crate::daemon::{definitions, outbox};
use crate::host::DomainConfig;
use crate::host::control::protocol::Method;
use crate::rpc::{Code, DomainRef, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(9, Slow, create),
    procedure!(10, Slow, create_xml),
    procedure!(11, Slow, define),
    procedure!(12, Slow, destroy),
    procedure!(27, Slow, reboot),
    procedure!(28, Slow, resume),
    procedure!(33, Slow, shutdown),
    procedure!(34, Slow, suspend),
    procedure!(35, Slow, undefine),
    procedure!(196, Slow, create_with_flags),
    procedure!(210, Slow, inject_nmi),
    procedure!(231, Slow, undefine_flags),
    procedure!(234, Slow, destroy_flags),
    procedure!(245, Slow, reset),
    procedure!(258, Slow, shutdown_flags),
    procedure!(350, Slow, define_flags),
];

/// Flags of a start (`virDomainCreateFlags`).
const START_PAUSED: u32 = 1;
const START_AUTODESTROY: u32 = 2;
const START_FORCE_BOOT: u32 = 8;
/// Those that change nothing here: the page cache, validation, and a device that is not there.
const START_WITHOUT_EFFECT: u32 = 4 | 16 | 32;
const START_FLAGS: u32 = START_PAUSED | START_AUTODESTROY | START_FORCE_BOOT | START_WITHOUT_EFFECT;

/// Flags of an undefine (`virDomainUndefineFlagsValues`).
const UNDEFINE_MANAGED_SAVE: u32 = 1;
const UNDEFINE_SNAPSHOTS_METADATA: u32 = 2;
const UNDEFINE_FLAGS: u32 = 0x7f;

fn invalid(why: impl Into<String>) -> RpcError {
    RpcError::new(Code::OperationInvalid, why)
}

/// Finds the domain that a document describes, or makes it. Refuses a name or a UUID that belongs
/// to another one.
fn find_or_make(driver: &Livepoint, config: &DomainConfig) -> Answer<Arc<Managed>> {
    let failed = |why| RpcError::new(Code::OperationFailed, why);
    let name = config.name.as_str();
    let uuid = config.uuid;
    if let Some(found) = driver.registry.by_uuid(uuid) {
        let existing = found.lock().name.clone();
        return if existing == name {
            Ok(found)
        } else {
            Err(failed(format!(
                "domain '{existing}' is already defined with uuid {uuid}"
            )))
        };
    }
    if let Some(other) = driver.registry.by_name(name) {
        let uuid = other.uuid;
        return Err(failed(format!(
            "domain '{name}' already exists with uuid {uuid}"
        )));
    }
    let domain = Arc::new(Managed::new(
        uuid,
        name,
        Snapshots::none(&driver.paths, uuid),
    ));
    driver.registry.insert(domain.clone());
    Ok(domain)
}

/// Finds or makes the domain of a document and begins a job of it, in which it is to be started.
pub(super) fn claim(
    driver: &Livepoint,
    config: &DomainConfig,
    kind: JobKind,
) -> Answer<(Arc<Managed>, JobGuard)> {
    loop {
        let domain = driver.with_membership(|| find_or_make(driver, config))?;
        // Not while the list is held: whoever ends the job before this one may need it.
        match domain.begin(kind) {
            Ok(_) if domain.lock().live.is_some() => {
                let why = format!("domain '{}' is already active", config.name);
                return Err(invalid(why));
            }
            Ok(job) => return Ok((domain, job)),
            // Found just before it was taken off the list.
            Err(_) if domain.lock().is_gone => {}
            Err(error) => return Err(error),
        }
    }
}

fn define(call: &DriverCall<'_>, (xml,): (String,)) -> Answer<DomainRef> {
    define_flags(call, (xml, 0))
}

fn define_flags(call: &DriverCall<'_>, (xml, flags): (String, u32)) -> Answer<DomainRef> {
    const VALIDATE: u32 = 1;
    check_flags(flags, VALIDATE, "virDomainDefineXMLFlags")?;
    let config = parse_domain(&xml)?;
    let (domain, is_new) = define_config(call.driver, config)?;
    let event = if is_new {
        state::DEFINED_ADDED
    } else {
        state::DEFINED_UPDATED
    };
    call.driver.notify(&domain, &event);
    Ok(domain.reference())
}

/// Makes a domain persistent, with this definition; tells whether it had none.
pub(super) fn define_config(
    driver: &Livepoint,
    config: DomainConfig,
) -> Answer<(Arc<Managed>, bool)> {
    driver.with_membership(|| {
        let domain = find_or_make(driver, &config)?;
        let saved = definitions::save(&driver.paths, &config);
        let mut state = domain.lock();
        let is_new = state.definition.is_none();
        if let Err(error) = saved {
            let is_nothing = is_new && state.live.is_none();
            state.is_gone |= is_nothing;
            drop(state);
            if is_nothing {
                driver.registry.remove(domain.uuid);
            }
            return Err(error.into());
        }
        state.definition = Some(Arc::new(config));
        drop(state);
        Ok((domain, is_new))
    })
}

fn undefine(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<()> {
    undefine_flags(call, (wanted, 0))
}

fn undefine_flags(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<()> {
    check_flags(flags, UNDEFINE_FLAGS, "virDomainUndefineFlags")?;
    let driver = call.driver;
    let domain = driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let reference = domain.reference();
    driver.with_membership(|| {
        let mut state = domain.lock();
        if state.definition.is_none() {
            return Err(invalid("cannot undefine transient domain"));
        }
        let is_active = state.live.is_some();
        if driver.managed_save_file(domain.uuid).is_some() {
            if flags & UNDEFINE_MANAGED_SAVE == 0 {
                return Err(invalid(
                    "Refusing to undefine while domain managed save image exists",
                ));
            }
            super::save::remove_managed(driver, domain.uuid)?;
        }
        let count = state.snapshots.count();
        if count > 0 && !is_active {
            if flags & UNDEFINE_SNAPSHOTS_METADATA == 0 {
                return Err(invalid(format!(
                    "cannot delete inactive domain with {count} snapshots"
                )));
            }
            state.snapshots.forget_all()?;
        }
        definitions::forget(&driver.paths, domain.uuid)?;
        state.definition = None;
        state.autostart = false;
        if !is_active {
            state.is_gone = true;
            drop(state);
            driver.registry.remove(domain.uuid);
            outbox::discard(&driver.paths, domain.uuid);
        }
        Ok(())
    })?;
    driver.notify_as(&reference, &state::UNDEFINED_REMOVED);
    Ok(())
}

fn create(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<()> {
    create_with_flags(call, (wanted, 0)).map(drop)
}

fn create_with_flags(
    call: &DriverCall<'_>,
    (wanted, flags): (DomainRef, u32),
) -> Answer<DomainRef> {
    check_flags(flags, START_FLAGS, "virDomainCreateWithFlags")?;
    let driver = call.driver;
    let domain = driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Start)?;
    if domain.lock().live.is_some() {
        return Err(invalid("domain is already running"));
    }
    if flags & START_FORCE_BOOT != 0 {
        super::save::remove_managed(driver, domain.uuid)?;
    }
    let owner = (flags & START_AUTODESTROY != 0).then(|| call.client.id());
    super::start_defined(driver, &domain, flags & START_PAUSED != 0, owner)?;
    Ok(domain.reference())
}

fn create_xml(call: &DriverCall<'_>, (xml, flags): (String, u32)) -> Answer<DomainRef> {
    check_flags(flags, START_FLAGS, "virDomainCreateXML")?;
    let driver = call.driver;
    let config = Arc::new(parse_domain(&xml)?);
    let (domain, _job) = claim(driver, &config, JobKind::Start)?;
    let start = Start {
        boot: Boot::Fresh(&config),
        paused: flags & START_PAUSED != 0,
        why: Running::Booted,
        owner: (flags & START_AUTODESTROY != 0).then(|| call.client.id()),
    };
    if let Err(error) = driver.start(&domain, &config, &start) {
        driver.drop_transient(&domain);
        return Err(error);
    }
    Ok(domain.reference())
}

fn destroy(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<()> {
    destroy_flags(call, (wanted, 0))
}

fn destroy_flags(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<()> {
    // Graceful, or with its logs: nothing is left to be lost, and logs are kept.
    check_flags(flags, 3, "virDomainDestroyFlags")?;
    let domain = call.driver.registry.find(&wanted)?;
    // It does not wait for a job: a destroy ends a save that hangs, too.
    call.driver.stop(&domain, Shutoff::Destroyed)
}

fn shutdown(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<()> {
    shutdown_flags(call, (wanted, 0))
}

/// Finds a running domain and its name.
fn running(call: &DriverCall<'_>, wanted: &DomainRef) -> Answer<(Arc<Managed>, String)> {
    let domain = call.driver.registry.find(wanted)?;
    let name = {
        let state = domain.lock();
        state.active()?;
        state.name.clone()
    };
    Ok((domain, name))
}

/// Refuses ways to shut down or reboot other than by the power button.
fn check_power_flags(flags: u32, function: &str) -> Answer<()> {
    const ACPI_POWER_BUTTON: u32 = 1;
    const GUEST_AGENT: u32 = 2;
    check_flags(flags, 0x1f, function)?;
    if flags == 0 || flags & ACPI_POWER_BUTTON != 0 {
        return Ok(());
    }
    let why = if flags & GUEST_AGENT != 0 {
        "QEMU guest agent is not configured"
    } else {
        "only the ACPI power button is supported"
    };
    Err(RpcError::new(Code::ArgumentUnsupported, why))
}

fn shutdown_flags(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<()> {
    check_power_flags(flags, "virDomainShutdownFlags")?;
    let (domain, name) = running(call, &wanted)?;
    if let Some(live) = &mut domain.lock().live {
        live.reboots = false;
    }
    worker::run(&call.driver.paths, &name, Method::Shutdown)
}

fn reboot(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<()> {
    check_power_flags(flags, "virDomainReboot")?;
    let (domain, name) = running(call, &wanted)?;
    // The guest powers off by itself; then the machine is started again, under the same id.
    match &mut domain.lock().live {
        Some(live) => live.reboots = true,
        None => return Err(not_running()),
    }
    worker::run(&call.driver.paths, &name, Method::Shutdown)
}

fn reset(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<()> {
    check_flags(flags, 0, "virDomainReset")?;
    let (_, name) = running(call, &wanted)?;
    worker::run(&call.driver.paths, &name, Method::Reset)
}

fn inject_nmi(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<()> {
    check_flags(flags, 0, "virDomainInjectNMI")?;
    let (domain, name) = running(call, &wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    worker::run(&call.driver.paths, &name, Method::InjectNmi)
}

fn suspend(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<()> {
    let (domain, _) = running(call, &wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    if domain.lock().run_state().is_paused() {
        return Ok(());
    }
    call.driver.pause(&domain, Paused::User)
}

fn resume(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<()> {
    let (domain, _) = running(call, &wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let run = domain.lock().run_state();
    match run {
        RunState::Running(_) => Err(invalid("domain is already running")),
        RunState::Shutoff(_) => Err(not_running()),
        RunState::Paused(_) => call.driver.resume(&domain, Running::Unpaused),
    }
}
