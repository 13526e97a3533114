//! Images that name memory in others: they are whole with them, and nothing without.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{Random, facts};
use livepoint::page::{Gfn, PAGE_BYTES};
use livepoint::store::{
    CarryOver, ChunkPages, ChunkScratch, Codec, CommittedImage, FileStorage, ImageReader,
    ImageWriter, LAYER_COUNT_MAX, ReadScratch, RegionLayout, Storage, StoreError, WriteOptions,
    chain_images, collect_garbage, fold, remove_image,
};

const PAGES: u64 = 700;

const REGIONS: [RegionLayout; 2] = [
    RegionLayout {
        slot: 0,
        start: Gfn(0),
        page_count: 500,
    },
    RegionLayout {
        slot: 1,
        start: Gfn(0x1000),
        page_count: PAGES - 500,
    },
];

fn frame(page: u64) -> Gfn {
    if page < 500 {
        Gfn(page)
    } else {
        Gfn(0x1000 + page - 500)
    }
}

/// A guest's memory by a number a page; 0 is a page of zeros.
#[derive(Clone)]
struct Memory(Vec<u32>);

fn bytes_of(value: u32) -> Vec<u8> {
    let mut noise = Random::new(u64::from(value));
    if value == 0 {
        return vec![0; PAGE_BYTES];
    }
    (0..PAGE_BYTES / 8)
        .flat_map(|_| noise.next().to_le_bytes())
        .collect()
}

impl Memory {
    fn new(seed: u32) -> Self {
        Self(
            (0..700)
                .map(|page| if page % 5 == 0 { 0 } else { seed + page })
                .collect(),
        )
    }

    fn write(&mut self, pages: &[u64], value: u32) {
        for &page in pages {
            self.0[usize::try_from(page).unwrap()] = value;
        }
    }

    fn assert_in(&self, image: &Path) {
        let reader = ImageReader::open(&FileStorage, image).unwrap();
        let mut scratch = ReadScratch::default();
        let mut out = [0; PAGE_BYTES];
        for (page, &value) in (0..).zip(&self.0) {
            assert!(
                reader
                    .read_page(frame(page), &mut scratch, &mut out)
                    .unwrap()
            );
            assert!(
                out == bytes_of(value).as_slice(),
                "page {page} of {}",
                image.display()
            );
        }
        reader.verify(2).unwrap();
    }
}

struct Chain {
    dir: tempfile::TempDir,
    memory: Memory,
    images: Vec<(PathBuf, Memory)>,
}

impl Chain {
    fn new() -> Self {
        let mut chain = Self {
            dir: tempfile::tempdir().unwrap(),
            memory: Memory::new(1000),
            images: Vec::new(),
        };
        chain.add(None, &(0..PAGES).collect::<Vec<_>>(), CarryOver::LEAST);
        chain
    }

    fn begin(&self) -> ImageWriter {
        let options = WriteOptions {
            codec: Codec::Lz4,
            durable: false,
            ..WriteOptions::default()
        };
        ImageWriter::create(Arc::new(FileStorage), self.dir.path(), &REGIONS, &options).unwrap()
    }

    fn add(&mut self, parent: Option<&Path>, pages: &[u64], carry: CarryOver) -> CommittedImage {
        let mut writer = self.begin();
        if let Some(parent) = parent {
            let parent = ImageReader::open(&FileStorage, parent).unwrap();
            writer.inherit(Arc::new(parent)).unwrap();
        }
        let mut scratch = ChunkScratch::default();
        for part in pages.chunks(100) {
            let frames: Vec<_> = part.iter().map(|&page| frame(page)).collect();
            let value = |page: &u64| self.memory.0[usize::try_from(*page).unwrap()];
            let data: Vec<u8> = part.iter().flat_map(|page| bytes_of(value(page))).collect();
            let pages = ChunkPages {
                epoch: 0,
                frames: &frames,
                data: &data,
            };
            writer.write_chunk(pages, &mut scratch).unwrap();
        }
        writer.carry_over(carry, || true).unwrap();
        let committed = writer.commit(facts()).unwrap();
        self.images
            .push((committed.path.clone(), self.memory.clone()));
        committed
    }

    fn newest(&self) -> PathBuf {
        self.images.last().unwrap().0.clone()
    }

    /// Adds an increment in which `pages` are written, on the newest image.
    fn grow(&mut self, pages: &[u64], value: u32, carry: CarryOver) -> CommittedImage {
        self.memory.write(pages, value);
        let parent = self.newest();
        self.add(Some(&parent), pages, carry)
    }

    fn assert_all(&self) {
        for (image, memory) in &self.images {
            memory.assert_in(image);
        }
    }
}

#[test]
fn every_image_of_a_chain_and_of_its_branches_is_whole() {
    let mut chain = Chain::new();
    let mut random = Random::new(7);
    for number in 1..12 {
        let pages: Vec<_> = (0..20).map(|_| random.below(PAGES)).collect();
        chain.grow(
            &pages,
            if number % 3 == 0 { 0 } else { number },
            CarryOver::LEAST,
        );
    }
    let trunk = chain.images.clone();
    for (from, memory) in [&trunk[2], &trunk[5], &trunk[5]] {
        chain.memory = memory.clone();
        chain.memory.write(&[3, 4, 650], 77);
        chain.add(Some(from), &[3, 4, 650], CarryOver::LEAST);
        chain.grow(&[3, 699], 78, CarryOver::LEAST);
    }
    chain.assert_all();
    let reader = ImageReader::open(&FileStorage, &chain.newest()).unwrap();
    let manifest = reader.manifest();
    assert_eq!(
        manifest.parent.as_ref().unwrap().file,
        manifest.layers[0].file
    );
    assert!(
        reader.image_bytes()
            < ImageReader::open(&FileStorage, &trunk[0].0)
                .unwrap()
                .image_bytes()
                / 5
    );
}

#[test]
fn a_layer_that_nothing_is_left_of_is_not_needed() {
    let mut chain = Chain::new();
    let all: Vec<_> = (0..PAGES).collect();
    chain.grow(&all[..350], 5, CarryOver::LEAST);
    chain.grow(&all[350..], 6, CarryOver::LEAST);
    let reader = ImageReader::open(&FileStorage, &chain.newest()).unwrap();
    assert_eq!(reader.layer_paths().count(), 1);
    remove_image(&FileStorage, &chain.images[0].0.clone()).unwrap_err();
    drop(reader);
    chain.grow(&all, 7, CarryOver::LEAST);
    let reader = ImageReader::open(&FileStorage, &chain.newest()).unwrap();
    assert_eq!(reader.layer_paths().count(), 0);
    assert!(reader.manifest().parent.is_some());
    chain.assert_all();
}

#[test]
fn carried_pages_spread_memory_so_that_old_images_are_not_needed() {
    let mut chain = Chain::new();
    let carry = CarryOver {
        pages: PAGES.div_ceil(4),
        ..CarryOver::LEAST
    };
    for number in 1..12 {
        chain.grow(&[u64::from(number)], number, carry);
    }
    chain.assert_all();
    for (number, (image, _)) in chain.images.iter().enumerate() {
        let reader = ImageReader::open(&FileStorage, image).unwrap();
        assert!(reader.layer_paths().count() <= 4, "image {number}");
    }
}

#[test]
fn a_chain_of_any_length_keeps_to_the_limit_of_layers() {
    let mut chain = Chain::new();
    let length = u32::try_from(LAYER_COUNT_MAX).unwrap() + 6;
    for number in 1..length {
        chain.grow(&[u64::from(number)], number, CarryOver::LEAST);
    }
    let reader = ImageReader::open(&FileStorage, &chain.newest()).unwrap();
    assert!(reader.layer_paths().count() <= LAYER_COUNT_MAX);
    chain.memory.assert_in(&chain.newest());
}

#[test]
fn a_flipped_bit_in_any_chunk_of_a_layer_is_found_and_its_file_named() {
    let mut chain = Chain::new();
    chain.grow(&[1, 2, 3], 9, CarryOver::LEAST);
    chain.grow(&[2, 600], 10, CarryOver::LEAST);
    let newest = chain.newest();
    for (image, _) in &chain.images {
        let file = fs::File::options()
            .read(true)
            .write(true)
            .open(image)
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 4096 + 123).unwrap();
        file.write_all_at(&[byte[0] ^ 4], 4096 + 123).unwrap();
        let reader = ImageReader::open(&FileStorage, &newest).unwrap();
        let error = reader.verify(1).unwrap_err().to_string();
        let name = image.file_name().unwrap().to_str().unwrap();
        assert!(error.contains(name) && error.contains("chunk 0"), "{error}");
        file.write_all_at(&byte, 4096 + 123).unwrap();
    }
    chain.assert_all();
}

#[test]
fn a_layer_that_is_gone_or_another_image_is_named() {
    let mut chain = Chain::new();
    chain.grow(&[1], 9, CarryOver::LEAST);
    let (base, newest) = (chain.images[0].0.clone(), chain.newest());
    let aside = chain.dir.path().join("aside");
    fs::rename(&base, &aside).unwrap();
    let open = || ImageReader::open(&FileStorage, &newest);
    let gone = open().unwrap_err();
    assert!(
        matches!(&gone, StoreError::Layer { layer, .. } if *layer == base),
        "{gone}"
    );
    // Another image, however good, is not the one.
    let other = Chain::new();
    fs::copy(other.newest(), &base).unwrap();
    let error = open().unwrap_err();
    let text = format!("{error}: {}", std::error::Error::source(&error).unwrap());
    assert!(text.contains("layer 0 should be image"), "{text}");
    fs::rename(&aside, &base).unwrap();
    chain.assert_all();
}

#[test]
fn an_image_that_another_needs_is_neither_removed_nor_replaced_nor_given_up() {
    let mut chain = Chain::new();
    chain.grow(&[1], 9, CarryOver::LEAST);
    let base = chain.images[0].0.clone();
    let named = |result: Result<(), StoreError>| {
        let error = result.unwrap_err();
        assert!(matches!(error, StoreError::Named { .. }), "{error}");
    };
    named(remove_image(&FileStorage, &base));
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let create = |path: &Path, options: &WriteOptions| {
        ImageWriter::create(storage.clone(), path, &REGIONS, options).map(drop)
    };
    named(create(&base, &WriteOptions::default()));
    let options = WriteOptions {
        spare: Some(base.clone()),
        ..WriteOptions::default()
    };
    named(create(chain.dir.path(), &options));
    chain.assert_all();
    remove_image(&FileStorage, &chain.newest()).unwrap();
    remove_image(&FileStorage, &base).unwrap();
}

#[test]
fn an_increment_elsewhere_or_under_a_name_that_nobody_looks_through_is_refused() {
    let chain = Chain::new();
    let parent = Arc::new(ImageReader::open(&FileStorage, &chain.newest()).unwrap());
    let elsewhere = tempfile::tempdir().unwrap();
    let other = elsewhere.path().join("increment.lpi");
    for path in [other, chain.dir.path().join("increment.image")] {
        let options = WriteOptions::default();
        let mut writer =
            ImageWriter::create(Arc::new(FileStorage), &path, &REGIONS, &options).unwrap();
        let error = writer.inherit(parent.clone()).unwrap_err();
        assert!(matches!(error, StoreError::Unwritable { .. }), "{error}");
    }
    assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0);
}

#[test]
fn a_folded_image_needs_no_other() {
    let mut chain = Chain::new();
    for number in 1..6 {
        chain.grow(&[u64::from(number), 600], number, CarryOver::LEAST);
    }
    let tip = Arc::new(ImageReader::open(&FileStorage, &chain.newest()).unwrap());
    let elsewhere = tempfile::tempdir().unwrap();
    let out = elsewhere.path().join("folded.image");
    let storage: Arc<dyn Storage> = Arc::new(FileStorage);
    let options = WriteOptions::default();
    fold(&storage, &tip, &out, &options).unwrap();
    chain.memory.assert_in(&out);
    let folded = ImageReader::open(&FileStorage, &out).unwrap();
    assert_eq!(folded.manifest().parent, None);
    assert_eq!(folded.layer_paths().count(), 0);
    // Beside the chain it becomes the newest image, and the chain may go.
    let committed = fold(&storage, &tip, chain.dir.path(), &options).unwrap();
    drop(tip);
    let garbage = collect_garbage(&FileStorage, chain.dir.path(), 1).unwrap();
    assert_eq!(garbage.removed.len(), 6);
    chain.memory.assert_in(&committed.path);
}

#[test]
fn garbage_is_what_is_old_and_neither_needed_nor_read() {
    let mut chain = Chain::new();
    let dir = chain.dir.path().to_owned();
    let all: Vec<_> = (0..PAGES).collect();
    chain.grow(&[1], 1, CarryOver::LEAST);
    // Needs none of the two before it.
    chain.grow(&all, 2, CarryOver::LEAST);
    chain.grow(&[3], 3, CarryOver::LEAST);
    let reader = ImageReader::open(&FileStorage, &chain.images[1].0).unwrap();
    let garbage = collect_garbage(&FileStorage, &dir, 1).unwrap();
    assert_eq!(garbage.removed, Vec::<PathBuf>::new());
    // The reader of the second reads the first as well.
    let old = [chain.images[0].0.clone(), chain.images[1].0.clone()];
    assert_eq!(garbage.in_use, old);
    assert_eq!(garbage.needed, [chain.images[2].0.clone()]);
    chain.assert_all();
    drop(reader);
    let garbage = collect_garbage(&FileStorage, &dir, 1).unwrap();
    assert_eq!(garbage.removed.len(), 2);
    assert!(garbage.freed_bytes > 0);
    assert_eq!(chain_images(&FileStorage, &dir).unwrap().len(), 2);
    chain.images.drain(..2);
    chain.assert_all();
}

#[test]
fn what_only_images_need_that_are_kept_for_others_is_garbage() {
    let mut chain = Chain::new();
    let dir = chain.dir.path().to_owned();
    let (low, high): (Vec<_>, Vec<_>) = (0..PAGES).partition(|page| *page < PAGES / 2);
    // Needs the upper half of the one before it, which the next one does not.
    chain.grow(&low, 1, CarryOver::LEAST);
    chain.grow(&high, 2, CarryOver::LEAST);
    let garbage = collect_garbage(&FileStorage, &dir, 1).unwrap();
    assert_eq!(garbage.removed, [chain.images[0].0.clone()]);
    assert_eq!(garbage.needed, [chain.images[1].0.clone()]);
    let missing = ImageReader::open(&FileStorage, &chain.images[1].0).unwrap_err();
    assert!(
        missing.to_string().contains("which cannot be used"),
        "{missing}"
    );
    chain.images.drain(..2);
    chain.assert_all();
}

#[test]
fn garbage_collection_beside_readers_and_writers_breaks_no_image() {
    let mut chain = Chain::new();
    let dir = chain.dir.path().to_owned();
    let carry = CarryOver {
        pages: PAGES.div_ceil(3),
        ..CarryOver::LEAST
    };
    let done = std::sync::atomic::AtomicBool::new(false);
    let done = &done;
    std::thread::scope(|scope| {
        let collect = || {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                collect_garbage(&FileStorage, &dir, 2).unwrap();
            }
        };
        let read = || {
            while !done.load(std::sync::atomic::Ordering::Relaxed) {
                // One that is being removed may be in use, or gone; what opens is whole.
                if let Ok(reader) = ImageReader::open(&FileStorage, &dir) {
                    reader.verify(1).unwrap();
                }
            }
        };
        let collector = scope.spawn(collect);
        let reader = scope.spawn(read);
        for number in 1..60 {
            chain.grow(&[u64::from(number)], number, carry);
        }
        done.store(true, std::sync::atomic::Ordering::Relaxed);
        collector.join().unwrap();
        reader.join().unwrap();
    });
    collect_garbage(&FileStorage, &dir, 2).unwrap();
    let left = chain_images(&FileStorage, &dir).unwrap();
    assert!(left.len() <= 2 + 4, "{left:?}");
    let kept = chain.images.split_off(chain.images.len() - 2);
    for (image, memory) in &kept {
        memory.assert_in(image);
    }
}
