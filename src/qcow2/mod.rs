//! Disks in qcow2 images.
//!
//! What a header says is checked here, whoever reads the image after that. Reading and writing is
//! the crate imago's affair, and behind the feature `qcow2`: nothing in `host` or `capi` uses it.
//! The command hands it to the domains that it makes.

mod header;
#[cfg(feature = "qcow2")]
mod image;
#[cfg(all(test, feature = "qcow2"))]
mod tests;

use std::fs::File;
use std::path::{Path, PathBuf};

use crate::guest::ImageError;

#[cfg(feature = "qcow2")]
pub use image::Qcow2Format;

/// Name of the format.
const NAME: &str = "qcow2";

/// The most files that one image is made of: itself, and those below it. So a loop has an end.
const LAYERS_MAX: usize = 32;

/// Returns the length of the disk in the image at `path`. Takes no lock: somebody may be using it.
///
/// # Errors
/// The file cannot be read, or is no qcow2 image.
pub fn disk_bytes(path: &Path) -> Result<u64, ImageError> {
    let file = File::open(path).map_err(ImageError::io("open", path))?;
    Ok(header::read(&file, path, false)?.bytes)
}

/// Returns the files below the image at `path`, nearest first, as far as their headers tell.
pub fn backing_files(path: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut next = Some(path.to_owned());
    while let Some(image) = next.filter(|_| files.len() < LAYERS_MAX) {
        let header = File::open(&image).map(|file| header::read(&file, &image, false));
        let Ok(Ok(header::Header {
            backing: Some(backing),
            ..
        })) = header
        else {
            break;
        };
        let below = backing.path_from(&image);
        files.push(below.clone());
        next = backing.is_qcow2.then_some(below);
    }
    files
}

fn unusable(path: &Path, why: String) -> ImageError {
    ImageError::Unusable {
        path: path.to_owned(),
        format: NAME,
        why,
    }
}
