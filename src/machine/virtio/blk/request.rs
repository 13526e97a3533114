//! One request of a disk's driver.

use std::io;
use std::time::{Duration, Instant};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::disk::{Disk, DiskCounters, SECTOR_BYTES};
use super::{RANGE_SECTORS_MAX, RANGES_MAX};
use crate::machine::virtio::{Chain, Slices};

/// Type, something reserved, first sector.
const HEADER_BYTES: usize = 16;
/// A range of a discard: sector, count, flags.
const RANGE_BYTES: usize = 16;
/// Flag of a range of zeroes: it may become a hole.
const MAY_UNMAP: u32 = 1;
/// Bytes of a disk's serial number.
const ID_BYTES: usize = 20;

/// Why a request was not carried out.
#[derive(Debug)]
enum Refused {
    Unsupported,
    Failed(io::Error),
}

impl From<io::Error> for Refused {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

fn invalid(what: &'static str) -> Refused {
    Refused::Failed(io::Error::new(io::ErrorKind::InvalidInput, what))
}

/// Carries out the request in `chain`; returns how many bytes of it were written.
///
/// An error says which rule the request breaks so that it cannot even be answered.
pub(super) fn carry_out(
    disk: &Disk,
    chain: &Chain<'_>,
    write_through: bool,
) -> Result<u32, &'static str> {
    let mut readable = chain.readable.clone();
    let mut header = [0; HEADER_BYTES];
    if !readable.read(&mut header) {
        return Err("a request has no header");
    }
    // The status is the last byte, wherever the driver put it.
    let mut status = chain.writable.clone();
    let room = status.len().checked_sub(1);
    let room = room.ok_or("a request has no room for its status")?;
    let writable = status.take_front(room);
    let kind = u32::from_le_bytes(header[..4].try_into().expect("4 bytes"));
    let sector = u64::from_le_bytes(header[8..].try_into().expect("8 bytes"));
    let (in_bytes, out_bytes) = (writable.len() as u64, readable.len() as u64);
    let began = Instant::now();
    let result = match kind {
        VIRTIO_BLK_T_IN => read(disk, sector, writable),
        VIRTIO_BLK_T_OUT => write(disk, sector, readable).map(|()| 0),
        VIRTIO_BLK_T_FLUSH => disk.flush().map(|()| 0).map_err(Into::into),
        VIRTIO_BLK_T_GET_ID => Ok(identify(disk, writable)),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            ranges(disk, readable, kind == VIRTIO_BLK_T_DISCARD).map(|()| 0)
        }
        _ => Err(Refused::Unsupported),
    };
    let modifies = [
        VIRTIO_BLK_T_OUT,
        VIRTIO_BLK_T_DISCARD,
        VIRTIO_BLK_T_WRITE_ZEROES,
    ];
    let result = match result {
        Ok(written) if write_through && modifies.contains(&kind) => {
            disk.flush().map(|()| written).map_err(Refused::Failed)
        }
        result => result,
    };
    count(
        disk.counters(),
        kind,
        &result,
        in_bytes,
        out_bytes,
        began.elapsed(),
    );
    let (written, code) = match result {
        Ok(written) => (written, VIRTIO_BLK_S_OK),
        Err(Refused::Unsupported) => (0, VIRTIO_BLK_S_UNSUPP),
        Err(Refused::Failed(error)) => {
            log::warn!(
                "disk {}: request {kind} at sector {sector}: {error}",
                disk.name()
            );
            (0, VIRTIO_BLK_S_IOERR)
        }
    };
    status.write(&[u8::try_from(code).expect("a small number")]);
    Ok(written + 1)
}

/// Counts a request that was carried out, or that storage refused.
fn count(
    counters: &DiskCounters,
    kind: u32,
    result: &Result<u32, Refused>,
    in_bytes: u64,
    out_bytes: u64,
    took: Duration,
) {
    let add = DiskCounters::add;
    let took_ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
    match (result, kind) {
        (Ok(_), VIRTIO_BLK_T_IN) => {
            add(&counters.reads, 1);
            add(&counters.read_bytes, in_bytes);
            add(&counters.read_ns, took_ns);
        }
        (Ok(_), VIRTIO_BLK_T_OUT) => {
            add(&counters.writes, 1);
            add(&counters.written_bytes, out_bytes);
            add(&counters.write_ns, took_ns);
        }
        (Ok(_), VIRTIO_BLK_T_FLUSH) => {
            add(&counters.flushes, 1);
            add(&counters.flush_ns, took_ns);
        }
        (Err(Refused::Failed(_)), _) => add(&counters.errors, 1),
        _ => {}
    }
}

/// Returns the byte at which `len` bytes from `sector` on begin, if they are on the disk.
fn place(disk: &Disk, sector: u64, len: u64) -> Result<u64, Refused> {
    let block = u64::from(SECTOR_BYTES);
    if !len.is_multiple_of(block) {
        return Err(invalid("a part of a sector"));
    }
    let end = sector.checked_add(len / block);
    if end.is_some_and(|end| end <= disk.sectors()) {
        Ok(sector * block)
    } else {
        Err(invalid("behind the end of the disk"))
    }
}

fn read(disk: &Disk, sector: u64, mut into: Slices<'_>) -> Result<u32, Refused> {
    let len = into.len();
    let offset = place(disk, sector, len as u64)?;
    disk.read(offset, into.as_slices())?;
    // Less than 4 GiB, by the rules for chains.
    Ok(u32::try_from(len).unwrap_or(u32::MAX - 1))
}

fn write(disk: &Disk, sector: u64, mut from: Slices<'_>) -> Result<(), Refused> {
    let offset = place(disk, sector, from.len() as u64)?;
    Ok(disk.write(offset, from.as_slices())?)
}

fn identify(disk: &Disk, mut into: Slices<'_>) -> u32 {
    let mut id = [0; ID_BYTES];
    let serial = disk.serial().as_bytes();
    let len = serial.len().min(ID_BYTES);
    id[..len].copy_from_slice(&serial[..len]);
    u32::try_from(into.write(&id)).expect("20 at most")
}

fn ranges(disk: &Disk, mut from: Slices<'_>, discard: bool) -> Result<(), Refused> {
    if !disk.can_discard() {
        return Err(Refused::Unsupported);
    }
    let bytes = from.len();
    if !bytes.is_multiple_of(RANGE_BYTES) || bytes / RANGE_BYTES > RANGES_MAX as usize {
        return Err(invalid("a list of ranges of the wrong length"));
    }
    let mut range = [0; RANGE_BYTES];
    while !from.is_empty() && from.read(&mut range) {
        let sector = u64::from_le_bytes(range[..8].try_into().expect("8 bytes"));
        let count = u32::from_le_bytes(range[8..12].try_into().expect("4 bytes"));
        let flags = u32::from_le_bytes(range[12..].try_into().expect("4 bytes"));
        if flags & !MAY_UNMAP != 0 || discard && flags != 0 {
            return Err(Refused::Unsupported);
        }
        if count > RANGE_SECTORS_MAX {
            return Err(invalid("a longer range than is offered"));
        }
        let len = u64::from(count) * u64::from(SECTOR_BYTES);
        let offset = place(disk, sector, len)?;
        if len > 0 {
            disk.zero(offset, len, discard || flags & MAY_UNMAP != 0)?;
        }
    }
    Ok(())
}
