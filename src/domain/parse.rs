//! Interprets a tree that the table of `rules` has let through.

use uuid::Uuid;

use super::clock::{ClockBasis, ClockConfig, ClockOffset, TickPolicy, TimeZoneName};
use super::cpu::{CpuConfig, CpuMode, CpuModel, CpuTopology, FeaturePolicy, Vcpus};
use super::cpu_features::CpuFeature;
use super::document::{Element, is_space};
use super::error::{DomainError, Note, Place, ValueError};
use super::memory::{
    HugePageSize, MEMORY_BYTES_MULTIPLE, MemoryConfig, MemorySize, MemorySource, unit_bytes,
};
use super::parse_devices::devices;
use super::periodic::PeriodicError;
use super::rules::Survey;
use super::values::{
    BootConfig, BuiltinName, Description, DomainName, HostPath, KernelCmdline, KernelSource,
    Lifecycle, LifecycleAction, Title,
};
use super::{DomainConfig, MachineConfig, Metadata};

/// What an error calls the text of an element.
pub(super) const TEXT: &str = "value";

impl Element {
    /// The error of a value that its type refused.
    pub(super) fn refuse(&self, what: &'static str, error: ValueError) -> DomainError {
        DomainError::Invalid {
            place: self.place(),
            what,
            value: error.value,
            expected: error.expected,
        }
    }

    pub(super) fn invalid(
        &self,
        what: &'static str,
        value: &str,
        expected: &'static str,
    ) -> DomainError {
        self.refuse(what, ValueError::new(value, expected))
    }

    pub(super) fn conflict(&self, reason: String) -> DomainError {
        DomainError::Conflict {
            place: self.place(),
            reason,
        }
    }

    fn missing(&self, what: &'static str, hint: &'static str) -> DomainError {
        DomainError::Missing {
            place: self.place(),
            what,
            hint,
        }
    }

    /// Makes a value of the element's text.
    fn text_as<T>(&self, make: impl Fn(&str) -> Result<T, ValueError>) -> Result<T, DomainError> {
        make(&self.text).map_err(|error| self.refuse(TEXT, error))
    }

    /// Returns an attribute that has been found present by the table.
    fn required(&self, what: &'static str) -> Result<&str, DomainError> {
        self.attribute(what).ok_or_else(|| self.missing(what, ""))
    }

    fn attribute_number(&self, what: &'static str) -> Result<u64, DomainError> {
        number(self, what, self.required(what)?)
    }
}

/// Reads a number of libvirt: decimal digits, white space around them.
pub(super) fn number(
    element: &Element,
    what: &'static str,
    text: &str,
) -> Result<u64, DomainError> {
    let digits = text.trim_matches(is_space);
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(element.invalid(what, text, "a number"));
    }
    let too_large = |_| element.invalid(what, text, "a number below 2^64");
    digits.parse().map_err(too_large)
}

/// Reads a number with a unit, in bytes. `unit` is the default.
fn scaled(
    element: &Element,
    what: &'static str,
    text: &str,
    default_unit: &str,
) -> Result<u64, DomainError> {
    let count = number(element, what, text)?;
    let unit = element.attribute("unit").unwrap_or(default_unit);
    let Some(unit_bytes) = unit_bytes(unit) else {
        return Err(element.invalid("unit", unit, "a unit such as KiB, MiB or GiB"));
    };
    let bytes = count.checked_mul(unit_bytes);
    bytes.ok_or_else(|| element.invalid(what, text, "a size below 2^64 bytes"))
}

/// Reads a whole document.
pub(super) fn domain(
    root: &Element,
    mut survey: Survey,
) -> Result<(DomainConfig, Vec<Note>), DomainError> {
    let Some(name) = root.child("name") else {
        return Err(root.missing("<name>", ""));
    };
    let name = name.text_as(DomainName::new)?;
    let uuid = root.child("uuid").map(uuid).transpose()?;
    let machine = machine(root, &mut survey)?;
    let text = |child: &str| root.child(child).filter(|element| !element.text.is_empty());
    let title = text("title").map(|element| element.text_as(Title::new));
    let description = text("description").map(|element| element.text_as(Description::new));
    let metadata = root
        .child("metadata")
        .and_then(|element| element.raw.clone());
    let config = DomainConfig {
        uuid: uuid.unwrap_or_else(Uuid::new_v4),
        title: title.transpose()?,
        description: description.transpose()?,
        metadata: metadata.map(Metadata::checked),
        lifecycle: lifecycle(root)?,
        namespaces: survey.namespaces,
        kept: survey.kept,
        ..DomainConfig::new(name, machine)
    };
    config
        .find_periodic()
        .map_err(|found| refuse_periodic(root, found))?;
    Ok((config, survey.notes))
}

/// The error of what our own element in `<metadata>` asks for.
fn refuse_periodic(root: &Element, found: PeriodicError) -> DomainError {
    let line = root.child("metadata").map_or(root.line, |it| it.line);
    DomainError::Invalid {
        place: Place {
            line: line.saturating_add(found.lines),
            column: 1,
            element: "checkpoint".to_owned(),
        },
        what: found.attribute,
        value: found.error.value,
        expected: found.error.expected,
    }
}

fn uuid(element: &Element) -> Result<Uuid, DomainError> {
    let text = element.text.trim_matches(is_space);
    // Uuid::parse_str also takes braces and URNs, which libvirt does not.
    let plain = text
        .bytes()
        .all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    match Uuid::parse_str(text) {
        Ok(uuid) if plain && !uuid.is_nil() => Ok(uuid),
        _ => Err(element.invalid(TEXT, text, "a UUID")),
    }
}

fn lifecycle(root: &Element) -> Result<Lifecycle, DomainError> {
    let action = |name: &str, default: LifecycleAction| match root.child(name) {
        None => Ok(default),
        Some(element) => LifecycleAction::from_name(&element.text)
            .ok_or_else(|| element.invalid(TEXT, &element.text, "a lifecycle action")),
    };
    let default = Lifecycle::default();
    Ok(Lifecycle {
        on_poweroff: action("on_poweroff", default.on_poweroff)?,
        on_reboot: action("on_reboot", default.on_reboot)?,
        on_crash: action("on_crash", default.on_crash)?,
    })
}

fn machine(root: &Element, survey: &mut Survey) -> Result<MachineConfig, DomainError> {
    let memory = memory(root, survey)?;
    let cpu = cpu(root, survey)?;
    let mut devices = devices(root)?;
    if let (Some(element), Some(bytes)) = (root.child("currentMemory"), current_memory(root)?) {
        // Whole pages; less than there are.
        let bytes = bytes - bytes % MEMORY_BYTES_MULTIPLE;
        match devices.pci.balloon_mut() {
            Some(balloon) if bytes < memory.size().bytes() => {
                let size = MemorySize::from_bytes(bytes);
                balloon.current = Some(size.map_err(|error| element.refuse(TEXT, error))?);
            }
            None if bytes < memory.size().bytes() => survey.tell(
                element,
                "there is no balloon: the guest has all of <memory>",
            ),
            _ => {}
        }
    }
    Ok(MachineConfig {
        memory,
        vcpus: vcpus(root)?,
        cpu,
        boot: boot(root)?,
        clock: root
            .child("clock")
            .map_or(Ok(ClockConfig::default()), clock)?,
        devices,
    })
}

/// Reads how much memory the guest is to use at its start, in bytes.
fn current_memory(root: &Element) -> Result<Option<u64>, DomainError> {
    let Some(current) = root.child("currentMemory") else {
        return Ok(None);
    };
    let bytes = scaled(current, TEXT, &current.text, "KiB")?;
    Ok(Some(bytes.checked_next_multiple_of(1024).unwrap_or(bytes)))
}

fn memory(root: &Element, survey: &mut Survey) -> Result<MemoryConfig, DomainError> {
    let Some(memory) = root.child("memory") else {
        return Err(root.missing("<memory>", ""));
    };
    let size = memory_size(memory)?;
    if let (Some(current), Some(bytes)) = (root.child("currentMemory"), current_memory(root)?)
        && bytes > size.bytes()
    {
        let kib = (bytes / 1024, size.kib());
        let reason = format!("{} KiB are more than the {} KiB of <memory>", kib.0, kib.1);
        return Err(current.conflict(reason));
    }
    let mut config = MemoryConfig::new(size);
    let Some(backing) = root.child("memoryBacking") else {
        return Ok(config);
    };
    if let Some(hugepages) = backing.child("hugepages") {
        let page = hugepages
            .child("page")
            .map_or(Ok(HugePageSize::default()), page_size)?;
        config = config
            .with_huge_pages(page)
            .map_err(|error| hugepages.refuse("the memory size", error))?;
    }
    config.locked = backing.child("locked").is_some();
    config.source = memory_source(backing, survey)?;
    if let Some(allocation) = backing.child("allocation") {
        config.preallocate = allocation.attribute("mode").map(|mode| mode == "immediate");
    }
    Ok(config)
}

fn memory_size(element: &Element) -> Result<MemorySize, DomainError> {
    let bytes = scaled(element, TEXT, &element.text, "KiB")?;
    // libvirt counts memory in KiB and rounds up to them.
    let rounded = bytes.checked_next_multiple_of(1024);
    let size = MemorySize::from_bytes(rounded.unwrap_or(u64::MAX));
    size.map_err(|error| element.refuse("size", error))
}

fn page_size(element: &Element) -> Result<HugePageSize, DomainError> {
    let text = element.required("size")?;
    match scaled(element, "size", text, "KiB")? {
        0x20_0000 => Ok(HugePageSize::Mib2),
        0x4000_0000 => Ok(HugePageSize::Gib1),
        _ => Err(element.invalid("size", text, "2 MiB or 1 GiB")),
    }
}

fn memory_source(backing: &Element, survey: &mut Survey) -> Result<MemorySource, DomainError> {
    let source = backing
        .child("source")
        .and_then(|source| source.attribute("type"));
    let memfd = source == Some("memfd");
    let Some(access) = backing.child("access") else {
        return Ok(if memfd {
            MemorySource::MemfdPrivate
        } else {
            MemorySource::Anonymous
        });
    };
    match (access.attribute("mode") == Some("shared"), memfd) {
        (false, false) => Ok(MemorySource::Anonymous),
        (false, true) => Ok(MemorySource::MemfdPrivate),
        (true, true) => {
            survey.tell(
                access,
                "shared memory is checkpointed only while no other process writes to it",
            );
            Ok(MemorySource::MemfdShared)
        }
        (true, false) => {
            let reason = "mode='shared' needs <source type='memfd'/>".to_owned();
            Err(access.conflict(reason))
        }
    }
}

fn vcpus(root: &Element) -> Result<Vcpus, DomainError> {
    let vcpu = root.child("vcpu");
    let mut vcpus = Vcpus::ONE;
    if let Some(vcpu) = vcpu {
        let count = number(vcpu, TEXT, &vcpu.text)?;
        vcpus = Vcpus::new(u8::try_from(count).unwrap_or(u8::MAX))
            .map_err(|error| vcpu.invalid(TEXT, &vcpu.text, error.expected))?;
        if vcpu.attribute("current").is_some() && vcpu.attribute_number("current")? != count {
            let reason = format!("there is no vCPU hotplug: current has to be {count}");
            return Err(vcpu.conflict(reason));
        }
    }
    let Some(topology) = root.child("cpu").and_then(|cpu| cpu.child("topology")) else {
        return Ok(vcpus);
    };
    let count_of = |what: &'static str| {
        let text = topology.attribute(what).unwrap_or("1");
        let count = u8::try_from(number(topology, what, text)?);
        count.map_err(|_| topology.invalid(what, text, "a number from 1 to 16"))
    };
    let parsed = CpuTopology::new(
        count_of("sockets")?,
        count_of("dies")?,
        count_of("cores")?,
        count_of("threads")?,
    );
    let parsed = parsed.map_err(|error| topology.refuse("product", error))?;
    let with_topology = Vcpus::with_topology(parsed);
    if with_topology.count() != vcpus.count() {
        return Err(topology.conflict(format!(
            "the product is {}, but the number of vCPUs is {}",
            with_topology.count(),
            vcpus.count()
        )));
    }
    Ok(with_topology)
}

fn cpu(root: &Element, survey: &mut Survey) -> Result<CpuConfig, DomainError> {
    let mut config = CpuConfig::default();
    if let Some(features) = root.child("features") {
        let switch = |name: &str| {
            let element = features.child(name)?;
            Some(element.attribute("state") != Some("off"))
        };
        config.pmu = switch("pmu");
        config.paravirtual_spinlocks = switch("pvspinlock");
    }
    let Some(cpu) = root.child("cpu") else {
        return Ok(config);
    };
    config.mode = cpu_mode(cpu, survey)?;
    for element in cpu.children_named("feature") {
        let name = element.required("name")?;
        let Some(feature) = CpuFeature::from_name(name) else {
            return Err(element.invalid("name", name, "a CPU feature that is known here"));
        };
        let policy = match element.attribute("policy") {
            None => FeaturePolicy::default(),
            Some(policy) => FeaturePolicy::from_name(policy).ok_or_else(|| {
                let expected = "force, require, optional, disable or forbid";
                element.invalid("policy", policy, expected)
            })?,
        };
        if config.features.insert(feature, policy).is_some() {
            return Err(element.conflict(format!("feature {name} is given twice")));
        }
    }
    Ok(config)
}

fn cpu_mode(cpu: &Element, survey: &mut Survey) -> Result<CpuMode, DomainError> {
    let model = cpu.child("model").filter(|model| !model.text.is_empty());
    match (cpu.attribute("mode"), model) {
        // libvirt, too, takes a model without a mode as custom.
        (Some("custom") | None, Some(model)) => {
            let found = CpuModel::from_name(model.text.trim_matches(is_space));
            found.map(CpuMode::Custom).ok_or_else(|| {
                let expected = "x86-64-v1 to x86-64-v4; or use mode='host-passthrough'";
                model.invalid(TEXT, &model.text, expected)
            })
        }
        (Some("custom"), None) => Err(cpu.missing("<model>", ": mode='custom' needs one")),
        (Some(mode), Some(model)) => {
            Err(model.conflict(format!("mode='{mode}' has no named model")))
        }
        (Some("host-model"), None) => {
            survey.tell(cpu, "host-model is treated as host-passthrough");
            Ok(CpuMode::HostModel)
        }
        (_, None) => Ok(CpuMode::HostPassthrough),
    }
}

fn boot(root: &Element) -> Result<BootConfig, DomainError> {
    const DIRECT: &str = ": only direct kernel boot is supported; give the path of a kernel, \
        and of an <initrd> where it needs one";
    let Some(os) = root.child("os") else {
        return Err(root.missing("<os> with a <kernel>", DIRECT));
    };
    if os.child("type").is_none() {
        return Err(os.missing("<type>", ": write <type>hvm</type>"));
    }
    let Some(kernel) = os.child("kernel").filter(|kernel| !kernel.text.is_empty()) else {
        return Err(os.missing("<kernel>", DIRECT));
    };
    let initrd = os.child("initrd").filter(|initrd| !initrd.text.is_empty());
    let source = match kernel.text.strip_prefix(BuiltinName::PREFIX) {
        Some(name) => {
            let name = BuiltinName::new(name).map_err(|error| kernel.refuse(TEXT, error))?;
            if let Some(initrd) = initrd {
                return Err(initrd.conflict("a built-in guest takes no initrd".to_owned()));
            }
            KernelSource::Builtin(name)
        }
        None => KernelSource::Path {
            kernel: kernel.text_as(HostPath::new)?,
            initrd: initrd
                .map(|initrd| initrd.text_as(HostPath::new))
                .transpose()?,
        },
    };
    let cmdline = os
        .child("cmdline")
        .map(|cmdline| cmdline.text_as(KernelCmdline::new));
    Ok(BootConfig {
        source,
        cmdline: cmdline.transpose()?.unwrap_or_default(),
    })
}

fn clock(clock: &Element) -> Result<ClockConfig, DomainError> {
    let offset = clock.required("offset")?;
    for (what, owner) in [
        ("timezone", "timezone"),
        ("adjustment", "variable"),
        ("basis", "variable"),
    ] {
        if offset != owner && clock.attribute(what).is_some() {
            let reason = format!("attribute {what} belongs to offset='{owner}'");
            return Err(clock.conflict(reason));
        }
    }
    let offset = match offset {
        "localtime" => ClockOffset::LocalTime,
        "timezone" => {
            let zone = TimeZoneName::new(clock.required("timezone")?);
            ClockOffset::TimeZone(zone.map_err(|error| clock.refuse("timezone", error))?)
        }
        "variable" => ClockOffset::Variable {
            adjustment_seconds: adjustment(clock)?,
            basis: match clock.attribute("basis") {
                Some("localtime") => ClockBasis::LocalTime,
                _ => ClockBasis::Utc,
            },
        },
        _ => ClockOffset::Utc,
    };
    let mut config = ClockConfig {
        offset,
        ..ClockConfig::default()
    };
    for timer in clock.children_named("timer") {
        match timer.attribute("name") {
            Some("kvmclock") => config.kvmclock = timer.attribute("present") != Some("no"),
            Some("pit") if timer.attribute("tickpolicy") == Some("discard") => {
                config.pit = TickPolicy::Discard;
            }
            _ => {}
        }
    }
    Ok(config)
}

fn adjustment(clock: &Element) -> Result<i64, DomainError> {
    let text = clock.attribute("adjustment").unwrap_or("0");
    let parsed = text.trim_matches(is_space).parse();
    parsed.map_err(|_| clock.invalid("adjustment", text, "a number of seconds"))
}
