//! An image as an ELF core file, for debuggers: `gdb`, `crash` and `readelf` know the format.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::{Mutex, PoisonError};

use kvm_bindings::kvm_regs;

use crate::page::{Gfn, PAGE_BYTES, PAGE_SHIFT};
use crate::state::StateError;
use crate::state::vcpu::VcpuV1;
use crate::store::{ImageReader, RegionLayout, StoreError};

/// Bytes of an ELF64 header and of a program header (ELF-64 Object File Format, 1.5).
const EHDR_BYTES: u64 = 64;
const PHDR_BYTES: u64 = 56;
/// Bytes of x86-64's `elf_prstatus`, and where its registers are in it (linux/elfcore.h).
const PRSTATUS_BYTES: usize = 336;
const PRSTATUS_NOTE_BYTES: u32 = 336;
const PRSTATUS_PID: usize = 32;
const PRSTATUS_REGS: usize = 112;
/// Type of the note that holds one.
const NT_PRSTATUS: u32 = 1;

/// A core file that could not be written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CoreError {
    /// The image could not be read, or is damaged.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image's vCPUs could not be read.
    #[error(transparent)]
    State(#[from] StateError),
    /// The core file could not be written.
    #[error("could not write the core file")]
    Write(#[from] io::Error),
}

/// Writes the memory of an image, and the registers of its vCPUs, to `out`, which is empty.
///
/// Every chunk is checked before it is written. Pages of zeros become holes of the file.
pub fn write(reader: &ImageReader, out: &File, threads: usize) -> Result<(), CoreError> {
    let regions = &reader.manifest().regions;
    let notes = notes(reader)?;
    let layout = Layout::new(regions, notes.len() as u64);
    out.write_all_at(&layout.headers(regions, notes.len() as u64), 0)?;
    out.write_all_at(&notes, layout.notes)?;
    let failed = Mutex::new(None);
    reader.for_each_chunk(&reader.live_chunks(), threads, |chunk, raw| {
        for part in reader.runs_of_chunk(chunk) {
            let at = layout.offset_of(regions, part.run.start);
            if let Err(error) = out.write_all_at(part.bytes_in(raw), at) {
                let mut first = failed.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(error);
            }
        }
    })?;
    if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        return Err(error.into());
    }
    out.set_len(layout.end)?;
    Ok(out.sync_all()?)
}

/// Where things are in the file.
struct Layout {
    notes: u64,
    /// Start of each region's memory.
    memory: Vec<u64>,
    end: u64,
}

impl Layout {
    fn new(regions: &[RegionLayout], note_bytes: u64) -> Self {
        let headers = EHDR_BYTES + PHDR_BYTES * (regions.len() as u64 + 1);
        let mut end = (headers + note_bytes).next_multiple_of(PAGE_BYTES as u64);
        let mut memory = Vec::new();
        for region in regions {
            memory.push(end);
            end += region.page_count << PAGE_SHIFT;
        }
        Self {
            notes: headers,
            memory,
            end,
        }
    }

    fn offset_of(&self, regions: &[RegionLayout], gfn: Gfn) -> u64 {
        let at = regions
            .iter()
            .position(|region| {
                (region.start.0..region.start.0 + region.page_count).contains(&gfn.0)
            })
            .expect("runs are inside regions");
        self.memory[at] + ((gfn.0 - regions[at].start.0) << PAGE_SHIFT)
    }

    /// Returns the file's header and its program headers: the notes, then the regions.
    fn headers(&self, regions: &[RegionLayout], note_bytes: u64) -> Vec<u8> {
        const CORE: u16 = 4;
        const X86_64: u16 = 62;
        let mut out = Vec::new();
        // 64 bits, little-endian, version 1, System V.
        out.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        out.extend(CORE.to_le_bytes());
        out.extend(X86_64.to_le_bytes());
        out.extend(1_u32.to_le_bytes());
        // No entry point; program headers behind this header; no sections; no flags.
        for value in [0, EHDR_BYTES, 0] {
            out.extend(value.to_le_bytes());
        }
        out.extend(0_u32.to_le_bytes());
        let count = u16::try_from(regions.len() + 1).expect("a machine has a few regions");
        for value in [64, 56, count, 0, 0, 0] {
            out.extend(u16::to_le_bytes(value));
        }
        const NOTE: u32 = 4;
        const LOAD: u32 = 1;
        let mut header = |kind: u32, offset: u64, address: u64, bytes: u64| {
            out.extend(kind.to_le_bytes());
            out.extend(0_u32.to_le_bytes());
            // Offset, virtual address (none: which one is the guest's own affair), physical
            // address, bytes in the file and in memory, no alignment.
            for value in [offset, 0, address, bytes, bytes, 0] {
                out.extend(value.to_le_bytes());
            }
        };
        header(NOTE, self.notes, 0, note_bytes);
        for (region, &offset) in regions.iter().zip(&self.memory) {
            let bytes = region.page_count << PAGE_SHIFT;
            header(LOAD, offset, region.start.0 << PAGE_SHIFT, bytes);
        }
        out
    }
}

/// Returns a note for each vCPU with its registers.
fn notes(reader: &ImageReader) -> Result<Vec<u8>, CoreError> {
    let mut state = reader.sections()?;
    let mut out = Vec::new();
    for vcpu in 0..reader.manifest().guest.vcpu_count {
        let saved: VcpuV1 = state.take(vcpu)?;
        let sregs = &saved.sregs;
        let segments = [sregs.ds, sregs.es, sregs.fs, sregs.gs].map(|it| u64::from(it.selector));
        let status = status(
            vcpu,
            &saved.regs,
            &Segments {
                code: sregs.cs.selector.into(),
                stack: sregs.ss.selector.into(),
                fs_base: sregs.fs.base,
                gs_base: sregs.gs.base,
                data: segments,
            },
        );
        for value in [5, PRSTATUS_NOTE_BYTES, NT_PRSTATUS] {
            out.extend(u32::to_le_bytes(value));
        }
        out.extend(b"CORE\0\0\0\0");
        out.extend(status);
    }
    Ok(out)
}

struct Segments {
    code: u64,
    stack: u64,
    fs_base: u64,
    gs_base: u64,
    /// DS, ES, FS, GS.
    data: [u64; 4],
}

/// Returns an `elf_prstatus`, in which only the number and the registers mean anything.
fn status(vcpu: u32, regs: &kvm_regs, segments: &Segments) -> [u8; PRSTATUS_BYTES] {
    let mut out = [0; PRSTATUS_BYTES];
    out[PRSTATUS_PID..PRSTATUS_PID + 4].copy_from_slice(&(vcpu + 1).to_le_bytes());
    let [ds, es, fs, gs] = segments.data;
    // The order of user_regs_struct (sys/user.h).
    let values = [
        regs.r15,
        regs.r14,
        regs.r13,
        regs.r12,
        regs.rbp,
        regs.rbx,
        regs.r11,
        regs.r10,
        regs.r9,
        regs.r8,
        regs.rax,
        regs.rcx,
        regs.rdx,
        regs.rsi,
        regs.rdi,
        // What rax was at a system call: none is under way.
        u64::MAX,
        regs.rip,
        segments.code,
        regs.rflags,
        regs.rsp,
        segments.stack,
        segments.fs_base,
        segments.gs_base,
        ds,
        es,
        fs,
        gs,
    ];
    for (place, value) in out[PRSTATUS_REGS..].chunks_exact_mut(8).zip(values) {
        place.copy_from_slice(&value.to_le_bytes());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn regions_follow_one_another_and_a_frame_is_found_in_its_own() {
        let region = |start, page_count| RegionLayout {
            slot: 0,
            start: Gfn(start),
            page_count,
        };
        let regions = [region(0, 160), region(256, 1000)];
        let layout = Layout::new(&regions, 712);
        assert_eq!(layout.memory, [4096, 4096 + 160 * 4096]);
        assert_eq!(layout.end, 4096 + 1160 * 4096);
        assert_eq!(layout.offset_of(&regions, Gfn(257)), 4096 + 161 * 4096);
        let headers = layout.headers(&regions, 712);
        assert_eq!(headers.len() as u64, layout.notes);
    }

    #[test]
    fn registers_are_where_debuggers_look_for_them() {
        let regs = kvm_regs {
            r15: 15,
            rip: 0x1000,
            rsp: 0x2000,
            ..kvm_regs::default()
        };
        let segments = Segments {
            code: 8,
            stack: 16,
            fs_base: 0,
            gs_base: 0,
            data: [16; 4],
        };
        let status = status(3, &regs, &segments);
        let register =
            |at: usize| u64::from_le_bytes(status[112 + at * 8..][..8].try_into().unwrap());
        assert_eq!(
            (register(0), register(16), register(19)),
            (15, 0x1000, 0x2000)
        );
        assert_eq!(status[32], 4);
    }
}
