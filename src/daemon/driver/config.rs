//! Changes to definitions, and to what a running machine can change of itself.

use std::sync::Arc;

use super::info::{AFFECT_CONFIG, AFFECT_LIVE};
use super::{Answer, DriverCall, Livepoint, check_flags, parse_domain};
use crate::daemon::job::JobKind;
use crate::daemon::managed::{Managed, not_running};
use crate::daemon::{definitions, state, texts, worker};
use crate::host::control::protocol::{MemoryBytes, Method};
use crate::host::{
    Domain, DomainChanges, DomainConfig, DomainName, DomainTexts, LifecycleAction, MemorySize,
    Vcpus, XmlView,
};
use crate::rpc::{Code, DomainRef, Event, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(15, Quick, autostart),
    procedure!(29, Slow, set_autostart),
    procedure!(30, Slow, set_max_memory),
    procedure!(31, Slow, set_memory),
    procedure!(32, Slow, set_vcpus),
    procedure!(199, Slow, set_vcpus_flags),
    procedure!(204, Slow, set_memory_flags),
    procedure!(264, Slow, set_metadata),
    procedure!(265, Quick, metadata),
    procedure!(358, Slow, rename),
    procedure!(390, Slow, set_lifecycle_action),
];

fn invalid(why: impl Into<String>) -> RpcError {
    RpcError::new(Code::OperationInvalid, why)
}

/// Which of the running machine and the definition a call is about.
pub(super) struct Affected {
    pub(super) live: bool,
    pub(super) config: bool,
}

/// Resolves the flags of a call as libvirt does (`virDomainObjUpdateModificationImpact`).
pub(super) fn affected(domain: &Managed, flags: u32) -> Answer<Affected> {
    let state = domain.lock();
    let is_active = state.live.is_some();
    let chosen = match flags & (AFFECT_LIVE | AFFECT_CONFIG) {
        0 if is_active => AFFECT_LIVE,
        0 => AFFECT_CONFIG,
        chosen => chosen,
    };
    let affected = Affected {
        live: chosen & AFFECT_LIVE != 0,
        config: chosen & AFFECT_CONFIG != 0,
    };
    if affected.live && !is_active {
        return Err(not_running());
    }
    if affected.config && state.definition.is_none() {
        return Err(invalid(
            "transient domains do not have any persistent config",
        ));
    }
    Ok(affected)
}

/// Replaces a domain's definition with a changed one.
pub(super) fn redefine(
    driver: &Livepoint,
    domain: &Managed,
    change: impl FnOnce(&DomainConfig) -> Answer<DomainConfig>,
) -> Answer<()> {
    driver.with_membership(|| {
        let old = domain.lock().definition.clone().ok_or_else(not_running)?;
        let new = change(&old)?;
        definitions::save(&driver.paths, &new)?;
        domain.lock().definition = Some(Arc::new(new));
        Ok(())
    })
}

fn autostart(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<i32> {
    let domain = call.driver.registry.find(&wanted)?;
    let autostart = domain.lock().autostart;
    Ok(i32::from(autostart))
}

fn set_autostart(call: &DriverCall<'_>, (wanted, on): (DomainRef, i32)) -> Answer<()> {
    let domain = call.driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    if domain.lock().definition.is_none() {
        return Err(invalid("cannot set autostart for transient domain"));
    }
    definitions::set_autostart(&call.driver.paths, domain.uuid, on != 0)?;
    domain.lock().autostart = on != 0;
    Ok(())
}

/// Flag: the most that there can be, rather than what is there (of memory and of vCPUs).
const MAXIMUM: u32 = 4;

fn set_max_memory(call: &DriverCall<'_>, (wanted, kib): (DomainRef, u64)) -> Answer<()> {
    set_memory_flags(call, (wanted, kib, MAXIMUM))
}

fn set_memory(call: &DriverCall<'_>, (wanted, kib): (DomainRef, u64)) -> Answer<()> {
    set_memory_flags(call, (wanted, kib, AFFECT_LIVE))
}

fn set_memory_flags(
    call: &DriverCall<'_>,
    (wanted, kib, flags): (DomainRef, u64, u32),
) -> Answer<()> {
    check_flags(
        flags,
        AFFECT_LIVE | AFFECT_CONFIG | MAXIMUM,
        "virDomainSetMemoryFlags",
    )?;
    let domain = call.driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let affected = affected(&domain, flags)?;
    let is_maximum = flags & MAXIMUM != 0;
    if affected.live {
        if is_maximum {
            return Err(invalid(
                "cannot resize the maximum memory on an active domain",
            ));
        }
        let (name, most, has_balloon) = {
            let state = domain.lock();
            let machine = &state.active()?.config.machine;
            let has_balloon = machine.devices.pci.balloon().is_some();
            (state.name.clone(), machine.memory.size().kib(), has_balloon)
        };
        if kib > most {
            return Err(RpcError::new(
                Code::InvalidArg,
                "cannot set memory higher than max memory",
            ));
        }
        if has_balloon {
            let bytes = kib.saturating_mul(1024);
            let method = Method::SetMemory(MemoryBytes { bytes });
            worker::run(&call.driver.paths, &name, method)?;
        } else if kib != most {
            return Err(RpcError::new(
                Code::OperationUnsupported,
                "Unable to change memory of active domain without the balloon device and guest \
                 OS balloon driver",
            ));
        }
    }
    if affected.config {
        redefine(call.driver, &domain, |old| {
            let most = old.machine.memory.size().kib();
            if !is_maximum && kib > most {
                return Err(RpcError::new(
                    Code::InvalidArg,
                    "cannot set memory higher than max memory",
                ));
            }
            let mut new = old.clone();
            if let (false, Some(balloon)) = (is_maximum, new.machine.devices.pci.balloon_mut()) {
                let size = MemorySize::from_bytes(kib.saturating_mul(1024));
                let size = size.map_err(|error| invalid(error.to_string()))?;
                balloon.current = (kib < most).then_some(size);
                return Ok(new);
            }
            // Without a balloon there is one size of memory: the guest has all of it.
            let changes = DomainChanges {
                memory_bytes: Some(kib.saturating_mul(1024)),
                ..DomainChanges::default()
            };
            let xml = old.to_xml(XmlView::Inactive);
            let (_, xml) = Domain::changed(&xml, &changes)
                .map_err(|error| crate::daemon::error::failed(&error))?;
            parse_domain(&xml)
        })?;
    }
    Ok(())
}

fn set_vcpus(call: &DriverCall<'_>, (wanted, count): (DomainRef, u32)) -> Answer<()> {
    set_vcpus_flags(call, (wanted, count, AFFECT_LIVE))
}

fn set_vcpus_flags(
    call: &DriverCall<'_>,
    (wanted, count, flags): (DomainRef, u32, u32),
) -> Answer<()> {
    check_flags(
        flags,
        AFFECT_LIVE | AFFECT_CONFIG | MAXIMUM,
        "virDomainSetVcpusFlags",
    )?;
    let domain = call.driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let affected = affected(&domain, flags)?;
    if affected.live {
        let there = u32::from(domain.lock().active()?.config.machine.vcpus.count());
        if flags & MAXIMUM != 0 {
            return Err(invalid(
                "maximum vcpu count of a live domain can't be modified",
            ));
        }
        if count > there {
            return Err(RpcError::new(
                Code::InvalidArg,
                format!(
                    "requested vcpus is greater than max allowable vcpus for the live domain: \
                     {count} > {there}"
                ),
            ));
        }
        if count < there {
            return Err(invalid(
                "failed to find appropriate hotpluggable vcpus to reach the desired target vcpu \
                 count",
            ));
        }
    }
    if affected.config {
        redefine(call.driver, &domain, |old| {
            let wrong = |why: String| RpcError::new(Code::InvalidArg, why);
            let there = old.machine.vcpus.count();
            if flags & MAXIMUM == 0 && count > u32::from(there) {
                return Err(wrong(format!(
                    "requested vcpus is greater than max allowable vcpus for the persistent \
                     domain: {count} > {there}"
                )));
            }
            let count = u8::try_from(count).map_err(|_| wrong(format!("{count} vCPUs")))?;
            let mut new = old.clone();
            // What was said of sockets and cores was said of another number of vCPUs.
            if count != there {
                new.machine.vcpus = Vcpus::new(count).map_err(|error| wrong(error.to_string()))?;
            }
            Ok(new)
        })?;
    }
    Ok(())
}

/// Kinds of metadata (`virDomainMetadataType`).
const DESCRIPTION: i32 = 0;
const TITLE: i32 = 1;
const ELEMENT: i32 = 2;

type NewMetadata = (
    DomainRef,
    i32,
    Option<String>,
    Option<String>,
    Option<String>,
    u32,
);

fn set_metadata(
    call: &DriverCall<'_>,
    (wanted, kind, text, key, uri, flags): NewMetadata,
) -> Answer<()> {
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG, "virDomainSetMetadata")?;
    let driver = call.driver;
    let domain = driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let affected = affected(&domain, flags)?;
    let change = |old: &DomainConfig| -> Answer<DomainConfig> {
        let text = text.as_deref().filter(|text| !text.is_empty());
        let mut title = old.title.as_ref().map(|title| title.as_str().to_owned());
        let mut description = old
            .description
            .as_ref()
            .map(|text| text.as_str().to_owned());
        let mut metadata = old.metadata.as_ref().map(|xml| xml.as_xml().to_owned());
        match kind {
            DESCRIPTION => description = text.map(str::to_owned),
            TITLE => title = text.map(str::to_owned),
            ELEMENT => {
                let uri = uri.as_deref().unwrap_or_default();
                metadata = texts::with_element(old, key.as_deref(), uri, text)?;
            }
            _ => return Err(RpcError::new(Code::InvalidArg, "unknown metadata type")),
        }
        let mut new = old.clone();
        new.set_texts(
            title.as_deref(),
            description.as_deref(),
            metadata.as_deref(),
        )
        .map_err(|error| RpcError::new(Code::InvalidArg, error.to_string()))?;
        Ok(new)
    };
    if affected.live {
        let (name, old) = {
            let state = domain.lock();
            (state.name.clone(), state.active()?.config.clone())
        };
        let new = change(&old)?;
        let texts = DomainTexts {
            title: new.title.as_ref().map(|title| title.as_str().to_owned()),
            description: new
                .description
                .as_ref()
                .map(|text| text.as_str().to_owned()),
            metadata: new.metadata.as_ref().map(|xml| xml.as_xml().to_owned()),
        };
        worker::run(&driver.paths, &name, Method::SetTexts(texts))?;
        if let Some(live) = &mut domain.lock().live {
            live.config = Arc::new(new);
        }
    }
    if affected.config {
        redefine(driver, &domain, change)?;
    }
    driver.notify(&domain, &Event::MetadataChange { kind, uri });
    Ok(())
}

fn metadata(
    call: &DriverCall<'_>,
    (wanted, kind, uri, flags): (DomainRef, i32, Option<String>, u32),
) -> Answer<String> {
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG, "virDomainGetMetadata")?;
    let domain = call.driver.registry.find(&wanted)?;
    let affected = affected(&domain, flags)?;
    let config = {
        let state = domain.lock();
        let config = if affected.live {
            state.current()
        } else {
            state.definition.as_ref()
        };
        config.cloned().ok_or_else(not_running)?
    };
    let missing = |what| {
        RpcError::new(
            Code::NoDomainMetadata,
            format!("Requested metadata element is not present{what}"),
        )
    };
    match kind {
        DESCRIPTION => {
            let text = config
                .description
                .as_ref()
                .map(|text| text.as_str().to_owned());
            text.ok_or_else(|| missing(""))
        }
        TITLE => {
            let text = config.title.as_ref().map(|title| title.as_str().to_owned());
            text.ok_or_else(|| missing(""))
        }
        ELEMENT => texts::element(&config, uri.as_deref().unwrap_or_default()),
        _ => Err(RpcError::new(Code::InvalidArg, "unknown metadata type")),
    }
}

fn rename(
    call: &DriverCall<'_>,
    (wanted, name, flags): (DomainRef, Option<String>, u32),
) -> Answer<i32> {
    check_flags(flags, 0, "virDomainRename")?;
    let driver = call.driver;
    let domain = driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let before = domain.reference();
    let name = name.unwrap_or_default();
    let checked = DomainName::new(&name)
        .map_err(|error| RpcError::new(Code::InvalidArg, format!("invalid name: {error}")))?;
    {
        let state = domain.lock();
        if state.live.is_some() {
            return Err(invalid("cannot rename active domain"));
        }
        if state.definition.is_none() {
            return Err(invalid("cannot rename a transient domain"));
        }
        if state.snapshots.count() > 0 {
            return Err(invalid("cannot rename domain with snapshots"));
        }
    }
    if driver.managed_save_file(domain.uuid).is_some() {
        return Err(invalid(
            "domain with a managed saved state can't be renamed",
        ));
    }
    driver.with_membership(|| {
        if driver.registry.by_name(&name).is_some() {
            return Err(invalid(format!("domain with name '{name}' already exists")));
        }
        let old = domain.lock().definition.clone().ok_or_else(not_running)?;
        let mut new = DomainConfig::clone(&old);
        new.name = checked;
        // One file is replaced by one rename, so that there is never a domain without a name.
        definitions::save(&driver.paths, &new)?;
        let mut state = domain.lock();
        state.definition = Some(Arc::new(new));
        state.name.clone_from(&name);
        Ok(())
    })?;
    driver.notify_as(&before, &state::UNDEFINED_RENAMED);
    driver.notify(&domain, &state::DEFINED_RENAMED);
    Ok(0)
}

fn set_lifecycle_action(
    call: &DriverCall<'_>,
    (wanted, kind, action, flags): (DomainRef, u32, u32, u32),
) -> Answer<()> {
    // `virDomainLifecycle` and `virDomainLifecycleAction`.
    const POWEROFF: u32 = 0;
    const REBOOT: u32 = 1;
    const CRASH: u32 = 2;
    let function = "virDomainSetLifecycleAction";
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG, function)?;
    let wrong = |why: String| RpcError::new(Code::InvalidArg, why);
    let action = match action {
        0 => LifecycleAction::Destroy,
        1 => LifecycleAction::Restart,
        3 => LifecycleAction::Preserve,
        other => {
            return Err(RpcError::new(
                Code::ConfigUnsupported,
                format!(
                    "lifecycle action {other} is not supported: destroy, restart, preserve are"
                ),
            ));
        }
    };
    if kind > CRASH {
        return Err(wrong(format!("invalid lifecycle type '{kind}'")));
    }
    let domain = call.driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    if affected(&domain, flags)?.live {
        return Err(RpcError::new(
            Code::OperationUnsupported,
            "the lifecycle actions of a running domain do not change",
        ));
    }
    redefine(call.driver, &domain, |old| {
        let mut new = old.clone();
        let lifecycle = &mut new.lifecycle;
        let place = match kind {
            POWEROFF => &mut lifecycle.on_poweroff,
            REBOOT => &mut lifecycle.on_reboot,
            _ => &mut lifecycle.on_crash,
        };
        *place = action;
        // As a document is held to the rules.
        parse_domain(&new.to_xml(XmlView::Inactive))
    })
}
