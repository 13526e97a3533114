//! Writes a domain as a document, in the order and style of libvirt.

use std::fmt::Display;

use super::clock::{ClockBasis, ClockOffset, TickPolicy};
use super::cpu::CpuMode;
use super::device::{SerialBackend, SerialPort};
use super::document::Element;
use super::interface::HostInterface;
use super::memory::{MemorySize, MemorySource};
use super::rules::{is_honoured, rank};
use super::values::{BuiltinName, HostPath, KernelSource};
use super::{DomainConfig, MachineConfig, format_pci};

/// What only a running machine can tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LiveInfo {
    /// Number of the machine among those that run.
    pub id: u32,
    /// Pseudo-terminal of each serial port that has one, by port.
    pub ptys: Vec<Option<HostPath>>,
    /// Pseudo-terminal of each virtio console that has one, in the order of their slots.
    pub console_ptys: Vec<Option<HostPath>>,
    /// Tap of each network interface that has one, in the order of their slots.
    pub taps: Vec<Option<HostInterface>>,
    /// Memory that the guest has given back by its balloon, in KiB.
    pub given_kib: u64,
    /// Seconds between two questions to the guest how it uses its memory; 0 for none.
    pub statistics_period_s: u32,
}

/// Which form of a document to write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum XmlView<'a> {
    /// The definition.
    Inactive,
    /// The definition with what a running machine adds to it.
    Live(&'a LiveInfo),
}

impl<'a> XmlView<'a> {
    fn live(self) -> Option<&'a LiveInfo> {
        match self {
            XmlView::Inactive => None,
            XmlView::Live(live) => Some(live),
        }
    }
}

impl Element {
    pub(super) fn with(mut self, name: &str, value: impl Display + Copy) -> Self {
        self.attributes.push((name.to_owned(), value.to_string()));
        self
    }

    fn with_text(mut self, text: impl Display + Copy) -> Self {
        self.text = text.to_string();
        self
    }

    pub(super) fn push(&mut self, child: Element) {
        self.children.push(child);
    }

    pub(super) fn push_text(&mut self, name: &str, text: impl Display + Copy) {
        self.push(Element::new(name).with_text(text));
    }

    /// Returns the element at `path` below this one, made where it is missing.
    fn descend(&mut self, path: &str) -> &mut Element {
        let mut at = self;
        for name in path.split('/').skip(1) {
            let found = at.children.iter().position(|child| child.name == name);
            let index = found.unwrap_or_else(|| {
                at.push(Element::new(name));
                at.children.len() - 1
            });
            at = at.children.get_mut(index).expect("found or pushed above");
        }
        at
    }

    fn is_bare(&self) -> bool {
        self.attributes.is_empty() && self.children.is_empty() && self.text.is_empty()
    }
}

pub(super) fn document(config: &DomainConfig, view: XmlView<'_>) -> String {
    let mut root = Element::new("domain").with("type", "kvm");
    if let Some(live) = view.live() {
        root = root.with("id", live.id);
    }
    for (prefix, namespace) in &config.namespaces {
        root = root.with(&format!("xmlns:{prefix}"), namespace);
    }
    identity(&mut root, config);
    machine(&mut root, &config.machine, view);
    let lifecycle = &config.lifecycle;
    root.push_text("on_poweroff", lifecycle.on_poweroff.name());
    root.push_text("on_reboot", lifecycle.on_reboot.name());
    root.push_text("on_crash", lifecycle.on_crash.name());
    root.push(devices(&config.machine, view));
    for (path, name, value) in &config.kept.attributes {
        let element = root.descend(path);
        element.attributes.push((name.clone(), value.clone()));
    }
    for (path, element) in &config.kept.elements {
        root.descend(path).push(element.clone());
    }
    // Sections that only held a place for what is kept in them.
    let optional = ["memoryBacking", "features"];
    root.children
        .retain(|child| !(child.is_bare() && optional.contains(&child.name.as_str())));
    sort(&mut root, "domain");
    for child in &mut root.children {
        let path = format!("domain/{}", child.name);
        if is_honoured(&path) {
            sort(child, &path);
        }
    }
    let mut xml = String::new();
    write(&mut xml, &root, 0);
    xml
}

/// Puts what an element holds into canonical order.
fn sort(element: &mut Element, path: &str) {
    element
        .children
        .sort_by_cached_key(|child| rank(path, child));
}

fn identity(root: &mut Element, config: &DomainConfig) {
    root.push_text("name", &config.name);
    root.push_text("uuid", config.uuid.hyphenated());
    if let Some(title) = &config.title {
        root.push_text("title", title.as_str());
    }
    if let Some(description) = &config.description {
        root.push_text("description", description.as_str());
    }
    if let Some(metadata) = &config.metadata {
        root.push(Element {
            raw: Some(metadata.as_xml().to_owned()),
            ..Element::new("metadata")
        });
    }
}

fn machine(root: &mut Element, machine: &MachineConfig, view: XmlView<'_>) {
    let kib = machine.memory.size().kib();
    let balloon = machine.devices.pci.balloon();
    let current = balloon.and_then(|balloon| balloon.current);
    let current = match (view.live(), balloon) {
        (Some(live), Some(_)) => kib.saturating_sub(live.given_kib),
        _ => current.map_or(kib, MemorySize::kib),
    };
    for (name, kib) in [("memory", kib), ("currentMemory", current)] {
        root.push(Element::new(name).with("unit", "KiB").with_text(kib));
    }
    root.push(memory_backing(machine));
    root.push_text("vcpu", machine.vcpus.count());
    root.push(boot(machine));
    root.push(features(machine));
    root.push(cpu(machine));
    root.push(clock(machine));
}

fn memory_backing(machine: &MachineConfig) -> Element {
    let memory = &machine.memory;
    let mut backing = Element::new("memoryBacking");
    if let Some(page) = memory.huge_pages() {
        let page = Element::new("page")
            .with("size", page.bytes() / 1024)
            .with("unit", "KiB");
        backing.descend("memoryBacking/hugepages").push(page);
    }
    if memory.locked {
        backing.push(Element::new("locked"));
    }
    if memory.source != MemorySource::Anonymous {
        backing.push(Element::new("source").with("type", "memfd"));
    }
    if memory.source == MemorySource::MemfdShared {
        backing.push(Element::new("access").with("mode", "shared"));
    }
    if let Some(preallocate) = memory.preallocate {
        let mode = if preallocate { "immediate" } else { "ondemand" };
        backing.push(Element::new("allocation").with("mode", mode));
    }
    backing
}

fn boot(machine: &MachineConfig) -> Element {
    let mut os = Element::new("os");
    let kind = Element::new("type").with("arch", "x86_64");
    os.push(kind.with_text("hvm"));
    match &machine.boot.source {
        KernelSource::Path { kernel, initrd } => {
            os.push_text("kernel", kernel);
            if let Some(initrd) = initrd {
                os.push_text("initrd", initrd);
            }
        }
        KernelSource::Builtin(name) => {
            let source = format!("{}{}", BuiltinName::PREFIX, name.as_str());
            os.push_text("kernel", &source);
        }
    }
    if !machine.boot.cmdline.is_empty() {
        os.push_text("cmdline", machine.boot.cmdline.as_str());
    }
    os
}

fn features(machine: &MachineConfig) -> Element {
    let mut features = Element::new("features");
    let switches = [
        ("pmu", machine.cpu.pmu),
        ("pvspinlock", machine.cpu.paravirtual_spinlocks),
    ];
    for (name, state) in switches {
        if let Some(on) = state {
            let state = if on { "on" } else { "off" };
            features.push(Element::new(name).with("state", state));
        }
    }
    features
}

fn cpu(machine: &MachineConfig) -> Element {
    let mut cpu = Element::new("cpu");
    match machine.cpu.mode {
        CpuMode::HostPassthrough => cpu = cpu.with("mode", "host-passthrough"),
        CpuMode::HostModel => cpu = cpu.with("mode", "host-model"),
        CpuMode::Custom(model) => {
            cpu = cpu.with("mode", "custom");
            cpu.push_text("model", model.name());
        }
    }
    if let Some(topology) = machine.vcpus.topology() {
        let topology = Element::new("topology")
            .with("sockets", topology.sockets())
            .with("dies", topology.dies())
            .with("cores", topology.cores())
            .with("threads", topology.threads());
        cpu.push(topology);
    }
    for (feature, policy) in &machine.cpu.features {
        let feature = Element::new("feature")
            .with("policy", policy.name())
            .with("name", feature.name());
        cpu.push(feature);
    }
    cpu
}

fn clock(machine: &MachineConfig) -> Element {
    let clock = Element::new("clock");
    let mut clock = match &machine.clock.offset {
        ClockOffset::Utc => clock.with("offset", "utc"),
        ClockOffset::LocalTime => clock.with("offset", "localtime"),
        ClockOffset::TimeZone(zone) => clock
            .with("offset", "timezone")
            .with("timezone", zone.as_str()),
        ClockOffset::Variable {
            adjustment_seconds,
            basis,
        } => {
            let basis = match basis {
                ClockBasis::Utc => "utc",
                ClockBasis::LocalTime => "localtime",
            };
            clock
                .with("offset", "variable")
                .with("adjustment", adjustment_seconds)
                .with("basis", basis)
        }
    };
    let present = if machine.clock.kvmclock { "yes" } else { "no" };
    let timer = Element::new("timer");
    clock.push(
        timer
            .clone()
            .with("name", "kvmclock")
            .with("present", present),
    );
    let policy = match machine.clock.pit {
        TickPolicy::Delay => "delay",
        TickPolicy::Discard => "discard",
    };
    clock.push(timer.with("name", "pit").with("tickpolicy", policy));
    clock
}

fn devices(machine: &MachineConfig, view: XmlView<'_>) -> Element {
    let mut devices = Element::new("devices");
    let on_pci = &machine.devices.pci;
    format_pci::devices(&mut devices, on_pci, view.live());
    let pty = |index: usize| view.live()?.ptys.get(index)?.as_ref();
    for (index, port) in machine.devices.serial.iter() {
        let serial = character_device("serial", &port.backend, pty(index));
        devices.push(serial_target(serial, index, port, view));
    }
    // libvirt shows serial port 0 a second time, as the console.
    if let Some(port) = machine.devices.serial.get(0) {
        let mut console = character_device("console", &port.backend, pty(0));
        if let (SerialBackend::Pty, Some(pty)) = (&port.backend, pty(0)) {
            console = console.with("tty", pty);
        }
        let target = Element::new("target")
            .with("type", "serial")
            .with("port", 0);
        console.push(target);
        if view.live().is_some() {
            console.push(alias(0, port));
        }
        devices.push(console);
    }
    let first = usize::from(machine.devices.serial.get(0).is_some());
    format_pci::consoles(&mut devices, on_pci, view.live(), first);
    if machine.devices.pci.balloon().is_none() {
        devices.push(Element::new("memballoon").with("model", "none"));
    }
    devices
}

/// Returns the element with its source, which all forms of ports and consoles have.
pub(super) fn character_device(
    name: &str,
    backend: &SerialBackend,
    pty: Option<&HostPath>,
) -> Element {
    let mut device = Element::new(name).with("type", backend.type_name());
    let source = Element::new("source");
    match backend {
        SerialBackend::Pty => {
            if let Some(path) = pty {
                device.push(source.with("path", path));
            }
        }
        SerialBackend::Null | SerialBackend::Stdio => {}
        SerialBackend::File { path, append } => {
            let mut source = source.with("path", path);
            if let Some(append) = append {
                source = source.with("append", if *append { "on" } else { "off" });
            }
            device.push(source);
        }
        SerialBackend::Unix { path, listen } => {
            let mode = if *listen { "bind" } else { "connect" };
            device.push(source.with("mode", mode).with("path", path));
        }
    }
    device
}

fn serial_target(
    mut serial: Element,
    index: usize,
    port: &SerialPort,
    view: XmlView<'_>,
) -> Element {
    let mut target = Element::new("target")
        .with("type", "isa-serial")
        .with("port", index);
    target.push(Element::new("model").with("name", "isa-serial"));
    serial.push(target);
    if view.live().is_some() || port.alias.is_some() {
        serial.push(alias(index, port));
    }
    serial
}

fn alias(index: usize, port: &SerialPort) -> Element {
    let name = match &port.alias {
        Some(alias) => alias.as_str().to_owned(),
        None => format!("serial{index}"),
    };
    Element::new("alias").with("name", &name)
}

/// Writes an element and what it holds; recursion is bounded by the depth of
/// what was read.
fn write(out: &mut String, element: &Element, depth: usize) {
    indent(out, depth);
    if let Some(raw) = &element.raw {
        out.push_str(raw);
        out.push('\n');
        return;
    }
    out.push('<');
    out.push_str(&element.name);
    for (name, value) in &element.attributes {
        out.push(' ');
        out.push_str(name);
        out.push_str("='");
        escape(out, value, Where::Attribute);
        out.push('\'');
    }
    if element.text.is_empty() && element.children.is_empty() {
        out.push_str("/>\n");
        return;
    }
    out.push('>');
    escape(out, &element.text, Where::Text);
    if !element.children.is_empty() {
        out.push('\n');
        for child in &element.children {
            write(out, child, depth + 1);
        }
        indent(out, depth);
    }
    out.push_str("</");
    out.push_str(&element.name);
    out.push_str(">\n");
}

fn indent(out: &mut String, depth: usize) {
    for _ in 0..depth {
        out.push_str("  ");
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Where {
    Text,
    Attribute,
}

/// Writes text so that a reader, which turns line ends into newlines and white
/// space of attributes into blanks, gets the same text back.
fn escape(out: &mut String, text: &str, place: Where) {
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\r' => out.push_str("&#13;"),
            '\'' if place == Where::Attribute => out.push_str("&apos;"),
            '\n' if place == Where::Attribute => out.push_str("&#10;"),
            '\t' if place == Where::Attribute => out.push_str("&#9;"),
            _ => out.push(c),
        }
    }
}
