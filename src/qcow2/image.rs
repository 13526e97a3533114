//! An open image.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::UNIX_EPOCH;

use imago::file::File as ImageFile;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{
    DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping,
};
use rustix::fs::{FallocateFlags, OFlags, fallocate, fcntl_getfl};

use super::header::{self, Header};
use super::{LAYERS_MAX, NAME, unusable};
use crate::guest::{DiskImage, FrozenDisk, ImageError, ImageFormat};
use crate::sys::lock::holder_of;
use crate::sys::reflink::{Snapshot, Snapshots};

/// Bytes of zeros that are written at a time where the format cannot say it.
const ZEROS_BYTES: usize = 1 << 20;
/// Bytes of a cluster of a new image, as in QEMU.
const CLUSTER_BYTES: u64 = 64 << 10;
/// The most that is looked at to find the next data.
const LOOK_BYTES: u64 = 64 << 20;

type Access = FormatAccess<ImageFile>;

/// The format qcow2, for [`crate::host::DomainOptions`].
#[derive(Clone, Copy, Debug)]
pub struct Qcow2Format;

impl ImageFormat for Qcow2Format {
    fn name(&self) -> &'static str {
        NAME
    }

    fn open(
        &self,
        file: File,
        path: &Path,
        writable: bool,
    ) -> Result<Box<dyn DiskImage>, ImageError> {
        let mut files = Vec::new();
        let (access, header) = open_layer(file, path, writable, &mut files)?;
        let mut image = Image::new(path, access, header, files);
        image.snapshots = writable.then(|| Snapshots::of(path));
        Ok(Box::new(image))
    }

    fn create(
        &self,
        file: File,
        path: &Path,
        bytes: u64,
        like: Option<&Path>,
    ) -> Result<Box<dyn DiskImage>, ImageError> {
        let mut files = vec![duplicate(&file, path)?];
        let like = like.and_then(|like| {
            let header = header::read(&File::open(like).ok()?, like, false).ok()?;
            let below = open_backing(&header, like, &mut files).ok()?;
            Some((header, below))
        });
        let (like, below) = like.map_or((None, None), |(header, below)| (Some(header), below));
        let cluster_bytes = like
            .as_ref()
            .map_or(CLUSTER_BYTES, |like| like.cluster_bytes);
        let mut builder = Qcow2::<ImageFile>::create_builder(storage(file, path)?)
            .size(bytes)
            .cluster_size(usize::try_from(cluster_bytes).expect("2 MiB at most"));
        if let Some(named) = like.and_then(|like| like.backing) {
            let format = if named.is_qcow2 { NAME } else { "raw" };
            builder = builder.backing(named.name, format.to_owned());
        }
        let made = guarded(|| {
            builder.create_open(DenyImplicitOpenGate::default(), |image| {
                Ok(Qcow2::<ImageFile>::builder(image).backing(below))
            })
        });
        let made = made.map_err(ImageError::io("make the image", path))?;
        let header = Header {
            bytes,
            cluster_bytes,
            backing: None,
        };
        let access = FormatAccess::new(made);
        Ok(Box::new(Image::new(path, access, header, files)))
    }
}

fn storage(file: File, path: &Path) -> Result<ImageFile, ImageError> {
    ImageFile::try_from(file).map_err(ImageError::io("examine", path))
}

fn duplicate(file: &File, path: &Path) -> Result<File, ImageError> {
    file.try_clone().map_err(ImageError::io("examine", path))
}

/// Opens an image and those below it. Appends all files, this one first.
fn open_layer(
    file: File,
    path: &Path,
    writable: bool,
    files: &mut Vec<File>,
) -> Result<(Access, Header), ImageError> {
    if files.len() >= LAYERS_MAX {
        let why = format!("it is based on more than {LAYERS_MAX} files, or on itself");
        return Err(unusable(path, why));
    }
    files.push(duplicate(&file, path)?);
    let header = read_header(&file, path, writable)?;
    let backing = open_backing(&header, path, files)?;
    let storage = storage(file, path)?;
    let opened = guarded(|| {
        Qcow2::<ImageFile>::builder(storage)
            .write(writable)
            .backing(backing)
            .data_file(None)
            .open(DenyImplicitOpenGate::default())
    });
    let opened = opened.map_err(|error| match error.kind() {
        // What the system said has a number; the others are what the image says.
        _ if error.raw_os_error().is_some() => ImageError::io("open", path)(error),
        _ => unusable(path, error.to_string()),
    })?;
    Ok((FormatAccess::new(opened), header))
}

fn read_header(file: &File, path: &Path, writable: bool) -> Result<Header, ImageError> {
    let flags = fcntl_getfl(file).map_err(|error| ImageError::io("examine", path)(error.into()))?;
    if !flags.contains(OFlags::DIRECT) {
        return header::read(file, path, writable);
    }
    // Direct I/O takes aligned memory only: a header is read by the page cache.
    let by_cache = File::open(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
        .map_err(ImageError::io("open", path))?;
    header::read(&by_cache, path, writable)
}

/// Opens the file that the image at `path` is based on, if any, and locks it against writers.
fn open_backing(
    header: &Header,
    path: &Path,
    files: &mut Vec<File>,
) -> Result<Option<Access>, ImageError> {
    let Some(backing) = &header.backing else {
        return Ok(None);
    };
    let below = backing.path_from(path);
    let metadata = fs::metadata(&below).map_err(ImageError::io("examine backing file", &below))?;
    if !metadata.is_file() {
        // Opening a pipe would wait for somebody to write.
        return Err(unusable(&below, "it is no regular file".to_owned()));
    }
    let file = File::open(&below).map_err(ImageError::io("open backing file", &below))?;
    file.try_lock_shared().map_err(|error| match error {
        TryLockError::WouldBlock => ImageError::InUse {
            path: below.clone(),
            holder: holder_of(&file),
        },
        TryLockError::Error(source) => ImageError::io("lock backing file", &below)(source),
    })?;
    if backing.is_qcow2 {
        return Ok(Some(open_layer(file, &below, false, files)?.0));
    }
    files.push(duplicate(&file, &below)?);
    let raw = Raw::open_image(storage(file, &below)?, false);
    let raw = raw.map_err(ImageError::io("open backing file", &below))?;
    Ok(Some(FormatAccess::new(raw)))
}

/// Calls imago, for which an image that nobody checked in full may hold surprises.
fn guarded<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|_| Err(io::Error::other("its tables contradict each other")))
}

struct Image {
    path: PathBuf,
    header: Header,
    /// Itself, and those below it.
    files: Vec<File>,
    /// `None` only while it is dropped. Discards need it for themselves.
    access: RwLock<Option<Access>>,
    /// The tables in memory may be half changed: nothing is done any more.
    is_broken: AtomicBool,
    /// Of the file; `None` where nobody asks for any.
    snapshots: Option<Snapshots>,
}

/// An image as it was.
#[derive(Debug)]
struct FrozenImage {
    image: Image,
    _snapshot: Snapshot,
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("path", &self.path)
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

impl Image {
    fn new(path: &Path, access: Access, header: Header, files: Vec<File>) -> Self {
        Self {
            path: path.to_owned(),
            header,
            files,
            access: RwLock::new(Some(access)),
            is_broken: AtomicBool::new(false),
            snapshots: None,
        }
    }

    fn checked<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.is_broken.load(Ordering::Acquire) {
            return Err(io::Error::other("the image is damaged, and was given up"));
        }
        match catch_unwind(AssertUnwindSafe(call)) {
            Ok(result) => result,
            Err(_) => {
                self.is_broken.store(true, Ordering::Release);
                log::error!(
                    "image {} is damaged: no more is read from it or written to it",
                    self.path.display()
                );
                Err(io::Error::other("the image's tables contradict each other"))
            }
        }
    }

    fn with<T>(&self, call: impl FnOnce(&Access) -> io::Result<T>) -> io::Result<T> {
        let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
        let access = access.as_ref().expect("there until it is dropped");
        self.checked(|| call(access))
    }

    fn with_alone<T>(&self, call: impl FnOnce(&mut Access) -> io::Result<T>) -> io::Result<T> {
        let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
        let access = access.as_mut().expect("there until it is dropped");
        self.checked(|| call(access))
    }

    /// Gives the file's room back for the whole clusters of a range, which read as zeros then: a
    /// discard by itself only lets the image use them again.
    fn punch(&self, access: &Access, range: Range<u64>) -> io::Result<()> {
        let cluster = self.header.cluster_bytes;
        let mut at = range.start.next_multiple_of(cluster);
        let end = range.end - range.end % cluster;
        while at < end {
            let (mapping, len) = access.get_mapping(at, end - at)?;
            if len == 0 {
                break;
            }
            if let Mapping::Raw {
                offset,
                writable: true,
                ..
            } = mapping
            {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                if fallocate(&self.files[0], how, offset, len).is_err() {
                    // A file system that has no holes.
                    break;
                }
            }
            at += len;
        }
        Ok(())
    }
}

/// Writes zeros as data: images of version 2 cannot say that there are some.
fn write_zeros(access: &Access, range: Range<u64>) -> io::Result<()> {
    static ZEROS: [u8; ZEROS_BYTES] = [0; ZEROS_BYTES];
    let mut at = range.start;
    while at < range.end {
        let part =
            usize::try_from(range.end - at).map_or(ZEROS_BYTES, |left| left.min(ZEROS_BYTES));
        access.write(&ZEROS[..part], at)?;
        at += part as u64;
    }
    Ok(())
}

impl DiskImage for Image {
    fn bytes(&self) -> u64 {
        self.header.bytes
    }

    fn modified_ns(&self) -> u64 {
        let modified = |file: &File| {
            let time = file.metadata().ok()?.modified().ok()?;
            u64::try_from(time.duration_since(UNIX_EPOCH).ok()?.as_nanos()).ok()
        };
        self.files.iter().filter_map(modified).max().unwrap_or(0)
    }

    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.with(|access| access.read(out, offset))
    }

    fn write_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.with(|access| access.write(data, offset))
    }

    fn zero(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let range = offset..offset + len;
        self.with_alone(|access| {
            let done = if may_unmap {
                self.punch(access, range.clone())?;
                access.discard_to_zero(offset, len)
            } else {
                access.write_zeroes(offset, len)
            };
            match done {
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    write_zeros(access, range)
                }
                done => done,
            }
        })
    }

    fn flush(&self, durable: bool) -> io::Result<()> {
        self.with(|access| {
            access.flush()?;
            if durable { access.sync() } else { Ok(()) }
        })
    }

    fn freeze(&self) -> io::Result<Option<Box<dyn FrozenDisk>>> {
        let Some(snapshots) = &self.snapshots else {
            return Ok(None);
        };
        // What waits for the disk does so here, and not when the guest cannot even read.
        if snapshots.take(&self.files[0]).is_none() {
            return Ok(None);
        }
        // Alone, so that no table changes between their writing and the snapshot.
        let snapshot = self.with_alone(|access| {
            access.flush()?;
            Ok(snapshots.take(&self.files[0]))
        })?;
        let Some(snapshot) = snapshot else {
            return Ok(None);
        };
        let mut files = Vec::new();
        let opened = open_layer(snapshot.file()?, &self.path, false, &mut files);
        let (access, header) = opened.map_err(io::Error::other)?;
        Ok(Some(Box::new(FrozenImage {
            image: Self::new(&self.path, access, header, files),
            _snapshot: snapshot,
        })))
    }

    fn next_data(&self, mut offset: u64) -> io::Result<Option<Range<u64>>> {
        let bytes = self.header.bytes;
        self.with(|access| {
            while offset < bytes {
                let wanted = LOOK_BYTES.min(bytes - offset);
                let (mapping, len) = access.get_mapping(offset, wanted)?;
                match mapping {
                    Mapping::Eof { .. } => return Ok(None),
                    Mapping::Zero { .. } if len > 0 => offset += len,
                    _ => return Ok(Some(offset..(offset + len.max(1)).min(bytes))),
                }
            }
            Ok(None)
        })
    }
}

impl FrozenDisk for FrozenImage {
    fn read_at(&self, out: &mut [u8], offset: u64) -> io::Result<()> {
        self.image.read_at(out, offset)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.image.next_data(offset)
    }
}

impl Drop for Image {
    #[expect(
        clippy::mem_forget,
        reason = "tables that are half changed are not to be written"
    )]
    fn drop(&mut self) {
        let access = self.access.get_mut();
        let Some(access) = access.unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        let flushed = self.checked(|| access.flush());
        if let Err(error) = flushed {
            log::warn!("image {}: {error}", self.path.display());
        }
        if self.is_broken.load(Ordering::Acquire) {
            std::mem::forget(access);
        }
    }
}
