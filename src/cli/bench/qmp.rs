//! QMP, the control protocol of QEMU: one JSON object a line, over a Unix socket.

use std::collections::VecDeque;
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};

/// How long an answer to a command may take: QEMU's main loop may be busy with the guest's memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A connection to a QEMU process.
#[derive(Debug)]
pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    /// A line that has not come whole yet.
    partial: Vec<u8>,
    events: VecDeque<Event>,
    version: (u64, u64),
}

/// What QEMU tells unasked.
#[derive(Clone, Debug)]
pub(super) struct Event {
    pub name: String,
    pub data: Value,
}

/// What QEMU refused.
#[derive(Clone, Debug, thiserror::Error)]
#[error("QEMU refused {command}: {reason}")]
pub(super) struct Refusal {
    command: String,
    pub reason: String,
}

impl Qmp {
    /// Reads the greeting and enters command mode.
    pub fn handshake(stream: UnixStream) -> anyhow::Result<Self> {
        let mut qmp = Self {
            stream: BufReader::new(stream),
            partial: Vec::new(),
            events: VecDeque::new(),
            version: (0, 0),
        };
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        let greeting = qmp.message(deadline)?.context("QEMU did not greet")?;
        let version = &greeting["QMP"]["version"]["qemu"];
        let part = |name: &str| version[name].as_u64();
        qmp.version = part("major")
            .zip(part("minor"))
            .context("QEMU's greeting has no version")?;
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Returns QEMU's major and minor version.
    pub fn version(&self) -> (u64, u64) {
        self.version
    }

    /// Runs a command and returns its result. An error that QEMU answers is a [`Refusal`].
    pub fn execute(&mut self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        let mut call = json!({ "execute": command });
        if arguments.as_object().is_some_and(|map| !map.is_empty()) {
            call["arguments"] = arguments;
        }
        let line = format!("{call}\n");
        self.stream
            .get_mut()
            .write_all(line.as_bytes())
            .context("the connection to QEMU is lost")?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let message = self.message(deadline)?;
            let message = message.with_context(|| format!("QEMU did not answer {command}"))?;
            if let Some(event) = event_in(&message) {
                self.events.push_back(event);
            } else if let Some(result) = message.get("return") {
                return Ok(result.clone());
            } else {
                let reason = message["error"]["desc"].as_str().unwrap_or("unknown error");
                return Err(Refusal {
                    command: command.to_owned(),
                    reason: reason.to_owned(),
                }
                .into());
            }
        }
    }

    /// Waits for an event that fits, and drops those before it.
    pub fn wait_event(
        &mut self,
        what: &str,
        timeout: Duration,
        fits: impl Fn(&Event) -> bool,
    ) -> anyhow::Result<Event> {
        let deadline = Instant::now() + timeout;
        loop {
            while let Some(event) = self.events.pop_front() {
                if fits(&event) {
                    return Ok(event);
                }
            }
            match self.message(deadline)? {
                Some(message) => self.events.extend(event_in(&message)),
                None => bail!("QEMU did not report {what} in {} s", timeout.as_secs()),
            }
        }
    }

    /// Forgets the events so far.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Returns the next message; `None` where it does not come before the deadline.
    fn message(&mut self, deadline: Instant) -> anyhow::Result<Option<Value>> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.get_ref().set_read_timeout(Some(left))?;
            match self.stream.read_until(b'\n', &mut self.partial) {
                Ok(_) if self.partial.ends_with(b"\n") => {
                    let line = std::mem::take(&mut self.partial);
                    let message = serde_json::from_slice(&line);
                    return message.map(Some).context("QEMU sent no valid JSON");
                }
                Ok(_) => bail!("QEMU closed the connection"),
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock
                            | io::ErrorKind::TimedOut
                            | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error).context("the connection to QEMU is lost"),
            }
        }
    }
}

fn event_in(message: &Value) -> Option<Event> {
    Some(Event {
        name: message.get("event")?.as_str()?.to_owned(),
        data: message.get("data").cloned().unwrap_or(Value::Null),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread::{self, JoinHandle};

    const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10},
        "package": "Debian"}, "capabilities": ["oob"]}}"#;

    /// Answers each command with the next of `answers`; several lines may be one answer.
    fn server(answers: &'static [&'static str]) -> (UnixStream, JoinHandle<Vec<Value>>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let serve = thread::spawn(move || {
            let mut lines = BufReader::new(theirs);
            let mut heard = Vec::new();
            let greeting = GREETING.replace('\n', " ");
            let stream = lines.get_mut();
            stream
                .write_all(format!("{greeting}\r\n").as_bytes())
                .unwrap();
            for answer in [&[r#"{"return": {}}"#], answers].concat() {
                let mut line = String::new();
                if lines.read_line(&mut line).unwrap() == 0 {
                    break;
                }
                heard.push(serde_json::from_str(&line).unwrap());
                // In two writes: a line need not come whole.
                let (first, rest) = answer.split_at(answer.len() / 2);
                for part in [first, rest, "\n"] {
                    lines.get_mut().write_all(part.as_bytes()).unwrap();
                    thread::sleep(Duration::from_millis(2));
                }
            }
            heard
        });
        (ours, serve)
    }

    #[test]
    fn answers_are_found_among_events_and_events_are_kept() {
        let (stream, serve) = server(&[concat!(
            r#"{"event": "STOP", "timestamp": {"seconds": 1}}"#,
            "\n",
            r#"{"return": {"status": "paused"}}"#,
            "\n",
            r#"{"event": "MIGRATION", "data": {"status": "completed"}}"#
        )]);
        let mut qmp = Qmp::handshake(stream).unwrap();
        assert_eq!(qmp.version(), (10, 0));
        let status = qmp.execute("query-status", json!({ "x": 1 })).unwrap();
        assert_eq!(status["status"], "paused");
        let soon = Duration::from_secs(5);
        let done = qmp.wait_event("the end", soon, |event| event.name == "MIGRATION");
        assert_eq!(done.unwrap().data["status"], "completed");
        drop(qmp);
        let heard = serve.join().unwrap();
        assert_eq!(heard[0], json!({ "execute": "qmp_capabilities" }));
        let wanted = json!({ "execute": "query-status", "arguments": { "x": 1 } });
        assert_eq!(heard[1], wanted);
    }

    #[test]
    fn a_refusal_carries_the_reason() {
        let (stream, _serve) =
            server(&[r#"{"error": {"class": "GenericError", "desc": "not now"}}"#]);
        let mut qmp = Qmp::handshake(stream).unwrap();
        let error = qmp.execute("cont", json!({})).unwrap_err();
        assert_eq!(error.downcast_ref::<Refusal>().unwrap().reason, "not now");
        assert_eq!(error.to_string(), "QEMU refused cont: not now");
    }

    #[test]
    fn an_event_that_does_not_come_is_an_error_that_names_it() {
        let (stream, _serve) = server(&[r#"{"return": {}}"#]);
        let mut qmp = Qmp::handshake(stream).unwrap();
        let soon = Duration::from_millis(30);
        let error = qmp.wait_event("the end", soon, |_| true).unwrap_err();
        assert!(
            error.to_string().contains("did not report the end"),
            "{error}"
        );
    }

    #[test]
    fn a_connection_that_closes_or_talks_nonsense_is_an_error() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(theirs);
        let error = Qmp::handshake(ours).unwrap_err().to_string();
        assert!(error.contains("closed"), "{error}");
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        theirs.write_all(b"hello\n").unwrap();
        let error = Qmp::handshake(ours).unwrap_err().to_string();
        assert!(error.contains("JSON"), "{error}");
    }
}
