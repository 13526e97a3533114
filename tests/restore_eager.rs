//! Eager restore fills exactly the image's machine, and only with checked bytes; so do a few pages
//! of it that are put back.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Random, SampleGuest, bytes_of, facts, machine_memory};
use livepoint::page::{Gfn, PAGE_BYTES, PageRun};
use livepoint::restore::eager::{FillError, FillOptions, fill};
use livepoint::restore::patch::Patch;
use livepoint::store::backend::forgetful::ForgetfulStorage;
use livepoint::store::{
    ChunkPages, ChunkScratch, Codec, ImageReader, ImageWriter, LeafDigests, RegionLayout,
    WriteOptions,
};

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

/// Pages of the image in which a few are put back.
const PAGES: u64 = 512 + 90;

/// Writes `PAGES` pages that all differ; returns the image's storage and its bytes.
fn image_with_leaves(leaves: &Arc<LeafDigests>, guest_waits: bool) -> (ForgetfulStorage, Vec<u8>) {
    let storage = ForgetfulStorage::new(&[Path::new("/disk")]);
    let layout = [RegionLayout {
        slot: 0,
        start: Gfn(0),
        page_count: PAGES,
    }];
    let options = WriteOptions {
        guest_waits,
        ..WriteOptions::default()
    };
    let shared = Arc::new(storage.clone());
    let mut writer = ImageWriter::create(shared, Path::new(IMAGE), &layout, &options).unwrap();
    writer.keep_leaves(leaves.clone());
    let all: Vec<_> = (0..PAGES).map(Gfn).collect();
    for frames in all.chunks(512) {
        let data: Vec<u8> = frames.iter().flat_map(|gfn| page(gfn.0)).collect();
        let pages = ChunkPages {
            epoch: 0,
            frames,
            data: &data,
        };
        let mut scratch = ChunkScratch::default();
        writer.write_chunk(pages, &mut scratch).unwrap();
    }
    writer.commit(facts()).unwrap();
    let bytes = storage.bytes(Path::new(IMAGE)).unwrap();
    (storage, bytes)
}

fn page(number: u64) -> Vec<u8> {
    let mut noise = Random::new(number);
    (0..PAGE_BYTES / 8)
        .flat_map(|_| noise.next().to_le_bytes())
        .collect()
}

#[test]
fn a_few_pages_are_read_with_their_leaves_alone_and_never_unchecked() {
    let wanted: Vec<PageRun> = [(3, 1), (5, 1), (100, 9), (511, 2), (600, 2)]
        .map(|(start, page_count)| PageRun {
            start: Gfn(start),
            page_count,
        })
        .to_vec();
    let is_wanted = |number: u64| {
        wanted
            .iter()
            .any(|run| (run.start.0..run.end().0).contains(&number))
    };
    for guest_waits in [false, true] {
        let leaves = Arc::<LeafDigests>::default();
        let (storage, bytes) = image_with_leaves(&leaves, guest_waits);
        let open = || {
            let mut reader = open(&storage);
            reader.keep_leaves(leaves.clone());
            reader
        };
        let memory = machine_memory(&open().manifest().regions, 0xdd);
        let reader = open();
        Patch::read(&reader, wanted.clone(), 2)
            .unwrap()
            .apply(&memory)
            .unwrap();
        let got = bytes_of(&memory[0]);
        for (number, got) in (0..).zip(got.chunks(PAGE_BYTES)) {
            let expected = if is_wanted(number) {
                page(number)
            } else {
                vec![0xdd; PAGE_BYTES]
            };
            assert!(got == expected, "page {number}");
        }
        drop(reader);
        for number in (0..PAGES).step_by(5) {
            // Chunks follow the header's page without a gap.
            let mut damaged = bytes.clone();
            damaged[usize::try_from(1 + number).unwrap() * PAGE_BYTES + 77] ^= 4;
            storage.put(Path::new(IMAGE), &damaged);
            let needed = (number / 4 * 4..number / 4 * 4 + 4).any(is_wanted);
            let reader = open();
            match Patch::read(&reader, wanted.clone(), 1) {
                Ok(_) => assert!(!needed, "page {number}"),
                Err(error) => {
                    let said = error.to_string();
                    let chunk = format!("chunk {} is not what", number / 512);
                    assert!(needed && said.contains(&chunk), "page {number}: {said}");
                }
            }
            drop(reader);
            storage.put(Path::new(IMAGE), &bytes);
        }
    }
}

#[test]
fn leaves_are_known_after_a_whole_restore_too() {
    let (storage, bytes) = image_with_leaves(&Arc::default(), false);
    let leaves = Arc::<LeafDigests>::default();
    let mut reader = open(&storage);
    reader.keep_leaves(leaves.clone());
    let memory = machine_memory(&reader.manifest().regions, 0);
    fill(&reader, &memory, &FillOptions::default()).unwrap();
    drop(reader);
    // Damage beside the leaf that is needed: another reader with these leaves need not see it.
    let mut damaged = bytes;
    damaged[PAGE_BYTES * 20] ^= 1;
    storage.put(Path::new(IMAGE), &damaged);
    let wanted = vec![PageRun {
        start: Gfn(7),
        page_count: 1,
    }];
    assert!(Patch::read(&open(&storage), wanted.clone(), 1).is_err());
    let mut reader = open(&storage);
    reader.keep_leaves(leaves);
    assert_eq!(Patch::read(&reader, wanted, 1).unwrap().page_count(), 1);
}
