//! The layers of an image: other images that hold the memory which it did not write again.

use std::path::Path;

use crate::store::backend::Storage;
use crate::store::chain;
use crate::store::error::{Damage, Place, StoreError};
use crate::store::format::{Chunk, narrow, wide};
use crate::store::manifest::{LayerRef, Manifest};
use crate::store::source::LeasedFile;

/// An open layer, leased as its image is.
#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) file: LeasedFile,
    pub(crate) named: LayerRef,
    /// Number of its first chunk among all of the image's.
    pub(crate) first_chunk: usize,
}

/// Opens the layers that the image at `path` names, and appends their chunks to `chunks`.
///
/// Each is believed by the root digest that the image has for it: it is the very file that the
/// image was written on, or an error names it.
pub(crate) fn open_all(
    storage: &dyn Storage,
    path: &Path,
    manifest: &Manifest,
    chunks: &mut Vec<Chunk>,
) -> Result<Vec<Layer>, StoreError> {
    let dir = chain::parent_of(path);
    let mut layers = Vec::with_capacity(manifest.layers.len());
    for (number, named) in manifest.layers.iter().enumerate() {
        let layer_path = dir.join(&named.file);
        let opened = open(storage, &layer_path, named, number, chunks);
        layers.push(opened.map_err(|source| StoreError::Layer {
            path: path.to_owned(),
            layer: layer_path,
            source: Box::new(source),
        })?);
    }
    Ok(layers)
}

fn open(
    storage: &dyn Storage,
    path: &Path,
    named: &LayerRef,
    number: usize,
    chunks: &mut Vec<Chunk>,
) -> Result<Layer, StoreError> {
    let file = LeasedFile::open(storage, path.to_owned())?;
    let differs = |reason: String| {
        let place = Place::Layer { layer: number };
        Err(Damage::new(place, reason).of(path))
    };
    let header = &file.header;
    if header.image_uuid != named.image_uuid || header.root != named.root_digest {
        return differs(format!(
            "should be image {} with root digest {}, is {} with {}",
            named.image_uuid, named.root_digest, header.image_uuid, header.root
        ));
    }
    let mut own = file.source().read_chunks(&file.manifest()?)?;
    if wide(own.len()) != u64::from(named.chunk_count) {
        return differs(format!(
            "should have {} chunks, has {}",
            named.chunk_count,
            own.len()
        ));
    }
    let first_chunk = chunks.len();
    chunks.append(&mut own);
    Ok(Layer {
        file,
        named: named.clone(),
        first_chunk,
    })
}

/// Returns the layers that a child of an image has, as far as `used` has one of their chunks:
/// first the image itself, then its own. Chunk numbers in `used` are the image's.
pub(crate) fn named_by_child(
    parent: &crate::store::ImageReader,
    used: &[bool],
) -> Vec<(LayerRef, std::ops::Range<usize>)> {
    let itself = LayerRef {
        image_uuid: parent.image_uuid(),
        root_digest: parent.file().header.root,
        file: file_name(parent.path()),
        chunk_count: u32::try_from(parent.own_chunk_count())
            .expect("chunks are counted in 24 bits"),
    };
    let own = std::iter::once((itself, 0));
    let layers = parent.layers().iter();
    own.chain(layers.map(|layer| (layer.named.clone(), layer.first_chunk)))
        .map(|(layer, first)| {
            let end = first + narrow(u64::from(layer.chunk_count));
            (layer, first..end)
        })
        .filter(|(_, chunks)| used.get(chunks.clone()).unwrap_or_default().contains(&true))
        .collect()
}

/// Returns a file's name as text; what is not UTF-8 was refused when the writing began.
pub(crate) fn file_name(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}
