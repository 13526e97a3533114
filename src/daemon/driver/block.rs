//! Disks: how large they are, and what their guest has asked of them.

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::error::failed;
use crate::daemon::managed::State;
use crate::daemon::worker;
use crate::host::control::protocol::{DiskUse, Status};
use crate::host::{DiskFormat, qcow2_disk_bytes};
use crate::rpc::{Code, DomainRef, List, Procedure, RpcError, TypedParam, TypedValue, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(64, Slow, stats),
    procedure!(194, Slow, info),
    procedure!(243, Slow, stats_flags),
    procedure!(263, Quick, errors),
];

/// A disk of a domain's document.
pub(super) struct DiskOf {
    pub(super) target: String,
    pub(super) source: PathBuf,
    pub(super) format: DiskFormat,
}

/// Returns the disks of a domain, as it runs or as it is defined.
pub(super) fn disks_of(state: &State) -> Vec<DiskOf> {
    let pci = state.current().map(|config| &config.machine.devices.pci);
    let disks = pci.into_iter().flat_map(|pci| pci.disks());
    disks
        .map(|(_, disk)| DiskOf {
            target: disk.target.as_str().to_owned(),
            source: disk.source.as_path().to_owned(),
            format: disk.format,
        })
        .collect()
}

/// Finds a disk by the name that its guest knows, or by its file.
fn find(state: &State, path: &str) -> Answer<DiskOf> {
    let mut disks = disks_of(state).into_iter();
    let found = disks.find(|disk| disk.target == path || disk.source == Path::new(path));
    found.ok_or_else(|| {
        RpcError::new(
            Code::InvalidArg,
            format!("invalid path {path} not assigned to domain"),
        )
    })
}

/// The size that a guest sees, and what its file takes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) allocation: u64,
    pub(super) capacity: u64,
    pub(super) physical: u64,
}

impl DiskOf {
    /// Asks the file, which its guest may be using.
    pub(super) fn sizes(&self) -> Result<Sizes, String> {
        let (length, allocation) = self.lengths().map_err(|error| error.to_string())?;
        let capacity = match self.format {
            DiskFormat::Raw => length,
            DiskFormat::Qcow2 => {
                qcow2_disk_bytes(&self.source).map_err(|error| error.to_string())?
            }
        };
        Ok(Sizes {
            allocation,
            capacity,
            physical: length,
        })
    }

    /// Returns the length of the file or block device, and how much room it takes.
    fn lengths(&self) -> std::io::Result<(u64, u64)> {
        let mut opened = File::open(&self.source)?;
        let metadata = opened.metadata()?;
        // The end is the size of block devices, too.
        let length = opened.seek(SeekFrom::End(0))?;
        let is_file = metadata.is_file();
        let allocation = if is_file {
            metadata.blocks() * 512
        } else {
            length
        };
        Ok((length, allocation))
    }
}

fn info(
    call: &DriverCall<'_>,
    (wanted, path, flags): (DomainRef, String, u32),
) -> Answer<(u64, u64, u64)> {
    check_flags(flags, 0, "virDomainGetBlockInfo")?;
    let domain = call.driver.registry.find(&wanted)?;
    let disk = find(&domain.lock(), &path)?;
    let sizes = disk.sizes().map_err(|error| {
        RpcError::new(
            Code::SystemError,
            format!("cannot open {}: {error}", disk.source.display()),
        )
    })?;
    Ok((sizes.allocation, sizes.capacity, sizes.physical))
}

/// Asks a running domain's worker for the domain in figures.
pub(super) fn status_of(driver: &Livepoint, name: &str) -> Answer<Status> {
    let mut worker = worker::connect(&driver.paths, name)?;
    worker.status().map_err(|error| failed(&error))
}

/// Returns what was asked of one disk, or of all of them where `path` is empty.
fn use_of(call: &DriverCall<'_>, wanted: &DomainRef, path: &str) -> Answer<DiskUse> {
    let domain = call.driver.registry.find(wanted)?;
    let (name, target) = {
        let state = domain.lock();
        state.active()?;
        let disk = (!path.is_empty()).then(|| find(&state, path)).transpose()?;
        (state.name.clone(), disk.map(|disk| disk.target))
    };
    let mut sum = DiskUse::default();
    for disk in status_of(call.driver, &name)?.disks {
        if target.as_ref().is_some_and(|target| *target != disk.target) {
            continue;
        }
        sum.reads += disk.reads;
        sum.read_bytes += disk.read_bytes;
        sum.writes += disk.writes;
        sum.written_bytes += disk.written_bytes;
        sum.flushes += disk.flushes;
        sum.errors += disk.errors;
        sum.read_ns += disk.read_ns;
        sum.write_ns += disk.write_ns;
        sum.flush_ns += disk.flush_ns;
    }
    Ok(sum)
}

/// Returns a count as the protocol's older calls have it.
pub(super) fn signed(count: u64) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn stats(
    call: &DriverCall<'_>,
    (wanted, path): (DomainRef, String),
) -> Answer<(i64, i64, i64, i64, i64)> {
    let disk = use_of(call, &wanted, &path)?;
    Ok((
        signed(disk.reads),
        signed(disk.read_bytes),
        signed(disk.writes),
        signed(disk.written_bytes),
        signed(disk.errors),
    ))
}

fn stats_flags(
    call: &DriverCall<'_>,
    (wanted, path, wanted_count, flags): (DomainRef, String, i32, u32),
) -> Answer<(List<TypedParam, 16>, i32)> {
    const STRING_OKAY: u32 = 4;
    check_flags(flags, STRING_OKAY, "virDomainBlockStatsFlags")?;
    let disk = use_of(call, &wanted, &path)?;
    let figures = [
        ("wr_bytes", disk.written_bytes),
        ("wr_operations", disk.writes),
        ("rd_bytes", disk.read_bytes),
        ("rd_operations", disk.reads),
        ("flush_operations", disk.flushes),
        ("wr_total_times", disk.write_ns),
        ("rd_total_times", disk.read_ns),
        ("flush_total_times", disk.flush_ns),
        ("errs", disk.errors),
    ];
    let count = i32::try_from(figures.len()).unwrap_or(0);
    let most = usize::try_from(wanted_count).unwrap_or(0);
    let params = figures
        .into_iter()
        .take(most)
        .map(|(name, value)| TypedParam::new(name, TypedValue::Long(signed(value))));
    Ok((List(params.collect()), count))
}

/// A disk and what is wrong with it.
type DiskErrors = List<(String, i32), 256>;

fn errors(
    call: &DriverCall<'_>,
    (wanted, _most, flags): (DomainRef, u32, u32),
) -> Answer<(DiskErrors, i32)> {
    check_flags(flags, 0, "virDomainGetDiskErrors")?;
    let domain = call.driver.registry.find(&wanted)?;
    domain.lock().active()?;
    // The guest is told of an error, and goes on: no disk is ever stopped by one.
    Ok((List(Vec::new()), 0))
}
