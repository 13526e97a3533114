//! Eager restore fills exactly the image's machine, and only with checked bytes.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{SampleGuest, bytes_of, facts, machine_memory};
use livepoint::restore::eager::{FillError, FillOptions, fill};
use livepoint::store::backend::forgetful::ForgetfulStorage;
use livepoint::store::{Codec, ImageReader, ImageWriter, WriteOptions};

const IMAGE: &str = "/disk/vm.lpi";

fn image_of(guest: &SampleGuest, codec: Codec) -> ForgetfulStorage {
    let storage = ForgetfulStorage::new(&[Path::new("/disk")]);
    let options = WriteOptions {
        codec,
        ..WriteOptions::default()
    };
    let shared = Arc::new(storage.clone());
    let writer = ImageWriter::create(shared, Path::new(IMAGE), &guest.regions(), &options).unwrap();
    guest.write_to(&writer).unwrap();
    writer.commit(facts()).unwrap();
    storage
}

fn open(storage: &ForgetfulStorage) -> ImageReader {
    ImageReader::open(storage, Path::new(IMAGE)).unwrap()
}

#[test]
fn fresh_or_used_memory_equals_the_saved_guest_after_a_fill() {
    let guest = SampleGuest::new(21);
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd { level: 1 }] {
        let reader = open(&image_of(&guest, codec));
        for (threads, memory_is_fresh) in [(1, true), (2, true), (3, false)] {
            let before = if memory_is_fresh { 0 } else { 0xdd };
            let memory = machine_memory(&guest.regions(), before);
            let options = FillOptions {
                threads,
                memory_is_fresh,
            };
            let stats = fill(&reader, &memory, &options).unwrap();
            assert_eq!(stats.data_pages + stats.zero_pages, 64);
            for (region, (_, expected)) in memory.iter().zip(guest.memory()) {
                assert!(bytes_of(region) == expected, "{codec}, {threads} threads");
            }
        }
    }
}

#[test]
fn fresh_memory_is_not_touched_for_pages_of_zeros() {
    let guest = SampleGuest::new(22);
    let reader = open(&image_of(&guest, Codec::None));
    let memory = machine_memory(&guest.regions(), 0xdd);
    fill(&reader, &memory, &FillOptions::default()).unwrap();
    let run = reader.zero_runs().next().unwrap();
    assert_eq!(run.start.0 >> 8, 0, "the first run is in the first region");
    let at = usize::try_from(run.start.gpa()).unwrap();
    assert_eq!(bytes_of(&memory[0])[at], 0xdd);
}

#[test]
fn other_memory_than_the_image_has_is_refused_before_a_byte_of_it_changes() {
    let guest = SampleGuest::new(23);
    let reader = open(&image_of(&guest, Codec::None));
    let mut fewer = guest.regions();
    fewer.pop();
    let mut longer = guest.regions();
    longer[1].page_count += 1;
    let mut moved = guest.regions();
    moved[1].start.0 += 1;
    let mut renamed = guest.regions();
    renamed[0].slot += 7;
    for layout in [fewer, longer, moved, renamed] {
        let memory = machine_memory(&layout, 0xdd);
        let error = fill(&reader, &memory, &FillOptions::default()).unwrap_err();
        assert!(matches!(error, FillError::Layout { .. }), "{error}");
        for region in &memory {
            assert!(bytes_of(region).iter().all(|&byte| byte == 0xdd));
        }
    }
}

#[test]
fn a_chunk_whose_digest_does_not_hold_never_enters_memory() {
    let guest = SampleGuest::new(24);
    let storage = image_of(&guest, Codec::None);
    let mut bytes = storage.bytes(Path::new(IMAGE)).unwrap();
    // The first byte of the first chunk.
    bytes[4096] ^= 1;
    storage.put(Path::new(IMAGE), &bytes);
    let reader = open(&storage);
    let memory = machine_memory(&guest.regions(), 0xdd);
    let options = FillOptions {
        threads: 1,
        ..FillOptions::default()
    };
    let error = fill(&reader, &memory, &options).unwrap_err();
    assert!(
        error.to_string().contains("chunk 0 should have digest"),
        "{error}"
    );
    for region in &memory {
        assert!(bytes_of(region).iter().all(|&byte| byte == 0xdd));
    }
}
