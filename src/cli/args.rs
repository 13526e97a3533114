//! The command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use serde::Serialize;

use crate::host::confine::Forbidden;
use crate::host::{ClockPolicy, Protocol, RuntimeDir};

/// Runs KVM virtual machines and saves them while they keep running.
#[derive(Debug, Parser)]
#[command(name = "livepoint", version)]
pub(super) struct Arguments {
    /// Print one JSON object on stdout instead of text.
    #[arg(long, global = true)]
    pub json: bool,

    /// Directory of control sockets [default: /run/livepoint, or the user's own].
    #[arg(long, global = true, value_name = "DIR", env = "LIVEPOINT_RUNTIME_DIR")]
    runtime_dir: Option<PathBuf>,

    /// Say more on stderr; twice for everything.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    verbose: u8,

    #[command(subcommand)]
    pub command: Command,
}

impl Arguments {
    pub fn log_level(&self) -> log::LevelFilter {
        match self.verbose {
            0 => log::LevelFilter::Warn,
            1 => log::LevelFilter::Info,
            _ => log::LevelFilter::Debug,
        }
    }

    pub fn runtime_dir(&self) -> PathBuf {
        self.runtime_dir
            .clone()
            .unwrap_or_else(RuntimeDir::default_path)
    }
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Runs the virtual machine that a domain XML file describes.
    Run(RunArgs),
    /// Saves a running domain while it keeps running.
    Checkpoint(CheckpointArgs),
    /// Runs a virtual machine from an image.
    Restore(RestoreArgs),
    /// Runs several virtual machines from one image, which share its memory until they write it.
    Clone(CloneArgs),
    /// Puts a running domain back to an image, in place.
    Rewind(RewindArgs),
    /// Lists the running domains.
    List,
    /// Shows one running domain.
    Status(NameArg),
    /// Prints a running domain's XML.
    Dumpxml(NameArg),
    /// Stops a domain's vCPUs until `resume`.
    Pause(NameArg),
    /// Lets a paused domain run on.
    Resume(NameArg),
    /// Presses a domain's power button.
    Shutdown(NameArg),
    /// Resets a domain, as its reset button would.
    Reset(NameArg),
    /// Ends a domain at once, as pulling its plug would.
    Destroy(NameArg),
    /// Shows what an image holds; reads its manifest only.
    Inspect(InspectArgs),
    /// Checks every digest of an image.
    Verify(ImageArg),
    /// Writes an image that holds the same as another and needs no other.
    Rebase(RebaseArgs),
    /// Removes old images from a directory, as far as newer ones do not need them.
    Gc(GcArgs),
    /// Lists the guests that are built in, or writes them to a directory.
    Guests(GuestsArgs),
    /// Checkpoints a running computation live, kills it, restores it, and compares protocols.
    Demo(DemoArgs),
    /// Measures what checkpoints cost on this machine, protocol by protocol.
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Domain XML file.
    pub xml: PathBuf,
    /// Do not let the vCPUs start; `resume` does.
    #[arg(long)]
    pub paused: bool,
    /// Return once the domain runs, and leave it running in the background.
    #[arg(long)]
    pub detach: bool,
    #[command(flatten)]
    pub worker: WorkerArgs,
}

/// What a daemon gives the process of a domain.
#[derive(Debug, Args)]
pub(super) struct WorkerArgs {
    /// The domain's number among those that run.
    #[arg(long, hide = true, value_name = "N")]
    pub id: Option<u32>,
    /// File that is written when the domain has ended, and says how, as JSON.
    #[arg(long, hide = true, value_name = "FILE", conflicts_with = "detach")]
    pub final_state: Option<PathBuf>,
    /// What becomes of system calls that no part of a machine makes [default: all can be made].
    #[arg(long, value_enum, value_name = "WHAT", conflicts_with = "detach")]
    pub seccomp: Option<SeccompArg>,
    /// Let the process open only files that the domain names (Landlock).
    #[arg(long, conflicts_with = "detach")]
    pub landlock: bool,
    /// With --landlock: directory that images may be written to; may be repeated.
    #[arg(long, value_name = "DIR", requires = "landlock")]
    pub image_dir: Vec<PathBuf>,
    /// Run as this user, by name or number, once the machine's files are open; for root.
    #[arg(long, value_name = "USER", conflicts_with = "detach")]
    pub user: Option<String>,
}

/// What becomes of system calls that no part of a machine makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum SeccompArg {
    /// They fail, as on a kernel that does not have them.
    Refuse,
    /// The process is killed.
    Kill,
    /// They are made, and the kernel's audit log tells of them.
    Log,
}

impl From<SeccompArg> for Forbidden {
    fn from(arg: SeccompArg) -> Self {
        match arg {
            SeccompArg::Refuse => Self::Refuse,
            SeccompArg::Kill => Self::Kill,
            SeccompArg::Log => Self::Log,
        }
    }
}

/// How a domain goes on from an image.
#[derive(Debug, Args)]
pub(super) struct RestoredArgs {
    /// Do not let the vCPUs start; `resume` does.
    #[arg(long)]
    pub paused: bool,
    /// Threads that read and check the image [default: one a core, 8 at most].
    #[arg(long)]
    pub threads: Option<usize>,
    /// What becomes of the time since the checkpoint.
    #[arg(long, value_enum, default_value_t = ClockArg::Continue)]
    pub clock: ClockArg,
    /// Track the guest's writes from the first one on, so that `checkpoint --incremental` has
    /// only what was written since the image.
    #[arg(long)]
    pub track: bool,
}

impl RestoredArgs {
    /// Adds to the arguments of another process what has it do the same.
    pub(super) fn repeat_in(&self, again: &mut Vec<OsString>) {
        self.paused.then(|| again.push("--paused".into()));
        self.track.then(|| again.push("--track".into()));
        if let Some(threads) = self.threads {
            again.extend(["--threads".into(), threads.to_string().into()]);
        }
        if self.clock == ClockArg::Realtime {
            again.extend(["--clock".into(), "realtime".into()]);
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct RestoreArgs {
    /// Image file, or a directory: then its newest image.
    pub image: PathBuf,
    #[command(flatten)]
    pub restored: RestoredArgs,
    /// Return once the domain runs, and leave it running in the background.
    #[arg(long)]
    pub detach: bool,
    /// Write the image's disks to new files in this directory, NAME.raw or NAME.qcow2 as they were,
    /// which the domain then uses [default: to where they were: what was written since is lost].
    #[arg(long, value_name = "DIR")]
    pub disks: Option<PathBuf>,
    /// Restore by this domain XML: of the same domain and machine, whose disks, consoles and networks
    /// may be elsewhere on the host [default: the image's].
    #[arg(long, value_name = "FILE")]
    pub xml: Option<PathBuf>,
    /// Give the domain a new UUID and another name, so that several can run from one image.
    #[arg(long)]
    pub new_identity: bool,
    /// The other name [default: the old one and some digits].
    #[arg(long, requires = "new_identity")]
    pub name: Option<String>,
    /// Let the guest run at once: its memory comes as it is touched, and in the background.
    #[arg(long)]
    pub lazy: bool,
    /// Where the process that started this one has the image's memory.
    #[arg(
        long,
        hide = true,
        value_name = "PATH",
        requires = "shared_root",
        conflicts_with = "detach"
    )]
    pub shared_memory: Option<PathBuf>,
    /// Root digest of the image whose memory that is.
    #[arg(long, hide = true, value_name = "DIGEST")]
    pub shared_root: Option<String>,
    #[command(flatten)]
    pub worker: WorkerArgs,
}

/// Most domains that are started from an image by one command.
const CLONES_MAX: i64 = 256;

#[derive(Debug, Args)]
pub(super) struct CloneArgs {
    /// Image file, or a directory: then its newest image.
    pub image: PathBuf,
    /// How many domains to start.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=CLONES_MAX))]
    pub count: u32,
    /// What the domains are called, with -1, -2 and so on behind it [default: as the one saved].
    #[arg(long)]
    pub name: Option<String>,
    #[command(flatten)]
    pub restored: RestoredArgs,
    /// Write the image's disks to new files for each domain, in a directory of its name in this
    /// one. Needed where the image has disks.
    #[arg(long, value_name = "DIR")]
    pub disks: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ClockArg {
    /// The guest's clocks go on where they stopped.
    Continue,
    /// The guest's clocks are moved on to now.
    Realtime,
}

impl From<ClockArg> for ClockPolicy {
    fn from(arg: ClockArg) -> Self {
        match arg {
            ClockArg::Continue => Self::Continue,
            ClockArg::Realtime => Self::Realtime,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct NameArg {
    /// Name of the domain.
    pub name: String,
}

#[derive(Debug, Args)]
pub(super) struct RewindArgs {
    /// Name of the domain.
    pub name: String,
    /// Image file, or a directory: then its newest image [default: the domain's last incremental
    /// checkpoint].
    #[arg(long, value_name = "IMAGE")]
    pub to: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ImageArg {
    /// Image file, or a directory: then its newest image.
    pub image: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct RebaseArgs {
    /// Image file, or a directory: then its newest image.
    pub image: PathBuf,
    /// Image file to write, or a directory to add the image to.
    #[arg(long, value_name = "PATH")]
    pub out: PathBuf,
    /// Compression of the memory: none, lz4, or zstd with an optional level (zstd:3).
    #[arg(long, default_value = "lz4")]
    pub codec: String,
}

#[derive(Debug, Args)]
pub(super) struct GcArgs {
    /// Directory of images.
    pub directory: PathBuf,
    /// How many images of each domain to keep, the newest.
    #[arg(long)]
    pub keep: u32,
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// Image file, or a directory: then its newest image.
    pub image: PathBuf,
    /// Print the whole manifest, as JSON.
    #[arg(long)]
    pub manifest: bool,
    /// Say what this host lacks to run the image.
    #[arg(long)]
    pub check_host: bool,
}

#[derive(Debug, Args)]
pub(super) struct CheckpointArgs {
    /// Name of the domain.
    pub name: String,
    /// How to capture memory.
    #[arg(long, value_enum, default_value_t = ProtocolArg::Threaded)]
    pub protocol: ProtocolArg,
    /// Image file to write, or a directory to add an image to
    /// [default: a directory of the domain's own below /var/lib/livepoint/checkpoints].
    #[arg(long, value_name = "PATH")]
    pub out: Option<PathBuf>,
    /// Compression of the memory: none, lz4, or zstd with an optional level (zstd:3).
    #[arg(long, default_value = "lz4")]
    pub codec: String,
    /// Threads that copy and write memory [default: one a core, 8 at most].
    #[arg(long)]
    pub threads: Option<usize>,
    /// Milliseconds between two harvests of dirty pages (threaded).
    #[arg(long, value_name = "MS")]
    pub interval: Option<u64>,
    /// Most memory for staged copies, as in 512M [default: 10 % of the guest's, 64 MiB at least].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_staging: Option<u64>,
    /// Longest acceptable downtime, as in 5ms; refused or failed where it cannot be kept.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub max_downtime: Option<Duration>,
    /// How long the checkpoint may take, as in 30s; refused where it is expected to take longer.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub deadline: Option<Duration>,
    /// Most bytes a second to write to the image, as in 200M [default: no limit].
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_bandwidth: Option<u64>,
    /// How long a pause may show no sign of life before the guest is let go and the checkpoint
    /// given up, as in 10s; a writer waits three quarters of it at most (cow) [default: 1s].
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub pause_limit: Option<Duration>,
    /// Microseconds that the last copy in the pause should take at most (threaded).
    #[arg(long, value_name = "US")]
    pub downtime_budget: Option<u64>,
    /// A file in the image's directory to give up and write over: faster than a new one.
    #[arg(long, value_name = "FILE")]
    pub spare: Option<PathBuf>,
    /// Do not wait until the image is on stable storage: a power cut may lose it.
    #[arg(long)]
    pub no_sync: bool,
    /// Write only what was written since the last incremental image in the same directory, and
    /// track the guest's writes from now on. The first such image is whole.
    #[arg(long)]
    pub incremental: bool,
    /// How many of the domain's images to keep in the directory: older ones are removed once the
    /// new one is whole, as far as the kept ones do not need them.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep: Option<u32>,
    /// Take incremental checkpoints at this interval, as in 5s, until the domain ends.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    pub every: Option<Duration>,
    /// Take no more than so many.
    #[arg(long, value_name = "N", requires = "every")]
    pub count: Option<u64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ProtocolArg {
    /// Pause, write everything, resume: the traditional way.
    Stop,
    /// Copy in rounds until the rest fits the downtime: live migration to a file.
    Precopy,
    /// Copy while the guest runs; pause only for the last dirty pages.
    Threaded,
    /// Pause to write-protect memory; copy each part before its first write.
    Cow,
    /// Threaded or cow, whichever is expected to cost the guest less.
    Auto,
}

impl From<ProtocolArg> for Protocol {
    fn from(arg: ProtocolArg) -> Self {
        match arg {
            ProtocolArg::Stop => Self::Stop,
            ProtocolArg::Precopy => Self::Precopy,
            ProtocolArg::Threaded => Self::Threaded,
            ProtocolArg::Cow => Self::Cow,
            ProtocolArg::Auto => Self::Auto,
        }
    }
}

#[derive(Debug, Args)]
pub(super) struct GuestsArgs {
    /// Write each as an ELF file into this directory.
    #[arg(long, value_name = "DIR")]
    pub extract: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Domain XML file to run [default: the NPB guest, MG, 1 GiB].
    #[arg(long, value_name = "FILE")]
    pub domain: Option<PathBuf>,
    /// NPB kernel to compute.
    #[arg(long, default_value = "mg")]
    pub kernel: String,
    /// NPB problem class: S, W, A or B.
    #[arg(long, default_value = "B")]
    pub class: String,
    /// Runs of the kernel, one after the other in one guest.
    #[arg(long)]
    pub repeat: Option<u32>,
    /// Directory for the images [default: a temporary one, removed at the end].
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// What to measure; may be given several times [default: everything].
    #[arg(long, value_enum, value_name = "NAME")]
    pub suite: Vec<Suite>,
    /// Protocols to measure, as in stop,threaded [default: all].
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub protocols: Vec<Protocol>,
    /// Runs; in each, all that is compared takes turns.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Directory for images on disk: its disk is what is measured.
    #[arg(long, value_name = "DIR", default_value = ".")]
    pub images: PathBuf,
    /// Directory for images in memory.
    #[arg(long, value_name = "DIR", default_value = "/dev/shm")]
    pub shm: PathBuf,
    /// Directory for report.md, report.json and the plots [default: none are written].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Guest memory (downtime, lost-work, full, contract, npb).
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1G")]
    pub memory: u64,
    /// Sizes of guest memory to compare (sizes).
    #[arg(
        long,
        value_name = "SIZE,..",
        value_parser = parse_size,
        value_delimiter = ',',
        default_value = "256M,1G,4G"
    )]
    pub sizes: Vec<u64>,
    /// Share of memory that the guest rewrites all the time, in percent (downtime).
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=90))]
    pub working_set: u32,
    /// Set up the host's pool of huge pages where it is too small, and restore it (sizes).
    #[arg(long)]
    pub hugetlb: bool,
    /// Another program to measure beside, in all its ways or in one (lost-work).
    #[arg(long, value_enum, value_name = "NAME,..", value_delimiter = ',')]
    pub peer: Vec<Peer>,
    /// Places for images, as in disk,shm [default: all] (lost-work, npb).
    #[arg(long, value_enum, value_name = "NAME,..", value_delimiter = ',')]
    pub targets: Vec<TargetName>,
    /// Pages that the guest maps its memory in (lost-work).
    #[arg(long, value_enum, value_name = "SIZE", default_value = "2m")]
    pub guest_pages: GuestPages,
    /// NPB kernels to compute, as in cg,mg [default: all that the guest has] (npb).
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub kernels: Vec<String>,
    /// NPB problem class: S, W, A, B or C (npb).
    #[arg(long, default_value = "A")]
    pub class: String,
}

/// A part of the benchmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Suite {
    /// Downtime of each protocol, beside a plain write.
    Downtime,
    /// Downtime of live protocols on memory of several sizes and kinds.
    Sizes,
    /// Work that the guest loses to a checkpoint.
    LostWork,
    /// A whole checkpoint, beside copying, hashing and writing the same bytes.
    Full,
    /// Promises, each asked of each protocol: kept, refused or broken.
    Contract,
    /// Increments after a little of memory was written, beside whole checkpoints.
    Increments,
    /// Lazy restore beside an eager one: first output, and the total of a computation.
    Lazy,
    /// A guest put back in place, beside an eager restore.
    Rewind,
    /// NAS Parallel Benchmarks with a checkpoint on the way.
    Npb,
}

/// A program that saves virtual machines too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Peer {
    /// qemu-system-x86_64, in each of its ways to save a machine.
    Qemu,
    /// Stop, migrate to a file, continue.
    QemuStop,
    /// Migrate to a file while the guest runs, then continue.
    QemuLive,
    /// The same, with a fixed place in the file for each page and several threads.
    QemuLiveMappedRam,
    /// Copy on write, by userfaultfd.
    QemuBackgroundSnapshot,
}

/// Where an image goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum TargetName {
    /// The directory of `--images`.
    Disk,
    /// The directory of `--shm`.
    Shm,
    /// The directory of `--images`, written with 500 MB/s at most.
    #[value(name = "disk-500")]
    HeldDisk,
}

/// Pages of a guest's page tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
pub(super) enum GuestPages {
    /// Of 4 KiB.
    #[value(name = "4k")]
    #[serde(rename = "4k")]
    Small,
    /// Of 2 MiB.
    #[value(name = "2m")]
    #[serde(rename = "2m")]
    Huge,
}

impl GuestPages {
    /// Returns the guest's own name for them.
    pub fn name(self) -> &'static str {
        match self {
            Self::Small => "4k",
            Self::Huge => "2m",
        }
    }
}

/// Parses a length of time such as 5ms or 1.5s.
fn parse_time(text: &str) -> Result<Duration, String> {
    let time: jiff::SignedDuration = text
        .parse()
        .map_err(|_| format!("{text:?} is not a time such as 5ms"))?;
    Duration::try_from(time).map_err(|_| format!("{text:?} is negative"))
}

/// Parses a size in bytes with an optional binary suffix: K, M, G or T.
fn parse_size(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.chars().last().map(|last| last.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        Some('T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("{text:?} is not a size such as 512M"))?;
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| format!("{text:?} is too large"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn times_take_units() {
        assert_eq!(parse_time("5ms"), Ok(Duration::from_millis(5)));
        assert_eq!(parse_time("1.5s"), Ok(Duration::from_millis(1500)));
        assert!(parse_time("5").is_err());
        assert!(parse_time("-5ms").is_err());
    }

    #[test]
    fn sizes_take_binary_suffixes() {
        assert_eq!(parse_size("512"), Ok(512));
        assert_eq!(parse_size("64m"), Ok(64 << 20));
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert!(parse_size("").is_err());
        assert!(parse_size("G").is_err());
        assert!(parse_size("1X").is_err());
        assert!(parse_size("99999999999T").is_err());
    }
}
