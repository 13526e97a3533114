//! Checks an ELF file before it is loaded.
//!
//! linux-loader does the loading; it trusts some of the numbers that are checked here.

/// What an ELF file starts with.
pub(super) const MAGIC: &[u8] = b"\x7fELF";

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// The most program headers; kernels have fewer than ten.
const PROGRAM_HEADERS_MAX: u16 = 128;

/// What is needed of an ELF file that passed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Image {
    /// Guest physical address of the first instruction.
    pub entry: u64,
    /// The first byte behind all segments, uninitialized data included.
    pub end: u64,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// Returns the range of `len` bytes at `start`, or an error where it overflows.
fn range(what: &str, start: u64, len: u64) -> Result<std::ops::Range<u64>, String> {
    let end = start
        .checked_add(len)
        .ok_or_else(|| format!("its {what} overflows"))?;
    Ok(start..end)
}

/// Checks that `file` is a 64-bit x86 ELF file whose segments are whole, load at `lowest` or
/// above, and hold its entry point.
pub(super) fn check(file: &[u8], lowest: u64) -> Result<Image, String> {
    if file.len() < HEADER_BYTES {
        return Err("its ELF header is cut off".to_owned());
    }
    if file[4] != CLASS_64 || file[5] != LITTLE_ENDIAN {
        return Err("it is not a 64-bit little-endian ELF file".to_owned());
    }
    let machine = u16_at(file, 18);
    if machine != MACHINE_X86_64 {
        return Err(format!("it is for ELF machine {machine}, not x86-64"));
    }
    let count = u16_at(file, 56);
    if usize::from(u16_at(file, 54)) != PROGRAM_HEADER_BYTES || count > PROGRAM_HEADERS_MAX {
        return Err(format!("it has {count} program headers of an odd size"));
    }
    let table = range(
        "program header table",
        u64_at(file, 32),
        u64::from(count) * PROGRAM_HEADER_BYTES as u64,
    )?;
    let table = usize::try_from(table.start)
        .ok()
        .zip(usize::try_from(table.end).ok())
        .and_then(|(start, end)| file.get(start..end))
        .ok_or("its program headers are outside the file")?;
    let mut end = 0;
    let entry = u64_at(file, 24);
    let mut entry_is_inside = false;
    for header in table.chunks_exact(PROGRAM_HEADER_BYTES) {
        let kind = u32_at(header, 0);
        if kind != PT_LOAD && kind != PT_NOTE {
            continue;
        }
        let in_file = range("segment", u64_at(header, 8), u64_at(header, 32))?;
        if in_file.end > file.len() as u64 {
            return Err("one of its segments is outside the file".to_owned());
        }
        if kind == PT_NOTE {
            continue;
        }
        let in_memory = range("segment", u64_at(header, 24), u64_at(header, 40))?;
        if in_memory.end - in_memory.start < in_file.end - in_file.start {
            return Err("one of its segments is longer in the file than in memory".to_owned());
        }
        if in_memory.is_empty() {
            continue;
        }
        if in_memory.start < lowest {
            return Err(format!(
                "one of its segments is at {:#x}; the lowest possible is {lowest:#x}",
                in_memory.start
            ));
        }
        entry_is_inside |= in_memory.contains(&entry);
        end = end.max(in_memory.end);
    }
    if !entry_is_inside {
        return Err(format!(
            "its entry point {entry:#x} is in none of its segments"
        ));
    }
    Ok(Image { entry, end })
}
