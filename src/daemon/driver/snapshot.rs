//! Snapshots: taken while the domain runs, gone back to, deleted.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use super::jobs::checkpoint;
use super::save::config_of;
use super::snapshot_document::{disks_in_image, disks_listed, external_memory, request};
use super::{Answer, DriverCall, Livepoint, check_flags, now, parse_domain};
use crate::daemon::error::failed;
use crate::daemon::job::JobKind;
use crate::daemon::livepoint::Start;
use crate::daemon::managed::Managed;
use crate::daemon::snapshots::{Snapshot, SnapshotState};
use crate::daemon::state::{Running, Shutoff};
use crate::daemon::worker::{self, Boot};
use crate::daemon::xml::{self, Element};
use crate::daemon::{definitions, outbox};
use crate::host::control::protocol::Method;
use crate::host::{Image, XmlView};
use crate::rpc::{Code, DomainRef, Procedure, RpcError, SnapshotRef, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(185, Slow, create),
    procedure!(192, Slow, revert),
    procedure!(193, Slow, delete),
];

/// Flags of a creation (`virDomainSnapshotCreateFlags`).
const REDEFINE: u32 = 1;
const CURRENT: u32 = 2;
const NO_METADATA: u32 = 4;
const HALT: u32 = 8;
const DISK_ONLY: u32 = 16;
const REUSE_EXTERNAL: u32 = 32;
const QUIESCE: u32 = 64;
const CREATE_FLAGS: u32 = 0x3ff;

fn invalid(why: impl Into<String>) -> RpcError {
    RpcError::new(Code::OperationInvalid, why)
}

fn unsupported(why: &str) -> RpcError {
    RpcError::new(Code::OperationUnsupported, why)
}

fn create(
    call: &DriverCall<'_>,
    (wanted, xml, flags): (DomainRef, String, u32),
) -> Answer<SnapshotRef> {
    check_flags(flags, CREATE_FLAGS, "virDomainSnapshotCreateXML")?;
    let driver = call.driver;
    let domain = driver.registry.find(&wanted)?;
    let document = xml::read(&xml, "domainsnapshot")?;
    let name = if flags & REDEFINE != 0 {
        redefine(&domain, &document, &xml, flags)?
    } else {
        refuse_what_is_missing(flags)?;
        take(driver, &domain, &document, flags)?
    };
    Ok(SnapshotRef {
        name,
        domain: domain.reference(),
    })
}

fn refuse_what_is_missing(flags: u32) -> Answer<()> {
    for (flag, why) in [
        (
            DISK_ONLY,
            "a snapshot of the disks without the memory is not supported",
        ),
        (QUIESCE, "QEMU guest agent is not configured"),
        (
            NO_METADATA,
            "a snapshot without metadata is not supported: use save for an image alone",
        ),
        (REUSE_EXTERNAL, "an existing file is not taken over"),
    ] {
        if flags & flag != 0 {
            return Err(unsupported(why));
        }
    }
    Ok(())
}

/// Takes a new snapshot and returns its name.
fn take(
    driver: &Livepoint,
    domain: &Arc<Managed>,
    document: &Element,
    flags: u32,
) -> Answer<String> {
    let guard = domain.begin(JobKind::Snapshot)?;
    let name = document
        .child_text("name")
        .map_or_else(|| now().to_string(), str::to_owned);
    let (mut snapshot, config, is_live) = {
        let state = domain.lock();
        if state.snapshots.is_taken(&name) {
            return Err(invalid(format!("domain snapshot {name} already exists")));
        }
        let config = state.current().cloned();
        let config = config.ok_or_else(crate::daemon::managed::not_running)?;
        let word = state.run_state().word();
        let snapshot = Snapshot {
            description: document.child_text("description").map(str::to_owned),
            parent: state.snapshots.current().map(str::to_owned),
            created: now(),
            state: SnapshotState::from_word(word).unwrap_or(SnapshotState::Shutoff),
            image: None,
            is_external: false,
            disks: Vec::new(),
            domain_xml: config.to_xml(XmlView::Inactive),
            is_pending: false,
            name: name.clone(),
        };
        (snapshot, config, state.live.is_some())
    };
    let external = external_memory(document, is_live)?;
    snapshot.disks = disks_in_image(document, &config, is_live)?;
    if is_live {
        let image = match &external {
            Some(file) => file.clone(),
            None => domain.lock().snapshots.image_file(&name)?,
        };
        let mut request = request(document, &config)?;
        request.out = Some(image.clone());
        snapshot.image = Some(image);
        snapshot.is_external = external.is_some();
        snapshot.is_pending = true;
        // Or one of before would be taken for this one's.
        outbox::clear(&driver.paths, domain.uuid)?;
        // A daemon that ends now finds this, and whatever became of the image.
        domain.lock().snapshots.put(snapshot.clone())?;
        if let Err(error) = checkpoint(driver, domain, &guard.job, request) {
            // An older file at that path is whole, and not ours.
            domain.lock().snapshots.remove(&name, true)?;
            return Err(error);
        }
        snapshot.is_pending = false;
    }
    {
        let mut state = domain.lock();
        state.snapshots.put(snapshot)?;
        state.snapshots.set_current(Some(&name))?;
    }
    if flags & HALT != 0 && is_live {
        driver.stop(domain, Shutoff::FromSnapshot)?;
    }
    Ok(name)
}

/// Takes in a snapshot that the client describes whole: one of before, or a changed one.
fn redefine(domain: &Arc<Managed>, document: &Element, xml: &str, flags: u32) -> Answer<String> {
    let _job = domain.begin(JobKind::Modify)?;
    let missing = |what: &str| {
        RpcError::new(
            Code::XmlError,
            format!("a snapshot that is redefined needs {what}"),
        )
    };
    let name = document
        .child_text("name")
        .ok_or_else(|| missing("a <name>"))?
        .to_owned();
    let state = document
        .child_text("state")
        .and_then(SnapshotState::from_word);
    let state = state.ok_or_else(|| missing("a <state>: running, paused or shutoff"))?;
    let created = document
        .child_text("creationTime")
        .and_then(|text| text.parse().ok());
    let parent = document
        .child("parent")
        .and_then(|parent| parent.child_text("name"));
    let mut held = domain.lock();
    let old = held.snapshots.get(&name).ok().cloned();
    let domain_xml = match document.child("domain") {
        Some(element) => {
            let config = parse_domain(xml.get(element.start..element.end).unwrap_or_default())?;
            if config.uuid != domain.uuid {
                let why = format!(
                    "definition for snapshot {name} must use uuid {}",
                    domain.uuid
                );
                return Err(RpcError::new(Code::InvalidArg, why));
            }
            config.to_xml(XmlView::Inactive)
        }
        None => old
            .as_ref()
            .map(|old| old.domain_xml.clone())
            .ok_or_else(|| missing("a <domain>"))?,
    };
    if let Some(parent) = parent {
        held.snapshots.get(parent).map_err(|_| {
            RpcError::new(
                Code::InvalidArg,
                format!("parent {parent} for snapshot {name} not found"),
            )
        })?;
        let below = held.snapshots.descendants(&name);
        if parent == name || below.iter().any(|snapshot| snapshot.name == parent) {
            let why = format!("parent {parent} would create cycle to {name}");
            return Err(RpcError::new(Code::InvalidArg, why));
        }
    }
    let file = document
        .child("memory")
        .and_then(|memory| memory.attribute("file"));
    let (image, is_external) = match (file, &old) {
        (Some(file), _) => (Some(PathBuf::from(file)), true),
        (None, Some(old)) => (old.image.clone(), old.is_external),
        (None, None) if state == SnapshotState::Shutoff => (None, false),
        // Its image is where this daemon, or one before it, would have put it.
        (None, None) => (Some(held.snapshots.image_file(&name)?), false),
    };
    if let Some(image) = &image {
        let found = config_of(image)?;
        if found.uuid != domain.uuid {
            let why = format!("{} is an image of another domain", image.display());
            return Err(RpcError::new(Code::InvalidArg, why));
        }
    }
    held.snapshots.put(Snapshot {
        description: document.child_text("description").map(str::to_owned),
        parent: parent.map(str::to_owned),
        created: created.unwrap_or_else(now),
        state,
        image,
        is_external,
        disks: disks_listed(document),
        domain_xml,
        is_pending: false,
        name: name.clone(),
    })?;
    if flags & CURRENT != 0 {
        held.snapshots.set_current(Some(&name))?;
    }
    Ok(name)
}

fn revert(call: &DriverCall<'_>, (wanted, flags): (SnapshotRef, u32)) -> Answer<()> {
    const RUNNING: u32 = 1;
    const PAUSED: u32 = 2;
    check_flags(flags, 0xf, "virDomainRevertToSnapshot")?;
    let driver = call.driver;
    let domain = driver.registry.find(&wanted.domain)?;
    let guard = domain.begin(JobKind::Revert)?;
    let snapshot = domain.lock().snapshots.get(&wanted.name)?.clone();
    let config = Arc::new(parse_domain(&snapshot.domain_xml)?);
    if let Some(image) = &snapshot.image {
        // Known to be there, and fit for this host, before anything is given up for it.
        let lacks = Image::open(image).and_then(|image| image.host_lacks());
        let lacks = lacks.map_err(|error| failed(&error))?;
        if !lacks.is_empty() {
            return Err(RpcError::new(Code::ConfigUnsupported, lacks.join("; ")));
        }
    }
    if domain.lock().live.is_some() {
        driver.stop(&domain, Shutoff::FromSnapshot)?;
    }
    let runs = snapshot.image.is_some() || flags & (RUNNING | PAUSED) != 0;
    let paused = match snapshot.state {
        SnapshotState::Paused => flags & RUNNING == 0,
        _ => flags & PAUSED != 0,
    };
    let boot = match &snapshot.image {
        Some(image) => Boot::Image(image),
        None => Boot::Fresh(&config),
    };
    let why = Running::FromSnapshot;
    let start = Start {
        boot,
        paused,
        why,
        owner: None,
    };
    let started = if runs {
        driver.start(&domain, &config, &start)
    } else {
        Ok(())
    };
    if let Err(error) = started {
        drop(guard);
        driver.drop_transient(&domain);
        return Err(error);
    }
    let mut state = domain.lock();
    if state.definition.is_some() {
        definitions::save(&driver.paths, &config)?;
        state.definition = Some(config);
    }
    if !runs {
        state.shutoff = Shutoff::FromSnapshot;
    }
    Ok(state.snapshots.set_current(Some(&wanted.name))?)
}

fn delete(call: &DriverCall<'_>, (wanted, flags): (SnapshotRef, u32)) -> Answer<()> {
    const CHILDREN: u32 = 1;
    const METADATA_ONLY: u32 = 2;
    const CHILDREN_ONLY: u32 = 4;
    check_flags(flags, 7, "virDomainSnapshotDelete")?;
    let domain = call.driver.registry.find(&wanted.domain)?;
    let _job = domain.begin(JobKind::Modify)?;
    let mut state = domain.lock();
    state.snapshots.get(&wanted.name)?;
    let mut gone = Vec::new();
    if flags & (CHILDREN | CHILDREN_ONLY) != 0 {
        let below = state.snapshots.descendants(&wanted.name);
        gone.extend(below.iter().rev().map(|snapshot| snapshot.name.clone()));
    }
    if flags & CHILDREN_ONLY == 0 {
        gone.push(wanted.name);
    }
    for name in gone {
        state.snapshots.remove(&name, flags & METADATA_ONLY != 0)?;
    }
    Ok(())
}

impl Livepoint {
    /// Settles the snapshots that an earlier daemon had not finished when it ended.
    pub(in crate::daemon) fn resolve_pending(self: &Arc<Self>) {
        for domain in self.registry.all() {
            let pending = domain.lock().snapshots.pending();
            for snapshot in pending {
                let (driver, domain) = (self.clone(), domain.clone());
                // A checkpoint may still run, which takes its time.
                let spawned = thread::Builder::new()
                    .name("lvp-pending".to_owned())
                    .spawn(move || driver.resolve(&domain, snapshot));
                if let Err(error) = spawned {
                    log::error!("no thread to settle a snapshot: {error}");
                }
            }
        }
    }

    fn resolve(&self, domain: &Arc<Managed>, mut snapshot: Snapshot) {
        let guard = domain.begin(JobKind::Snapshot);
        let name = domain.lock().name.clone();
        if let Err(error) = self.wait_for_worker_job(&name) {
            log::info!("domain {name}: {error}");
        }
        // Only the commit of a whole image puts a file there, or where a worker has to put it.
        let is_at = |path: &Path| config_of(path).is_ok_and(|config| config.uuid == domain.uuid);
        let is_whole = snapshot.image.as_deref().is_some_and(|image| {
            let waits = !is_at(image) && is_at(&outbox::image(&self.paths, domain.uuid));
            let moved = waits.then(|| outbox::move_to(&self.paths, domain.uuid, image));
            if let Some(Err(error)) = moved {
                log::error!("domain {name}: {error}");
            }
            is_at(image)
        });
        let mut state = domain.lock();
        let settled = if is_whole {
            snapshot.is_pending = false;
            let name = snapshot.name.clone();
            let kept = state.snapshots.put(snapshot);
            kept.and_then(|()| Ok(state.snapshots.set_current(Some(&name))?))
        } else {
            state.snapshots.remove(&snapshot.name, true)
        };
        drop(state);
        if let Err(error) = settled {
            log::error!("domain {name}: a snapshot that was not finished: {error}");
        }
        drop(guard);
    }

    fn wait_for_worker_job(&self, name: &str) -> Answer<()> {
        let mut worker = worker::connect(&self.paths, name)?;
        let status = worker.status().map_err(|error| failed(&error))?;
        let Some(job) = status.job else {
            return Ok(());
        };
        let done = worker.call::<serde_json::Value>(Method::JobWait(job));
        done.map(drop).map_err(|error| failed(&error))
    }
}
