//! Images that are whole, and images that are not.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use super::Qcow2Format;
use super::header::{self, Backing};
use crate::guest::{DiskImage, ImageError, ImageFormat as _};

const MIB: u64 = 1 << 20;

struct Bench(tempfile::TempDir);

impl Bench {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn create(&self, name: &str, bytes: u64, like: Option<&Path>) -> Box<dyn DiskImage> {
        let path = self.path(name);
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(true);
        let file = options.open(&path).unwrap();
        Qcow2Format.create(file, &path, bytes, like).unwrap()
    }
}

fn open(path: &Path, writable: bool) -> Result<Box<dyn DiskImage>, ImageError> {
    let file = File::options().read(true).write(writable).open(path);
    Qcow2Format.open(file.unwrap(), path, writable)
}

fn read(image: &dyn DiskImage, offset: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; len];
    image.read_at(&mut bytes, offset).unwrap();
    bytes
}

/// Returns everything that is not zeros.
fn data_of(image: &dyn DiskImage) -> Vec<std::ops::Range<u64>> {
    let mut found: Vec<std::ops::Range<u64>> = Vec::new();
    let mut at = 0;
    while let Some(data) = image.next_data(at).unwrap() {
        at = data.end;
        match found.last_mut() {
            Some(last) if last.end == data.start => last.end = data.end,
            _ => found.push(data),
        }
    }
    found
}

/// Has the header say that it is based on a file.
fn set_backing(path: &Path, name: &str, format: &str) {
    let file = File::options().write(true).read(true).open(path).unwrap();
    let mut head = vec![0; 4096];
    file.read_exact_at(&mut head, 0).unwrap();
    let length = u32::from_be_bytes(head[100..104].try_into().unwrap()) as usize;
    head[length..length + 4].copy_from_slice(&0xe279_2aca_u32.to_be_bytes());
    head[length + 4..length + 8]
        .copy_from_slice(&u32::try_from(format.len()).unwrap().to_be_bytes());
    head[length + 8..length + 24].fill(0);
    head[length + 8..length + 8 + format.len()].copy_from_slice(format.as_bytes());
    // Then the end of the extensions, and the name.
    let end = length + 8 + format.len().next_multiple_of(8);
    head[end..end + 8].fill(0);
    head[2048..2048 + name.len()].copy_from_slice(name.as_bytes());
    head[8..16].copy_from_slice(&2048_u64.to_be_bytes());
    head[16..20].copy_from_slice(&u32::try_from(name.len()).unwrap().to_be_bytes());
    file.write_all_at(&head, 0).unwrap();
}

#[test]
fn what_is_written_is_read_by_whoever_opens_the_image_next() {
    let bench = Bench::new();
    let image = bench.create("a.qcow2", 64 * MIB, None);
    assert_eq!(image.bytes(), 64 * MIB);
    assert_eq!(data_of(&*image), []);
    image.write_at(&[1; 512], 0).unwrap();
    image.write_at(&[2; 200_000], 7 * MIB - 1000).unwrap();
    image.write_at(&[3; 512], 64 * MIB - 512).unwrap();
    image.write_at(&[4; 512], 64 * MIB).unwrap_err();
    image.flush(true).unwrap();
    drop(image);
    let image = open(&bench.path("a.qcow2"), false).unwrap();
    assert_eq!(read(&*image, 0, 513), [vec![1; 512], vec![0]].concat());
    assert_eq!(read(&*image, 7 * MIB - 1000, 200_000), vec![2; 200_000]);
    assert_eq!(read(&*image, 7 * MIB - 1001, 1), [0]);
    assert_eq!(read(&*image, 64 * MIB - 512, 512), [3; 512]);
    let cluster = 64 << 10;
    let data = [
        0..cluster,
        7 * MIB - cluster..7 * MIB + 4 * cluster,
        64 * MIB - cluster..64 * MIB,
    ];
    assert_eq!(data_of(&*image), data);
    image.write_at(&[0], 0).unwrap_err();
    assert!(super::disk_bytes(&bench.path("a.qcow2")).unwrap() == 64 * MIB);
}

#[test]
fn zeros_and_discards_read_as_zeros_and_a_discard_frees_the_files_room() {
    let bench = Bench::new();
    for version in [3_u32, 2] {
        let path = bench.path("a.qcow2");
        drop(bench.create("a.qcow2", 8 * MIB, None));
        let file = File::options().write(true).open(&path).unwrap();
        file.write_all_at(&version.to_be_bytes(), 4).unwrap();
        let image = open(&path, true).unwrap();
        let room = || fs::metadata(&path).unwrap().blocks() * 512;
        image.write_at(&vec![5; 4 << 20], 0).unwrap();
        image.flush(true).unwrap();
        let before = room();
        image.zero(100, 2 * MIB, true).unwrap();
        image.zero(3 * MIB, 5 * MIB, false).unwrap();
        image.flush(true).unwrap();
        // By 2 MiB, but for the clusters at the ends.
        assert!(
            version == 2 || before - room() > 3 * MIB / 2,
            "{before} {}",
            room()
        );
        drop(image);
        let image = open(&path, false).unwrap();
        let all = read(&*image, 0, 8 << 20);
        let (first, second) = (100 + (2 << 20), 3 << 20);
        assert!(all[..100] == [5; 100] && all[first..second].iter().all(|byte| *byte == 5));
        assert!(
            all[100..first]
                .iter()
                .chain(&all[second..])
                .all(|byte| *byte == 0)
        );
    }
}

#[test]
fn an_image_on_another_reads_through_it_and_leaves_it_alone() {
    let bench = Bench::new();
    let base = bench.create("base.qcow2", 4 * MIB, None);
    base.write_at(&[1; 4096], MIB).unwrap();
    drop(base);
    let before = fs::read(bench.path("base.qcow2")).unwrap();
    drop(bench.create("top.qcow2", 8 * MIB, None));
    set_backing(&bench.path("top.qcow2"), "base.qcow2", "qcow2");
    let top = open(&bench.path("top.qcow2"), true).unwrap();
    assert_eq!(read(&*top, MIB, 4096), [1; 4096]);
    top.write_at(&[2; 512], MIB + 512).unwrap();
    top.zero(MIB + 1024, 512, true).unwrap();
    let expected = [vec![1; 512], vec![2; 512], vec![0; 512], vec![1; 512]].concat();
    assert_eq!(read(&*top, MIB, 2048), expected);
    drop(top);
    assert!(fs::read(bench.path("base.qcow2")).unwrap() == before);
    // A new one like it is based on the same, and has nothing of its own.
    let like = bench.path("top.qcow2");
    let third = bench.create("third.qcow2", 8 * MIB, Some(&like));
    assert_eq!(read(&*third, MIB, 4096), [1; 4096]);
    drop(third);
    let third = open(&bench.path("third.qcow2"), false).unwrap();
    assert_eq!(read(&*third, MIB, 4096), [1; 4096]);
    // While anybody reads the base, nobody writes it.
    let base = File::options().write(true).open(bench.path("base.qcow2"));
    let base = base.unwrap();
    base.try_lock().unwrap_err();
    drop(third);
    base.try_lock().unwrap();
    let error = open(&like, true).unwrap_err().to_string();
    assert!(error.contains("base.qcow2 is in use"), "{error}");
}

#[test]
fn an_image_that_is_based_on_itself_or_on_nothing_is_refused() {
    let bench = Bench::new();
    drop(bench.create("a.qcow2", MIB, None));
    let path = bench.path("a.qcow2");
    fs::write(bench.path("raw"), vec![0; 4096]).unwrap();
    for (name, format, said) in [
        ("a.qcow2", "qcow2", "more than 32 files"),
        ("gone", "raw", "gone"),
        ("raw", "vmdk", "format \"vmdk\""),
        ("raw", "", "format \"\""),
        ("raw", "qcow2", "raw is no qcow2 image"),
        ("json:{}", "raw", "no path"),
        ("nbd://host/x", "raw", "no path"),
        ("/dev/null", "raw", "no regular file"),
        (".", "raw", "no regular file"),
    ] {
        set_backing(&path, name, format);
        let error = describe(&open(&path, true).unwrap_err());
        assert!(error.contains(said), "{name} {format}: {error}");
    }
}

fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Puts a value into the header of a file.
fn put(bytes: &mut [u8], at: usize, value: u64, width: usize) {
    bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
}

#[test]
fn a_header_that_is_wrong_is_refused_with_what_is_wrong_and_where() {
    let bench = Bench::new();
    drop(bench.create("a.qcow2", 64 * MIB, None));
    let path = bench.path("a.qcow2");
    let whole = fs::read(&path).unwrap();
    for (at, width, value, said) in [
        (0, 4, 0, "does not begin as one"),
        (4, 4, 1, "version 1"),
        (4, 4, u64::from(u32::MAX), "version 4294967295"),
        (8, 8, u64::MAX, "name of its backing file"),
        (8, 8, 1 << 20, "name of its backing file"),
        (20, 4, 8, "clusters have 2^8"),
        (20, 4, 22, "clusters have 2^22"),
        (20, 4, u64::from(u32::MAX), "clusters have 2^4294967295"),
        // The tables are elsewhere then.
        (20, 4, 21, "table"),
        (24, 8, u64::MAX, "disk has 18446744073709551615 bytes"),
        (24, 8, 1 << 62, "L1 table has"),
        (32, 4, 1, "encrypted"),
        (36, 4, 0, "L1 table has 0 entries"),
        (36, 4, u64::from(u32::MAX), "L1 table has"),
        (40, 8, 0, "L1 table should be at 0x0"),
        (40, 8, 0x1_0001, "L1 table should be at 0x10001"),
        (40, 8, 1 << 40, "L1 table should be at"),
        (40, 8, u64::MAX, "L1 table should be at"),
        (40, 8, 0x1_0000, "L1 table is its refcount table"),
        (48, 8, 0, "refcount table should be at 0x0"),
        (48, 8, u64::MAX - 0xffff, "refcount table should be at"),
        (56, 4, 0, "refcount table has 0 clusters"),
        (56, 4, u64::from(u32::MAX), "refcount table has"),
        (60, 4, 3, "3 internal snapshots"),
        (72, 8, 1, "was not closed"),
        (72, 8, 2, "marked as corrupt"),
        (72, 8, 4, "in another file"),
        (72, 8, 8, "than by zlib"),
        (72, 8, 16, "extended L2"),
        (72, 8, 1 << 63, "feature 63"),
        (96, 4, 7, "refcounts have 2^7"),
        (96, 4, u64::from(u32::MAX), "refcounts have"),
        (100, 4, 96, "header has 96 bytes"),
        (100, 4, 105, "header has 105 bytes"),
        (100, 4, u64::from(u32::MAX), "header has"),
        // The table of names of features is the first extension.
        (108, 4, 49, "feature names has 49 bytes"),
        (108, 4, 1, "feature names has 1 bytes"),
        (108, 4, u64::from(u32::MAX), "longer than its first cluster"),
    ] {
        let mut bytes = whole.clone();
        put(&mut bytes, at, value, width);
        fs::write(&path, &bytes).unwrap();
        let error = open(&path, true).unwrap_err();
        let text = describe(&error);
        assert!(text.contains(said), "{at} = {value:#x}: {text}");
        assert!(text.starts_with(path.to_str().unwrap()), "{text}");
    }
    for len in [0, 3, 71, 72, 103, 104, 120, 0x1_0000, 0x2_0000] {
        fs::write(&path, &whole[..len]).unwrap();
        let error = open(&path, true).unwrap_err();
        assert!(
            matches!(error, ImageError::Unusable { .. }),
            "{len}: {error}"
        );
    }
}

/// Reads and writes as a guest would; whatever comes of it is an answer.
fn use_it(path: &Path, writable: bool) -> io::Result<()> {
    let image = open(path, writable).map_err(io::Error::other)?;
    let mut bytes = vec![0; 256 << 10];
    let results = [
        image.read_at(&mut bytes, 0),
        image.next_data(0).map(drop),
        image.write_at(&bytes, MIB / 2),
        image.zero(MIB, MIB, true),
        image.zero(0, 4096, false),
        image.flush(false),
    ];
    results.into_iter().collect()
}

#[test]
fn no_damage_makes_reading_or_writing_an_image_panic_or_hang() {
    use proptest::prelude::*;
    use proptest::test_runner::{Config, TestRunner};
    let bench = Bench::new();
    let image = bench.create("whole.qcow2", 8 * MIB, None);
    image.write_at(&vec![7; 1 << 20], 0).unwrap();
    image.write_at(&[8; 512], 5 * MIB).unwrap();
    drop(image);
    let whole = fs::read(bench.path("whole.qcow2")).unwrap();
    let path = bench.path("damaged.qcow2");
    // The header, the refcount table and a block of it, the L1 table, an L2 table.
    let tables = [0, 0x1_0000, 0x2_0000, 0x3_0000, 0x4_0000];
    let place = (prop::sample::select(tables.to_vec()), 0_usize..160);
    let value = prop_oneof![
        any::<u64>(),
        prop::sample::select(vec![0, 1, 1 << 16, 1 << 62, 1 << 63, u64::MAX, 0x4_0000]),
        (0_u64..0x10).prop_map(|cluster| cluster << 16 | 1 << 63),
        (0_u64..64).prop_map(|bit| 1 << bit),
    ];
    let damage = prop::collection::vec((place, value, 1_usize..=8), 1..4);
    let mut runner = TestRunner::new(Config::with_cases(200));
    let ran = runner.run(&(damage, any::<bool>()), |(damage, writable)| {
        let mut bytes = whole.clone();
        for ((table, at), value, width) in damage {
            put(&mut bytes, table + at, value, width);
        }
        fs::write(&path, &bytes).unwrap();
        drop(use_it(&path, writable));
        Ok(())
    });
    ran.unwrap();
}

#[test]
fn headers_of_both_versions_say_what_an_image_is_based_on() {
    let bench = Bench::new();
    drop(bench.create("a.qcow2", MIB, None));
    let path = bench.path("a.qcow2");
    set_backing(&path, "dir/base", "raw");
    let bytes = fs::read(&path).unwrap();
    let header = header::parse(&bytes, bytes.len() as u64, false).unwrap();
    let backing = Backing {
        name: "dir/base".to_owned(),
        is_qcow2: false,
    };
    assert_eq!(header.backing, Some(backing));
    assert_eq!((header.bytes, header.cluster_bytes), (MIB, 64 << 10));
    // Version 2 has no place for the format.
    let mut bytes = bytes;
    put(&mut bytes, 4, 2, 4);
    let why = header::parse(&bytes, bytes.len() as u64, false).unwrap_err();
    assert!(why.contains("of which format"), "{why}");
}

#[test]
fn all_files_below_an_image_are_found() {
    let bench = Bench::new();
    for (name, below, format) in [
        ("middle.qcow2", "dir/base", "raw"),
        ("top.qcow2", "middle.qcow2", "qcow2"),
        // What does not end by itself ends all the same.
        ("loop.qcow2", "loop.qcow2", "qcow2"),
    ] {
        bench.create(name, MIB, None);
        set_backing(&bench.path(name), below, format);
    }
    let files = super::backing_files(&bench.path("top.qcow2"));
    assert_eq!(files, [bench.path("middle.qcow2"), bench.path("dir/base")]);
    assert!(super::backing_files(&bench.path("dir/base")).is_empty());
    let endless = super::backing_files(&bench.path("loop.qcow2"));
    assert_eq!(endless.len(), super::LAYERS_MAX);
}
