//! Disks.

use super::error::ValueError;
use super::values::HostPath;

/// Longest serial number of a disk, in bytes: what virtio has room for.
pub const SERIAL_BYTES_MAX: usize = 20;
/// Longest name of a disk in the guest, in bytes.
pub const TARGET_BYTES_MAX: usize = 16;

/// Name of a disk, as in `vda`: it orders disks and names them to people. What the guest calls
/// its disk is the guest's affair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskTarget(String);

impl DiskTarget {
    /// Makes a name: `vd` and letters, as virtio disks are called.
    ///
    /// # Errors
    ///
    /// It is something else.
    pub fn new(name: &str) -> Result<Self, ValueError> {
        let letters = name.strip_prefix("vd").unwrap_or_default();
        let fits = !letters.is_empty() && name.len() <= TARGET_BYTES_MAX;
        if fits && letters.bytes().all(|byte| byte.is_ascii_lowercase()) {
            Ok(DiskTarget(name.to_owned()))
        } else {
            Err(ValueError::new(name, "`vd` and small letters, as in vda"))
        }
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Serial number that the guest reads from a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSerial(String);

impl DiskSerial {
    /// Makes a serial number.
    ///
    /// # Errors
    ///
    /// It is empty, too long, or has characters besides those that libvirt takes.
    pub fn new(serial: &str) -> Result<Self, ValueError> {
        let is_allowed = |c: char| c.is_ascii_alphanumeric() || " _-.".contains(c);
        let fits = !serial.trim().is_empty() && serial.len() <= SERIAL_BYTES_MAX;
        if fits && serial.chars().all(is_allowed) {
            Ok(DiskSerial(serial.to_owned()))
        } else {
            Err(ValueError::new(
                serial,
                "at most 20 letters, digits, blanks, '_', '-' and '.'",
            ))
        }
    }

    /// Returns the serial number.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// How a disk goes through the host's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskCache {
    /// By the page cache; the guest's flushes make its writes last.
    WriteBack,
    /// By the page cache; each write lasts when it is done.
    WriteThrough,
    /// Past the page cache; the guest's flushes make its writes last.
    None,
    /// Past the page cache; each write lasts when it is done.
    DirectSync,
    /// By the page cache; the guest's flushes do nothing.
    Unsafe,
}

impl DiskCache {
    /// Every mode.
    pub const ALL: [DiskCache; 5] = [
        DiskCache::WriteBack,
        DiskCache::WriteThrough,
        DiskCache::None,
        DiskCache::DirectSync,
        DiskCache::Unsafe,
    ];

    /// Returns the word that documents use.
    pub fn name(self) -> &'static str {
        match self {
            DiskCache::WriteBack => "writeback",
            DiskCache::WriteThrough => "writethrough",
            DiskCache::None => "none",
            DiskCache::DirectSync => "directsync",
            DiskCache::Unsafe => "unsafe",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<DiskCache> {
        DiskCache::ALL.into_iter().find(|mode| mode.name() == name)
    }
}

/// What holds the bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskSourceKind {
    /// A regular file.
    File,
    /// A block device.
    Block,
}

/// How a disk is kept in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskFormat {
    /// Byte by byte.
    #[default]
    Raw,
    /// A qcow2 image: its room grows as the guest writes.
    Qcow2,
}

impl DiskFormat {
    /// Every format.
    pub const ALL: [DiskFormat; 2] = [DiskFormat::Raw, DiskFormat::Qcow2];

    /// Returns the word that documents use.
    pub fn name(self) -> &'static str {
        match self {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<DiskFormat> {
        let mut all = DiskFormat::ALL.into_iter();
        all.find(|format| format.name() == name)
    }
}

/// A disk: a file or block device of the host, as a virtio device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Its name.
    pub target: DiskTarget,
    /// What holds its bytes.
    pub source_kind: DiskSourceKind,
    /// Where that is.
    pub source: HostPath,
    /// How the disk is kept there; a block device is always raw.
    pub format: DiskFormat,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Its serial number.
    pub serial: Option<DiskSerial>,
    /// Its cache mode; `None`: the document does not say, so it is `writeback`.
    pub cache: Option<DiskCache>,
    /// Whether the guest's discards free room in the file; `None`: the document does not say, so
    /// they do not.
    pub discard: Option<bool>,
}

impl Disk {
    /// Makes a writable disk of a raw regular file.
    pub fn new(target: DiskTarget, source: HostPath) -> Self {
        Disk {
            target,
            source_kind: DiskSourceKind::File,
            source,
            format: DiskFormat::Raw,
            read_only: false,
            serial: None,
            cache: None,
            discard: None,
        }
    }

    /// Refuses a second disk of the same name, or of the same file where one is written.
    pub(super) fn check_beside(&self, other: &Disk) -> Result<(), ValueError> {
        if self.target == other.target {
            let name = other.target.as_str();
            return Err(ValueError::new(name, "another name than the other disks'"));
        }
        if self.source == other.source && !(self.read_only && other.read_only) {
            return Err(ValueError::new(
                &other.source.to_string(),
                "free: another disk is the same file, and one of them is written",
            ));
        }
        Ok(())
    }
}
