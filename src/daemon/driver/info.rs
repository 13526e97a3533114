//! What a domain is and does.

use super::stats::{Figures, cpu_time_ns};
use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::error::failed;
use crate::daemon::worker;
use crate::host::XmlView;
use crate::host::control::protocol::Method;
use crate::rpc::{CharList, Code, DomainRef, List, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(14, Slow, xml_desc),
    procedure!(16, Slow, info),
    procedure!(17, Quick, max_memory),
    procedure!(18, Quick, max_vcpus),
    procedure!(19, Quick, os_type),
    procedure!(121, Quick, security_label),
    procedure!(150, Quick, is_active),
    procedure!(151, Quick, is_persistent),
    procedure!(200, Quick, vcpu_count),
    procedure!(202, Quick, is_updated),
    procedure!(212, Quick, state),
    procedure!(229, Quick, control_info),
    procedure!(426, Quick, messages),
];

/// Flags that choose between the running machine and the definition (`virDomainModificationImpact`).
pub(super) const AFFECT_LIVE: u32 = 1;
pub(super) const AFFECT_CONFIG: u32 = 2;

fn xml_desc(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<String> {
    const SECURE: u32 = 1;
    const INACTIVE: u32 = 2;
    check_flags(flags, 0xf, "virDomainGetXMLDesc")?;
    if flags & SECURE != 0 && call.client.is_read_only() {
        return Err(RpcError::new(
            Code::OperationDenied,
            "virDomainGetXMLDesc with secure flag",
        ));
    }
    let domain = call.driver.registry.find(&wanted)?;
    let (name, config, is_live) = {
        let state = domain.lock();
        let is_live = state.live.is_some() && flags & INACTIVE == 0;
        let config = if flags & INACTIVE == 0 {
            state.current()
        } else {
            state.definition.as_ref().or(state.current())
        };
        (state.name.clone(), config.cloned(), is_live)
    };
    let config = config.ok_or_else(crate::daemon::managed::not_running)?;
    if is_live {
        let told = worker::connect(&call.driver.paths, &name).and_then(|mut client| {
            client
                .call::<String>(Method::DumpXml)
                .map_err(|error| failed(&error))
        });
        match told {
            Ok(xml) => return Ok(xml),
            // It may be ending: what it was started with is as good.
            Err(error) => log::debug!("domain {name}: {error}"),
        }
    }
    Ok(config.to_xml(XmlView::Inactive))
}

type Info = (u32, u64, u64, u32, u64);

fn info(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<Info> {
    let domain = call.driver.registry.find(&wanted)?;
    let state = domain.lock();
    let (number, _) = state.run_state().numbers();
    let machine = state.current().map(|config| &config.machine);
    let vcpus = machine.map_or(0, |machine| u32::from(machine.vcpus.count()));
    let pid = state.live.as_ref().map(|live| live.pid);
    let figures = Figures::new(call.driver, &state);
    drop(state);
    let number = u32::try_from(number).unwrap_or(0);
    let (kib, used) = (figures.memory_kib(), figures.used_kib());
    Ok((number, kib, used, vcpus, pid.map_or(0, cpu_time_ns)))
}

fn max_memory(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<u64> {
    let domain = call.driver.registry.find(&wanted)?;
    let kib = Figures::new(call.driver, &domain.lock()).memory_kib();
    Ok(kib)
}

fn max_vcpus(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<i32> {
    vcpu_count(call, (wanted, AFFECT_LIVE))
}

pub(super) fn vcpu_count(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<i32> {
    const MAXIMUM: u32 = 4;
    const GUEST: u32 = 8;
    check_flags(
        flags,
        AFFECT_LIVE | AFFECT_CONFIG | MAXIMUM | GUEST,
        "virDomainGetVcpusFlags",
    )?;
    if flags & GUEST != 0 {
        return Err(RpcError::new(
            Code::ArgumentUnsupported,
            "QEMU guest agent is not configured",
        ));
    }
    let domain = call.driver.registry.find(&wanted)?;
    let state = domain.lock();
    let config = match flags & (AFFECT_LIVE | AFFECT_CONFIG) {
        // The library adds MAXIMUM alone to ask for what could be there.
        AFFECT_LIVE if flags & MAXIMUM == 0 && state.live.is_none() => {
            return Err(crate::daemon::managed::not_running());
        }
        AFFECT_CONFIG => state.definition.as_ref().or(state.current()),
        _ => state.current(),
    };
    Ok(config.map_or(0, |config| i32::from(config.machine.vcpus.count())))
}

fn os_type(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<&'static str> {
    call.driver.registry.find(&wanted)?;
    Ok("hvm")
}

fn security_label(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<(CharList, i32)> {
    call.driver.registry.find(&wanted)?;
    Ok((CharList(String::new()), 0))
}

fn is_active(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<i32> {
    let domain = call.driver.registry.find(&wanted)?;
    let is_active = domain.lock().live.is_some();
    Ok(i32::from(is_active))
}

fn is_persistent(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<i32> {
    let domain = call.driver.registry.find(&wanted)?;
    let is_persistent = domain.lock().definition.is_some();
    Ok(i32::from(is_persistent))
}

fn is_updated(call: &DriverCall<'_>, (wanted,): (DomainRef,)) -> Answer<i32> {
    let domain = call.driver.registry.find(&wanted)?;
    let state = domain.lock();
    let is_updated = match (&state.live, &state.definition) {
        (Some(live), Some(definition)) => live.config != *definition,
        _ => false,
    };
    Ok(i32::from(is_updated))
}

fn state(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<(i32, i32)> {
    check_flags(flags, 0, "virDomainGetState")?;
    let domain = call.driver.registry.find(&wanted)?;
    let numbers = domain.lock().run_state().numbers();
    Ok(numbers)
}

fn control_info(
    call: &DriverCall<'_>,
    (wanted, flags): (DomainRef, u32),
) -> Answer<(u32, u32, u64)> {
    const OK: u32 = 0;
    const JOB: u32 = 1;
    check_flags(flags, 0, "virDomainGetControlInfo")?;
    let domain = call.driver.registry.find(&wanted)?;
    let state = domain.lock();
    state.active()?;
    let job = state.job.as_ref();
    let elapsed = job.map_or(0, |job| {
        u64::try_from(job.elapsed().as_millis()).unwrap_or(0)
    });
    Ok((if job.is_some() { JOB } else { OK }, 0, elapsed))
}

fn messages(
    call: &DriverCall<'_>,
    (wanted, flags): (DomainRef, u32),
) -> Answer<List<String, 2048>> {
    check_flags(flags, 3, "virDomainGetMessages")?;
    call.driver.registry.find(&wanted)?;
    Ok(List(Vec::new()))
}
