//! userfaultfd in write-protect mode: threads that write protected memory wait until they are
//! let go (Documentation/admin-guide/mm/userfaultfd.rst in the kernel's tree).
#![expect(
    unsafe_code,
    reason = "no kept crate makes a userfaultfd with features that Debian 12's headers lack"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::OnceLock;

use linux_raw_sys::general::{
    _UFFDIO_WRITEPROTECT, UFFD_API, UFFD_EVENT_PAGEFAULT, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFDIO_REGISTER_MODE_WP, uffd_msg, uffdio_api, uffdio_range,
    uffdio_register, uffdio_writeprotect,
};

use super::mapping::GuestMapping;

const UFFDIO_API: u64 = 0xC018_AA3F;
pub(super) const UFFDIO_REGISTER: u64 = 0xC020_AA00;
pub(super) const UFFDIO_UNREGISTER: u64 = 0x8010_AA01;
pub(super) const UFFDIO_WAKE: u64 = 0x8010_AA02;
const UFFDIO_WRITEPROTECT: u64 = 0xC018_AA06;
/// Makes a userfaultfd from `/dev/userfaultfd` (Linux 6.1).
const USERFAULTFD_IOC_NEW: u64 = 0xAA00;

pub(super) const WRITE: u64 = 1;
pub(super) const READ: u64 = 2;

pub(super) const fn number(direction: u64, nr: u64, bytes: usize) -> u64 {
    (direction << 30) | ((bytes as u64) << 16) | (0xAA << 8) | nr
}

// Transposed direction bits or a wrong struct size must not survive compilation. (The headers call
// the direction of `UNREGISTER` and `WAKE` "read", although the kernel reads the range.)
const _: () = assert!(UFFDIO_API == number(READ | WRITE, 0x3F, size_of::<uffdio_api>()));
const _: () = assert!(UFFDIO_REGISTER == number(READ | WRITE, 0x00, size_of::<uffdio_register>()));
const _: () = assert!(UFFDIO_UNREGISTER == number(READ, 0x01, size_of::<uffdio_range>()));
const _: () = assert!(UFFDIO_WAKE == number(READ, 0x02, size_of::<uffdio_range>()));
const _: () =
    assert!(UFFDIO_WRITEPROTECT == number(READ | WRITE, 0x06, size_of::<uffdio_writeprotect>()));
const _: () = assert!(size_of::<uffd_msg>() == 32);

const MODE_WRITE_PROTECT: u64 = 1;

/// Messages that are read at once.
const BATCH: usize = 16;

/// A userfaultfd that holds writers to memory which is write-protected.
///
/// Dropping it lets every writer go and takes the protection away. All methods may be called from
/// any thread.
#[derive(Debug)]
pub struct Userfault {
    fd: OwnedFd,
    has_shared: bool,
}

impl AsFd for Userfault {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(super) fn check(result: libc::c_int) -> io::Result<()> {
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Userfault {
    /// Makes one that holds writers in the kernel too, as KVM and system calls are.
    ///
    /// Fails with `PermissionDenied` for a process without `CAP_SYS_PTRACE` that may not open
    /// `/dev/userfaultfd`, and with `Unsupported` where the kernel cannot write-protect (before
    /// Linux 5.7).
    pub fn new() -> io::Result<Self> {
        // Asking for a feature that the kernel lacks fails, and the question can be put once to
        // each descriptor: one asks what there is, another takes it.
        let offered = api(&open()?, 0)?;
        if offered & u64::from(UFFD_FEATURE_PAGEFAULT_FLAG_WP) == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let fd = open()?;
        let shared = u64::from(UFFD_FEATURE_WP_HUGETLBFS_SHMEM);
        api(
            &fd,
            u64::from(UFFD_FEATURE_PAGEFAULT_FLAG_WP) | (offered & shared),
        )?;
        Ok(Self {
            fd,
            has_shared: offered & shared != 0,
        })
    }

    /// Returns whether memory of hugetlbfs and of memfds can be protected (Linux 5.19).
    pub fn has_shared_memory(&self) -> bool {
        self.has_shared
    }

    /// Takes charge of a mapping; nothing of it is protected yet. Fails with `ResourceBusy` where
    /// another userfaultfd has it.
    pub fn register(&self, mapping: &GuestMapping) -> io::Result<()> {
        let mut arg = uffdio_register {
            range: range(mapping, 0, mapping.len()),
            mode: u64::from(UFFDIO_REGISTER_MODE_WP),
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `arg` during the call; registering changes how
        // faults on guest memory are answered and none of its bytes.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) })?;
        if arg.ioctls & (1 << _UFFDIO_WRITEPROTECT) == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    /// Gives a mapping up: takes its protection away and lets every writer go. A mapping that is
    /// not registered is no error.
    pub fn unregister(&self, mapping: &GuestMapping) -> io::Result<()> {
        let mut arg = range(mapping, 0, mapping.len());
        // SAFETY: the kernel reads `arg` during the call, and changes no byte of the mapping.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut arg) })?;
        // The kernel itself wakes only those who wait for missing pages.
        // SAFETY: as above.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &raw mut arg) })
    }

    /// Protects `len` bytes at `offset`: from now on who writes them waits. Only memory that is
    /// there is protected, where it is private and anonymous.
    ///
    /// # Panics
    /// When the range is not inside the mapping.
    pub fn protect(&self, mapping: &GuestMapping, offset: usize, len: usize) -> io::Result<()> {
        self.write_protect(range(mapping, offset, len), MODE_WRITE_PROTECT)
    }

    /// Takes the protection from `len` bytes at `offset`, and lets those go who wait there.
    ///
    /// # Panics
    /// When the range is not inside the mapping.
    pub fn unprotect(&self, mapping: &GuestMapping, offset: usize, len: usize) -> io::Result<()> {
        self.write_protect(range(mapping, offset, len), 0)
    }

    fn write_protect(&self, range: uffdio_range, mode: u64) -> io::Result<()> {
        let mut arg = uffdio_writeprotect { range, mode };
        loop {
            // SAFETY: the kernel reads `arg` during the call; protection changes no byte of guest
            // memory, to which no Rust reference exists.
            let result = check(unsafe {
                libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WRITEPROTECT, &raw mut arg)
            });
            match result {
                // The address space is just being changed (a mapping moves or a process forks).
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                result => return result,
            }
        }
    }

    /// Appends the addresses that threads wait at to write; returns false where nobody waits. Does
    /// not block; each address is told to one caller only.
    pub fn read_faults(&self, addresses: &mut Vec<usize>) -> io::Result<bool> {
        read_faults(self.fd.as_fd(), addresses)
    }
}

/// Appends the addresses that threads wait at; false where nobody waits.
pub(super) fn read_faults(fd: BorrowedFd<'_>, addresses: &mut Vec<usize>) -> io::Result<bool> {
    let mut bytes = [0_u8; BATCH * size_of::<uffd_msg>()];
    let read = match rustix::io::read(fd, &mut bytes) {
        Ok(read) => read,
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let messages = bytes[..read].chunks_exact(size_of::<uffd_msg>());
    addresses.extend(messages.filter_map(fault_address));
    Ok(read > 0)
}

/// Returns the address in a message of a page fault: its event is the first byte, the address the
/// third word.
fn fault_address(message: &[u8]) -> Option<usize> {
    let is_fault = u32::from(message[0]) == UFFD_EVENT_PAGEFAULT;
    let word = message[16..].first_chunk::<8>()?;
    is_fault.then(|| usize::try_from(u64::from_ne_bytes(*word)).expect("addresses fit usize"))
}

pub(super) fn range(mapping: &GuestMapping, offset: usize, len: usize) -> uffdio_range {
    let end = offset.checked_add(len);
    assert!(
        end.is_some_and(|end| end <= mapping.len()),
        "{len:#x} bytes at {offset:#x} are not inside {mapping:?}"
    );
    uffdio_range {
        start: (mapping.hva() + offset) as u64,
        len: len as u64,
    }
}

/// The device, where it was opened ahead.
static DEVICE: OnceLock<File> = OnceLock::new();

/// Opens the device that makes userfaultfds, for a time when this process may no longer open it.
pub fn keep_device() -> io::Result<()> {
    let device = open_device()?;
    // Kept already: the one is as good as the other.
    drop(DEVICE.set(device));
    Ok(())
}

fn open_device() -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")
}

pub(super) fn open() -> io::Result<OwnedFd> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: the call takes no pointer.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd >= 0 {
        let fd = libc::c_int::try_from(fd).expect("descriptors are small");
        // SAFETY: the kernel just made this descriptor for us.
        return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() != Some(libc::EPERM) {
        return Err(error);
    }
    let opened;
    let device = match DEVICE.get() {
        Some(device) => device,
        None => {
            opened = open_device().map_err(|_| error)?;
            &opened
        }
    };
    // SAFETY: the argument is a plain number.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Asks for `features`; returns those that the kernel has.
pub(super) fn api(fd: &OwnedFd, features: u64) -> io::Result<u64> {
    let mut arg = uffdio_api {
        api: u64::from(UFFD_API),
        features,
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes `arg` during the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut arg) })?;
    Ok(arg.features)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{PAGE_BYTES, PIECE_BYTES};
    use crate::sys::anon::{map_anonymous, populate};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;
    use std::time::Duration;

    fn wait_for_fault(userfault: &Userfault) -> usize {
        let mut addresses = Vec::new();
        while addresses.is_empty() {
            userfault.read_faults(&mut addresses).unwrap();
            thread::sleep(Duration::from_micros(100));
        }
        addresses[0]
    }

    #[test]
    fn a_writer_waits_until_it_is_let_go_and_a_reader_does_not() {
        let memory = map_anonymous(2 * PIECE_BYTES, true).unwrap();
        populate(&memory, 0, memory.len()).unwrap();
        memory.copy_in(PIECE_BYTES, &[1]);
        let userfault = Userfault::new().unwrap();
        userfault.register(&memory).unwrap();
        userfault.protect(&memory, 0, memory.len()).unwrap();
        let written = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                memory.copy_in(PIECE_BYTES + 5 * PAGE_BYTES, &[2]);
                written.store(true, Ordering::SeqCst);
            });
            let address = wait_for_fault(&userfault);
            assert_eq!((address - memory.hva()) / PIECE_BYTES, 1);
            assert!(!written.load(Ordering::SeqCst));
            let mut byte = [9];
            memory.copy_out(PIECE_BYTES, &mut byte);
            assert_eq!(byte, [1]);
            userfault
                .unprotect(&memory, PIECE_BYTES, PIECE_BYTES)
                .unwrap();
        });
        assert!(written.load(Ordering::SeqCst));
    }

    #[test]
    fn giving_a_mapping_up_lets_its_writers_go() {
        let memory = map_anonymous(PIECE_BYTES, false).unwrap();
        memory.copy_in(0, &[1]);
        let userfault = Userfault::new().unwrap();
        userfault.register(&memory).unwrap();
        userfault.protect(&memory, 0, memory.len()).unwrap();
        thread::scope(|scope| {
            scope.spawn(|| memory.copy_in(0, &[2]));
            wait_for_fault(&userfault);
            userfault.unregister(&memory).unwrap();
        });
        userfault.unregister(&memory).unwrap();
    }

    #[test]
    fn memory_that_was_never_touched_holds_nobody_up() {
        let memory = map_anonymous(PIECE_BYTES, false).unwrap();
        memory.copy_in(0, &[1]);
        let userfault = Userfault::new().unwrap();
        userfault.register(&memory).unwrap();
        userfault.protect(&memory, 0, memory.len()).unwrap();
        memory.copy_in(PAGE_BYTES, &[2]);
        assert!(!userfault.read_faults(&mut Vec::new()).unwrap());
    }
}
