//! Every image of a chain is the memory of its own moment, and needs no other than it names.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::{Bench, pages_of, read_image, words_of};
use crate::checkpoint::fake::{FakeGuest, Operation};
use crate::checkpoint::{Chain, Protocol, Report, start};
use crate::store::{FileStorage, ImageReader, Storage};

/// A guest whose images go to a directory, and what each of them must be.
struct Chained {
    bench: Bench,
    images: Vec<(PathBuf, Vec<u8>)>,
}

impl Chained {
    fn new(guest: Arc<FakeGuest>) -> Self {
        let mut bench = Bench::with(guest);
        bench.options.chain = Some(Chain::default());
        // What is looked at is not how long anything takes.
        bench.options.pause_limit = Duration::from_secs(30);
        Self {
            bench,
            images: Vec::new(),
        }
    }

    fn checkpoint(&mut self, protocol: Protocol) -> Report {
        self.bench.options.protocol = protocol;
        let storage: Arc<dyn Storage> = Arc::new(self.bench.storage.clone());
        let (guest, dir) = (self.bench.guest.clone(), self.bench.dir.path());
        let job = start(guest, storage, dir, self.bench.options.clone()).unwrap();
        let report = job
            .wait()
            .unwrap_or_else(|error| panic!("{protocol}: {error:?}"));
        let moment = self.bench.moment.lock().unwrap().take().unwrap();
        self.images.push((report.image.path.clone(), moment));
        report
    }

    fn assert_all_are_their_moments(&self) {
        for (path, moment) in &self.images {
            assert_is_moment(path, &self.bench.guest, moment);
        }
    }
}

fn assert_is_moment(path: &Path, guest: &FakeGuest, moment: &[u8]) {
    let image = read_image(path, guest);
    for (page, (got, want)) in pages_of(&image).zip(pages_of(moment)).enumerate() {
        let name = path.file_name().unwrap();
        let (got_words, want_words) = (words_of(got), words_of(want));
        assert!(
            got == want,
            "page {page} of {name:?} is {got_words:x?} and was {want_words:x?}"
        );
    }
    ImageReader::open(&FileStorage, path)
        .unwrap()
        .verify(2)
        .unwrap();
}

fn increment_of(report: &Report) -> &crate::checkpoint::IncrementStatistics {
    report.statistics.increment.as_ref().unwrap()
}

fn chain_races_the_guest(protocols: &[Protocol], images: usize, seed: u64) {
    let mut chained = Chained::new(FakeGuest::new(&[1500, 1000], 2));
    (0..2000).for_each(|page| chained.bench.guest.write_page(page, page + 1));
    let running = chained.bench.guest.run(2, seed);
    running.assert_progress();
    let mut parent = None;
    for (number, protocol) in protocols.iter().cycle().take(images).enumerate() {
        let report = chained.checkpoint(*protocol);
        let increment = increment_of(&report);
        assert_eq!(increment.parent, parent, "image {number}: {increment:?}");
        parent = Some(report.image.image_uuid);
        running.assert_progress();
    }
    drop(running);
    assert!(chained.bench.guest.is_logging());
    chained.assert_all_are_their_moments();
    drop(chained.bench.options.chain.take());
    assert!(!chained.bench.guest.is_logging(), "the chain ended");
}

#[test]
fn every_image_of_a_chain_is_its_moment_whatever_the_protocol() {
    for (seed, protocol) in (1..).zip(Protocol::CAPTURING) {
        chain_races_the_guest(&[protocol], 4, seed);
    }
}

#[test]
fn every_image_of_a_chain_of_all_protocols_is_its_moment() {
    use Protocol::{Cow, Precopy, Stop, Threaded};
    chain_races_the_guest(&[Cow, Stop, Threaded, Cow, Precopy], 7, 11);
    chain_races_the_guest(&[Threaded, Precopy, Cow, Stop], 5, 12);
}

#[test]
fn an_increment_of_cow_that_is_too_large_for_the_pause_is_its_moment() {
    for seed in 21..23 {
        let mut chained = Chained::new(FakeGuest::new(&[1500, 1000], 2));
        chained.bench.guest.fill();
        // Nothing fits: memory is protected.
        chained.bench.options.downtime_budget = Some(Duration::ZERO);
        let running = chained.bench.guest.run(2, seed);
        for _ in 0..3 {
            running.assert_progress();
            let report = chained.checkpoint(Protocol::Cow);
            assert_eq!(report.statistics.mechanism, "userfaultfd-wp");
        }
        drop(running);
        chained.assert_all_are_their_moments();
    }
}

#[test]
fn scattered_pages_of_an_increment_of_cow_are_copied_before_its_pause() {
    let mut chained = Chained::new(FakeGuest::new(&[1500, 1000], 2));
    chained.bench.guest.fill();
    // All pages fit in the pause, but not where each lies by itself.
    chained.bench.options.downtime_budget = Some(Duration::from_millis(2));
    chained.checkpoint(Protocol::Cow);
    for page in (0..2000).step_by(2) {
        chained.bench.guest.write_page(page, page + 3);
    }
    let report = chained.checkpoint(Protocol::Cow);
    assert_eq!(report.statistics.mechanism, "kvm-dirty-log");
    let pages: Vec<_> = report.statistics.rounds.iter().map(|it| it.pages).collect();
    // What is written while the state is saved is for the pause.
    let [ahead, last] = pages[..] else {
        panic!("{pages:?}");
    };
    assert!(ahead >= 1000 && last < 10, "{pages:?}");
    // One stretch is not worth a second copy.
    for page in 100..1100 {
        chained.bench.guest.write_page(page, page + 4);
    }
    let report = chained.checkpoint(Protocol::Cow);
    assert_eq!(report.statistics.rounds.len(), 1);
    for seed in 31..35 {
        let running = chained.bench.guest.run(2, seed);
        for _ in 0..3 {
            running.assert_progress();
            for page in (0..2000).step_by(3) {
                chained.bench.guest.write_page(page, seed);
            }
            chained.checkpoint(Protocol::Cow);
        }
        drop(running);
    }
    chained.assert_all_are_their_moments();
}

#[test]
fn an_increment_of_cow_holds_no_more_pages_than_its_staging() {
    let mut chained = Chained::new(FakeGuest::new(&[1500, 1000], 1));
    chained.bench.guest.fill();
    chained.checkpoint(Protocol::Cow);
    chained.bench.options.max_staging_bytes = Some(4 << 20);
    for (pages, mechanism) in [(500, "kvm-dirty-log"), (600, "userfaultfd-wp")] {
        for page in 0..pages {
            chained.bench.guest.write_page(page, page + pages);
        }
        let report = chained.checkpoint(Protocol::Cow);
        assert_eq!(report.statistics.mechanism, mechanism, "{pages} pages");
    }
    chained.assert_all_are_their_moments();
}

#[test]
fn an_increment_has_what_was_written_since_and_no_more() {
    for protocol in Protocol::CAPTURING {
        let mut chained = Chained::new(FakeGuest::new(&[1500, 1000], 1));
        chained.bench.guest.fill();
        let first = chained.checkpoint(protocol);
        assert!(increment_of(&first).whole_because.is_some());
        chained.bench.guest.write_page(7, 70);
        chained.bench.guest.device_write(1600, 71);
        chained.bench.guest.discard(2000, 3);
        let second = chained.checkpoint(protocol);
        // Page 0 is written while the state is saved, before and in this image.
        let reader = ImageReader::open(&FileStorage, &second.image.path).unwrap();
        let summary = reader.summary();
        assert_eq!(
            summary.data_pages - summary.inherited_pages,
            3,
            "{protocol}"
        );
        assert_eq!(summary.zero_pages, 3, "{protocol}");
        assert_eq!(summary.layers.len(), 1);
        assert!(second.image.image_bytes < first.image.image_bytes / 20);
        chained.assert_all_are_their_moments();
    }
}

#[test]
fn pages_touched_first_after_a_chain_began_are_in_its_next_image() {
    for protocol in Protocol::CAPTURING {
        let mut chained = Chained::new(FakeGuest::new(&[1500, 1000], 2));
        let running = chained.bench.guest.run(2, 5);
        running.assert_progress();
        for _ in 0..3 {
            chained.checkpoint(protocol);
        }
        drop(running);
        chained.assert_all_are_their_moments();
    }
}

#[test]
fn what_a_failed_increment_took_is_in_the_next_one() {
    for protocol in Protocol::CAPTURING {
        let mut chained = Chained::new(FakeGuest::new(&[1500, 1000], 2));
        chained.bench.guest.fill();
        chained.checkpoint(protocol);
        let running = chained.bench.guest.run(2, 9);
        for operation in [Operation::Write, Operation::Sync] {
            running.assert_progress();
            chained.bench.options.durable = true;
            chained.bench.storage.block(operation);
            let storage: Arc<dyn Storage> = Arc::new(chained.bench.storage.clone());
            let (guest, dir) = (chained.bench.guest.clone(), chained.bench.dir.path());
            let job = start(guest, storage, dir, chained.bench.options.clone()).unwrap();
            chained.bench.storage.wait_for_blocked();
            job.cancel();
            job.wait().unwrap_err();
            chained.bench.storage.unblock();
            chained.bench.options.durable = false;
            running.assert_progress();
            // Its part may be in the way until a stuck thread has gone.
            while fs::read_dir(chained.bench.dir.path())
                .unwrap()
                .any(|entry| {
                    entry
                        .unwrap()
                        .file_name()
                        .to_string_lossy()
                        .contains("part")
                })
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            chained.checkpoint(protocol);
        }
        drop(running);
        chained.assert_all_are_their_moments();
    }
}

#[test]
fn images_of_a_chain_with_a_span_need_no_more_than_so_many() {
    let mut chained = Chained::new(FakeGuest::new(&[1500, 1000], 1));
    chained.bench.guest.fill();
    chained.bench.options.span = Some(4);
    for number in 0..14_u64 {
        (0..50).for_each(|page| chained.bench.guest.write_page(page + 30 * number, number));
        chained.checkpoint(Protocol::Threaded);
    }
    chained.assert_all_are_their_moments();
    let all: Vec<_> = chained
        .images
        .iter()
        .map(|(path, _)| path.clone())
        .collect();
    for (number, path) in all.iter().enumerate() {
        let reader = ImageReader::open(&FileStorage, path).unwrap();
        let oldest = reader
            .layer_paths()
            .map(|layer| all.iter().position(|path| path == layer).unwrap());
        let oldest = oldest.min().unwrap_or(number);
        assert!(number - oldest <= 5, "image {number} needs image {oldest}");
    }
}

#[test]
fn an_image_in_another_directory_begins_a_chain_anew() {
    let mut chained = Chained::new(FakeGuest::new(&[1500], 1));
    chained.bench.guest.fill();
    chained.checkpoint(Protocol::Stop);
    let elsewhere = tempfile::tempdir().unwrap();
    let storage = Arc::new(FileStorage);
    let options = chained.bench.options.clone();
    let job = start(
        chained.bench.guest.clone(),
        storage,
        elsewhere.path(),
        options,
    )
    .unwrap();
    let report = job.wait().unwrap();
    let increment = increment_of(&report);
    assert_eq!(increment.parent, None);
    assert!(
        increment
            .whole_because
            .unwrap()
            .contains("another directory")
    );
    let moment = chained.bench.moment.lock().unwrap().take().unwrap();
    assert_is_moment(&report.image.path, &chained.bench.guest, &moment);
}
