//! How a guest uses its memory, as its balloon's driver says.

use super::config::{affected, redefine};
use super::info::{AFFECT_CONFIG, AFFECT_LIVE};
use super::stats::{Figures, rss_kib};
use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::job::JobKind;
use crate::daemon::worker;
use crate::host::control::protocol::{Method, Seconds};
use crate::host::{DomainConfig, GuestMemoryUse, MemoryFigure};
use crate::rpc::{Code, DomainRef, List, Procedure, RpcError, TypedParam, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(159, Slow, memory_stats),
    procedure!(308, Slow, set_memory_stats_period),
];

// Tags of figures (`virDomainMemoryStatTags`) that do not come from the guest.
const ACTUAL_BALLOON: i32 = 6;
const RSS: i32 = 7;
const LAST_UPDATE: i32 = 9;

/// One of the guest's figures among libvirt's.
struct Known {
    figure: MemoryFigure,
    /// Its number among `virDomainMemoryStatTags`.
    tag: i32,
    /// Its name among bulk statistics.
    name: &'static str,
    /// What the guest's number is divided by: libvirt counts memory in KiB.
    unit: u64,
}

impl Known {
    const fn new(figure: MemoryFigure, tag: i32, name: &'static str, unit: u64) -> Self {
        Self {
            figure,
            tag,
            name,
            unit,
        }
    }
}

/// In the order in which libvirt's QEMU driver tells them.
const KNOWN: [Known; 10] = [
    Known::new(MemoryFigure::SwapInBytes, 0, "balloon.swap_in", 1024),
    Known::new(MemoryFigure::SwapOutBytes, 1, "balloon.swap_out", 1024),
    Known::new(MemoryFigure::MajorFaults, 2, "balloon.major_fault", 1),
    Known::new(MemoryFigure::MinorFaults, 3, "balloon.minor_fault", 1),
    Known::new(MemoryFigure::FreeBytes, 4, "balloon.unused", 1024),
    Known::new(MemoryFigure::TotalBytes, 5, "balloon.available", 1024),
    Known::new(MemoryFigure::AvailableBytes, 8, "balloon.usable", 1024),
    Known::new(MemoryFigure::CacheBytes, 10, "balloon.disk_caches", 1024),
    Known::new(
        MemoryFigure::HugetlbAllocations,
        11,
        "balloon.hugetlb_pgalloc",
        1,
    ),
    Known::new(
        MemoryFigure::HugetlbFailures,
        12,
        "balloon.hugetlb_pgfail",
        1,
    ),
];

/// Returns the figures that the guest told, as libvirt counts them.
fn told(memory_use: &GuestMemoryUse) -> impl Iterator<Item = (&'static Known, u64)> {
    KNOWN.iter().filter_map(|known| {
        let value = memory_use.figures.get(&known.figure)?;
        Some((known, value / known.unit))
    })
}

fn memory_stats(
    call: &DriverCall<'_>,
    (wanted, most, flags): (DomainRef, u32, u32),
) -> Answer<List<(i32, u64), 1024>> {
    check_flags(flags, 0, "virDomainMemoryStats")?;
    let domain = call.driver.registry.find(&wanted)?;
    let (pid, figures) = {
        let state = domain.lock();
        (state.active()?.pid, Figures::new(call.driver, &state))
    };
    let mut stats = vec![(ACTUAL_BALLOON, figures.used_kib())];
    if let Some(memory_use) = figures.memory_use() {
        stats.extend(told(memory_use).map(|(known, value)| (known.tag, value)));
        stats.push((LAST_UPDATE, memory_use.updated_s));
    }
    stats.push((RSS, rss_kib(pid)));
    stats.truncate(most as usize);
    Ok(List(stats))
}

/// Adds what bulk statistics have of a running domain's memory.
pub(super) fn add_stats(pid: u32, figures: &Figures<'_>, params: &mut Vec<TypedParam>) {
    let mut add = |name: &'static str, value| params.push(TypedParam::ulong(name, value));
    add("balloon.current", figures.used_kib());
    add("balloon.maximum", figures.memory_kib());
    if let Some(memory_use) = figures.memory_use() {
        for (known, value) in told(memory_use) {
            add(known.name, value);
        }
        add("balloon.last-update", memory_use.updated_s);
    }
    add("balloon.rss", rss_kib(pid));
}

fn needs_balloon(config: &DomainConfig) -> Answer<()> {
    if config.machine.devices.pci.balloon().is_some() {
        return Ok(());
    }
    Err(RpcError::new(
        Code::OperationInvalid,
        "Memory balloon model must be virtio to set the collection period",
    ))
}

fn set_memory_stats_period(
    call: &DriverCall<'_>,
    (wanted, period_s, flags): (DomainRef, i32, u32),
) -> Answer<()> {
    check_flags(
        flags,
        AFFECT_LIVE | AFFECT_CONFIG,
        "virDomainSetMemoryStatsPeriod",
    )?;
    let seconds = u32::try_from(period_s).map_err(|_| {
        let why = format!("invalid argument: period '{period_s}' must be zero or greater");
        RpcError::new(Code::InvalidArg, why)
    })?;
    let domain = call.driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    let affected = affected(&domain, flags)?;
    if affected.live {
        let name = {
            let state = domain.lock();
            needs_balloon(&state.active()?.config)?;
            state.name.clone()
        };
        let method = Method::SetMemoryStatsPeriod(Seconds { seconds });
        worker::run(&call.driver.paths, &name, method)?;
    }
    if affected.config {
        redefine(call.driver, &domain, |old| {
            needs_balloon(old)?;
            let mut new = old.clone();
            if let Some(balloon) = new.machine.devices.pci.balloon_mut() {
                balloon.statistics_period_s = seconds;
            }
            Ok(new)
        })?;
    }
    Ok(())
}
