//! `run` and `restore`: this process runs the virtual machine, or starts one that does.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde::Serialize;
use uuid::Uuid;

use super::Context;
use super::args::{RestoreArgs, RunArgs, WorkerArgs};
use super::confined::Kept;
use super::output::micros;
use crate::guests;
use crate::host::control::protocol::Status;
use crate::host::control::{ControlClient, ControlServer};
use crate::host::{
    BuiltinKernel, DiskRestore, Domain, DomainOptions, EndReason, Image, PeriodicCheckpoints,
    RestoreOptions, RuntimeDir, SharedMemory, TerminationSignals,
};

/// How long a detached domain may take until its control socket answers: restoring tens of
/// gigabytes from a slow disk takes minutes.
const DETACH_TIMEOUT: Duration = Duration::from_secs(600);

/// How often a domain's control socket is tried until it answers.
const ANSWER_POLL: Duration = Duration::from_millis(5);

/// Most bytes of a failed worker's log that are shown.
const LOG_TAIL_BYTES: usize = 2000;

#[derive(Serialize)]
pub(super) struct Started {
    name: String,
    uuid: Uuid,
    pid: u32,
    consoles: Vec<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    restore_us: Option<u64>,
}

impl Started {
    fn new(status: Status, restored_in: Option<Duration>) -> Self {
        Self {
            name: status.name,
            uuid: status.uuid,
            pid: status.pid,
            consoles: status.consoles,
            restore_us: restored_in.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
        }
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("Domain {} runs in process {}", self.name, self.pid);
        if let Some(us) = self.restore_us {
            text += &format!(" (restored in {})", micros(us));
        }
        for console in &self.consoles {
            text += &format!("\nConsole at {}", console.display());
        }
        text
    }
}

pub(super) fn run(context: &Context, args: &RunArgs) -> anyhow::Result<ExitCode> {
    let xml = read_xml(&args.xml)?;
    let (options, kept) = domain_options(context, &args.worker)?;
    if args.detach {
        let name = Domain::name_in(&xml).map_err(|error| error.in_file(&args.xml))?;
        let mut again = vec!["run".into(), args.xml.clone().into_os_string()];
        args.paused.then(|| again.push("--paused".into()));
        return detach(context, &name, again);
    }
    let signals = TerminationSignals::block().context("could not block signals")?;
    let domain = Domain::define(&xml, options).map_err(|error| error.in_file(&args.xml))?;
    let domain = Arc::new(domain);
    domain.start(args.paused)?;
    serve(context, &domain, None, &signals, &args.worker, kept)
}

pub(super) fn restore(context: &Context, args: &RestoreArgs) -> anyhow::Result<ExitCode> {
    let new_name = new_name(args)?;
    if args.detach {
        let name = match &new_name {
            Some(name) => name.clone(),
            None => Image::open(&args.image)?.name().to_owned(),
        };
        let mut again = vec!["restore".into(), args.image.clone().into_os_string()];
        args.restored.repeat_in(&mut again);
        args.lazy.then(|| again.push("--lazy".into()));
        if let Some(dir) = &args.disks {
            let dir = std::path::absolute(dir)?;
            again.extend(["--disks".into(), dir.into_os_string()]);
        }
        if let Some(xml) = &args.xml {
            again.extend(["--xml".into(), xml.clone().into_os_string()]);
        }
        if let Some(name) = new_name {
            again.extend(["--new-identity".into(), "--name".into(), name.into()]);
        }
        return detach(context, &name, again);
    }
    let signals = TerminationSignals::block().context("could not block signals")?;
    let start = Instant::now();
    let mut options = RestoreOptions::default();
    options.threads = args.restored.threads.unwrap_or(options.threads);
    options.clock = args.restored.clock.into();
    if let Some(dir) = &args.disks {
        options.disks = DiskRestore::NewIn(std::path::absolute(dir)?);
    }
    options.new_name = new_name;
    options.domain_xml = args.xml.as_deref().map(read_xml).transpose()?;
    options.track = args.restored.track;
    options.lazy = args.lazy;
    if let (Some(path), Some(root)) = (&args.shared_memory, &args.shared_root) {
        options.shared = Some(SharedMemory::open(path, root)?);
    }
    let (domain_options, kept) = domain_options(context, &args.worker)?;
    let domain = Domain::restore(&args.image, &options, domain_options)?;
    let domain = Arc::new(domain);
    domain.start(args.restored.paused)?;
    let restored_in = Some(start.elapsed());
    serve(context, &domain, restored_in, &signals, &args.worker, kept)
}

fn read_xml(file: &Path) -> anyhow::Result<String> {
    fs::read_to_string(file).with_context(|| format!("could not read {}", file.display()))
}

/// Returns the name of a domain that is to be another than the one that was saved.
fn new_name(args: &RestoreArgs) -> anyhow::Result<Option<String>> {
    if !args.new_identity {
        return Ok(None);
    }
    if args.name.is_some() {
        return Ok(args.name.clone());
    }
    let digits = Uuid::new_v4().simple().to_string();
    let image = Image::open(&args.image)?;
    Ok(Some(format!("{}-{}", image.name(), &digits[..8])))
}

fn domain_options(context: &Context, args: &WorkerArgs) -> anyhow::Result<(DomainOptions, Kept)> {
    let mut options = DomainOptions::new(context.runtime()?);
    let kept = Kept::new(context.runtime()?, args, &mut options)?;
    options.id = args.id;
    options.builtin_kernels = guests::ALL
        .iter()
        .map(|guest| BuiltinKernel {
            name: guest.name,
            elf: guest.elf,
        })
        .collect();
    #[cfg(feature = "qcow2")]
    {
        options.qcow2 = Some(&crate::qcow2::Qcow2Format);
    }
    Ok((options, kept))
}

/// Serves the control socket until the domain ends.
fn serve(
    context: &Context,
    domain: &Arc<Domain>,
    restored_in: Option<Duration>,
    signals: &TerminationSignals,
    args: &WorkerArgs,
    mut kept: Kept,
) -> anyhow::Result<ExitCode> {
    // Before anybody can ask for them.
    let _periodic = PeriodicCheckpoints::start(domain)?;
    let server = match kept.socket() {
        Some(socket) => ControlServer::start_at(domain.clone(), socket)?,
        None => {
            let socket = context.runtime()?.socket(domain.name())?;
            ControlServer::start(domain.clone(), &socket)?
        }
    };
    let started = Started::new(domain.status(), restored_in);
    announce(context, &started);
    {
        let domain = domain.clone();
        signals.on_signal(move || {
            log::warn!("asked to end: destroying the domain");
            // An error means that it has ended already.
            drop(domain.destroy());
        })?;
    }
    let end = domain.wait()?;
    if let (Some(file), Some(state)) = (&args.final_state, domain.final_state()) {
        kept.write_final_state(file, &state)?;
    }
    drop(server);
    Ok(match end {
        EndReason::Crashed(why) => {
            eprintln!("livepoint: domain {}: {why}", domain.name());
            ExitCode::FAILURE
        }
        EndReason::Shutoff(why) => {
            log::info!("domain {}: {why}", domain.name());
            ExitCode::SUCCESS
        }
    })
}

/// Says that the domain runs; on stderr, since stdout may be the guest's console.
fn announce(context: &Context, started: &Started) {
    if context.output.is_json() {
        context.output.print(started, |_| String::new());
        return;
    }
    eprintln!("{}", started.text());
}

/// Starts this program again in the background, and waits until the domain answers.
fn detach(
    context: &Context,
    name: &str,
    args: Vec<std::ffi::OsString>,
) -> anyhow::Result<ExitCode> {
    let started = Detached::spawn(context, name, args)?.answer(context)?;
    context.output.print(&started, Started::text);
    Ok(ExitCode::SUCCESS)
}

/// A domain's process that runs in the background.
pub(super) struct Detached {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Detached {
    /// Starts this program again with `args`, which have it run the domain `name`.
    pub(super) fn spawn(
        context: &Context,
        name: &str,
        args: Vec<std::ffi::OsString>,
    ) -> anyhow::Result<Self> {
        let log = context.runtime()?.path().join(format!("{name}.log"));
        let log_file =
            File::create(&log).with_context(|| format!("could not write {}", log.display()))?;
        let program = std::env::current_exe().context("could not find this program's own file")?;
        let child = std::process::Command::new(program)
            .arg("--runtime-dir")
            .arg(&context.runtime_dir)
            .args(args)
            .stdin(Stdio::null())
            .stdout(log_file.try_clone()?)
            .stderr(log_file)
            // A terminal's signals are not for the domain.
            .process_group(0)
            .spawn()
            .context("could not start the domain's process")?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log,
        })
    }

    /// Waits until the domain answers.
    pub(super) fn answer(mut self, context: &Context) -> anyhow::Result<Started> {
        let runtime = context.runtime()?;
        let child = &mut self.child;
        let mut client = wait_for(&runtime, &self.name, child, &self.log, DETACH_TIMEOUT)?;
        Ok(Started::new(client.status()?, None))
    }

    /// Ends the process.
    pub(super) fn kill(mut self) {
        // It may have ended by itself.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Waits until the process `child`, whose errors go to `log`, answers for the domain `name`.
pub(super) fn wait_for(
    runtime: &RuntimeDir,
    name: &str,
    child: &mut Child,
    log: &Path,
    timeout: Duration,
) -> anyhow::Result<ControlClient> {
    let start = Instant::now();
    loop {
        if let Ok(client) = ControlClient::connect(runtime, name)
            && client.greeting().pid == child.id()
        {
            return Ok(client);
        }
        if let Some(status) = child.try_wait()? {
            let said = fs::read_to_string(log).unwrap_or_default();
            let tail = said
                .get(said.len().saturating_sub(LOG_TAIL_BYTES)..)
                .unwrap_or(&said);
            bail!("the domain's process ended with {status}: {}", tail.trim());
        }
        if start.elapsed() > timeout {
            bail!(
                "process {} did not answer for {} s; its log is {}",
                child.id(),
                timeout.as_secs(),
                log.display()
            );
        }
        std::thread::sleep(ANSWER_POLL);
    }
}
