//! What becomes of a domain's disks at a restore.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::os::unix::fs::{FileTypeExt, MetadataExt, fchown};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use crate::domain::{DiskSourceKind, DomainConfig, HostPath};
use crate::guest::ImageFormat;
use crate::host::HostError;
use crate::host::convert::image_format;
use crate::restore::disks;
use crate::store::{ImageReader, ReadOnlyDisk};
use crate::sys::lock::{LockError, holder_of};

/// Where the disks of an image are written to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum DiskRestore {
    /// To where the domain has them: what was written since the checkpoint is lost.
    #[default]
    InPlace,
    /// To new files in this directory, `NAME.raw` or `NAME.qcow2`, each on its own; the restored
    /// domain uses those.
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
    qcow2: Option<&'static dyn ImageFormat>,
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
    check_read_only_disks(reader, config, qcow2)?;
    for (number, saved) in saved.iter().enumerate() {
        let name = &saved.name;
        let disk = config.machine.devices.pci.disk_mut(name).ok_or_else(|| {
            HostError::Invalid(format!("the image has disk {name}, its domain XML has not"))
        })?;
        let saved = Saved {
            reader,
            number,
            format: image_format(disk, qcow2)?,
        };
        match how {
            DiskRestore::InPlace => saved.in_place(disk.source.as_path())?,
            DiskRestore::NewIn(dir) => {
                let path = dir.join(format!("{name}.{}", disk.format.name()));
                let text = path.to_str().unwrap_or_default();
                let source = HostPath::new(text).map_err(|error| {
                    HostError::Invalid(format!("the directory of disks: {error}"))
                })?;
                saved.write_new(&path, None)?;
                (disk.source, disk.source_kind) = (source, DiskSourceKind::File);
            }
        }
    }
    Ok(())
}

/// Checks that the disks that the guest only read, which are not in the image, are what they were.
pub(super) fn check_read_only_disks(
    reader: &ImageReader,
    config: &DomainConfig,
    qcow2: Option<&'static dyn ImageFormat>,
) -> Result<(), HostError> {
    for disk in &reader.manifest().read_only_disks {
        let mut disks = config.machine.devices.pci.disks().map(|(_, disk)| disk);
        let config = disks.find(|config| config.target.as_str() == disk.name);
        let format = config
            .map(|config| image_format(config, qcow2))
            .transpose()?;
        let path = config.map_or(Path::new(&disk.path), |config| config.source.as_path());
        check_read_only(disk, path, format.flatten())?;
    }
    Ok(())
}

/// Checks that a disk that was only named is still what it was, as far as can be told of one that is
/// somewhere else now.
fn check_read_only(
    disk: &ReadOnlyDisk,
    path: &Path,
    format: Option<&'static dyn ImageFormat>,
) -> Result<(), HostError> {
    let examine = |source| HostError::path("examine disk", path, source);
    let (bytes, modified_ns) = match format {
        Some(format) => {
            let file = File::open(path).map_err(examine)?;
            let image = format.open(file, path, false).map_err(HostError::from)?;
            (image.bytes(), image.modified_ns())
        }
        None => {
            let metadata = fs::metadata(path).map_err(examine)?;
            if !metadata.is_file() {
                return Ok(());
            }
            let since = metadata.modified().ok();
            let since = since.and_then(|time| time.duration_since(UNIX_EPOCH).ok());
            let modified_ns = since.and_then(|since| u64::try_from(since.as_nanos()).ok());
            (metadata.len(), modified_ns.unwrap_or(0))
        }
    };
    let is_moved = path != Path::new(&disk.path);
    if bytes == disk.bytes && (is_moved || modified_ns == disk.modified_ns) {
        return Ok(());
    }
    Err(HostError::Invalid(format!(
        "disk {} ({}) has changed since the checkpoint: the guest was only reading it",
        disk.name,
        path.display()
    )))
}

/// A disk that an image has.
struct Saved<'r> {
    reader: &'r ImageReader,
    /// Its place in the manifest.
    number: usize,
    /// What it is to be written in; `None`: as it is.
    format: Option<&'static dyn ImageFormat>,
}

impl Saved<'_> {
    /// Writes it to an empty file, or over a block device. In a format that can be based on another
    /// file it is, where what is at `like` was.
    fn write(&self, file: File, path: &Path, like: Option<&Path>) -> Result<(), HostError> {
        let written = match self.format {
            None => disks::write(self.reader, self.number, &file),
            Some(format) => {
                let bytes = self.reader.manifest().disks[self.number].bytes;
                let image = format.create(file, path, bytes, like)?;
                disks::write_image(self.reader, self.number, &*image)
            }
        };
        written.map_err(|error| match error {
            disks::DiskError::Store(error) => error.into(),
            disks::DiskError::Io(source) => HostError::path("write disk", path, source),
            error => HostError::Invalid(format!("{}: {error}", path.display())),
        })
    }

    /// Writes it to a file that is not there yet; a failure leaves none.
    fn write_new(&self, path: &Path, like: Option<&Path>) -> Result<(), HostError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|source| HostError::path("make disk", path, source))?;
        let written = self.write(file, path, like);
        if written.is_err()
            && let Err(error) = fs::remove_file(path)
        {
            log::warn!("could not remove {}: {error}", path.display());
        }
        written
    }

    fn in_place(&self, path: &Path) -> Result<(), HostError> {
        let old = match OpenOptions::new().read(true).write(true).open(path) {
            Ok(old) => old,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return self.write_new(path, None);
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
            return self.write(old, path, None);
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".restoring");
        let beside = path.with_file_name(name);
        // One that a restore left that did not end.
        fs::remove_file(&beside).ok();
        self.write_new(&beside, Some(path))?;
        let took_place = (|| {
            let new = File::open(&beside)?;
            new.set_permissions(metadata.permissions())?;
            fchown(&new, Some(metadata.uid()), Some(metadata.gid()))?;
            fs::rename(&beside, path)?;
            File::open(path.parent().unwrap_or(Path::new("/")))?.sync_all()
        })();
        took_place.map_err(|source| HostError::path("replace disk", path, source))
    }
}
