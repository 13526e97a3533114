//! Where running domains are found: control sockets and locks in the runtime directory.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use crate::host::HostError;

/// The longest socket path that a `sockaddr_un` holds, less its terminating zero (unix(7)).
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// The directory with the control sockets of running domains.
///
/// Its mode is 0700 and the sockets' 0600: whoever can connect controls the domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuntimeDir {
    path: PathBuf,
}

impl RuntimeDir {
    /// Makes `path`, if it is missing, and uses it.
    pub fn at(path: impl Into<PathBuf>) -> Result<Self, HostError> {
        let path = path.into();
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .map_err(|source| HostError::path("make the runtime directory", &path, source))?;
        // Whoever else owns it could put sockets of their own there.
        let owner = fs::metadata(&path)
            .map_err(|source| HostError::path("look at the runtime directory", &path, source))?
            .uid();
        if owner != rustix::process::geteuid().as_raw() {
            return Err(HostError::Invalid(format!(
                "the runtime directory {} belongs to user {owner}, not to this one",
                path.display()
            )));
        }
        Ok(Self { path })
    }

    /// Makes and uses the default directory of the user that this process runs as.
    pub fn of_this_user() -> Result<Self, HostError> {
        Self::at(Self::default_path())
    }

    /// Returns the default of the user that this process runs as: `/run/livepoint` for root, else
    /// `livepoint` in the user's own runtime directory. No environment variable is read.
    pub fn default_path() -> PathBuf {
        let user = rustix::process::geteuid();
        if user.is_root() {
            return PathBuf::from("/run/livepoint");
        }
        let own = PathBuf::from(format!("/run/user/{user}"));
        if own.is_dir() {
            own.join("livepoint")
        } else {
            PathBuf::from(format!("/tmp/livepoint-{user}"))
        }
    }

    /// Returns the directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns where the control socket of the domain `name` is.
    pub fn socket(&self, name: &str) -> Result<PathBuf, HostError> {
        let path = self.path.join(format!("{name}.sock"));
        let bytes = path.as_os_str().len();
        if bytes > SOCKET_PATH_BYTES_MAX {
            return Err(HostError::Invalid(format!(
                "the control socket's path {} has {bytes} bytes; {SOCKET_PATH_BYTES_MAX} is the \
                 most that a Unix socket allows: use a shorter name or runtime directory",
                path.display()
            )));
        }
        Ok(path)
    }

    /// Returns the lock file that keeps a second process from running the same domain.
    pub fn uuid_lock(&self, uuid: Uuid) -> PathBuf {
        self.path.join(format!("{uuid}.lock"))
    }

    /// Returns the lock file that keeps two domains from having one name.
    pub fn name_lock(&self, name: &str) -> PathBuf {
        self.path.join(format!("{name}.lock"))
    }

    /// Lists the control sockets, sorted by domain name. Some may be left over from a crash.
    pub fn sockets(&self) -> Result<Vec<(String, PathBuf)>, HostError> {
        let entries = fs::read_dir(&self.path)
            .map_err(|source| HostError::path("list the runtime directory", &self.path, source))?;
        let mut found = Vec::new();
        for entry in entries.filter_map(Result::ok) {
            let path = entry.path();
            if path.extension().is_some_and(|ending| ending == "sock")
                && let Some(name) = path.file_stem().and_then(|stem| stem.to_str())
            {
                found.push((name.to_owned(), path.clone()));
            }
        }
        found.sort();
        Ok(found)
    }

    /// Makes a socket reachable by its owner only.
    pub(super) fn restrict(path: &Path) -> io::Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_path_that_a_unix_socket_cannot_hold_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = RuntimeDir::at(dir.path()).unwrap();
        assert!(runtime.socket("vm").is_ok());
        let error = runtime.socket(&"n".repeat(120)).unwrap_err();
        assert!(error.to_string().contains("107"), "{error}");
    }
}
