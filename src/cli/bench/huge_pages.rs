//! Huge pages of the host: how much guest memory is in them, and the pool of reserved ones.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

/// Guest memory below the hole for devices is one mapping, what is above it another.
const HOLE_START: u64 = 3 << 30;

/// Bytes of a huge page.
const HUGE_BYTES: u64 = 2 << 20;

/// Where a machine's guest memory is in its process.
#[derive(Clone, Debug)]
pub(super) struct GuestMemory {
    smaps: PathBuf,
    ranges: Vec<(u64, u64)>,
}

/// How much of it is there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Resident {
    pub bytes: u64,
    pub huge_bytes: u64,
}

impl GuestMemory {
    /// Finds the memory of a guest of so many bytes by its size.
    pub fn find(pid: u32, memory_bytes: u64) -> anyhow::Result<Self> {
        let smaps = PathBuf::from(format!("/proc/{pid}/smaps"));
        let text = read(&smaps)?;
        let low = memory_bytes.min(HOLE_START);
        let sizes = [low, memory_bytes - low];
        let sizes = sizes.into_iter().filter(|&size| size > 0);
        let ranges: Option<Vec<(u64, u64)>> = sizes
            .map(|size| {
                let mut all = mappings(&text).map(|(start, end, _)| (start, end));
                all.find(|(start, end)| end - start == size)
            })
            .collect();
        let ranges = ranges.with_context(|| {
            let place = smaps.display();
            format!("no mapping of all guest memory in {place}")
        })?;
        Ok(Self { smaps, ranges })
    }

    /// Looks how much of it is in huge pages.
    pub fn look(&self) -> anyhow::Result<Resident> {
        Ok(resident(&read(&self.smaps)?, &self.ranges))
    }
}

/// Adds up the mappings inside `ranges`: one may have been split meanwhile.
fn resident(smaps: &str, ranges: &[(u64, u64)]) -> Resident {
    let inside = |&(start, end, _): &(u64, u64, &str)| {
        ranges
            .iter()
            .any(|&(low, high)| low <= start && end <= high)
    };
    let mut sum = Resident::default();
    for (_, _, fields) in mappings(smaps).filter(inside) {
        sum.bytes += field(fields, "Rss:");
        sum.huge_bytes += field(fields, "AnonHugePages:");
    }
    sum
}

/// Returns each mapping's start, its end, and the lines that follow its own.
fn mappings(smaps: &str) -> impl Iterator<Item = (u64, u64, &str)> {
    let mut starts: Vec<(usize, u64, u64)> = Vec::new();
    let mut offset = 0;
    for line in smaps.split_inclusive('\n') {
        if let Some((start, end)) = range(line) {
            starts.push((offset, start, end));
        }
        offset += line.len();
    }
    let ends: Vec<usize> = starts.iter().skip(1).map(|start| start.0).collect();
    let ends = ends.into_iter().chain([smaps.len()]);
    let pairs: Vec<_> = starts.into_iter().zip(ends).collect();
    pairs
        .into_iter()
        .map(|((from, start, end), to)| (start, end, &smaps[from..to]))
}

/// Reads `7f0000000000-7f0040000000 rw-p ...`.
fn range(line: &str) -> Option<(u64, u64)> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let hex = |text| u64::from_str_radix(text, 16).ok();
    Some((hex(start)?, hex(end)?))
}

/// Returns a field in bytes.
fn field(fields: &str, key: &str) -> u64 {
    let line = fields.lines().find(|line| line.starts_with(key));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

fn read(path: &Path) -> anyhow::Result<String> {
    fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))
}

/// The host's pool of 2 MiB pages, made larger for a while. Dropping it restores the pool.
#[derive(Debug)]
pub(super) struct Pool {
    dir: PathBuf,
    before: u64,
}

impl Pool {
    const DIR: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

    /// Returns how many bytes can be had from the pool.
    pub fn free_bytes() -> u64 {
        number(Path::new(Self::DIR), "free_hugepages").unwrap_or(0) * HUGE_BYTES
    }

    /// Makes room for `bytes` beside what is in use.
    pub fn with_room_for(bytes: u64) -> anyhow::Result<Self> {
        Self::grow(Path::new(Self::DIR), bytes.div_ceil(HUGE_BYTES))
    }

    fn grow(dir: &Path, pages: u64) -> anyhow::Result<Self> {
        let before = number(dir, "nr_hugepages")?;
        let missing = pages.saturating_sub(number(dir, "free_hugepages")?);
        let pool = Self {
            dir: dir.to_owned(),
            before,
        };
        if missing > 0 {
            pool.set(before + missing)?;
            let got = number(dir, "nr_hugepages")?;
            ensure!(
                got >= before + missing,
                "the kernel found {got} huge pages, not {}",
                before + missing
            );
        }
        Ok(pool)
    }

    fn set(&self, pages: u64) -> anyhow::Result<()> {
        let file = self.dir.join("nr_hugepages");
        fs::write(&file, pages.to_string())
            .with_context(|| format!("could not write {}", file.display()))
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if let Err(error) = self.set(self.before) {
            log::error!("the pool of huge pages is not as before: {error:#}");
        }
    }
}

fn number(dir: &Path, name: &str) -> anyhow::Result<u64> {
    let file = dir.join(name);
    let text = read(&file)?;
    let number = text.trim().parse();
    number.with_context(|| format!("{} holds no number", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
7f0000000000-7f0000200000 rw-p 00000000 00:00 0
Size:               2048 kB
Rss:                1024 kB
AnonHugePages:         0 kB
7f0000200000-7f0000600000 rw-p 00000000 00:00 0          [anon:x-y]
Size:               4096 kB
Rss:                4096 kB
AnonHugePages:      2048 kB
VmFlags: rd wr mr mw me dc ac dd hg
7f0000600000-7f0000700000 rw-p 00000000 00:00 0
Rss:                1024 kB
";

    #[test]
    fn mappings_are_told_apart_and_their_fields_found() {
        let all: Vec<_> = mappings(SMAPS).map(|(start, end, _)| end - start).collect();
        assert_eq!(all, [2 << 20, 4 << 20, 1 << 20]);
        let ranges = [(0x7f00_0020_0000, 0x7f00_0060_0000)];
        let wanted = Resident {
            bytes: 4 << 20,
            huge_bytes: 2 << 20,
        };
        assert_eq!(resident(SMAPS, &ranges), wanted);
        // As if it had been split.
        let two = [(0x7f00_0000_0000, 0x7f00_0060_0000)];
        assert_eq!(resident(SMAPS, &two).bytes, 5 << 20);
        assert_eq!(resident(SMAPS, &[]), Resident::default());
    }

    #[test]
    fn the_pool_is_as_before_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        fs::write(file("nr_hugepages"), "3\n").unwrap();
        fs::write(file("free_hugepages"), "1\n").unwrap();
        let pool = Pool::grow(dir.path(), 5).unwrap();
        assert_eq!(fs::read_to_string(file("nr_hugepages")).unwrap(), "7");
        drop(pool);
        assert_eq!(fs::read_to_string(file("nr_hugepages")).unwrap(), "3");
    }
}
