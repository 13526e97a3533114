//! What kind of memory another VMM gives its guest, and whether it can be what it says.

use std::fs;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::ForeignError;
use crate::guest::Backing;
use crate::page::PAGE_BYTES;

/// `f_type` of hugetlbfs (include/uapi/linux/magic.h).
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;

/// A mapping of this process, as `/proc/self/maps` has it.
struct Mapped {
    range: Range<usize>,
    writable: bool,
    private: bool,
    /// Empty where no file backs it.
    path: String,
}

fn parse(line: &str) -> Option<Mapped> {
    let mut words = line.split_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let range = usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?;
    let flags = words.next()?.as_bytes();
    // Offset and device.
    let inode = words.nth(2)?;
    let path = words.next().unwrap_or_default();
    Some(Mapped {
        range,
        writable: flags.starts_with(b"rw"),
        private: flags.get(3) == Some(&b'p'),
        path: if inode == "0" { "" } else { path }.to_owned(),
    })
}

/// Checks that every byte of `range` is mapped readable and writable, and returns what backs it.
///
/// `fd` is the file that the caller mapped, if any; only asked what kind of file it is.
pub(super) fn backing_of(
    range: &Range<usize>,
    fd: Option<BorrowedFd<'_>>,
) -> Result<Backing, ForeignError> {
    let maps =
        fs::read_to_string("/proc/self/maps").map_err(ForeignError::kvm("read /proc/self/maps"))?;
    let mut reached = range.start;
    let mut anonymous = true;
    let mut hugetlb = false;
    for mapped in maps.lines().filter_map(parse) {
        if mapped.range.end <= reached || mapped.range.start >= range.end {
            continue;
        }
        if mapped.range.start > reached {
            break;
        }
        if !mapped.writable {
            return Err(ForeignError::Invalid(format!(
                "hva: the memory at {:#x} is not mapped readable and writable",
                mapped.range.start.max(range.start)
            )));
        }
        anonymous &= mapped.private && mapped.path.is_empty();
        hugetlb |= mapped.path.starts_with("/anon_hugepage");
        reached = mapped.range.end;
    }
    if reached < range.end {
        return Err(ForeignError::Invalid(format!(
            "hva: nothing is mapped at {reached:#x}"
        )));
    }
    if let Some(fd) = fd {
        let file = rustix::fs::fstatfs(fd)
            .map_err(|error| ForeignError::Invalid(format!("fd: {error}")))?;
        if file.f_type == HUGETLBFS_MAGIC {
            let page_bytes = u64::try_from(file.f_bsize).unwrap_or(PAGE_BYTES as u64);
            return Ok(Backing::Hugetlb { page_bytes });
        }
    }
    if hugetlb {
        return huge_page_bytes(range).map(|page_bytes| Backing::Hugetlb { page_bytes });
    }
    Ok(if anonymous {
        // Whether huge pages were asked for only tells what a checkpoint is expected to cost.
        Backing::Anonymous { huge: true }
    } else {
        // Whatever else it is, a page that is in no page table need not be zeros.
        Backing::Memfd
    })
}

/// Returns the size of the pages of an anonymous hugetlb mapping.
fn huge_page_bytes(range: &Range<usize>) -> Result<u64, ForeignError> {
    let maps = fs::read_to_string("/proc/self/smaps")
        .map_err(ForeignError::kvm("read /proc/self/smaps"))?;
    let mut inside = false;
    for line in maps.lines() {
        if let Some(mapped) = parse(line) {
            inside = mapped.range.contains(&range.start);
        } else if let Some(size) = line.strip_prefix("KernelPageSize:").filter(|_| inside) {
            let kib = size.split_whitespace().next().and_then(|n| n.parse().ok());
            return kib.map(|kib: u64| kib << 10).ok_or_else(|| {
                ForeignError::Invalid("/proc/self/smaps tells no page size".to_owned())
            });
        }
    }
    Err(ForeignError::Invalid(format!(
        "hva: nothing is mapped at {:#x}",
        range.start
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::anon;
    use std::os::fd::AsFd;

    #[test]
    fn anonymous_memory_is_told_from_what_is_not_mapped() {
        let memory = anon::map_anonymous(64 * PAGE_BYTES, false).unwrap();
        let range = memory.hva()..memory.hva() + memory.len();
        assert_eq!(
            backing_of(&range, None).unwrap(),
            Backing::Anonymous { huge: true }
        );
        drop(memory);
        let nowhere = 0x1000..0x3000;
        let error = backing_of(&nowhere, None).unwrap_err().to_string();
        assert!(error.contains("nothing is mapped at 0x1000"), "{error}");
    }

    #[test]
    fn memory_that_is_only_read_is_refused() {
        // This program's own code.
        let code = backing_of as *const () as usize & !(PAGE_BYTES - 1);
        let error = backing_of(&(code..code + PAGE_BYTES), None).unwrap_err();
        assert!(error.to_string().contains("not mapped"), "{error}");
    }

    #[test]
    fn a_file_that_is_mapped_privately_is_not_anonymous() {
        let mapped = parse("7f00-8f00 rw-p 00000000 08:01 1234   /a b").unwrap();
        assert!(mapped.private && mapped.writable && mapped.path == "/a");
        let anonymous = parse("7f00-8f00 rw-p 00000000 00:00 0   [heap]").unwrap();
        assert!(anonymous.path.is_empty());
        assert!(parse("VmFlags: rd wr").is_none());
    }

    #[test]
    fn a_file_of_another_file_system_is_no_hugetlb() {
        let memory = anon::map_anonymous(PAGE_BYTES, false).unwrap();
        let range = memory.hva()..memory.hva() + memory.len();
        let file = fs::File::open("/proc/self/maps").unwrap();
        assert_eq!(
            backing_of(&range, Some(file.as_fd())).unwrap(),
            Backing::Anonymous { huge: true }
        );
    }
}
