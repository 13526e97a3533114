//! What the host is made of, and how much memory it has free in pages of each size.

use std::fs;
use std::path::Path;

use super::host::meminfo_kib;
use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::xml::escape;
use crate::rpc::{Code, List, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(203, Quick, sysinfo),
    procedure!(340, Quick, free_pages),
];

/// What the firmware says of the host (sysfs).
const DMI: &str = "/sys/class/dmi/id";
/// The pools of huge pages (sysfs).
const HUGE_PAGES: &str = "/sys/kernel/mm/hugepages";
/// Size of an ordinary page in KiB.
const PAGE_KIB: u32 = 4;

/// Parts of the host: libvirt's element, and each entry with its file.
const PARTS: [(&str, &[(&str, &str)]); 3] = [
    (
        "bios",
        &[
            ("vendor", "bios_vendor"),
            ("version", "bios_version"),
            ("date", "bios_date"),
            ("release", "bios_release"),
        ],
    ),
    (
        "system",
        &[
            ("manufacturer", "sys_vendor"),
            ("product", "product_name"),
            ("version", "product_version"),
            ("serial", "product_serial"),
            ("uuid", "product_uuid"),
            ("sku", "product_sku"),
            ("family", "product_family"),
        ],
    ),
    (
        "baseBoard",
        &[
            ("manufacturer", "board_vendor"),
            ("product", "board_name"),
            ("version", "board_version"),
            ("serial", "board_serial"),
            ("asset", "board_asset_tag"),
        ],
    ),
];

fn sysinfo(_: &DriverCall<'_>, (flags,): (u32,)) -> Answer<String> {
    check_flags(flags, 0, "virConnectGetSysinfo")?;
    sysinfo_in(Path::new(DMI)).ok_or_else(|| {
        RpcError::new(
            Code::ConfigUnsupported,
            "Host SMBIOS information is not available",
        )
    })
}

/// Returns the document of what is told in a directory; `None` where nothing is.
fn sysinfo_in(dir: &Path) -> Option<String> {
    let mut xml = "<sysinfo type='smbios'>\n".to_owned();
    for (part, entries) in PARTS {
        let told: String = entries
            .iter()
            .filter_map(|(name, file)| {
                let value = fs::read_to_string(dir.join(file)).ok()?;
                let value = escape(value.trim());
                (!value.is_empty()).then(|| format!("    <entry name='{name}'>{value}</entry>\n"))
            })
            .collect();
        if !told.is_empty() {
            xml += &format!("  <{part}>\n{told}  </{part}>\n");
        }
    }
    let is_any = xml.contains("<entry");
    is_any.then(|| xml + "</sysinfo>\n")
}

/// Returns the sizes of pages that the host has, in KiB, the smallest first.
pub(super) fn page_sizes_kib() -> Vec<u32> {
    let pools = fs::read_dir(HUGE_PAGES).into_iter().flatten();
    let sizes = pools.filter_map(|pool| {
        let name = pool.ok()?.file_name();
        let size = name.to_str()?.strip_prefix("hugepages-")?;
        size.strip_suffix("kB")?.parse().ok()
    });
    let mut sizes: Vec<u32> = sizes.chain([PAGE_KIB]).collect();
    sizes.sort_unstable();
    sizes
}

fn free_pages(
    _: &DriverCall<'_>,
    (sizes, start, count, flags): (List<u32, 1024>, i32, u32, u32),
) -> Answer<List<u64, 1024>> {
    check_flags(flags, 0, "virNodeGetFreePages")?;
    // All memory is shown as that of one cell.
    if start != 0 || count < 1 {
        return Err(RpcError::new(
            Code::InvalidArg,
            format!("start cell {start} out of range (0-0)"),
        ));
    }
    let free = sizes.0.iter().map(|&size| free_of(size));
    free.collect::<Answer<_>>().map(List)
}

fn free_of(size_kib: u32) -> Answer<u64> {
    if size_kib == PAGE_KIB {
        return Ok(meminfo_kib("MemFree") / u64::from(PAGE_KIB));
    }
    let file = format!("{HUGE_PAGES}/hugepages-{size_kib}kB/free_hugepages");
    let free = fs::read_to_string(file).ok();
    let free = free.and_then(|free| free.trim().parse().ok());
    free.ok_or_else(|| {
        let why = format!("page size {size_kib} is not available on node 0");
        RpcError::new(Code::OperationFailed, why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_firmware_says_is_told_and_nothing_where_it_says_nothing() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(sysinfo_in(dir.path()), None);
        fs::write(dir.path().join("sys_vendor"), "A & B\n").unwrap();
        fs::write(dir.path().join("product_sku"), "\n").unwrap();
        assert_eq!(
            sysinfo_in(dir.path()).unwrap(),
            "<sysinfo type='smbios'>\n  <system>\n    \
             <entry name='manufacturer'>A &amp; B</entry>\n  </system>\n</sysinfo>\n"
        );
    }

    #[test]
    fn pages_of_a_size_that_the_host_does_not_have_are_refused() {
        assert_eq!(page_sizes_kib()[0], PAGE_KIB);
        for size in page_sizes_kib() {
            free_of(size).unwrap();
        }
        let error = free_of(3).unwrap_err();
        assert!(error.message.contains("page size 3 is not available"));
    }
}
