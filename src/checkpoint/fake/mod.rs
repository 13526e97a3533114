//! A guest without KVM, whose vCPUs race the capture, for the engine's tests.
//!
//! Its dirty log has the semantics of the hardware's: a store under armed tracking marks its page
//! and stores as one step, with respect to a re-arm. Each piece has a lock for that: stores hold
//! it shared, re-arms exclusively. A page is written by several stores, so that a copy, or a
//! re-arm, can come in the middle of one.

mod storage;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use uuid::Uuid;

use crate::guest::{
    Backing, Description, DirtyLog, Guest, GuestError, HostWrites, MemoryRegion, PauseTiming,
    VcpuGate,
};
use crate::page::{Gfn, PAGE_BYTES, PIECE_PAGES, PageRun, bitmap_words};
use crate::state::{HostFacts, StateSection};
use crate::sys::anon;
use crate::sys::pagemap::PagemapReader;

pub(crate) use storage::{Operation, TroubledStorage};

/// Stores that make up the writing of one page.
const STORES_PER_PAGE: usize = 8;

/// Something a test wants to happen inside a call of the engine's.
pub(crate) type Hook = Arc<dyn Fn(&FakeGuest) + Send + Sync>;

/// A call of the engine's that can be hooked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Save,
    Rearm,
    Fetch,
    HostWrites,
}

pub(crate) struct FakeGuest {
    regions: Vec<MemoryRegion>,
    log: FakeLog,
    host_writes: HostWrites,
    gate: VcpuGate,
    /// Held by the device while it writes, and by a pause.
    device: Mutex<()>,
    device_paused: AtomicBool,
    hooks: Mutex<Vec<(Call, Hook)>>,
    stop: AtomicBool,
    pub(crate) stores: AtomicU64,
    pub(crate) pauses: AtomicU32,
    pub(crate) resumes: AtomicU32,
}

struct FakeLog {
    regions: Vec<LoggedRegion>,
    logging: AtomicBool,
}

struct LoggedRegion {
    slot: u32,
    pages: u64,
    pieces: Vec<RwLock<()>>,
    dirty: Vec<AtomicU64>,
}

/// Numbers that look random and are the same in every run.
#[derive(Clone, Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }
}

impl FakeLog {
    fn region(&self, slot: u32) -> &LoggedRegion {
        let mut regions = self.regions.iter();
        regions.find(|region| region.slot == slot).unwrap()
    }

    fn check_logging(&self) -> io::Result<()> {
        if self.logging.load(Ordering::SeqCst) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ENOENT))
        }
    }

    fn rearm(&self, slot: u32, first: u64, count: u64, bits: &[u64]) -> io::Result<()> {
        self.check_logging()?;
        let region = self.region(slot);
        assert_eq!(first % 64, 0, "windows start at a word");
        assert!(count.is_multiple_of(64) || first + count == region.pages);
        assert!(first + count <= region.pages && bits.len() as u64 * 64 >= count);
        let mut page = first;
        while page < first + count {
            let end = ((page / PIECE_PAGES + 1) * PIECE_PAGES).min(first + count);
            let piece = usize::try_from(page / PIECE_PAGES).unwrap();
            let _exclusive = region.pieces[piece].write().unwrap();
            for word in page / 64..end.div_ceil(64) {
                let mask = bits[usize::try_from(word - first / 64).unwrap()];
                region.dirty[usize::try_from(word).unwrap()].fetch_and(!mask, Ordering::SeqCst);
            }
            page = end;
        }
        Ok(())
    }
}

impl FakeGuest {
    /// Makes a guest of regions of so many pages each, with holes between, and `vcpus` vCPUs that
    /// do not run yet. All memory is untouched.
    pub(crate) fn new(region_pages: &[u64], vcpus: usize) -> Arc<Self> {
        let backing = Backing::Anonymous { huge: false };
        let regions: Vec<_> = (0_u32..)
            .zip(region_pages)
            .map(|(slot, &page_count)| MemoryRegion {
                slot,
                start: Gfn(u64::from(slot) << 24),
                page_count,
                mapping: anon::map_anonymous(pages(page_count) * PAGE_BYTES, false).unwrap(),
                backing,
            })
            .collect();
        let logged = regions.iter().map(|region| LoggedRegion {
            slot: region.slot,
            pages: region.page_count,
            pieces: (0..region.page_count.div_ceil(PIECE_PAGES))
                .map(|_| RwLock::new(()))
                .collect(),
            dirty: (0..bitmap_words(region.page_count))
                .map(|_| AtomicU64::new(0))
                .collect(),
        });
        Arc::new(Self {
            log: FakeLog {
                regions: logged.collect(),
                logging: AtomicBool::new(false),
            },
            host_writes: HostWrites::new(regions.iter().map(|region| (region.slot, region.run()))),
            regions,
            gate: VcpuGate::new(vcpus),
            device: Mutex::new(()),
            device_paused: AtomicBool::new(false),
            hooks: Mutex::default(),
            stop: AtomicBool::new(false),
            stores: AtomicU64::new(0),
            pauses: AtomicU32::new(0),
            resumes: AtomicU32::new(0),
        })
    }

    pub(crate) fn page_count(&self) -> u64 {
        self.regions.iter().map(|region| region.page_count).sum()
    }

    /// Returns the region and the page in it of the guest's `page`th page.
    fn locate(&self, page: u64) -> (usize, u64) {
        let mut rest = page;
        for (number, region) in self.regions.iter().enumerate() {
            if rest < region.page_count {
                return (number, rest);
            }
            rest -= region.page_count;
        }
        panic!("the guest has no page {page}");
    }

    /// Returns which of the guest's pages `frame` is.
    pub(crate) fn index_of(&self, frame: Gfn) -> usize {
        let mut before = 0;
        for region in &self.regions {
            if region.run().start <= frame && frame < region.run().end() {
                return pages(before + frame.0 - region.start.0);
            }
            before += region.page_count;
        }
        panic!("the guest has no frame {frame}");
    }

    /// Runs `hook` inside every `call` from now on.
    pub(crate) fn on(&self, call: Call, hook: impl Fn(&Self) + Send + Sync + 'static) {
        self.hooks.lock().unwrap().push((call, Arc::new(hook)));
    }

    fn run_hooks(&self, call: Call) {
        let hooks: Vec<_> = {
            let all = self.hooks.lock().unwrap();
            all.iter()
                .filter(|(at, _)| *at == call)
                .map(|(_, hook)| hook.clone())
                .collect()
        };
        hooks.iter().for_each(|hook| hook(self));
    }

    /// Writes bytes as a vCPU does: logged if logging is on.
    pub(crate) fn store(&self, page: u64, offset: usize, bytes: &[u8]) {
        let (number, page) = self.locate(page);
        let logged = &self.log.regions[number];
        // As KVM does: it waits for the page, where somebody protects it, before it marks it.
        let mapping = &self.regions[number].mapping;
        anon::populate(mapping, pages(page) * PAGE_BYTES, PAGE_BYTES).unwrap();
        let _shared = logged.pieces[pages(page / PIECE_PAGES)].read().unwrap();
        if self.log.logging.load(Ordering::SeqCst) {
            logged.dirty[pages(page / 64)].fetch_or(1 << (page % 64), Ordering::SeqCst);
        }
        let at = pages(page) * PAGE_BYTES + offset;
        self.regions[number].mapping.copy_in(at, bytes);
    }

    /// Writes a whole page in several stores; all its words become `value`.
    pub(crate) fn write_page(&self, page: u64, value: u64) {
        const BYTES: usize = PAGE_BYTES / STORES_PER_PAGE;
        let part: Vec<u8> = value.to_ne_bytes().repeat(BYTES / 8);
        for number in 0..STORES_PER_PAGE {
            self.store(page, number * BYTES, &part);
        }
        self.stores.fetch_add(1, Ordering::Relaxed);
    }

    /// Fills every page with its own value: all of memory is touched then.
    pub(crate) fn fill(&self) {
        (0..self.page_count()).for_each(|page| self.write_page(page, page + 1));
    }

    /// Writes a page as a device does: not logged by hardware, announced after the write.
    pub(crate) fn device_write(&self, page: u64, value: u64) {
        let (number, page) = self.locate(page);
        let bytes = value.to_ne_bytes().repeat(PAGE_BYTES / 8);
        let region = &self.regions[number];
        region.mapping.copy_in(pages(page) * PAGE_BYTES, &bytes);
        self.host_writes
            .mark_dirty(Gfn(region.start.0 + page).gpa(), PAGE_BYTES as u64);
    }

    /// Gives pages back to the host, as a balloon does.
    pub(crate) fn discard(&self, page: u64, count: u64) {
        let (number, first) = self.locate(page);
        let region = &self.regions[number];
        let count = count.min(region.page_count - first);
        let run = PageRun {
            start: Gfn(region.start.0 + first),
            page_count: count,
        };
        let discard = self.host_writes.will_discard(run);
        let (offset, bytes) = (pages(first) * PAGE_BYTES, pages(count) * PAGE_BYTES);
        anon::discard(&region.mapping, offset, bytes).unwrap();
        drop(discard);
    }

    /// Returns all memory; pages that were never touched stay so.
    pub(crate) fn snapshot(&self) -> Vec<u8> {
        let reader = PagemapReader::open().unwrap();
        let mut all = vec![0; pages(self.page_count()) * PAGE_BYTES];
        let mut out = all.chunks_exact_mut(PAGE_BYTES);
        for region in &self.regions {
            let untouched = self.untouched_in(&reader, region);
            for page in 0..pages(region.page_count) {
                let bytes = out.next().unwrap();
                if untouched[page / 64] >> (page % 64) & 1 == 0 {
                    region.mapping.copy_out(page * PAGE_BYTES, bytes);
                }
            }
        }
        all
    }

    /// Counts the pages that were never touched.
    pub(crate) fn untouched_pages(&self) -> u64 {
        let reader = PagemapReader::open().unwrap();
        let bits = self
            .regions
            .iter()
            .flat_map(|region| self.untouched_in(&reader, region));
        bits.map(|word| u64::from(word.count_ones())).sum()
    }

    fn untouched_in(&self, reader: &PagemapReader, region: &MemoryRegion) -> Vec<u64> {
        let mut bits = vec![0; bitmap_words(region.page_count)];
        let hva = region.mapping.hva();
        reader
            .untouched(hva, pages(region.page_count), &mut bits)
            .unwrap();
        bits
    }

    pub(crate) fn is_logging(&self) -> bool {
        self.log.logging.load(Ordering::SeqCst)
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.gate.is_closed()
    }

    /// Starts the vCPUs and a device, which also gives pages back to the host; they run until the
    /// returned value is dropped.
    pub(crate) fn run(self: &Arc<Self>, vcpus: usize, seed: u64) -> Running {
        let mut running = self.run_vcpus(vcpus, seed);
        let guest = self.clone();
        let dice = Dice::new(seed * 100 + 99);
        let device = thread::spawn(move || guest.run_device(dice));
        running.threads.push(device);
        running
    }

    /// Starts the vCPUs alone. Each writes pages of a working set that moves, as fast as it can.
    pub(crate) fn run_vcpus(self: &Arc<Self>, vcpus: usize, seed: u64) -> Running {
        let mut threads = Vec::new();
        for vcpu in 0..vcpus {
            self.gate.enter(vcpu);
            let guest = self.clone();
            let dice = Dice::new(seed * 100 + vcpu as u64 + 1);
            threads.push(thread::spawn(move || guest.run_vcpu(vcpu, dice)));
        }
        Running {
            guest: self.clone(),
            threads,
        }
    }

    fn run_vcpu(&self, vcpu: usize, mut dice: Dice) {
        let mut value = (vcpu as u64 + 1) << 56;
        while !self.stop.load(Ordering::Relaxed) {
            // A pending exit is completed before the vCPU stops, and writes memory.
            let settled = dice.below(self.page_count());
            self.gate
                .pass(vcpu, || self.write_page(settled, value | 1 << 48));
            let base = dice.below(self.page_count());
            for _ in 0..dice.below(64) {
                value += 1;
                let page = (base + dice.below(32)) % self.page_count();
                self.write_page(page, value);
            }
        }
        self.gate.leave(vcpu);
    }

    fn run_device(&self, mut dice: Dice) {
        let mut value = 0xde_u64 << 56;
        while !self.stop.load(Ordering::Relaxed) {
            {
                let _busy = self.device();
                if !self.device_paused.load(Ordering::SeqCst) {
                    value += 1;
                    let page = dice.below(self.page_count());
                    if dice.below(8) == 0 {
                        self.discard(page, 1 + dice.below(20));
                    } else {
                        self.device_write(page, value);
                    }
                }
            }
            thread::yield_now();
        }
    }

    fn device(&self) -> MutexGuard<'_, ()> {
        self.device.lock().unwrap()
    }
}

fn pages(count: u64) -> usize {
    usize::try_from(count).unwrap()
}

/// Running vCPUs and device; stopped and joined by the drop.
pub(crate) struct Running {
    guest: Arc<FakeGuest>,
    threads: Vec<JoinHandle<()>>,
}

impl Running {
    /// Fails unless the guest's vCPUs make progress.
    pub(crate) fn assert_progress(&self) {
        let before = self.guest.stores.load(Ordering::Relaxed);
        let start = Instant::now();
        while self.guest.stores.load(Ordering::Relaxed) < before + 100 {
            assert!(
                start.elapsed() < Duration::from_secs(60),
                "the guest does not run"
            );
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.guest.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "a vCPU panicked");
        }
        self.guest.stop.store(false, Ordering::Relaxed);
    }
}

impl DirtyLog for FakeGuest {
    fn start(&self) -> io::Result<()> {
        for region in &self.log.regions {
            for word in &region.dirty {
                word.store(u64::MAX, Ordering::SeqCst);
            }
        }
        self.log.logging.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        self.log.logging.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn fetch(&self, slot: u32, bitmap: &mut [u64]) -> io::Result<()> {
        self.run_hooks(Call::Fetch);
        self.log.check_logging()?;
        let words = &self.log.region(slot).dirty;
        assert_eq!(words.len(), bitmap.len());
        for (word, out) in words.iter().zip(bitmap) {
            *out = word.load(Ordering::SeqCst);
        }
        Ok(())
    }

    fn rearm(&self, slot: u32, first: u64, count: u64, bits: &[u64]) -> io::Result<()> {
        self.run_hooks(Call::Rearm);
        self.log.rearm(slot, first, count, bits)
    }
}

impl Guest for FakeGuest {
    fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    fn dirty_log(&self) -> &dyn DirtyLog {
        self
    }

    fn host_writes(&self) -> &HostWrites {
        self.run_hooks(Call::HostWrites);
        &self.host_writes
    }

    fn check_checkpointable(&self) -> Result<(), GuestError> {
        Ok(())
    }

    fn pause(&self) -> Result<PauseTiming, GuestError> {
        let began = Instant::now();
        self.gate.close(Duration::from_secs(20), |_| ())?;
        let kick = began.elapsed();
        let _drained = self.device();
        self.device_paused.store(true, Ordering::SeqCst);
        self.pauses.fetch_add(1, Ordering::SeqCst);
        Ok(PauseTiming {
            kick,
            quiesce: began.elapsed() - kick,
        })
    }

    fn resume(&self) {
        self.resumes.fetch_add(1, Ordering::SeqCst);
        self.device_paused.store(false, Ordering::SeqCst);
        self.gate.open();
    }

    fn last_resumed(&self) -> Option<Instant> {
        self.gate.last_left()
    }

    fn save_state(&self) -> Result<Vec<StateSection>, GuestError> {
        self.run_hooks(Call::Save);
        // As KVM does for a paravirtual clock: saving it writes guest memory.
        self.write_page(0, 0xc10c);
        Ok(vec![StateSection {
            kind: "fake".to_owned(),
            instance: 0,
            version: 1,
            payload: vec![1, 2, 3],
        }])
    }

    fn describe(&self) -> Description {
        Description {
            name: "fake".to_owned(),
            uuid: Uuid::nil(),
            domain_xml: "<domain/>".to_owned(),
            vcpu_count: 2,
            facts: HostFacts::default(),
        }
    }
}
