//! A lazy restore gives the guest what an eager one does, and nothing that a digest does not cover.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod common;

use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use common::gated::{Gate, GatedStorage};
use common::machines::{checkpoint_and_compare, pagewriter_spec};
use common::memory::assert_same_memory;
use common::{Random, have_kvm, long, wait_line};
use livepoint::checkpoint::{Chain, Protocol};
use livepoint::guest::{Backing, Guest, MemoryFill as _, MemoryRegion};
use livepoint::machine::Machine;
use livepoint::machine::spec::MachineSpec;
use livepoint::page::{Gfn, PAGE_BYTES, PIECE_BYTES};
use livepoint::restore::eager;
use livepoint::restore::lazy::{LazyFill, wait_for};
use livepoint::store::{
    ChunkPages, ChunkScratch, FileStorage, ImageReader, ImageWriter, RegionLayout, WriteOptions,
};
use livepoint::sys::anon::map_anonymous;
use livepoint::sys::pagemap::PagemapReader;

const PATIENCE: Duration = Duration::from_secs(60);

/// Pieces of the image's memory; the last is short.
const PIECES: usize = 6;
const PAGES: u64 = 5 * 512 + 100;

fn regions() -> Vec<MemoryRegion> {
    vec![MemoryRegion {
        slot: 0,
        start: Gfn(0),
        page_count: PAGES,
        mapping: map_anonymous(usize::try_from(PAGES).unwrap() * PAGE_BYTES, true).unwrap(),
        backing: Backing::Anonymous { huge: true },
    }]
}

fn write_pages(writer: &ImageWriter, pages: &[u64], seed: u64, epoch: u32) {
    let mut scratch = ChunkScratch::default();
    for part in pages.chunks(512) {
        let frames: Vec<_> = part.iter().map(|&page| Gfn(page)).collect();
        let data: Vec<u8> = part
            .iter()
            .flat_map(|page| {
                let mut noise = Random::new(seed + page);
                (0..PAGE_BYTES / 8).flat_map(move |_| noise.next().to_le_bytes())
            })
            .collect();
        let pages = ChunkPages {
            epoch,
            frames: &frames,
            data: &data,
        };
        writer.write_chunk(pages, &mut scratch).unwrap();
    }
}

/// Begins an image of all pages.
fn begin(path: &Path) -> ImageWriter {
    let layout = [RegionLayout {
        slot: 0,
        start: Gfn(0),
        page_count: PAGES,
    }];
    let options = WriteOptions {
        durable: false,
        ..WriteOptions::default()
    };
    ImageWriter::create(Arc::new(FileStorage), path, &layout, &options).unwrap()
}

/// Writes an image whose pieces are: full, zeros, half of each, full; and one on top of it with
/// pages scattered over all of them.
fn write_chain(dir: &Path) -> Arc<ImageReader> {
    let writer = begin(dir);
    let with_data = |page: &u64| page / 512 != 1 && (page / 512 != 2 || page.is_multiple_of(2));
    let (data, zeros): (Vec<u64>, Vec<u64>) = (0..PAGES).partition(with_data);
    write_pages(&writer, &data, 100, 0);
    for page in zeros {
        let run = livepoint::page::PageRun {
            start: Gfn(page),
            page_count: 1,
        };
        writer.record_zero(0, run).unwrap();
    }
    let base = writer.commit(common::facts()).unwrap();
    let mut writer = begin(dir);
    let base = ImageReader::open(&FileStorage, &base.path).unwrap();
    writer.inherit(Arc::new(base)).unwrap();
    let scattered: Vec<_> = (0..PAGES)
        .filter(|page| page % 37 == 5 && page / 512 != 1)
        .collect();
    write_pages(&writer, &scattered, 9_000_000, 0);
    let tip = writer.commit(common::facts()).unwrap();
    Arc::new(ImageReader::open(&FileStorage, &tip.path).unwrap())
}

#[test]
fn memory_that_comes_as_it_is_touched_is_that_of_an_eager_restore() {
    let dir = tempfile::tempdir().unwrap();
    let image = write_chain(dir.path());
    let eager_memory = regions();
    eager::fill(&image, &eager_memory, &eager::FillOptions::default()).unwrap();
    for turn in 0..5 {
        let memory = regions();
        let fill = LazyFill::start(image.clone(), &memory).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..2 {
                let (memory, eager_memory) = (&memory, &eager_memory);
                scope.spawn(move || {
                    let mut random = Random::new(turn * 10 + thread);
                    let (mut got, mut want) = ([0; 64], [0; 64]);
                    for _ in 0..300 {
                        let page = usize::try_from(random.below(PAGES)).unwrap();
                        memory[0].mapping.copy_out(page * PAGE_BYTES + 64, &mut got);
                        eager_memory[0]
                            .mapping
                            .copy_out(page * PAGE_BYTES + 64, &mut want);
                        assert_eq!(got, want, "page {page}");
                    }
                });
            }
        });
        wait_for(&fill);
        assert!(fill.is_complete());
        let progress = fill.progress();
        assert_eq!(progress.pieces, PIECES as u64 - 1, "one piece has no data");
        assert_eq!(progress.filled_pieces, progress.pieces);
        assert_same_memory(&memory, &eager_memory);
    }
}

/// Returns the pieces of which something is there.
fn pieces_there(memory: &[MemoryRegion]) -> Vec<usize> {
    let pages = usize::try_from(PAGES).unwrap();
    let mut missing = vec![0; pages.div_ceil(64)];
    let page_map = PagemapReader::open().unwrap();
    let hva = memory[0].mapping.hva();
    page_map.untouched(hva, pages, &mut missing).unwrap();
    let there = |page: &usize| missing[page / 64] & 1 << (page % 64) == 0;
    let mut pieces: Vec<_> = (0..pages).filter(there).map(|page| page / 512).collect();
    pieces.dedup();
    pieces
}

#[test]
fn what_the_guest_wrote_last_comes_first() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image.lpi");
    let writer = begin(&path);
    // Each piece is a chunk, in this order; two were written again later.
    let epochs = [0, 5, 0, 2, 0, 0];
    for (piece, epoch) in (0_u64..).zip(epochs) {
        let pages: Vec<_> = (piece * 512..PAGES.min((piece + 1) * 512)).collect();
        write_pages(&writer, &pages, piece, epoch);
    }
    writer.commit(common::facts()).unwrap();
    let order = [1, 3, 0, 2, 4, 5];
    for count in 1..order.len() {
        let gate = Arc::new(Gate::default());
        let image = ImageReader::open(&GatedStorage(gate.clone()), &path).unwrap();
        gate.close_after((count * PIECE_BYTES) as u64);
        let memory = regions();
        let fill = LazyFill::start(Arc::new(image), &memory).unwrap();
        let began = Instant::now();
        while fill.progress().filled_pieces < count as u64 {
            assert!(began.elapsed() < PATIENCE, "{:?}", fill.progress());
            std::thread::sleep(Duration::from_millis(1));
        }
        let mut expected = order[..count].to_vec();
        expected.sort_unstable();
        assert_eq!(pieces_there(&memory), expected);
        assert_eq!(fill.progress().working_set_pieces, 2);
        gate.open();
        wait_for(&fill);
        assert!(fill.is_complete());
    }
}

#[test]
fn a_flipped_bit_in_any_chunk_is_named_and_no_byte_of_its_pages_comes() {
    let dir = tempfile::tempdir().unwrap();
    let image = write_chain(dir.path());
    let layer = image.layer_paths().next().unwrap().to_owned();
    let tip = image.path().to_owned();
    let (chunks, own) = (image.chunk_count(), image.own_chunk_count());
    drop(image);
    let mut random = Random::new(88);
    for chunk in 0..chunks {
        let (file, number) = if chunk < own {
            (&tip, chunk)
        } else {
            (&layer, chunk - own)
        };
        let image = Arc::new(ImageReader::open(&FileStorage, &tip).unwrap());
        let part = image.runs_of_chunk(chunk).next().unwrap();
        // All but the last have 512 pages, as they are.
        let start = 4096 + number as u64 * PIECE_BYTES as u64;
        let offset = start + part.first_page as u64 * 4096 + random.below(4096);
        let changed = std::fs::File::options()
            .write(true)
            .read(true)
            .open(file)
            .unwrap();
        let mut byte = [0];
        changed.read_exact_at(&mut byte, offset).unwrap();
        changed
            .write_all_at(&[byte[0] ^ 1 << random.below(8)], offset)
            .unwrap();
        let memory = regions();
        let fill = LazyFill::start(image, &memory).unwrap();
        let (told, failure) = mpsc::channel();
        fill.on_failure(Box::new(move |error| told.send(error.to_string()).unwrap()));
        let page = usize::try_from(part.run.start.0).unwrap();
        std::thread::scope(|scope| {
            let mapping = &memory[0].mapping;
            let reader = scope.spawn(move || {
                let mut bytes = [1; 64];
                mapping.copy_out(page * PAGE_BYTES, &mut bytes);
                bytes
            });
            let error = failure.recv_timeout(PATIENCE).unwrap();
            assert!(error.contains(&format!("chunk {number}")), "{error}");
            let name = file.file_name().unwrap().to_str().unwrap();
            assert!(error.contains(name), "{error}");
            fill.give_up();
            // It waited until the memory was given up, and has read nothing of the image.
            assert_eq!(reader.join().unwrap(), [0; 64], "chunk {chunk}");
        });
        drop(fill);
        changed.write_all_at(&byte, offset).unwrap();
    }
    println!("{chunks} chunks");
}

#[test]
fn a_damaged_chunk_is_named_and_no_byte_of_its_piece_comes() {
    let dir = tempfile::tempdir().unwrap();
    let image = write_chain(dir.path());
    let base = image.layer_paths().next().unwrap().to_owned();
    // In the second chunk of the base: pieces 2 and 3 are of it.
    let file = std::fs::File::options()
        .write(true)
        .read(true)
        .open(&base)
        .unwrap();
    let offset = 4096 + PIECE_BYTES as u64 + 8 * 4096 + 17;
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    let memory = regions();
    let fill = LazyFill::start(image, &memory).unwrap();
    let (told, failure) = mpsc::channel();
    fill.on_failure(Box::new(move |error| told.send(error.to_string()).unwrap()));
    let (read, answer) = mpsc::channel();
    std::thread::scope(|scope| {
        let mapping = &memory[0].mapping;
        scope.spawn(move || {
            let mut bytes = [1; 16];
            mapping.copy_out(2 * PIECE_BYTES, &mut bytes);
            read.send(bytes).unwrap();
        });
        let error = failure.recv_timeout(PATIENCE).unwrap();
        assert!(error.contains("chunk 1"), "{error}");
        assert!(
            error.contains(base.file_name().unwrap().to_str().unwrap()),
            "{error}"
        );
        let early = answer.recv_timeout(Duration::from_millis(200));
        assert!(early.is_err(), "{early:?}");
        assert!(!fill.wait(Duration::ZERO));
        // Once the guest is stopped its memory is given up, and whoever waits goes on.
        fill.give_up();
        assert_eq!(answer.recv_timeout(PATIENCE).unwrap(), [0; 16]);
    });
}

const GUEST_BYTES: u64 = 64 << 20;

fn spec(console: &Path) -> MachineSpec {
    pagewriter_spec(GUEST_BYTES, 1, "2m", 10, console)
}

/// How much of the fill is there when the checkpoint is asked for, in percent.
const FILLED: [u64; 3] = [10, 50, 90];

#[test]
fn checkpoints_while_memory_still_comes_are_exactly_the_memory_of_their_pause() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let console = dir.path().join("console");
    let machine = Arc::new(Machine::build(spec(&console)).unwrap());
    machine.start(false).unwrap();
    wait_line(&console, Duration::from_secs(120), |line| {
        line.starts_with("pagewriter: ready")
    });
    let images = dir.path().join("images");
    std::fs::create_dir(&images).unwrap();
    let base = checkpoint_and_compare(&machine, None, Protocol::Stop, &images).image;
    machine.destroy();
    let mut turn = 0;
    for protocol in Protocol::CAPTURING {
        for tracked in [false, true] {
            turn += 1;
            for (number, percent) in FILLED.into_iter().enumerate() {
                if long() || number == turn % FILLED.len() {
                    let (base, dir) = (&base.path, &images);
                    check_while_filling(base, dir, &console, protocol, tracked, percent);
                }
            }
        }
    }
}

/// Takes a checkpoint when `percent` of an image's bytes were read by a lazy restore of it.
fn check_while_filling(
    base: &Path,
    images: &Path,
    console: &Path,
    protocol: Protocol,
    tracked: bool,
    percent: u64,
) {
    let gate = Arc::new(Gate::default());
    let image = ImageReader::open(&GatedStorage(gate.clone()), base).unwrap();
    let image = Arc::new(image);
    let unfilled = Machine::build_for_restore(spec(console)).unwrap();
    let state = image.sections().unwrap();
    let fill = LazyFill::start(image.clone(), unfilled.regions()).unwrap();
    // KVM and the devices touch memory when they take the state.
    let machine = if tracked {
        unfilled.finish_tracked(state).unwrap()
    } else {
        unfilled.finish(state).unwrap()
    };
    let machine = Arc::new(machine);
    let read_already = fill.progress().filled_pieces * PIECE_BYTES as u64;
    let wanted = (image.image_bytes() * percent / 100).saturating_sub(read_already);
    gate.close_after(wanted.max(1));
    machine.set_filling(fill.clone());
    let chain = Chain::default();
    if tracked {
        let guest: Arc<dyn Guest> = machine.clone();
        chain.adopt(&guest, image.clone());
    }
    machine.start(false).unwrap();
    let began = Instant::now();
    // It may have come to its end where the gate was closed late.
    while !gate.is_used() && !fill.is_complete() {
        assert!(began.elapsed() < PATIENCE, "{:?}", fill.progress());
        std::thread::sleep(Duration::from_millis(1));
    }
    let before = fill.progress();
    println!("{protocol}, tracked {tracked}, {percent} %: {before:?}");
    let opens = gate.clone();
    let opener = std::thread::spawn(move || {
        // Long after the checkpoint has begun, which may wait for it.
        std::thread::sleep(Duration::from_millis(50));
        opens.open();
    });
    let report = checkpoint_and_compare(&machine, tracked.then_some(&chain), protocol, images);
    opener.join().unwrap();
    let increment = report.statistics.increment.as_ref();
    let parent = increment.and_then(|increment| increment.parent);
    assert_eq!(parent, tracked.then_some(image.image_uuid()));
    machine.destroy();
}
