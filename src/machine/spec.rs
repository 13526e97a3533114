//! What a machine is made from.
//!
//! Plain data, without names of libvirt's: [`crate::host`] makes it from a domain.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use crate::guest::ImageFormat;
use crate::kvmstate::ClockPolicy;
use crate::sys::frozen::FrozenMemory;

/// Everything that a machine is made from.
#[derive(Clone, Debug)]
pub struct MachineSpec {
    /// The domain's name; for descriptions only.
    pub name: String,
    /// The domain's UUID; for descriptions only.
    pub uuid: Uuid,
    /// The domain XML that this was made from; for descriptions only.
    pub domain_xml: String,
    /// Guest memory.
    pub memory: MemorySpec,
    /// vCPUs and what they offer.
    pub cpu: CpuSpec,
    /// What the guest starts with. A restored machine needs it only to start over on a reset.
    pub boot: Option<BootSpec>,
    /// Serial ports, each at most once.
    pub serials: Vec<SerialSpec>,
    /// Devices on PCI, each in a slot of its own.
    pub pci: Vec<PciDeviceSpec>,
    /// The guest's clocks.
    pub clock: ClockSpec,
    /// What happens when the guest ends or resets itself.
    pub lifecycle: LifecycleSpec,
    /// The signal that kicks vCPUs out of the guest; `None` takes the first real-time signal. It
    /// is blocked in the machine's threads, and never delivered outside them.
    pub kick_signal: Option<i32>,
    /// What is done once all that the devices need of the host is open, before there is a thread.
    pub when_open: Option<WhenOpen>,
}

/// Something to do before a machine has threads; an error ends it.
#[derive(Clone)]
pub struct WhenOpen(pub Arc<dyn Fn() -> io::Result<()> + Send + Sync>);

impl std::fmt::Debug for WhenOpen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WhenOpen")
    }
}

impl MachineSpec {
    /// Makes a machine with one vCPU of the host's features, anonymous memory and no devices.
    pub fn new(memory_bytes: u64, boot: Option<BootSpec>) -> Self {
        Self {
            name: String::new(),
            uuid: Uuid::nil(),
            domain_xml: String::new(),
            memory: MemorySpec {
                bytes: memory_bytes,
                backing: BackingSpec::Anonymous,
                preallocate: false,
                locked: false,
                shared: None,
            },
            cpu: CpuSpec {
                vcpu_count: 1,
                topology: None,
                features: Vec::new(),
            },
            boot,
            serials: Vec::new(),
            pci: Vec::new(),
            clock: ClockSpec::default(),
            lifecycle: LifecycleSpec::default(),
            kick_signal: None,
            when_open: None,
        }
    }
}

/// Guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySpec {
    /// Its size: a multiple of the page size of its backing.
    pub bytes: u64,
    /// What backs it.
    pub backing: BackingSpec,
    /// Whether all of it is allocated before the machine starts.
    pub preallocate: bool,
    /// Whether it is locked into the host's memory.
    pub locked: bool,
    /// What it starts as, in the place of `backing`: pages are shared until they are written.
    pub shared: Option<Arc<FrozenMemory>>,
}

/// What backs guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BackingSpec {
    /// Private anonymous memory in transparent huge pages: copy-on-write is cheapest on it.
    #[default]
    Anonymous,
    /// Private anonymous memory in 4 KiB pages.
    AnonymousSmallPages,
    /// Pages of the host's hugetlb pool.
    Hugetlb {
        /// 2 MiB or 1 GiB.
        page_bytes: u64,
    },
    /// A memfd, mapped shared.
    Memfd,
}

/// The vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuSpec {
    /// How many.
    pub vcpu_count: u32,
    /// How the guest sees them arranged; `None` shows one socket of single-threaded cores.
    pub topology: Option<TopologySpec>,
    /// Features that differ from what KVM offers, applied in order.
    pub features: Vec<FeatureRule>,
}

/// How vCPUs are arranged; the product is their number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TopologySpec {
    /// Sockets.
    pub sockets: u32,
    /// Dies in a socket.
    pub dies: u32,
    /// Cores in a die.
    pub cores: u32,
    /// Threads in a core.
    pub threads: u32,
}

/// A register that CPUID writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CpuidRegister {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

/// What to do about one CPU feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeaturePolicy {
    /// Shown to the guest whatever KVM offers.
    Force,
    /// Shown; an error where KVM lacks it.
    Require,
    /// Shown where KVM has it.
    Optional,
    /// Hidden.
    Disable,
    /// An error where KVM has it.
    Forbid,
}

/// One CPU feature and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureRule {
    /// Its name, for messages.
    pub name: String,
    /// CPUID leaf.
    pub leaf: u32,
    /// CPUID subleaf.
    pub subleaf: u32,
    /// Register of the leaf.
    pub register: CpuidRegister,
    /// Bit of the register.
    pub bit: u8,
    /// What to do.
    pub policy: FeaturePolicy,
}

/// A file to load: from the host's file system or from memory.
#[derive(Clone)]
pub enum Source {
    /// A file of the host, read each time that it is loaded.
    Path(PathBuf),
    /// Bytes that the program has, with a name for messages.
    Bytes {
        /// What to call them.
        name: String,
        /// The file's bytes.
        bytes: Arc<[u8]>,
    },
}

impl Source {
    /// Returns what to call it in messages.
    pub fn name(&self) -> String {
        match self {
            Self::Path(path) => path.display().to_string(),
            Self::Bytes { name, .. } => name.clone(),
        }
    }
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Source({})", self.name())
    }
}

/// What the guest starts with.
#[derive(Clone, Debug)]
pub struct BootSpec {
    /// The kernel: a 64-bit ELF file, or a bzImage.
    pub kernel: Source,
    /// The initial RAM disk.
    pub initrd: Option<Source>,
    /// The kernel's command line.
    pub cmdline: String,
}

/// A serial port.
#[derive(Clone, Debug)]
pub struct SerialSpec {
    /// 0 for COM1, to 3 for COM4.
    pub port: u32,
    /// Where its bytes go to and come from.
    pub backend: SerialBackend,
}

/// Where a serial port's bytes go to and come from.
#[derive(Clone, Debug)]
pub enum SerialBackend {
    /// Nowhere.
    Null,
    /// A pseudo-terminal. What the guest writes while nobody has it open is discarded.
    Pty {
        /// Access mode of the terminal's device.
        mode: u32,
    },
    /// The standard input and output of this process.
    Stdio,
    /// A file that output is written to.
    File {
        /// The file; made if missing.
        path: PathBuf,
        /// Whether output is added at its end; else the file is emptied first.
        append: bool,
    },
    /// A Unix socket that one client at a time may connect to. Without one, output is discarded.
    UnixListen {
        /// Where; a socket left there by a process that ended is replaced.
        path: PathBuf,
    },
    /// A Unix socket of somebody who listens.
    UnixConnect {
        /// Where.
        path: PathBuf,
    },
    /// A connected stream socket that the program has.
    Stream(Arc<OwnedFd>),
}

/// A device on PCI.
#[derive(Clone, Debug)]
pub struct PciDeviceSpec {
    /// Its slot, from 1 on; slot 0 has the host bridge.
    pub slot: u8,
    /// What it is.
    pub device: PciDevice,
}

/// What a device on PCI is.
#[derive(Clone, Debug)]
pub enum PciDevice {
    /// A virtio disk.
    Disk(DiskSpec),
    /// A virtio network device.
    Net(NetSpec),
    /// A virtio entropy device.
    Rng(RngSpec),
    /// A virtio balloon; at most one.
    Balloon(BalloonSpec),
    /// A virtio console.
    Console(SerialBackend),
}

/// A balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BalloonSpec {
    /// Whether the guest reports free memory by itself.
    pub free_page_reporting: bool,
    /// Whether the guest may take memory back before it has none left.
    pub auto_deflate: bool,
    /// How many bytes the guest is asked to give at its start.
    pub wanted_bytes: u64,
    /// Each time that has passed the guest is asked how it uses its memory; never where it is zero.
    pub statistics_period: Duration,
}

/// A source of random numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RngSpec {
    /// The device of the host that they come from.
    pub source: PathBuf,
    /// How many the guest may take; `None` for as many as it wants.
    pub rate: Option<RngRate>,
}

/// A limit of random numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RngRate {
    /// So many bytes, at least 1.
    pub bytes: u32,
    /// In each such time.
    pub period: Duration,
}

/// A network device.
#[derive(Clone, Debug)]
pub struct NetSpec {
    /// Its name, as in `net0`; for messages.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Whether its cable is plugged in.
    pub link_up: bool,
    /// The host's end.
    pub port: NetPort,
}

/// The host's end of a network device.
#[derive(Clone, Debug)]
pub enum NetPort {
    /// A tap interface.
    Tap {
        /// Its name; `None` for a new one that the kernel numbers.
        name: Option<String>,
        /// Whether it is made where it is not there, and brought up.
        make: bool,
    },
    /// A tap interface that is made, and put on a bridge of the host.
    Bridge {
        /// Name of the bridge.
        bridge: String,
        /// Name of the tap; `None` for one that the kernel numbers.
        name: Option<String>,
    },
    /// A socket that the program has, which does not block and keeps packets apart
    /// (`SOCK_SEQPACKET` or `SOCK_DGRAM`). Each packet has a `virtio_net_hdr_v1` before it.
    Socket(Arc<OwnedFd>),
}

/// A disk: a file or block device of the host.
#[derive(Clone, Debug)]
pub struct DiskSpec {
    /// Its name in the guest, as in `vda`; for messages and images.
    pub name: String,
    /// The file or block device.
    pub path: PathBuf,
    /// How the disk is kept there.
    pub format: DiskFormat,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Its serial number, at most 20 bytes; empty for none.
    pub serial: String,
    /// How it goes through the host's page cache.
    pub cache: DiskCache,
    /// Whether discards free room in the file.
    pub discard: bool,
}

/// How a disk is kept in its file.
#[derive(Clone, Copy, Debug, Default)]
pub enum DiskFormat {
    /// Byte by byte.
    #[default]
    Raw,
    /// In a format that something else knows.
    Image(&'static dyn ImageFormat),
}

/// How a disk goes through the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskCache {
    /// By the page cache; the guest's flushes make its writes last.
    #[default]
    WriteBack,
    /// By the page cache; each write lasts when it is done.
    WriteThrough,
    /// Past the page cache; the guest's flushes make its writes last.
    None,
    /// Past the page cache; each write lasts when it is done.
    DirectSync,
    /// By the page cache; flushes do nothing.
    Unsafe,
}

impl DiskCache {
    /// Returns whether it goes past the page cache.
    pub fn is_direct(self) -> bool {
        matches!(self, Self::None | Self::DirectSync)
    }
}

/// The guest's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClockSpec {
    /// What becomes of the time between a checkpoint and its restore.
    pub after_restore: ClockPolicy,
    /// By how many seconds the real-time clock is ahead of UTC when the machine is new.
    pub rtc_offset_seconds: i64,
    /// Whether timer ticks that the guest was too slow to take are delivered later.
    pub pit_reinject: bool,
}

impl Default for ClockSpec {
    fn default() -> Self {
        Self {
            after_restore: ClockPolicy::Continue,
            rtc_offset_seconds: 0,
            pit_reinject: true,
        }
    }
}

/// What happens when the guest ends or resets itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LifecycleSpec {
    /// On an ACPI power-off.
    pub on_poweroff: EndAction,
    /// On a reset.
    pub on_reboot: EndAction,
    /// On a triple fault, or where KVM cannot go on.
    pub on_crash: EndAction,
}

impl Default for LifecycleSpec {
    fn default() -> Self {
        Self {
            on_poweroff: EndAction::Destroy,
            on_reboot: EndAction::Restart,
            on_crash: EndAction::Destroy,
        }
    }
}

/// What to do when a guest stops by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EndAction {
    /// The machine ends.
    Destroy,
    /// The machine starts over, with the same memory and devices.
    Restart,
    /// The machine stays as it is, stopped, to be looked at.
    Preserve,
}
