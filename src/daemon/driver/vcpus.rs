//! vCPUs: how long each has run, where it is, and where it may be.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use super::host::{all_cpus, topology};
use super::info::{AFFECT_CONFIG, AFFECT_LIVE, vcpu_count};
use super::stats::{ThreadTime, vcpu_times_ns};
use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::job::JobKind;
use crate::rpc::{Bytes, Code, DomainRef, List, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(20, Quick, vcpus),
    procedure!(26, Slow, pin),
    procedure!(225, Slow, pin_flags),
    procedure!(230, Quick, pins),
];

/// Most bytes of the maps of all vCPUs.
const MAPS_BYTES_MAX: usize = 8_388_608;

/// A vCPU: its number, its state, its time in ns, the CPU that it is on.
type VcpuInfo = (u32, i32, u64, i32);
type VcpuMaps = Bytes<8_388_608>;

fn vcpus(
    call: &DriverCall<'_>,
    (wanted, most, map_bytes): (DomainRef, i32, i32),
) -> Answer<(List<VcpuInfo, 16_384>, VcpuMaps)> {
    const VCPU_RUNNING: i32 = 1;
    let domain = call.driver.registry.find(&wanted)?;
    let (pid, count) = {
        let state = domain.lock();
        let live = state.active()?;
        (live.pid, u32::from(live.config.machine.vcpus.count()))
    };
    let threads = vcpu_times_ns(pid);
    let most = u32::try_from(most).unwrap_or(0).min(count);
    let threads: Vec<_> = (0..most).map(|vcpu| threads.get(&vcpu).copied()).collect();
    let maps = cpu_maps(&threads, map_bytes)?;
    let infos = (0..).zip(threads).map(|(vcpu, thread)| {
        let thread = thread.unwrap_or_default();
        (vcpu, VCPU_RUNNING, thread.time_ns, thread.cpu)
    });
    Ok((List(infos.collect()), Bytes(maps)))
}

/// Returns maps of `bytes` each that say on which CPUs each vCPU may run.
fn cpu_maps(vcpus: &[Option<ThreadTime>], bytes: i32) -> Answer<Vec<u8>> {
    let bytes = usize::try_from(bytes).unwrap_or(0);
    if vcpus.len() * bytes > MAPS_BYTES_MAX {
        return Err(RpcError::new(Code::InvalidArg, "the CPU maps are too long"));
    }
    let all = all_cpus(topology().cpus);
    let maps = vcpus.iter().flat_map(|thread| {
        let allowed = thread.and_then(|thread| sched_getaffinity(thread.tid).ok());
        let mut map = allowed.map_or_else(|| all.clone(), |allowed| map_of(&allowed, &all));
        map.resize(bytes, 0);
        map
    });
    Ok(maps.collect())
}

/// Returns the CPUs of a set that are of those in a map, as a map.
fn map_of(set: &CpuSet, all: &[u8]) -> Vec<u8> {
    let bit = |at: usize, cpu: usize| u8::from(set.is_set(at * 8 + cpu)) << cpu;
    let byte = |at: usize| (0..8).map(|cpu| bit(at, cpu)).sum::<u8>();
    let bytes = all.iter().enumerate().take(CpuSet::MAX_CPU / 8);
    bytes.map(|(at, there)| byte(at) & there).collect()
}

fn pins(
    call: &DriverCall<'_>,
    (wanted, count, map_bytes, flags): (DomainRef, i32, i32, u32),
) -> Answer<(VcpuMaps, i32)> {
    let all = vcpu_count(call, (wanted.clone(), flags))?.min(count).max(0);
    let pid = {
        let domain = call.driver.registry.find(&wanted)?;
        let state = domain.lock();
        // A definition pins nothing.
        let of_definition = flags & AFFECT_CONFIG != 0;
        let live = state.live.as_ref().filter(|_| !of_definition);
        live.map(|live| live.pid)
    };
    let threads = pid.map(vcpu_times_ns).unwrap_or_default();
    let number = |vcpu: i32| u32::try_from(vcpu).unwrap_or(0);
    let threads: Vec<_> = (0..all)
        .map(|vcpu| threads.get(&number(vcpu)).copied())
        .collect();
    Ok((Bytes(cpu_maps(&threads, map_bytes)?), all))
}

fn pin(call: &DriverCall<'_>, (wanted, vcpu, map): (DomainRef, u32, Bytes<256>)) -> Answer<()> {
    pin_flags(call, (wanted, vcpu, map, AFFECT_LIVE))
}

fn pin_flags(
    call: &DriverCall<'_>,
    (wanted, vcpu, map, flags): (DomainRef, u32, Bytes<256>, u32),
) -> Answer<()> {
    check_flags(flags, AFFECT_LIVE | AFFECT_CONFIG, "virDomainPinVcpuFlags")?;
    let domain = call.driver.registry.find(&wanted)?;
    let _job = domain.begin(JobKind::Modify)?;
    if super::config::affected(&domain, flags)?.config {
        return Err(RpcError::new(
            Code::OperationUnsupported,
            "vCPUs are pinned while the domain runs: its definition does not say where they are",
        ));
    }
    let pid = domain.lock().active()?.pid;
    let threads = vcpu_times_ns(pid);
    let tid = threads.get(&vcpu).and_then(|thread| thread.tid);
    let tid = tid.ok_or_else(|| {
        let why = format!("vcpu {vcpu} is not present in live config");
        RpcError::new(Code::InvalidArg, why)
    })?;
    let mut wanted = CpuSet::new();
    let cpus = map.0.iter().enumerate().flat_map(|(at, byte)| {
        let is_set = move |cpu: &usize| byte >> cpu & 1 != 0;
        (0..8).filter(is_set).map(move |cpu| at * 8 + cpu)
    });
    for cpu in cpus.filter(|cpu| *cpu < CpuSet::MAX_CPU) {
        wanted.set(cpu);
    }
    if wanted.count() == 0 {
        return Err(RpcError::new(
            Code::InvalidArg,
            "Empty cpu list for pinning",
        ));
    }
    sched_setaffinity(Some(tid), &wanted).map_err(|error| {
        let why = format!("cannot set CPU affinity on vcpu {vcpu}: {error}");
        RpcError::new(Code::InvalidArg, why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_has_the_bits_of_the_set_and_of_no_cpu_that_is_not_there() {
        let mut set = CpuSet::new();
        [0, 3, 9, 15, 20].into_iter().for_each(|cpu| set.set(cpu));
        assert_eq!(map_of(&set, &[0xff, 0x03]), [0b1001, 0b10]);
        assert_eq!(map_of(&set, &[]), [0_u8; 0]);
    }

    #[test]
    fn maps_are_as_long_as_they_are_wanted_and_no_longer_than_is_allowed() {
        let mine = ThreadTime::default();
        let maps = cpu_maps(&[Some(mine), None], 5).unwrap();
        assert_eq!(maps.len(), 10);
        assert_ne!(maps[0], 0);
        assert!(cpu_maps(&[None; 5], i32::MAX).is_err());
        assert!(cpu_maps(&[None; 5], -1).unwrap().is_empty());
    }
}
