//! Images of earlier builds open, verify and hold what they held.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::facts;
use livepoint::page::{Gfn, PAGE_BYTES, PageRun};
use livepoint::state::StateSection;
use livepoint::store::{
    ChunkPages, ChunkScratch, Codec, FileStorage, ImageReader, ImageWriter, ReadScratch,
    RegionLayout, WriteOptions,
};

const GOLDEN: [(&str, Codec, &str); 2] = [
    (
        "format-0.1-lz4.lpi",
        Codec::Lz4,
        "068fbb87408894dd474e0789c54e8b5ae7139f2f41cc2eac88ff302ec8f864a6",
    ),
    (
        "format-0.1-zstd.lpi",
        Codec::Zstd { level: 1 },
        "fe672bbd9c0594db8312f5a4f3901417fdb27254f08a32e4337ef2e2e3eef757",
    ),
];

const REGIONS: [RegionLayout; 2] = [
    RegionLayout {
        slot: 0,
        start: Gfn(0),
        page_count: 6,
    },
    RegionLayout {
        slot: 2,
        start: Gfn(0x100),
        page_count: 4,
    },
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name)
}

/// A page that compresses, and differs from the others.
fn text_page(gfn: u64) -> Vec<u8> {
    let text = format!("page {gfn} of the golden image; ");
    text.bytes().cycle().take(PAGE_BYTES).collect()
}

/// A page that does not compress.
fn noise_page(gfn: u64) -> Vec<u8> {
    let mut state = gfn + 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    (0..PAGE_BYTES / 8).flat_map(|_| next()).collect()
}

fn expected_page(gfn: u64) -> Vec<u8> {
    match gfn {
        0..=2 => text_page(gfn),
        0x101 => noise_page(gfn),
        _ => vec![0; PAGE_BYTES],
    }
}

#[test]
fn every_golden_image_opens_and_holds_what_it_held() {
    for (name, _, root) in GOLDEN {
        let reader = ImageReader::open(&FileStorage, &golden(name)).unwrap();
        assert_eq!(reader.root_digest(), root, "{name}");
        reader.verify(1).unwrap();
        assert_eq!(reader.manifest().regions, REGIONS, "{name}");
        let mut scratch = ReadScratch::default();
        let mut page = [0; PAGE_BYTES];
        for region in REGIONS {
            for gfn in region.start.0..region.start.0 + region.page_count {
                assert!(reader.read_page(Gfn(gfn), &mut scratch, &mut page).unwrap());
                assert!(
                    page.as_slice() == expected_page(gfn),
                    "{name}, page {gfn:#x}"
                );
            }
        }
        assert!(!reader.read_page(Gfn(6), &mut scratch, &mut page).unwrap());
        let summary = reader.summary();
        assert_eq!(
            (summary.data_pages, summary.superseded_pages),
            (4, 1),
            "{name}"
        );
        assert_eq!(summary.name, "sample");
        assert_eq!(summary.chunks.none, 2, "{name}");
        reader.sections().unwrap();
        assert_eq!(summary.sections.len(), 1);
    }
}

/// Run by hand when a format is released, into a new file each time:
/// `cargo test --test image_golden -- --ignored`.
#[test]
#[ignore = "writes golden images that do not exist yet"]
fn write_golden_images() {
    for (name, codec, _) in GOLDEN {
        let path = golden(name);
        assert!(!path.exists(), "golden images are never written again");
        let options = WriteOptions {
            codec,
            ..WriteOptions::default()
        };
        let writer = ImageWriter::create(Arc::new(FileStorage), &path, &REGIONS, &options).unwrap();
        let mut scratch = ChunkScratch::default();
        let mut write = |epoch, gfns: &[u64], page: fn(u64) -> Vec<u8>| {
            let frames: Vec<Gfn> = gfns.iter().copied().map(Gfn).collect();
            let data: Vec<u8> = gfns.iter().flat_map(|&gfn| page(gfn)).collect();
            let pages = ChunkPages {
                epoch,
                frames: &frames,
                data: &data,
            };
            writer.write_chunk(pages, &mut scratch).unwrap();
        };
        write(1, &[2, 0, 1], text_page);
        write(1, &[0x101], noise_page);
        // An older copy that comes later does not count.
        write(0, &[1], noise_page);
        for region in REGIONS {
            let run = PageRun {
                start: region.start,
                page_count: region.page_count,
            };
            writer.record_zero(0, run).unwrap();
        }
        writer
            .add_section(StateSection {
                kind: "sample".to_owned(),
                instance: 0,
                version: 1,
                payload: b"state".to_vec(),
            })
            .unwrap();
        let committed = writer.commit(facts()).unwrap();
        println!("{name}: {}", committed.root_digest);
    }
}
