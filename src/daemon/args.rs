//! The command line of livepointd.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};

use super::guests;
use super::paths::Paths;
use super::worker::Confinement;
use crate::host::RuntimeDir;
use crate::host::confine::User;

/// Runs domains for libvirt's clients: virsh -c livepoint:///system.
#[derive(Debug, Parser)]
#[command(name = "livepointd", version)]
pub(super) struct Arguments {
    /// Directory of definitions [default: /etc/livepoint, or the user's own].
    #[arg(long, value_name = "DIR")]
    config_dir: Option<PathBuf>,
    /// Directory of snapshots, managed saves and logs [default: /var/lib/livepoint, or the user's].
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Directory of the domains' control sockets [default: /run/livepoint, or the user's own].
    #[arg(long, value_name = "DIR", env = "LIVEPOINT_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,
    /// Socket for clients; may be repeated [default: where libvirt's clients look].
    #[arg(long, value_name = "PATH")]
    pub(super) socket: Vec<PathBuf>,
    /// Socket for clients that may change nothing; may be repeated.
    #[arg(long, value_name = "PATH")]
    pub(super) socket_ro: Vec<PathBuf>,
    /// Group that the sockets belong to.
    #[arg(long, value_name = "NAME")]
    pub(super) group: Option<String>,
    /// Mode of the sockets, in octal.
    #[arg(long, value_name = "MODE", default_value = "0600", value_parser = parse_mode)]
    pub(super) mode: u32,
    /// Mode of the read-only sockets, in octal.
    #[arg(long, value_name = "MODE", default_value = "0666", value_parser = parse_mode)]
    pub(super) mode_ro: u32,
    /// End after so many seconds without a client and without a running domain.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
    /// Program that runs a domain [default: livepoint, beside this program].
    #[arg(long, value_name = "FILE")]
    worker: Option<PathBuf>,
    /// What becomes of system calls that no part of a machine makes, in a domain's process.
    #[arg(long, value_enum, value_name = "WHAT", default_value_t = Seccomp::Refuse)]
    seccomp: Seccomp,
    /// Let a domain's process open all files that its user may, not only those of the domain.
    #[arg(long)]
    no_landlock: bool,
    /// Directory that domains' processes may write images to themselves; may be repeated. To
    /// others, images are moved once they are whole.
    #[arg(long, value_name = "DIR")]
    image_dir: Vec<PathBuf>,
    /// User, by name or number, that domains' processes run as once their files are open [default:
    /// the daemon's own].
    #[arg(long, value_name = "USER")]
    worker_user: Option<String>,
    /// Say more on stderr; twice for everything.
    #[arg(short, long, action = clap::ArgAction::Count)]
    verbose: u8,
    #[command(subcommand)]
    pub(super) command: Option<guests::Command>,
}

/// What becomes of system calls that no part of a machine makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Seccomp {
    /// They fail, as on a kernel that does not have them.
    Refuse,
    /// The process is killed.
    Kill,
    /// They are made, and the kernel's audit log tells of them.
    Log,
    /// All can be made.
    Off,
}

fn parse_mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("an octal mode, as in 0660".to_owned()),
    }
}

impl Arguments {
    pub(super) fn log_level(&self) -> log::LevelFilter {
        match self.verbose {
            0 => log::LevelFilter::Warn,
            1 => log::LevelFilter::Info,
            _ => log::LevelFilter::Debug,
        }
    }

    pub(super) fn timeout(&self) -> Option<Duration> {
        self.timeout.map(Duration::from_secs)
    }

    /// Returns the directories, some of which depend on who runs the daemon.
    pub(super) fn paths(&self) -> anyhow::Result<Paths> {
        let default = |given: &Option<PathBuf>, system: &str, own: &str| {
            if let Some(given) = given {
                return std::path::absolute(given).context("could not find the current directory");
            }
            if is_root() {
                return Ok(PathBuf::from(system));
            }
            let home = std::env::home_dir().context("no home directory")?;
            Ok(home.join(own))
        };
        let runtime = self
            .runtime_dir
            .clone()
            .unwrap_or_else(RuntimeDir::default_path);
        Ok(Paths {
            config: default(&self.config_dir, "/etc/livepoint", ".config/livepoint")?,
            state: default(
                &self.state_dir,
                "/var/lib/livepoint",
                ".local/state/livepoint",
            )?,
            runtime: RuntimeDir::at(std::path::absolute(runtime)?)?,
        })
    }

    /// Returns how domains' processes are confined.
    pub(super) fn confinement(&self) -> anyhow::Result<Confinement> {
        let user = self.worker_user.as_deref();
        let absolute = |dir: &PathBuf| -> anyhow::Result<PathBuf> {
            let dir = std::path::absolute(dir)?;
            anyhow::ensure!(dir.is_dir(), "{} is not a directory", dir.display());
            Ok(dir)
        };
        let image_dirs = self.image_dir.iter().map(absolute);
        Ok(Confinement {
            seccomp: match self.seccomp {
                Seccomp::Refuse => Some("refuse"),
                Seccomp::Kill => Some("kill"),
                Seccomp::Log => Some("log"),
                Seccomp::Off => None,
            },
            landlock: !self.no_landlock,
            image_dirs: image_dirs
                .collect::<anyhow::Result<_>>()
                .context("--image-dir")?,
            user: user.map(User::named).transpose().context("--worker-user")?,
        })
    }

    /// Returns the program that runs domains.
    pub(super) fn worker(&self) -> anyhow::Result<PathBuf> {
        if let Some(worker) = &self.worker {
            return Ok(worker.clone());
        }
        let own = std::env::current_exe().context("could not find this program's own file")?;
        Ok(own.with_file_name("livepoint"))
    }
}

pub(super) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
