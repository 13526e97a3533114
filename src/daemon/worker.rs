//! Workers: the process of each running domain, started here, and found again after a restart.

use std::ffi::OsString;
use std::fs::{self, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::error::{DaemonError, failed};
use super::paths::{Paths, file_name, write_whole};
use super::state::Running;
use super::systemd;
use crate::host::confine::User;
use crate::host::control::ControlClient;
use crate::host::control::protocol::Method;
use crate::host::{DomainConfig, FinalState, LockFile, RuntimeDir, XmlView};
use crate::rpc::{Code, RpcError};

/// How long a worker may take until it answers: restoring tens of gigabytes takes minutes.
const START_TIMEOUT: Duration = Duration::from_secs(600);
/// How often a worker is tried until it answers.
const ANSWER_POLL: Duration = Duration::from_millis(5);
/// How long a call of a worker may take that does not wait for the guest's memory to be copied.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// Most bytes of a failed worker's log that a client is shown.
const LOG_TAIL_BYTES: u64 = 2000;

/// What a daemon leaves for the next one about a worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) id: u32,
    /// Why it runs.
    pub(super) why: Running,
}

/// What a worker is to run.
#[derive(Debug)]
pub(super) enum Boot<'a> {
    /// A machine from the start.
    Fresh(&'a DomainConfig),
    /// The machine of an image.
    Image(&'a Path),
    /// The machine of an image, by another document than the image's.
    ImageAs(&'a Path, &'a DomainConfig),
}

/// How to start workers.
#[derive(Clone, Debug)]
pub(super) struct Launcher {
    pub(super) program: PathBuf,
    pub(super) paths: Paths,
    /// Whether each worker gets a scope of its own from systemd.
    pub(super) in_scopes: bool,
    /// What each worker is kept from.
    pub(super) confinement: Confinement,
}

/// How workers are confined; docs/libvirt.md says what it means.
#[derive(Clone, Debug, Default)]
pub(super) struct Confinement {
    /// `--seccomp` of the worker.
    pub(super) seccomp: Option<&'static str>,
    pub(super) landlock: bool,
    /// Directories that workers may write images to, besides their own.
    pub(super) image_dirs: Vec<PathBuf>,
    pub(super) user: Option<User>,
}

impl Confinement {
    /// Returns whether a worker may be unable to write a file itself.
    pub(super) fn keeps_from(&self, file: &Path) -> bool {
        let is_allowed = |dir: &PathBuf| file.starts_with(dir);
        // Whatever confines it, it has no capability to write where only others may.
        let is_confined = self.landlock || self.user.is_some() || self.seccomp.is_some();
        is_confined && !self.image_dirs.iter().any(is_allowed)
    }

    /// Returns a worker's arguments.
    fn args(&self, outbox: &Path) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        if let Some(seccomp) = self.seccomp {
            args.extend(["--seccomp".into(), seccomp.into()]);
        }
        if self.landlock {
            args.push("--landlock".into());
            let own = outbox.to_owned();
            for dir in self.image_dirs.iter().chain([&own]) {
                args.extend(["--image-dir".into(), dir.into()]);
            }
        }
        if let Some(user) = &self.user {
            args.extend(["--user".into(), user.uid().to_string().into()]);
        }
        args
    }
}

impl Launcher {
    /// Starts a worker for the domain, and waits until it answers. `None`: it has ended again.
    pub(super) fn start(
        &self,
        uuid: Uuid,
        name: &str,
        record: &Record,
        boot: &Boot<'_>,
        paused: bool,
    ) -> Result<(Child, Option<ControlClient>), RpcError> {
        let paths = &self.paths;
        let final_state = paths.worker(uuid, "final");
        super::paths::remove(&final_state)?;
        let json = serde_json::to_vec(record).expect("a record is plain data");
        write_whole(&paths.worker(uuid, "json"), &json)?;
        let mut args: Vec<OsString> = match boot {
            Boot::Fresh(config) => vec!["run".into(), write_xml(paths, uuid, config)?],
            Boot::Image(image) => vec!["restore".into(), image.as_os_str().to_owned()],
            Boot::ImageAs(image, config) => vec![
                "restore".into(),
                image.as_os_str().to_owned(),
                "--xml".into(),
                write_xml(paths, uuid, config)?,
            ],
        };
        args.extend(["--id".into(), record.id.to_string().into()]);
        args.extend(["--final-state".into(), final_state.into()]);
        paused.then(|| args.push("--paused".into()));
        let user = self.confinement.user.as_ref();
        let outbox = super::outbox::prepare(paths, uuid, user)?;
        args.extend(self.confinement.args(&outbox));
        let log = paths.logs().join(format!(
            "{}.log",
            file_name(name).unwrap_or_else(|| uuid.to_string())
        ));
        let (mut child, log_start) = self.spawn(uuid, name, &args, &log)?;
        let client = wait_for(&paths.runtime, name, &mut child, || tail(&log, log_start))?;
        Ok((child, client))
    }

    fn spawn(
        &self,
        uuid: Uuid,
        name: &str,
        args: &[OsString],
        log: &Path,
    ) -> Result<(Child, u64), RpcError> {
        let failed = |source| DaemonError::path("open the log", log, source);
        let mut options = OpenOptions::new();
        let mut file = options
            .create(true)
            .append(true)
            .open(log)
            .map_err(failed)?;
        let start = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let mut command = if self.in_scopes {
            // It registers the scope and then becomes the worker, with the same process id.
            let mut command = Command::new("systemd-run");
            command.args(["--scope", "--quiet", "--collect", "--slice=machine.slice"]);
            // Another name each time: systemd refuses one that it still knows, be it of a process that
            // has only just ended, or because somebody has set a property of that.
            let start = Uuid::new_v4().simple().to_string();
            let start = start.get(..8).unwrap_or_default();
            command.arg(format!("--unit=livepoint-{uuid}-{start}"));
            command.arg(format!("--description=Virtual machine {name}"));
            // So that guests are saved before their processes are ended, when the host shuts down.
            command.arg("--property=Before=livepoint-guests.service");
            command.arg("--").arg(&self.program);
            command
        } else {
            Command::new(&self.program)
        };
        for variable in systemd::VARIABLES {
            command.env_remove(variable);
        }
        let child = command
            .arg("--runtime-dir")
            .arg(self.paths.runtime.path())
            .args(args)
            .stdin(Stdio::null())
            .stdout(file.try_clone().map_err(failed)?)
            .stderr(file)
            // Signals for the daemon's terminal are not for the domain.
            .process_group(0)
            .spawn()
            .map_err(|source| {
                DaemonError::path("start the domain's process by", &self.program, source)
            })?;
        Ok((child, start))
    }
}

/// Writes what a worker is to run; returns the file.
fn write_xml(paths: &Paths, uuid: Uuid, config: &DomainConfig) -> Result<OsString, DaemonError> {
    let xml = paths.worker(uuid, "xml");
    write_whole(&xml, config.to_xml(XmlView::Inactive).as_bytes())?;
    Ok(xml.into())
}

/// Waits until a new worker answers; `None` where its machine has run and ended already.
fn wait_for(
    runtime: &RuntimeDir,
    name: &str,
    child: &mut Child,
    said: impl Fn() -> String,
) -> Result<Option<ControlClient>, RpcError> {
    let start = Instant::now();
    loop {
        if let Ok(client) = ControlClient::connect(runtime, name)
            && client.greeting().pid == child.id()
        {
            client
                .set_timeout(Some(CALL_TIMEOUT))
                .map_err(|error| failed(&error))?;
            return Ok(Some(client));
        }
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(None),
            Ok(Some(status)) => {
                let said = said();
                let why = said.trim().trim_start_matches("livepoint: ");
                return Err(RpcError::new(
                    Code::OperationFailed,
                    if why.is_empty() {
                        format!("the domain's process ended with {status}")
                    } else {
                        why.to_owned()
                    },
                ));
            }
            _ => {}
        }
        if start.elapsed() > START_TIMEOUT {
            end(child);
            return Err(RpcError::new(
                Code::OperationTimeout,
                "the domain's process did not answer",
            ));
        }
        thread::sleep(ANSWER_POLL);
    }
}

fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        log::warn!("could not end process {}: {error}", child.id());
    }
}

fn tail(log: &Path, start: u64) -> String {
    let read = || -> std::io::Result<String> {
        let mut file = fs::File::open(log)?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(
            start.max(end.saturating_sub(LOG_TAIL_BYTES)),
        ))?;
        let mut bytes = Vec::new();
        file.take(LOG_TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    read().unwrap_or_default()
}

/// Connects to a running worker.
pub(super) fn connect(paths: &Paths, name: &str) -> Result<ControlClient, RpcError> {
    let client = ControlClient::connect(&paths.runtime, name).map_err(|error| failed(&error))?;
    client
        .set_timeout(Some(CALL_TIMEOUT))
        .map_err(|error| failed(&error))?;
    Ok(client)
}

/// Makes a call of a worker whose answer carries nothing.
pub(super) fn run(paths: &Paths, name: &str, method: Method) -> Result<(), RpcError> {
    let mut client = connect(paths, name)?;
    client.run(method).map_err(|error| failed(&error))
}

/// A process that is nobody's child here: one of a daemon before this one, or its own.
#[derive(Debug)]
pub(super) struct Process {
    pidfd: Option<OwnedFd>,
    child: Option<Child>,
}

impl Process {
    /// Takes hold of a process. One that is gone already is held as such.
    pub(super) fn new(pid: u32, child: Option<Child>) -> Self {
        let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        Self { pidfd, child }
    }

    /// Waits until it has ended; tells whether it has.
    pub(super) fn wait(&mut self, timeout: Duration) -> bool {
        let ended = self.pidfd.as_ref().is_none_or(|pidfd| {
            let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
            let timeout = Timespec::try_from(timeout).unwrap_or_default();
            poll(&mut fds, Some(&timeout)).is_ok_and(|ready| ready > 0)
        });
        if ended && let Some(child) = &mut self.child {
            // Takes its exit status, so that no zombie stays.
            if let Err(error) = child.wait() {
                log::warn!("could not wait for process {}: {error}", child.id());
            }
            self.child = None;
        }
        ended
    }

    /// Ends it at once.
    pub(super) fn kill(&self) {
        if let Some(pidfd) = &self.pidfd
            && let Err(error) = pidfd_send_signal(pidfd, Signal::KILL)
        {
            log::debug!("could not kill a worker: {error}");
        }
    }
}

/// Removes the control socket of a worker that has ended and could not do so itself.
pub(super) fn remove_socket(paths: &Paths, name: &str) {
    let Ok(socket) = paths.runtime.socket(name) else {
        return;
    };
    if !socket.exists() {
        return;
    }
    // Whoever has the name now has a socket of their own there.
    let lock = LockFile::acquire(&paths.runtime.name_lock(name), "the name");
    if lock.is_ok()
        && let Err(error) = fs::remove_file(&socket)
    {
        log::debug!("{}: {error}", socket.display());
    }
}

/// Reads what a worker left when it ended.
pub(super) fn read_final_state(paths: &Paths, uuid: Uuid) -> Option<FinalState> {
    let json = fs::read(paths.worker(uuid, "final")).ok()?;
    serde_json::from_slice(&json).ok()
}

/// Reads what an earlier daemon, or this one, noted of a worker.
pub(super) fn read_record(paths: &Paths, uuid: Uuid) -> Option<Record> {
    let json = fs::read(paths.worker(uuid, "json")).ok()?;
    serde_json::from_slice(&json).ok()
}

/// Removes what is known of a worker that has ended.
pub(super) fn forget(paths: &Paths, uuid: Uuid) {
    for ending in ["final", "json", "xml"] {
        if let Err(error) = super::paths::remove(&paths.worker(uuid, ending)) {
            log::warn!("{error}");
        }
    }
}
