//! From a domain, in libvirt's terms, to what the machine is made from.

use std::time::Duration;

use crate::domain::{
    self, ClockBasis, ClockOffset, CpuFeature, CpuMode, DomainConfig, KernelSource,
    LifecycleAction, MemorySource, TickPolicy,
};
use crate::guest::ImageFormat;
use crate::host::{BuiltinKernel, HostError};
use crate::kvmstate::ClockPolicy;
use crate::machine::spec::{
    BackingSpec, BalloonSpec, BootSpec, ClockSpec, CpuSpec, CpuidRegister, DiskCache, DiskFormat,
    DiskSpec, EndAction, FeaturePolicy, FeatureRule, LifecycleSpec, MachineSpec, MemorySpec,
    NetPort, NetSpec, PciDevice, PciDeviceSpec, RngRate, RngSpec, SerialBackend, SerialSpec,
    Source, TopologySpec,
};

/// Mode of a console's pty: its owner reads and writes, as virsh console does.
const PTY_MODE: u32 = 0o600;

/// Makes the machine that `config` describes.
pub(super) fn machine_spec(
    config: &DomainConfig,
    builtin_kernels: &[BuiltinKernel],
    qcow2: Option<&'static dyn ImageFormat>,
) -> Result<MachineSpec, HostError> {
    let machine = &config.machine;
    let mut spec = MachineSpec::new(
        machine.memory.size().bytes(),
        Some(boot(config, builtin_kernels)?),
    );
    spec.name = config.name.as_str().to_owned();
    spec.uuid = config.uuid;
    spec.domain_xml = config.to_xml(domain::XmlView::Inactive);
    spec.memory = memory(&machine.memory);
    spec.cpu = cpu(config);
    spec.serials = machine
        .devices
        .serial
        .iter()
        .map(|(port, serial)| SerialSpec {
            port: u32::try_from(port).expect("a machine has at most four serial ports"),
            backend: backend(&serial.backend),
        })
        .collect();
    spec.pci = pci_devices(&machine.devices.pci, &machine.memory, qcow2)?;
    spec.clock = ClockSpec {
        after_restore: ClockPolicy::Continue,
        rtc_offset_seconds: rtc_offset(&machine.clock.offset)?,
        pit_reinject: machine.clock.pit == TickPolicy::Delay,
    };
    spec.lifecycle = LifecycleSpec {
        on_poweroff: end_action(config.lifecycle.on_poweroff),
        on_reboot: end_action(config.lifecycle.on_reboot),
        on_crash: end_action(config.lifecycle.on_crash),
    };
    Ok(spec)
}

fn boot(config: &DomainConfig, builtin: &[BuiltinKernel]) -> Result<BootSpec, HostError> {
    let (kernel, initrd) = match &config.machine.boot.source {
        KernelSource::Path { kernel, initrd } => (
            Source::Path(kernel.as_path().to_owned()),
            initrd
                .as_ref()
                .map(|path| Source::Path(path.as_path().to_owned())),
        ),
        KernelSource::Builtin(name) => {
            let found = builtin.iter().find(|kernel| kernel.name == name.as_str());
            let kernel = found.ok_or_else(|| {
                HostError::Invalid(format!(
                    "there is no built-in guest {:?} in this program; the livepoint command has \
                     some, and `livepoint guests --extract DIR` writes them to files",
                    name.as_str()
                ))
            })?;
            let name = format!("builtin:{}", kernel.name);
            (
                Source::Bytes {
                    name,
                    bytes: kernel.elf.into(),
                },
                None,
            )
        }
    };
    Ok(BootSpec {
        kernel,
        initrd,
        cmdline: config.machine.boot.cmdline.as_str().to_owned(),
    })
}

/// Returns by how many seconds the real-time clock is ahead of UTC.
fn rtc_offset(offset: &ClockOffset) -> Result<i64, HostError> {
    let now = jiff::Timestamp::now();
    let zone = |zone: jiff::tz::TimeZone| i64::from(zone.to_offset(now).seconds());
    let local = || zone(jiff::tz::TimeZone::system());
    Ok(match offset {
        ClockOffset::Utc => 0,
        ClockOffset::LocalTime => local(),
        ClockOffset::TimeZone(name) => {
            zone(jiff::tz::TimeZone::get(name.as_str()).map_err(|error| {
                HostError::Invalid(format!("time zone {}: {error}", name.as_str()))
            })?)
        }
        ClockOffset::Variable {
            adjustment_seconds,
            basis: ClockBasis::Utc,
        } => *adjustment_seconds,
        ClockOffset::Variable {
            adjustment_seconds,
            basis: ClockBasis::LocalTime,
        } => adjustment_seconds.saturating_add(local()),
    })
}

fn memory(config: &domain::MemoryConfig) -> MemorySpec {
    let backing = match (config.huge_pages(), config.source) {
        (Some(page), _) => BackingSpec::Hugetlb {
            page_bytes: page.bytes(),
        },
        (None, MemorySource::Anonymous) => BackingSpec::Anonymous,
        (None, MemorySource::MemfdPrivate | MemorySource::MemfdShared) => BackingSpec::Memfd,
    };
    MemorySpec {
        bytes: config.size().bytes(),
        backing,
        preallocate: config.preallocate.unwrap_or(false),
        locked: config.locked,
        shared: None,
    }
}

fn cpu(config: &DomainConfig) -> CpuSpec {
    let machine = &config.machine;
    let mut features = Vec::new();
    if let CpuMode::Custom(model) = machine.cpu.mode {
        features.extend(cpu_model::rules(model));
    }
    if machine.cpu.pmu == Some(false) {
        // Architectural performance monitoring of version 0 is none (Intel SDM, CPUID leaf 0xA).
        features.extend((0..8).map(|bit| {
            hidden(
                &format!("pmu version bit {bit}"),
                0xa,
                CpuidRegister::Eax,
                bit,
            )
        }));
    }
    if machine.cpu.paravirtual_spinlocks == Some(false) {
        features.push(hidden("kvm-pv-unhalt", KVM_FEATURES, CpuidRegister::Eax, 7));
    }
    if !machine.clock.kvmclock {
        for (bit, name) in [
            (0, "kvmclock"),
            (3, "kvmclock2"),
            (24, "kvmclock-stable-bit"),
        ] {
            features.push(hidden(name, KVM_FEATURES, CpuidRegister::Eax, bit));
        }
    }
    // The user's own rules come last, so that they win.
    features.extend(
        machine
            .cpu
            .features
            .iter()
            .map(|(feature, policy)| rule(*feature, *policy)),
    );
    CpuSpec {
        vcpu_count: u32::from(machine.vcpus.count()),
        topology: machine.vcpus.topology().map(|topology| TopologySpec {
            sockets: u32::from(topology.sockets()),
            dies: u32::from(topology.dies()),
            cores: u32::from(topology.cores()),
            threads: u32::from(topology.threads()),
        }),
        features,
    }
}

/// CPUID leaf of KVM's paravirtual features (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;

fn hidden(name: &str, leaf: u32, register: CpuidRegister, bit: u8) -> FeatureRule {
    let policy = FeaturePolicy::Disable;
    FeatureRule {
        name: name.to_owned(),
        leaf,
        subleaf: 0,
        register,
        bit,
        policy,
    }
}

fn rule(feature: CpuFeature, policy: domain::FeaturePolicy) -> FeatureRule {
    FeatureRule {
        name: feature.name().to_owned(),
        leaf: feature.leaf(),
        subleaf: feature.subleaf(),
        register: register(feature.register()),
        bit: u8::try_from(feature.mask().trailing_zeros()).expect("a register has 32 bits"),
        policy: feature_policy(policy),
    }
}

/// The psABI's feature levels as CPU models.
mod cpu_model {
    use super::rule;
    use crate::domain::{CpuFeature, CpuModel, FeaturePolicy};
    use crate::machine::spec::FeatureRule;

    /// What each level adds (x86-64 psABI, section 3.1.1), and what builds on it.
    const V2: &[&str] = &[
        "cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4.1", "sse4.2",
    ];
    const V3: &[&str] = &[
        "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave",
    ];
    const V3_EXTRA: &[&str] = &["vaes", "vpclmulqdq", "avx-vnni", "avx-ifma", "fma4", "xop"];
    const V4: &[&str] = &["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"];
    const V4_EXTRA: &[&str] = &[
        "avx512ifma",
        "avx512pf",
        "avx512er",
        "avx512vbmi",
        "avx512vbmi2",
        "avx512vnni",
        "avx512bitalg",
        "avx512-vpopcntdq",
        "avx512-4vnniw",
        "avx512-4fmaps",
        "avx512-vp2intersect",
        "avx512-fp16",
        "avx512-bf16",
    ];

    /// Requires the features of the model's levels, and hides those of higher ones.
    pub(super) fn rules(model: CpuModel) -> Vec<FeatureRule> {
        let level = match model {
            CpuModel::V1 => 1,
            CpuModel::V2 => 2,
            CpuModel::V3 => 3,
            CpuModel::V4 => 4,
        };
        let sets = [
            (2, V2, true),
            (3, V3, true),
            (3, V3_EXTRA, false),
            (4, V4, true),
            (4, V4_EXTRA, false),
        ];
        let mut rules = Vec::new();
        for (of_level, names, defines) in sets {
            let policy = match (level >= of_level, defines) {
                (true, true) => FeaturePolicy::Require,
                (true, false) => FeaturePolicy::Optional,
                (false, _) => FeaturePolicy::Disable,
            };
            let features = names.iter().filter_map(|name| CpuFeature::from_name(name));
            rules.extend(features.map(|feature| rule(feature, policy)));
        }
        rules
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn every_feature_of_a_level_has_a_name_that_domains_know() {
            for name in [V2, V3, V3_EXTRA, V4, V4_EXTRA].concat() {
                assert!(CpuFeature::from_name(name).is_some(), "{name}");
            }
        }
    }
}

fn register(register: domain::CpuidRegister) -> CpuidRegister {
    match register {
        domain::CpuidRegister::Eax => CpuidRegister::Eax,
        domain::CpuidRegister::Ebx => CpuidRegister::Ebx,
        domain::CpuidRegister::Ecx => CpuidRegister::Ecx,
        domain::CpuidRegister::Edx => CpuidRegister::Edx,
    }
}

fn feature_policy(policy: domain::FeaturePolicy) -> FeaturePolicy {
    match policy {
        domain::FeaturePolicy::Force => FeaturePolicy::Force,
        domain::FeaturePolicy::Require => FeaturePolicy::Require,
        domain::FeaturePolicy::Optional => FeaturePolicy::Optional,
        domain::FeaturePolicy::Disable => FeaturePolicy::Disable,
        domain::FeaturePolicy::Forbid => FeaturePolicy::Forbid,
    }
}

fn backend(backend: &domain::SerialBackend) -> SerialBackend {
    let path = |path: &domain::HostPath| path.as_path().to_owned();
    match backend {
        domain::SerialBackend::Pty => SerialBackend::Pty { mode: PTY_MODE },
        domain::SerialBackend::Null => SerialBackend::Null,
        domain::SerialBackend::Stdio => SerialBackend::Stdio,
        domain::SerialBackend::File { path: file, append } => SerialBackend::File {
            path: path(file),
            append: append.unwrap_or(false),
        },
        domain::SerialBackend::Unix {
            path: socket,
            listen: true,
        } => SerialBackend::UnixListen { path: path(socket) },
        domain::SerialBackend::Unix {
            path: socket,
            listen: false,
        } => SerialBackend::UnixConnect { path: path(socket) },
    }
}

fn pci_devices(
    devices: &domain::PciDevices,
    memory: &domain::MemoryConfig,
    qcow2: Option<&'static dyn ImageFormat>,
) -> Result<Vec<PciDeviceSpec>, HostError> {
    let mut nets = 0;
    let mut made = Vec::new();
    for (slot, device) in devices.iter() {
        let device = match &device.kind {
            domain::PciDeviceKind::Disk(disk) => PciDevice::Disk(disk_spec(disk, qcow2)?),
            domain::PciDeviceKind::Interface(interface) => {
                nets += 1;
                PciDevice::Net(net_spec(interface, nets - 1))
            }
            domain::PciDeviceKind::Balloon(balloon) => PciDevice::Balloon(BalloonSpec {
                free_page_reporting: balloon.free_page_reporting.unwrap_or(false),
                auto_deflate: balloon.auto_deflate.unwrap_or(false),
                statistics_period: Duration::from_secs(balloon.statistics_period_s.into()),
                wanted_bytes: balloon.current.map_or(0, |current| {
                    memory.size().bytes().saturating_sub(current.bytes())
                }),
            }),
            domain::PciDeviceKind::Console(console) => PciDevice::Console(backend(console)),
            domain::PciDeviceKind::Rng(rng) => PciDevice::Rng(RngSpec {
                source: rng.source.path().into(),
                rate: rng.rate.map(|rate| RngRate {
                    bytes: rate.bytes(),
                    period: Duration::from_millis(rate.period_ms().into()),
                }),
            }),
        };
        let slot = slot.number();
        made.push(PciDeviceSpec { slot, device });
    }
    Ok(made)
}

fn net_spec(interface: &domain::Interface, number: u32) -> NetSpec {
    let name = interface.target.as_ref();
    let name = name.map(|name| name.as_str().to_owned());
    NetSpec {
        name: format!("net{number}"),
        mac: interface.mac.bytes(),
        link_up: interface.link_up.unwrap_or(true),
        port: match &interface.source {
            domain::InterfaceSource::Ethernet { .. } => NetPort::Tap {
                name,
                make: !interface.needs_tap(),
            },
            domain::InterfaceSource::Bridge(bridge) => NetPort::Bridge {
                bridge: bridge.as_str().to_owned(),
                name,
            },
        },
    }
}

fn disk_spec(
    disk: &domain::Disk,
    qcow2: Option<&'static dyn ImageFormat>,
) -> Result<DiskSpec, HostError> {
    Ok(DiskSpec {
        name: disk.target.as_str().to_owned(),
        path: disk.source.as_path().to_owned(),
        format: match image_format(disk, qcow2)? {
            Some(format) => DiskFormat::Image(format),
            None => DiskFormat::Raw,
        },
        read_only: disk.read_only,
        serial: disk
            .serial
            .as_ref()
            .map_or_else(String::new, |serial| serial.as_str().to_owned()),
        cache: disk.cache.map_or(DiskCache::default(), disk_cache),
        discard: disk.discard.unwrap_or(false),
    })
}

/// Returns the format of a disk's image; `None` for a raw disk.
pub(super) fn image_format(
    disk: &domain::Disk,
    qcow2: Option<&'static dyn ImageFormat>,
) -> Result<Option<&'static dyn ImageFormat>, HostError> {
    match (disk.format, qcow2) {
        (domain::DiskFormat::Raw, _) => Ok(None),
        (domain::DiskFormat::Qcow2, Some(format)) => Ok(Some(format)),
        (domain::DiskFormat::Qcow2, None) => Err(HostError::Invalid(format!(
            "disk {} is a qcow2 image, which this program cannot read; the livepoint command can",
            disk.target.as_str()
        ))),
    }
}

fn disk_cache(cache: domain::DiskCache) -> DiskCache {
    match cache {
        domain::DiskCache::WriteBack => DiskCache::WriteBack,
        domain::DiskCache::WriteThrough => DiskCache::WriteThrough,
        domain::DiskCache::None => DiskCache::None,
        domain::DiskCache::DirectSync => DiskCache::DirectSync,
        domain::DiskCache::Unsafe => DiskCache::Unsafe,
    }
}

fn end_action(action: LifecycleAction) -> EndAction {
    match action {
        LifecycleAction::Destroy => EndAction::Destroy,
        LifecycleAction::Restart => EndAction::Restart,
        LifecycleAction::Preserve => EndAction::Preserve,
    }
}
