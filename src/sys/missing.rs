//! userfaultfd in missing mode: threads that touch memory which is not there wait until somebody
//! puts it there (Documentation/admin-guide/mm/userfaultfd.rst in the kernel's tree).
#![expect(
    unsafe_code,
    reason = "no kept crate makes a userfaultfd with features that Debian 12's headers lack"
)]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use linux_raw_sys::general::{
    _UFFDIO_COPY, UFFD_FEATURE_MOVE, UFFDIO_REGISTER_MODE_MISSING, uffdio_copy, uffdio_move,
    uffdio_range, uffdio_register,
};

use super::mapping::GuestMapping;
use super::userfault::{
    READ, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, WRITE, api, check, number, open, range,
    read_faults,
};

const UFFDIO_COPY: u64 = 0xC028_AA03;
const UFFDIO_MOVE: u64 = 0xC028_AA05;

// Transposed direction bits or a wrong struct size must not survive compilation.
const _: () = assert!(UFFDIO_COPY == number(READ | WRITE, 0x03, size_of::<uffdio_copy>()));
const _: () = assert!(UFFDIO_MOVE == number(READ | WRITE, 0x05, size_of::<uffdio_move>()));

/// A userfaultfd that holds whoever touches memory that is not there yet.
///
/// Dropping it lets everybody go; what is not there then reads as zeros. All methods may be called
/// from any thread.
#[derive(Debug)]
pub struct MissingPages {
    fd: OwnedFd,
    can_move: bool,
}

impl AsFd for MissingPages {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl MissingPages {
    /// Makes one that holds those in the kernel too, as KVM and system calls are.
    ///
    /// Fails with `PermissionDenied` for a process without `CAP_SYS_PTRACE` that may not open
    /// `/dev/userfaultfd`.
    pub fn new() -> io::Result<Self> {
        // As for write protection: one descriptor asks what there is, another takes it.
        let moves = api(&open()?, 0)? & u64::from(UFFD_FEATURE_MOVE);
        let fd = open()?;
        api(&fd, moves)?;
        Ok(Self {
            fd,
            can_move: moves != 0,
        })
    }

    /// Returns whether pages can be moved in rather than copied (Linux 6.8): huge pages stay whole.
    pub fn can_move(&self) -> bool {
        self.can_move
    }

    /// Takes charge of a range of anonymous memory. Fails with `ResourceBusy` where another
    /// userfaultfd has it.
    pub fn register(&self, mapping: &GuestMapping, offset: usize, len: usize) -> io::Result<()> {
        let mut arg = uffdio_register {
            range: range(mapping, offset, len),
            mode: u64::from(UFFDIO_REGISTER_MODE_MISSING),
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `arg` during the call; registering changes how
        // faults on guest memory are answered and none of its bytes.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, &raw mut arg) })?;
        if arg.ioctls & (1 << _UFFDIO_COPY) == 0 {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(())
    }

    /// Gives a mapping up and lets everybody go who waits there: what is not there then reads as
    /// zeros. A mapping that is not registered is no error.
    pub fn unregister(&self, mapping: &GuestMapping) -> io::Result<()> {
        let mut arg = range(mapping, 0, mapping.len());
        // SAFETY: the kernel reads `arg` during the call, and changes no byte of the mapping.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, &raw mut arg) })?;
        self.wake(mapping, 0, mapping.len())
    }

    /// Lets those go who wait in a range; who finds nothing there again waits again.
    pub fn wake(&self, mapping: &GuestMapping, offset: usize, len: usize) -> io::Result<()> {
        let mut arg: uffdio_range = range(mapping, offset, len);
        // SAFETY: the kernel reads `arg` during the call, and changes no byte of the mapping.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, &raw mut arg) })
    }

    /// Moves the first `len` bytes of `source`, which are not there any more then, to `offset`,
    /// where nothing is yet; and lets those go who wait there. Huge pages stay whole where both
    /// are aligned to them.
    ///
    /// # Panics
    /// When a range is not inside its mapping.
    pub fn move_in(
        &self,
        mapping: &GuestMapping,
        offset: usize,
        source: &GuestMapping,
        len: usize,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let mut arg = uffdio_move {
                dst: range(mapping, offset + done, len - done).start,
                src: range(source, done, len - done).start,
                len: (len - done) as u64,
                mode: 0,
                move_: 0,
            };
            // SAFETY: the kernel reads and writes `arg` during the call. Both ranges are inside
            // mappings of ours to whose bytes no Rust reference exists.
            let result =
                check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_MOVE, &raw mut arg) });
            done += progress(result, arg.move_)?;
        }
        Ok(())
    }

    /// Copies `data`, whole pages, to `offset`, where nothing is yet; and lets those go who wait
    /// there.
    ///
    /// # Panics
    /// When the range is not inside the mapping.
    pub fn copy_in(&self, mapping: &GuestMapping, offset: usize, data: &[u8]) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let rest = &data[done..];
            let mut arg = uffdio_copy {
                dst: range(mapping, offset + done, rest.len()).start,
                src: rest.as_ptr() as u64,
                len: rest.len() as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: the kernel reads and writes `arg`, and reads `rest`, during the call; the
            // destination is inside a mapping to whose bytes no Rust reference exists.
            let result =
                check(unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, &raw mut arg) });
            done += progress(result, arg.copy)?;
        }
        Ok(())
    }

    /// Appends the addresses that threads wait at; returns false where nobody waits. Does not
    /// block; each address is told to one caller only.
    pub fn read_faults(&self, addresses: &mut Vec<usize>) -> io::Result<bool> {
        read_faults(self.fd.as_fd(), addresses)
    }
}

/// Returns how far a call came; one that came a part of the way, or found the address space just
/// being changed, is made again.
fn progress(result: io::Result<()>, done: i64) -> io::Result<usize> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        Err(_) if done <= 0 => {
            std::thread::yield_now();
            Ok(0)
        }
        _ => Ok(usize::try_from(done).expect("a length inside a mapping")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PIECE_BYTES;
    use crate::sys::anon::{map_anonymous, populate};
    use std::thread;
    use std::time::Duration;

    fn fault(missing: &MissingPages) -> usize {
        let mut addresses = Vec::new();
        while addresses.is_empty() {
            missing.read_faults(&mut addresses).unwrap();
            thread::sleep(Duration::from_micros(100));
        }
        addresses[0]
    }

    #[test]
    fn a_reader_waits_until_its_piece_is_there() {
        let missing = MissingPages::new().unwrap();
        let memory = map_anonymous(4 * PIECE_BYTES, true).unwrap();
        missing.register(&memory, 0, 3 * PIECE_BYTES).unwrap();
        let source = map_anonymous(PIECE_BYTES, true).unwrap();
        let read = |piece: usize| {
            let mut byte = [9];
            memory.copy_out(piece * PIECE_BYTES + 5000, &mut byte);
            byte[0]
        };
        thread::scope(|scope| {
            for piece in 0..3 {
                let reader = scope.spawn(move || read(piece));
                let at = fault(&missing) - memory.hva();
                assert_eq!(at / PIECE_BYTES, piece);
                assert!(!reader.is_finished());
                let offset = piece * PIECE_BYTES;
                if piece == 0 && missing.can_move() {
                    populate(&source, 0, PIECE_BYTES).unwrap();
                    source.copy_in(5000, &[7]);
                    missing
                        .move_in(&memory, offset, &source, PIECE_BYTES)
                        .unwrap();
                    assert_eq!(reader.join().unwrap(), 7);
                } else if piece < 2 {
                    missing
                        .copy_in(&memory, offset, &vec![8; PIECE_BYTES])
                        .unwrap();
                    assert_eq!(reader.join().unwrap(), 8);
                } else {
                    missing.unregister(&memory).unwrap();
                    assert_eq!(reader.join().unwrap(), 0, "given up");
                }
            }
        });
        assert_eq!(read(3), 0, "never registered");
    }
}
