//! Domains made at random, and what has to hold for all of them.

use proptest::prelude::*;

use super::super::{Rng, *};

/// Text that XML can carry and that is not blank.
fn any_text() -> impl Strategy<Value = String> {
    "[ \\t\\n\\r\\x20-\\x7e\\u{80}-\\u{2fff}\\u{10000}]{0,40}[!-~]"
}

fn any_path() -> impl Strategy<Value = HostPath> {
    "/[ -~\u{a1}-\u{ff}]{0,40}".prop_map(|path| HostPath::new(&path).unwrap())
}

prop_compose! {
    fn any_memory()(
        mib in 1_u32..4096,
        huge: bool,
        source in prop::sample::select(vec![
            MemorySource::Anonymous, MemorySource::MemfdPrivate, MemorySource::MemfdShared,
        ]),
        locked: bool,
        preallocate: Option<bool>,
    ) -> MemoryConfig {
        let size = MemorySize::from_mib(mib).unwrap();
        let mut memory = MemoryConfig::new(size);
        if huge && mib % 2 == 0 {
            let page = if mib % 1024 == 0 { HugePageSize::Gib1 } else { HugePageSize::Mib2 };
            memory = memory.with_huge_pages(page).unwrap();
        }
        memory.source = source;
        memory.locked = locked;
        memory.preallocate = preallocate;
        memory
    }
}

fn any_backend() -> impl Strategy<Value = SerialBackend> {
    prop_oneof![
        Just(SerialBackend::Pty),
        Just(SerialBackend::Null),
        Just(SerialBackend::Stdio),
        (any_path(), any::<Option<bool>>())
            .prop_map(|(path, append)| SerialBackend::File { path, append }),
        (any_path(), any::<bool>()).prop_map(|(path, listen)| SerialBackend::Unix { path, listen }),
    ]
}

prop_compose! {
    fn any_serial()(
        backends in prop::collection::vec(any_backend(), 0..=SERIAL_PORTS_MAX),
        alias: bool,
    ) -> SerialPorts {
        let mut ports = SerialPorts::default();
        for (index, backend) in backends.into_iter().enumerate() {
            let name = format!("ua-{index}");
            let alias = alias.then(|| UserAlias::new(&name).unwrap());
            // Two of the same socket cannot be added; one is left then.
            drop(ports.insert(index, SerialPort { backend, alias }));
        }
        ports
    }
}

fn any_disk() -> impl Strategy<Value = Disk> {
    let cache = prop::option::of(prop::sample::select(DiskCache::ALL.to_vec()));
    let kind = prop::sample::select(vec![DiskSourceKind::File, DiskSourceKind::Block]);
    let serial = prop::option::of("[A-Za-z0-9_.-]{1,20}");
    let kind = prop_oneof![
        kind.prop_map(|kind| (kind, DiskFormat::Raw)),
        Just((DiskSourceKind::File, DiskFormat::Qcow2)),
    ];
    let rest = (any::<bool>(), any::<Option<bool>>(), cache, kind, serial);
    ("[a-z]{1,4}", any_path(), rest).prop_map(
        |(letters, source, (read_only, discard, cache, (source_kind, format), serial))| Disk {
            read_only,
            discard,
            cache,
            source_kind,
            format,
            serial: serial.map(|serial| DiskSerial::new(&serial).unwrap()),
            ..Disk::new(DiskTarget::new(&format!("vd{letters}")).unwrap(), source)
        },
    )
}

fn any_interface() -> impl Strategy<Value = Interface> {
    let name = || "[a-u][a-zA-Z0-9_.-]{0,14}".prop_map(|name| HostInterface::new(&name).unwrap());
    let source = prop_oneof![
        prop::option::of(Just(true)).prop_map(|managed| InterfaceSource::Ethernet { managed }),
        name().prop_map(InterfaceSource::Bridge),
    ];
    let made = (source, prop::option::of(name()));
    let there = name().prop_map(|name| {
        let managed = Some(false);
        (InterfaceSource::Ethernet { managed }, Some(name))
    });
    let rest = (any::<Option<bool>>(), any::<[u8; 5]>());
    (prop_oneof![made, there], rest).prop_map(|((source, target), (link_up, [a, b, c, d, e]))| {
        Interface {
            mac: MacAddress::new([2, a, b, c, d, e]).unwrap(),
            target,
            link_up,
            ..Interface::new(source)
        }
    })
}

fn any_rng() -> impl Strategy<Value = Rng> {
    let source = prop::sample::select(vec![RngSource::Urandom, RngSource::Random]);
    let rate = prop::option::of((1..u32::MAX, 1..u32::MAX));
    (source, rate).prop_map(|(source, rate)| Rng {
        source,
        rate: rate.map(|(bytes, period)| RngRate::new(bytes, period).unwrap()),
    })
}

/// Of files and sockets that no serial port has.
fn any_console() -> impl Strategy<Value = SerialBackend> {
    let path = "/console/[a-z]{1,8}".prop_map(|path| HostPath::new(&path).unwrap());
    let append = prop::option::of(any::<bool>());
    prop_oneof![
        Just(SerialBackend::Pty),
        Just(SerialBackend::Null),
        (path.clone(), append).prop_map(|(path, append)| SerialBackend::File { path, append }),
        (path, any::<bool>()).prop_map(|(path, listen)| SerialBackend::Unix { path, listen }),
    ]
}

fn any_pci() -> impl Strategy<Value = PciDevices> {
    let slot = prop::option::of(1..=PCI_SLOT_MAX);
    let kind = prop_oneof![
        any_disk().prop_map(PciDeviceKind::Disk),
        any_interface().prop_map(PciDeviceKind::Interface),
        any_rng().prop_map(PciDeviceKind::Rng),
        any_console().prop_map(PciDeviceKind::Console),
        (any::<[Option<bool>; 2]>(), any::<u32>()).prop_map(|(choices, statistics_period_s)| {
            let [free_page_reporting, auto_deflate] = choices;
            PciDeviceKind::Balloon(Balloon {
                free_page_reporting,
                auto_deflate,
                statistics_period_s,
                current: None,
            })
        }),
    ];
    prop::collection::vec((slot, kind, any::<bool>()), 0..6).prop_map(|devices| {
        let mut pci = PciDevices::default();
        for (number, (slot, kind, alias)) in devices.into_iter().enumerate() {
            let slot = slot.map(|slot| PciSlot::new(slot).unwrap());
            let name = format!("ua-pci-{number}");
            let alias = alias.then(|| UserAlias::new(&name).unwrap());
            // Devices that collide cannot be added; one is left then.
            drop(pci.insert(slot, PciDevice { kind, alias }));
        }
        pci
    })
}

fn any_boot() -> impl Strategy<Value = BootConfig> {
    let source = prop_oneof![
        (any_path(), prop::option::of(any_path()))
            .prop_map(|(kernel, initrd)| KernelSource::Path { kernel, initrd }),
        "[a-z0-9._-]{1,20}"
            .prop_map(|name| KernelSource::Builtin(BuiltinName::new(&name).unwrap())),
    ];
    (source, prop::option::of(any_text())).prop_map(|(source, cmdline)| BootConfig {
        source,
        cmdline: KernelCmdline::new(&cmdline.unwrap_or_default()).unwrap(),
    })
}

fn any_cpu() -> impl Strategy<Value = CpuConfig> {
    let features: Vec<CpuFeature> = CpuFeature::all().collect();
    let policies = vec![
        FeaturePolicy::Force,
        FeaturePolicy::Require,
        FeaturePolicy::Optional,
        FeaturePolicy::Disable,
        FeaturePolicy::Forbid,
    ];
    let modes = vec![
        CpuMode::HostPassthrough,
        CpuMode::HostModel,
        CpuMode::Custom(CpuModel::V1),
        CpuMode::Custom(CpuModel::V2),
        CpuMode::Custom(CpuModel::V3),
        CpuMode::Custom(CpuModel::V4),
    ];
    let feature = prop::sample::select(features);
    let policy = prop::sample::select(policies);
    (
        prop::sample::select(modes),
        prop::collection::btree_map(feature, policy, 0..6),
        any::<Option<bool>>(),
        any::<Option<bool>>(),
    )
        .prop_map(|(mode, features, pmu, paravirtual_spinlocks)| CpuConfig {
            mode,
            features,
            pmu,
            paravirtual_spinlocks,
        })
}

fn any_vcpus() -> impl Strategy<Value = Vcpus> {
    prop_oneof![
        (1..=VCPUS_MAX).prop_map(|count| Vcpus::new(count).unwrap()),
        (1_u8..=2, 1_u8..=2, 1_u8..=2, 1_u8..=2).prop_map(|(sockets, dies, cores, threads)| {
            Vcpus::with_topology(CpuTopology::new(sockets, dies, cores, threads).unwrap())
        }),
    ]
}

fn any_clock() -> impl Strategy<Value = ClockConfig> {
    let basis = prop::sample::select(vec![ClockBasis::Utc, ClockBasis::LocalTime]);
    let offset = prop_oneof![
        Just(ClockOffset::Utc),
        Just(ClockOffset::LocalTime),
        "[A-Z][a-z]{1,8}/[A-Z][a-z_]{1,8}"
            .prop_map(|zone| ClockOffset::TimeZone(TimeZoneName::new(&zone).unwrap())),
        (any::<i64>(), basis).prop_map(|(adjustment_seconds, basis)| ClockOffset::Variable {
            adjustment_seconds,
            basis,
        }),
    ];
    let pit = prop::sample::select(vec![TickPolicy::Delay, TickPolicy::Discard]);
    (offset, any::<bool>(), pit).prop_map(|(offset, kvmclock, pit)| ClockConfig {
        offset,
        kvmclock,
        pit,
    })
}

fn any_lifecycle() -> impl Strategy<Value = Lifecycle> {
    let action = || {
        prop::sample::select(vec![
            LifecycleAction::Destroy,
            LifecycleAction::Restart,
            LifecycleAction::Preserve,
        ])
    };
    (action(), action(), action()).prop_map(|(on_poweroff, on_reboot, on_crash)| Lifecycle {
        on_poweroff,
        on_reboot,
        on_crash,
    })
}

fn any_domain() -> impl Strategy<Value = DomainConfig> {
    let machine = (
        any_memory(),
        any_vcpus(),
        any_cpu(),
        any_boot(),
        any_clock(),
        any_serial(),
        any_pci(),
    );
    let machine = machine.prop_map(|(memory, vcpus, cpu, boot, clock, serial, mut pci)| {
        let half = MemorySize::from_bytes((memory.size().bytes() / 2) & !4095);
        if let (Some(balloon), Ok(half)) = (pci.balloon_mut(), half) {
            balloon.current = Some(half);
        }
        MachineConfig {
            memory,
            vcpus,
            cpu,
            boot,
            clock,
            devices: Devices { serial, pci },
        }
    });
    let texts = (
        "[!-.0-~\u{a1}-\u{2fff}][ -.0-~]{0,30}",
        prop::option::of("[ -~]{0,30}[!-~]"),
        prop::option::of(any_text()),
    );
    (machine, texts, any_lifecycle()).prop_map(|(machine, (name, title, text), lifecycle)| {
        DomainConfig {
            title: title.map(|title| Title::new(&title).unwrap()),
            description: text.map(|text| Description::new(&text).unwrap()),
            lifecycle,
            ..DomainConfig::new(DomainName::new(&format!("x{name}")).unwrap(), machine)
        }
    })
}

proptest! {
    #[test]
    fn any_domain_survives_its_document(config in any_domain()) {
        let xml = config.to_xml(XmlView::Inactive);
        prop_assert_eq!(DomainConfig::parse(&xml), Ok(config.clone()), "{}", xml);
        let live = LiveInfo {
            id: 3,
            ptys: vec![HostPath::new("/dev/pts/1").ok()],
            console_ptys: vec![HostPath::new("/dev/pts/2").ok(), None],
            taps: vec![None, HostInterface::new("vnet7").ok()],
            given_kib: {
                let balloon = config.machine.devices.pci.balloon();
                let current = balloon.and_then(|balloon| balloon.current);
                let kib = config.machine.memory.size().kib();
                kib - current.map_or(kib, MemorySize::kib)
            },
            statistics_period_s: {
                let balloon = config.machine.devices.pci.balloon();
                balloon.map_or(0, |balloon| balloon.statistics_period_s)
            },
        };
        let xml = config.to_xml(XmlView::Live(&live));
        prop_assert_eq!(DomainConfig::parse(&xml), Ok(config), "{}", xml);
    }

    #[test]
    fn any_text_is_read_or_refused(text in any::<String>()) {
        drop(DomainConfig::parse(&text));
        drop(super::parse(&text));
        drop(super::parse(&format!("<metadata a='{text}'/>")));
        drop(super::parse(&format!("<vcpu>{text}</vcpu>")));
    }
}
