//! Loading a kernel, and what the 64-bit Linux boot protocol has it find.
//!
//! Kernel files come from users: every number in them is checked before it is used.

mod elf;
mod params;
mod pvh;

use std::fs::{self, File};
use std::io::{self, Cursor, Read};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::machine::memory::{GuestMemory, layout};
use crate::machine::spec::{BootSpec, Source};
use crate::page::PAGE_BYTES;

/// Segment descriptors.
pub const GDT_GPA: u64 = 0x500;
/// Interrupt descriptors: room for none, so an early exception is a triple fault.
pub const IDT_GPA: u64 = 0x580;
/// What a kernel that starts by PVH finds, with all that it points to; one page.
pub const START_INFO_GPA: u64 = 0x6000;
/// The zero page.
pub const BOOT_PARAMS_GPA: u64 = 0x7000;
/// Top of the initial page tables; six pages, which map the first 4 GiB to themselves.
pub const PAGE_TABLES_GPA: u64 = 0x9000;
/// A stack for the first instructions; grows down towards the page tables' end at 0xf000.
pub const STACK_GPA: u64 = 0x1_8000;
/// The command line.
pub const CMDLINE_GPA: u64 = 0x2_0000;

/// The longest command line, its terminating zero not counted; what lies behind it is free.
pub const CMDLINE_BYTES_MAX: usize = 0xffff;

/// Where kernels may be loaded from on: below are the boot data, and a PC's legacy area.
const HIGH_MEMORY_GPA: u64 = 1 << 20;

/// The largest kernel file. Kernels with all drivers built in have about 100 MiB.
const KERNEL_BYTES_MAX: u64 = 1 << 30;

/// Boot protocol 2.12: the first that says whether a kernel has a 64-bit entry point.
const PROTOCOL_MIN: u16 = 0x020c;
/// `xloadflags`: the kernel has a 64-bit entry point, 0x200 behind its start.
const XLF_KERNEL_64: u16 = 1;
const ENTRY_64_OFFSET: u64 = 0x200;

/// The highest byte of an initial RAM disk for a kernel that does not say.
const INITRD_MAX_DEFAULT: u64 = 0x37ff_ffff;

/// A kernel that cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// A file cannot be read.
    #[error("could not read {file}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is too large.
    #[error("{file} has {bytes} bytes; a kernel may have {KERNEL_BYTES_MAX}")]
    TooLarge {
        /// The file.
        file: String,
        /// Its size.
        bytes: u64,
    },
    /// The file is no kernel that we start.
    #[error("{file} is no kernel that can be started: {why}")]
    NotAKernel {
        /// The file.
        file: String,
        /// What is wrong with it.
        why: String,
    },
    /// The kernel or its initial RAM disk does not fit into guest memory.
    #[error(
        "{file} needs {needed} bytes of guest memory below the hole at 3 GiB; there are {available}"
    )]
    NoRoom {
        /// The file.
        file: String,
        /// Bytes needed, from address 0 on.
        needed: u64,
        /// Bytes of low memory.
        available: u64,
    },
    /// The command line is too long, or has a zero byte.
    #[error("the kernel command line {why}")]
    Cmdline {
        /// What is wrong with it.
        why: String,
    },
}

impl BootError {
    fn not_a_kernel(source: &Source, why: impl Into<String>) -> Self {
        Self::NotAKernel {
            file: source.name(),
            why: why.into(),
        }
    }
}

/// How the first vCPU enters the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// Linux' own: 64-bit mode, with the zero page.
    Linux64,
    /// PVH: 32-bit protected mode without paging, with a start info.
    Pvh,
}

/// Where the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The first instruction.
    pub rip: u64,
    /// The mode that it expects.
    pub protocol: Protocol,
}

/// A kernel in guest memory.
struct Loaded {
    entry: Entry,
    /// The first byte that neither the kernel nor its unpacking uses.
    end: u64,
    header: Option<setup_header>,
}

/// Loads what `spec` names into `memory`, `ram_bytes` of guest memory that reads zeros.
pub fn load(memory: &GuestMemory, ram_bytes: u64, spec: &BootSpec) -> Result<Entry, BootError> {
    let low_end = layout(ram_bytes)[0].1;
    let kernel = read_kernel(&spec.kernel)?;
    let loaded = if kernel.starts_with(elf::MAGIC) {
        load_elf(memory, low_end, &spec.kernel, &kernel)?
    } else {
        load_bzimage(memory, low_end, &spec.kernel, &kernel)?
    };
    let cmdline_bytes = write_cmdline(memory, &spec.cmdline, loaded.header.as_ref())?;
    let initrd = match &spec.initrd {
        Some(source) => Some(load_initrd(memory, low_end, source, &loaded)?),
        None => None,
    };
    match loaded.entry.protocol {
        Protocol::Linux64 => {
            params::write(memory, ram_bytes, loaded.header, cmdline_bytes, initrd);
            params::write_tables(memory);
        }
        Protocol::Pvh => pvh::write(memory, ram_bytes, initrd),
    }
    Ok(loaded.entry)
}

fn read_kernel(source: &Source) -> Result<Vec<u8>, BootError> {
    let failed = |error| BootError::Read {
        file: source.name(),
        source: error,
    };
    let check = |bytes: u64| {
        if bytes > KERNEL_BYTES_MAX {
            let file = source.name();
            return Err(BootError::TooLarge { file, bytes });
        }
        Ok(())
    };
    match source {
        Source::Bytes { bytes, .. } => {
            check(bytes.len() as u64)?;
            Ok(bytes.to_vec())
        }
        Source::Path(path) => {
            let file = open_regular(path).map_err(failed)?;
            check(file.metadata().map_err(failed)?.len())?;
            let mut kernel = Vec::new();
            // The file may grow while it is read.
            file.take(KERNEL_BYTES_MAX)
                .read_to_end(&mut kernel)
                .map_err(failed)?;
            Ok(kernel)
        }
    }
}

/// Opens a file that is neither a pipe nor a device, which could block or never end.
fn open_regular(path: &std::path::Path) -> io::Result<File> {
    if fs::metadata(path)?.is_file() {
        File::open(path)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ))
    }
}

fn load_elf(
    memory: &GuestMemory,
    low_end: u64,
    source: &Source,
    kernel: &[u8],
) -> Result<Loaded, BootError> {
    let refuse = |why: String| BootError::not_a_kernel(source, why);
    let image = elf::check(kernel, HIGH_MEMORY_GPA).map_err(refuse)?;
    if image.end > low_end {
        return Err(BootError::NoRoom {
            file: source.name(),
            needed: image.end,
            available: low_end,
        });
    }
    let high = Some(GuestAddress(HIGH_MEMORY_GPA));
    let result = Elf::load(memory, None, &mut Cursor::new(kernel), high)
        .map_err(|error| refuse(error.to_string()))?;
    let entry = match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(GuestAddress(rip)) => {
            if !(HIGH_MEMORY_GPA..image.end).contains(&rip) {
                return Err(refuse(format!("its PVH entry point {rip:#x} is outside")));
            }
            Entry {
                rip,
                protocol: Protocol::Pvh,
            }
        }
        _ => Entry {
            rip: image.entry,
            protocol: Protocol::Linux64,
        },
    };
    Ok(Loaded {
        entry,
        end: image.end,
        header: None,
    })
}

fn load_bzimage(
    memory: &GuestMemory,
    low_end: u64,
    source: &Source,
    kernel: &[u8],
) -> Result<Loaded, BootError> {
    let refuse = |why: String| BootError::not_a_kernel(source, why);
    if kernel.get(0x202..0x206) != Some(b"HdrS") {
        return Err(refuse("it is neither an ELF file nor a bzImage".to_owned()));
    }
    let high = Some(GuestAddress(HIGH_MEMORY_GPA));
    let result = BzImage::load(memory, None, &mut Cursor::new(kernel), high)
        .map_err(|error| refuse(error.to_string()))?;
    let header = result
        .setup_header
        .ok_or_else(|| refuse("it has no setup header".to_owned()))?;
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_MIN || flags & XLF_KERNEL_64 == 0 {
        return Err(refuse(format!(
            "boot protocol {}.{:02} without a 64-bit entry point",
            version >> 8,
            version & 0xff
        )));
    }
    let load = result.kernel_load.0;
    // The kernel unpacks itself to where it prefers to be, or to where it is if that is higher.
    let unpacked = load.max(header.pref_address);
    let end = unpacked
        .checked_add(header.init_size.into())
        .ok_or_else(|| refuse("its addresses overflow".to_owned()))?
        .max(result.kernel_end);
    if end > low_end {
        return Err(BootError::NoRoom {
            file: source.name(),
            needed: end,
            available: low_end,
        });
    }
    Ok(Loaded {
        entry: Entry {
            rip: load + ENTRY_64_OFFSET,
            protocol: Protocol::Linux64,
        },
        end,
        header: Some(header),
    })
}

fn write_cmdline(
    memory: &GuestMemory,
    cmdline: &str,
    header: Option<&setup_header>,
) -> Result<u32, BootError> {
    let refuse = |why: String| Err(BootError::Cmdline { why });
    // 0 where an old kernel does not say; those of our protocol version always do.
    let kernel_max = header
        .map(|header| header.cmdline_size)
        .filter(|&bytes| bytes > 0)
        .map_or(CMDLINE_BYTES_MAX, |bytes| bytes as usize);
    let max = kernel_max.min(CMDLINE_BYTES_MAX);
    if cmdline.len() > max {
        return refuse(format!(
            "has {} bytes; this kernel takes {max}",
            cmdline.len()
        ));
    }
    if cmdline.contains('\0') {
        return refuse("has a zero byte".to_owned());
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory
        .write_slice(&bytes, GuestAddress(CMDLINE_GPA))
        .expect("the first MiB is there");
    Ok(u32::try_from(cmdline.len()).expect("bounded above"))
}

/// Loads the initial RAM disk as high as the kernel takes it; returns its address and length.
fn load_initrd(
    memory: &GuestMemory,
    low_end: u64,
    source: &Source,
    kernel: &Loaded,
) -> Result<(u32, u32), BootError> {
    let failed = |error| BootError::Read {
        file: source.name(),
        source: error,
    };
    let bytes = match source {
        Source::Bytes { bytes, .. } => bytes.len() as u64,
        Source::Path(path) => fs::metadata(path).map_err(failed)?.len(),
    };
    let max = kernel
        .header
        .map_or(INITRD_MAX_DEFAULT, |header| header.initrd_addr_max.into());
    let top = low_end.min(max.saturating_add(1));
    let page = PAGE_BYTES as u64;
    let at = top
        .checked_sub(bytes)
        .map(|at| at / page * page)
        .filter(|&at| at >= kernel.end)
        .ok_or_else(|| BootError::NoRoom {
            file: source.name(),
            needed: kernel.end.saturating_add(bytes),
            available: top,
        })?;
    match source {
        Source::Bytes { bytes, .. } => {
            copy_in(memory, at, &mut Cursor::new(&bytes[..]), bytes.len())
        }
        Source::Path(path) => {
            let mut file = open_regular(path).map_err(failed)?;
            let len = usize::try_from(bytes).expect("bounded by the guest's memory");
            copy_in(memory, at, &mut file, len)
        }
    }
    .map_err(failed)?;
    // Below the hole, and so below 4 GiB.
    let narrow = |value| u32::try_from(value).expect("low memory ends at 3 GiB");
    Ok((narrow(at), narrow(bytes)))
}

fn copy_in(
    memory: &GuestMemory,
    at: u64,
    from: &mut impl ReadVolatile,
    len: usize,
) -> io::Result<()> {
    memory
        .read_exact_volatile_from(GuestAddress(at), from, len)
        .map_err(io::Error::other)
}
