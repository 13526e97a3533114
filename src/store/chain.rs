//! Names: the temporary file of a writer, the images of a chain, and who may replace what.

use std::ffi::OsStr;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use crate::store::backend::{EntryKind, LockKind, Storage, StorageFile};
use crate::store::error::StoreError;
use crate::store::format::{IMAGE_SUFFIX, MAGIC};
use crate::store::source::peek_manifest;
use crate::sys::lock::Holder;

/// Name suffix of an image that is not committed.
const PART_SUFFIX: &str = ".lpi-part";

/// Temporary name of a chain's next image: one name, so that a chain has one writer at a time.
const CHAIN_PART: &str = ".chain.lpi-part";

/// How often a temporary file is tried for. Another writer's clean-up holds it for an instant.
const ATTEMPTS_MAX: u32 = 10;

/// Wait between two attempts.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(2);

/// Where an image will be, and what it replaces.
#[derive(Debug)]
pub(crate) struct Target {
    dir: PathBuf,
    kind: TargetKind,
}

#[derive(Debug)]
enum TargetKind {
    File {
        path: PathBuf,
        // Locked until the end: nobody starts to read what is about to be replaced.
        _replaced: Option<Box<dyn StorageFile>>,
    },
    Chain,
}

impl Target {
    /// Looks at what `path` names: nothing, an image to replace, or the directory of a chain.
    pub(crate) fn new(storage: &dyn Storage, path: &Path) -> Result<Self, StoreError> {
        let refuse = |what| StoreError::NotReplaceable {
            path: path.to_owned(),
            what,
        };
        let kind = storage.kind(path).map_err(StoreError::io("find", path))?;
        let replaced = match kind {
            Some(EntryKind::Directory) => {
                return Ok(Self {
                    dir: path.to_owned(),
                    kind: TargetKind::Chain,
                });
            }
            Some(EntryKind::Other) => return Err(refuse("not a regular file")),
            Some(EntryKind::File) => Some(lock_replaced(storage, path)?),
            None => None,
        };
        if path.file_name().is_none() {
            return Err(refuse("not a file name"));
        }
        Ok(Self {
            dir: parent_of(path),
            kind: TargetKind::File {
                path: path.to_owned(),
                _replaced: replaced,
            },
        })
    }

    /// Returns the directory of the image.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Fails where an increment may not be: only files of a name with our suffix are searched for
    /// the layers that they need.
    pub(crate) fn check_increment(&self) -> Result<(), StoreError> {
        match &self.kind {
            TargetKind::File { path, .. } if !has_image_suffix(path) => {
                Err(StoreError::Unwritable {
                    reason: format!(
                        "the name of an increment ends in {IMAGE_SUFFIX}, {} does not",
                        path.display()
                    ),
                })
            }
            _ => Ok(()),
        }
    }

    /// Returns the path of the temporary file.
    pub(crate) fn part(&self) -> PathBuf {
        match &self.kind {
            TargetKind::Chain => self.dir.join(CHAIN_PART),
            TargetKind::File { path, .. } => {
                let mut name = std::ffi::OsString::from(".file-");
                name.push(path.file_name().unwrap_or_default());
                name.push(PART_SUFFIX);
                self.dir.join(name)
            }
        }
    }

    /// Returns the path of the committed image. The caller holds the temporary file's lock, so
    /// that no other writer of a chain chooses the same number.
    pub(crate) fn final_path(
        &self,
        storage: &dyn Storage,
        image_uuid: Uuid,
    ) -> Result<PathBuf, StoreError> {
        match &self.kind {
            TargetKind::File { path, .. } => Ok(path.clone()),
            TargetKind::Chain => {
                let next = chain_images(storage, &self.dir)?
                    .last()
                    .map_or(1, |newest| newest.sequence.saturating_add(1));
                let (short, ..) = image_uuid.as_fields();
                Ok(self
                    .dir
                    .join(format!("{next:08}-{short:08x}{IMAGE_SUFFIX}")))
            }
        }
    }
}

/// Returns the directory that an image written to `path` will be in.
pub(crate) fn directory_for(storage: &dyn Storage, path: &Path) -> Result<PathBuf, StoreError> {
    let kind = storage.kind(path).map_err(StoreError::io("find", path))?;
    Ok(match kind {
        Some(EntryKind::Directory) => path.to_owned(),
        _ => parent_of(path),
    })
}

/// Returns the directory that holds `path`.
pub(crate) fn parent_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// Opens and locks the image that is to be replaced; anything but an image is left alone.
fn lock_replaced(storage: &dyn Storage, path: &Path) -> Result<Box<dyn StorageFile>, StoreError> {
    let file = storage.open(path).map_err(StoreError::io("open", path))?;
    if !file
        .try_lock(LockKind::Exclusive)
        .map_err(StoreError::io("lock", path))?
    {
        return Err(StoreError::InUse {
            path: path.to_owned(),
            holder: file.holder(),
        });
    }
    let mut magic = [0; MAGIC.len()];
    let bytes = file
        .byte_len()
        .map_err(StoreError::io("read the length of", path))?;
    // An empty file is what a caller makes to reserve the name.
    if bytes > 0 {
        match file.read_exact_at(&mut magic, 0) {
            Ok(()) if magic == MAGIC => {}
            Err(error) if error.kind() != io::ErrorKind::UnexpectedEof => {
                return Err(StoreError::io("read", path)(error));
            }
            _ => {
                return Err(StoreError::NotReplaceable {
                    path: path.to_owned(),
                    what: "not an image",
                });
            }
        }
        refuse_named(storage, path)?;
    }
    Ok(file)
}

/// Fails where an image beside `path` needs the one there.
///
/// Called with the file locked: whoever writes an increment leases what it needs until its image
/// is visible, so that nobody can come to need the file between this look and the end of the lock.
fn refuse_named(storage: &dyn Storage, path: &Path) -> Result<(), StoreError> {
    let dir = parent_of(path);
    let names = storage
        .list(&dir)
        .map_err(StoreError::io("list directory", &dir))?;
    for name in names {
        let other = dir.join(&name);
        if !has_image_suffix(&other) || path.file_name() == Some(&name) {
            continue;
        }
        // What cannot be read cannot be restored, with this file or without.
        let Ok(manifest) = peek_manifest(storage, &other) else {
            continue;
        };
        let file = path.file_name().and_then(OsStr::to_str);
        if manifest
            .layers
            .iter()
            .any(|layer| Some(layer.file.as_str()) == file)
        {
            return Err(StoreError::Named {
                path: path.to_owned(),
                by: other,
            });
        }
    }
    Ok(())
}

pub(crate) fn has_image_suffix(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_encoded_bytes().ends_with(IMAGE_SUFFIX.as_bytes())
}

/// Makes and locks the temporary file at `part`; one that a dead writer left is removed first.
pub(crate) fn create_part(
    storage: &dyn Storage,
    part: &Path,
) -> Result<Box<dyn StorageFile>, StoreError> {
    let mut holder = None;
    for attempt in 0..ATTEMPTS_MAX {
        if attempt > 0 {
            std::thread::sleep(ATTEMPT_PAUSE);
        }
        match storage.create_new(part) {
            Ok(file) => {
                let locked = file.try_lock(LockKind::Exclusive);
                // Somebody's clean-up may have had it between its creation and our lock.
                if locked.map_err(StoreError::io("lock", part))?
                    && file.is_at(part).map_err(StoreError::io("find", part))?
                {
                    return Ok(file);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if let PartState::Held(by) = remove_if_stale(storage, part)? {
                    holder = by;
                }
            }
            Err(error) => return Err(StoreError::io("create", part)(error)),
        }
    }
    Err(StoreError::InUse {
        path: part.to_owned(),
        holder,
    })
}

/// Makes the temporary file at `part` of a spare one; of a new one where `spare` is not there.
pub(crate) fn take_over_spare(
    storage: &dyn Storage,
    spare: &Path,
    part: &Path,
) -> Result<Box<dyn StorageFile>, StoreError> {
    if parent_of(spare) != parent_of(part) {
        return Err(StoreError::Unwritable {
            reason: format!("{} is not in the image's directory", spare.display()),
        });
    }
    // A part that somebody writes, or left, is in the way as for a new file.
    drop(create_part(storage, part)?);
    storage
        .remove(part)
        .map_err(StoreError::io("remove", part))?;
    refuse_named(storage, spare)?;
    match storage.take_over(spare, part) {
        Ok(file) => Ok(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => create_part(storage, part),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(StoreError::InUse {
            path: spare.to_owned(),
            holder: None,
        }),
        Err(error) => Err(StoreError::io("write over", spare)(error)),
    }
}

/// What became of a temporary file.
enum PartState {
    /// It is not there, or no more.
    Gone,
    /// A live writer holds it, named where the kernel tells.
    Held(Option<Holder>),
}

/// Removes the temporary file at `part` if no writer holds it.
fn remove_if_stale(storage: &dyn Storage, part: &Path) -> Result<PartState, StoreError> {
    let file = match storage.open(part) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(PartState::Gone),
        Err(error) => return Err(StoreError::io("open", part)(error)),
    };
    if !file
        .try_lock(LockKind::Exclusive)
        .map_err(StoreError::io("lock", part))?
    {
        return Ok(PartState::Held(file.holder()));
    }
    // Under the lock, and only if the name is still this file's: else it is a live writer's.
    if file.is_at(part).map_err(StoreError::io("find", part))? {
        storage
            .remove(part)
            .map_err(StoreError::io("remove", part))?;
    }
    Ok(PartState::Gone)
}

/// Removes what dead writers left in `dir`. Failing to is no reason not to write an image.
pub(crate) fn remove_stale_parts(storage: &dyn Storage, dir: &Path) {
    let names = match storage.list(dir) {
        Ok(names) => names,
        Err(error) => {
            log::warn!(
                "could not look for stale images in {}: {error}",
                dir.display()
            );
            return;
        }
    };
    for name in names.iter().filter(|name| is_part_name(name)) {
        if let Err(error) = remove_if_stale(storage, &dir.join(name)) {
            log::warn!("could not remove a stale image: {error}");
        }
    }
}

fn is_part_name(name: &OsStr) -> bool {
    let bytes = name.as_encoded_bytes();
    bytes.starts_with(b".") && bytes.ends_with(PART_SUFFIX.as_bytes())
}

/// A committed image of a chain.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ChainImage {
    /// Its number; later images have higher ones.
    pub sequence: u64,
    /// Its file.
    pub path: PathBuf,
}

/// Returns the committed images of the chain in `dir`, oldest first.
pub fn chain_images(storage: &dyn Storage, dir: &Path) -> Result<Vec<ChainImage>, StoreError> {
    let names = storage
        .list(dir)
        .map_err(StoreError::io("list directory", dir))?;
    let mut images: Vec<ChainImage> = names
        .iter()
        .filter_map(|name| {
            let sequence = sequence_of(name.to_str()?)?;
            Some(ChainImage {
                sequence,
                path: dir.join(name),
            })
        })
        .collect();
    images.sort();
    Ok(images)
}

/// Returns the number in an image's name, as in `00000012-9f3c01ab.lpi`.
fn sequence_of(name: &str) -> Option<u64> {
    let (sequence, short) = name.strip_suffix(IMAGE_SUFFIX)?.split_once('-')?;
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if sequence.len() < 8 || !digits(sequence) || short.len() != 8 || !hex(short) {
        return None;
    }
    sequence.parse().ok()
}

/// Returns the image that `path` means: itself, or the newest of the chain in a directory.
pub(crate) fn resolve(storage: &dyn Storage, path: &Path) -> Result<PathBuf, StoreError> {
    let kind = storage.kind(path).map_err(StoreError::io("find", path))?;
    if kind != Some(EntryKind::Directory) {
        return Ok(path.to_owned());
    }
    let newest = chain_images(storage, path)?.pop();
    newest
        .map(|image| image.path)
        .ok_or_else(|| StoreError::EmptyChain {
            path: path.to_owned(),
        })
}

/// Removes the image at `path`, durably. One that somebody reads or replaces is left alone.
pub fn remove_image(storage: &dyn Storage, path: &Path) -> Result<(), StoreError> {
    let file = lock_replaced(storage, path)?;
    if file.is_at(path).map_err(StoreError::io("find", path))? {
        storage
            .remove(path)
            .map_err(StoreError::io("remove", path))?;
    }
    let dir = parent_of(path);
    storage
        .sync_dir(&dir)
        .map_err(StoreError::io("sync directory", &dir))
}
