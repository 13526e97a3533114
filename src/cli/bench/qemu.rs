//! QEMU as a peer: the same guests, saved in the ways that QEMU offers.
//!
//! docs/measurements.md says which settings are used, and why.

use std::cell::Cell;
use std::fmt;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

use super::super::console_log::ConsoleLog;
use super::qmp::{Event, Qmp, Refusal};
use super::vm::{GuestSpec, Outcome, Request};

const PROGRAM: &str = "qemu-system-x86_64";

/// CPU models to try. `host` fails on some hosts for a model-specific register that KVM offers and
/// does not let QEMU set; the last one starts everywhere.
const CPU_MODELS: [&str; 3] = ["host", "host,-arch-capabilities", "qemu64"];

/// QEMU's firmware takes seconds where KVM emulates the guest's kernel mode.
const START_TIMEOUT: Duration = Duration::from_secs(60);

/// How long saving may take. A live migration of a guest that writes faster than it is saved never
/// ends.
const SAVE_TIMEOUT: Duration = Duration::from_secs(120);

/// How long QEMU may take from the end of a migration until it lets the guest go on.
const RESUME_TIMEOUT: Duration = Duration::from_secs(10);

/// How often the socket, or a command that is refused for now, is tried again.
const POLL: Duration = Duration::from_millis(1);

/// More bytes a second than any storage takes: no limit.
const UNLIMITED: u64 = 1 << 40;

/// A way to save a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QemuMode {
    /// Stop, migrate to a file, continue.
    Stop,
    /// Migrate to a file while the guest runs, then continue.
    Live,
    /// The same, with a fixed place in the file for each page and several threads.
    LiveMapped,
    /// Copy on write, by userfaultfd.
    Background,
}

impl QemuMode {
    pub const ALL: [Self; 4] = [Self::Stop, Self::Live, Self::LiveMapped, Self::Background];

    pub fn name(self) -> &'static str {
        match self {
            Self::Stop => "qemu-stop",
            Self::Live => "qemu-live",
            Self::LiveMapped => "qemu-live-mapped-ram",
            Self::Background => "qemu-background-snapshot",
        }
    }

    fn capabilities(self) -> &'static [&'static str] {
        match self {
            Self::Stop | Self::Live => &["events"],
            Self::LiveMapped => &["events", "mapped-ram", "multifd"],
            Self::Background => &["events", "background-snapshot"],
        }
    }
}

/// The program, found on this machine.
#[derive(Debug)]
pub(super) struct QemuProgram {
    version: String,
    /// Index of the CPU model that starts here.
    model: Cell<usize>,
}

impl QemuProgram {
    /// Finds QEMU; the error says what to install.
    pub fn find() -> anyhow::Result<Self> {
        let output = Command::new(PROGRAM).arg("--version").output();
        let output = output.with_context(|| {
            format!("{PROGRAM} is not installed; on Debian: apt-get install qemu-system-x86")
        })?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let version = text.lines().next().unwrap_or_default();
        Ok(Self {
            version: version.to_owned(),
            model: Cell::new(0),
        })
    }

    /// Returns what it calls itself.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// Returns the CPU model that the last machine started with.
    pub fn cpu_model(&self) -> &'static str {
        CPU_MODELS[self.model.get()]
    }

    /// Starts a machine with the first CPU model that works.
    pub fn start(&self, dir: &Path, tag: &str, guest: &GuestSpec) -> anyhow::Result<QemuProcess> {
        let mut failure = None;
        for (index, model) in CPU_MODELS.iter().enumerate().skip(self.model.get()) {
            match QemuProcess::spawn(dir, tag, guest, model) {
                Ok(process) => {
                    self.model.set(index);
                    return Ok(process);
                }
                Err(error) => failure = Some(error),
            }
        }
        Err(failure.unwrap_or_else(|| anyhow::anyhow!("{PROGRAM} has no CPU model to try")))
    }
}

/// A QEMU process and its guest's console. Dropping it kills the process.
pub(super) struct QemuProcess {
    child: Child,
    qmp: Qmp,
    console: ConsoleLog,
}

impl fmt::Debug for QemuProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QemuProcess")
            .field("pid", &self.child.id())
            .finish_non_exhaustive()
    }
}

impl QemuProcess {
    fn spawn(dir: &Path, tag: &str, guest: &GuestSpec, model: &str) -> anyhow::Result<Self> {
        let file = |ending: &str| dir.join(format!("{tag}.{ending}"));
        let (socket, console, errors) = (file("qmp"), file("console"), file("err"));
        let kernel = file("elf");
        fs::write(&kernel, guest.elf()?)
            .with_context(|| format!("could not write {}", kernel.display()))?;
        // What a machine that failed to start has left.
        drop(fs::remove_file(&socket));
        File::create(&console)?;
        let mut child = Command::new(PROGRAM)
            .args(["-accel", "kvm", "-cpu", model])
            .args(["-m", &format!("{}k", guest.memory_bytes / 1024)])
            .args(["-display", "none", "-nodefaults", "-no-reboot"])
            .arg("-kernel")
            .arg(&kernel)
            .args(["-append", &guest.cmdline])
            .args(["-serial", &option("file:", &console, "")])
            .args(["-qmp", &option("unix:", &socket, ",server=on,wait=off")])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&errors)?)
            .spawn()
            .with_context(|| format!("could not start {PROGRAM}"))?;
        match greet(&mut child, &socket) {
            Ok(qmp) => Ok(Self {
                child,
                qmp,
                console: ConsoleLog::new(console),
            }),
            Err(error) => {
                end(&mut child);
                let said = fs::read_to_string(&errors).unwrap_or_default();
                Err(error.context(format!("{PROGRAM} -cpu {model}: {}", said.trim())))
            }
        }
    }

    /// Returns the guest's console.
    pub fn console(&self) -> &ConsoleLog {
        &self.console
    }

    /// Returns whether the process still runs.
    pub fn is_alive(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Saves the guest, which runs on afterwards.
    pub fn checkpoint(&mut self, mode: QemuMode, request: &Request) -> anyhow::Result<Outcome> {
        self.prepare(mode, request)?;
        let start = Instant::now();
        if mode == QemuMode::Stop {
            self.qmp.execute("stop", json!({}))?;
        }
        let uri = uri(self.qmp.version(), &request.image);
        self.qmp.execute("migrate", json!({ "uri": uri }))?;
        self.wait_saved()?;
        if mode != QemuMode::Background {
            self.resume()?;
        }
        let total = start.elapsed();
        let own_ms = self.qmp.execute("query-migrate", json!({}))?["downtime"].as_u64();
        let downtime = match mode {
            QemuMode::Stop => Some(total),
            _ => own_ms.map(Duration::from_millis),
        };
        let meta = fs::metadata(&request.image)
            .with_context(|| format!("QEMU left no {}", request.image.display()))?;
        Ok(Outcome {
            downtime,
            total,
            // A file with a place for each page has holes.
            image_bytes: meta.len().min(meta.blocks() * 512),
            statistics: Value::Null,
            began: None,
        })
    }

    fn prepare(&mut self, mode: QemuMode, request: &Request) -> anyhow::Result<()> {
        let wanted: Vec<Value> = mode
            .capabilities()
            .iter()
            .map(|name| json!({ "capability": name, "state": true }))
            .collect();
        self.qmp.execute(
            "migrate-set-capabilities",
            json!({ "capabilities": wanted }),
        )?;
        let bandwidth = request.max_bandwidth.unwrap_or(UNLIMITED);
        self.qmp.execute(
            "migrate-set-parameters",
            json!({ "max-bandwidth": bandwidth }),
        )?;
        self.qmp.forget_events();
        Ok(())
    }

    fn wait_saved(&mut self) -> anyhow::Result<()> {
        let ended = |event: &Event| {
            let status = event.data["status"].as_str().unwrap_or_default();
            event.name == "MIGRATION" && ["completed", "failed", "cancelled"].contains(&status)
        };
        let what = "the end of the migration";
        let event = self.qmp.wait_event(what, SAVE_TIMEOUT, ended)?;
        if event.data["status"] != "completed" {
            let state = self.qmp.execute("query-migrate", json!({}))?;
            let why = state["error-desc"].as_str().unwrap_or("no reason given");
            bail!("QEMU could not save the guest: {why}");
        }
        Ok(())
    }

    /// Lets the guest go on as soon as QEMU allows it.
    fn resume(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            match self.qmp.execute("cont", json!({})) {
                Ok(_) => return Ok(()),
                Err(error) if error.is::<Refusal>() && start.elapsed() < RESUME_TIMEOUT => {
                    std::thread::sleep(POLL);
                }
                Err(error) => return Err(error),
            }
        }
    }
}

impl Drop for QemuProcess {
    fn drop(&mut self) {
        end(&mut self.child);
    }
}

fn greet(child: &mut Child, socket: &Path) -> anyhow::Result<Qmp> {
    let start = Instant::now();
    loop {
        if let Ok(stream) = UnixStream::connect(socket) {
            return Qmp::handshake(stream);
        }
        if let Some(status) = child.try_wait()? {
            bail!("it ended with {status}");
        }
        if start.elapsed() > START_TIMEOUT {
            bail!("it did not answer for {} s", START_TIMEOUT.as_secs());
        }
        std::thread::sleep(POLL);
    }
}

/// Formats an option of QEMU's that names a file; commas are written twice there.
fn option(before: &str, path: &Path, after: &str) -> String {
    let path = path.display().to_string().replace(',', ",,");
    format!("{before}{path}{after}")
}

/// Returns where to migrate to. QEMU before 8.2 knows no `file:`.
fn uri(version: (u64, u64), image: &Path) -> String {
    let image = image.display().to_string();
    if version >= (8, 2) {
        format!("file:{image}")
    } else {
        format!("exec:cat > '{}'", image.replace('\'', r"'\''"))
    }
}

/// Kills and reaps; harmless where the process has ended.
fn end(child: &mut Child) {
    // Both fail only where there is no such child any more.
    drop(child.kill());
    drop(child.wait());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn an_old_qemu_writes_through_a_shell() {
        let image = PathBuf::from("/tmp/it's here/image");
        assert_eq!(uri((10, 0), &image), "file:/tmp/it's here/image");
        let exec = uri((7, 2), &image);
        assert_eq!(exec, r"exec:cat > '/tmp/it'\''s here/image'");
    }

    #[test]
    fn commas_in_paths_do_not_end_an_option() {
        let path = PathBuf::from("/tmp/a,b");
        assert_eq!(
            option("unix:", &path, ",wait=off"),
            "unix:/tmp/a,,b,wait=off"
        );
    }
}
