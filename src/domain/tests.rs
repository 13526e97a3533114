//! Tests of what no file under `tests/domain` can show well: limits, the table,
//! and machines made without a document.

mod any_domain;

use std::collections::HashSet;

use super::*;

/// A document with `extra` as the last children of its root.
fn with(extra: &str) -> String {
    format!(
        "<domain type='kvm'>\n<name>n</name>\n<memory unit='MiB'>64</memory>\n\
         <os><type>hvm</type><kernel>/k</kernel></os>\n{extra}</domain>"
    )
}

fn parse(extra: &str) -> Result<DomainConfig, DomainError> {
    DomainConfig::parse(&with(extra))
}

fn message(extra: &str) -> String {
    match parse(extra) {
        Ok(_) => panic!("accepted: {extra}"),
        Err(error) => error.to_string(),
    }
}

fn memory_bytes(text: &str, unit: &str) -> Result<u64, DomainError> {
    let xml = with("").replace(
        "<memory unit='MiB'>64",
        &format!("<memory unit='{unit}'>{text}"),
    );
    DomainConfig::parse(&xml).map(|config| config.machine.memory.size().bytes())
}

#[test]
fn memory_units_are_those_of_libvirt() {
    let cases = [
        ("67108864", "b", 64 << 20),
        ("67108864", "bytes", 64 << 20),
        ("65536", "KiB", 64 << 20),
        ("65536", "k", 64 << 20),
        ("64", "M", 64 << 20),
        ("64", "mib", 64 << 20),
        ("4096", "MB", 4_096_000_000),
        ("128", "GB", 128_000_000_000),
        (" 2\n", "G", 2 << 30),
        ("1", "TiB", 1 << 40),
    ];
    for (text, unit, bytes) in cases {
        assert_eq!(memory_bytes(text, unit), Ok(bytes), "{text} {unit}");
    }
}

#[test]
fn memory_is_rounded_up_to_kib() {
    // 4 KiB short of 64 MiB, and one byte more than the KiB before.
    assert_eq!(memory_bytes("67103745", "b"), Ok((64 << 20) - 4096));
    let odd = memory_bytes("67108865", "b").expect_err("not a multiple of 4 KiB");
    assert!(odd.to_string().contains("multiple of 4 KiB"), "{odd}");
}

#[test]
fn memory_out_of_range_is_refused() {
    for (text, unit) in [
        ("0", "KiB"),
        ("1023", "KiB"),
        ("1020", "KiB"),
        ("1048580", "MiB"),
        ("18446744073709551615", "b"),
        ("18446744073709551616", "b"),
        ("16", "EiB"),
        ("18014398509481984", "KiB"),
        ("-1", "KiB"),
        ("+64", "MiB"),
        ("", "KiB"),
        ("64", ""),
        ("64", "kibibytes"),
        ("0x40", "MiB"),
    ] {
        let error = memory_bytes(text, unit).expect_err(text);
        assert_eq!((error.line(), error.element()), (3, Some("memory")));
    }
}

#[test]
fn current_memory_at_the_top_of_the_range_is_refused() {
    let text = message("<currentMemory unit='b'>18446744073709551615</currentMemory>");
    assert!(text.contains("are more than the 65536 KiB"), "{text}");
}

#[test]
fn memory_is_a_multiple_of_its_huge_pages() {
    let backing = |page: &str| {
        parse(&format!(
            "<memoryBacking><hugepages><page {page}/></hugepages></memoryBacking>"
        ))
    };
    let memory = backing("size='2' unit='M'").unwrap().machine.memory;
    assert_eq!(memory.huge_pages(), Some(HugePageSize::Mib2));
    let error = backing("size='1' unit='G'").expect_err("64 MiB");
    assert_eq!(error.element(), Some("hugepages"));
    assert!(backing("size='4'").is_err());
}

#[test]
fn absent_uuid_is_a_new_one_each_time() {
    assert_ne!(parse("").unwrap().uuid, parse("").unwrap().uuid);
}

#[test]
fn defaults_are_those_of_the_reference() {
    let config = parse("").unwrap();
    let machine = &config.machine;
    assert_eq!(machine.vcpus, Vcpus::ONE);
    assert_eq!(machine.cpu.mode, CpuMode::HostPassthrough);
    assert_eq!(machine.clock, ClockConfig::default());
    assert_eq!(machine.memory.source, MemorySource::Anonymous);
    assert_eq!(machine.devices, Devices::default());
    assert_eq!(config.lifecycle, Lifecycle::default());
}

#[test]
fn first_console_makes_serial_port_0() {
    let config = parse("<devices><console type='pty'/></devices>").unwrap();
    let port = config.machine.devices.serial.get(0);
    assert_eq!(port, Some(&SerialPort::from(SerialBackend::Pty)));
    assert_eq!(config.machine.devices.serial.get(1), None);
}

#[test]
fn numbered_serial_ports_are_not_taken_by_others() {
    let config = parse(
        "<devices><serial type='null'/><serial type='pty'><target port='0'/></serial></devices>",
    )
    .unwrap();
    let serial = &config.machine.devices.serial;
    assert_eq!(serial.get(0).unwrap().backend, SerialBackend::Pty);
    assert_eq!(serial.get(1).unwrap().backend, SerialBackend::Null);
}

#[test]
fn serial_port_beyond_the_last_is_refused() {
    for port in ["2", "4294967296", "18446744073709551615", "-1"] {
        let text = message(&format!(
            "<devices><serial type='pty'><target port='{port}'/></serial></devices>"
        ));
        assert!(text.contains("line 5: <"), "{text}");
    }
}

#[test]
fn serial_port_elsewhere_than_its_standard_address_is_refused() {
    for address in ["iobase='0x2f8'", "iobase='+0x3f8'", "irq='5'", "irq=''"] {
        let text = message(&format!(
            "<devices><serial type='pty'><address type='isa' {address}/></serial></devices>"
        ));
        assert!(text.contains("<address>"), "{text}");
    }
}

#[test]
fn device_names_of_a_running_machine_are_forgotten() {
    let alias = |name: &str| {
        let extra =
            format!("<devices><serial type='pty'><alias name='{name}'/></serial></devices>");
        parse(&extra).map(|config| {
            let port = config.machine.devices.serial.get(0).unwrap();
            port.alias.as_ref().map(|alias| alias.as_str().to_owned())
        })
    };
    assert_eq!(alias("serial0"), Ok(None));
    assert_eq!(alias("ua-log"), Ok(Some("ua-log".to_owned())));
    assert!(alias("ua-log/../x").is_err());
}

#[test]
fn command_line_fits_the_buffer_of_the_kernel() {
    let cmdline = |length: usize| {
        let cmdline = format!(
            "<kernel>/k</kernel><cmdline>{}</cmdline>",
            "x".repeat(length)
        );
        DomainConfig::parse(&with("").replace("<kernel>/k</kernel>", &cmdline))
    };
    assert!(cmdline(CMDLINE_BYTES_MAX).is_ok());
    let error = cmdline(CMDLINE_BYTES_MAX + 1).expect_err("too long");
    assert_eq!(error.element(), Some("cmdline"));
    assert!(error.to_string().len() < 250, "{error}");
}

#[test]
fn names_that_could_leave_a_directory_are_refused() {
    let long = "x".repeat(NAME_BYTES_MAX + 1);
    for name in ["", " ", ".", "..", "a/b", "a\nb", "a\tb", "\u{85}", &long] {
        assert!(DomainName::new(name).is_err(), "{name:?}");
    }
    assert!(DomainName::new(&"x".repeat(NAME_BYTES_MAX)).is_ok());
    for zone in ["", "/etc/passwd", "../x", "a//b", "Europe/", "a\0b"] {
        assert!(TimeZoneName::new(zone).is_err(), "{zone:?}");
    }
    assert!(TimeZoneName::new("America/Argentina/Buenos_Aires").is_ok());
    for guest in ["", "NPB", "a/b", "a b"] {
        assert!(BuiltinName::new(guest).is_err(), "{guest:?}");
    }
}

#[test]
fn metadata_comes_back_byte_for_byte() {
    let metadata = "<metadata  >\r\n <a:b xmlns:a = 'u'  c=\"&#x20AC;\" ><!-- d --><a:b/>\
        </a:b >\t<e xmlns='f'/><?g h?><![CDATA[<]]>&amp;</metadata >";
    let config = parse(metadata).unwrap();
    assert_eq!(config.metadata.as_ref().unwrap().as_xml(), metadata);
    assert!(config.to_xml(XmlView::Inactive).contains(metadata));
}

#[test]
fn what_is_not_well_formed_is_refused() {
    for extra in [
        "<metadata><a></b></metadata>",
        "<metadata><a:b/></metadata>",
        "<metadata><a b:c=''/></metadata>",
        "<metadata><a xmlns:b=''/></metadata>",
        "<metadata><a b='1' b='2'/></metadata>",
        "<metadata><a b='1'c='2'/></metadata>",
        "<metadata><a b='<'/></metadata>",
        "<metadata><a b='&c;'/></metadata>",
        "<metadata><a b='&#1;'/></metadata>",
        "<metadata><a b=c/></metadata>",
        "<metadata><a b/></metadata>",
        "<metadata>]]></metadata>",
        "<metadata>&a;</metadata>",
        "<metadata>&#xFFFE;</metadata>",
        "<metadata><1/></metadata>",
        "<metadata><a:b:c xmlns:a='u'/></metadata>",
        "<metadata><!-- -- --></metadata>",
        "<metadata><?XML a?></metadata>",
        "<metadata><?xml version='1.0'?></metadata>",
        "<metadata>\u{1}</metadata>",
        "<metadata>\0</metadata>",
        "<metadata>& </metadata>",
        "<metadata>",
    ] {
        let error = parse(extra).expect_err(extra);
        assert!(matches!(error, DomainError::Syntax { .. }), "{error}");
        assert!(error.line() >= 5, "{error}");
    }
    let document = with("");
    for xml in [
        format!(" <?xml version='1.0'?>{document}"),
        format!("<?xml version='1.1'?>{document}"),
        format!("<?xml version='1.0' encoding='latin1'?>{document}"),
        format!("<?xml encoding='UTF-8'?>{document}"),
        format!("<?xml?>{document}"),
        format!("<?xml version='1.0' encodign='UTF-8'?>{document}"),
        format!("<?xml version='1.0' standalone='yes' encoding='UTF-8'?>{document}"),
        format!("{document}{document}"),
        format!("{document}text"),
        format!("text{document}"),
        format!("&amp;{document}"),
        format!("<![CDATA[]]>{document}"),
        format!("{document}</domain>"),
    ] {
        let error = DomainConfig::parse(&xml).expect_err(&xml);
        assert!(
            matches!(error, DomainError::Syntax { .. }),
            "{xml}: {error}"
        );
    }
    assert!(DomainConfig::parse(&format!("\u{feff}<?xml version='1.0'?>\n{document}\n")).is_ok());
}

#[test]
fn document_type_is_refused_wherever_it_stands() {
    let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;&a;'>]>";
    for xml in [
        format!("{bomb}{}", with("")),
        with(bomb),
        with("<!doctype d>"),
    ] {
        let error = DomainConfig::parse(&xml).expect_err("DOCTYPE");
        assert!(matches!(error, DomainError::Doctype { .. }), "{error}");
    }
}

#[test]
fn every_limit_is_enforced() {
    let many = |count: usize, text: &str| text.repeat(count);
    let attributes = |count: usize| {
        let attributes: String = (0..count).map(|n| format!(" a{n}=''")).collect();
        format!("<metadata><a{attributes}/></metadata>")
    };
    let nested = |depth: usize| {
        format!(
            "<metadata>{}{}</metadata>",
            many(depth, "<a>"),
            many(depth, "</a>")
        )
    };
    let tuning = |depth: usize| {
        format!(
            "<cputune>{}{}</cputune>",
            many(depth, "<a>"),
            many(depth, "</a>")
        )
    };
    let text = |length: usize| format!("<description>{}</description>", many(length, "x"));
    // The root, name, memory, os, type and kernel are six elements.
    let wide = |count: usize| format!("<metadata>{}</metadata>", many(count - 7, "<a/>"));
    let value = |length: usize| format!("<metadata><a b='{}'/></metadata>", many(length, "x"));
    let name = |length: usize| format!("<metadata><{}/></metadata>", many(length, "x"));
    let size = |length: usize| {
        let rest = length - with("<metadata></metadata>").len();
        format!("<metadata>{}</metadata>", many(rest, " "))
    };
    type Make<'a> = &'a dyn Fn(usize) -> String;
    let cases: [(&str, Make<'_>, usize); 8] = [
        // The root and <metadata> are two levels.
        ("levels", &|depth| nested(depth - 2), DEPTH_MAX),
        ("levels", &|depth| tuning(depth - 2), DEPTH_MAX),
        ("attributes", &attributes, ATTRIBUTES_MAX),
        ("bytes of text", &text, TEXT_BYTES_MAX),
        ("bytes in one attribute", &value, TEXT_BYTES_MAX),
        ("bytes in one name", &name, document::NAME_BYTES_MAX),
        ("elements", &wide, ELEMENTS_MAX),
        ("bytes", &size, DOCUMENT_BYTES_MAX),
    ];
    for (what, make, limit) in cases {
        if let Err(error) = parse(&make(limit)) {
            panic!("{what}: {error}");
        }
        let text = message(&make(limit + 1));
        assert!(
            text.contains(&format!("more than {limit} {what}")),
            "{text}"
        );
    }
}

#[test]
fn namespaces_in_scope_are_limited() {
    let declare = |range: std::ops::Range<usize>| -> String {
        range.map(|n| format!(" xmlns:p{n}='u'")).collect()
    };
    let nested = |inner: usize| {
        let (outer, inner) = (declare(0..60), declare(60..60 + inner));
        format!("<metadata><a{outer}><b{inner}/></a></metadata>")
    };
    assert!(parse(&nested(NAMESPACES_MAX - 60)).is_ok());
    let text = message(&nested(NAMESPACES_MAX - 59));
    assert!(text.contains("a namespace declaration"), "{text}");
}

#[test]
fn bytes_that_are_not_utf_8_are_refused_at_their_line() {
    let mut xml = with("").into_bytes();
    let at = xml.iter().position(|&byte| byte == b'6').unwrap();
    xml[at] = 0xff;
    let error = DomainConfig::parse_bytes(&xml).expect_err("not UTF-8");
    assert_eq!((error.line(), error.element()), (3, None));
    let huge = vec![0xff; DOCUMENT_BYTES_MAX + 1];
    let error = DomainConfig::parse_bytes(&huge).expect_err("too large");
    assert!(matches!(error, DomainError::TooLarge { .. }));
}

#[test]
fn error_messages_quote_little_and_escape_it() {
    let long = "\u{1b}[31m".replace('\u{1b}', "&#x9b;").repeat(1000);
    let text = message(&format!("<on_crash>{long}</on_crash>"));
    assert!(text.len() < 500 && !text.contains('\u{9b}'), "{text}");
    assert!(text.contains("\\u{9b}[31m"), "{text}");
}

#[test]
fn errors_tell_unsupported_from_wrong() {
    assert!(
        parse("<sysinfo type='smbios'/>")
            .unwrap_err()
            .is_unsupported()
    );
    assert!(
        parse("<pm><suspend-to-mem enabled='yes'/></pm>")
            .unwrap_err()
            .is_unsupported()
    );
    assert!(!parse("<vcpu>many</vcpu>").unwrap_err().is_unsupported());
    assert!(!parse("<vpcu/>").unwrap_err().is_unsupported());
}

#[test]
fn other_namespaces_are_refused_outside_metadata() {
    for extra in [
        "<q:commandline xmlns:q='u'/>",
        "<vcpu xmlns='u'>1</vcpu>",
        "<cputune><q:x xmlns:q='u'/></cputune>",
        "<cputune><x xmlns='u'/></cputune>",
    ] {
        let error = parse(extra).expect_err(extra);
        assert!(
            matches!(error, DomainError::ForeignNamespace { .. }),
            "{error}"
        );
    }
}

#[test]
fn impossible_machines_cannot_be_made() {
    assert!(Vcpus::new(0).is_err());
    assert!(Vcpus::new(VCPUS_MAX + 1).is_err());
    assert!(CpuTopology::new(0, 1, 1, 1).is_err());
    assert!(CpuTopology::new(255, 255, 255, 255).is_err());
    assert!(CpuTopology::new(2, 1, 4, 2).is_ok());
    assert!(MemorySize::from_bytes(u64::MAX).is_err());
    assert!(MemorySize::from_bytes((1 << 20) + 1).is_err());
    assert!(HostPath::new("relative").is_err());
    assert!(HostPath::new("/a\0b").is_err());
    let mut ports = SerialPorts::default();
    assert!(ports.insert(0, SerialBackend::Stdio.into()).is_ok());
    assert!(ports.insert(0, SerialBackend::Pty.into()).is_err());
    assert!(ports.insert(1, SerialBackend::Stdio.into()).is_err());
    assert!(ports.insert(2, SerialBackend::Pty.into()).is_err());
}

#[test]
fn table_rows_are_unique_and_have_their_parents() {
    let mut paths = HashSet::new();
    for rule in rules() {
        assert!(paths.insert(rule.path), "{} twice", rule.path);
    }
    for rule in rules() {
        let parent = rule.path.rsplit_once(['/', '@']).map(|(parent, _)| parent);
        let known = |path: &str| {
            paths.contains(path) || paths.iter().any(|p| p.starts_with(&format!("{path}[")))
        };
        assert!(parent.is_none_or(known), "{}", rule.path);
        for name in rule.needs {
            let path = format!("{}@{name}", rule.path);
            assert!(paths.contains(path.as_str()), "{path}");
        }
    }
}

#[test]
fn table_rows_that_refuse_say_why() {
    for rule in rules() {
        let refuses = rule.disposition == Disposition::Refused || !rule.values.is_empty();
        let on_off = rule.values == ["on", "off"] || rule.values.len() > 1;
        assert!(!refuses || !rule.note.is_empty() || on_off, "{}", rule.path);
        assert!(!rule.told || !rule.note.is_empty(), "{}", rule.path);
    }
}

#[test]
fn nothing_is_kept_for_an_element_that_may_be_repeated() {
    // What is kept is found again by its path, which has to mean one element.
    let repeated = |path: &str| rules().any(|rule| rule.path == path && rule.many);
    let honoured = |path: &str| {
        let mut all = rules();
        all.any(|rule| rule.path == path && rule.disposition == Disposition::Honoured)
    };
    for rule in rules().filter(|rule| rule.kept) {
        let Some((parent, _)) = rule.path.rsplit_once(['/', '@']) else {
            continue;
        };
        assert!(!(repeated(parent) && honoured(parent)), "{}", rule.path);
        let timer = parent.ends_with(']') && honoured(parent);
        assert!(!timer, "{}", rule.path);
    }
}

#[test]
fn cpu_features_have_one_name_and_one_bit() {
    let mut names = HashSet::new();
    let mut bits = HashSet::new();
    for feature in CpuFeature::all() {
        assert!(names.insert(feature.name()), "{}", feature.name());
        let bit = (
            feature.leaf(),
            feature.subleaf(),
            feature.register(),
            feature.mask(),
        );
        assert!(bits.insert(bit), "{}", feature.name());
        assert_eq!(CpuFeature::from_name(feature.name()), Some(feature));
    }
    let avx2 = CpuFeature::from_name("avx2").unwrap();
    assert_eq!((avx2.leaf(), avx2.subleaf(), avx2.mask()), (7, 0, 1 << 5));
    assert_eq!(avx2.register(), CpuidRegister::Ebx);
}
