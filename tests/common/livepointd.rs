//! A daemon of the test's own, with directories and sockets of its own, and virsh to talk to it.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Longest that a virsh may take.
const VIRSH_SECONDS: &str = "120";

pub struct Daemon {
    dir: tempfile::TempDir,
    child: Option<Child>,
    options: Vec<String>,
}

impl Default for Daemon {
    fn default() -> Self {
        Self::new()
    }
}

impl Daemon {
    pub fn new() -> Self {
        Self::with(&[])
    }

    /// Starts one with options of its own besides those that keep it apart.
    pub fn with(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // A worker of another user passes through it.
        let mode = fs::Permissions::from_mode(0o711);
        fs::set_permissions(dir.path(), mode).unwrap();
        let mut daemon = Self {
            dir,
            child: None,
            options: options.iter().map(|&option| option.to_owned()).collect(),
        };
        daemon.start();
        daemon
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("sock")
    }

    pub fn uri(&self) -> String {
        format!("livepoint:///system?socket={}", self.socket().display())
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().unwrap().id()
    }

    /// Starts the daemon, and waits until it serves.
    pub fn start(&mut self) {
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.path("log"))
            .unwrap();
        let child = self
            .command()
            .args(&self.options)
            .arg("--socket-ro")
            .arg(self.path("sock-ro"))
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
        let start = Instant::now();
        while UnixStream::connect(self.socket()).is_err() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none(), "the daemon ended: {}", self.log());
            assert!(start.elapsed() < Duration::from_secs(60), "{}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Returns the daemon's program, with the places of this daemon.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_livepointd"));
        command
            .arg("--config-dir")
            .arg(self.path("etc"))
            .arg("--state-dir")
            .arg(self.path("var"))
            .arg("--runtime-dir")
            .arg(self.path("run"))
            .arg("--socket")
            .arg(self.socket());
        command
    }

    /// Ends the daemon as a crash would; its domains go on.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    /// Returns a virsh that ends by itself where it takes too long.
    pub fn virsh_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command.args([VIRSH_SECONDS, "virsh"]);
        self.prepare(command, args)
    }

    /// Returns a virsh that its test ends, by its process.
    pub fn virsh_without_limit(&self, args: &[&str]) -> Command {
        self.prepare(Command::new("virsh"), args)
    }

    fn prepare(&self, mut command: Command, args: &[&str]) -> Command {
        command
            .args(["-c", &self.uri()])
            .args(args)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .current_dir(self.dir.path());
        command
    }

    pub fn virsh(&self, args: &[&str]) -> Output {
        let output = self.virsh_command(args).output();
        output.expect("virsh is there: apt-get install libvirt-clients")
    }

    /// Runs a virsh that must succeed, and returns what it printed.
    pub fn ok(&self, args: &[&str]) -> String {
        let output = self.virsh(args);
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{args:?}: {errors}\n{}",
            self.log()
        );
        text.trim_end().to_owned()
    }

    /// Runs a virsh that must fail, and returns what it said.
    pub fn refused(&self, args: &[&str]) -> String {
        let output = self.virsh(args);
        assert!(!output.status.success(), "{args:?} was done");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Writes a domain with a built-in guest, whose console is `console`.
    pub fn domain(&self, name: &str, guest: &str, mib: u32, console: &str) -> PathBuf {
        let (kernel, cmdline) = guest.split_once(' ').unwrap_or((guest, ""));
        let file = self.path(&format!("{name}.xml"));
        let xml = format!(
            "<domain type='kvm'>\n<name>{name}</name>\n<memory unit='MiB'>{mib}</memory>\n\
             <os><type arch='x86_64'>hvm</type><kernel>builtin:{kernel}</kernel>\
             <cmdline>{cmdline}</cmdline></os>\n\
             <devices>{console}<memballoon model='none'/></devices>\n</domain>\n"
        );
        fs::write(&file, xml).unwrap();
        file
    }

    /// Defines and starts a domain with an interface on a tap of its own, and returns the tap; `None`,
    /// counted as skipping `what`, where the host has no taps.
    pub fn start_with_interface(&self, name: &str, mac: &str, what: &str) -> Option<String> {
        let devices = format!(
            "<interface type='ethernet'><mac address='{mac}'/></interface><console type='pty'/>"
        );
        let file = self.domain(name, "echo", 64, &devices);
        self.ok(&["define", file.to_str().unwrap()]);
        let started = self.virsh(&["start", name]);
        let errors = String::from_utf8(started.stderr).unwrap();
        if !started.status.success() && errors.contains("tap") {
            super::skip(what, &errors);
            return None;
        }
        assert!(started.status.success(), "{errors}");
        let list = self.ok(&["domiflist", name]);
        let line = list.lines().find(|line| line.contains(mac));
        Some(line.unwrap().split_whitespace().next().unwrap().to_owned())
    }

    /// Defines a domain with the `echo` guest.
    pub fn define_echo(&self, name: &str) {
        let file = self.domain(name, "echo", 64, "<console type='pty'/>");
        self.ok(&["define", file.to_str().unwrap()]);
    }

    /// Returns what the worker of a domain tells of itself.
    pub fn worker(&self, name: &str) -> serde_json::Value {
        let command = r#"{"execute":"livepoint-status"}"#;
        let answer = self.ok(&["qemu-monitor-command", name, command]);
        let answer: serde_json::Value = serde_json::from_str(&answer).unwrap();
        answer["return"].clone()
    }

    /// Ends the worker of a domain as a crash would, and waits until that is known.
    pub fn kill_worker(&self, name: &str) {
        let pid = self.worker(name)["pid"].to_string();
        let killed = Command::new("kill").args(["-9", &pid]).status();
        assert!(killed.unwrap().success());
        self.wait_state(name, "shut off");
    }

    pub fn state(&self, name: &str) -> String {
        self.ok(&["domstate", name])
    }

    pub fn wait_state(&self, name: &str, wanted: &str) {
        let start = Instant::now();
        while self.state(name) != wanted {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{name} is {}, not {wanted}\n{}",
                self.state(name),
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends every worker.
    fn end_workers(&self) {
        let entries = fs::read_dir(self.path("run")).into_iter().flatten();
        for socket in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            if socket.extension().is_some_and(|ending| ending == "sock") {
                drop(destroy(&socket));
            }
        }
    }
}

fn destroy(socket: &Path) -> std::io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    let mut lines = BufReader::new(&stream).lines();
    lines.next();
    writeln!(&stream, r#"{{"id":1,"method":"destroy"}}"#)?;
    lines.next();
    Ok(())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The daemon first, so that it starts no more.
        self.kill();
        self.end_workers();
    }
}
