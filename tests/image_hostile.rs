//! Damaged and hostile images: each is refused by the name of the place, or holds.
//!
//! An image that still has the original's root digest must hold the original's bytes. Where the
//! damage goes with a new root (an attacker can always make one), the image must be refused or
//! restore to something, without a panic, a hang, or memory that its size does not explain.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::{SampleGuest, facts, machine_memory};
use livepoint::restore::eager::{FillError, FillOptions, fill};
use livepoint::store::backend::forgetful::{ForgetfulStorage, Noise};
use livepoint::store::{Codec, FileStorage, ImageReader, ImageWriter, StoreError, WriteOptions};

const IMAGE: &str = "/disk/vm.lpi";

/// Images tried; twenty times as many with `LIVEPOINT_LONG=1`.
const CASES: u64 = 1000;

/// Address space that the whole test may take: an allocation by a hostile length exceeds it.
const MEMORY_BYTES_MAX: u64 = 2 << 30;

/// Far above what a case takes (a millisecond): a hang, not a slow machine.
const CASE_TIME_MAX: Duration = Duration::from_secs(20);

struct Original {
    guest: SampleGuest,
    bytes: Vec<u8>,
    root: String,
}

impl Original {
    fn new(codec: Codec) -> Self {
        let guest = SampleGuest::new(31);
        let storage = ForgetfulStorage::new(&[Path::new("/disk")]);
        let options = WriteOptions {
            codec,
            ..WriteOptions::default()
        };
        let writer = ImageWriter::create(
            Arc::new(storage.clone()),
            Path::new(IMAGE),
            &guest.regions(),
            &options,
        )
        .unwrap();
        guest.write_to(&writer).unwrap();
        let root = writer.commit(facts()).unwrap().root_digest;
        let bytes = storage.bytes(Path::new(IMAGE)).unwrap();
        Self { guest, bytes, root }
    }
}

/// An image's bytes, with what it takes to make damage look right to the outer layers.
#[derive(Clone)]
struct Forgery {
    bytes: Vec<u8>,
}

const MANIFEST_OFFSET: usize = 64;
const MANIFEST_BYTES: usize = 72;
const ROOT: usize = 80;

impl Forgery {
    fn field(&self, at: usize) -> usize {
        let bytes = self.bytes[at..at + 8].try_into().unwrap();
        usize::try_from(u64::from_le_bytes(bytes)).unwrap()
    }

    fn manifest(&self) -> serde_json::Value {
        serde_json::from_slice(&self.bytes[self.field(MANIFEST_OFFSET)..]).unwrap()
    }

    /// Returns offset and length of what `/pointer` in the manifest names.
    fn extent(&self, pointer: &str) -> (usize, usize) {
        let manifest = self.manifest();
        let extent = manifest.pointer(pointer).unwrap();
        let number = |name: &str| usize::try_from(extent[name].as_u64().unwrap()).unwrap();
        (number("offset"), number("bytes"))
    }

    fn fix_header(&mut self) {
        let crc = crc32c::crc32c(&self.bytes[..4092]);
        self.bytes[4092..4096].copy_from_slice(&crc.to_le_bytes());
    }

    /// Puts `json` in the manifest's place, with length, root and checksum.
    fn set_manifest(&mut self, json: &[u8]) {
        let offset = self.field(MANIFEST_OFFSET);
        self.bytes.truncate(offset);
        self.bytes.extend_from_slice(json);
        let file_bytes = self.bytes.len() as u64;
        self.bytes[56..64].copy_from_slice(&file_bytes.to_le_bytes());
        let manifest_bytes = json.len() as u64;
        self.bytes[MANIFEST_BYTES..ROOT].copy_from_slice(&manifest_bytes.to_le_bytes());
        self.bytes[ROOT..112].copy_from_slice(blake3::hash(json).as_bytes());
        self.fix_header();
    }

    /// Makes the digest of `/pointer` that of its bytes, and all above it.
    fn fix_extent(&mut self, pointer: &str) {
        let (offset, len) = self.extent(pointer);
        let digest = blake3::hash(&self.bytes[offset..offset + len]).to_hex();
        let mut manifest = self.manifest();
        manifest.pointer_mut(pointer).unwrap()["digest"] = digest.as_str().into();
        self.set_manifest(&serde_json::to_vec(&manifest).unwrap());
    }

    /// Makes the checksum of the record of `record_bytes` at `at` that of its bytes.
    fn fix_record(&mut self, at: usize, record_bytes: usize) {
        let body = at..at + record_bytes - 4;
        let crc = crc32c::crc32c(&self.bytes[body]).to_le_bytes();
        self.bytes[at + record_bytes - 4..at + record_bytes].copy_from_slice(&crc);
    }
}

/// Damages `length` bytes at `at`: some flips, or an extreme number.
fn damage(bytes: &mut [u8], at: usize, length: usize, noise: &mut Noise) {
    let extremes = [
        0,
        1,
        u64::MAX,
        1 << 31,
        1 << 32,
        (1 << 63) - 1,
        4095,
        1 << 40,
    ];
    let part = &mut bytes[at..at + length];
    if noise.one_in(2) {
        for _ in 0..=noise.below(3) {
            part[index(noise, length)] ^= 1 << noise.below(8);
        }
    } else {
        let value = extremes[index(noise, extremes.len())].to_le_bytes();
        let width = [2, 4, 8][index(noise, 3)].min(length);
        let start = index(noise, length - width + 1) / width * width;
        part[start..start + width].copy_from_slice(&value[..width]);
    }
}

fn index(noise: &mut Noise, limit: usize) -> usize {
    usize::try_from(noise.below(limit as u64)).unwrap()
}

type Attack = fn(&mut Forgery, &mut Noise);

/// Ways to damage an image, each named.
const ATTACKS: [(&str, Attack); 14] = [
    ("flip anywhere", |forgery, noise| {
        let at = index(noise, forgery.bytes.len());
        forgery.bytes[at] ^= 1 << noise.below(8);
    }),
    ("noise over a range", |forgery, noise| {
        let at = index(noise, forgery.bytes.len());
        let end = (at + 1 + index(noise, 9000)).min(forgery.bytes.len());
        forgery.bytes[at..end].fill_with(|| noise.bits().to_le_bytes()[3]);
    }),
    ("header", |forgery, noise| {
        damage(&mut forgery.bytes, 8, 112, noise);
    }),
    ("header with its checksum", |forgery, noise| {
        damage(&mut forgery.bytes, 8, 112, noise);
        forgery.fix_header();
    }),
    ("truncated", |forgery, noise| {
        let len = index(noise, forgery.bytes.len());
        forgery.bytes.truncate(len);
    }),
    ("extended", |forgery, noise| {
        let len = forgery.bytes.len() + 1 + index(noise, 10_000);
        forgery.bytes.resize(len, 0x77);
    }),
    ("length of the file", |forgery, noise| {
        let len = 4096 + index(noise, forgery.bytes.len() - 4096);
        forgery.bytes.truncate(len);
        forgery.bytes[56..64].copy_from_slice(&(len as u64).to_le_bytes());
        forgery.fix_header();
    }),
    ("swapped pages of the file", |forgery, noise| {
        let pages = forgery.bytes.len() / 4096;
        let (a, b) = (index(noise, pages), index(noise, pages));
        for at in 0..4096 {
            forgery.bytes.swap(a * 4096 + at, b * 4096 + at);
        }
    }),
    ("manifest text", |forgery, noise| {
        let mut json = forgery.bytes[forgery.field(MANIFEST_OFFSET)..].to_vec();
        for _ in 0..=noise.below(3) {
            let at = index(noise, json.len());
            match noise.below(3) {
                0 => json[at] = b"0189-e.[]{}\",:\\\xff"[index(noise, 16)],
                1 => json.truncate(at.max(1)),
                _ => json.insert(at, b"09[{\"n"[index(noise, 6)]),
            }
        }
        forgery.set_manifest(&json);
    }),
    ("manifest value", |forgery, noise| {
        let mut manifest = forgery.manifest();
        let target = pick(&mut manifest, noise);
        *target = match noise.below(7) {
            0 => u64::MAX.into(),
            1 => (1_u64 << 40).into(),
            2 => noise.below(10_000).into(),
            3 => serde_json::Value::Null,
            4 => "00".repeat(32).into(),
            5 => (-1).into(),
            _ => vec![0; index(noise, 300_000)].into(),
        };
        forgery.set_manifest(&serde_json::to_vec(&manifest).unwrap());
    }),
    ("chunk record", |forgery, noise| {
        let (offset, len) = forgery.extent("/chunk_table");
        let record = offset + index(noise, len / 64) * 64;
        damage(&mut forgery.bytes, record, 60, noise);
        forgery.fix_record(record, 64);
        forgery.fix_extent("/chunk_table");
    }),
    ("index record", |forgery, noise| {
        let (offset, len) = forgery.extent("/page_index");
        let record = offset + index(noise, len / 24) * 24;
        if noise.one_in(4) {
            let other = offset + index(noise, len / 24) * 24;
            forgery.bytes.copy_within(other..other + 24, record);
        } else {
            damage(&mut forgery.bytes, record, 20, noise);
        }
        forgery.fix_record(record, 24);
        forgery.fix_extent("/page_index");
    }),
    ("chunk payload", |forgery, noise| {
        let (table, len) = forgery.extent("/chunk_table");
        let record = table + index(noise, len / 64) * 64;
        let offset = forgery.field(record);
        let stored = u32::from_le_bytes(forgery.bytes[record + 8..record + 12].try_into().unwrap());
        let stored = usize::try_from(stored).unwrap();
        // The start holds the compressor's lengths.
        let reach = if noise.one_in(2) {
            stored.min(64)
        } else {
            stored
        };
        damage(&mut forgery.bytes, offset, reach, noise);
        let digest = *blake3::hash(&forgery.bytes[offset..offset + stored]).as_bytes();
        forgery.bytes[record + 16..record + 48].copy_from_slice(&digest);
        forgery.fix_record(record, 64);
        forgery.fix_extent("/chunk_table");
    }),
    ("state section", |forgery, noise| {
        let pointer = ["/sections/0", "/sections/1"][index(noise, 2)];
        let (offset, len) = forgery.extent(pointer);
        damage(&mut forgery.bytes, offset, len, noise);
        forgery.fix_extent(pointer);
    }),
];

/// Picks any value inside `value`.
fn pick<'a>(value: &'a mut serde_json::Value, noise: &mut Noise) -> &'a mut serde_json::Value {
    let children = match &*value {
        serde_json::Value::Array(items) => items.len(),
        serde_json::Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if children == 0 || noise.one_in(20) {
        return value;
    }
    let at = index(noise, children);
    match value {
        serde_json::Value::Array(items) => pick(&mut items[at], noise),
        serde_json::Value::Object(fields) => pick(fields.values_mut().nth(at).unwrap(), noise),
        _ => unreachable!("it has children"),
    }
}

/// What became of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    Refused,
    RefusedLater,
    Harmless,
    OtherRoot,
}

/// Opens, verifies and restores `bytes`, as a user would.
fn try_restore(original: &Original, bytes: &[u8]) -> Fate {
    let storage = ForgetfulStorage::new(&[Path::new("/disk")]);
    storage.put(Path::new(IMAGE), bytes);
    let reader = match ImageReader::open(&storage, Path::new(IMAGE)) {
        Ok(reader) => reader,
        Err(error) => {
            assert_names_its_place(&error);
            return Fate::Refused;
        }
    };
    let pages: u64 = reader
        .manifest()
        .regions
        .iter()
        .map(|region| region.page_count)
        .sum();
    if pages > 1 << 12 {
        // A forged manifest may describe any memory; nobody has mapped it here.
        return Fate::OtherRoot;
    }
    let verified = reader.verify(2);
    let memory = machine_memory(&reader.manifest().regions, 0);
    let filled = fill(&reader, &memory, &FillOptions::default());
    match (verified, filled) {
        (Ok(_), Ok(_)) => {}
        (Err(error), Err(FillError::Store(_)) | Ok(_)) => {
            assert_names_its_place(&error);
            return Fate::RefusedLater;
        }
        (verified, filled) => panic!("verify said {verified:?}, the restore {filled:?}"),
    }
    if reader.root_digest() != original.root {
        return Fate::OtherRoot;
    }
    original.guest.assert_equals(&reader);
    for (region, (_, expected)) in memory.iter().zip(original.guest.memory()) {
        assert!(
            common::bytes_of(region) == expected,
            "the restore has other bytes"
        );
    }
    Fate::Harmless
}

fn assert_names_its_place(error: &StoreError) {
    match error {
        StoreError::Damaged { place, .. } => {
            assert!(error.to_string().contains(&place.to_string()));
        }
        StoreError::State { .. } => {}
        other => panic!("an error of no place: {other}"),
    }
}

fn cases() -> u64 {
    let long = std::env::var("LIVEPOINT_LONG").is_ok_and(|value| value == "1");
    if long { CASES * 20 } else { CASES }
}

fn limit_memory() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let limit = Rlimit {
        current: Some(MEMORY_BYTES_MAX),
        maximum: Some(MEMORY_BYTES_MAX),
    };
    setrlimit(Resource::As, limit).unwrap();
}

#[test]
fn a_damaged_image_is_refused_by_the_place_or_holds_the_original_bytes() {
    limit_memory();
    let originals = [Codec::None, Codec::Lz4, Codec::Zstd { level: 1 }].map(Original::new);
    let mut fates: BTreeMap<(&str, Fate), u64> = BTreeMap::new();
    for case in 0..cases() {
        let mut noise = Noise::new(case);
        let original = &originals[index(&mut noise, originals.len())];
        let (name, attack) = ATTACKS[index(&mut noise, ATTACKS.len())];
        let mut forgery = Forgery {
            bytes: original.bytes.clone(),
        };
        attack(&mut forgery, &mut noise);
        let started = Instant::now();
        let outcome = std::panic::catch_unwind(|| try_restore(original, &forgery.bytes));
        let fate = outcome.unwrap_or_else(|_| panic!("case {case}, {name}: see above"));
        assert!(started.elapsed() < CASE_TIME_MAX, "case {case}, {name}");
        *fates.entry((name, fate)).or_default() += 1;
    }
    for ((name, fate), count) in &fates {
        println!("{name}: {fate:?} {count}");
    }
    for deep in ["chunk record", "index record", "manifest value"] {
        assert!(
            fates.contains_key(&(deep, Fate::Refused)),
            "{deep} was never refused"
        );
    }
    assert!(fates.contains_key(&("chunk payload", Fate::RefusedLater)));
}

#[test]
fn every_flip_in_the_header_is_refused() {
    let original = Original::new(Codec::None);
    for at in 0..4096 {
        let mut bytes = original.bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        assert_eq!(try_restore(&original, &bytes), Fate::Refused, "byte {at}");
    }
}

#[test]
fn an_image_of_a_later_format_opens_if_it_says_that_this_reader_may() {
    let original = Original::new(Codec::Lz4);
    let later = |reader_minor: u8| {
        let mut forgery = Forgery {
            bytes: original.bytes.clone(),
        };
        let mut manifest = forgery.manifest();
        manifest["format"]["minor"] = 9.into();
        manifest["a key of the future"] = true.into();
        forgery.bytes[10] = 9;
        forgery.bytes[14] = reader_minor;
        forgery.set_manifest(&serde_json::to_vec(&manifest).unwrap());
        forgery.bytes
    };
    assert_eq!(try_restore(&original, &later(2)), Fate::OtherRoot);
    assert_eq!(try_restore(&original, &later(3)), Fate::Refused);
}

#[test]
fn a_hole_as_long_as_the_largest_index_takes_no_memory_and_no_time() {
    use std::os::unix::fs::FileExt;
    limit_memory();
    let mut forgery = Forgery {
        bytes: Original::new(Codec::None).bytes,
    };
    let mut manifest = forgery.manifest();
    let (index, _) = forgery.extent("/page_index");
    let bytes = 24_u64 << 28;
    manifest["page_index"]["bytes"] = bytes.into();
    manifest["sections"] = serde_json::json!([]);
    let end = (index as u64 + bytes).next_multiple_of(4096);
    let json = serde_json::to_vec(&manifest).unwrap();
    forgery.bytes.truncate(index);
    let fields = [end + json.len() as u64, end, json.len() as u64];
    forgery.bytes[56..80].copy_from_slice(fields.map(u64::to_le_bytes).as_flattened());
    forgery.bytes[ROOT..112].copy_from_slice(blake3::hash(&json).as_bytes());
    forgery.fix_header();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.lpi");
    let file = std::fs::File::create(&path).unwrap();
    file.write_all_at(&forgery.bytes, 0).unwrap();
    file.write_all_at(&json, end).unwrap();
    let started = Instant::now();
    let error = ImageReader::open(&FileStorage, &path).unwrap_err();
    assert!(error.to_string().contains("page index record 0"), "{error}");
    assert!(started.elapsed() < CASE_TIME_MAX);
}

#[test]
fn what_is_no_image_is_refused() {
    let original = Original::new(Codec::None);
    for bytes in [&[][..], b"#!/bin/sh\n", &[0; 4096], &[0xff; 10_000]] {
        assert_eq!(try_restore(&original, bytes), Fate::Refused);
    }
}
