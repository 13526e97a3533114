//! Finding domains.

use std::sync::Arc;

use uuid::Uuid;

use super::{Answer, DriverCall, Livepoint, fits_groups};
use crate::daemon::managed::Managed;
use crate::daemon::state::RunState;
use crate::rpc::{Code, DomainRef, List, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(21, Quick, defined_names),
    procedure!(22, Quick, by_id),
    procedure!(23, Quick, by_name),
    procedure!(24, Quick, by_uuid),
    procedure!(25, Quick, count_defined),
    procedure!(37, Quick, active_ids),
    procedure!(51, Quick, count_active),
    procedure!(273, Quick, all),
];

/// Domains of a list, at most.
type Domains = List<DomainRef, 16_384>;

fn no_domain(details: String) -> RpcError {
    RpcError::new(Code::NoDomain, details)
}

fn by_id(call: &DriverCall<'_>, (id,): (i32,)) -> Answer<DomainRef> {
    let found = call.driver.registry.by_id(id);
    found
        .map(|domain| domain.reference())
        .ok_or_else(|| no_domain(format!("no domain with matching id {id}")))
}

fn by_name(call: &DriverCall<'_>, (name,): (String,)) -> Answer<DomainRef> {
    let found = call.driver.registry.by_name(&name);
    found
        .map(|domain| domain.reference())
        .ok_or_else(|| no_domain(format!("no domain with matching name '{name}'")))
}

fn by_uuid(call: &DriverCall<'_>, (uuid,): (Uuid,)) -> Answer<DomainRef> {
    let found = call.driver.registry.by_uuid(uuid);
    found
        .map(|domain| domain.reference())
        .ok_or_else(|| no_domain(format!("no domain with matching uuid '{uuid}'")))
}

/// Returns the domains that run, or those that do not.
fn chosen(call: &DriverCall<'_>, active: bool) -> Vec<DomainRef> {
    let domains = call.driver.registry.all();
    let references = domains.iter().map(|domain| domain.reference());
    references
        .filter(|found| (found.id >= 0) == active)
        .collect()
}

fn length<T>(list: &[T]) -> i32 {
    i32::try_from(list.len()).unwrap_or(i32::MAX)
}

fn count_active(call: &DriverCall<'_>, (): ()) -> Answer<i32> {
    Ok(length(&chosen(call, true)))
}

fn count_defined(call: &DriverCall<'_>, (): ()) -> Answer<i32> {
    Ok(length(&chosen(call, false)))
}

fn active_ids(call: &DriverCall<'_>, (most,): (i32,)) -> Answer<List<i32, 16_384>> {
    let most = usize::try_from(most).unwrap_or(0);
    let ids = chosen(call, true).into_iter().map(|found| found.id);
    Ok(List(ids.take(most).collect()))
}

fn defined_names(call: &DriverCall<'_>, (most,): (i32,)) -> Answer<List<String, 16_384>> {
    let most = usize::try_from(most).unwrap_or(0);
    let names = chosen(call, false).into_iter().map(|found| found.name);
    Ok(List(names.take(most).collect()))
}

/// Returns whether a domain fits the flags of a list: each pair of opposites that has a bit set
/// must be met (`virConnectListAllDomainsFlags`).
pub(super) fn fits(driver: &Livepoint, domain: &Managed, flags: u32) -> bool {
    let state = domain.lock();
    let active = state.live.is_some();
    let persistent = state.definition.is_some();
    let run = state.run_state();
    let saved = driver.managed_save_file(domain.uuid).is_some();
    let snapshots = state.snapshots.count() > 0;
    let groups: [&[(u32, bool)]; 7] = [
        &[(1, active), (2, !active)],
        &[(4, persistent), (8, !persistent)],
        &[
            (16, matches!(run, RunState::Running(_))),
            (32, matches!(run, RunState::Paused(_))),
            (64, matches!(run, RunState::Shutoff(_))),
            (128, false),
        ],
        &[(256, saved), (512, !saved)],
        &[(1024, state.autostart), (2048, !state.autostart)],
        &[(4096, snapshots), (8192, !snapshots)],
        &[(16_384, false), (32_768, true)],
    ];
    fits_groups(flags, &groups)
}

fn all(call: &DriverCall<'_>, (need_results, flags): (i32, u32)) -> Answer<(Domains, u32)> {
    super::check_flags(flags, 0xffff, "virConnectListAllDomains")?;
    let domains: Vec<Arc<Managed>> = call.driver.registry.all();
    let found: Vec<_> = domains
        .iter()
        .filter(|domain| fits(call.driver, domain, flags))
        .map(|domain| domain.reference())
        .collect();
    let count = u32::try_from(found.len()).unwrap_or(u32::MAX);
    Ok((
        List(if need_results == 0 { Vec::new() } else { found }),
        count,
    ))
}
