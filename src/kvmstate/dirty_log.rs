//! KVM's dirty log with manual protection.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap,
};
use kvm_ioctls::VmFd;

use super::{KvmStateError, os_error};
use crate::guest::{DirtyLog, MemoryRegion};
use crate::page::{WINDOW_PAGES, bitmap_words};
use crate::sys::kvm::{clear_dirty_log, get_dirty_log, set_memory_slot, vm_fd};

/// vCPUs run for so long between the ends of two slots' logs, each of which holds them up.
const SLOTS_APART: Duration = Duration::from_micros(200);

/// Words of bitmap that are armed at once where nothing runs: 16 MiB of memory.
const ARM_WORDS: usize = 64;

/// KVM's log of the pages that vCPUs, and KVM itself, wrote.
///
/// Needs the slots' logs for itself while it runs: whoever else reads them loses pages.
#[derive(Debug)]
pub struct KvmDirtyLog {
    vm: VmFd,
    fd: OwnedFd,
    slots: Vec<Slot>,
    mode: Mode,
    logging: Mutex<bool>,
}

#[derive(Debug)]
struct Slot {
    region: MemoryRegion,
    /// The slot's flags while nothing is logged.
    flags: u32,
    /// Pages never re-armed since the start; empty where KVM sets the log initially.
    untouched: Box<[AtomicU64]>,
}

impl Slot {
    fn new(region: &MemoryRegion, flags: u32, mode: Mode) -> Self {
        let words = match mode {
            Mode::InitiallySet => 0,
            Mode::InitiallyClear => bitmap_words(region.page_count),
        };
        Self {
            region: region.clone(),
            flags,
            untouched: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }
}

/// How much of `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` the kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// All pages start as dirty and unprotected: starting is cheap, and writes to pages that were
    /// never re-armed cost nothing.
    InitiallySet,
    /// All pages start as clean and write-protected (before Linux 5.8). We say that they are
    /// dirty until re-armed once, as [`DirtyLog`] promises.
    InitiallyClear,
}

impl KvmDirtyLog {
    /// Makes a log of `regions`, which are slots of `vm` with the flags given.
    pub fn new(vm: VmFd, regions: &[(MemoryRegion, u32)]) -> Result<Self, KvmStateError> {
        let offered = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let offered = u32::try_from(offered).unwrap_or(0);
        let mode = if offered & KVM_DIRTY_LOG_INITIALLY_SET != 0 {
            Mode::InitiallySet
        } else if offered & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0 {
            Mode::InitiallyClear
        } else {
            return Err(KvmStateError::Missing {
                capability: "KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 (Linux 5.0)",
            });
        };
        let fd = vm_fd(&vm)
            .try_clone_to_owned()
            .map_err(|source| KvmStateError::Vm {
                what: "duplicate the VM's descriptor",
                source,
            })?;
        let slots = regions
            .iter()
            .map(|(region, flags)| Slot::new(region, *flags, mode))
            .collect();
        Ok(Self {
            vm,
            fd,
            slots,
            mode,
            logging: Mutex::new(false),
        })
    }

    /// Starts logging with every page clean and write-protected. Called before anything runs.
    pub fn start_armed(&self) -> io::Result<()> {
        self.start()?;
        let bits = [u64::MAX; ARM_WORDS];
        for slot in &self.slots {
            let region = &slot.region;
            for first in (0..region.page_count).step_by(ARM_WORDS * 64) {
                let pages = (region.page_count - first).min(ARM_WORDS as u64 * 64);
                self.rearm(region.slot, first, pages, &bits)?;
            }
        }
        Ok(())
    }

    fn slot(&self, slot: u32) -> io::Result<&Slot> {
        self.slots
            .iter()
            .find(|known| known.region.slot == slot)
            .ok_or_else(|| {
                io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("memory slot {slot} is not one of this guest's"),
                )
            })
    }

    fn set_flags(&self, slot: &Slot, extra: u32) -> io::Result<()> {
        let region = &slot.region;
        set_memory_slot(
            &self.fd,
            region.slot,
            slot.flags | extra,
            region.start.gpa(),
            &region.mapping,
        )
    }

    fn enable_manual_protection(&self) -> io::Result<()> {
        let mut flags = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE;
        if self.mode == Mode::InitiallySet {
            flags |= KVM_DIRTY_LOG_INITIALLY_SET;
        }
        let mut cap = kvm_enable_cap {
            cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
            ..Default::default()
        };
        cap.args[0] = flags.into();
        self.vm.enable_cap(&cap).map_err(os_error)
    }

    fn stop_all(&self) -> io::Result<()> {
        // Every slot is tried: one left logging would slow the guest for good.
        let stop = |(number, slot)| {
            if number > 0 {
                thread::sleep(SLOTS_APART);
            }
            self.set_flags(slot, 0)
        };
        let slots = self.slots.iter().enumerate();
        slots.map(stop).fold(Ok(()), Result::and)
    }
}

impl DirtyLog for KvmDirtyLog {
    fn start(&self) -> io::Result<()> {
        let mut logging = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        if *logging {
            return Ok(());
        }
        // Before the flags: INITIALLY_SET counts at the moment that a slot's log is made.
        self.enable_manual_protection()?;
        for slot in &self.slots {
            let whole = slot.region.page_count / WINDOW_PAGES;
            let rest = slot.region.page_count % WINDOW_PAGES;
            for (at, word) in (0..).zip(&slot.untouched) {
                let bits = if at < whole {
                    u64::MAX
                } else {
                    (1 << rest) - 1
                };
                word.store(bits, Ordering::Relaxed);
            }
        }
        for slot in &self.slots {
            if let Err(error) = self.set_flags(slot, KVM_MEM_LOG_DIRTY_PAGES) {
                if let Err(second) = self.stop_all() {
                    log::warn!("could not end the dirty log of all slots: {second}");
                }
                return Err(error);
            }
        }
        *logging = true;
        Ok(())
    }

    fn stop(&self) -> io::Result<()> {
        let mut logging = self.logging.lock().unwrap_or_else(PoisonError::into_inner);
        if *logging {
            self.stop_all()?;
            *logging = false;
        }
        Ok(())
    }

    fn fetch(&self, slot: u32, bitmap: &mut [u64]) -> io::Result<()> {
        let slot = self.slot(slot)?;
        let region = &slot.region;
        get_dirty_log(&self.fd, region.slot, region.page_count, bitmap)?;
        for (untouched, word) in slot.untouched.iter().zip(bitmap) {
            *word |= untouched.load(Ordering::Acquire);
        }
        Ok(())
    }

    fn rearm(&self, slot: u32, first_page: u64, page_count: u64, bits: &[u64]) -> io::Result<()> {
        let slot = self.slot(slot)?;
        let region = &slot.region;
        let end = first_page.saturating_add(page_count);
        let whole_words = first_page.is_multiple_of(WINDOW_PAGES)
            && (page_count.is_multiple_of(WINDOW_PAGES) || end == region.page_count);
        let count = u32::try_from(page_count).ok();
        let (true, true, Some(count)) = (whole_words, end <= region.page_count, count) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{page_count} pages from {first_page} on are no window of the dirty log"),
            ));
        };
        // Ours first: a page is then dirty in at least one of the two until it is protected, and
        // a store in between sets KVM's bit anew.
        let first_word = bitmap_words(first_page);
        for (untouched, mask) in slot.untouched.iter().skip(first_word).zip(bits) {
            untouched.fetch_and(!mask, Ordering::AcqRel);
        }
        clear_dirty_log(&self.fd, region.slot, first_page, count, bits)
    }
}

#[cfg(test)]
mod tests {
    use kvm_ioctls::Kvm;

    use super::*;
    use crate::guest::Backing;
    use crate::page::{Gfn, PAGE_BYTES, runs_of_set_bits};
    use crate::sys::anon::map_anonymous;

    const PAGES: u64 = 100;

    /// A log of one slot that no vCPU ever writes.
    fn log(mode: Mode) -> Option<KvmDirtyLog> {
        if std::env::var_os("LIVEPOINT_NO_KVM").is_some_and(|value| value == "1") {
            println!("skipped: no KVM (LIVEPOINT_NO_KVM=1)");
            return None;
        }
        let vm = Kvm::new().unwrap().create_vm().unwrap();
        let region = MemoryRegion {
            slot: 3,
            start: Gfn(16),
            page_count: PAGES,
            mapping: map_anonymous(100 * PAGE_BYTES, false).unwrap(),
            backing: Backing::Anonymous { huge: false },
        };
        let gpa = region.start.gpa();
        set_memory_slot(vm_fd(&vm), 3, 0, gpa, &region.mapping).unwrap();
        let mut log = KvmDirtyLog::new(vm, &[(region.clone(), 0)]).unwrap();
        log.mode = mode;
        log.slots = vec![Slot::new(&region, 0, mode)];
        Some(log)
    }

    fn dirty(log: &KvmDirtyLog) -> Vec<(u64, u64)> {
        let mut bits = [0; 2];
        log.fetch(3, &mut bits).unwrap();
        runs_of_set_bits(&bits).collect()
    }

    #[test]
    fn all_pages_are_dirty_until_rearmed_whatever_the_kernel_has() {
        for mode in [Mode::InitiallySet, Mode::InitiallyClear] {
            let Some(log) = log(mode) else { return };
            for _ in 0..2 {
                log.start().unwrap();
                assert_eq!(dirty(&log), [(0, PAGES)], "{mode:?}");
                log.rearm(3, 0, 64, &[0b110]).unwrap();
                assert_eq!(dirty(&log), [(0, 1), (3, PAGES - 3)], "{mode:?}");
                log.rearm(3, 64, 36, &[u64::MAX]).unwrap();
                assert_eq!(dirty(&log), [(0, 1), (3, 61)], "{mode:?}");
                log.stop().unwrap();
            }
        }
    }
}
