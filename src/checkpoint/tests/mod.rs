//! The engine on a guest that races it.

mod captured_moment;
mod contract;
mod cost;
mod endings;
mod increments;
mod resources;
mod tracking;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::checkpoint::fake::{FakeGuest, TroubledStorage};
use crate::checkpoint::{CheckpointError, CheckpointOptions, Job, PauseHook, Report, start};
use crate::page::{Gfn, PAGE_BYTES, PageRun};
use crate::store::{FileStorage, ImageReader, ReadScratch};

/// A directory, storage in it, and a guest.
struct Bench {
    dir: tempfile::TempDir,
    storage: TroubledStorage,
    guest: Arc<FakeGuest>,
    /// Memory as it was in the pause.
    moment: Arc<Mutex<Option<Vec<u8>>>>,
    options: CheckpointOptions,
}

impl Bench {
    /// A guest of some megabytes in two regions, of no round size.
    fn new() -> Self {
        Self::with(FakeGuest::new(&[1500, 1000], 2))
    }

    fn with(guest: Arc<FakeGuest>) -> Self {
        let moment = Arc::new(Mutex::new(None));

        let (seen, of) = (moment.clone(), guest.clone());
        let hook: PauseHook = Arc::new(move |_| {
            *seen.lock().unwrap() = Some(of.snapshot());
        });
        let options = CheckpointOptions {
            durable: false,
            threads: Some(2),
            interval: Duration::from_millis(1),
            at_pause: Some(hook),
            ..CheckpointOptions::default()
        };
        Self {
            dir: tempfile::tempdir().unwrap(),
            storage: TroubledStorage::default(),
            guest,
            moment,
            options,
        }
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("guest.lpc")
    }

    fn start(&self) -> Job {
        self.try_start().unwrap()
    }

    fn try_start(&self) -> Result<Job, CheckpointError> {
        let storage = Arc::new(self.storage.clone());
        start(
            self.guest.clone(),
            storage,
            self.path(),
            self.options.clone(),
        )
    }

    fn checkpoint(&self) -> Report {
        self.start().wait().unwrap()
    }

    /// Names and contents of all files beside one another.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let paths = fs::read_dir(self.dir.path()).unwrap();
        let paths = paths.map(|entry| entry.unwrap().path());
        // A temporary file may go while we look.
        paths
            .filter_map(|path| fs::read(&path).ok().map(|bytes| (path, bytes)))
            .collect()
    }

    /// Fails where a page of the image is not what it was in the pause.
    fn assert_image_is_the_moment(&self) {
        let moment = self.moment.lock().unwrap().take().unwrap();
        let image = read_image(&self.path(), &self.guest);
        for (page, (captured, seen)) in pages_of(&image).zip(pages_of(&moment)).enumerate() {
            assert!(
                captured == seen,
                "page {page} is {:x?} in the image and was {:x?} in the pause",
                words_of(captured),
                words_of(seen)
            );
        }
        assert_eq!(image.len(), moment.len());
    }

    /// Fails unless a checkpoint that came to nothing left nothing behind but `before`.
    fn assert_nothing_is_left(&self, before: &BTreeMap<PathBuf, Vec<u8>>) {
        assert!(!self.guest.is_paused(), "the guest is paused");
        assert!(!self.guest.is_logging(), "the dirty log is on");
        use std::sync::atomic::Ordering::SeqCst;
        let pauses = self.guest.pauses.load(SeqCst);
        assert_eq!(
            pauses,
            self.guest.resumes.load(SeqCst),
            "pauses and resumes"
        );
        // What a stuck thread held goes when it wakes up.
        self.storage.unblock();
        let start = std::time::Instant::now();
        while self.files() != *before {
            let names: Vec<_> = self.files().into_keys().collect();
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "{names:?} is left"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn pages_of(memory: &[u8]) -> std::slice::ChunksExact<'_, u8> {
    memory.chunks_exact(PAGE_BYTES)
}

/// The first words of each store that makes a page.
fn words_of(page: &[u8]) -> Vec<u64> {
    let words = page.chunks_exact(PAGE_BYTES / 8);
    words
        .map(|part| u64::from_ne_bytes(part[..8].try_into().unwrap()))
        .collect()
}

/// Reads the memory that an image holds; every page must be in it once.
fn read_image(path: &Path, guest: &FakeGuest) -> Vec<u8> {
    let reader = ImageReader::open(&FileStorage, path).unwrap();
    let mut memory: Vec<Option<Vec<u8>>> = vec![None; guest.snapshot().len() / PAGE_BYTES];
    let mut put = |run: PageRun, bytes: Option<&[u8]>| {
        for number in 0..run.page_count {
            let at = usize::try_from(number).unwrap() * PAGE_BYTES;
            let page = bytes.map_or(vec![0; PAGE_BYTES], |bytes| {
                bytes[at..at + PAGE_BYTES].to_vec()
            });
            let index = guest.index_of(Gfn(run.start.0 + number));
            assert!(
                memory[index].replace(page).is_none(),
                "page {index} is there twice"
            );
        }
    };
    reader.zero_runs().for_each(|run| put(run, None));
    let mut scratch = ReadScratch::default();
    for chunk in 0..reader.chunk_count() {
        let raw = reader.read_chunk(chunk, &mut scratch).unwrap();
        reader
            .runs_of_chunk(chunk)
            .for_each(|run| put(run.run, Some(run.bytes_in(raw))));
    }
    memory
        .into_iter()
        .flat_map(|page| page.expect("every page is in the image"))
        .collect()
}
