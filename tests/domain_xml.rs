//! Domain XML as its users meet it: documents in files, the reference, and
//! documents that something has mangled.
//!
//! `LIVEPOINT_BLESS=1` rewrites the expected results after a change that is
//! meant. `LIVEPOINT_LONG=1` mangles a hundred times as many documents.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use livepoint::domain::{
    DOCUMENT_BYTES_MAX, DomainConfig, HostInterface, Interface, LiveInfo, XmlView, reference, rules,
};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn documents(folder: &str) -> Vec<PathBuf> {
    let folder = root().join("tests/domain").join(folder);
    let entries = fs::read_dir(folder).expect("the folder of documents");
    let mut paths: Vec<PathBuf> = entries
        .map(|entry| entry.expect("an entry").path())
        .collect();
    paths.retain(|path| {
        let name = path.to_str().expect("names are ASCII");
        name.ends_with(".xml") && !name.ends_with(".out.xml")
    });
    paths.sort();
    paths
}

fn blessing() -> bool {
    std::env::var_os("LIVEPOINT_BLESS").is_some()
}

/// Compares with the file at `path`, or rewrites it.
fn expect_file(path: &Path, found: &str) {
    if blessing() {
        fs::write(path, found).expect("a writable work tree");
    }
    let expected = fs::read_to_string(path).unwrap_or_default();
    assert_eq!(found, expected, "{}", path.display());
}

#[test]
fn good_documents_have_their_canonical_form() {
    let documents = documents("good");
    assert!(documents.len() >= 10);
    for path in documents {
        let xml = fs::read_to_string(&path).unwrap();
        let (mut config, notes) = DomainConfig::parse_with_notes(&xml)
            .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if !xml.contains("<uuid>") {
            config.uuid = uuid::Uuid::from_u128(1);
        }
        let canonical = config.to_xml(XmlView::Inactive);
        let again = DomainConfig::parse(&canonical).expect("canonical form");
        assert_eq!(again, config, "{}", path.display());
        assert_eq!(again.to_xml(XmlView::Inactive), canonical);
        let mut expected = canonical;
        for note in notes {
            expected.push_str(&format!("<!-- {note} -->\n"));
        }
        expect_file(&path.with_extension("out.xml"), &expected);
    }
}

#[test]
fn live_form_describes_the_same_machine() {
    let live = LiveInfo {
        id: 12,
        ptys: vec![
            Some(livepoint::domain::HostPath::new("/dev/pts/9").unwrap()),
            None,
        ],
        taps: vec![None],
        ..LiveInfo::default()
    };
    for path in documents("good") {
        let xml = fs::read_to_string(&path).unwrap();
        let config = DomainConfig::parse(&xml).unwrap();
        let text = config.to_xml(XmlView::Live(&live));
        assert!(text.contains("<domain type='kvm' id='12'"), "{text}");
        let mut same = config.clone();
        if let Some(balloon) = same.machine.devices.pci.balloon_mut() {
            // The live form has what holds now: the guest uses all, and is asked for nothing.
            balloon.current = None;
            balloon.statistics_period_s = 0;
        }
        assert_eq!(DomainConfig::parse(&text).unwrap(), same, "{text}");
    }
}

#[test]
fn live_form_shows_the_pty_of_the_console() {
    let xml = fs::read_to_string(root().join("tests/domain/good/virt-install.xml")).unwrap();
    let config = DomainConfig::parse(&xml).unwrap();
    let pty = livepoint::domain::HostPath::new("/dev/pts/9").unwrap();
    let live = LiveInfo {
        id: 1,
        ptys: vec![Some(pty)],
        ..LiveInfo::default()
    };
    let text = config.to_xml(XmlView::Live(&live));
    assert!(text.contains("<console type='pty' tty='/dev/pts/9'>"));
    assert_eq!(text.matches("<source path='/dev/pts/9'/>").count(), 2);
    assert_eq!(text.matches("<alias name='serial0'/>").count(), 2);
    assert!(!config.to_xml(XmlView::Inactive).contains("/dev/pts"));
}

#[test]
fn live_form_shows_the_taps_that_were_made_and_a_definition_keeps_none_of_them() {
    let xml = fs::read_to_string(root().join("tests/domain/good/interfaces.xml")).unwrap();
    let config = DomainConfig::parse(&xml).unwrap();
    let live = LiveInfo {
        // In the order of their slots: the bridged one has the last.
        taps: vec![None, None, None, HostInterface::new("vnet41").ok()],
        ..LiveInfo::default()
    };
    let text = config.to_xml(XmlView::Live(&live));
    assert!(text.contains("<target dev='vnet41'/>"), "{text}");
    assert_eq!(DomainConfig::parse(&text).unwrap(), config);
    assert!(!config.to_xml(XmlView::Inactive).contains("vnet"));
}

#[test]
fn an_interface_without_an_address_has_a_random_one_that_its_definition_keeps() {
    let xml = fs::read_to_string(root().join("tests/domain/good/interfaces.xml")).unwrap();
    let xml = xml.replace("<mac address='52:54:00:6B:3C:58'/>", "");
    let parse = |xml: &str| DomainConfig::parse(xml).unwrap();
    let mac = |config: &DomainConfig| {
        let interfaces = config.machine.devices.pci.interfaces();
        interfaces.last().unwrap().1.mac
    };
    let config = parse(&xml);
    assert_ne!(mac(&config), mac(&parse(&xml)));
    assert_eq!(mac(&parse(&config.to_xml(XmlView::Inactive))), mac(&config));
    let mut other = config.clone();
    let interfaces = other.machine.devices.pci.interfaces_mut();
    interfaces.for_each(Interface::renew);
    assert_ne!(mac(&other), mac(&config));
    // One that is there already is the owner's; those that are made are made anew.
    let text = other.to_xml(XmlView::Inactive);
    assert!(
        text.contains("dev='guest-tap'") && !text.contains("dev='web-0'"),
        "{text}"
    );
}

#[test]
fn bad_documents_are_refused_with_their_line() {
    let documents = documents("bad");
    assert!(documents.len() >= 40);
    for path in documents {
        let xml = fs::read(&path).unwrap();
        let error = DomainConfig::parse_bytes(&xml).expect_err(path.to_str().unwrap());
        let text = error.to_string();
        assert!(
            text.starts_with(&format!("line {}: ", error.line())),
            "{text}"
        );
        if let Some(element) = error.element() {
            assert!(text.contains(&format!(": <{element}>: ")), "{text}");
        }
        expect_file(&path.with_extension("err"), &format!("{error}\n"));
    }
}

#[test]
fn reference_says_what_the_table_does() {
    const BEGIN: &str = "<!-- The tables below are checked against the program. -->\n\n";
    let path = root().join("docs/domain-xml.md");
    let doc = fs::read_to_string(&path).unwrap();
    let (prose, _) = doc.split_once(BEGIN).expect("the marker");
    let doc = format!("{prose}{BEGIN}{}", reference());
    expect_file(&path, &doc);
    for rule in rules() {
        let word = rule.disposition.to_string();
        let row = format!("| `{}` | {word} |", rule.path);
        assert_eq!(doc.matches(&row).count(), 1, "{row}");
    }
}

/// Marsaglia's xorshift64*: the same documents on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() >> 33).expect("31 bits") % limit.max(1)
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }
}

/// Spans of the document between `open` and the next `close`, exclusive.
fn spans(xml: &[u8], open: u8, close: u8) -> Vec<(usize, usize)> {
    let mut spans = Vec::new();
    let mut at = 0;
    while let Some(start) = xml[at..].iter().position(|&byte| byte == open) {
        let start = at + start + 1;
        let Some(length) = xml[start..].iter().position(|&byte| byte == close) else {
            break;
        };
        spans.push((start, start + length));
        at = start + length + 1;
    }
    spans
}

const NASTY: [&str; 28] = [
    "",
    "0",
    "-1",
    "1",
    "yes",
    "no",
    "18446744073709551615",
    "18446744073709551616",
    "99999999999999999999999999999999999999",
    "0x10",
    " 2 ",
    "1e9",
    "\u{0}",
    "&#0;",
    "&#13;",
    "&lt;&amp;&gt;",
    "&lol;",
    "]]>",
    "<!-- -- -->",
    "<![CDATA[x]]>",
    "<!DOCTYPE d [<!ENTITY a 'b'>]>",
    "<?xml version='1.0'?>",
    "../../etc/passwd",
    "/a'b\"c",
    "\u{feff}",
    "\u{202e}",
    "EiB",
    "builtin:x",
];

fn mangle(random: &mut Random, xml: &mut Vec<u8>) {
    match random.below(13) {
        0 => {
            let at = random.below(xml.len());
            xml[at] ^= 1 << random.below(8);
        }
        1 => {
            let start = random.below(xml.len());
            let end = (start + random.below(60)).min(xml.len());
            xml.drain(start..end);
        }
        2 => {
            let start = random.below(xml.len());
            let end = (start + random.below(200)).min(xml.len());
            let copy = xml[start..end].to_vec();
            let at = random.below(xml.len());
            xml.splice(at..at, copy);
        }
        3 => {
            // Two tags change places.
            let tags = spans(xml, b'<', b'>');
            if tags.len() > 1 {
                let a = *random.pick(&tags);
                let b = *random.pick(&tags);
                let (first, second) = if a.0 <= b.0 { (a, b) } else { (b, a) };
                let (one, two) = (
                    xml[first.0..first.1].to_vec(),
                    xml[second.0..second.1].to_vec(),
                );
                xml.splice(second.0..second.1, one);
                xml.splice(first.0..first.1, two);
            }
        }
        4 | 5 => {
            let values = spans(xml, b'\'', b'\'');
            if !values.is_empty() {
                let (start, end) = *random.pick(&values);
                xml.splice(start..end, random.pick(&NASTY).bytes());
            }
        }
        6 | 7 => {
            let texts = spans(xml, b'>', b'<');
            if !texts.is_empty() {
                let (start, end) = *random.pick(&texts);
                xml.splice(start..end, random.pick(&NASTY).bytes());
            }
        }
        8 => {
            // Deep or wide nesting, closed or not.
            let depth = 1 << random.below(12);
            let name = *random.pick(&["a", "devices", "os", "metadata", "x:y"]);
            let mut nest = format!("<{name}>").repeat(depth);
            if random.below(2) == 0 {
                nest.push_str(&format!("</{name}>").repeat(depth));
            }
            let tags = spans(xml, b'<', b'>');
            let at = random.pick(&tags).1 + 1;
            xml.splice(at..at, nest.into_bytes());
        }
        9 => {
            // A line less: where it holds a whole element, often still a domain.
            let mut lines: Vec<&[u8]> = xml.split(|&byte| byte == b'\n').collect();
            lines.remove(random.below(lines.len()));
            *xml = lines.join(&b'\n');
        }
        10 | 11 => {
            // One value in place of another: well-formed, and often plausible.
            let (open, close) = *random.pick(&[(b'\'', b'\''), (b'>', b'<')]);
            let values = spans(xml, open, close);
            if !values.is_empty() {
                let (from, to) = *random.pick(&values);
                let copy = xml[from..to].to_vec();
                let (start, end) = *random.pick(&values);
                xml.splice(start..end, copy);
            }
        }
        _ => {
            // An element of one document inside another place of it.
            let lines: Vec<Vec<u8>> = xml
                .split(|&byte| byte == b'\n')
                .map(<[u8]>::to_vec)
                .collect();
            let mut lines = lines;
            let line = random.pick(&lines).clone();
            let at = random.below(lines.len());
            lines.insert(at, line);
            *xml = lines.join(&b'\n');
        }
    }
    if xml.is_empty() {
        xml.push(b'<');
    }
}

#[test]
fn mangled_documents_are_read_or_refused_with_a_line() {
    let seeds: Vec<Vec<u8>> = documents("good")
        .iter()
        .map(|path| fs::read(path).unwrap())
        .collect();
    let long = std::env::var_os("LIVEPOINT_LONG").is_some();
    let count = if long { 100_000 } else { 1_000 };
    let mut random = Random(0x6c69_7665_706f_696e);
    let mut refused = 0;
    for index in 0..count {
        let mut xml = random.pick(&seeds).clone();
        for _ in 0..=random.below(2) {
            mangle(&mut random, &mut xml);
        }
        let lines = xml.iter().filter(|&&byte| byte == b'\n').count() + 1;
        let start = Instant::now();
        let result = DomainConfig::parse_bytes(&xml);
        let elapsed = start.elapsed();
        assert!(
            elapsed < Duration::from_secs(20),
            "document {index}: {elapsed:?}"
        );
        match result {
            Ok(config) => {
                let text = config.to_xml(XmlView::Inactive);
                let again = DomainConfig::parse(&text);
                assert_eq!(again.as_ref(), Ok(&config), "document {index}:\n{text}");
            }
            Err(error) => {
                refused += 1;
                let line = usize::try_from(error.line()).unwrap();
                assert!((1..=lines).contains(&line), "document {index}: {error}");
                assert!(error.to_string().len() < 1000, "document {index}: {error}");
            }
        }
    }
    println!("{refused} of {count} refused");
    // Both outcomes have to occur, or the mangling tests nothing.
    assert!(refused >= count * 3 / 10, "{refused} of {count} refused");
    assert!(refused <= count * 9 / 10, "{refused} of {count} refused");
}

#[test]
fn documents_at_the_size_limit_are_read_in_bounded_time() {
    let head = "<domain type='kvm'><name>n</name><metadata>";
    let fillers = [
        "<!-- c -->",
        "<?p i?>",
        "&amp;",
        "<![CDATA[x]]>",
        "text ",
        "<a/>",
        "\n",
        "<",
        "<a b='",
        "<!--",
        "<a xmlns:b='c'>",
    ];
    for filler in fillers {
        let repeat = (DOCUMENT_BYTES_MAX - head.len()) / filler.len();
        let xml = format!("{head}{}", filler.repeat(repeat));
        assert!(xml.len() <= DOCUMENT_BYTES_MAX);
        let start = Instant::now();
        DomainConfig::parse(&xml).expect_err("not closed");
        let elapsed = start.elapsed();
        assert!(elapsed < Duration::from_secs(20), "{filler:?}: {elapsed:?}");
    }
}
