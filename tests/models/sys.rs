//! What is below the engine, as far as the models need it: guest memory and its protection.

pub(crate) mod mapping {
    use std::sync::Arc;
    use std::sync::Mutex as Plain;
    use std::sync::atomic::AtomicUsize;

    use loom::sync::atomic::{AtomicBool, AtomicU8, Ordering};

    use crate::page::PAGE_BYTES;

    /// The most copies that are made of a page in one run of a model.
    const COPIES_MAX: usize = 4;

    /// Guest memory: a byte a page, stored and loaded as weakly as the hardware might.
    #[derive(Clone, Debug)]
    pub struct GuestMapping {
        hva: usize,
        pages: Arc<[Page]>,
    }

    #[derive(Debug)]
    struct Page {
        value: AtomicU8,
        /// Set by each copy once it is made. A store that is ordered behind a copy must find its
        /// flag set; one that is merely later might not.
        copied: [AtomicBool; COPIES_MAX],
        copies: AtomicUsize,
        stores: Plain<Vec<Store>>,
    }

    /// A store that was made, with the copies that it was ordered behind.
    #[derive(Clone, Debug)]
    pub(crate) struct Store {
        pub(crate) behind: Vec<bool>,
    }

    impl GuestMapping {
        /// Makes memory of so many pages of zeros.
        pub(crate) fn of_pages(pages: usize) -> Self {
            static NEXT: AtomicUsize = AtomicUsize::new(1 << 30);
            let page = |_| Page {
                value: AtomicU8::new(0),
                copied: std::array::from_fn(|_| AtomicBool::new(false)),
                copies: AtomicUsize::new(0),
                stores: Plain::default(),
            };
            Self {
                hva: NEXT.fetch_add(pages * PAGE_BYTES, Ordering::Relaxed),
                pages: (0..pages).map(page).collect(),
            }
        }

        pub(crate) fn hva(&self) -> usize {
            self.hva
        }

        pub(crate) fn len(&self) -> usize {
            self.pages.len() * PAGE_BYTES
        }

        /// Copies whole pages: the first byte of each is its value, the second tells which copy
        /// of the page it is.
        pub(crate) fn copy_out(&self, offset: usize, out: &mut [u8]) {
            let pages = &self.pages[offset / PAGE_BYTES..];
            for (page, out) in pages.iter().zip(out.chunks_mut(PAGE_BYTES)) {
                let copy = page.copies.fetch_add(1, Ordering::Relaxed);
                out[0] = page.value.load(Ordering::Relaxed);
                out[1] = u8::try_from(copy).unwrap();
                page.copied[copy].store(true, Ordering::Relaxed);
            }
        }

        /// Copies whole pages to another mapping.
        pub(crate) fn copy_to(&self, offset: usize, to: &Self, to_offset: usize, len: usize) {
            for at in (0..len).step_by(PAGE_BYTES) {
                let value = self.load((offset + at) / PAGE_BYTES);
                to.store((to_offset + at) / PAGE_BYTES, value);
            }
        }

        pub(crate) fn load(&self, page: usize) -> u8 {
            self.pages[page].value.load(Ordering::Relaxed)
        }

        /// Stores a page's value, whatever its protection.
        pub(crate) fn store(&self, page: usize, value: u8) {
            let page = &self.pages[page];
            page.value.store(value, Ordering::Relaxed);
        }

        /// Like [`GuestMapping::store`], and notes which copies the store is ordered behind.
        pub(crate) fn store_noted(&self, page: usize, value: u8) {
            self.store(page, value);
            let page = &self.pages[page];
            let made = page.copies.load(Ordering::Relaxed);
            let behind = page.copied[..made].iter();
            let behind = behind
                .map(|copied| copied.load(Ordering::Relaxed))
                .collect();
            page.stores.lock().unwrap().push(Store { behind });
        }

        /// Returns the noted stores to a page.
        pub(crate) fn stores(&self, page: usize) -> Vec<Store> {
            self.pages[page].stores.lock().unwrap().clone()
        }
    }
}

pub(crate) mod anon {
    use std::io;
    use std::ops::{Deref, DerefMut};

    use super::mapping::GuestMapping;
    use crate::page::PAGE_BYTES;

    pub(crate) fn map_anonymous(len: usize, _huge: bool) -> io::Result<GuestMapping> {
        Ok(GuestMapping::of_pages(len / PAGE_BYTES))
    }

    pub(crate) fn populate(_: &GuestMapping, _offset: usize, _len: usize) -> io::Result<()> {
        Ok(())
    }

    /// The memory of a buffer; pieces are a page here.
    #[derive(Debug)]
    pub(crate) struct HugeBytes(Vec<u8>);

    impl HugeBytes {
        pub(crate) fn new(_len: usize) -> io::Result<Self> {
            Ok(Self(vec![0; PAGE_BYTES]))
        }
    }

    impl Deref for HugeBytes {
        type Target = [u8];

        fn deref(&self) -> &[u8] {
            &self.0
        }
    }

    impl DerefMut for HugeBytes {
        fn deref_mut(&mut self) -> &mut [u8] {
            &mut self.0
        }
    }
}

pub(crate) mod pagemap {
    use std::io;

    /// A page map in which every page was touched.
    #[derive(Debug)]
    pub(crate) struct PagemapReader;

    impl PagemapReader {
        pub(crate) fn open() -> io::Result<Self> {
            Ok(Self)
        }

        pub(crate) fn untouched(
            &self,
            _hva: usize,
            _pages: usize,
            bits: &mut [u64],
        ) -> io::Result<usize> {
            bits.fill(0);
            Ok(0)
        }
    }
}

pub(crate) mod userfault {
    use std::collections::{BTreeMap, BTreeSet, VecDeque};
    use std::io;
    use std::sync::Arc;

    use super::mapping::GuestMapping;
    use crate::page::PAGE_BYTES;
    use crate::sync::{Condvar, Mutex};

    /// A userfaultfd: who stores to a protected page is told of, and waits.
    ///
    /// Clones are one. A store is one step with the look at its page's protection, as it is on
    /// hardware: whoever protects a page flushes it from every TLB before going on.
    #[derive(Clone, Debug)]
    pub(crate) struct Userfault(Arc<Shared>);

    #[derive(Debug)]
    struct Shared {
        tables: Mutex<Tables>,
        told: Condvar,
        woken: Condvar,
    }

    #[derive(Debug, Default)]
    struct Tables {
        protected: BTreeSet<usize>,
        /// How often a page was un-protected.
        wakes: BTreeMap<usize, usize>,
        faults: VecDeque<usize>,
        writers_ended: bool,
    }

    impl Userfault {
        pub(crate) fn new() -> io::Result<Self> {
            Ok(Self(Arc::new(Shared {
                tables: Mutex::default(),
                told: Condvar::new(),
                woken: Condvar::new(),
            })))
        }

        pub(crate) fn has_shared_memory(&self) -> bool {
            true
        }

        pub(crate) fn register(&self, _: &GuestMapping) -> io::Result<()> {
            Ok(())
        }

        pub(crate) fn unregister(&self, mapping: &GuestMapping) -> io::Result<()> {
            self.unprotect(mapping, 0, mapping.len())
        }

        pub(crate) fn protect(
            &self,
            mapping: &GuestMapping,
            offset: usize,
            len: usize,
        ) -> io::Result<()> {
            let mut tables = self.0.tables.lock().unwrap();
            tables.protected.extend(pages(mapping, offset, len));
            Ok(())
        }

        pub(crate) fn unprotect(
            &self,
            mapping: &GuestMapping,
            offset: usize,
            len: usize,
        ) -> io::Result<()> {
            let mut tables = self.0.tables.lock().unwrap();
            for page in pages(mapping, offset, len) {
                tables.protected.remove(&page);
                *tables.wakes.entry(page).or_default() += 1;
            }
            drop(tables);
            self.0.woken.notify_all();
            Ok(())
        }

        /// Stores as a vCPU does: as soon as the page is not protected. Each fault is told so many
        /// times, as where other vCPUs wait at the same page.
        pub(crate) fn store(&self, mapping: &GuestMapping, page: usize, value: u8, told: usize) {
            let address = mapping.hva() + page * PAGE_BYTES;
            let wakes = |tables: &Tables| tables.wakes.get(&address).copied();
            let mut tables = self.0.tables.lock().unwrap();
            while tables.protected.contains(&address) {
                tables.faults.extend(std::iter::repeat_n(address, told));
                self.0.told.notify_all();
                let before = wakes(&tables);
                let still = |tables: &mut Tables| wakes(tables) == before;
                tables = self.0.woken.wait_while(tables, still).unwrap();
            }
            mapping.store_noted(page, value);
        }

        /// Waits for somebody who waits; `None` once no more stores are to come.
        pub(crate) fn next_fault(&self) -> Option<usize> {
            let tables = self.0.tables.lock().unwrap();
            let waits = |tables: &mut Tables| tables.faults.is_empty() && !tables.writers_ended;
            self.0
                .told
                .wait_while(tables, waits)
                .unwrap()
                .faults
                .pop_front()
        }

        /// Says that no more stores are to come.
        pub(crate) fn end_writers(&self) {
            self.0.tables.lock().unwrap().writers_ended = true;
            self.0.told.notify_all();
        }

        pub(crate) fn is_protected(&self, mapping: &GuestMapping, page: usize) -> bool {
            let address = mapping.hva() + page * PAGE_BYTES;
            self.0.tables.lock().unwrap().protected.contains(&address)
        }
    }

    fn pages(mapping: &GuestMapping, offset: usize, len: usize) -> impl Iterator<Item = usize> {
        let first = mapping.hva() + offset;
        (first..first + len).step_by(PAGE_BYTES)
    }
}

pub(crate) mod event {
    use std::cell::RefCell;
    use std::io;
    use std::os::fd::{AsFd, BorrowedFd};
    use std::sync::Arc;

    use loom::sync::atomic::{AtomicBool, Ordering};

    thread_local! {
        /// The event that was made last. All threads of a model are one.
        static LAST: RefCell<Option<Event>> = const { RefCell::new(None) };
    }

    /// An eventfd: who finds it set sees what came before.
    #[derive(Clone, Debug)]
    pub(crate) struct Event(Arc<AtomicBool>);

    impl Event {
        pub(crate) fn new() -> io::Result<Self> {
            let event = Self(Arc::new(AtomicBool::new(false)));
            LAST.set(Some(event.clone()));
            Ok(event)
        }

        /// Returns the event that was made last, and forgets it: none outlives its model.
        pub(crate) fn last() -> Self {
            LAST.take().unwrap()
        }

        pub(crate) fn set(&self) {
            self.0.store(true, Ordering::Release);
        }

        pub(crate) fn clear(&self) {
            self.0.store(false, Ordering::Release);
        }

        pub(crate) fn is_set(&self) -> bool {
            self.0.load(Ordering::Acquire)
        }
    }

    impl AsFd for Event {
        fn as_fd(&self) -> BorrowedFd<'_> {
            unreachable!("no model polls")
        }
    }
}

pub(crate) mod lock {
    /// Who holds a lock on a file: nobody here.
    #[derive(Clone, Debug, PartialEq, Eq)]
    pub struct Holder;

    impl std::fmt::Display for Holder {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("nobody")
        }
    }
}
