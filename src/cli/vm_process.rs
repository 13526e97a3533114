//! A virtual machine in a process of its own, as the demo and the benchmark run it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::console_log::ConsoleLog;
use super::worker::wait_for;
use crate::host::control::ControlClient;
use crate::host::control::protocol::Method;
use crate::host::{
    CheckpointRequest, CheckpointSummary, Domain, DomainChanges, ErrorCode, RewindSummary,
    RuntimeDir, host_tsc,
};

/// How long a process may take until its control socket answers.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// A `livepoint run` or `livepoint restore` and its guest's console.
///
/// Dropping it kills the process.
#[derive(Debug)]
pub(super) struct VmProcess {
    child: Child,
    client: ControlClient,
    console: ConsoleLog,
}

impl VmProcess {
    /// Runs the domain of `xml` with its changes; files go to `dir`, named after `tag`.
    pub fn run(dir: &Path, tag: &str, xml: &str, changes: &DomainChanges) -> anyhow::Result<Self> {
        let (name, xml) = Domain::changed(xml, changes)?;
        let file = dir.join(format!("{tag}.xml"));
        fs::write(&file, xml).with_context(|| format!("could not write {}", file.display()))?;
        Self::spawn(dir, tag, &name, &["run".as_ref(), file.as_os_str()])
    }

    /// Restores `image`, whose domain is called `name`, in a new process.
    pub fn restore(dir: &Path, tag: &str, name: &str, image: &Path) -> anyhow::Result<Self> {
        Self::spawn(dir, tag, name, &["restore".as_ref(), image.as_os_str()])
    }

    fn spawn(dir: &Path, tag: &str, name: &str, args: &[&OsStr]) -> anyhow::Result<Self> {
        Spawned::new(dir, tag, name, args)?.answer()
    }

    /// Returns the guest's console.
    pub fn console(&self) -> &ConsoleLog {
        &self.console
    }

    /// Waits until the guest prints a line that fits.
    pub fn wait_line(
        &mut self,
        what: &str,
        timeout: Duration,
        fits: impl Fn(&str) -> bool,
    ) -> anyhow::Result<String> {
        let child = &mut self.child;
        self.console
            .wait_line(what, timeout, || Ok(child.try_wait()?.is_none()), fits)
    }

    /// Returns the process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Takes a checkpoint and waits for its end; the guest runs meanwhile.
    pub fn checkpoint(&mut self, request: CheckpointRequest) -> anyhow::Result<CheckpointSummary> {
        let (summary, _) = self.checkpoint_from(request)?;
        Ok(summary)
    }

    /// Takes a checkpoint, and tells the host's TSC just before and just after it began.
    pub fn checkpoint_from(
        &mut self,
        request: CheckpointRequest,
    ) -> anyhow::Result<(CheckpointSummary, RangeInclusive<u64>)> {
        let before = host_tsc();
        let job = self.client.start_checkpoint(request)?;
        let began = before..=host_tsc();
        Ok((self.client.wait(job, |_| ())?, began))
    }

    /// Begins a checkpoint and cancels it `after` so long; returns how long it took until it had
    /// ended, or `None` where the image was whole before.
    pub fn cancel(
        &mut self,
        request: CheckpointRequest,
        after: Duration,
    ) -> anyhow::Result<Option<Duration>> {
        let job = self.client.start_checkpoint(request)?;
        std::thread::sleep(after);
        let cancelled = Instant::now();
        self.client.run(Method::JobCancel(job))?;
        match self.client.wait(job, |_| ()) {
            Ok(_) => Ok(None),
            Err(error) if error.code() == ErrorCode::Cancelled => Ok(Some(cancelled.elapsed())),
            Err(error) => Err(error.into()),
        }
    }

    /// Stops the guest's vCPUs.
    pub fn pause(&mut self) -> anyhow::Result<()> {
        Ok(self.client.run(Method::Pause)?)
    }

    /// Lets the guest's vCPUs run on.
    pub fn resume(&mut self) -> anyhow::Result<()> {
        Ok(self.client.run(Method::Resume)?)
    }

    /// Puts the guest back to its last incremental checkpoint.
    pub fn rewind(&mut self) -> anyhow::Result<RewindSummary> {
        Ok(self.client.rewind(None)?)
    }

    /// Kills the process as a crash would: no handler runs.
    pub fn kill(mut self) {
        end(&mut self.child);
    }

    /// Waits until the guest has powered off.
    pub fn wait_end(&mut self, timeout: Duration) -> anyhow::Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if start.elapsed() > timeout {
                bail!(
                    "the virtual machine did not end within {} s",
                    timeout.as_secs()
                );
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// How an image is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Start {
    /// All of memory is read first.
    Eager,
    /// The guest runs at once.
    Lazy,
}

/// A domain's process that need not answer yet. Dropping it kills the process.
#[derive(Debug)]
pub(super) struct Spawned {
    child: Option<Child>,
    began: Instant,
    name: String,
    runtime: RuntimeDir,
    console: ConsoleLog,
    errors: PathBuf,
}

impl Spawned {
    fn new(dir: &Path, tag: &str, name: &str, args: &[&OsStr]) -> anyhow::Result<Self> {
        let console = ConsoleLog::new(dir.join(format!("{tag}.console")));
        let errors = dir.join(format!("{tag}.err"));
        let runtime_dir = dir.join("run");
        let runtime = RuntimeDir::at(&runtime_dir)?;
        let program = std::env::current_exe().context("could not find this program's own file")?;
        let mut command = Command::new(program);
        command
            .arg("--runtime-dir")
            .arg(&runtime_dir)
            .args(args)
            .stdin(Stdio::null())
            .stdout(create(console.path())?)
            .stderr(create(&errors)?);
        let began = Instant::now();
        let child = command
            .spawn()
            .context("could not start a process for the virtual machine")?;
        Ok(Self {
            child: Some(child),
            began,
            name: name.to_owned(),
            runtime,
            console,
            errors,
        })
    }

    /// Restores `image` as a domain of another name, which may run beside the one that was saved.
    pub fn another(dir: &Path, tag: &str, image: &Path, start: Start) -> anyhow::Result<Self> {
        let mut args: Vec<&OsStr> = vec!["restore".as_ref(), image.as_os_str()];
        args.extend(["--new-identity", "--name", tag].map(OsStr::new));
        if start == Start::Lazy {
            args.push("--lazy".as_ref());
        }
        Self::new(dir, tag, tag, &args)
    }

    /// Waits until the guest has printed something, and returns how long that was after the command.
    pub fn first_output(&mut self) -> anyhow::Result<Duration> {
        /// How often the console is looked at: the figure is so much too late at most.
        const LOOK: Duration = Duration::from_micros(200);
        while fs::metadata(self.console.path())?.len() == 0 {
            let ended = self.child.as_mut().map(Child::try_wait).transpose()?;
            if ended.flatten().is_some() || self.began.elapsed() > START_TIMEOUT {
                let said = fs::read_to_string(&self.errors).unwrap_or_default();
                bail!("the guest printed nothing: {}", said.trim());
            }
            std::thread::sleep(LOOK);
        }
        Ok(self.began.elapsed())
    }

    /// Waits until the process answers.
    pub fn answer(mut self) -> anyhow::Result<VmProcess> {
        let mut child = self.child.take().expect("it is taken only here");
        let console = ConsoleLog::new(self.console.path().to_owned());
        match wait_for(
            &self.runtime,
            &self.name,
            &mut child,
            &self.errors,
            START_TIMEOUT,
        ) {
            Ok(client) => Ok(VmProcess {
                child,
                client,
                console,
            }),
            Err(error) => {
                end(&mut child);
                let printed = console.text().unwrap_or_default();
                Err(match printed.trim() {
                    "" => error,
                    printed => error.context(format!("the guest printed: {printed}")),
                })
            }
        }
    }
}

impl Drop for Spawned {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            end(child);
        }
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

/// Kills and reaps; harmless where the process has ended.
fn end(child: &mut Child) {
    // Both fail only where there is no such child any more.
    drop(child.kill());
    drop(child.wait());
}

fn create(path: &Path) -> anyhow::Result<File> {
    File::create(path).with_context(|| format!("could not write {}", path.display()))
}
