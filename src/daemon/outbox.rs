//! Where a confined worker puts images: a directory of its domain's own, which is all that it can
//! write. The daemon moves them from there to where they are wanted.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::error::DaemonError;
use super::paths::{Paths, make_dir, remove};
use crate::host::confine::User;
use crate::host::sync_dir_of;

/// Mode of directories that a worker of another user passes through, and cannot list.
const PASSED_THROUGH: u32 = 0o711;

/// Makes the directory of a domain, and returns it.
pub(super) fn prepare(
    paths: &Paths,
    uuid: Uuid,
    user: Option<&User>,
) -> Result<PathBuf, DaemonError> {
    let dir = paths.outbox(uuid);
    make_dir(&dir)?;
    if let Some(user) = user {
        for above in [&paths.state, &paths.outboxes()] {
            fs::set_permissions(above, Permissions::from_mode(PASSED_THROUGH))
                .map_err(|source| DaemonError::path("open up", above, source))?;
        }
        user.take_over(&dir)
            .map_err(|source| DaemonError::path("give away", &dir, source))?;
    }
    Ok(dir)
}

/// Returns where an image goes: a domain has one job at a time.
pub(super) fn image(paths: &Paths, uuid: Uuid) -> PathBuf {
    paths.outbox(uuid).join("image.lpi")
}

/// Removes an image that an earlier daemon did not come to move.
pub(super) fn clear(paths: &Paths, uuid: Uuid) -> Result<(), DaemonError> {
    if paths.outbox(uuid).exists() {
        remove(&image(paths, uuid))?;
    }
    Ok(())
}

/// Removes the directory of a domain that is gone.
pub(super) fn discard(paths: &Paths, uuid: Uuid) {
    match fs::remove_dir_all(paths.outbox(uuid)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            log::warn!("{}: {error}", paths.outbox(uuid).display());
        }
        _ => {}
    }
}

/// Gives the image its place; what was there is replaced. It is copied where that is on another
/// file system. From then on it is the daemon's own.
pub(super) fn move_to(paths: &Paths, uuid: Uuid, to: &Path) -> Result<(), DaemonError> {
    let from = image(paths, uuid);
    let owner = rustix::process::geteuid().as_raw();
    let moved = chown(&from, Some(owner), None)
        .and_then(|()| fs::rename(&from, to))
        .or_else(|error| match error.kind() {
            io::ErrorKind::CrossesDevices => copy(&from, to),
            _ => Err(error),
        })
        .and_then(|()| sync_dir_of(to));
    if let Err(source) = moved {
        clear(paths, uuid)?;
        return Err(DaemonError::path("put an image at", to, source));
    }
    Ok(())
}

/// Copies a file, whole or not at all, and removes the old one.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    let mut name = to.file_name().unwrap_or_default().to_owned();
    name.push(".moving");
    let beside = to.with_file_name(name);
    let write = || -> io::Result<()> {
        let mut source = File::open(from)?;
        let mut target = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&beside)?;
        io::copy(&mut source, &mut target)?;
        target.sync_all()?;
        fs::rename(&beside, to)
    };
    let written = write();
    if written.is_err()
        && let Err(error) = fs::remove_file(&beside)
    {
        log::debug!("{}: {error}", beside.display());
    }
    written?;
    fs::remove_file(from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::RuntimeDir;

    fn paths(dir: &Path) -> Paths {
        Paths {
            config: dir.join("c"),
            state: dir.join("s"),
            runtime: RuntimeDir::at(dir.join("r")).unwrap(),
        }
    }

    #[test]
    fn an_image_gets_its_place_also_on_another_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let uuid = Uuid::new_v4();
        prepare(&paths, uuid, None).unwrap();
        // Memory is another file system than a disk, where there is such a directory.
        let elsewhere =
            tempfile::tempdir_in("/dev/shm").unwrap_or_else(|_| tempfile::tempdir().unwrap());
        for target in [dir.path().join("here"), elsewhere.path().join("there")] {
            fs::write(image(&paths, uuid), "content").unwrap();
            move_to(&paths, uuid, &target).unwrap();
            assert_eq!(fs::read_to_string(&target).unwrap(), "content");
            assert!(!image(&paths, uuid).exists());
        }
        let files = fs::read_dir(elsewhere.path()).unwrap().count();
        assert_eq!(files, 1);
    }

    #[test]
    fn an_image_that_cannot_be_placed_is_removed_and_the_place_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let uuid = Uuid::new_v4();
        prepare(&paths, uuid, None).unwrap();
        fs::write(image(&paths, uuid), "content").unwrap();
        let nowhere = dir.path().join("missing/image");
        let error = move_to(&paths, uuid, &nowhere).unwrap_err();
        assert!(error.to_string().contains("missing/image"), "{error}");
        assert!(!image(&paths, uuid).exists());
        clear(&paths, uuid).unwrap();
    }
}
