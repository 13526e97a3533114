//! What becomes of a domain's disks at a restore.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::{FileTypeExt, MetadataExt, fchown};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::domain::{DiskSourceKind, DomainConfig, HostPath};
use crate::host::HostError;
use crate::restore::disks;
use crate::store::{ImageReader, ReadOnlyDisk};
use crate::sys::lock::{LockError, holder_of};

/// Where the disks of an image are written to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DiskRestore {
    /// To where the domain has them: what was written since the checkpoint is lost.
    #[default]
    InPlace,
    /// To new files in this directory, `NAME.raw`; the restored domain uses those.
    NewIn(PathBuf),
}

/// Writes the image's disks, and has `config` use them.
///
/// In place, each disk is whole at every moment: a regular file is written beside the old one and
/// then takes its name. Blocks for storage.
pub(super) fn restore(
    reader: &ImageReader,
    config: &mut DomainConfig,
    how: &DiskRestore,
) -> Result<(), HostError> {
    let saved = &reader.manifest().disks;
    let on_pci = &config.machine.devices.pci;
    for (_, disk) in on_pci.disks().filter(|(_, disk)| !disk.read_only) {
        let name = disk.target.as_str();
        if !saved.iter().any(|saved| saved.name == name) {
            return Err(HostError::Invalid(format!(
                "the image does not have disk {name}, which the guest writes"
            )));
        }
    }
    for disk in &reader.manifest().read_only_disks {
        check_read_only(disk)?;
    }
    for (number, saved) in saved.iter().enumerate() {
        let name = &saved.name;
        let disk = config.machine.devices.pci.disk_mut(name).ok_or_else(|| {
            HostError::Invalid(format!("the image has disk {name}, its domain XML has not"))
        })?;
        match how {
            DiskRestore::InPlace => in_place(reader, number, disk.source.as_path())?,
            DiskRestore::NewIn(dir) => {
                let path = dir.join(format!("{name}.raw"));
                let text = path.to_str().unwrap_or_default();
                let source = HostPath::new(text).map_err(|error| {
                    HostError::Invalid(format!("the directory of disks: {error}"))
                })?;
                write_new(reader, number, &path)?;
                (disk.source, disk.source_kind) = (source, DiskSourceKind::File);
            }
        }
    }
    Ok(())
}

/// Checks that a disk that was only named is still what it was.
fn check_read_only(disk: &ReadOnlyDisk) -> Result<(), HostError> {
    let path = Path::new(&disk.path);
    let metadata =
        fs::metadata(path).map_err(|source| HostError::path("examine disk", path, source))?;
    let since = metadata.modified().ok();
    let since = since.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    let modified = since.and_then(|since| u64::try_from(since.as_nanos()).ok());
    let is_same =
        !metadata.is_file() || metadata.len() == disk.bytes && modified == Some(disk.modified_ns);
    if is_same {
        return Ok(());
    }
    Err(HostError::Invalid(format!(
        "disk {} ({}) has changed since the checkpoint: the guest was only reading it",
        disk.name, disk.path
    )))
}

fn write(reader: &ImageReader, number: usize, file: &File, path: &Path) -> Result<(), HostError> {
    disks::write(reader, number, file).map_err(|error| match error {
        disks::DiskError::Store(error) => error.into(),
        disks::DiskError::Io(source) => HostError::path("write disk", path, source),
        error => HostError::Invalid(format!("{}: {error}", path.display())),
    })
}

/// Writes a disk to a file that is not there yet; a failure leaves none.
fn write_new(reader: &ImageReader, number: usize, path: &Path) -> Result<(), HostError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(|source| HostError::path("make disk", path, source))?;
    let written = write(reader, number, &file, path);
    if written.is_err()
        && let Err(error) = fs::remove_file(path)
    {
        log::warn!("could not remove {}: {error}", path.display());
    }
    written
}

fn in_place(reader: &ImageReader, number: usize, path: &Path) -> Result<(), HostError> {
    let old = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(old) => old,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return write_new(reader, number, path);
        }
        Err(source) => return Err(HostError::path("open disk", path, source)),
    };
    // Held to the end: nobody may use a disk that is about to be another one.
    old.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => HostError::Lock(LockError::Held {
            what: format!("disk {}", path.display()),
            holder: holder_of(&old),
        }),
        TryLockError::Error(source) => HostError::path("lock disk", path, source),
    })?;
    let metadata = old
        .metadata()
        .map_err(|source| HostError::path("examine disk", path, source))?;
    if metadata.file_type().is_block_device() {
        return write(reader, number, &old, path);
    }
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".restoring");
    let beside = path.with_file_name(name);
    // One that a restore left that did not end.
    fs::remove_file(&beside).ok();
    write_new(reader, number, &beside)?;
    let took_place = (|| {
        let new = File::open(&beside)?;
        new.set_permissions(metadata.permissions())?;
        fchown(&new, Some(metadata.uid()), Some(metadata.gid()))?;
        fs::rename(&beside, path)?;
        File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
    })();
    took_place.map_err(|source| HostError::path("replace disk", path, source))
}
