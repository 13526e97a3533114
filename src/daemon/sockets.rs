//! The sockets that clients connect to.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

use super::args::{Arguments, is_root};
use super::paths::{Paths, make_dir};
use super::systemd;
use crate::host::LockFile;

/// Listening sockets, each with whether it is read-only, and their files.
pub(super) struct Sockets {
    pub(super) listeners: Vec<(UnixListener, bool)>,
    pub(super) files: Vec<SocketFile>,
}

/// A socket's file, which goes with the daemon.
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.0) {
            log::debug!("could not remove {}: {error}", self.0.display());
        }
    }
}

/// Makes sure that no other daemon uses the directories.
pub(super) fn only_daemon(paths: &Paths) -> anyhow::Result<LockFile> {
    let lock = paths.workers().join("livepointd.lock");
    Ok(LockFile::acquire(&lock, "the runtime directory")?)
}

/// Makes the sockets, or takes those that systemd made.
pub(super) fn listen(arguments: &Arguments) -> anyhow::Result<Sockets> {
    let passed = systemd::passed_sockets();
    if !passed.is_empty() {
        let listeners = passed
            .into_iter()
            .map(|(fd, name): (OwnedFd, String)| (UnixListener::from(fd), name.ends_with("-ro")))
            .collect();
        return Ok(Sockets {
            listeners,
            files: Vec::new(),
        });
    }
    let (mut paths, mut read_only) = (arguments.socket.clone(), arguments.socket_ro.clone());
    if paths.is_empty() && read_only.is_empty() {
        (paths, read_only) = default_sockets()?;
    }
    let group = arguments.group.as_deref().map(group_id).transpose()?;
    let mut sockets = Sockets {
        listeners: Vec::new(),
        files: Vec::new(),
    };
    let all = paths.iter().map(|path| (path, false, arguments.mode));
    let all = all.chain(read_only.iter().map(|path| (path, true, arguments.mode_ro)));
    for (path, is_read_only, mode) in all {
        let (listener, file) = bind(path, mode, group)?;
        sockets.listeners.push((listener, is_read_only));
        sockets.files.push(file);
    }
    Ok(sockets)
}

/// Returns the first of them: where a daemon of this user answers.
pub(super) fn default_socket() -> anyhow::Result<PathBuf> {
    let (paths, _) = default_sockets()?;
    Ok(paths.into_iter().next().unwrap_or_default())
}

/// Where libvirt's clients look for `livepoint:///system`, and for an ordinary user's session.
fn default_sockets() -> anyhow::Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    if is_root() {
        let libvirt = Path::new("/run/libvirt");
        let own = Path::new("/run/livepoint");
        let socket = vec![
            libvirt.join("virtlivepointd-sock"),
            own.join("livepoint-sock"),
        ];
        let read_only = vec![
            libvirt.join("virtlivepointd-sock-ro"),
            own.join("livepoint-sock-ro"),
        ];
        return Ok((socket, read_only));
    }
    let dir = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let dir = dir.context("XDG_RUNTIME_DIR is not set: give --socket")?;
    Ok((vec![dir.join("libvirt/virtlivepointd-sock")], Vec::new()))
}

/// Listens at `path`, which nobody else may serve.
pub(super) fn bind(
    path: &Path,
    mode: u32,
    group: Option<u32>,
) -> anyhow::Result<(UnixListener, SocketFile)> {
    let listener = try_bind(path, mode, group)
        .with_context(|| format!("could not listen at {}", path.display()))?;
    Ok((listener, SocketFile(path.to_owned())))
}

fn try_bind(path: &Path, mode: u32, group: Option<u32>) -> anyhow::Result<UnixListener> {
    if let Some(dir) = path.parent().filter(|dir| !dir.exists()) {
        make_dir(dir)?;
        // Others have to pass through it to sockets that are for them.
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755))?;
    }
    if UnixStream::connect(path).is_ok() {
        bail!("another process serves it");
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    if let Some(group) = group {
        chown(path, None, Some(group))?;
    }
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    Ok(listener)
}

/// Finds a group by its name or number.
fn group_id(name: &str) -> anyhow::Result<u32> {
    if let Ok(id) = name.parse() {
        return Ok(id);
    }
    let groups = fs::read_to_string("/etc/group").context("could not read /etc/group")?;
    let found = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == name).then(|| fields.nth(1)?.parse().ok())?
    });
    found.with_context(|| format!("there is no group {name}"))
}
