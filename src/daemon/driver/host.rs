//! The host, as clients see it.

use std::fs;

use uuid::Uuid;

use super::node::page_sizes_kib;
use super::{Answer, DriverCall, Livepoint};
use crate::daemon::xml::escape;
use crate::host::VCPUS_MAX;
use crate::rpc::{Bytes, CharList, Code, FixedChars, List, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(5, Quick, max_vcpus),
    procedure!(6, Quick, node_info),
    procedure!(7, Quick, capabilities),
    procedure!(59, Quick, hostname),
    procedure!(101, Quick, cells_free_memory),
    procedure!(102, Quick, free_memory),
    procedure!(122, Quick, security_model),
    procedure!(227, Quick, cpu_stats),
    procedure!(228, Quick, memory_stats),
    procedure!(293, Quick, cpu_map),
    procedure!(312, Quick, cpu_models),
    procedure!(342, Quick, domain_capabilities),
];

/// How this host's CPUs are arranged.
#[derive(Debug, Clone, Copy)]
pub(super) struct Topology {
    pub(super) cpus: u32,
    sockets: u32,
    cores: u32,
    threads: u32,
    mhz: u32,
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

pub(super) fn topology() -> Topology {
    let cpuinfo = read("/proc/cpuinfo");
    let values = |key: &str| -> Vec<&str> {
        cpuinfo
            .lines()
            .filter_map(|line| line.split_once(':'))
            .filter(|(name, _)| name.trim() == key)
            .map(|(_, value)| value.trim())
            .collect()
    };
    let number = |text: Option<&&str>| text.and_then(|text| text.parse::<u32>().ok());
    let cpus = u32::try_from(values("processor").len()).unwrap_or(1).max(1);
    let distinct: std::collections::BTreeSet<_> = values("physical id").into_iter().collect();
    let sockets = u32::try_from(distinct.len()).unwrap_or(1).max(1);
    let cores = number(values("cpu cores").first()).unwrap_or(1).max(1);
    let threads = (cpus / (sockets * cores)).max(1);
    let mhz = values("cpu MHz")
        .first()
        .and_then(|mhz| mhz.split('.').next()?.parse().ok());
    // Clients multiply them: a host that is itself a guest may tell of any arrangement.
    let (sockets, cores, threads) = if sockets * cores * threads == cpus {
        (sockets, cores, threads)
    } else {
        (1, cpus, 1)
    };
    Topology {
        cpus,
        sockets,
        cores,
        threads,
        mhz: mhz.unwrap_or(0),
    }
}

/// Returns a figure of /proc/meminfo, in KiB.
pub(super) fn meminfo_kib(key: &str) -> u64 {
    let text = read("/proc/meminfo");
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or(0)
}

type NodeInfo = (FixedChars<32>, u64, i32, i32, i32, i32, i32, i32);

fn signed(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn node_info(_: &DriverCall<'_>, (): ()) -> Answer<NodeInfo> {
    let cpu = topology();
    Ok((
        FixedChars("x86_64".to_owned()),
        meminfo_kib("MemTotal"),
        signed(cpu.cpus),
        signed(cpu.mhz),
        1,
        signed(cpu.sockets),
        signed(cpu.cores),
        signed(cpu.threads),
    ))
}

fn hostname(_: &DriverCall<'_>, (): ()) -> Answer<String> {
    Ok(rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned())
}

fn free_memory(_: &DriverCall<'_>, (): ()) -> Answer<u64> {
    Ok(meminfo_kib("MemFree") * 1024)
}

fn cells_free_memory(_: &DriverCall<'_>, (start, most): (i32, i32)) -> Answer<List<u64, 1024>> {
    if start != 0 || most < 1 {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("start cell {start} out of range (0-0)"),
        ));
    }
    Ok(List(vec![meminfo_kib("MemFree") * 1024]))
}

fn security_model(_: &DriverCall<'_>, (): ()) -> Answer<(CharList, CharList)> {
    Ok((CharList(String::new()), CharList(String::new())))
}

/// Named figures, of which a client first asks for the number.
type Named<const N: usize> = (List<(String, u64), N>, i32);

fn named(wanted: i32, figures: &[(&str, u64)]) -> Named<16> {
    let count = i32::try_from(figures.len()).unwrap_or(0);
    if wanted == 0 {
        return (List(Vec::new()), count);
    }
    let owned = figures
        .iter()
        .map(|(name, value)| ((*name).to_owned(), *value));
    (List(owned.collect()), count)
}

fn cpu_stats(_: &DriverCall<'_>, (cpu, wanted, _): (i32, i32, u32)) -> Answer<Named<16>> {
    let label = if cpu < 0 {
        "cpu".to_owned()
    } else {
        format!("cpu{cpu}")
    };
    let stat = read("/proc/stat");
    let line = stat
        .lines()
        .find(|line| line.split_whitespace().next() == Some(&label));
    let Some(line) = line else {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("Invalid cpuNum in virHostCPUGetStatsLinux: {cpu}"),
        ));
    };
    // user nice system idle iowait irq softirq, in ticks of 10 ms (proc(5)).
    let ticks: Vec<u64> = line
        .split_whitespace()
        .skip(1)
        .map(|n| n.parse().unwrap_or(0))
        .collect();
    let ns = |at: usize| ticks.get(at).copied().unwrap_or(0) * 10_000_000;
    Ok(named(
        wanted,
        &[
            ("kernel", ns(2) + ns(5) + ns(6)),
            ("user", ns(0) + ns(1)),
            ("idle", ns(3)),
            ("iowait", ns(4)),
        ],
    ))
}

fn memory_stats(_: &DriverCall<'_>, (wanted, _, _): (i32, i32, u32)) -> Answer<Named<16>> {
    Ok(named(
        wanted,
        &[
            ("total", meminfo_kib("MemTotal")),
            ("free", meminfo_kib("MemFree")),
            ("buffers", meminfo_kib("Buffers")),
            ("cached", meminfo_kib("Cached")),
        ],
    ))
}

fn cpu_map(
    _: &DriverCall<'_>,
    (need_map, need_online, _): (i32, i32, u32),
) -> Answer<(Bytes<2048>, u32, i32)> {
    let cpus = topology().cpus;
    let map = if need_map == 0 {
        Vec::new()
    } else {
        all_cpus(cpus)
    };
    Ok((
        Bytes(map),
        if need_online == 0 { 0 } else { cpus },
        signed(cpus),
    ))
}

/// Returns a map in which each CPU has its bit set.
pub(super) fn all_cpus(cpus: u32) -> Vec<u8> {
    let mut map = vec![0xff_u8; (cpus / 8) as usize];
    if !cpus.is_multiple_of(8) {
        map.push((1 << (cpus % 8)) - 1);
    }
    map
}

fn max_vcpus(_: &DriverCall<'_>, (_kind,): (Option<String>,)) -> Answer<i32> {
    Ok(i32::from(VCPUS_MAX))
}

type Models = (List<String, 8192>, i32);

fn cpu_models(_: &DriverCall<'_>, (arch, need, _): (String, i32, u32)) -> Answer<Models> {
    if arch != "x86_64" {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("cannot find architecture {arch}"),
        ));
    }
    let names = CPU_MODELS.map(str::to_owned).to_vec();
    let count = i32::try_from(names.len()).unwrap_or(0);
    Ok((List(if need == 0 { Vec::new() } else { names }), count))
}

/// The models of domain documents: the feature levels of the x86-64 psABI.
const CPU_MODELS: [&str; 4] = ["x86-64-v1", "x86-64-v2", "x86-64-v3", "x86-64-v4"];

fn capabilities(call: &DriverCall<'_>, (): ()) -> Answer<String> {
    let cpu = topology();
    let uuid = host_uuid();
    let kib = meminfo_kib("MemTotal");
    let emulator = escape(&call.driver.launcher.program.to_string_lossy());
    let cpus: String = (0..cpu.cpus)
        .map(|id| format!("            <cpu id='{id}' socket_id='0' die_id='0' core_id='{id}' siblings='{id}'/>\n"))
        .collect();
    let pages: String = page_sizes_kib()
        .into_iter()
        .map(|kib| format!("      <pages unit='KiB' size='{kib}'/>\n"))
        .collect();
    Ok(format!(
        "<capabilities>\n\n  <host>\n    <uuid>{uuid}</uuid>\n    <cpu>\n      \
         <arch>x86_64</arch>\n      <topology sockets='{}' dies='1' cores='{}' threads='{}'/>\n\
         {pages}    </cpu>\n    <topology>\n      <cells num='1'>\n        <cell id='0'>\n          \
         <memory unit='KiB'>{kib}</memory>\n          <cpus num='{}'>\n{cpus}          </cpus>\n        \
         </cell>\n      </cells>\n    </topology>\n  </host>\n\n  <guest>\n    \
         <os_type>hvm</os_type>\n    <arch name='x86_64'>\n      <wordsize>64</wordsize>\n      \
         <emulator>{emulator}</emulator>\n      <machine maxCpus='{VCPUS_MAX}'>livepoint</machine>\n      \
         <domain type='kvm'/>\n    </arch>\n    <features>\n      <acpi default='on' toggle='no'/>\n      \
         <apic default='on' toggle='no'/>\n      <cpuselection/>\n      \
         <externalSnapshot/>\n    </features>\n  </guest>\n\n</capabilities>\n",
        cpu.sockets, cpu.cores, cpu.threads, cpu.cpus,
    ))
}

/// The host's identity: the same as long as the system is the same.
fn host_uuid() -> Uuid {
    let machine_id = read("/etc/machine-id");
    let id = Uuid::parse_str(machine_id.trim());
    id.unwrap_or_else(|_| Uuid::from_u128(1))
}

type Asked = (
    Option<String>,
    Option<String>,
    Option<String>,
    Option<String>,
    u32,
);

fn domain_capabilities(call: &DriverCall<'_>, (_, arch, _, virt, _): Asked) -> Answer<String> {
    if let Some(arch) = arch.filter(|arch| arch != "x86_64") {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("unable to find any emulator to serve '{arch}' architecture"),
        ));
    }
    if let Some(virt) = virt.filter(|virt| virt != "kvm") {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("the virtualization type '{virt}' is not supported; 'kvm' is"),
        ));
    }
    let emulator = escape(&call.driver.launcher.program.to_string_lossy());
    let models: String = CPU_MODELS
        .iter()
        .map(|name| format!("      <model usable='unknown'>{name}</model>\n"))
        .collect();
    Ok(format!(
        "<domainCapabilities>\n  <path>{emulator}</path>\n  <domain>kvm</domain>\n  \
         <machine>livepoint</machine>\n  <arch>x86_64</arch>\n  <vcpu max='{VCPUS_MAX}'/>\n  \
         <os supported='yes'>\n    <enum name='firmware'/>\n    <loader supported='no'/>\n  </os>\n  \
         <cpu>\n    <mode name='host-passthrough' supported='yes'>\n      \
         <enum name='hostPassthroughMigratable'/>\n    </mode>\n    \
         <mode name='maximum' supported='no'/>\n    <mode name='host-model' supported='yes'/>\n    \
         <mode name='custom' supported='yes'>\n{models}    </mode>\n  </cpu>\n  \
         <memoryBacking supported='yes'>\n    <enum name='sourceType'>\n      \
         <value>anonymous</value>\n      <value>memfd</value>\n    </enum>\n  </memoryBacking>\n  \
         <devices>\n{}  </devices>\n  <features>\n    <gic supported='no'/>\n    \
         <vmcoreinfo supported='no'/>\n    <genid supported='no'/>\n    \
         <backingStoreInput supported='no'/>\n    <backup supported='no'/>\n    \
         <sev supported='no'/>\n    <sgx supported='no'/>\n  </features>\n</domainCapabilities>\n",
        devices(),
    ))
}

/// What documents may have among their devices.
fn devices() -> String {
    let refused = [
        "graphics",
        "video",
        "hostdev",
        "rng",
        "filesystem",
        "tpm",
        "redirdev",
    ];
    let refused = refused
        .map(|device| format!("    <{device} supported='no'/>\n"))
        .concat();
    format!(
        "    <disk supported='yes'>\n      <enum name='diskDevice'>\n        \
         <value>disk</value>\n      </enum>\n      <enum name='bus'>\n        \
         <value>virtio</value>\n      </enum>\n    </disk>\n{refused}    \
         <channel supported='no'/>\n    <console supported='yes'>\n      \
         <enum name='type'>\n        <value>pty</value>\n        <value>unix</value>\n        \
         <value>file</value>\n        <value>null</value>\n      </enum>\n    </console>\n"
    )
}
