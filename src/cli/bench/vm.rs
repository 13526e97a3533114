//! A guest in a virtual machine of ours or of a peer's, with the same view of both.

use std::collections::BTreeSet;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;

use super::super::console_log::ConsoleLog;
use super::super::output::to_f64;
use super::super::vm_process::VmProcess;
use super::contender::{Contender, Staging};
use super::qemu::{QemuProcess, QemuProgram};
use super::ticks::Ticks;
use crate::guests;
use crate::host::{CheckpointRequest, Codec, DomainChanges, Protocol};

/// What guest memory is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// Anonymous memory in transparent huge pages, which is the default.
    Thp,
    /// The host's pool of huge pages.
    Hugetlb,
    /// A memfd: 4 KiB pages.
    Memfd,
}

impl Backing {
    pub fn name(self) -> &'static str {
        match self {
            Self::Thp => "thp",
            Self::Hugetlb => "hugetlb",
            Self::Memfd => "4k",
        }
    }

    fn xml(self) -> &'static str {
        match self {
            Self::Thp => "",
            Self::Hugetlb => "<hugepages><page size='2' unit='MiB'/></hugepages>",
            Self::Memfd => "<source type='memfd'/>",
        }
    }
}

/// A guest to run.
#[derive(Clone, Debug)]
pub(super) struct GuestSpec {
    /// A built-in guest.
    pub kernel: &'static str,
    pub cmdline: String,
    pub memory_bytes: u64,
    pub backing: Backing,
    /// Whether all memory is allocated before the start.
    pub preallocate: bool,
}

impl GuestSpec {
    /// Returns a page writer; of memory, what it does not fill stays untouched.
    pub fn pagewriter(memory_bytes: u64, backing: Backing, cmdline: String) -> Self {
        Self {
            kernel: "pagewriter",
            cmdline,
            memory_bytes,
            backing,
            preallocate: false,
        }
    }

    /// Returns the guest's ELF file.
    pub fn elf(&self) -> anyhow::Result<&'static [u8]> {
        let guest = guests::find(self.kernel);
        Ok(guest
            .with_context(|| format!("there is no guest {}", self.kernel))?
            .elf)
    }

    fn xml(&self, name: &str) -> String {
        let allocation = if self.preallocate {
            "<allocation mode='immediate'/>"
        } else {
            ""
        };
        format!(
            "<domain type='kvm'>\n\
             <name>{name}</name>\n\
             <memory unit='b'>{}</memory>\n\
             <memoryBacking>{}{allocation}</memoryBacking>\n\
             <vcpu>1</vcpu>\n\
             <os><type arch='x86_64'>hvm</type><kernel>builtin:{}</kernel></os>\n\
             <cpu mode='host-passthrough'/>\n\
             <devices>\n\
             <serial type='stdio'><target port='0'/></serial>\n\
             <memballoon model='none'/>\n\
             </devices>\n\
             </domain>\n",
            self.memory_bytes,
            self.backing.xml(),
            self.kernel,
        )
    }
}

/// Returns the page writer's options for half of memory filled, its working set included.
pub(super) fn half_full(ws_percent: u32, pages: &str, tick_ms: u32) -> String {
    // `fill_percent` is of what the working set leaves.
    let rest = 50_u32.saturating_sub(ws_percent) * 100;
    let fill = (rest + (100 - ws_percent) / 2) / (100 - ws_percent);
    format!(
        "ws_percent={ws_percent} pattern=random write=page fill=incompressible \
         fill_percent={fill} pages={pages} tick_ms={tick_ms}"
    )
}

/// A checkpoint to take.
#[derive(Clone, Debug)]
pub(super) struct Request {
    pub image: PathBuf,
    pub max_bandwidth: Option<u64>,
    pub durable: bool,
    /// A file to write over.
    pub spare: Option<PathBuf>,
    pub max_downtime: Option<Duration>,
    pub deadline: Option<Duration>,
    /// Most bytes of staged copies, where not the contender's choice.
    pub max_staging_bytes: Option<u64>,
    /// Whether it continues the one before it in its directory.
    pub incremental: bool,
}

/// A checkpoint that was taken.
#[derive(Clone, Debug)]
pub(super) struct Outcome {
    /// What its maker says of the time in which no vCPU ran.
    pub downtime: Option<Duration>,
    pub total: Duration,
    pub image_bytes: u64,
    /// Our own statistics.
    pub statistics: Value,
    /// The host's TSC just before and just after the start, for checkpoints of ours.
    pub began: Option<RangeInclusive<u64>>,
}

impl Outcome {
    /// Returns a figure of our own statistics, by the path of its keys.
    pub fn figure(&self, pointer: &str) -> Option<f64> {
        self.statistics.pointer(pointer)?.as_f64()
    }

    /// Returns the downtime in µs.
    pub fn downtime_us(&self) -> Option<f64> {
        self.downtime.map(micros)
    }

    /// Returns the total time in µs.
    pub fn total_us(&self) -> f64 {
        micros(self.total)
    }

    /// Returns the protocol that captured memory, which `auto` leaves open.
    pub fn captured_by(&self) -> Option<&str> {
        self.statistics["protocol"].as_str()
    }
}

/// Returns whole microseconds.
pub(super) fn micros(time: Duration) -> f64 {
    to_f64(whole_micros(time))
}

fn whole_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Returns the protocols that captured memory, each once.
pub(super) fn captured_by<'a>(outcomes: impl Iterator<Item = &'a Outcome>) -> BTreeSet<String> {
    outcomes
        .filter_map(Outcome::captured_by)
        .map(str::to_owned)
        .collect()
}

/// Formats a contender's name, with the protocols that captured memory where they are others.
pub(super) fn title(contender: Contender, captured_by: &BTreeSet<String>) -> String {
    let names: Vec<&str> = captured_by.iter().map(String::as_str).collect();
    match contender.protocol() {
        Some(protocol) if !names.is_empty() && names != [protocol.name()] => {
            format!("{contender} ({})", names.join(", "))
        }
        _ => contender.to_string(),
    }
}

/// A virtual machine that runs. Dropping it ends it.
#[derive(Debug)]
pub(super) enum Vm {
    Ours(VmProcess),
    Peer(QemuProcess),
}

impl Vm {
    /// Starts a guest of ours in a process of its own.
    pub fn ours(dir: &Path, tag: &str, guest: &GuestSpec) -> anyhow::Result<Self> {
        let changes = DomainChanges {
            cmdline: Some(guest.cmdline.clone()),
            ..DomainChanges::default()
        };
        VmProcess::run(dir, tag, &guest.xml(tag), &changes).map(Self::Ours)
    }

    /// Starts the same guest in QEMU.
    pub fn peer(
        qemu: &QemuProgram,
        dir: &Path,
        tag: &str,
        guest: &GuestSpec,
    ) -> anyhow::Result<Self> {
        qemu.start(dir, tag, guest).map(Self::Peer)
    }

    pub fn console(&self) -> &ConsoleLog {
        match self {
            Self::Ours(vm) => vm.console(),
            Self::Peer(vm) => vm.console(),
        }
    }

    /// Returns the process of a machine of ours.
    pub fn pid(&self) -> Option<u32> {
        match self {
            Self::Ours(vm) => Some(vm.pid()),
            Self::Peer(_) => None,
        }
    }

    /// Waits until the guest prints a line that fits.
    pub fn wait_line(
        &mut self,
        what: &str,
        timeout: Duration,
        fits: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        match self {
            Self::Ours(vm) => vm.wait_line(what, timeout, fits),
            Self::Peer(vm) => {
                let console = ConsoleLog::new(vm.console().path().to_owned());
                console.wait_line(what, timeout, || vm.is_alive(), fits)
            }
        }
    }

    /// Returns the page writer's ticks so far.
    pub fn ticks(&self) -> anyhow::Result<Ticks> {
        Ticks::parse(&self.console().text()?)
    }

    /// Stops the guest's vCPUs for good.
    pub fn pause(&mut self) -> anyhow::Result<()> {
        match self {
            Self::Ours(vm) => vm.pause(),
            Self::Peer(_) => anyhow::bail!("only machines of ours are measured at rest"),
        }
    }

    /// Takes a checkpoint as `contender` does. The guest runs on.
    pub fn checkpoint(
        &mut self,
        contender: Contender,
        memory_bytes: u64,
        request: &Request,
    ) -> anyhow::Result<Outcome> {
        match (self, contender) {
            (Self::Ours(vm), Contender::Ours(protocol, staging)) => {
                ours(vm, wanted(protocol, staging, memory_bytes, request))
            }
            (Self::Peer(vm), Contender::Qemu(mode)) => vm.checkpoint(mode, request),
            (_, contender) => anyhow::bail!("{contender} does not save this machine"),
        }
    }

    /// Begins a checkpoint as `contender` does and cancels it `after` so long; returns how long the
    /// answer to that took, or `None` where the image was whole before. The guest runs on.
    pub fn cancel(
        &mut self,
        contender: Contender,
        memory_bytes: u64,
        request: &Request,
        after: Duration,
    ) -> anyhow::Result<Option<Duration>> {
        match (self, contender) {
            (Self::Ours(vm), Contender::Ours(protocol, staging)) => {
                vm.cancel(wanted(protocol, staging, memory_bytes, request), after)
            }
            (_, contender) => anyhow::bail!("{contender} cannot be cancelled here"),
        }
    }
}

fn wanted(
    protocol: Protocol,
    staging: Staging,
    memory_bytes: u64,
    request: &Request,
) -> CheckpointRequest {
    let mut wanted = CheckpointRequest::new(protocol);
    wanted.out = Some(request.image.clone());
    wanted.codec = Codec::None;
    wanted.max_bandwidth = request.max_bandwidth;
    wanted.max_staging_bytes = request.max_staging_bytes.or(staging.bytes(memory_bytes));
    wanted.max_downtime_us = request.max_downtime.map(whole_micros);
    wanted.deadline_ms = request.deadline.map(|most| whole_micros(most) / 1000);
    wanted.incremental = request.incremental;
    wanted.durable = request.durable;
    wanted.spare.clone_from(&request.spare);
    wanted
}

fn ours(vm: &mut VmProcess, request: CheckpointRequest) -> anyhow::Result<Outcome> {
    let protocol = request.protocol;
    let (summary, began) = vm.checkpoint_from(request)?;
    // What another protocol did says nothing of this one.
    if let Some(why) = summary.statistics["fallback"].as_str() {
        anyhow::bail!("this host cannot do {protocol}: {why}");
    }
    Ok(Outcome {
        downtime: Some(Duration::from_micros(summary.figures.downtime_us)),
        total: Duration::from_micros(summary.figures.total_us),
        image_bytes: summary.image_bytes,
        statistics: summary.statistics,
        began: Some(began),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_memory_is_filled_working_set_included() {
        assert!(half_full(10, "2m", 30).contains("fill_percent=44 "));
        assert!(half_full(50, "2m", 30).contains("fill_percent=0 "));
        assert!(half_full(60, "4k", 30).contains("fill_percent=0 pages=4k"));
    }

    #[test]
    fn what_another_protocol_captured_is_shown_so() {
        let by = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let stop = Protocol::Stop;
        let contender = Contender::Ours(stop, Staging::Ample);
        assert_eq!(title(contender, &by(&["stop"])), "stop");
        assert_eq!(title(contender, &by(&[])), "stop");
        assert_eq!(title(contender, &by(&["cow", "stop"])), "stop (cow, stop)");
        assert_eq!(title(Contender::Nothing, &by(&[])), "none");
    }

    #[test]
    fn every_backing_is_a_domain_that_is_understood() {
        for backing in [Backing::Thp, Backing::Hugetlb, Backing::Memfd] {
            let cmdline = half_full(10, "2m", 100);
            let guest = GuestSpec::pagewriter(64 << 20, backing, cmdline);
            let bytes = crate::host::Domain::memory_bytes_in(&guest.xml("bench")).unwrap();
            assert_eq!(bytes, 64 << 20);
        }
    }
}
