//! What each procedure of libvirt's protocol does.
//!
//! Each submodule has a part of the table; a procedure that is in none of them is answered with
//! libvirt's own error for drivers that do not have it. `docs/libvirt-coverage.md` lists all, and a
//! test compares it with the table.

mod absent;
mod block;
mod config;
mod connect;
mod console;
mod devices;
mod dirty_rate;
mod dump;
mod events;
mod host;
mod info;
mod interface;
mod jobs;
mod lifecycle;
mod lookup;
mod memory_stats;
mod node;
mod save;
mod snapshot;
mod snapshot_document;
mod snapshot_info;
mod stats;
mod vcpus;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use super::livepoint::{Livepoint, Start};
use super::managed::Managed;
use super::state::Running;
use super::worker::Boot;
use crate::host::DomainConfig;
pub(super) use console::Consoles;

use crate::rpc::{
    Call, Client, Code, Driver, KNOWN, PROGRAM_QEMU, PROGRAM_REMOTE, Procedure, RpcError,
};

/// A call of this driver.
pub(super) type DriverCall<'a> = Call<'a, Livepoint>;
/// What a handler returns.
pub(super) type Answer<T> = Result<T, RpcError>;

/// Every part of the table.
const PARTS: &[&[Procedure<Livepoint>]] = &[
    connect::TABLE,
    host::TABLE,
    node::TABLE,
    lookup::TABLE,
    lifecycle::TABLE,
    info::TABLE,
    vcpus::TABLE,
    config::TABLE,
    devices::TABLE,
    memory_stats::TABLE,
    stats::TABLE,
    dirty_rate::TABLE,
    block::TABLE,
    interface::TABLE,
    save::TABLE,
    dump::TABLE,
    jobs::TABLE,
    snapshot::TABLE,
    snapshot_info::TABLE,
    console::TABLE,
    events::TABLE,
    absent::TABLE,
];

impl Driver for Livepoint {
    fn procedure(program: u32, number: i32) -> Option<&'static Procedure<Self>> {
        let mut all = match program {
            PROGRAM_REMOTE => PARTS.iter().copied().flatten(),
            PROGRAM_QEMU => return jobs::QEMU_TABLE.iter().find(|known| known.number == number),
            _ => return None,
        };
        all.find(|known| known.number == number)
    }

    fn disconnected(&self, client: &Client) {
        self.client_left(client.id());
    }
}

/// Returns the procedures of the protocol that a client may call, each with whether the driver
/// carries it out. For the test of the documentation.
pub fn coverage() -> Vec<(i32, &'static str, bool)> {
    let has = |number| Livepoint::procedure(PROGRAM_REMOTE, number).is_some();
    KNOWN
        .iter()
        .map(|known| (known.number, known.name, has(known.number)))
        .collect()
}

/// Returns whether something fits the flags of a list: of each group of which a flag is set, one
/// that is set must hold.
fn fits_groups(flags: u32, groups: &[&[(u32, bool)]]) -> bool {
    groups.iter().all(|group| {
        let mut asked = group
            .iter()
            .filter(|(flag, _)| flags & flag != 0)
            .peekable();
        asked.peek().is_none() || asked.any(|(_, holds)| *holds)
    })
}

/// Refuses flags that a call does not know, in libvirt's words.
fn check_flags(flags: u32, known: u32, function: &str) -> Answer<()> {
    let unknown = flags & !known;
    if unknown == 0 {
        return Ok(());
    }
    Err(RpcError::new(
        Code::InvalidArg,
        format!("unsupported flags (0x{unknown:x}) in function {function}"),
    ))
}

/// Reads a domain's document.
fn parse_domain(xml: &str) -> Answer<DomainConfig> {
    let (config, notes) =
        DomainConfig::parse_with_notes(xml).map_err(|error| super::error::refused(&error))?;
    for note in notes {
        log::info!(
            "domain {}: line {}: {}: {}",
            config.name,
            note.place.line,
            note.place.element,
            note.text
        );
    }
    Ok(config)
}

/// Starts a defined domain: from its managed save where there is one. The caller holds a job.
pub(super) fn start_defined(
    driver: &Arc<Livepoint>,
    domain: &Arc<Managed>,
    paused: bool,
    owner: Option<u64>,
) -> Answer<()> {
    let config = domain.lock().definition.clone();
    let config = config.ok_or_else(super::managed::not_running)?;
    if let Some(image) = driver.managed_save_file(domain.uuid) {
        // What was saved, which may have another document than what is defined now.
        let config = Arc::new(save::config_of(&image)?);
        let paused = paused || save::was_paused(&driver.paths.managed_save(domain.uuid));
        let start = Start {
            boot: Boot::Image(&image),
            paused,
            why: Running::Restored,
            owner,
        };
        driver.start(domain, &config, &start)?;
        return save::remove_managed(driver, domain.uuid);
    }
    let start = Start {
        boot: Boot::Fresh(&config),
        paused,
        why: Running::Booted,
        owner,
    };
    driver.start(domain, &config, &start)
}

/// Returns the seconds since 1970.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}
