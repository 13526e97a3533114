//! Files: what can be opened once the process is confined, by Landlock (landlock(7)).

use std::io;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible as _, PathBeneath,
    PathFd, Ruleset, RulesetAttr as _, RulesetCreatedAttr as _, RulesetStatus, Scope,
};

use super::super::DomainFiles;

/// The newest Landlock whose rules are asked for; an older kernel enforces those that it knows.
const NEWEST: ABI = ABI::V6;

/// What every machine reads of the host: its own threads and memory in `/proc` (others' is out of
/// reach: Landlock lets no process look into one outside), how many CPUs and huge pages there are,
/// and time zones.
const READ: [&str; 7] = [
    "/proc",
    "/sys/fs/cgroup",
    "/sys/devices/system",
    "/sys/kernel/mm",
    "/etc/localtime",
    "/usr/share/zoneinfo",
    "/dev/urandom",
];

/// Devices that every machine uses: its terminals are looked at again at its end.
const DEVICES: [&str; 4] = ["/dev/kvm", "/dev/userfaultfd", "/dev/pts", "/dev/null"];

/// What a process is to be left with.
#[derive(Debug)]
pub(super) struct Rules(Vec<(PathFd, BitFlags<AccessFs>)>);

impl Rules {
    /// Looks up what a domain needs. What is not there needs no rule.
    pub(super) fn new(domain: &DomainFiles, image_dirs: &[PathBuf]) -> Self {
        let read: BitFlags<AccessFs> = AccessFs::ReadFile.into();
        let write = read | AccessFs::WriteFile | AccessFs::Truncate | AccessFs::IoctlDev;
        let images = read
            | AccessFs::WriteFile
            | AccessFs::Truncate
            | AccessFs::ReadDir
            | AccessFs::MakeReg
            | AccessFs::RemoveFile
            | AccessFs::Refer;
        let mut rules = Vec::new();
        let mut allow = |path: &Path, rights: BitFlags<AccessFs>| match PathFd::new(path) {
            // A file has no rights of a directory.
            Ok(fd) if !path.is_dir() => rules.push((fd, rights & AccessFs::from_file(NEWEST))),
            Ok(fd) => rules.push((fd, rights)),
            Err(error) => log::debug!("{}: {error}", path.display()),
        };
        for path in READ.map(Path::new) {
            allow(path, read | AccessFs::ReadDir);
        }
        for path in DEVICES.map(Path::new) {
            allow(path, write);
        }
        domain.read.iter().for_each(|path| allow(path, read));
        domain.write.iter().for_each(|path| allow(path, write));
        let image_dirs = image_dirs.iter().chain(&domain.images);
        image_dirs.for_each(|path| allow(path, images));
        Self(rules)
    }

    /// Restricts the calling thread, and those that it starts.
    pub(super) fn enforce(self) -> io::Result<()> {
        let failed = |error| io::Error::other(format!("Landlock: {error}"));
        let mut ruleset = Ruleset::default()
            .set_compatibility(CompatLevel::BestEffort)
            .handle_access(AccessFs::from_all(NEWEST))
            .map_err(failed)?
            .handle_access(AccessNet::from_all(NEWEST))
            .map_err(failed)?
            .scope(Scope::from_all(NEWEST))
            .map_err(failed)?
            .create()
            .map_err(failed)?;
        for (path, rights) in self.0 {
            ruleset = ruleset
                .add_rule(PathBeneath::new(path, rights))
                .map_err(failed)?;
        }
        match ruleset.restrict_self().map_err(failed)?.ruleset {
            RulesetStatus::FullyEnforced => {}
            RulesetStatus::PartiallyEnforced => {
                log::info!("this kernel's Landlock is older: files are confined, not all else");
            }
            RulesetStatus::NotEnforced => {
                log::warn!(
                    "this kernel has no Landlock: the domain's process is not kept from files"
                );
            }
        }
        Ok(())
    }
}

/// Returns whether the kernel enforces any of it.
#[cfg(test)]
pub(super) fn is_supported() -> bool {
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(ABI::V1))
        .and_then(Ruleset::create);
    status.is_ok()
}
