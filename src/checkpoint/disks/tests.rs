//! Disks that cannot be read, and disks that can be frozen.

use super::*;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::store::{FileStorage, RegionLayout, WriteOptions};

const BYTES: u64 = 8 * PIECE_BYTES as u64;

/// A disk that cannot be read; counts what it was asked for.
#[derive(Debug, Default)]
struct Unreadable(AtomicU64);

impl GuestDisk for Unreadable {
    fn facts(&self) -> DiskFacts {
        DiskFacts {
            name: "vda".to_owned(),
            path: "/x".into(),
            bytes: BYTES,
            read_only: false,
            modified_ns: 0,
        }
    }
    fn read_at(&self, _out: &mut [u8], _offset: u64) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Err(io::ErrorKind::Interrupted.into())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(offset..BYTES))
    }
    fn set_write_observer(&self, _observer: Option<Arc<dyn WriteObserver>>) {}
}

/// What a test needs to copy disks.
struct Rig {
    /// Where the image is.
    _dir: tempfile::TempDir,
    image: Arc<ImageWriter>,
    control: Arc<Control>,
    crew: Crew,
}

impl Rig {
    fn new(disks: &[Arc<dyn GuestDisk>]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let region = RegionLayout {
            slot: 0,
            start: Gfn(0),
            page_count: 1,
        };
        let options = WriteOptions {
            disks: describe(disks).0,
            ..WriteOptions::default()
        };
        let path = dir.path().join("image.lpi");
        let image = ImageWriter::create(Arc::new(FileStorage), &path, &[region], &options);
        let control = Arc::new(Control::new());
        Self {
            _dir: dir,
            image: Arc::new(image.unwrap()),
            crew: Crew::new(control.clone(), Arc::default()),
            control,
        }
    }

    fn copies(&mut self, disks: Vec<Arc<dyn GuestDisk>>) -> DiskCopies {
        DiskCopies::new(disks, &self.image, &self.control, &mut self.crew).unwrap()
    }
}

#[test]
fn a_disk_that_cannot_be_read_fails_the_checkpoint_and_not_the_guests_write() {
    let disk = Arc::new(Unreadable::default());
    let disks: Vec<Arc<dyn GuestDisk>> = vec![disk.clone()];
    let mut rig = Rig::new(&disks);
    let copies = rig.copies(disks);
    let copying = copies.disks[0].clone();
    for at in 0..8 {
        copying.before_write(at * PIECE_BYTES as u64, 4096);
    }
    assert_eq!(disk.0.load(Ordering::Relaxed), 1, "nothing more is read");
    let reason = rig
        .control
        .wait_for_reason(Duration::from_secs(60))
        .unwrap();
    assert!(matches!(reason, CheckpointError::Disk { .. }), "{reason}");
    drop(copies);
    assert!(
        rig.crew
            .join_until(Instant::now() + Duration::from_secs(60))
    );
}

/// A disk of bytes that are all the same: of `now` as it is, of `then` where it was frozen.
#[derive(Debug)]
struct Freezable {
    can: bool,
    frozen: AtomicU64,
    observer: Mutex<Option<()>>,
}

#[derive(Debug)]
struct Frozen;

impl FrozenDisk for Frozen {
    fn read_at(&self, out: &mut [u8], _offset: u64) -> io::Result<()> {
        out.fill(1);
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(offset..BYTES))
    }
}

impl GuestDisk for Freezable {
    fn facts(&self) -> DiskFacts {
        Unreadable::default().facts()
    }
    fn read_at(&self, out: &mut [u8], _offset: u64) -> io::Result<()> {
        out.fill(2);
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(Some(offset..BYTES))
    }
    fn freeze(&self) -> io::Result<Option<Box<dyn FrozenDisk>>> {
        // The first call finds out whether it can be.
        if self.frozen.fetch_add(1, Ordering::SeqCst) == 0 || self.can {
            return Ok(Some(Box::new(Frozen)));
        }
        Err(io::ErrorKind::StorageFull.into())
    }
    fn set_write_observer(&self, observer: Option<Arc<dyn WriteObserver>>) {
        *self.observer.lock().unwrap() = observer.map(drop);
    }
}

#[test]
fn who_writes_waits_until_the_disk_is_frozen_or_is_known_not_to_be() {
    for can in [true, false] {
        let disk = Arc::new(Freezable {
            can,
            frozen: AtomicU64::new(0),
            observer: Mutex::new(None),
        });
        let disks: Vec<Arc<dyn GuestDisk>> = vec![disk.clone()];
        let mut rig = Rig::new(&disks);
        let mut copies = rig.copies(disks);
        copies.begin();
        let copying = copies.disks[0].clone();
        let writer = std::thread::spawn(move || copying.before_write(0, 4096));
        std::thread::sleep(Duration::from_millis(20));
        assert!(
            !writer.is_finished(),
            "it waits for what comes of the freezing"
        );
        copies.go();
        writer.join().unwrap();
        rig.crew.join().unwrap();
        assert_eq!(disk.frozen.load(Ordering::SeqCst), 2);
        assert_eq!(*disk.observer.lock().unwrap(), None);
        let method = copies.statistics()[0].method;
        let copied = DiskMethod::CopyBeforeWrite;
        assert_eq!(method, if can { DiskMethod::Reflink } else { copied });
    }
}
