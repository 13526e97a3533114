//! Whom a confined process runs as, and with which of root's rights.

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::Path;

use rustix::fs::{Gid, Uid};
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit,
};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// `RLIMIT_NICE` that lets a thread go back to niceness 0 (getrlimit(2)).
const NICENESS_NONE: u64 = 20;

/// A user of the host, with the groups that it is in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct User {
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
}

impl User {
    /// Finds a user in `/etc/passwd`, by name or number, and its groups in `/etc/group`.
    ///
    /// # Errors
    ///
    /// There is no such user.
    pub fn named(name: &str) -> io::Result<Self> {
        let users = fs::read_to_string("/etc/passwd")?;
        let found = users.lines().find_map(|line| {
            let fields: Vec<_> = line.split(':').collect();
            let is_it = fields.first() == Some(&name) || fields.get(2) == Some(&name);
            let number = |at: usize| fields.get(at)?.parse().ok();
            let user = (*fields.first()?, number(2)?, number(3)?);
            is_it.then_some(user)
        });
        let (name, uid, gid): (_, u32, u32) =
            found.ok_or_else(|| io::Error::other(format!("there is no user {name}")))?;
        let groups = fs::read_to_string("/etc/group")?;
        let groups = groups.lines().filter_map(|line| {
            let mut fields = line.split(':').skip(2);
            let group: u32 = fields.next()?.parse().ok()?;
            let mut members = fields.next()?.split(',');
            members
                .any(|member| member == name)
                .then(|| Gid::from_raw(group))
        });
        Ok(Self {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
            groups: groups.collect(),
        })
    }

    /// Returns the user's number.
    pub fn uid(&self) -> u32 {
        self.uid.as_raw()
    }

    /// Gives the user a file or directory.
    pub fn take_over(&self, path: &Path) -> io::Result<()> {
        chown(path, Some(self.uid.as_raw()), Some(self.gid.as_raw()))
    }

    /// Makes the calling thread, and those that it starts, run as the user.
    pub(super) fn become_it(&self) -> io::Result<()> {
        // Another user would have none; what is not needed is dropped right after.
        rustix::thread::set_keep_capabilities(true)?;
        rustix::thread::set_thread_groups(&self.groups)?;
        rustix::thread::set_thread_res_gid(self.gid, self.gid, self.gid)?;
        rustix::thread::set_thread_res_uid(self.uid, self.uid, self.uid)?;
        // A process that changed its user does not own its files in /proc, which tell it what of
        // its memory was touched. Guest memory is in no dump whatever this says.
        set_dumpable_behavior(DumpableBehavior::Dumpable)?;
        Ok(())
    }
}

/// Lets threads that give way to others take their turns again later; returns the capability that
/// it takes where the limit cannot be raised, as in some containers.
pub(super) fn allow_priorities() -> io::Result<CapabilitySet> {
    let limit = getrlimit(Resource::Nice);
    if limit.current.is_none_or(|limit| limit >= NICENESS_NONE) {
        return Ok(CapabilitySet::empty());
    }
    let wanted = Rlimit {
        current: Some(NICENESS_NONE),
        maximum: limit.maximum.map(|most| most.max(NICENESS_NONE)),
    };
    if setrlimit(Resource::Nice, wanted).is_ok() {
        return Ok(CapabilitySet::empty());
    }
    let permitted = rustix::thread::capabilities(None)?.permitted;
    Ok(permitted & CapabilitySet::SYS_NICE)
}

/// Gives up every capability of the calling thread but `kept`.
pub(super) fn drop_capabilities(kept: CapabilitySet) -> io::Result<()> {
    let left = CapabilitySets {
        effective: kept,
        permitted: kept,
        inheritable: CapabilitySet::empty(),
    };
    Ok(rustix::thread::set_capabilities(None, left)?)
}
