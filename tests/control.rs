//! The control socket under clients that misbehave.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{Random, have_kvm};
use serde_json::{Value, json};

struct Worker {
    child: Child,
    dir: tempfile::TempDir,
}

impl Worker {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let xml = dir.path().join("d.xml");
        fs::write(
            &xml,
            "<domain type='kvm'><name>target</name><memory unit='MiB'>64</memory>\
             <os><type arch='x86_64'>hvm</type><kernel>builtin:echo</kernel></os>\
             <devices><serial type='null'/><memballoon model='none'/></devices></domain>",
        )
        .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_livepoint"))
            .arg("--runtime-dir")
            .arg(dir.path().join("run"))
            .arg("run")
            .arg(&xml)
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let worker = Self { child, dir };
        let start = Instant::now();
        while UnixStream::connect(worker.socket()).is_err() {
            assert!(start.elapsed() < Duration::from_secs(60));
            std::thread::sleep(Duration::from_millis(5));
        }
        worker
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("run/target.sock")
    }

    fn connect(&self) -> BufReader<UnixStream> {
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        let mut stream = BufReader::new(stream);
        let greeting = read(&mut stream).unwrap();
        assert_eq!(greeting["livepoint_control"], 1);
        assert_eq!(greeting["name"], "target");
        stream
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn read(stream: &mut BufReader<UnixStream>) -> Option<Value> {
    let mut line = String::new();
    match stream.read_line(&mut line) {
        Ok(count) if count > 0 => Some(serde_json::from_str(&line).unwrap()),
        _ => None,
    }
}

fn call(stream: &mut BufReader<UnixStream>, call: &Value) -> Value {
    writeln!(stream.get_mut(), "{call}").unwrap();
    read(stream).unwrap()
}

#[test]
fn calls_that_make_no_sense_are_answered_and_the_next_one_works() {
    if !have_kvm() {
        return;
    }
    let worker = Worker::start();
    let mut stream = worker.connect();
    for (line, code) in [
        ("{", "invalid"),
        ("[]", "invalid"),
        (r#"{"id":7,"method":"fly"}"#, "invalid"),
        (
            r#"{"id":7,"method":"checkpoint","params":{"protocol":"magic"}}"#,
            "invalid",
        ),
        (
            r#"{"id":7,"method":"checkpoint","params":{"protocol":"stop","out":"here"}}"#,
            "invalid",
        ),
        (
            r#"{"id":7,"method":"job-wait","params":{"job":99}}"#,
            "not-found",
        ),
        (r#"{"id":7,"method":"resume"}"#, "state"),
    ] {
        writeln!(stream.get_mut(), "{line}").unwrap();
        let reply = read(&mut stream).unwrap();
        assert_eq!(reply["error"]["code"], code, "{line}: {reply}");
    }
    let reply = call(&mut stream, &json!({"id": 8, "method": "status"}));
    assert_eq!(
        (&reply["id"], &reply["result"]["state"]),
        (&json!(8), &json!("running"))
    );
}

#[test]
fn a_second_checkpoint_is_busy_and_the_first_can_be_cancelled_from_another_connection() {
    if !have_kvm() {
        return;
    }
    let worker = Worker::start();
    let out = worker.dir.path().join("image.lpi");
    let request = json!({"id": 1, "method": "checkpoint",
        "params": {"protocol": "threaded", "out": out, "interval_ms": 60000}});
    let (mut first, mut second) = (worker.connect(), worker.connect());
    // A checkpoint of a small idle guest may be over before it is cancelled: tried again then.
    let mut cancelled = false;
    for _ in 0..50 {
        let job = call(&mut first, &request)["result"]["job"].clone();
        let busy = call(&mut second, &request);
        let named = json!({"id": 2, "method": "job-cancel", "params": {"job": job}});
        if busy["error"]["code"] == "busy" {
            call(&mut second, &named);
        }
        writeln!(
            first.get_mut(),
            r#"{{"id":3,"method":"job-wait","params":{{"job":{job}}}}}"#
        )
        .unwrap();
        let reply = loop {
            let reply = read(&mut first).unwrap();
            if reply.get("progress").is_none() {
                break reply;
            }
        };
        if reply["error"]["code"] == "cancelled" {
            cancelled = true;
            break;
        }
    }
    assert!(cancelled, "no cancel came in time");
    let reply = call(&mut second, &json!({"id": 4, "method": "status"}));
    assert_eq!(reply["result"]["state"], "running");
}

#[test]
fn streams_of_garbage_and_silent_clients_do_not_stop_others() {
    if !have_kvm() {
        return;
    }
    let worker = Worker::start();
    let _silent: Vec<_> = (0..8).map(|_| worker.connect()).collect();
    let mut random = Random::new(7);
    for _ in 0..200 {
        let stream = UnixStream::connect(worker.socket()).unwrap();
        let garbage: Vec<u8> = (0..random.below(2000))
            .map(|_| u8::try_from(random.below(256)).unwrap())
            .collect();
        // The server may hang up first.
        drop((&stream).write_all(&garbage));
    }
    let start = Instant::now();
    let mut stream = worker.connect();
    let reply = call(&mut stream, &json!({"id": 1, "method": "status"}));
    assert_eq!(reply["result"]["state"], "running");
    assert!(start.elapsed() < Duration::from_secs(60));
}

#[test]
fn a_line_without_end_is_cut_off() {
    if !have_kvm() {
        return;
    }
    let worker = Worker::start();
    let mut stream = worker.connect();
    let block = vec![b'x'; 1 << 20];
    for _ in 0..8 {
        if stream.get_mut().write_all(&block).is_err() {
            break;
        }
    }
    assert!(read(&mut stream).is_none(), "the connection is closed");
    let reply = call(&mut worker.connect(), &json!({"id": 1, "method": "status"}));
    assert_eq!(reply["result"]["state"], "running");
}
