//! A machine whose first process is systemd, with livepoint installed; see `tests/systemd/boot`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::c::{root, run};
use super::installation;

/// Longest that anything in the machine may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// Returns whether such a machine can be made here; where not, the test counts as skipped.
pub fn can_boot() -> bool {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    if !rustix::process::geteuid().is_root() {
        super::skip(test, "only root boots systemd");
        return false;
    }
    let mut probe = Command::new(root().join("tests/systemd/boot"));
    let output = probe.arg("--probe").output().unwrap();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        super::skip(test, &format!("no such machine here: {}", why.trim()));
        return false;
    }
    true
}

/// Returns what `make install` puts in place, for all tests of a program.
fn installed() -> &'static Path {
    static INSTALLED: OnceLock<PathBuf> = OnceLock::new();
    INSTALLED.get_or_init(|| {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("systemd");
        // Of an earlier build.
        drop(fs::remove_dir_all(&dir));
        fs::create_dir_all(&dir).unwrap();
        let mut make = installation::make("install-built", &dir, &dir.join("root"));
        run(make.arg("PREFIX=/usr/local"));
        dir.join("root/usr/local")
    })
}

/// A machine, which runs or is switched off.
pub struct Booted {
    dir: tempfile::TempDir,
    boot: Option<Child>,
}

impl Booted {
    /// Starts a new one, in which nothing is enabled.
    pub fn new() -> Self {
        let mut machine = Self {
            dir: tempfile::tempdir().unwrap(),
            boot: None,
        };
        machine.start();
        machine
    }

    /// Switches it on, and waits until it has come up.
    pub fn start(&mut self) {
        let log = fs::File::create(self.dir.path().join("log")).unwrap();
        // It ends with this thread.
        let boot = Command::new("setpriv")
            .args(["--pdeathsig", "KILL"])
            .arg(root().join("tests/systemd/boot"))
            .arg(self.dir.path())
            .arg(installed())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn();
        self.boot = Some(boot.expect("setpriv is there: apt-get install util-linux"));
        self.wait("systemd has come up", |machine| {
            let ended = machine.boot.as_mut().unwrap().try_wait().unwrap();
            let said = fs::read_to_string(machine.dir.path().join("log")).unwrap_or_default();
            assert!(ended.is_none(), "the machine ended: {ended:?}\n{said}");
            let answer = machine.try_run(&["systemctl", "is-system-running"]);
            // Degraded: what a unit of the host thinks of such a machine does not matter.
            answer.is_some_and(|answer| {
                ["running\n", "degraded\n"].contains(&&*String::from_utf8_lossy(&answer.stdout))
            })
        });
    }

    /// Has it power off, and waits until it has.
    pub fn power_off(&mut self) {
        // Its connection may go before it is answered.
        drop(self.try_run(&["systemctl", "poweroff"]));
        self.wait("the machine is off", |machine| {
            machine.boot.as_mut().unwrap().try_wait().unwrap().is_some()
        });
        let status = self.boot.take().unwrap().wait().unwrap();
        assert!(status.success(), "{status}");
    }

    /// Runs a program in it. `None`: it is off.
    fn try_run(&self, args: &[&str]) -> Option<Output> {
        let pid = fs::read_to_string(self.dir.path().join("pid")).ok()?;
        let output = Command::new("timeout")
            .arg(PATIENCE.as_secs().to_string())
            .args(["nsenter", "--all", "--target", pid.trim()])
            .args(args)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/sbin:/usr/bin")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .output();
        Some(output.unwrap())
    }

    /// Runs a program in it; returns whether it succeeded, and what it said.
    pub fn run(&self, args: &[&str]) -> (bool, String) {
        let output = self.try_run(args).expect("the machine is on");
        let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
        said.push_str(&String::from_utf8_lossy(&output.stderr));
        (output.status.success(), said.trim_end().to_owned())
    }

    /// Runs a program in it that must succeed; returns what it said.
    pub fn ok(&self, args: &[&str]) -> String {
        let (done, said) = self.run(args);
        assert!(done, "{args:?}: {said}\n{}", self.journal());
        said
    }

    pub fn virsh(&self, args: &[&str]) -> String {
        let mut all = vec!["virsh", "--quiet", "--connect", "livepoint:///system"];
        all.extend(args);
        self.ok(&all)
    }

    /// Returns a property of a unit.
    pub fn property(&self, unit: &str, name: &str) -> String {
        self.ok(&["systemctl", "show", "--value", "--property", name, unit])
    }

    /// Returns where a file of the machine's `/etc` or `/var` is.
    pub fn file(&self, path: &str) -> PathBuf {
        self.dir.path().join(path.trim_start_matches('/'))
    }

    /// Writes a file in the machine's `/etc` or `/var`.
    pub fn write(&self, path: &str, content: &str) {
        let file = self.file(path);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, content).unwrap();
    }

    /// Returns the last that was said in the machine.
    pub fn journal(&self) -> String {
        let journal = self.try_run(&["journalctl", "--no-pager", "--lines", "60"]);
        journal.map_or_else(
            || "the machine is off".to_owned(),
            |output| String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    }

    /// Waits until `is` holds.
    pub fn wait(&mut self, what: &str, mut is: impl FnMut(&mut Self) -> bool) {
        let start = Instant::now();
        while !is(self) {
            assert!(
                start.elapsed() < PATIENCE,
                "this has not come: {what}\n{}",
                self.journal()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Booted {
    fn drop(&mut self) {
        let Some(mut boot) = self.boot.take() else {
            return;
        };
        // With the first process all others end, and what booted it clears up.
        let killed = fs::read_to_string(self.dir.path().join("pid")).is_ok_and(|pid| {
            Command::new("kill")
                .args(["-9", pid.trim()])
                .status()
                .is_ok()
        });
        if !killed {
            drop(boot.kill());
        }
        drop(boot.wait());
    }
}
