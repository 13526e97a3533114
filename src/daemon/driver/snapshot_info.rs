//! What snapshots there are. And disk checkpoints, libvirt's other thing of that name: none.

use super::{Answer, DriverCall, Livepoint, check_flags, fits_groups};
use crate::daemon::managed::{Managed, State};
use crate::daemon::snapshots::{Snapshot, SnapshotState, Snapshots};
use crate::rpc::{Code, DomainRef, List, Procedure, RpcError, SnapshotRef, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(186, Quick, xml_desc),
    procedure!(187, Quick, count),
    procedure!(188, Quick, names),
    procedure!(189, Quick, lookup),
    procedure!(190, Quick, has_current),
    procedure!(191, Quick, current),
    procedure!(244, Quick, parent),
    procedure!(246, Quick, count_children),
    procedure!(247, Quick, names_of_children),
    procedure!(271, Quick, is_current),
    procedure!(272, Quick, has_metadata),
    procedure!(274, Quick, all),
    procedure!(275, Quick, all_children),
    procedure!(413, Quick, no_checkpoints),
    procedure!(415, Quick, no_checkpoint),
];

/// Flags of lists (`virDomainSnapshotListFlags`). The first means roots for a domain, and
/// descendants for a snapshot.
const ROOTS: u32 = 1;
const DESCENDANTS: u32 = 1;
const LIST_FLAGS: u32 = 0x7ff;

/// Snapshots of a list, at most.
type Found = List<SnapshotRef, 16_384>;

/// Reads something of a domain's snapshots.
fn with<T>(
    call: &DriverCall<'_>,
    wanted: &DomainRef,
    read: impl FnOnce(&Managed, &State) -> Answer<T>,
) -> Answer<T> {
    let domain = call.driver.registry.find(wanted)?;
    let state = domain.lock();
    read(&domain, &state)
}

fn reference(domain: &Managed, state: &State, name: &str) -> SnapshotRef {
    SnapshotRef {
        name: name.to_owned(),
        domain: domain.reference_in(state),
    }
}

/// Returns whether a snapshot fits a list's flags: of each pair of opposites that is named, one
/// must hold.
fn fits(snapshots: &Snapshots, snapshot: &Snapshot, flags: u32) -> bool {
    let leaf = snapshots.children(&snapshot.name).next().is_none();
    let active = snapshot.state != SnapshotState::Shutoff;
    let groups: [&[(u32, bool)]; 4] = [
        &[(2, true), (16, false)],
        &[(4, leaf), (8, !leaf)],
        &[(32, !active), (64, active), (128, false)],
        &[(256, !snapshot.is_external), (512, snapshot.is_external)],
    ];
    fits_groups(flags, &groups)
}

/// Returns the names of a domain's snapshots, parents before children.
fn of_domain(state: &State, flags: u32) -> Vec<String> {
    let snapshots = &state.snapshots;
    let roots = snapshots
        .iter()
        .filter(|snapshot| snapshot.parent.is_none());
    let mut found: Vec<&Snapshot> = Vec::new();
    for root in roots {
        found.push(root);
        if flags & ROOTS == 0 {
            found.extend(snapshots.descendants(&root.name));
        }
    }
    let fitting = found
        .into_iter()
        .filter(|snapshot| fits(snapshots, snapshot, flags));
    fitting.map(|snapshot| snapshot.name.clone()).collect()
}

/// Returns the names of the snapshots below one.
fn below(state: &State, name: &str, flags: u32) -> Answer<Vec<String>> {
    let snapshots = &state.snapshots;
    snapshots.get(name)?;
    let found = if flags & DESCENDANTS == 0 {
        snapshots.children(name).collect()
    } else {
        snapshots.descendants(name)
    };
    let fitting = found
        .into_iter()
        .filter(|snapshot| fits(snapshots, snapshot, flags));
    Ok(fitting.map(|snapshot| snapshot.name.clone()).collect())
}

fn length(names: &[String]) -> i32 {
    i32::try_from(names.len()).unwrap_or(i32::MAX)
}

fn xml_desc(call: &DriverCall<'_>, (wanted, _): (SnapshotRef, u32)) -> Answer<String> {
    with(call, &wanted.domain, |_, state| {
        Ok(state.snapshots.get(&wanted.name)?.to_xml())
    })
}

fn count(call: &DriverCall<'_>, (wanted, flags): (DomainRef, u32)) -> Answer<i32> {
    check_flags(flags, LIST_FLAGS, "virDomainSnapshotNum")?;
    with(call, &wanted, |_, state| {
        Ok(length(&of_domain(state, flags)))
    })
}

type Names = List<String, 16_384>;

fn names(call: &DriverCall<'_>, (wanted, most, flags): (DomainRef, i32, u32)) -> Answer<Names> {
    check_flags(flags, LIST_FLAGS, "virDomainSnapshotListNames")?;
    with(call, &wanted, |_, state| {
        let mut names = of_domain(state, flags);
        names.truncate(usize::try_from(most).unwrap_or(0));
        Ok(List(names))
    })
}

fn count_children(call: &DriverCall<'_>, (wanted, flags): (SnapshotRef, u32)) -> Answer<i32> {
    check_flags(flags, LIST_FLAGS, "virDomainSnapshotNumChildren")?;
    with(call, &wanted.domain, |_, state| {
        Ok(length(&below(state, &wanted.name, flags)?))
    })
}

fn names_of_children(
    call: &DriverCall<'_>,
    (wanted, most, flags): (SnapshotRef, i32, u32),
) -> Answer<Names> {
    check_flags(flags, LIST_FLAGS, "virDomainSnapshotListChildrenNames")?;
    with(call, &wanted.domain, |_, state| {
        let mut names = below(state, &wanted.name, flags)?;
        names.truncate(usize::try_from(most).unwrap_or(0));
        Ok(List(names))
    })
}

fn answer(domain: &Managed, state: &State, names: &[String], need_results: i32) -> (Found, i32) {
    let found = if need_results == 0 { &[] } else { names };
    let found = found.iter().map(|name| reference(domain, state, name));
    (List(found.collect()), length(names))
}

fn all(
    call: &DriverCall<'_>,
    (wanted, need, flags): (DomainRef, i32, u32),
) -> Answer<(Found, i32)> {
    check_flags(flags, LIST_FLAGS, "virDomainListAllSnapshots")?;
    with(call, &wanted, |domain, state| {
        Ok(answer(domain, state, &of_domain(state, flags), need))
    })
}

fn all_children(
    call: &DriverCall<'_>,
    (wanted, need, flags): (SnapshotRef, i32, u32),
) -> Answer<(Found, i32)> {
    check_flags(flags, LIST_FLAGS, "virDomainSnapshotListAllChildren")?;
    with(call, &wanted.domain, |domain, state| {
        let names = below(state, &wanted.name, flags)?;
        Ok(answer(domain, state, &names, need))
    })
}

fn lookup(
    call: &DriverCall<'_>,
    (wanted, name, _): (DomainRef, String, u32),
) -> Answer<SnapshotRef> {
    with(call, &wanted, |domain, state| {
        state.snapshots.get(&name)?;
        Ok(reference(domain, state, &name))
    })
}

fn has_current(call: &DriverCall<'_>, (wanted, _): (DomainRef, u32)) -> Answer<i32> {
    with(call, &wanted, |_, state| {
        Ok(i32::from(state.snapshots.current().is_some()))
    })
}

fn current(call: &DriverCall<'_>, (wanted, _): (DomainRef, u32)) -> Answer<SnapshotRef> {
    with(call, &wanted, |domain, state| {
        let name = state.snapshots.current().ok_or_else(|| {
            RpcError::new(
                Code::NoDomainSnapshot,
                "the domain does not have a current snapshot",
            )
        })?;
        Ok(reference(domain, state, name))
    })
}

fn parent(call: &DriverCall<'_>, (wanted, _): (SnapshotRef, u32)) -> Answer<SnapshotRef> {
    with(call, &wanted.domain, |domain, state| {
        let snapshot = state.snapshots.get(&wanted.name)?;
        let parent = snapshot.parent.as_deref().ok_or_else(|| {
            RpcError::new(
                Code::NoDomainSnapshot,
                format!("snapshot '{}' does not have a parent", wanted.name),
            )
        })?;
        Ok(reference(domain, state, parent))
    })
}

fn is_current(call: &DriverCall<'_>, (wanted, _): (SnapshotRef, u32)) -> Answer<i32> {
    with(call, &wanted.domain, |_, state| {
        let snapshot = state.snapshots.get(&wanted.name)?;
        Ok(i32::from(state.snapshots.current() == Some(&snapshot.name)))
    })
}

fn has_metadata(call: &DriverCall<'_>, (wanted, _): (SnapshotRef, u32)) -> Answer<i32> {
    with(call, &wanted.domain, |_, state| {
        state.snapshots.get(&wanted.name)?;
        Ok(1)
    })
}

fn no_checkpoints(
    call: &DriverCall<'_>,
    (wanted, _, _): (DomainRef, i32, u32),
) -> Answer<(Found, i32)> {
    with(call, &wanted, |_, _| Ok((List(Vec::new()), 0)))
}

fn no_checkpoint(
    call: &DriverCall<'_>,
    (wanted, name, _): (DomainRef, String, u32),
) -> Answer<SnapshotRef> {
    call.driver.registry.find(&wanted)?;
    Err(RpcError::new(
        Code::NoDomainCheckpoint,
        format!("no domain checkpoint with matching name '{name}'"),
    ))
}
