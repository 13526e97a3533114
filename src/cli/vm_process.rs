//! A virtual machine in a process of its own, as the demo and the benchmark run it.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::ops::RangeInclusive;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::console_log::ConsoleLog;
use super::worker::wait_for;
use crate::host::control::ControlClient;
use crate::host::control::protocol::Method;
use crate::host::{
    CheckpointRequest, CheckpointSummary, Domain, DomainChanges, ErrorCode, RuntimeDir, host_tsc,
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
        let console = ConsoleLog::new(dir.join(format!("{tag}.console")));
        let errors = dir.join(format!("{tag}.err"));
        let runtime_dir = dir.join("run");
        let runtime = RuntimeDir::at(&runtime_dir)?;
        let program = std::env::current_exe().context("could not find this program's own file")?;
        let mut child = Command::new(program)
            .arg("--runtime-dir")
            .arg(&runtime_dir)
            .args(args)
            .stdin(Stdio::null())
            .stdout(create(console.path())?)
            .stderr(create(&errors)?)
            .spawn()
            .context("could not start a process for the virtual machine")?;
        match wait_for(&runtime, name, &mut child, &errors, START_TIMEOUT) {
            Ok(client) => Ok(Self {
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
