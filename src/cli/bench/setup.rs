//! What all suites share: directories, options, and the order in which contenders take turns.

use std::cell::Cell;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail};
use serde::Serialize;

use super::super::args::{BenchArgs, Peer, TargetName};
use super::super::output::Output;
use super::super::scratch::Scratch;
use super::contender::{Contender, Staging};
use super::qemu::{QemuMode, QemuProgram};
use super::vm::{GuestSpec, Request, Vm};
use crate::host::{Protocol, TerminationSignals};

/// What the storage is held to that stands for a slower disk.
pub(super) const HELD_BYTES_PER_S: u64 = 500_000_000;

/// How long the page writer may take to fill its memory.
const READY_TIMEOUT: Duration = Duration::from_secs(300);

/// Where images go.
#[derive(Clone, Debug)]
pub(super) struct Target {
    pub name: &'static str,
    dir: PathBuf,
    max_bandwidth: Option<u64>,
}

impl Target {
    /// Returns a request for a checkpoint into a new file there.
    pub fn request(&self) -> Request {
        Request {
            image: self.dir.join("image.lpi"),
            max_bandwidth: self.max_bandwidth,
            durable: true,
            spare: None,
            max_downtime: None,
            deadline: None,
            max_staging_bytes: None,
            incremental: false,
        }
    }

    /// Returns a path there.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
}

/// Machines are other processes: their paths start at the root.
fn absolute(dir: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(dir).with_context(|| format!("{} is no directory", dir.display()))
}

/// Removes an image, once nothing of it is on its way to the disk any more, which would slow down
/// what is measured next.
pub(super) fn discard(image: &Path) -> anyhow::Result<()> {
    let what = || format!("could not remove {}", image.display());
    File::open(image)
        .and_then(|file| file.sync_all())
        .with_context(what)?;
    fs::remove_file(image).with_context(what)
}

/// What the suites share. Dropping it removes what they have left.
#[derive(Debug)]
pub(super) struct Setup<'a> {
    pub args: &'a BenchArgs,
    out: Output,
    scratch: Scratch,
    disk: Scratch,
    shm: Scratch,
    pub qemu: Option<QemuProgram>,
    interrupted: Arc<AtomicBool>,
    machines: Cell<u32>,
}

impl<'a> Setup<'a> {
    pub fn new(out: Output, args: &'a BenchArgs) -> anyhow::Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let flag = interrupted.clone();
        // A run that is broken off removes its images and gives huge pages back.
        TerminationSignals::block()
            .and_then(|signals| signals.on_signal(move || flag.store(true, Ordering::Relaxed)))
            .context("could not take over signals")?;
        let qemu = (!args.peer.is_empty()).then(QemuProgram::find);
        Ok(Self {
            args,
            out,
            scratch: Scratch::new("livepoint-bench")?,
            disk: Scratch::inside(&absolute(&args.images)?, ".livepoint-bench")?,
            shm: Scratch::inside(&absolute(&args.shm)?, ".livepoint-bench")?,
            qemu: qemu.transpose()?,
            interrupted,
            machines: Cell::new(0),
        })
    }

    /// Says what is being done.
    pub fn say(&self, text: impl fmt::Display) {
        self.out.say(text);
    }

    /// Returns the protocols to measure: all that this build has, or those that are asked for.
    pub fn protocols(&self) -> Vec<Protocol> {
        let asked = &self.args.protocols;
        let all = Protocol::ALL.into_iter();
        all.filter(|protocol| asked.is_empty() || asked.contains(protocol))
            .collect()
    }

    /// Returns the protocol of that name, where this build has it and it is to be measured.
    pub fn protocol(&self, name: &str) -> Option<Protocol> {
        let protocols = self.protocols();
        protocols
            .into_iter()
            .find(|protocol| protocol.name() == name)
    }

    /// Returns each protocol to measure, with ample staging.
    pub fn ours(&self) -> Vec<Contender> {
        let ours = |protocol| Contender::Ours(protocol, Staging::Ample);
        self.protocols().into_iter().map(ours).collect()
    }

    /// Returns the ways of QEMU's to measure.
    pub fn qemu_modes(&self) -> impl Iterator<Item = QemuMode> {
        let asked = &self.args.peer;
        let is_asked = |mode: &QemuMode| {
            let alone = match mode {
                QemuMode::Stop => Peer::QemuStop,
                QemuMode::Live => Peer::QemuLive,
                QemuMode::LiveMapped => Peer::QemuLiveMappedRam,
                QemuMode::Background => Peer::QemuBackgroundSnapshot,
            };
            asked.contains(&Peer::Qemu) || asked.contains(&alone)
        };
        QemuMode::ALL.into_iter().filter(is_asked)
    }

    /// Returns those of the `offered` places that are to be measured.
    pub fn targets(&self, offered: &[TargetName]) -> Vec<Target> {
        let asked = &self.args.targets;
        let chosen = offered
            .iter()
            .filter(|place| asked.is_empty() || asked.contains(place));
        chosen
            .map(|place| match place {
                TargetName::Disk => self.disk(),
                TargetName::Shm => self.shm(),
                TargetName::HeldDisk => self.held_disk(),
            })
            .collect()
    }

    /// Fails once the user has asked to end.
    pub fn go_on(&self) -> anyhow::Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            bail!("asked to end");
        }
        Ok(())
    }

    /// Returns a directory for what machines leave.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Returns the place in memory.
    pub fn shm(&self) -> Target {
        Target {
            name: "shm",
            dir: self.shm.path().to_owned(),
            max_bandwidth: None,
        }
    }

    /// Returns the place on disk.
    pub fn disk(&self) -> Target {
        Target {
            name: "disk",
            dir: self.disk.path().to_owned(),
            max_bandwidth: None,
        }
    }

    /// Returns the place on disk, held to the speed of a slower one.
    fn held_disk(&self) -> Target {
        Target {
            name: "disk-500",
            max_bandwidth: Some(HELD_BYTES_PER_S),
            ..self.disk()
        }
    }

    /// Starts `guest` in a new machine of the contender's kind.
    pub fn start(&self, contender: Contender, guest: &GuestSpec) -> anyhow::Result<Vm> {
        let number = self.machines.get() + 1;
        self.machines.set(number);
        let tag = format!("bench-{number}");
        match (contender, &self.qemu) {
            (Contender::Qemu(_), Some(qemu)) => Vm::peer(qemu, self.scratch.path(), &tag, guest),
            _ => Vm::ours(self.scratch.path(), &tag, guest),
        }
    }

    /// Starts a page writer, and waits until it has filled its memory and written for a while.
    pub fn start_pagewriter(
        &self,
        contender: Contender,
        guest: &GuestSpec,
        settle: Duration,
    ) -> anyhow::Result<Vm> {
        let mut vm = self.start(contender, guest)?;
        vm.wait_line("that it is ready", READY_TIMEOUT, |line| {
            line.starts_with("pagewriter: ready") || line.starts_with("pagewriter: error")
        })?;
        std::thread::sleep(settle);
        Ok(vm)
    }
}

/// What a contender has shown so far.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row<S> {
    pub contender: Contender,
    pub samples: Vec<S>,
    /// Why it takes no more turns.
    pub error: Option<String>,
}

impl<S> Row<S> {
    pub fn new(contender: Contender) -> Self {
        Self {
            contender,
            samples: Vec::new(),
            error: None,
        }
    }

    /// Lets the contender take its turn, unless it has failed before.
    pub fn turn(
        &mut self,
        setup: &Setup,
        take: impl FnOnce(Contender) -> anyhow::Result<S>,
    ) -> anyhow::Result<()> {
        if self.error.is_some() {
            return Ok(());
        }
        match take(self.contender) {
            Ok(sample) => self.samples.push(sample),
            Err(error) => {
                // What was interrupted has not failed.
                setup.go_on()?;
                log::warn!("{}: {error:#}", self.contender);
                self.error = Some(format!("{error:#}"));
            }
        }
        setup.go_on()
    }
}

/// Fails where nobody has shown anything: then the reason is not one contender's.
pub(super) fn ensure_any<'a, S: 'a>(
    rows: impl IntoIterator<Item = &'a Row<S>>,
) -> anyhow::Result<()> {
    let mut failure = None;
    for row in rows {
        if !row.samples.is_empty() {
            return Ok(());
        }
        failure = failure.or(row.error.as_ref());
    }
    match failure {
        Some(error) => bail!("{error}"),
        None => Ok(()),
    }
}

/// Lists, below a table, who takes no more turns and why: a name and its error each.
pub(super) fn failures(rows: impl IntoIterator<Item = (String, Option<String>)>) -> String {
    let failed = rows.into_iter().filter_map(|(name, error)| {
        let error = error?;
        Some(format!("\n- {name} failed: {error}"))
    });
    let lines: String = failed.collect();
    if lines.is_empty() {
        lines
    } else {
        lines + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_failed_is_listed() {
        let rows = [("stop".to_owned(), None), ("cow".to_owned(), None)];
        assert_eq!(failures(rows.clone()), "");
        let rows = rows.map(|(name, _)| (name, Some("why".to_owned())));
        assert_eq!(failures(rows), "\n- stop failed: why\n- cow failed: why\n");
    }

    #[test]
    fn a_reason_that_all_share_is_the_run_s_own() {
        let mut rows: Vec<Row<u32>> = vec![Row::new(Contender::Nothing); 2];
        assert!(ensure_any(&rows).is_ok());
        rows[0].error = Some("no KVM".to_owned());
        assert_eq!(ensure_any(&rows).unwrap_err().to_string(), "no KVM");
        rows[1].samples.push(1);
        assert!(ensure_any(&rows).is_ok());
    }
}
