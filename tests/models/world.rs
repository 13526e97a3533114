//! A guest of one region, with a dirty log as the hardware's.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::guest::{
    Backing, Description, DirtyLog, Guest, GuestError, HostWrites, MemoryRegion, PauseTiming,
};
use crate::page::{Gfn, PAGE_BYTES};
use crate::state::StateSection;
use crate::sync::{Condvar, Mutex};
use crate::sys::anon::map_anonymous;
use crate::sys::mapping::GuestMapping;

pub(crate) struct ModelGuest {
    regions: Vec<MemoryRegion>,
    log: ModelLog,
    host_writes: HostWrites,
    pauses: Mutex<u32>,
    resumed: Condvar,
    pub(crate) resumes: AtomicU32,
}

/// A store and its mark are one step with respect to a re-arm, which clears the mark.
struct ModelLog {
    marked: Mutex<Vec<bool>>,
    stops: AtomicU32,
}

impl ModelGuest {
    pub(crate) fn new(pages: usize) -> Arc<Self> {
        let mapping = map_anonymous(pages * PAGE_BYTES, false).unwrap();
        let region = MemoryRegion {
            slot: 0,
            start: Gfn(0),
            page_count: pages as u64,
            mapping,
            backing: Backing::Memfd,
        };
        Arc::new(Self {
            host_writes: HostWrites::new([(0, region.run())]),
            regions: vec![region],
            log: ModelLog {
                marked: Mutex::new(vec![true; pages]),
                stops: AtomicU32::new(0),
            },
            pauses: Mutex::new(0),
            resumed: Condvar::new(),
            resumes: AtomicU32::new(0),
        })
    }

    pub(crate) fn memory(&self) -> &GuestMapping {
        &self.regions[0].mapping
    }

    /// Stores as a vCPU does.
    pub(crate) fn store(&self, page: usize, value: u8) {
        let mut marked = self.log.marked.lock().unwrap();
        marked[page] = true;
        self.memory().store(page, value);
    }

    /// Writes as a device does.
    pub(crate) fn write(&self, page: usize, value: u8) {
        self.memory().store(page, value);
        self.mark(page);
    }

    /// Writes as a device must not.
    pub(crate) fn write_marked_first(&self, page: usize, value: u8) {
        self.mark(page);
        self.memory().store(page, value);
    }

    fn mark(&self, page: usize) {
        self.host_writes
            .mark_dirty((page * PAGE_BYTES) as u64, PAGE_BYTES as u64);
    }

    /// Waits until the guest is paused no more.
    pub(crate) fn wait_for_resume(&self) {
        let pauses = self.pauses.lock().unwrap();
        drop(
            self.resumed
                .wait_while(pauses, |pauses| *pauses > 0)
                .unwrap(),
        );
    }

    /// Returns how often the dirty log was stopped.
    pub(crate) fn log_stops(&self) -> u32 {
        self.log.stops.load(Ordering::Relaxed)
    }
}

impl DirtyLog for ModelLog {
    fn start(&self) -> io::Result<()> {
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.stops.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn fetch(&self, _slot: u32, bitmap: &mut [u64]) -> io::Result<()> {
        let marked = self.marked.lock().unwrap();
        let bits = marked.iter().enumerate();
        bitmap[0] = bits.map(|(page, &set)| u64::from(set) << page).sum();
        Ok(())
    }

    fn rearm(&self, _: u32, first_page: u64, page_count: u64, bits: &[u64]) -> io::Result<()> {
        let mut marked = self.marked.lock().unwrap();
        assert_eq!((first_page, page_count), (0, marked.len() as u64));
        for (page, mark) in marked.iter_mut().enumerate() {
            *mark &= bits[0] >> page & 1 == 0;
        }
        Ok(())
    }
}

impl Guest for ModelGuest {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        &self.log
    }

    fn host_writes(&self) -> &HostWrites {
        &self.host_writes
    }

    fn check_checkpointable(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn pause(&self) -> Result<PauseTiming, GuestError> {
        *self.pauses.lock().unwrap() += 1;
        Ok(PauseTiming::default())
    }

    fn resume(&self) {
        let mut pauses = self.pauses.lock().unwrap();
        *pauses = pauses.checked_sub(1).expect("a resume without a pause");
        drop(pauses);
        self.resumes.fetch_add(1, Ordering::Relaxed);
        self.resumed.notify_all();
    }

    fn save_state(&self) -> Result<Vec<StateSection>, GuestError> {
        Ok(Vec::new())
    }

    fn describe(&self) -> Description {
        unimplemented!("nothing that is modelled asks for it")
    }
}
