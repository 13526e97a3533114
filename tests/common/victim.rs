//! A process with the page writer in it, which a test ends with `kill -9`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use livepoint::host::RuntimeDir;
use livepoint::host::control::ControlClient;

use super::wait_line;

const PATIENCE: Duration = Duration::from_secs(60);

/// A process with the guest, which ends with this.
pub struct Victim {
    child: Child,
    runtime: RuntimeDir,
}

/// Returns the command, for the domains of the test's own in `run`.
pub fn livepoint(run: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_livepoint"));
    command.arg("--runtime-dir").arg(run).stdin(Stdio::null());
    command
}

impl Victim {
    /// Runs a guest of `mib` MiB that writes part of it at full speed; it is ready on return.
    pub fn run(dir: &Path, mib: u32, working_set_percent: u32) -> Self {
        let xml = dir.join("victim.xml");
        let text = format!(
            "<domain type='kvm'><name>victim</name>\
             <uuid>6f1cde4e-5b4c-4d1a-9f0e-8c6a3a0f7d11</uuid>\
             <memory unit='MiB'>{mib}</memory><vcpu>1</vcpu>\
             <os><type arch='x86_64'>hvm</type><kernel>builtin:pagewriter</kernel>\
             <cmdline>ws_percent={working_set_percent} pattern=random write=page \
             fill=incompressible tick_ms=0</cmdline></os>\
             <devices><serial type='stdio'><target port='0'/></serial>\
             <memballoon model='none'/></devices></domain>"
        );
        fs::write(&xml, text).unwrap();
        let console = dir.join("console");
        let victim = Self::start(dir, File::create(&console).unwrap().into(), |command| {
            command.arg("run").arg(&xml)
        });
        wait_line(&console, PATIENCE, |line| {
            line.starts_with("pagewriter: ready")
        });
        victim.wait_until_it_answers()
    }

    /// Restores the guest from an image, and tracks its writes.
    pub fn restore(dir: &Path, image: &Path) -> Self {
        let victim = Self::start(dir, Stdio::null(), |command| {
            command.args(["restore", "--track"]).arg(image)
        });
        victim.wait_until_it_answers()
    }

    /// Starts the process with what `arguments` adds; it need not answer yet.
    pub fn start(
        dir: &Path,
        console: Stdio,
        arguments: impl FnOnce(&mut Command) -> &mut Command,
    ) -> Self {
        let runtime = RuntimeDir::at(dir.join("run")).unwrap();
        let child = arguments(&mut livepoint(runtime.path()))
            .stdout(console)
            .spawn()
            .unwrap();
        Self { child, runtime }
    }

    fn wait_until_it_answers(mut self) -> Self {
        self.client();
        assert!(self.child.try_wait().unwrap().is_none(), "it runs");
        self
    }

    /// Connects to the process; waits until it answers.
    pub fn client(&self) -> ControlClient {
        let began = Instant::now();
        loop {
            match self.try_client() {
                Some(client) if client.greeting().pid == self.child.id() => return client,
                _ => assert!(began.elapsed() < PATIENCE, "nobody answers"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Connects to the process, if somebody answers.
    pub fn try_client(&self) -> Option<ControlClient> {
        ControlClient::connect(&self.runtime, "victim").ok()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Returns the images in a directory, oldest first.
pub fn images_in(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap();
    let mut found: Vec<_> = entries
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension() == Some(OsStr::new("lpi")))
        .collect();
    found.sort();
    found
}
