//! `KVM_RUN` and the page that it shares with user space.
//!
//! kvm-ioctls decodes exits too, but needs the vCPU exclusively while it runs and hides the unit
//! of a port access, so that `rep outsb` of 4 bytes and `outl` look alike.
#![expect(
    unsafe_code,
    reason = "the page is memory that the kernel writes during the ioctl"
)]

use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::{self, NonNull};

use kvm_bindings::{
    KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR, KVM_EXIT_IO,
    KVM_EXIT_IO_OUT, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN, KVM_EXIT_SYSTEM_EVENT, kvm_run,
    kvm_run__bindgen_ty_1__bindgen_ty_2 as FailEntry, kvm_run__bindgen_ty_1__bindgen_ty_4 as Io,
    kvm_run__bindgen_ty_1__bindgen_ty_6 as Mmio, kvm_run__bindgen_ty_1__bindgen_ty_13 as Internal,
};
use kvm_ioctls::VcpuFd;

use super::kvm::vcpu_fd;

const KVM_RUN: u64 = 0xAE80;

/// Where the part of the page that depends on the exit reason starts.
const EXIT: usize = offset_of!(kvm_run, __bindgen_anon_1);

/// Words of detail that an internal error may carry.
const INTERNAL_WORDS_MAX: usize = 16;

/// A port access: `count` units of `unit_bytes` each, at one port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortAccess {
    /// The port.
    pub port: u16,
    /// 1, 2 or 4.
    pub unit_bytes: usize,
    /// More than 1 for string instructions.
    pub count: usize,
}

/// Why a vCPU left the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest wrote a port; [`VcpuRun::port_data`] has the bytes.
    PortOut(PortAccess),
    /// The guest reads a port; [`VcpuRun::set_port_data`] answers.
    PortIn(PortAccess),
    /// The guest wrote memory that no slot maps.
    MmioWrite {
        /// Guest physical address.
        gpa: u64,
        /// The bytes, of which `len` count.
        data: [u8; 8],
        /// 1 to 8.
        len: usize,
    },
    /// The guest reads memory that no slot maps; [`VcpuRun::set_mmio_data`] answers.
    MmioRead {
        /// Guest physical address.
        gpa: u64,
        /// 1 to 8.
        len: usize,
    },
    /// The guest halted, and no irqchip in the kernel can wake it.
    Halt,
    /// Triple fault.
    Shutdown,
    /// The CPU refused to enter the guest.
    FailEntry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM cannot go on, mostly because it cannot emulate an instruction.
    InternalError {
        /// KVM's class of the error.
        suberror: u32,
        /// What KVM adds to it.
        details: Vec<u64>,
    },
    /// A paravirtual reset, shutdown or crash call.
    SystemEvent {
        /// KVM's type of the event.
        kind: u32,
    },
    /// Nothing to do but to run again.
    Interrupted,
    /// An exit that nothing enables.
    Other {
        /// KVM's exit reason.
        reason: u32,
    },
}

/// Runs one vCPU, and reads the page that describes its exits.
#[derive(Debug)]
pub struct VcpuRun {
    fd: OwnedFd,
    page: NonNull<u8>,
    len: usize,
}

// SAFETY: the page is reached only through `&self` and `&mut self`, by volatile accesses, and the
// mapping does not depend on the thread.
unsafe impl Send for VcpuRun {}

impl VcpuRun {
    /// Maps the page of `vcpu`; `len` is what `KVM_GET_VCPU_MMAP_SIZE` says.
    pub fn new(vcpu: &VcpuFd, len: usize) -> io::Result<Self> {
        assert!(
            len >= size_of::<kvm_run>(),
            "KVM's page is shorter than kvm_run"
        );
        let fd = vcpu_fd(vcpu).try_clone_to_owned()?;
        // SAFETY: a new shared mapping at an address that the kernel chooses replaces nothing.
        let page = unsafe {
            rustix::mm::mmap(
                ptr::null_mut(),
                len,
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                &fd,
                0,
            )
        }?;
        let page = NonNull::new(page.cast()).expect("mmap does not return null");
        Ok(Self { fd, page, len })
    }

    /// Enters the guest until the next exit.
    ///
    /// `Interrupted` (EINTR) after a signal or with `immediate_exit` set; `WouldBlock` (EAGAIN)
    /// after an application processor was woken by INIT or SIPI: run again in both cases.
    pub fn run(&mut self) -> io::Result<Exit> {
        // SAFETY: KVM_RUN takes no argument; the kernel writes the mapped page, which only
        // volatile accesses of ours read, and guest memory, to which no Rust reference exists.
        let result = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) };
        if result == 0 {
            Ok(self.exit())
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Makes the next [`VcpuRun::run`] complete the pending exit and return at once.
    pub fn set_immediate_exit(&self, on: bool) {
        let at = offset_of!(kvm_run, immediate_exit);
        // SAFETY: the byte is inside the page (its length is checked in `new`), and the kernel
        // expects it to change at any time.
        unsafe {
            self.page
                .as_ptr()
                .wrapping_add(at)
                .write_volatile(u8::from(on));
        };
    }

    /// Returns whether the next [`VcpuRun::run`] returns at once.
    pub fn immediate_exit(&self) -> bool {
        self.read::<u8>(offset_of!(kvm_run, immediate_exit)) != 0
    }

    fn read<T: Copy>(&self, at: usize) -> T {
        assert!(
            at + size_of::<T>() <= size_of::<kvm_run>(),
            "outside kvm_run"
        );
        let source = self.page.as_ptr().wrapping_add(at).cast::<T>();
        // SAFETY: inside the page by the assertion and the check in `new`; callers name plain
        // integer structs, and the offsets come from `kvm_run`'s layout, so it is aligned.
        unsafe { source.read_volatile() }
    }

    fn exit(&self) -> Exit {
        match self.read::<u32>(offset_of!(kvm_run, exit_reason)) {
            KVM_EXIT_IO => self.port_exit(),
            KVM_EXIT_MMIO => {
                let mmio: Mmio = self.read(EXIT);
                let len = (mmio.len as usize).min(mmio.data.len());
                let gpa = mmio.phys_addr;
                if mmio.is_write == 0 {
                    Exit::MmioRead { gpa, len }
                } else {
                    Exit::MmioWrite {
                        gpa,
                        data: mmio.data,
                        len,
                    }
                }
            }
            KVM_EXIT_HLT => Exit::Halt,
            KVM_EXIT_SHUTDOWN => Exit::Shutdown,
            KVM_EXIT_FAIL_ENTRY => {
                let fail: FailEntry = self.read(EXIT);
                Exit::FailEntry {
                    reason: fail.hardware_entry_failure_reason,
                }
            }
            KVM_EXIT_INTERNAL_ERROR => {
                let internal: Internal = self.read(EXIT);
                let words = (internal.ndata as usize).min(INTERNAL_WORDS_MAX);
                Exit::InternalError {
                    suberror: internal.suberror,
                    details: internal.data[..words].to_vec(),
                }
            }
            KVM_EXIT_SYSTEM_EVENT => Exit::SystemEvent {
                kind: self.read(EXIT),
            },
            KVM_EXIT_INTR => Exit::Interrupted,
            reason => Exit::Other { reason },
        }
    }

    fn port_exit(&self) -> Exit {
        let io: Io = self.read(EXIT);
        let access = PortAccess {
            port: io.port,
            unit_bytes: usize::from(io.size).max(1),
            count: io.count as usize,
        };
        if u32::from(io.direction) == KVM_EXIT_IO_OUT {
            Exit::PortOut(access)
        } else {
            Exit::PortIn(access)
        }
    }

    /// Returns where the data of the port access that just exited is in the page.
    fn port_range(&self) -> (usize, usize) {
        let io: Io = self.read(EXIT);
        let at = usize::try_from(io.data_offset).expect("the kernel's offset is in the page");
        let bytes = usize::from(io.size) * io.count as usize;
        assert!(
            at.checked_add(bytes).is_some_and(|end| end <= self.len),
            "port data is outside the page"
        );
        (at, bytes)
    }

    /// Copies the bytes of the [`Exit::PortOut`] that just happened to `into`, replacing it.
    pub fn port_data(&self, into: &mut Vec<u8>) {
        let (at, bytes) = self.port_range();
        into.clear();
        into.reserve(bytes);
        for offset in at..at + bytes {
            // SAFETY: inside the page by `port_range`.
            into.push(unsafe { self.page.as_ptr().wrapping_add(offset).read_volatile() });
        }
    }

    /// Answers the [`Exit::PortIn`] that just happened; `data` is as long as the access.
    pub fn set_port_data(&mut self, data: &[u8]) {
        let (at, bytes) = self.port_range();
        assert_eq!(data.len(), bytes, "the answer is as long as the access");
        for (offset, &byte) in (at..).zip(data) {
            // SAFETY: inside the page by `port_range` and the assertion above.
            unsafe { self.page.as_ptr().wrapping_add(offset).write_volatile(byte) };
        }
    }

    /// Answers the [`Exit::MmioRead`] that just happened.
    pub fn set_mmio_data(&mut self, data: &[u8]) {
        assert!(data.len() <= 8, "an MMIO access has 8 bytes at most");
        let at = EXIT + offset_of!(Mmio, data);
        for (offset, &byte) in (at..).zip(data) {
            // SAFETY: the 8 bytes at `at` are inside `kvm_run`, and so inside the page.
            unsafe { self.page.as_ptr().wrapping_add(offset).write_volatile(byte) };
        }
    }
}

impl Drop for VcpuRun {
    fn drop(&mut self) {
        // SAFETY: the range is the mapping made in `new`, and nothing points into it.
        let result = unsafe { rustix::mm::munmap(self.page.as_ptr().cast(), self.len) };
        debug_assert!(result.is_ok(), "a mapping of ours can be unmapped");
    }
}
