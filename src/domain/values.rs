//! Names, paths and command lines, each checked when it is made.

use std::fmt;
use std::path::{Path, PathBuf};

use super::document::{TEXT_BYTES_MAX, is_space, is_xml_char};
use super::error::ValueError;

/// Longest name of a domain, in bytes. Names become file names, with endings
/// that have to fit the 255 bytes of a directory entry.
pub const NAME_BYTES_MAX: usize = 200;
/// Longest title, in bytes. libvirt sets no limit; a table row does.
pub const TITLE_BYTES_MAX: usize = 1024;
/// Longest kernel command line, in bytes: x86 kernels have a buffer of 2048,
/// the terminating NUL included, and cut off what exceeds it.
pub const CMDLINE_BYTES_MAX: usize = 2047;
/// Longest path, in bytes: Linux's PATH_MAX without the terminating NUL.
pub const PATH_BYTES_MAX: usize = 4095;
/// Longest name of a built-in guest, in bytes.
pub const BUILTIN_BYTES_MAX: usize = 64;

/// Name of a domain: unique on a host, and fit to name files.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DomainName(String);

impl DomainName {
    /// Makes a name.
    ///
    /// # Errors
    ///
    /// The name is empty, blank, too long, `.` or `..`, or has a `/` or a
    /// control character.
    pub fn new(name: &str) -> Result<Self, ValueError> {
        let expected = if name.trim().is_empty() {
            "a name: it is blank"
        } else if name.len() > NAME_BYTES_MAX {
            "a name of at most 200 bytes"
        } else if name == "." || name == ".." || name.contains('/') {
            "a name without '/', nor '.' or '..'"
        } else if name.chars().any(|c| c.is_control() || !is_xml_char(c)) {
            "a name without control characters"
        } else {
            return Ok(DomainName(name.to_owned()));
        };
        Err(ValueError::new(name, expected))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DomainName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A short text that people gave a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Title(String);

impl Title {
    /// Makes a title of one line.
    ///
    /// # Errors
    ///
    /// It is blank, too long, or has control characters.
    pub fn new(title: &str) -> Result<Self, ValueError> {
        let printable = title.chars().all(|c| !c.is_control() && is_xml_char(c));
        if title.trim().is_empty() || title.len() > TITLE_BYTES_MAX || !printable {
            return Err(ValueError::new(title, "one line of at most 1024 bytes"));
        }
        Ok(Title(title.to_owned()))
    }

    /// Returns the title.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A text of any length that people gave a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description(String);

impl Description {
    /// Makes a description.
    ///
    /// # Errors
    ///
    /// It is blank, longer than [`TEXT_BYTES_MAX`], or has characters that XML
    /// cannot carry.
    pub fn new(text: &str) -> Result<Self, ValueError> {
        let fits = text.len() <= TEXT_BYTES_MAX && text.chars().all(is_xml_char);
        if !fits || text.trim_matches(is_space).is_empty() {
            return Err(ValueError::new(text, "a text of at most 64 KiB"));
        }
        Ok(Description(text.to_owned()))
    }

    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// An absolute path on the host that a document can carry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPath(PathBuf);

impl HostPath {
    /// Makes a path.
    ///
    /// # Errors
    ///
    /// The path is relative, too long, or has control characters.
    pub fn new(path: &str) -> Result<Self, ValueError> {
        let expected = if !path.starts_with('/') {
            "an absolute path"
        } else if path.len() > PATH_BYTES_MAX {
            "a path of at most 4095 bytes"
        } else if path.chars().any(|c| c.is_control() || !is_xml_char(c)) {
            "a path without control characters"
        } else {
            return Ok(HostPath(PathBuf::from(path)));
        };
        Err(ValueError::new(path, expected))
    }

    /// Returns the path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }
}

impl AsRef<Path> for HostPath {
    fn as_ref(&self) -> &Path {
        &self.0
    }
}

impl fmt::Display for HostPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.display().fmt(f)
    }
}

/// Name of a guest that is part of the program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltinName(String);

impl BuiltinName {
    /// What stands before the name in a document.
    pub(super) const PREFIX: &str = "builtin:";

    /// Makes a name.
    ///
    /// # Errors
    ///
    /// The name is empty, too long, or has characters besides small letters,
    /// digits, `-`, `_` and `.`.
    pub fn new(name: &str) -> Result<Self, ValueError> {
        let is_allowed =
            |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
        if name.is_empty() || name.len() > BUILTIN_BYTES_MAX || !name.chars().all(is_allowed) {
            return Err(ValueError::new(name, "the name of a built-in guest"));
        }
        Ok(BuiltinName(name.to_owned()))
    }

    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// A kernel command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KernelCmdline(String);

impl KernelCmdline {
    /// Makes a command line; a blank one is the same as none.
    ///
    /// # Errors
    ///
    /// It is longer than [`CMDLINE_BYTES_MAX`] or has characters that XML
    /// cannot carry, NUL among them.
    pub fn new(cmdline: &str) -> Result<Self, ValueError> {
        if cmdline.trim().is_empty() {
            return Ok(KernelCmdline::default());
        }
        if cmdline.len() > CMDLINE_BYTES_MAX || !cmdline.chars().all(is_xml_char) {
            return Err(ValueError::new(
                cmdline,
                "a command line of at most 2047 bytes",
            ));
        }
        Ok(KernelCmdline(cmdline.to_owned()))
    }

    /// Returns the command line.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// Where the guest's code comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KernelSource {
    /// Files of the host.
    Path {
        /// The kernel: a bzImage or an ELF file.
        kernel: HostPath,
        /// An initial ramdisk.
        initrd: Option<HostPath>,
    },
    /// A guest that is part of the program.
    Builtin(BuiltinName),
}

/// What the machine starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootConfig {
    /// Where the guest's code comes from.
    pub source: KernelSource,
    /// What the kernel is told.
    pub cmdline: KernelCmdline,
}

/// What to do when the guest stops by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LifecycleAction {
    /// End the machine.
    Destroy,
    /// Start it again with the same definition.
    Restart,
    /// Keep it, stopped, for examination.
    Preserve,
}

impl LifecycleAction {
    const ALL: [LifecycleAction; 3] = [
        LifecycleAction::Destroy,
        LifecycleAction::Restart,
        LifecycleAction::Preserve,
    ];

    /// Returns the word that documents use.
    pub fn name(self) -> &'static str {
        match self {
            LifecycleAction::Destroy => "destroy",
            LifecycleAction::Restart => "restart",
            LifecycleAction::Preserve => "preserve",
        }
    }

    pub(super) fn from_name(name: &str) -> Option<LifecycleAction> {
        let mut all = LifecycleAction::ALL.into_iter();
        all.find(|action| action.name() == name)
    }
}

/// What to do when the guest stops by itself, by how it stops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lifecycle {
    /// When it powers off.
    pub on_poweroff: LifecycleAction,
    /// When it reboots.
    pub on_reboot: LifecycleAction,
    /// When it crashes.
    pub on_crash: LifecycleAction,
}

impl Default for Lifecycle {
    /// libvirt's defaults.
    fn default() -> Self {
        Lifecycle {
            on_poweroff: LifecycleAction::Destroy,
            on_reboot: LifecycleAction::Restart,
            on_crash: LifecycleAction::Destroy,
        }
    }
}
