//! The client's side of the control protocol.

use std::io::{self, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde_json::Value;

use super::protocol::{
    Call, Greeting, JobId, Method, Outcome, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Reply,
    RewindTo, Status,
};
use super::server::read_line;
use crate::host::{
    CheckpointRequest, CheckpointSummary, DomainEvent, HostError, JobProgress, RewindSummary,
    RuntimeDir,
};

/// A connection to the process that runs a domain. Calls block until they are answered.
#[derive(Debug)]
pub struct ControlClient {
    stream: BufReader<UnixStream>,
    greeting: Greeting,
    next_id: u64,
}

impl ControlClient {
    /// Connects to the running domain `name`.
    pub fn connect(runtime: &RuntimeDir, name: &str) -> Result<Self, HostError> {
        Self::connect_to(&runtime.socket(name)?).map_err(|error| match error {
            HostError::Path { source, .. }
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                HostError::NotRunning {
                    name: name.to_owned(),
                }
            }
            other => other,
        })
    }

    /// Connects to the control socket at `socket` and reads the greeting.
    pub fn connect_to(socket: &Path) -> Result<Self, HostError> {
        let stream = UnixStream::connect(socket)
            .map_err(|source| HostError::path("connect to the control socket", socket, source))?;
        let mut stream = BufReader::new(stream);
        let mut line = Vec::new();
        if !read_line(&mut stream, &mut line).map_err(lost)? {
            return Err(HostError::Protocol(
                "it closed the connection at once".to_owned(),
            ));
        }
        let greeting: Greeting = serde_json::from_slice(&line)
            .map_err(|error| HostError::Protocol(format!("its greeting is malformed: {error}")))?;
        let newest = greeting.livepoint_control.min(PROTOCOL_VERSION);
        if newest < greeting.livepoint_control_min || newest < PROTOCOL_VERSION_MIN {
            return Err(HostError::Protocol(format!(
                "it speaks versions {} to {}, this program {PROTOCOL_VERSION_MIN} to \
                 {PROTOCOL_VERSION}",
                greeting.livepoint_control_min, greeting.livepoint_control
            )));
        }
        Ok(Self {
            stream,
            greeting,
            next_id: 1,
        })
    }

    /// Returns what the server said of itself.
    pub fn greeting(&self) -> &Greeting {
        &self.greeting
    }

    /// Makes a call whose answer is decoded as `T`.
    pub fn call<T: DeserializeOwned>(&mut self, method: Method) -> Result<T, HostError> {
        self.call_with_progress(method, |_| ())
    }

    /// Makes a call whose answer carries nothing.
    pub fn run(&mut self, method: Method) -> Result<(), HostError> {
        self.call::<Value>(method).map(drop)
    }

    /// Asks for the domain's state.
    pub fn status(&mut self) -> Result<Status, HostError> {
        self.call(Method::Status)
    }

    /// Starts a checkpoint and returns its job.
    pub fn start_checkpoint(&mut self, request: CheckpointRequest) -> Result<JobId, HostError> {
        self.call(Method::Checkpoint(request))
    }

    /// Waits until a job ends; `on_progress` hears of it a few times a second.
    pub fn wait(
        &mut self,
        job: JobId,
        on_progress: impl FnMut(&JobProgress),
    ) -> Result<CheckpointSummary, HostError> {
        self.call_with_progress(Method::JobWait(job), on_progress)
    }

    /// Puts the domain back to an image, or to its last incremental checkpoint.
    pub fn rewind(&mut self, image: Option<PathBuf>) -> Result<RewindSummary, HostError> {
        self.call(Method::Rewind(RewindTo { image }))
    }

    /// Hears of everything that happens to the domain, until it ends.
    pub fn events(&mut self, mut on_event: impl FnMut(DomainEvent)) -> Result<(), HostError> {
        let done = self.call_with::<Value>(Method::Events, |meanwhile| {
            if let Meanwhile::Event(event) = meanwhile {
                on_event(event);
            }
        });
        done.map(drop)
    }

    /// Limits how long a call waits for each line of the process, `None` for ever.
    pub fn set_timeout(&self, timeout: Option<Duration>) -> Result<(), HostError> {
        let stream = self.stream.get_ref();
        stream.set_read_timeout(timeout).map_err(lost)?;
        stream.set_write_timeout(timeout).map_err(lost)
    }

    fn call_with_progress<T: DeserializeOwned>(
        &mut self,
        method: Method,
        mut on_progress: impl FnMut(&JobProgress),
    ) -> Result<T, HostError> {
        self.call_with(method, |meanwhile| {
            if let Meanwhile::Progress(progress) = meanwhile {
                on_progress(&progress);
            }
        })
    }

    fn call_with<T: DeserializeOwned>(
        &mut self,
        method: Method,
        mut on_meanwhile: impl FnMut(Meanwhile),
    ) -> Result<T, HostError> {
        let id = self.next_id;
        self.next_id += 1;
        let mut line = serde_json::to_vec(&Call { id, method })
            .expect("our own messages are plain data with string keys");
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(lost)?;
        loop {
            if !read_line(&mut self.stream, &mut line).map_err(lost)? {
                return Err(HostError::Protocol("the domain's process ended".to_owned()));
            }
            let reply: Reply = serde_json::from_slice(&line)
                .map_err(|error| HostError::Protocol(format!("a reply is malformed: {error}")))?;
            if reply.id != id {
                return Err(HostError::Protocol(format!(
                    "it answered call {}, not {id}",
                    reply.id
                )));
            }
            match reply.outcome {
                Outcome::Progress(progress) => on_meanwhile(Meanwhile::Progress(progress)),
                Outcome::Event(event) => on_meanwhile(Meanwhile::Event(event)),
                Outcome::Error(error) => {
                    return Err(HostError::Remote {
                        code: error.code,
                        message: error.message,
                    });
                }
                Outcome::Result(value) => {
                    return serde_json::from_value(value).map_err(|error| {
                        HostError::Protocol(format!("an answer is malformed: {error}"))
                    });
                }
            }
        }
    }
}

/// What comes before a call's answer.
enum Meanwhile {
    Progress(JobProgress),
    Event(DomainEvent),
}

fn lost(source: io::Error) -> HostError {
    HostError::Connection { source }
}
