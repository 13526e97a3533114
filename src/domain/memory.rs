//! Guest memory: how much, and what it is made of.

use super::error::ValueError;

/// Smallest memory. A PC has its first MiB whatever it runs.
pub const MEMORY_BYTES_MIN: u64 = 1 << 20;
/// Largest memory. The hole for devices below 4 GiB and this much RAM fit the
/// 2^41 bytes that page tables and every 64-bit server CPU can address.
pub const MEMORY_BYTES_MAX: u64 = 1 << 40;
/// Guest memory is mapped, tracked and captured in pages of this size.
pub const MEMORY_BYTES_MULTIPLE: u64 = 4096;

/// An amount of guest memory that a machine can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemorySize(u64);

impl MemorySize {
    /// Makes a size of so many bytes.
    ///
    /// # Errors
    ///
    /// `bytes` is no multiple of 4 KiB or not from 1 MiB to 1 TiB.
    pub fn from_bytes(bytes: u64) -> Result<Self, ValueError> {
        if !bytes.is_multiple_of(MEMORY_BYTES_MULTIPLE) {
            let value = format!("{bytes} bytes");
            return Err(ValueError::new(&value, "a multiple of 4 KiB"));
        }
        if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&bytes) {
            let value = format!("{bytes} bytes");
            return Err(ValueError::new(&value, "from 1 MiB to 1 TiB"));
        }
        Ok(MemorySize(bytes))
    }

    /// Makes a size of so many MiB.
    ///
    /// # Errors
    ///
    /// `mib` is 0 or above 1 TiB.
    pub fn from_mib(mib: u32) -> Result<Self, ValueError> {
        MemorySize::from_bytes(u64::from(mib) << 20)
    }

    /// Returns the size in bytes.
    pub fn bytes(self) -> u64 {
        self.0
    }

    /// Returns the size in KiB, the unit of libvirt's API.
    pub fn kib(self) -> u64 {
        self.0 / 1024
    }
}

/// Sizes of pages in the host's hugetlb pools.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HugePageSize {
    /// 2 MiB.
    #[default]
    Mib2,
    /// 1 GiB.
    Gib1,
}

impl HugePageSize {
    /// Returns the size in bytes.
    pub fn bytes(self) -> u64 {
        match self {
            HugePageSize::Mib2 => 2 << 20,
            HugePageSize::Gib1 => 1 << 30,
        }
    }
}

/// What guest memory is mapped from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum MemorySource {
    /// Private anonymous memory, in transparent huge pages where it can.
    #[default]
    Anonymous,
    /// A private mapping of a memfd.
    MemfdPrivate,
    /// A shared mapping of a memfd: another process that is given the memfd can
    /// write to it.
    MemfdShared,
}

/// Guest memory as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    size: MemorySize,
    huge_pages: Option<HugePageSize>,
    /// What it is mapped from.
    pub source: MemorySource,
    /// Whether it is locked into the host's memory.
    pub locked: bool,
    /// Whether it is allocated before the machine starts; otherwise when the
    /// guest first touches it. `None`: the document does not say, so on demand.
    pub preallocate: Option<bool>,
}

impl MemoryConfig {
    /// Makes anonymous memory, allocated on demand.
    pub fn new(size: MemorySize) -> Self {
        MemoryConfig {
            size,
            huge_pages: None,
            source: MemorySource::default(),
            locked: false,
            preallocate: None,
        }
    }

    /// Takes the memory from the host's pool of huge pages.
    ///
    /// # Errors
    ///
    /// The size is no multiple of `page`.
    pub fn with_huge_pages(mut self, page: HugePageSize) -> Result<Self, ValueError> {
        if !self.size.bytes().is_multiple_of(page.bytes()) {
            let value = format!("{} KiB", self.size.kib());
            return Err(ValueError::new(&value, "a multiple of the huge page size"));
        }
        self.huge_pages = Some(page);
        Ok(self)
    }

    /// Changes how much memory the guest has.
    ///
    /// # Errors
    ///
    /// The size is no multiple of the huge page size, if there is one.
    pub fn with_size(mut self, size: MemorySize) -> Result<Self, ValueError> {
        self.size = size;
        match self.huge_pages {
            Some(page) => self.with_huge_pages(page),
            None => Ok(self),
        }
    }

    /// Returns how much memory the guest has.
    pub fn size(&self) -> MemorySize {
        self.size
    }

    /// Returns the hugetlb pool it is taken from, if from one.
    pub fn huge_pages(&self) -> Option<HugePageSize> {
        self.huge_pages
    }
}

/// Returns how many bytes a unit of libvirt's scaled integers is.
///
/// Units are recognized without regard to case: `KB` is 1000 bytes, `k` and
/// `KiB` are 1024.
pub(super) fn unit_bytes(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    if ["b", "byte", "bytes"].contains(&unit.as_str()) {
        return Some(1);
    }
    let mut letters = unit.chars();
    let power = match letters.next()? {
        'k' => 1,
        'm' => 2,
        'g' => 3,
        't' => 4,
        'p' => 5,
        'e' => 6,
        _ => return None,
    };
    match letters.as_str() {
        "" | "ib" => Some(1024_u64.pow(power)),
        "b" => Some(1000_u64.pow(power)),
        _ => None,
    }
}
