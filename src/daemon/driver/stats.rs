//! What domains use of the host, from the processes that run them.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::fs;

use rustix::process::Pid;

use super::block::{DiskOf, disks_of, status_of};
use super::lookup::fits;
use super::{Answer, DriverCall, Livepoint, check_flags};
use super::{dirty_rate, interface, memory_stats};
use crate::daemon::managed::{Managed, State};
use crate::host::GuestMemoryUse;
use crate::host::control::protocol::{DiskUse, InterfaceUse, Status};
use crate::rpc::{Code, DomainRef, List, Procedure, RpcError, TypedParam, TypedValue, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(262, Quick, cpu_stats),
    procedure!(344, Slow, all_stats),
];

/// Nanoseconds of a tick of /proc/PID/stat (USER_HZ is 100).
const TICK_NS: u64 = 10_000_000;

/// The time that a thread has run, and where.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ThreadTime {
    /// The thread; none stands for the caller's.
    pub(super) tid: Option<Pid>,
    pub(super) time_ns: u64,
    pub(super) cpu: i32,
}

/// User time, system time and CPU of a process or thread, from its stat file (proc(5)).
fn read_stat(path: &str) -> Option<(u64, u64, i32)> {
    let text = fs::read_to_string(path).ok()?;
    // The name may hold anything, so count from behind it.
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    let number = |field: usize| fields.get(field - 3)?.parse::<u64>().ok();
    let cpu = fields.get(39 - 3)?.parse().ok()?;
    Some((number(14)? * TICK_NS, number(15)? * TICK_NS, cpu))
}

/// Returns the CPU time of a domain's process.
pub(super) fn cpu_time_ns(pid: u32) -> u64 {
    read_stat(&format!("/proc/{pid}/stat")).map_or(0, |(user, system, _)| user + system)
}

/// Returns the CPU time of each vCPU of a domain's process.
pub(super) fn vcpu_times_ns(pid: u32) -> BTreeMap<u32, ThreadTime> {
    let mut found = BTreeMap::new();
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    for thread in threads.filter_map(Result::ok) {
        let path = thread.path();
        let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
        let vcpu = name
            .trim()
            .strip_prefix("lvp-vcpu-")
            .and_then(|n| n.parse().ok());
        if let (Some(vcpu), Some((user, system, cpu))) =
            (vcpu, read_stat(&path.join("stat").to_string_lossy()))
        {
            let time_ns = user + system;
            let tid = thread.file_name();
            let tid = tid.to_str().and_then(|tid| tid.parse().ok());
            let tid = tid.and_then(Pid::from_raw);
            found.insert(vcpu, ThreadTime { tid, time_ns, cpu });
        }
    }
    found
}

/// Returns the memory of the host that a domain's process takes, in KiB.
pub(super) fn rss_kib(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}

/// Returns the process of a running domain.
fn running(call: &DriverCall<'_>, wanted: &DomainRef) -> Answer<u32> {
    let domain = call.driver.registry.find(wanted)?;
    let state = domain.lock();
    Ok(state.active()?.pid)
}

/// A domain's figures, of which its worker is asked for those that only it knows: once at most, and
/// not for devices that the domain does not have.
pub(super) struct Figures<'a> {
    driver: &'a Livepoint,
    name: String,
    is_live: bool,
    memory_kib: u64,
    has_balloon: bool,
    has_interfaces: bool,
    has_dirty_rate: bool,
    status: OnceCell<Option<Status>>,
}

impl<'a> Figures<'a> {
    pub(super) fn new(driver: &'a Livepoint, state: &State) -> Self {
        let machine = state.current().map(|config| &config.machine);
        let pci = machine.map(|machine| &machine.devices.pci);
        Self {
            driver,
            name: state.name.clone(),
            is_live: state.live.is_some(),
            memory_kib: machine.map_or(0, |machine| machine.memory.size().kib()),
            has_balloon: pci.is_some_and(|pci| pci.balloon().is_some()),
            has_interfaces: pci.is_some_and(|pci| pci.interfaces().next().is_some()),
            has_dirty_rate: state.live.as_ref().is_some_and(|live| live.has_dirty_rate),
            status: OnceCell::new(),
        }
    }

    /// Returns what the worker says; `None` of a domain that does not run, or is just ending.
    fn status(&self) -> Option<&Status> {
        let ask = || {
            self.is_live
                .then(|| status_of(self.driver, &self.name).ok())
        };
        self.status.get_or_init(|| ask().flatten()).as_ref()
    }

    /// Returns the domain's memory in KiB.
    pub(super) fn memory_kib(&self) -> u64 {
        self.memory_kib
    }

    /// Returns how much of its memory the domain uses, in KiB: less than all of it where its guest
    /// has given some back by a balloon.
    pub(super) fn used_kib(&self) -> u64 {
        let given = || self.status()?.given_bytes;
        let given = self.has_balloon.then(given).flatten();
        self.memory_kib.saturating_sub(given.unwrap_or(0) / 1024)
    }

    /// Returns how the guest uses its memory, where its balloon's driver says.
    pub(super) fn memory_use(&self) -> Option<&GuestMemoryUse> {
        let status = self.has_balloon.then(|| self.status()).flatten();
        status?.memory_use.as_ref()
    }

    fn interfaces(&self) -> &[InterfaceUse] {
        let status = self.has_interfaces.then(|| self.status()).flatten();
        status.map_or(&[], |status| &status.interfaces)
    }
}

type CpuStats = (List<TypedParam, 2048>, i32);

fn cpu_stats(
    call: &DriverCall<'_>,
    (wanted, nparams, start, ncpus, flags): (DomainRef, u32, i32, u32, u32),
) -> Answer<CpuStats> {
    check_flags(flags, 4, "virDomainGetCPUStats")?;
    let pid = running(call, &wanted)?;
    if start >= 0 {
        // How a process's time is spread over CPUs is not kept by the kernel for processes.
        return Err(RpcError::new(
            Code::OperationInvalid,
            "cgroup CPUACCT controller is not mounted",
        ));
    }
    if ncpus != 1 {
        return Err(RpcError::new(
            Code::InvalidArg,
            "ncpus must be 1 for the total",
        ));
    }
    let (user, system, _) = read_stat(&format!("/proc/{pid}/stat")).unwrap_or_default();
    let params = [
        ("cpu_time", user + system),
        ("user_time", user),
        ("system_time", system),
    ];
    let params: Vec<_> = params
        .into_iter()
        .take(if nparams == 0 { 0 } else { nparams as usize })
        .map(|(name, value)| TypedParam::ulong(name, value))
        .collect();
    let count = if nparams == 0 {
        3
    } else {
        i32::try_from(params.len()).unwrap_or(0)
    };
    Ok((List(params), count))
}

/// Groups of bulk statistics (`virDomainStatsTypes`).
const STATS_STATE: u32 = 1;
const STATS_CPU_TOTAL: u32 = 2;
const STATS_BALLOON: u32 = 4;
const STATS_VCPU: u32 = 8;
const STATS_INTERFACE: u32 = 16;
const STATS_BLOCK: u32 = 32;
const STATS_DIRTY_RATE: u32 = 512;
const STATS_KNOWN: u32 = STATS_STATE
    | STATS_CPU_TOTAL
    | STATS_BALLOON
    | STATS_VCPU
    | STATS_INTERFACE
    | STATS_BLOCK
    | STATS_DIRTY_RATE;
/// Refuse groups that are not there rather than leave them out.
const ENFORCE: u32 = 1 << 31;
/// Flags that are no filters of the list of domains.
const NOT_FILTERS: u32 = ENFORCE | 1 << 30 | 1 << 29;

type Record = (DomainRef, List<TypedParam, 262_144>);
type AllStats = (List<Record, 16_384>,);

fn all_stats(
    call: &DriverCall<'_>,
    (wanted, groups, flags): (List<DomainRef, 16_384>, u32, u32),
) -> Answer<AllStats> {
    check_flags(flags, NOT_FILTERS | 0xff, "virConnectGetAllDomainStats")?;
    if flags & ENFORCE != 0 && groups & !STATS_KNOWN != 0 {
        return Err(RpcError::new(
            Code::ArgumentUnsupported,
            format!(
                "Stats types bits 0x{:x} are not supported by this daemon",
                groups & !STATS_KNOWN
            ),
        ));
    }
    let groups = if groups == 0 { STATS_KNOWN } else { groups };
    let registry = &call.driver.registry;
    let domains = if wanted.0.is_empty() {
        let filters = flags & !NOT_FILTERS;
        let all = registry.all().into_iter();
        all.filter(|domain| fits(call.driver, domain, filters))
            .collect()
    } else {
        // Those that are gone meanwhile are left out, as libvirt does.
        let named = wanted.0.iter().filter_map(|one| registry.find(one).ok());
        named.collect::<Vec<_>>()
    };
    let records = domains.iter().map(|domain| {
        (
            domain.reference(),
            List(domain_stats(call.driver, domain, groups)),
        )
    });
    Ok((List(records.collect()),))
}

fn domain_stats(driver: &Livepoint, domain: &Managed, groups: u32) -> Vec<TypedParam> {
    let (numbers, pid, vcpus, snapshots, disks, figures) = {
        let state = domain.lock();
        let machine = state.current().map(|config| &config.machine);
        (
            state.run_state().numbers(),
            state.live.as_ref().map(|live| live.pid),
            machine.map_or(0, |machine| u32::from(machine.vcpus.count())),
            state.snapshots.count(),
            disks_of(&state),
            Figures::new(driver, &state),
        )
    };
    let mut params = Vec::new();
    if groups & STATS_STATE != 0 {
        params.push(TypedParam::new("state.state", TypedValue::Int(numbers.0)));
        params.push(TypedParam::new("state.reason", TypedValue::Int(numbers.1)));
        let count = u64::try_from(snapshots).unwrap_or(u64::MAX);
        params.push(TypedParam::ulong("livepoint.checkpoints", count));
    }
    if let (true, Some(pid)) = (groups & STATS_CPU_TOTAL != 0, pid) {
        let (user, system, _) = read_stat(&format!("/proc/{pid}/stat")).unwrap_or_default();
        params.push(TypedParam::ulong("cpu.time", user + system));
        params.push(TypedParam::ulong("cpu.user", user));
        params.push(TypedParam::ulong("cpu.system", system));
    }
    if groups & STATS_BALLOON != 0 {
        if let Some(pid) = pid {
            memory_stats::add_stats(pid, &figures, &mut params);
        } else {
            params.push(TypedParam::ulong("balloon.maximum", figures.memory_kib()));
        }
    }
    if groups & STATS_VCPU != 0 {
        params.push(TypedParam::new("vcpu.current", TypedValue::UInt(vcpus)));
        params.push(TypedParam::new("vcpu.maximum", TypedValue::UInt(vcpus)));
        for (vcpu, thread) in pid.map(vcpu_times_ns).unwrap_or_default() {
            params.push(TypedParam::new(
                format!("vcpu.{vcpu}.state"),
                TypedValue::Int(1),
            ));
            params.push(TypedParam::ulong(
                format!("vcpu.{vcpu}.time"),
                thread.time_ns,
            ));
        }
    }
    if groups & STATS_INTERFACE != 0 {
        interface::add_stats(figures.interfaces(), &mut params);
    }
    if groups & STATS_BLOCK != 0 {
        block_stats(disks, &figures, &mut params);
    }
    if groups & STATS_DIRTY_RATE != 0 && pid.is_some() {
        let status = figures.has_dirty_rate.then(|| figures.status()).flatten();
        dirty_rate::add_stats(status, &mut params);
    }
    params
}

/// Adds what is known of a domain's disks.
fn block_stats(disks: Vec<DiskOf>, figures: &Figures<'_>, params: &mut Vec<TypedParam>) {
    let count = u32::try_from(disks.len()).unwrap_or(u32::MAX);
    params.push(TypedParam::new("block.count", TypedValue::UInt(count)));
    let status = (count > 0).then(|| figures.status()).flatten();
    let used: &[DiskUse] = status.map_or(&[], |status| &status.disks);
    for (at, disk) in disks.into_iter().enumerate() {
        let text = |name: &str, value: String| {
            TypedParam::new(format!("block.{at}.{name}"), TypedValue::Text(value))
        };
        let number = |name: &str, value| TypedParam::ulong(format!("block.{at}.{name}"), value);
        params.push(text("name", disk.target.clone()));
        params.push(text("path", disk.source.to_string_lossy().into_owned()));
        if let Some(used) = used.iter().find(|used| used.target == disk.target) {
            params.push(number("rd.reqs", used.reads));
            params.push(number("rd.bytes", used.read_bytes));
            params.push(number("wr.reqs", used.writes));
            params.push(number("wr.bytes", used.written_bytes));
            params.push(number("fl.reqs", used.flushes));
            params.push(number("rd.times", used.read_ns));
            params.push(number("wr.times", used.write_ns));
            params.push(number("fl.times", used.flush_ns));
            params.push(number("errors", used.errors));
        }
        if let Ok(sizes) = disk.sizes() {
            params.push(number("allocation", sizes.allocation));
            params.push(number("capacity", sizes.capacity));
            params.push(number("physical", sizes.physical));
        }
    }
}
