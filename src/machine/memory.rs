//! Guest memory: where it is, what backs it, and how the VMM writes it.
#![expect(
    unsafe_code,
    reason = "maps guest memory and hands it to vm-memory by address"
)]

mod marks;
mod populate;
mod slots;

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::mm::{MapFlags, ProtFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::guest::{Backing, HostWrites, MemoryFill, MemoryRegion};
use crate::machine::spec::{BackingSpec, MemorySpec};
use crate::page::{Gfn, PAGE_BYTES, PageRun};
use crate::sys::anon;
use crate::sys::frozen::{self, Freezer, FrozenMemory};
use crate::sys::mapping::GuestMapping;
pub use marks::{MarkHostWrites, MarkHostWritesPart};
use populate::populate;
pub use slots::{HOLE_END, HOLE_START, layout};
use slots::{divide, slot_bytes};

/// The least memory: boot data and the first MiB of a PC.
pub const MEMORY_BYTES_MIN: u64 = 1 << 20;

/// Guest memory that could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The size does not fit the backing.
    #[error("{bytes} bytes of guest memory are not a multiple of {page_bytes}, or less than 1 MiB")]
    Size {
        /// The size asked for.
        bytes: u64,
        /// Size of the backing's pages.
        page_bytes: u64,
    },
    /// The hugetlb pool is too small.
    #[error(
        "guest memory needs {needed} huge pages of {page_kib} KiB and {free} are free: raise \
         /sys/kernel/mm/hugepages/hugepages-{page_kib}kB/nr_hugepages"
    )]
    HugePages {
        /// Pages needed.
        needed: u64,
        /// Pages free.
        free: u64,
        /// Size of one.
        page_kib: u64,
    },
    /// The kernel has no pool of such pages.
    #[error("this kernel has no huge pages of {page_bytes} bytes")]
    HugePageSize {
        /// The size asked for.
        page_bytes: u64,
    },
    /// What is shared is the memory of another machine.
    #[error("the shared memory has {found} bytes, the machine {needed}")]
    OtherSize {
        /// Bytes that are shared.
        found: u64,
        /// Bytes of the machine's memory.
        needed: u64,
    },
    /// A call failed.
    #[error("could not {what} {bytes} bytes of guest memory{hint}")]
    Call {
        /// What was tried.
        what: &'static str,
        /// Of how much.
        bytes: usize,
        /// What may help.
        hint: &'static str,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
}

impl MemoryError {
    fn advice(what: &'static str, bytes: usize) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Call {
            what,
            bytes,
            hint: "",
            source,
        }
    }

    fn call(what: &'static str, bytes: usize) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |error| Self::Call {
            what,
            bytes,
            hint: "",
            source: error.into(),
        }
    }
}

/// Guest memory as vm-memory sees it; what is written through it is marked in [`HostWrites`].
pub type GuestMemory = vm_memory::GuestMemoryMmap<MarkHostWrites>;

/// A mapped range, unmapped when dropped.
#[derive(Debug)]
struct Range {
    hva: usize,
    len: usize,
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map_hugetlb` or `map_memfd` and belongs to this value alone; whoever
        // uses it keeps this value alive, as `GuestMapping::new` asks.
        let result = unsafe { rustix::mm::munmap(self.hva as *mut _, self.len) };
        debug_assert!(result.is_ok(), "a mapping of ours can be unmapped");
    }
}

/// All memory of one guest.
#[derive(Debug)]
pub struct GuestRam {
    /// What is mapped: below the hole and above it.
    ranges: Vec<MemoryRegion>,
    /// The same, by memory slots.
    regions: Vec<MemoryRegion>,
    memory: GuestMemory,
    writes: Arc<HostWrites>,
    spec: MemorySpec,
    /// What still fills memory.
    filling: Mutex<Option<Arc<dyn MemoryFill>>>,
}

impl GuestRam {
    /// Maps guest memory; allocates it where `spec` says so.
    pub fn new(spec: &MemorySpec) -> Result<Self, MemoryError> {
        let page_bytes = match spec.backing {
            BackingSpec::Hugetlb { page_bytes } => page_bytes,
            _ => PAGE_BYTES as u64,
        };
        let fits = page_bytes.is_power_of_two()
            && spec.bytes.is_multiple_of(page_bytes)
            && spec.bytes >= MEMORY_BYTES_MIN
            && usize::try_from(spec.bytes).is_ok();
        if !fits {
            return Err(MemoryError::Size {
                bytes: spec.bytes,
                page_bytes,
            });
        }
        let ranges: Vec<MemoryRegion> = (0..)
            .zip(layout(spec.bytes))
            .map(|(number, (gpa, bytes))| match &spec.shared {
                Some(frozen) => map_shared(frozen, spec.bytes, number, gpa, bytes),
                None => map_range(spec, number, gpa, bytes),
            })
            .collect::<Result<_, _>>()?;
        let regions = divide(&ranges, slot_bytes(spec.bytes, page_bytes));
        let writes = Arc::new(HostWrites::new(
            regions.iter().map(|region| (region.slot, region.run())),
        ));
        // Not by slots: what a device is told to read or write may reach over the end of one.
        let parts = ranges
            .iter()
            .map(|range| vm_memory_region(range, &writes))
            .collect();
        let memory = GuestMemory::from_regions(parts).expect("the layout does not overlap");
        let ram = Self {
            ranges,
            regions,
            memory,
            writes,
            spec: spec.clone(),
            filling: Mutex::default(),
        };
        ram.settle()?;
        Ok(ram)
    }

    /// Allocates and locks what the spec asks for.
    fn settle(&self) -> Result<(), MemoryError> {
        for range in &self.ranges {
            if self.spec.preallocate {
                populate(&range.mapping)?;
            }
            if self.spec.locked {
                lock(&range.mapping)?;
            }
        }
        Ok(())
    }

    /// Returns the regions, one for each memory slot, sorted by frame.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// Returns the memory for devices and loaders; writes through it are marked.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Returns the log of what the VMM writes.
    pub fn host_writes(&self) -> &Arc<HostWrites> {
        &self.writes
    }

    /// Returns what still fills memory.
    pub fn lock_filling(&self) -> MutexGuard<'_, Option<Arc<dyn MemoryFill>>> {
        self.filling.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives pages back to the host that the guest does not use: what they hold then is zeros, or
    /// what they held. What of `run` is no memory is left out.
    ///
    /// Announced as a discard: blocks until a checkpoint under way has what it needs. Nothing is
    /// given back of memory that is locked, allocated in advance, of hugetlb, shared with other
    /// machines (it would hold what it started as), or still comes from an image.
    pub fn discard(&self, run: PageRun) -> io::Result<()> {
        let is_kept = self.spec.locked || self.spec.preallocate || self.spec.shared.is_some();
        let still_comes = || {
            let filling = self.lock_filling();
            filling
                .as_ref()
                .is_some_and(|fill| !fill.wait(Duration::ZERO))
        };
        if is_kept || still_comes() {
            return Ok(());
        }
        for range in &self.ranges {
            let Some(part) = range.run().intersection(run) else {
                continue;
            };
            if matches!(range.backing, Backing::Hugetlb { .. }) {
                continue;
            }
            let bytes = |pages: u64| usize::try_from(pages).expect("memory is mapped") * PAGE_BYTES;
            let offset = bytes(part.start.0 - range.start.0);
            let mapping = range.mapping.part(offset, bytes(part.page_count));
            let discard = self.writes.will_discard(part);
            give_back(range.backing, &mapping)?;
            drop(discard);
        }
        Ok(())
    }

    /// Gives all memory back to the host: the guest then reads zeros.
    ///
    /// Announced as a discard, so that a checkpoint under way keeps what it needs. Called with
    /// every vCPU stopped and every device drained.
    pub fn discard_all(&self) -> Result<(), MemoryError> {
        for range in &self.ranges {
            let discard = self.writes.will_discard(range.run());
            let len = range.mapping.len();
            if self.spec.locked {
                // Locked memory cannot be given back; `settle` locks it again.
                unlock(&range.mapping)?;
            }
            let discarded = if self.spec.shared.is_some() {
                // It would read what it started as.
                frozen::replace_by_zeros(&range.mapping)
            } else {
                give_back(range.backing, &range.mapping)
            };
            discarded.map_err(MemoryError::advice("discard", len))?;
            drop(discard);
        }
        self.settle()
    }
}

fn map_range(
    spec: &MemorySpec,
    number: u32,
    gpa: u64,
    bytes: u64,
) -> Result<MemoryRegion, MemoryError> {
    let len = usize::try_from(bytes).expect("a part of a size that fits usize");
    let anonymous = |huge| anon::map_anonymous(len, huge).map_err(MemoryError::advice("map", len));
    let (mapping, backing) = match spec.backing {
        BackingSpec::Anonymous => (anonymous(true)?, Backing::Anonymous { huge: true }),
        BackingSpec::AnonymousSmallPages => {
            let mapping = anonymous(false)?;
            // EINVAL: a kernel without transparent huge pages, where there is nothing to choose.
            advise(&mapping, libc::MADV_NOHUGEPAGE).or_else(|error| {
                match error.raw_os_error() {
                    Some(libc::EINVAL) => Ok(()),
                    _ => Err(MemoryError::advice("choose the page size of", len)(error)),
                }
            })?;
            (mapping, Backing::Anonymous { huge: false })
        }
        BackingSpec::Hugetlb { page_bytes } => {
            let mapping = keep_private(map_hugetlb(len, page_bytes)?)?;
            (mapping, Backing::Hugetlb { page_bytes })
        }
        BackingSpec::Memfd => (keep_private(map_memfd(len)?)?, Backing::Memfd),
    };
    Ok(MemoryRegion {
        slot: number,
        start: Gfn::containing(gpa),
        page_count: bytes / PAGE_BYTES as u64,
        mapping,
        backing,
    })
}

/// Maps the range at `gpa` of memory that others map too.
///
/// For the engine it is a memfd: a page that is in no page table need not be zeros.
fn map_shared(
    frozen: &FrozenMemory,
    total: u64,
    number: u32,
    gpa: u64,
    bytes: u64,
) -> Result<MemoryRegion, MemoryError> {
    if frozen.len() as u64 != total {
        return Err(MemoryError::OtherSize {
            found: frozen.len() as u64,
            needed: total,
        });
    }
    shared_region(number, gpa, bytes, |offset, len| {
        frozen.map_private(offset, len)
    })
}

/// Makes the range at `gpa` of memory that is shared: one follows the other there, without the hole.
fn shared_region(
    number: u32,
    gpa: u64,
    bytes: u64,
    map: impl FnOnce(usize, usize) -> io::Result<GuestMapping>,
) -> Result<MemoryRegion, MemoryError> {
    let len = usize::try_from(bytes).expect("a part of a size that fits usize");
    let offset = usize::try_from(gpa.min(HOLE_START)).expect("a part of the same");
    Ok(MemoryRegion {
        slot: number,
        start: Gfn::containing(gpa),
        page_count: bytes / PAGE_BYTES as u64,
        mapping: map(offset, len).map_err(MemoryError::advice("map", len))?,
        backing: Backing::Memfd,
    })
}

/// Maps memory that is to be shared by machines of this size, for whoever fills it: the regions are
/// those of a machine. They are dropped before it is frozen.
pub fn to_be_shared(bytes: u64) -> Result<(Freezer, Vec<MemoryRegion>), MemoryError> {
    let total = usize::try_from(bytes).map_err(|_| MemoryError::Size {
        bytes,
        page_bytes: PAGE_BYTES as u64,
    })?;
    let freezer = Freezer::new(total).map_err(MemoryError::advice("make a memfd for", total))?;
    let ranges = (0..).zip(layout(bytes)).map(|(number, (gpa, bytes))| {
        shared_region(number, gpa, bytes, |offset, len| freezer.map(offset, len))
    });
    let ranges: Vec<_> = ranges.collect::<Result<_, _>>()?;
    let regions = divide(&ranges, slot_bytes(bytes, PAGE_BYTES as u64));
    Ok((freezer, regions))
}

/// Gives memory of that kind back to the host: it reads zeros then.
fn give_back(backing: Backing, mapping: &GuestMapping) -> io::Result<()> {
    let advice = match backing {
        Backing::Memfd => libc::MADV_REMOVE,
        _ => libc::MADV_DONTNEED,
    };
    advise(mapping, advice)
}

/// Keeps memory from child processes and core dumps, as [`anon::map_anonymous`] does.
fn keep_private(range: Range) -> Result<GuestMapping, MemoryError> {
    let (hva, len) = (range.hva, range.len);
    // SAFETY: the range stays mapped until `range` is dropped, which the mapping owns. Nothing
    // makes a reference to it: vm-memory reads and writes by volatile accesses.
    let mapping = unsafe { GuestMapping::new(hva, len, Arc::new(range)) };
    advise(&mapping, libc::MADV_DONTFORK)
        .map_err(MemoryError::advice("keep from child processes", len))?;
    advise(&mapping, libc::MADV_DONTDUMP)
        .map_err(MemoryError::advice("keep out of core dumps", len))?;
    Ok(mapping)
}

fn vm_memory_region(
    region: &MemoryRegion,
    writes: &Arc<HostWrites>,
) -> GuestRegionMmap<MarkHostWrites> {
    let gpa = region.start.gpa();
    let mark = MarkHostWrites {
        writes: writes.clone(),
        gpa,
    };
    let builder = MmapRegionBuilder::new_with_bitmap(region.mapping.len(), mark)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_NORESERVE);
    // SAFETY: the range is mapped readable and writable for as long as `GuestRam` lives, which
    // holds the region's mapping beside the vm-memory region that is made here.
    let builder = unsafe { builder.with_raw_mmap_pointer(region.mapping.hva() as *mut u8) };
    let mapped = builder.build().expect("an aligned range of our own fits");
    GuestRegionMmap::new(mapped, GuestAddress(gpa)).expect("the layout does not wrap")
}

fn access() -> ProtFlags {
    ProtFlags::READ | ProtFlags::WRITE
}

fn map_hugetlb(len: usize, page_bytes: u64) -> Result<Range, MemoryError> {
    let page_kib = page_bytes / 1024;
    let pool = format!("/sys/kernel/mm/hugepages/hugepages-{page_kib}kB");
    let free = fs::read_to_string(format!("{pool}/free_hugepages"))
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok())
        .ok_or(MemoryError::HugePageSize { page_bytes })?;
    let size = MapFlags::from_bits_retain(page_bytes.trailing_zeros() << libc::MAP_HUGE_SHIFT);
    let flags = MapFlags::PRIVATE | MapFlags::HUGETLB | size;
    // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
    let start = unsafe { rustix::mm::mmap_anonymous(ptr::null_mut(), len, access(), flags) };
    match start {
        Ok(start) => Ok(Range {
            hva: start.addr(),
            len,
        }),
        // The pages are reserved here, so that the guest never dies for want of one.
        Err(rustix::io::Errno::NOMEM) => Err(MemoryError::HugePages {
            needed: len as u64 / page_bytes,
            free,
            page_kib,
        }),
        Err(error) => Err(MemoryError::call("map", len)(error)),
    }
}

fn map_memfd(len: usize) -> Result<Range, MemoryError> {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("guest-memory", flags)
        .map_err(MemoryError::call("make a memfd for", len))?;
    rustix::fs::ftruncate(&file, len as u64)
        .map_err(MemoryError::call("size the memfd of", len))?;
    let flags = MapFlags::SHARED | MapFlags::NORESERVE;
    // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
    let start = unsafe { rustix::mm::mmap(ptr::null_mut(), len, access(), flags, file.as_fd(), 0) };
    let start = start.map_err(MemoryError::call("map", len))?;
    Ok(Range {
        hva: start.addr(),
        len,
    })
}

/// Advises the kernel about guest memory.
fn advise(mapping: &GuestMapping, advice: libc::c_int) -> io::Result<()> {
    // SAFETY: the range is mapped for as long as `mapping` lives; no Rust reference to guest
    // memory exists, so an advice that changes its content breaks none.
    let result = unsafe { libc::madvise(mapping.hva() as *mut _, mapping.len(), advice) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn lock(mapping: &GuestMapping) -> Result<(), MemoryError> {
    // SAFETY: the range is mapped for as long as `mapping` lives; locking changes no content.
    let locked = unsafe { rustix::mm::mlock(mapping.hva() as *mut _, mapping.len()) };
    locked.map_err(|error| MemoryError::Call {
        what: "lock",
        bytes: mapping.len(),
        hint: ": check the limit of locked memory (ulimit -l)",
        source: error.into(),
    })
}

fn unlock(mapping: &GuestMapping) -> Result<(), MemoryError> {
    // SAFETY: the range is mapped for as long as `mapping` lives; unlocking changes no content.
    let unlocked = unsafe { rustix::mm::munlock(mapping.hva() as *mut _, mapping.len()) };
    unlocked.map_err(MemoryError::call("unlock", mapping.len()))
}

#[cfg(test)]
mod tests;
