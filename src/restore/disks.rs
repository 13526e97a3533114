//! Disks back from an image.

use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};

use crate::guest::DiskImage;
use crate::page::{PAGE_BYTES, PAGE_SHIFT, PIECE_BYTES, PageRun};
use crate::store::{ImageReader, ReadScratch, StoreError};

/// A disk that could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// The image could not be read, or is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The file could not be written.
    #[error("could not write the disk")]
    Io(#[from] io::Error),
    /// The block device is smaller than the disk.
    #[error("the block device has {found} bytes, the disk {needed}")]
    TooSmall {
        /// Length of the device.
        found: u64,
        /// Length of the disk.
        needed: u64,
    },
}

/// Writes disk `disk` of the image, by its place in the manifest, to `file`: an empty regular file,
/// or a block device. Returns once it is on stable storage.
///
/// Every block is checked before it is written. What is zeros becomes a hole in a file; what is not
/// compressed in the image shares its blocks with the file, where the file system has that.
///
/// # Panics
/// When the image has no such disk.
pub fn write(reader: &ImageReader, disk: usize, file: &File) -> Result<(), DiskError> {
    let bytes = reader.manifest().disks[disk].bytes;
    let frames = reader.disk_frames(disk);
    let is_device = file.metadata()?.file_type().is_block_device();
    if is_device {
        clear(reader, frames, file, bytes)?;
    } else {
        file.set_len(bytes)?;
    }
    let mut scratch = ReadScratch::default();
    let mut shares = !is_device;
    for chunk in reader.disk_chunks(frames) {
        let raw = reader.read_chunk(chunk, &mut scratch)?;
        for part in reader.runs_of_chunk(chunk) {
            if part.run.intersection(frames).is_none() {
                continue;
            }
            let offset = (part.run.start.0 - frames.start.0) << PAGE_SHIFT;
            let data = part.bytes_in(raw);
            // The last block may go on behind the disk's end.
            let left = usize::try_from(bytes - offset).unwrap_or(usize::MAX);
            if shares && data.len() <= left && reader.is_plain(chunk) {
                let from = part.first_page * PAGE_BYTES;
                // Where one cannot be shared, no other can.
                shares = reader.share_chunk(chunk, from, data.len(), file, offset);
                if shares {
                    continue;
                }
            }
            file.write_all_at(&data[..data.len().min(left)], offset)?;
        }
    }
    file.sync_all()?;
    Ok(())
}

/// The most of a disk that is compared with what an image has already: a cluster, as most have.
const COMPARED_BYTES: usize = 64 << 10;

/// Writes disk `disk` of the image, by its place in the manifest, to `to`, as long as the disk.
/// Returns once it is on stable storage.
///
/// Every block is checked before it is written. What reads as it should already is left alone: so an
/// image that is based on another file takes up only what differs from that.
///
/// # Panics
/// When the image has no such disk.
pub fn write_image(reader: &ImageReader, disk: usize, to: &dyn DiskImage) -> Result<(), DiskError> {
    let bytes = reader.manifest().disks[disk].bytes;
    let frames = reader.disk_frames(disk);
    let offset_of = |run: PageRun| (run.start.0 - frames.start.0) << PAGE_SHIFT;
    let mut scratch = ReadScratch::default();
    let mut found = vec![0; COMPARED_BYTES];
    for chunk in reader.disk_chunks(frames) {
        let raw = reader.read_chunk(chunk, &mut scratch)?;
        for part in reader.runs_of_chunk(chunk) {
            if part.run.intersection(frames).is_none() {
                continue;
            }
            let mut offset = offset_of(part.run);
            let data = part.bytes_in(raw);
            // The last block may go on behind the disk's end.
            let left = usize::try_from(bytes - offset).unwrap_or(usize::MAX);
            for piece in data[..data.len().min(left)].chunks(COMPARED_BYTES) {
                let found = &mut found[..piece.len()];
                to.read_at(found, offset)?;
                if found != piece {
                    to.write_at(piece, offset)?;
                }
                offset += piece.len() as u64;
            }
        }
    }
    for run in reader.disk_zero_runs(frames) {
        let mut offset = offset_of(run);
        let end = (offset + run.page_count * PAGE_BYTES as u64).min(bytes);
        while let Some(data) = to.next_data(offset)?.filter(|data| data.start < end) {
            let stop = data.end.min(end);
            to.zero(data.start, stop - data.start, true)?;
            offset = stop;
        }
    }
    to.flush(true)?;
    Ok(())
}

/// Writes zeros where a block device has to have them.
fn clear(
    reader: &ImageReader,
    frames: PageRun,
    mut file: &File,
    bytes: u64,
) -> Result<(), DiskError> {
    static ZEROS: [u8; PIECE_BYTES] = [0; PIECE_BYTES];
    let found = io::Seek::seek(&mut file, io::SeekFrom::End(0))?;
    if found < bytes {
        let needed = bytes;
        return Err(DiskError::TooSmall { found, needed });
    }
    for run in reader.disk_zero_runs(frames) {
        let mut offset = (run.start.0 - frames.start.0) << PAGE_SHIFT;
        let end = (offset + run.page_count * PAGE_BYTES as u64).min(bytes);
        while offset < end {
            let part =
                usize::try_from(end - offset).map_or(PIECE_BYTES, |left| left.min(PIECE_BYTES));
            file.write_all_at(&ZEROS[..part], offset)?;
            offset += part as u64;
        }
    }
    Ok(())
}
