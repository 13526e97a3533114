//! Images hold exactly what was captured last, whoever wrote it in whatever order.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails")]

mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Barrier};

use common::{SampleGuest, facts};
use livepoint::page::{Gfn, PAGE_BYTES, PIECE_PAGES, PageRun};
use livepoint::state::StateSection;
use livepoint::store::backend::forgetful::ForgetfulStorage;
use livepoint::store::{
    ChunkPages, ChunkScratch, Codec, FileStorage, ImageReader, ImageWriter, ReadScratch,
    RegionLayout, Storage, StoreError, WriteOptions, chain_images, remove_image,
};
use proptest::prelude::*;

const CODECS: [Codec; 3] = [Codec::None, Codec::Lz4, Codec::Zstd { level: 1 }];

fn region(slot: u32, start: u64, page_count: u64) -> RegionLayout {
    RegionLayout {
        slot,
        start: Gfn(start),
        page_count,
    }
}

fn memory_disk() -> Arc<ForgetfulStorage> {
    Arc::new(ForgetfulStorage::new(&[Path::new("/disk")]))
}

fn image_path() -> &'static Path {
    Path::new("/disk/vm.lpi")
}

fn create(
    storage: &Arc<ForgetfulStorage>,
    regions: &[RegionLayout],
    codec: Codec,
) -> Result<ImageWriter, StoreError> {
    let options = WriteOptions {
        codec,
        ..WriteOptions::default()
    };
    ImageWriter::create(storage.clone(), image_path(), regions, &options)
}

/// The page that copy `epoch` of frame `gfn` has; every third is zeros.
fn copy_of(gfn: u64, epoch: u32) -> Vec<u8> {
    let tag = gfn * 1000 + u64::from(epoch);
    if tag.is_multiple_of(3) {
        return vec![0; PAGE_BYTES];
    }
    tag.to_le_bytes().repeat(PAGE_BYTES / 8)
}

fn read_all(reader: &ImageReader) -> BTreeMap<u64, Vec<u8>> {
    let mut pages = BTreeMap::new();
    let mut scratch = ReadScratch::default();
    for chunk in 0..reader.chunk_count() {
        let raw = reader.read_chunk(chunk, &mut scratch).unwrap();
        for part in reader.runs_of_chunk(chunk) {
            for (gfn, page) in (part.run.start.0..).zip(part.bytes_in(raw).chunks(PAGE_BYTES)) {
                assert!(
                    pages.insert(gfn, page.to_vec()).is_none(),
                    "page {gfn} twice"
                );
            }
        }
    }
    for run in reader.zero_runs() {
        for gfn in run.start.0..run.end().0 {
            assert!(
                pages.insert(gfn, vec![0; PAGE_BYTES]).is_none(),
                "page {gfn} twice"
            );
        }
    }
    pages
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_copy_with_the_highest_epoch_is_read_back_whatever_the_order_and_the_threads(
        writes in prop::collection::vec(
            (0_u32..6, prop::collection::btree_set(0_u64..60, 1..30)), 1..20,
        ),
        codec in prop::sample::select(CODECS.to_vec()),
    ) {
        // Two regions that touch: a run must not cross from one to the other.
        let regions = [region(0, 0, 40), region(1, 40, 20)];
        let storage = memory_disk();
        let writer = create(&storage, &regions, codec).unwrap();
        writer.record_zero(0, PageRun { start: Gfn(0), page_count: 60 }).unwrap();
        let mut newest: BTreeMap<u64, u32> = BTreeMap::new();
        for (epoch, frames) in &writes {
            for gfn in frames {
                let entry = newest.entry(*gfn).or_default();
                *entry = (*entry).max(epoch + 1);
            }
        }
        std::thread::scope(|scope| {
            for half in 0..2 {
                let (writes, writer) = (&writes, &writer);
                scope.spawn(move || {
                    let mut scratch = ChunkScratch::default();
                    for (epoch, frames) in writes.iter().skip(half).step_by(2) {
                        let epoch = epoch + 1;
                        let data: Vec<u8> =
                            frames.iter().flat_map(|&gfn| copy_of(gfn, epoch)).collect();
                        let frames: Vec<Gfn> = frames.iter().copied().map(Gfn).collect();
                        let pages = ChunkPages { epoch, frames: &frames, data: &data };
                        writer.write_chunk(pages, &mut scratch).unwrap();
                    }
                });
            }
        });
        let committed = writer.commit(facts()).unwrap();
        let reader = ImageReader::open(storage.as_ref(), image_path()).unwrap();
        prop_assert_eq!(reader.image_bytes(), committed.image_bytes);
        prop_assert_eq!(reader.root_digest(), committed.root_digest);
        reader.verify(2).unwrap();
        let pages = read_all(&reader);
        prop_assert_eq!(pages.len(), 60);
        for (gfn, page) in pages {
            let expected = newest.get(&gfn)
                .map_or_else(|| vec![0; PAGE_BYTES], |&epoch| copy_of(gfn, epoch));
            prop_assert!(page == expected, "page {gfn}");
        }
    }
}

#[test]
fn frames_in_any_order_come_back_and_neighbours_share_a_run() {
    let storage = memory_disk();
    let writer = create(&storage, &[region(0, 0, 512)], Codec::None).unwrap();
    let frames: Vec<Gfn> = (0..256).rev().chain(256..512).map(Gfn).collect();
    let data: Vec<u8> = frames
        .iter()
        .flat_map(|gfn| (gfn.0 + 1).to_le_bytes().repeat(PAGE_BYTES / 8))
        .collect();
    let pages = ChunkPages {
        epoch: 0,
        frames: &frames,
        data: &data,
    };
    let stats = writer
        .write_chunk(pages, &mut ChunkScratch::default())
        .unwrap();
    assert_eq!(stats.stored_bytes, PIECE_PAGES * PAGE_BYTES as u64);
    writer.commit(facts()).unwrap();
    let reader = ImageReader::open(storage.as_ref(), image_path()).unwrap();
    assert_eq!(reader.runs_of_chunk(0).count(), 257);
    for (gfn, page) in read_all(&reader) {
        assert_eq!(page[..8], (gfn + 1).to_le_bytes());
    }
}

#[test]
fn pages_of_zeros_cost_no_data() {
    let storage = memory_disk();
    let writer = create(&storage, &[region(0, 0, 512)], Codec::None).unwrap();
    let frames: Vec<Gfn> = (0..512).map(Gfn).collect();
    let data = vec![0; 512 * PAGE_BYTES];
    let pages = ChunkPages {
        epoch: 0,
        frames: &frames,
        data: &data,
    };
    let stats = writer
        .write_chunk(pages, &mut ChunkScratch::default())
        .unwrap();
    assert_eq!((stats.zero_pages, stats.stored_bytes), (512, 0));
    let committed = writer.commit(facts()).unwrap();
    assert!(committed.image_bytes < 16384, "{committed:?}");
    let reader = ImageReader::open(storage.as_ref(), image_path()).unwrap();
    assert_eq!(reader.chunk_count(), 0);
    assert_eq!(reader.zero_runs().count(), 1);
    assert_eq!(reader.summary().zero_pages, 512);
}

#[test]
fn a_page_that_was_never_given_fails_the_commit_by_its_number() {
    let storage = memory_disk();
    let writer = create(&storage, &[region(0, 0x10, 8)], Codec::None).unwrap();
    let run = PageRun {
        start: Gfn(0x10),
        page_count: 5,
    };
    writer.record_zero(0, run).unwrap();
    let error = writer.commit(facts()).unwrap_err();
    assert!(
        matches!(
            error,
            StoreError::Uncovered {
                gfn: Gfn(0x15),
                others: 2
            }
        ),
        "{error}"
    );
    assert_eq!(storage.list(Path::new("/disk")).unwrap().len(), 0);
}

#[test]
fn pages_outside_memory_are_refused() {
    let storage = memory_disk();
    let writer = create(&storage, &[region(0, 8, 8), region(1, 32, 8)], Codec::None).unwrap();
    for gfn in [0, 7, 16, 31, 40, u64::MAX] {
        let pages = ChunkPages {
            epoch: 0,
            frames: &[Gfn(gfn)],
            data: &[1; PAGE_BYTES],
        };
        let error = writer.write_chunk(pages, &mut ChunkScratch::default());
        assert!(matches!(error, Err(StoreError::OutsideRegions { gfn: found }) if found.0 == gfn));
    }
    let run = PageRun {
        start: Gfn(8),
        page_count: 9,
    };
    assert!(writer.record_zero(0, run).is_err());
}

#[test]
fn layouts_and_sections_that_no_reader_would_take_are_refused() {
    let storage = memory_disk();
    let layouts: [&[RegionLayout]; 6] = [
        &[],
        &[region(0, 0, 0)],
        &[region(0, 0, 8), region(1, 7, 8)],
        &[region(0, 8, 8), region(1, 0, 8)],
        &[region(0, 0, 8), region(0, 8, 8)],
        &[region(0, u64::MAX - 2, 8)],
    ];
    for layout in layouts {
        let error = create(&storage, layout, Codec::None).unwrap_err();
        assert!(matches!(error, StoreError::Unwritable { .. }), "{layout:?}");
    }
    let writer = create(&storage, &[region(0, 0, 8)], Codec::None).unwrap();
    let section = |kind: &str, bytes| StateSection {
        kind: kind.to_owned(),
        instance: 0,
        version: 1,
        payload: vec![0; bytes],
    };
    writer.add_section(section("vcpu", 10)).unwrap();
    for refused in [
        section("vcpu", 10),
        section("", 10),
        section(&"k".repeat(65), 10),
        section("big", (16 << 20) + 1),
    ] {
        writer.add_section(refused).unwrap_err();
    }
}

#[test]
fn what_does_not_shrink_is_stored_as_it_is_and_the_rest_compressed() {
    let guest = SampleGuest::new(11);
    for codec in CODECS {
        let storage = memory_disk();
        let writer = create(&storage, &guest.regions(), codec).unwrap();
        guest.write_to(&writer).unwrap();
        writer.commit(facts()).unwrap();
        let reader = ImageReader::open(storage.as_ref(), image_path()).unwrap();
        guest.assert_equals(&reader);
        let counts = reader.summary().chunks;
        let compressed = counts.lz4 + counts.zstd;
        assert_eq!(compressed > 0, codec != Codec::None, "{counts:?}");
    }
}

#[test]
fn digests_made_at_commit_are_those_made_at_once() {
    let guest = SampleGuest::new(14);
    for codec in CODECS {
        let tables: Vec<_> = [false, true]
            .into_iter()
            .map(|guest_waits| {
                let storage = memory_disk();
                let options = WriteOptions {
                    codec,
                    guest_waits,
                    ..WriteOptions::default()
                };
                let shared = storage.clone();
                let writer =
                    ImageWriter::create(shared, image_path(), &guest.regions(), &options).unwrap();
                guest.write_to(&writer).unwrap();
                writer.commit(facts()).unwrap();
                let reader = ImageReader::open(storage.as_ref(), image_path()).unwrap();
                reader.verify(2).unwrap();
                guest.assert_equals(&reader);
                serde_json::to_value(reader.manifest()).unwrap()["chunk_table"].clone()
            })
            .collect();
        assert_eq!(tables[0], tables[1], "{codec}");
    }
}

#[test]
fn bytes_that_change_in_the_file_before_their_digest_is_made_fail_the_commit() {
    use std::os::unix::fs::FileExt;
    let dir = tempfile::tempdir().unwrap();
    let guest = SampleGuest::new(15);
    let options = WriteOptions {
        guest_waits: true,
        ..WriteOptions::default()
    };
    let path = dir.path().join("vm.lpi");
    let shared = Arc::new(FileStorage);
    let writer = ImageWriter::create(shared, &path, &guest.regions(), &options).unwrap();
    guest.write_to(&writer).unwrap();
    let part = std::fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join(".file-vm.lpi.lpi-part"))
        .unwrap();
    part.write_all_at(b"?", 4096).unwrap();
    let error = writer.commit(facts()).unwrap_err();
    assert!(error.to_string().contains("chunk 0 reads back"), "{error}");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn a_committed_image_keeps_no_reserved_room() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let path = write_file(dir.path(), 1).unwrap();
    let metadata = std::fs::metadata(path).unwrap();
    let taken = metadata.blocks() * 512;
    assert!(
        taken <= metadata.len() + (64 << 10),
        "{taken} bytes are taken"
    );
}

#[test]
fn an_aborted_or_dropped_image_leaves_nothing_and_what_was_there_stays() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.lpi");
    let guest = SampleGuest::new(12);
    let begin = || {
        let storage = Arc::new(FileStorage);
        let options = WriteOptions::default();
        ImageWriter::create(storage, &path, &guest.regions(), &options).unwrap()
    };
    begin().abort();
    drop(begin());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    let writer = begin();
    guest.write_to(&writer).unwrap();
    writer.commit(facts()).unwrap();
    let writer = begin();
    SampleGuest::new(13).write_to(&writer).unwrap();
    drop(writer);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    let reader = ImageReader::open(&FileStorage, &path).unwrap();
    guest.assert_equals(&reader);
}

fn write_file(path: &Path, seed: u64) -> Result<std::path::PathBuf, StoreError> {
    let guest = SampleGuest::new(seed);
    let storage = Arc::new(FileStorage);
    let options = WriteOptions::default();
    let writer = ImageWriter::create(storage, path, &guest.regions(), &options)?;
    guest.write_to(&writer)?;
    Ok(writer.commit(facts())?.path)
}

#[test]
fn an_image_that_is_read_is_neither_replaced_nor_removed_and_the_reader_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.lpi");
    write_file(&path, 1).unwrap();
    let reader = ImageReader::open(&FileStorage, &path).unwrap();
    let own_pid = std::process::id().to_string();
    for error in [
        write_file(&path, 2).unwrap_err(),
        remove_image(&FileStorage, &path).unwrap_err(),
    ] {
        assert!(matches!(error, StoreError::InUse { .. }), "{error}");
        assert!(error.to_string().contains(&own_pid), "{error}");
    }
    // Readers share.
    ImageReader::open(&FileStorage, &path).unwrap();
    SampleGuest::new(1).assert_equals(&reader);
    drop(reader);
    write_file(&path, 2).unwrap();
    SampleGuest::new(2).assert_equals(&ImageReader::open(&FileStorage, &path).unwrap());
    remove_image(&FileStorage, &path).unwrap();
    assert!(!path.exists());
}

#[test]
fn an_image_about_to_be_replaced_is_not_opened_and_has_one_writer() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vm.lpi");
    let guest = SampleGuest::new(1);
    let begin = |path: &Path| {
        let options = WriteOptions::default();
        ImageWriter::create(Arc::new(FileStorage), path, &guest.regions(), &options)
    };
    let first = begin(&path).unwrap();
    assert!(matches!(begin(&path), Err(StoreError::InUse { .. })));
    let chain = begin(dir.path()).unwrap();
    assert!(matches!(begin(dir.path()), Err(StoreError::InUse { .. })));
    drop((first, chain));
    write_file(&path, 1).unwrap();
    let replacing = begin(&path).unwrap();
    let error = ImageReader::open(&FileStorage, &path).unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error}");
    drop(replacing);
    ImageReader::open(&FileStorage, &path).unwrap();
}

#[test]
fn nothing_but_an_image_or_an_empty_file_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notes.txt");
    std::fs::write(&path, "do not lose me").unwrap();
    let error = write_file(&path, 1).unwrap_err();
    assert!(
        matches!(error, StoreError::NotReplaceable { .. }),
        "{error}"
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "do not lose me");
    let error = write_file(Path::new("/dev/null"), 1).unwrap_err();
    assert!(
        matches!(error, StoreError::NotReplaceable { .. }),
        "{error}"
    );
    let reserved = dir.path().join("reserved.lpi");
    std::fs::write(&reserved, "").unwrap();
    write_file(&reserved, 1).unwrap();
    SampleGuest::new(1).assert_equals(&ImageReader::open(&FileStorage, &reserved).unwrap());
}

#[test]
fn a_directory_is_a_chain_and_opens_as_its_newest_image() {
    let dir = tempfile::tempdir().unwrap();
    let error = ImageReader::open(&FileStorage, dir.path()).unwrap_err();
    assert!(matches!(error, StoreError::EmptyChain { .. }), "{error}");
    for seed in 1..=3 {
        write_file(dir.path(), seed).unwrap();
        let newest = ImageReader::open(&FileStorage, dir.path()).unwrap();
        SampleGuest::new(seed).assert_equals(&newest);
    }
    let images = chain_images(&FileStorage, dir.path()).unwrap();
    let numbers: Vec<u64> = images.iter().map(|image| image.sequence).collect();
    assert_eq!(numbers, [1, 2, 3]);
    let oldest = ImageReader::open(&FileStorage, &images[0].path).unwrap();
    SampleGuest::new(1).assert_equals(&oldest);
}

#[test]
fn what_a_dead_writer_left_is_removed_by_the_next_one_and_a_live_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let stale = dir.path().join(".file-gone.lpi.lpi-part");
    std::fs::write(&stale, "left over").unwrap();
    let guest = SampleGuest::new(1);
    let live = ImageWriter::create(
        Arc::new(FileStorage),
        &dir.path().join("other.lpi"),
        &guest.regions(),
        &WriteOptions::default(),
    )
    .unwrap();
    assert!(!stale.exists());
    guest.write_to(&live).unwrap();
    std::fs::write(dir.path().join(".file-vm.lpi.lpi-part"), "left over").unwrap();
    let path = write_file(&dir.path().join("vm.lpi"), 2).unwrap();
    let other = live.commit(facts()).unwrap();
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    SampleGuest::new(2).assert_equals(&ImageReader::open(&FileStorage, &path).unwrap());
    guest.assert_equals(&ImageReader::open(&FileStorage, &other.path).unwrap());
}

#[test]
fn only_its_owner_may_read_an_image() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = write_file(dir.path(), 1).unwrap();
    let mode = std::fs::metadata(path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn readers_that_race_a_writer_see_whole_images_only() {
    let dir = tempfile::tempdir().unwrap();
    let first = write_file(dir.path(), 1).unwrap();
    assert!(first.exists());
    let barrier = Barrier::new(2);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            barrier.wait();
            for seed in 2..=12 {
                write_file(dir.path(), seed).unwrap();
            }
        });
        barrier.wait();
        let mut newest = 0;
        while newest < 12 {
            match ImageReader::open(&FileStorage, dir.path()) {
                Ok(reader) => {
                    reader.verify(1).unwrap();
                    let images = chain_images(&FileStorage, dir.path()).unwrap();
                    let of_reader = images.iter().find(|image| image.path == reader.path());
                    let sequence = of_reader.unwrap().sequence;
                    SampleGuest::new(sequence).assert_equals(&reader);
                    assert!(sequence >= newest, "the newest image never goes back");
                    newest = sequence;
                }
                // The writer still holds the image that it has just committed.
                Err(StoreError::InUse { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
    });
}

#[test]
fn the_manifest_is_json_at_the_end_of_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = write_file(dir.path(), 1).unwrap();
    let bytes = std::fs::read(path).unwrap();
    let field = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let offset = usize::try_from(field(64)).unwrap();
    let manifest: serde_json::Value = serde_json::from_slice(&bytes[offset..]).unwrap();
    assert_eq!(manifest["guest"]["name"], "sample");
    assert_eq!(manifest["format"]["minor"], 2);
    assert_eq!(manifest["sections"][0]["kind"], "sample");
    assert_eq!(manifest["statistics"]["downtime_us"], 1234);
    assert_eq!(manifest["parent"], serde_json::Value::Null);
}

#[test]
fn an_image_written_over_a_spare_file_is_whole_and_the_spare_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let (path, spare) = (dir.path().join("image.lpi"), dir.path().join("old"));
    for spare_bytes in [0, 100, 20 << 20] {
        std::fs::write(&spare, vec![0xee_u8; spare_bytes]).unwrap();
        let options = WriteOptions {
            spare: Some(spare.clone()),
            ..WriteOptions::default()
        };
        let storage: Arc<dyn Storage> = Arc::new(FileStorage);
        let regions = [RegionLayout {
            slot: 0,
            start: Gfn(0),
            page_count: 600,
        }];
        let writer = ImageWriter::create(storage, &path, &regions, &options).unwrap();
        assert!(!spare.exists());
        writer
            .record_zero(
                0,
                PageRun {
                    start: Gfn(0),
                    page_count: 600,
                },
            )
            .unwrap();
        let frames = [Gfn(7)];
        let pages = ChunkPages {
            epoch: 1,
            frames: &frames,
            data: &[5; PAGE_BYTES],
        };
        writer
            .write_chunk(pages, &mut ChunkScratch::default())
            .unwrap();
        let image = writer.commit(facts()).unwrap();
        let length = std::fs::metadata(&path).unwrap().len();
        assert_eq!(length, image.image_bytes);
        ImageReader::open(&FileStorage, &path)
            .unwrap()
            .verify(1)
            .unwrap();
    }
    let names = std::fs::read_dir(dir.path()).unwrap().count();
    assert_eq!(names, 1);
}

#[test]
fn a_spare_file_that_somebody_reads_or_that_is_elsewhere_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.lpi");
    let create = |spare: &std::path::Path| {
        let options = WriteOptions {
            spare: Some(spare.to_owned()),
            ..WriteOptions::default()
        };
        let regions = [RegionLayout {
            slot: 0,
            start: Gfn(0),
            page_count: 1,
        }];
        ImageWriter::create(Arc::new(FileStorage), &path, &regions, &options)
    };
    let spare = dir.path().join("spare");
    std::fs::write(&spare, "kept").unwrap();
    let reader = FileStorage.open(&spare).unwrap();
    assert!(reader.try_lock(livepoint::store::LockKind::Shared).unwrap());
    assert!(matches!(create(&spare), Err(StoreError::InUse { .. })));
    drop(reader);
    let other = tempfile::tempdir().unwrap();
    let elsewhere = other.path().join("spare");
    std::fs::write(&elsewhere, "kept").unwrap();
    assert!(create(&elsewhere).is_err());
    for file in [&spare, &elsewhere] {
        assert_eq!(std::fs::read_to_string(file).unwrap(), "kept");
    }
    // One that is not there is no error.
    create(&dir.path().join("none")).unwrap();
}
