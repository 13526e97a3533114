//! Which images of a directory are kept, and giving the room of the others back.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use serde::Serialize;
use uuid::Uuid;

use crate::store::backend::{LockKind, Storage, StorageFile};
use crate::store::chain::{chain_images, has_image_suffix};
use crate::store::error::StoreError;
use crate::store::manifest::Manifest;
use crate::store::source::peek_manifest;

/// What [`collect_garbage`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Garbage {
    /// Images that were removed.
    pub removed: Vec<PathBuf>,
    /// Bytes that they took.
    pub freed_bytes: u64,
    /// Images that are older than those to keep, and that these need.
    pub needed: Vec<PathBuf>,
    /// Images that would have been removed, but are being read.
    pub in_use: Vec<PathBuf>,
}

/// An image of the directory that could be read.
struct Candidate {
    name: OsString,
    path: PathBuf,
    guest: Uuid,
}

/// Keeps the newest `keep` images of each guest in the chain in `dir`, and what they need; removes
/// the others, durably. What is kept for others only can no longer be restored by itself where it
/// needs an image that is removed.
///
/// Nothing that anybody reads is removed, and nothing that an image written meanwhile needs: its
/// writer leases that until the image is visible. Images under names of their own in the directory
/// are never removed, and keep what they need. Images that cannot be read are left alone.
pub fn collect_garbage(
    storage: &dyn Storage,
    dir: &Path,
    keep: usize,
) -> Result<Garbage, StoreError> {
    let old = expired(storage, dir, keep)?;
    let mut garbage = Garbage::default();
    let unneeded = split_needed(storage, dir, old, &mut garbage)?;
    let mut locked: Vec<(Candidate, Box<dyn StorageFile>)> = Vec::new();
    for image in unneeded {
        match lock(storage, &image.path)? {
            Some(file) => locked.push((image, file)),
            None => garbage.in_use.push(image.path),
        }
    }
    // Looked at again now that nobody can begin to need what is locked: an image may have come
    // meanwhile, and those in use need theirs. Of those that only others need, what they would need
    // themselves goes: a part of them is enough.
    let only_needed = garbage.needed.iter().filter_map(|path| path.file_name());
    let passed_over: HashSet<_> = locked
        .iter()
        .map(|(image, _)| image.name.clone())
        .chain(only_needed.map(ToOwned::to_owned))
        .collect();
    let needed = needed_by_others(storage, dir, &passed_over)?;
    for (image, file) in locked {
        if needed.contains(&image.name) {
            garbage.needed.push(image.path);
            continue;
        }
        garbage.freed_bytes += file
            .byte_len()
            .map_err(StoreError::io("read the length of", &image.path))?;
        storage
            .remove(&image.path)
            .map_err(StoreError::io("remove", &image.path))?;
        garbage.removed.push(image.path);
    }
    if !garbage.removed.is_empty() {
        storage
            .sync_dir(dir)
            .map_err(StoreError::io("sync directory", dir))?;
    }
    Ok(garbage)
}

/// Returns the images that are older than the newest `keep` of their guest.
fn expired(storage: &dyn Storage, dir: &Path, keep: usize) -> Result<Vec<Candidate>, StoreError> {
    let mut newer: HashMap<Uuid, usize> = HashMap::new();
    let mut old = Vec::new();
    for image in chain_images(storage, dir)?.into_iter().rev() {
        let (Ok(manifest), Some(name)) = (
            peek_manifest(storage, &image.path),
            image.path.file_name().map(ToOwned::to_owned),
        ) else {
            continue;
        };
        let count = newer.entry(manifest.guest.uuid).or_default();
        if *count >= keep {
            old.push(Candidate {
                name,
                path: image.path,
                guest: manifest.guest.uuid,
            });
        }
        *count += 1;
    }
    old.sort_by(|a, b| (a.guest, &a.name).cmp(&(b.guest, &b.name)));
    Ok(old)
}

/// Notes those of `old` that a kept image needs; returns the others. These are not locked: whoever
/// begins to read a kept image must find what it needs.
fn split_needed(
    storage: &dyn Storage,
    dir: &Path,
    old: Vec<Candidate>,
    garbage: &mut Garbage,
) -> Result<Vec<Candidate>, StoreError> {
    let names = old.iter().map(|image| image.name.clone()).collect();
    let needed = needed_by_others(storage, dir, &names)?;
    let (needed, unneeded) = old
        .into_iter()
        .partition::<Vec<_>, _>(|image| needed.contains(&image.name));
    garbage
        .needed
        .extend(needed.into_iter().map(|image| image.path));
    Ok(unneeded)
}

/// Returns the names that images of `dir` need, but for images with a name in `without`.
fn needed_by_others(
    storage: &dyn Storage,
    dir: &Path,
    without: &HashSet<OsString>,
) -> Result<HashSet<OsString>, StoreError> {
    let names = storage
        .list(dir)
        .map_err(StoreError::io("list directory", dir))?;
    let mut needed = HashSet::new();
    for name in names {
        let path = dir.join(&name);
        if without.contains(&name) || !has_image_suffix(&path) {
            continue;
        }
        // What cannot be read cannot be restored, whatever is there.
        let Ok(Manifest { layers, .. }) = peek_manifest(storage, &path) else {
            continue;
        };
        needed.extend(layers.into_iter().map(|layer| OsString::from(layer.file)));
    }
    Ok(needed)
}

/// Locks an image against readers; `None` where there are some, or it is gone.
fn lock(storage: &dyn Storage, path: &Path) -> Result<Option<Box<dyn StorageFile>>, StoreError> {
    let file = match storage.open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::io("open", path)(error)),
    };
    let locked = file
        .try_lock(LockKind::Exclusive)
        .map_err(StoreError::io("lock", path))?;
    let ours = locked && file.is_at(path).map_err(StoreError::io("find", path))?;
    Ok(ours.then_some(file))
}
