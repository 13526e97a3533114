//! The header of a qcow2 image, which anybody may have written: docs/interop/qcow2.txt of QEMU.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::unusable;
use crate::guest::ImageError;

const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the header of version 2, and of the smallest one of version 3.
const HEADER_BYTES: [usize; 2] = [72, 104];
/// The largest cluster that there is, and so the most that a header may take: 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Most entries of an L1 table, as in QEMU: 32 MiB of them.
const L1_ENTRIES_MAX: u64 = 4 << 20;
/// Most bytes of a table of refcounts, as in QEMU.
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
/// Longest name of the file below.
const BACKING_NAME_BYTES_MAX: u32 = 1023;
/// Longest name of the format of the file below.
const BACKING_FORMAT_BYTES_MAX: usize = 16;
/// Bytes of an entry in a table of features' names.
const FEATURE_NAME_BYTES: usize = 48;

/// Kinds of extensions of the header.
mod extension {
    pub(super) const END: u32 = 0;
    pub(super) const BACKING_FORMAT: u32 = 0xe279_2aca;
    pub(super) const FEATURE_NAMES: u32 = 0x6803_f857;
}

/// What whoever does not know it must not open the image with, by bit.
const INCOMPATIBLE: [&str; 5] = [
    "it was not closed, and its refcounts may be wrong: `qemu-img check -r all` mends them",
    "it is marked as corrupt: `qemu-img check -r all` may mend it",
    "its data is in another file, which is not supported",
    "it is compressed in another way than by zlib, which is not supported",
    "it has extended L2 entries, which are not supported",
];

/// What is needed of a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Length of the disk.
    pub(super) bytes: u64,
    /// Bytes of a cluster.
    pub(super) cluster_bytes: u64,
    /// The file below, which is read where this one has nothing.
    pub(super) backing: Option<Backing>,
}

/// The file below an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Backing {
    /// Its path, relative to the image's directory.
    pub(super) name: String,
    /// Whether it is a qcow2 image itself, and not raw.
    pub(super) is_qcow2: bool,
}

impl Backing {
    /// Returns its path, where `image` is that of the image above it.
    pub(super) fn path_from(&self, image: &Path) -> PathBuf {
        image.parent().unwrap_or(Path::new(".")).join(&self.name)
    }
}

/// Reads and checks the header of `file`, whose name is `path`.
pub(super) fn read(file: &File, path: &Path, writable: bool) -> Result<Header, ImageError> {
    let metadata = file.metadata().map_err(ImageError::io("examine", path))?;
    if !metadata.is_file() {
        return Err(unusable(path, "it is no regular file".to_owned()));
    }
    let head = read_head(file).map_err(ImageError::io("read", path))?;
    parse(&head, metadata.len(), writable).map_err(|why| unusable(path, why))
}

/// Reads as much as a header may take, or the file has.
fn read_head(file: &File) -> io::Result<Vec<u8>> {
    let mut head = vec![0; 1 << CLUSTER_BITS.end()];
    let mut len = 0;
    while len < head.len() {
        match file.read_at(&mut head[len..], len as u64) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    head.truncate(len);
    Ok(head)
}

/// The fields of a header, big-endian.
struct Fields<'h>(&'h [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&self, at: usize) -> Result<[u8; N], String> {
        let bytes = self.0.get(at..).and_then(<[u8]>::first_chunk);
        bytes.copied().ok_or_else(|| "it is cut off".to_owned())
    }

    fn u32(&self, at: usize) -> Result<u32, String> {
        Ok(u32::from_be_bytes(self.bytes(at)?))
    }

    fn u64(&self, at: usize) -> Result<u64, String> {
        Ok(u64::from_be_bytes(self.bytes(at)?))
    }
}

/// Checks the beginning of a file of `file_bytes`. An error says what is wrong with it.
pub(super) fn parse(head: &[u8], file_bytes: u64, writable: bool) -> Result<Header, String> {
    if head.len() < HEADER_BYTES[0] || Fields(head).u32(0)? != MAGIC {
        return Err("it does not begin as one".to_owned());
    }
    let version = Fields(head).u32(4)?;
    if ![2, 3].contains(&version) {
        return Err(format!("it is of version {version}, and not 2 or 3"));
    }
    let cluster_bits = Fields(head).u32(20)?;
    if !CLUSTER_BITS.contains(&cluster_bits) {
        return Err(format!("its clusters have 2^{cluster_bits} bytes"));
    }
    let cluster = 1_u64 << cluster_bits;
    // The header, its extensions and the name of the file below are in the first cluster.
    let first = usize::try_from(cluster).map_or(head.len(), |cluster| cluster.min(head.len()));
    let head = &head[..first];
    let fields = Fields(head);
    if fields.u32(32)? != 0 {
        return Err("it is encrypted, which is not supported".to_owned());
    }
    let extensions_at = if version == 2 {
        None
    } else {
        Some(check_version_3(&fields)?)
    };
    check_tables(&fields, cluster, file_bytes)?;
    let snapshots = fields.u32(60)?;
    if writable && snapshots != 0 {
        return Err(format!(
            "it has {snapshots} internal snapshots, and can only be read: `qemu-img snapshot -d` \
             deletes them"
        ));
    }
    let format = extensions_at
        .map(|at| backing_format(head, at))
        .transpose()?;
    Ok(Header {
        bytes: fields.u64(24)?,
        cluster_bytes: cluster,
        backing: backing(&fields, format.flatten())?,
    })
}

/// Checks what version 3 has more; returns where extensions begin.
fn check_version_3(fields: &Fields<'_>) -> Result<usize, String> {
    let features = fields.u64(72)?;
    if features != 0 {
        let bit = features.trailing_zeros() as usize;
        let known = INCOMPATIBLE.get(bit);
        return Err(known.map_or_else(
            || format!("it has feature {bit}, which is not known"),
            |what| (*what).to_owned(),
        ));
    }
    let refcount_order = fields.u32(96)?;
    if refcount_order > 6 {
        return Err(format!("its refcounts have 2^{refcount_order} bits"));
    }
    let length = fields.u32(100)? as usize;
    if length < HEADER_BYTES[1] || !length.is_multiple_of(8) || length > fields.0.len() {
        return Err(format!("its header has {length} bytes"));
    }
    Ok(length)
}

/// Checks that the tables are inside of the file, apart, and large enough.
fn check_tables(fields: &Fields<'_>, cluster: u64, file_bytes: u64) -> Result<(), String> {
    let bytes = fields.u64(24)?;
    if i64::try_from(bytes).is_err() {
        return Err(format!("its disk has {bytes} bytes"));
    }
    let l1_entries = u64::from(fields.u32(36)?);
    // An L1 entry stands for a cluster of entries of 8 bytes, each of which is for a cluster.
    let needed = bytes.div_ceil(cluster * (cluster / 8));
    if l1_entries < needed || l1_entries > L1_ENTRIES_MAX {
        return Err(format!(
            "its L1 table has {l1_entries} entries, and its disk of {bytes} bytes needs {needed}"
        ));
    }
    let l1 = table("L1", fields.u64(40)?, l1_entries * 8, cluster, file_bytes)?;
    let clusters = u64::from(fields.u32(56)?);
    let refcount_bytes = clusters * cluster;
    if clusters == 0 || refcount_bytes > REFCOUNT_TABLE_BYTES_MAX {
        return Err(format!("its refcount table has {clusters} clusters"));
    }
    let refcounts = table(
        "refcount",
        fields.u64(48)?,
        refcount_bytes,
        cluster,
        file_bytes,
    )?;
    if l1.start < refcounts.end && refcounts.start < l1.end {
        return Err("its L1 table is its refcount table".to_owned());
    }
    Ok(())
}

/// Checks where a table is.
fn table(
    what: &str,
    offset: u64,
    bytes: u64,
    cluster: u64,
    file_bytes: u64,
) -> Result<Range<u64>, String> {
    let end = offset.checked_add(bytes).filter(|end| *end <= file_bytes);
    // The first cluster is the header's. An image of an empty disk has no L1 table.
    let is_placed = offset >= cluster && offset.is_multiple_of(cluster);
    match end {
        Some(end) if is_placed || bytes == 0 => Ok(offset..end),
        _ => Err(format!(
            "its {what} table should be at {offset:#x}, and the file has {file_bytes:#x} bytes"
        )),
    }
}

/// Walks the extensions; returns the format of the file below, where it says one.
fn backing_format(head: &[u8], mut at: usize) -> Result<Option<&str>, String> {
    let fields = Fields(head);
    let mut format = None;
    loop {
        let (kind, length) = (fields.u32(at)?, fields.u32(at + 4)? as usize);
        let start = at + 8;
        if kind == extension::END {
            return Ok(format);
        }
        let outside = || format!("its extension {kind:#x} is longer than its first cluster");
        let data = head.get(start..).and_then(|rest| rest.get(..length));
        let data = data.ok_or_else(outside)?;
        match kind {
            extension::BACKING_FORMAT => {
                let name = std::str::from_utf8(data).ok();
                let name = name.filter(|name| name.len() <= BACKING_FORMAT_BYTES_MAX);
                let name = name.ok_or("the format of its backing file is no name")?;
                format = Some(name);
            }
            extension::FEATURE_NAMES if !length.is_multiple_of(FEATURE_NAME_BYTES) => {
                return Err(format!("its table of feature names has {length} bytes"));
            }
            _ => {}
        }
        at = start + length.next_multiple_of(8);
    }
}

fn backing(fields: &Fields<'_>, format: Option<&str>) -> Result<Option<Backing>, String> {
    let (offset, length) = (fields.u64(8)?, fields.u32(16)?);
    if offset == 0 {
        return Ok(None);
    }
    let start = usize::try_from(offset).ok().filter(|_| length > 0);
    let name = start
        .filter(|_| length <= BACKING_NAME_BYTES_MAX)
        .and_then(|start| fields.0.get(start..)?.get(..length as usize));
    let name = name.and_then(|name| std::str::from_utf8(name).ok());
    let name = name.ok_or("the name of its backing file is damaged")?;
    // QEMU takes what is before a colon for a protocol.
    let first = name.split('/').next().unwrap_or_default();
    if first.contains(':') || name.contains('\0') {
        return Err(format!("its backing file {name:?} is no path of a file"));
    }
    let is_qcow2 = match format {
        Some("qcow2") => true,
        Some("raw") => false,
        Some(other) => {
            return Err(format!(
                "its backing file {name} is of format {other:?}, which is not supported"
            ));
        }
        // To guess would let whoever wrote the file below name any other file.
        None => {
            return Err(format!(
                "it does not say of which format its backing file {name} is: `qemu-img rebase -u \
                 -b FILE -F FORMAT` does"
            ));
        }
    };
    Ok(Some(Backing {
        name: name.to_owned(),
        is_qcow2,
    }))
}
