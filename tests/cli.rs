//! The command, used as a person would: every subcommand against real virtual machines.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::collections::HashSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::have_kvm;
use serde_json::Value;

/// A runtime directory, files, and the domains started in them; all end with it.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn livepoint(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_livepoint"))
            .arg("--runtime-dir")
            .arg(self.path("run"))
            .args(args)
            .output()
            .unwrap()
    }

    /// Runs a subcommand that must succeed, and returns what it printed.
    fn ok(&self, args: &[&str]) -> String {
        let output = self.livepoint(args);
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success(),
            "{args:?}: {}\n{text}{errors}",
            output.status
        );
        text
    }

    fn json(&self, args: &[&str]) -> Value {
        let mut with_json = vec!["--json"];
        with_json.extend(args);
        serde_json::from_str(&self.ok(&with_json)).unwrap()
    }

    /// Runs a subcommand that must fail with status 1, and returns what it said.
    fn refused(&self, args: &[&str]) -> String {
        let output = self.livepoint(args);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {errors}");
        assert!(!errors.contains("panicked"), "{errors}");
        errors
    }

    /// Writes the XML of a domain with the `echo` guest, whose console is a socket.
    fn echo_domain(&self, name: &str) -> PathBuf {
        let file = self.path(&format!("{name}.xml"));
        let xml = format!(
            "<domain type='kvm'>\n\
             <name>{name}</name>\n\
             <memory unit='MiB'>64</memory>\n\
             <os><type arch='x86_64'>hvm</type><kernel>builtin:echo</kernel></os>\n\
             <devices>\n\
             <serial type='unix'><source mode='bind' path='{}'/></serial>\n\
             <memballoon model='none'/>\n\
             </devices>\n\
             </domain>\n",
            self.path(&format!("{name}.console")).display()
        );
        fs::write(&file, xml).unwrap();
        file
    }

    fn start(&self, name: &str) {
        let file = self.echo_domain(name);
        self.ok(&["run", "--detach", file.to_str().unwrap()]);
    }

    fn console(&self, name: &str) -> Console {
        Console::connect(&self.path(&format!("{name}.console")))
    }

    fn state(&self, name: &str) -> String {
        self.json(&["status", name])["state"]
            .as_str()
            .unwrap()
            .to_owned()
    }

    fn wait_gone(&self, name: &str) {
        let start = Instant::now();
        while self.livepoint(&["status", name]).status.success() {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{name} does not end"
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let listed = self.livepoint(&["--json", "list"]).stdout;
        let domains: Vec<Value> = serde_json::from_slice(&listed).unwrap_or_default();
        for domain in domains {
            self.livepoint(&["destroy", domain["name"].as_str().unwrap()]);
        }
    }
}

/// The other end of a guest's serial line.
struct Console {
    stream: UnixStream,
    seen: String,
}

impl Console {
    fn connect(path: &Path) -> Self {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(stream) => {
                    stream
                        .set_read_timeout(Some(Duration::from_secs(60)))
                        .unwrap();
                    return Self {
                        stream,
                        seen: String::new(),
                    };
                }
                Err(error) => assert!(start.elapsed() < Duration::from_secs(60), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.stream, "{line}").unwrap();
    }

    /// Waits until the guest listens. What it printed before anybody was connected is gone.
    fn wake(&mut self) {
        self.say("anybody there");
        self.expect("echo: anybody there");
    }

    /// Reads until `text` has come, and forgets what came before its end.
    fn expect(&mut self, text: &str) {
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.seen.find(text) {
                self.seen.drain(..at + text.len());
                return;
            }
            let count = self.stream.read(&mut buffer).unwrap_or_else(|error| {
                panic!("waiting for {text:?}: {error}; there is {:?}", self.seen)
            });
            assert!(
                count > 0,
                "the console closed before {text:?}; there is {:?}",
                self.seen
            );
            self.seen
                .push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }
}

#[test]
fn a_domain_lives_through_every_subcommand() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    bench.start("parrot");
    let socket = bench.path("run").join("parrot.sock");
    assert_eq!(
        fs::metadata(&socket).unwrap().permissions().mode() & 0o777,
        0o600
    );
    let mut console = bench.console("parrot");
    console.say("hello");
    console.expect("echo: hello");

    let list = bench.json(&["list"]);
    assert_eq!(list[0]["name"], "parrot");
    assert_eq!(list[0]["state"], "running");
    assert_eq!(list[0]["memory_bytes"], 64 << 20);
    assert!(
        bench
            .ok(&["dumpxml", "parrot"])
            .contains("<name>parrot</name>")
    );

    bench.ok(&["pause", "parrot"]);
    assert_eq!(bench.state("parrot"), "paused");
    assert!(bench.refused(&["pause", "parrot"]).contains("paused"));
    console.say("asleep");
    bench.ok(&["resume", "parrot"]);
    console.expect("echo: asleep");
    assert!(bench.refused(&["resume", "parrot"]).contains("running"));

    console.say("count 3");
    console.expect("echo: count 3");
    let image = bench.path("parrot.lpi");
    let image = image.to_str().unwrap();
    let done = bench.json(&["checkpoint", "parrot", "--out", image]);
    assert_eq!(done["protocol"], "threaded");
    assert!(done["figures"]["downtime_us"].as_u64().unwrap() > 0);
    console.say("count");
    console.expect("echo: count 4");

    assert!(bench.ok(&["inspect", image]).contains("parrot"));
    assert_eq!(bench.json(&["inspect", image])["vcpu_count"], 1);
    assert!(
        bench
            .ok(&["inspect", image, "--check-host"])
            .contains("can run")
    );
    let manifest: Value =
        serde_json::from_str(&bench.ok(&["inspect", image, "--manifest"])).unwrap();
    assert_eq!(manifest["guest"]["name"], "parrot");
    bench.ok(&["verify", image]);

    // The same domain cannot run twice, and the refusal says who has it.
    let pid = list[0]["pid"].to_string();
    assert!(bench.refused(&["restore", image]).contains(&pid));
    bench.ok(&["destroy", "parrot"]);
    bench.wait_gone("parrot");

    // After the restore the guest goes on from the checkpoint: it has counted to 3.
    bench.ok(&["restore", "--detach", image]);
    let mut console = bench.console("parrot");
    console.say("count");
    console.expect("echo: count 4");
    bench.ok(&["shutdown", "parrot"]);
    console.expect("echo: power button");
    bench.wait_gone("parrot");
}

#[test]
fn a_paused_domain_is_checkpointed_and_restored_paused() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    bench.start("still");
    bench.console("still").wake();
    bench.ok(&["pause", "still"]);
    let chain = bench.path("chain");
    fs::create_dir(&chain).unwrap();
    let chain = chain.to_str().unwrap();
    for protocol in ["stop", "threaded"] {
        for codec in ["none", "lz4", "zstd:3"] {
            let args = ["--protocol", protocol, "--codec", codec];
            bench.ok(&[&["checkpoint", "still", "--out", chain], &args[..]].concat());
            assert_eq!(bench.state("still"), "paused");
        }
    }
    assert_eq!(fs::read_dir(chain).unwrap().count(), 6);
    bench.ok(&["destroy", "still"]);
    bench.wait_gone("still");
    bench.ok(&["restore", "--detach", "--paused", chain]);
    assert_eq!(bench.state("still"), "paused");
    bench.ok(&["resume", "still"]);
    let mut console = bench.console("still");
    console.say("awake");
    console.expect("echo: awake");
}

#[test]
fn guests_reset_crash_and_power_off_as_the_domain_says() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    bench.start("cat");
    let mut console = bench.console("cat");
    console.wake();
    console.say("reboot");
    console.expect("echo: rebooting");
    console.expect("echo: ready");
    bench.ok(&["reset", "cat"]);
    console.expect("echo: ready");
    console.say("poweroff");
    bench.wait_gone("cat");

    let file = bench.echo_domain("dog");
    let mut process = Command::new(env!("CARGO_BIN_EXE_livepoint"))
        .arg("--runtime-dir")
        .arg(bench.path("run"))
        .arg("run")
        .arg(&file)
        .spawn()
        .unwrap();
    // Gone before the guest listens, and without reading: what was said still counts.
    bench.console("dog").say("crash");
    let start = Instant::now();
    let status = loop {
        if let Some(status) = process.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > Duration::from_secs(60) {
            process.kill().unwrap();
            panic!("a domain that crashes must end `run`");
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(1), "a crash is a failure of `run`");
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason() {
    let bench = Bench::new();
    assert!(bench.refused(&["status", "nobody"]).contains("nobody"));
    assert!(
        bench
            .refused(&["checkpoint", "nobody"])
            .contains("no domain")
    );
    assert!(
        bench
            .refused(&["run", "/nonexistent.xml"])
            .contains("/nonexistent.xml")
    );
    let bad = bench.path("bad.xml");
    fs::write(
        &bad,
        "<domain type='kvm'>\n<name>x</name>\n<os firmware='efi'/>\n</domain>",
    )
    .unwrap();
    let said = bench.refused(&["run", bad.to_str().unwrap()]);
    assert!(
        said.contains("bad.xml") && said.contains("line 3"),
        "{said}"
    );
    assert!(
        bench
            .refused(&["inspect", bad.to_str().unwrap()])
            .contains("bad.xml")
    );
    assert!(
        bench
            .refused(&["verify", "/nonexistent.lpi"])
            .contains("/nonexistent.lpi")
    );
    assert!(
        bench
            .refused(&["restore", bad.to_str().unwrap()])
            .contains("bad.xml")
    );
    let output = bench.livepoint(&["checkpoint", "x", "--protocol", "magic"]);
    assert_eq!(
        output.status.code(),
        Some(2),
        "a wrong argument is not a failure"
    );
}

#[test]
fn a_socket_left_by_a_killed_process_is_not_listed_and_not_in_the_way() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    bench.start("ghost");
    let pid = bench.json(&["status", "ghost"])["pid"].to_string();
    assert!(
        Command::new("kill")
            .args(["-9", &pid])
            .status()
            .unwrap()
            .success()
    );
    // The locks go with the last of its memory, a moment after the socket.
    let lock = fs::File::open(bench.path("run").join("ghost.lock")).unwrap();
    lock.lock().unwrap();
    lock.unlock().unwrap();
    assert!(bench.path("run").join("ghost.sock").exists());
    assert_eq!(bench.json(&["list"]).as_array().unwrap().len(), 0);
    bench.start("ghost");
    assert_eq!(bench.state("ghost"), "running");
}

#[test]
fn built_in_guests_are_listed_and_written_to_files() {
    let bench = Bench::new();
    let dir = bench.path("guests");
    bench.ok(&["guests", "--extract", dir.to_str().unwrap()]);
    for name in ["npb", "pagewriter", "echo"] {
        let elf = fs::read(dir.join(format!("{name}.elf"))).unwrap();
        assert_eq!(&elf[..4], b"\x7fELF");
    }
}

#[test]
fn several_domains_run_from_one_image_with_identities_of_their_own() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    let file = bench.echo_domain("sheep");
    // A terminal: each machine has one of its own.
    let xml = fs::read_to_string(&file).unwrap();
    let start = xml.find("<serial").unwrap();
    let end = xml.find("</serial>").unwrap();
    let xml = format!("{}<serial type='pty'>{}", &xml[..start], &xml[end..]);
    fs::write(&file, xml).unwrap();
    bench.ok(&["run", "--detach", file.to_str().unwrap()]);
    let image = bench.path("sheep.lpi");
    let image = image.to_str().unwrap();
    bench.ok(&["checkpoint", "sheep", "--out", image]);

    let said = bench.refused(&["restore", "--detach", image]);
    assert!(said.contains("in use"), "{said}");
    let again = ["restore", "--detach", image, "--new-identity"];
    let named = [&again[..], &["--name", "dolly"]].concat();
    let first = bench.json(&named);
    assert_eq!(first["name"], "dolly");
    let second = bench.json(&again);
    assert!(second["name"].as_str().unwrap().starts_with("sheep-"));
    let listed = bench.json(&["list"]);
    let uuids: HashSet<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|domain| domain["uuid"].as_str().unwrap())
        .collect();
    assert_eq!(uuids.len(), 3, "{listed}");
    let xml = bench.ok(&["dumpxml", "dolly"]);
    assert!(xml.contains("<name>dolly</name>"), "{xml}");
}

#[test]
fn a_chain_of_increments_is_kept_short_folded_and_gone_on_from_lazily() {
    if !have_kvm() {
        return;
    }
    let bench = Bench::new();
    bench.start("chained");
    let images = bench.path("images");
    fs::create_dir(&images).unwrap();
    let dir = images.to_str().unwrap();
    let periodic = [
        "checkpoint",
        "chained",
        "--out",
        dir,
        "--every",
        "10ms",
        "--count",
        "4",
        "--keep",
        "2",
    ];
    let said = bench.ok(&periodic);
    assert!(said.contains("4 taken, 0 failed"), "{said}");
    let newest = bench.json(&["inspect", dir]);
    assert!(!newest["layers"].as_array().unwrap().is_empty(), "{newest}");
    assert!(newest["inherited_pages"].as_u64().unwrap() > 0);
    bench.json(&["verify", dir]);
    let files = fs::read_dir(&images).unwrap();
    let newest_path = files.map(|entry| entry.unwrap().path()).max().unwrap();
    bench.ok(&["destroy", "chained"]);
    bench.wait_gone("chained");
    // It goes on from there, its memory comes as it is touched, and its next image continues it.
    bench.ok(&["restore", "--lazy", "--track", "--detach", dir]);
    let mut console = bench.console("chained");
    console.say("still there");
    console.expect("echo: still there");
    let next = bench.json(&["checkpoint", "chained", "--out", dir, "--incremental"]);
    let parent = &next["statistics"]["increment"]["parent"];
    assert_eq!(*parent, newest["image_uuid"], "{next}");
    // It goes back in place, its devices with it, and is still the same process.
    let process = bench.json(&["status", "chained"])["pid"].clone();
    let said = bench.json(&["rewind", "chained"]);
    assert_eq!(said["image_uuid"], next["image_uuid"], "{said}");
    console.say("and again");
    console.expect("echo: and again");
    let said = bench.ok(&["rewind", "chained", "--to", newest_path.to_str().unwrap()]);
    assert!(said.contains("is back at"), "{said}");
    console.say("once more");
    console.expect("echo: once more");
    assert_eq!(bench.json(&["status", "chained"])["pid"], process);
    let said = bench.refused(&["rewind", "chained", "--to", "/nowhere.lpi"]);
    assert!(said.contains("/nowhere.lpi"), "{said}");
    bench.ok(&["destroy", "chained"]);
    bench.wait_gone("chained");
    let folded = bench.path("folded.lpi");
    bench.ok(&["rebase", dir, "--out", folded.to_str().unwrap()]);
    let garbage = bench.json(&["gc", dir, "--keep", "1"]);
    assert_eq!(garbage["in_use"].as_array().unwrap().len(), 0, "{garbage}");
    bench.json(&["verify", dir]);
    fs::remove_dir_all(&images).unwrap();
    bench.json(&["verify", folded.to_str().unwrap()]);
    bench.ok(&["restore", "--detach", folded.to_str().unwrap()]);
    assert_eq!(bench.state("chained"), "running");
}
