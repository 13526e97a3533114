//! Giving an image another document, with everything else as it is.

use std::io;
use std::path::Path;

use serde_json::Value;
use zerocopy::IntoBytes;

use crate::store::backend::{EntryKind, Storage, StorageFile};
use crate::store::chain::{self, Target};
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::{Digest, Header, IMAGE_BYTES_MAX, MANIFEST_BYTES_MAX, narrow, wide};
use crate::store::source::{RawImage, check_manifest};
use crate::store::space;

/// Bytes that are copied at a time.
const COPIED_BYTES: u64 = 1 << 20;

/// Replaces the domain XML in the image file at `path`, whole or not at all: the image is copied, with
/// another manifest, and the copy takes its name. `prepare` is called with the copy's path before that.
///
/// The image keeps its UUID, since it restores to the same guest, and gets another root digest.
///
/// Blocks while the image is copied.
///
/// # Errors
///
/// The path names no image file, somebody reads the image or another image needs it, storage fails,
/// or `prepare` does. The image is then as it was.
pub fn replace_domain_xml(
    storage: &dyn Storage,
    path: &Path,
    xml: &str,
    prepare: impl FnOnce(&Path) -> io::Result<()>,
) -> Result<(), StoreError> {
    let kind = storage.kind(path).map_err(StoreError::io("find", path))?;
    if kind != Some(EntryKind::File) {
        return Err(StoreError::NotReplaceable {
            path: path.to_owned(),
            what: "not a file with an image",
        });
    }
    // Locks the image, and sees to it that no other is based on it.
    let target = Target::new(storage, path)?;
    let old = RawImage::open(storage, path)?;
    let (header, manifest) = changed(&old, path, xml)?;
    space::ensure_free(storage, target.dir(), header.file_bytes)?;
    let part = target.part();
    let new = chain::create_part(storage, &part)?;
    let written = write(&old, new.as_ref(), &header, &manifest, &part)
        .and_then(|()| prepare(&part).map_err(StoreError::io("prepare", &part)))
        .and_then(|()| {
            let moved = storage.rename(&part, path);
            moved.map_err(StoreError::io("commit", path))
        });
    if written.is_err()
        && let Err(error) = storage.remove(&part)
    {
        log::warn!("could not remove {}: {error}", part.display());
    }
    written?;
    let dir = target.dir();
    storage
        .sync_dir(dir)
        .map_err(StoreError::io("sync directory", dir))
}

/// Returns the header and the manifest with another document.
fn changed(old: &RawImage, path: &Path, xml: &str) -> Result<(Header, Vec<u8>), StoreError> {
    let damaged = |reason: String| -> StoreError { Damage::new(Place::Manifest, reason).of(path) };
    // As JSON, so that what this build does not know stays.
    let mut manifest: Value =
        serde_json::from_slice(&old.manifest).map_err(|error| damaged(error.to_string()))?;
    let place = manifest.pointer_mut("/guest/domain_xml");
    *place.ok_or_else(|| damaged("has no domain XML".to_owned()))? = xml.into();
    let json = serde_json::to_vec(&manifest).map_err(|error| damaged(error.to_string()))?;
    let bytes = wide(json.len());
    let end = old.header.manifest_offset + bytes;
    if bytes > MANIFEST_BYTES_MAX || end > IMAGE_BYTES_MAX {
        return Err(StoreError::Unwritable {
            reason: format!("a manifest of {bytes} bytes"),
        });
    }
    let header = Header {
        file_bytes: end,
        manifest_bytes: bytes,
        root: Digest::of(&json),
        ..old.header.clone()
    };
    let read = serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
    check_manifest(&read, &header).map_err(|damage| damage.of(path))?;
    Ok((header, json))
}

fn write(
    old: &RawImage,
    new: &dyn StorageFile,
    header: &Header,
    manifest: &[u8],
    part: &Path,
) -> Result<(), StoreError> {
    let failed = || StoreError::io("write", part);
    new.write_all_at(header.encode().as_bytes(), 0)
        .map_err(failed())?;
    let mut at = wide(crate::store::format::HEADER_BYTES);
    let mut block = Vec::new();
    while at < header.manifest_offset {
        let bytes = COPIED_BYTES.min(header.manifest_offset - at);
        block.resize(narrow(bytes), 0);
        old.read(&mut block, at)?;
        new.write_all_at(&block, at).map_err(failed())?;
        at += bytes;
    }
    new.write_all_at(manifest, at).map_err(failed())?;
    new.sync().map_err(StoreError::io("sync", part))
}
