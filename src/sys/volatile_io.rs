//! Reading files and packets into guest memory, and writing them from it, without a copy in
//! between.
#![expect(
    unsafe_code,
    reason = "the kernel takes guest memory by address; no crate passes it to preadv and pwritev"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;
use vm_memory::volatile_memory::PtrGuardMut;

/// The most buffers of one call (`UIO_MAXIOV`).
const BUFFERS_MAX: usize = 1024;

type Call =
    unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int, libc::off_t) -> isize;

/// Fills `into` from `offset` of the file on. Bytes that were read are marked after they arrived.
///
/// A file that ends before is an error ([`io::ErrorKind::UnexpectedEof`]). Blocks for storage, and
/// for whoever has the memory write-protected.
pub fn read_at<B: BitmapSlice>(
    file: impl AsFd,
    into: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<()> {
    transfer(&file, into, offset, libc::preadv, |slice, from, len| {
        slice.bitmap().mark_dirty(from, len);
    })
}

/// Writes `from` at `offset` of the file. Blocks for storage.
pub fn write_at<B: BitmapSlice>(
    file: impl AsFd,
    from: &[VolatileSlice<'_, B>],
    offset: u64,
) -> io::Result<()> {
    transfer(&file, from, offset, libc::pwritev, |_, _, _| ())
}

fn transfer<B: BitmapSlice>(
    file: &impl AsFd,
    slices: &[VolatileSlice<'_, B>],
    offset: u64,
    call: Call,
    done: impl Fn(&VolatileSlice<'_, B>, usize, usize),
) -> io::Result<()> {
    let too_far = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let mut offset = libc::off_t::try_from(offset).map_err(too_far)?;
    // The slice that is next, and how much of it is done.
    let (mut next, mut skip) = (0, 0);
    while let Some(left) = slices.get(next..).filter(|left| !left.is_empty()) {
        let moved = one_call(file, left, skip, offset, call)?;
        if moved == 0 && left.iter().any(|slice| slice.len() > skip) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset += libc::off_t::try_from(moved).map_err(too_far)?;
        let mut rest = moved;
        while let Some(slice) = slices.get(next) {
            let part = rest.min(slice.len() - skip);
            done(slice, skip, part);
            rest -= part;
            skip += part;
            if skip < slice.len() {
                break;
            }
            (next, skip) = (next + 1, 0);
        }
    }
    Ok(())
}

/// Moves what one system call moves; `skip` bytes of the first slice are done already.
fn one_call<B: BitmapSlice>(
    file: &impl AsFd,
    slices: &[VolatileSlice<'_, B>],
    skip: usize,
    offset: libc::off_t,
    call: Call,
) -> io::Result<usize> {
    let guards: Vec<_> = slices
        .iter()
        .take(BUFFERS_MAX)
        .map(VolatileSlice::ptr_guard_mut)
        .collect();
    let vectors = vectors(&guards, skip);
    let count = libc::c_int::try_from(vectors.len()).expect("at most BUFFERS_MAX buffers");
    let fd = file.as_fd().as_raw_fd();
    repeat(|| {
        // SAFETY: each vector is inside a slice of guest memory, by the skip being less than the
        // first one's length, and `guards` keeps that memory mapped during the call. To guest
        // memory no Rust reference exists, so that the kernel may read and write it.
        unsafe { call(fd, vectors.as_ptr(), count, offset) }
    })
}

/// Makes vectors of guest memory; `skip` bytes of the first one are left out.
fn vectors(guards: &[PtrGuardMut], mut skip: usize) -> Vec<libc::iovec> {
    guards
        .iter()
        .map(|guard| {
            let skipped = std::mem::take(&mut skip);
            libc::iovec {
                iov_base: guard.as_ptr().wrapping_add(skipped).cast(),
                iov_len: guard.len() - skipped,
            }
        })
        .collect()
}

/// Makes a system call until no signal interrupts it.
fn repeat(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Takes one packet from a tap or a socket into `into`, and returns how many bytes it has; `None`
/// where it has more than there is room for, and is lost.
///
/// Bytes that arrived are marked. Blocks only as the descriptor does.
pub fn receive<B: BitmapSlice>(
    fd: impl AsFd,
    into: &[VolatileSlice<'_, B>],
) -> io::Result<Option<usize>> {
    // One place is for what is too much.
    let into = into.get(..BUFFERS_MAX - 1).unwrap_or(into);
    let guards: Vec<_> = into.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let mut vectors = vectors(&guards, 0);
    let mut too_much = 0_u8;
    vectors.push(libc::iovec {
        iov_base: (&raw mut too_much).cast(),
        iov_len: 1,
    });
    let count = libc::c_int::try_from(vectors.len()).expect("at most BUFFERS_MAX buffers");
    let fd = fd.as_fd().as_raw_fd();
    let moved = repeat(|| {
        // SAFETY: each vector is a slice of guest memory, which `guards` keeps mapped during the
        // call and to which no Rust reference exists, or the byte `too_much`, which outlives it.
        unsafe { libc::readv(fd, vectors.as_ptr(), count) }
    })?;
    let mut left = moved;
    for slice in into {
        let part = left.min(slice.len());
        slice.bitmap().mark_dirty(0, part);
        left -= part;
    }
    Ok((left == 0).then_some(moved))
}

/// Sends `from` as one packet to a tap or a socket. Blocks only as the descriptor does.
///
/// # Errors
///
/// [`io::ErrorKind::InvalidInput`]: more buffers than one system call takes; else the kernel's.
pub fn send<B: BitmapSlice>(fd: impl AsFd, from: &[VolatileSlice<'_, B>]) -> io::Result<()> {
    if from.len() > BUFFERS_MAX {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let guards: Vec<_> = from.iter().map(VolatileSlice::ptr_guard_mut).collect();
    let vectors = vectors(&guards, 0);
    let count = libc::c_int::try_from(vectors.len()).expect("at most BUFFERS_MAX buffers");
    let fd = fd.as_fd().as_raw_fd();
    repeat(|| {
        // SAFETY: each vector is a slice of guest memory, which `guards` keeps mapped during the
        // call, and which the kernel only reads.
        unsafe { libc::writev(fd, vectors.as_ptr(), count) }
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    #[test]
    fn scattered_memory_takes_and_gives_the_bytes_of_a_file_in_order() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..200).collect();
        file.write_all(&bytes).unwrap();
        let mut memory = vec![0; 300];
        {
            let whole = VolatileSlice::from(memory.as_mut_slice());
            let parts = [
                whole.subslice(0, 50).unwrap(),
                whole.subslice(100, 0).unwrap(),
                whole.subslice(200, 70).unwrap(),
            ];
            read_at(&file, &parts, 10).unwrap();
            write_at(&file, &parts, 1000).unwrap();
        }
        assert_eq!(memory[0..50], bytes[10..60]);
        let mut written = [0; 120];
        file.read_exact_at(&mut written, 1000).unwrap();
        assert_eq!(written, bytes[10..130]);
        let whole = VolatileSlice::from(memory.as_mut_slice());
        let past = read_at(&file, &[whole], 1010).unwrap_err();
        assert_eq!(past.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn more_buffers_than_one_call_takes_are_moved_by_several() {
        let file = tempfile::tempfile().unwrap();
        let mut memory: Vec<u8> = (0..5000_u32).map(|n| (n % 251) as u8).collect();
        let expected = memory.clone();
        let whole = VolatileSlice::from(memory.as_mut_slice());
        let parts: Vec<_> = (0..5000).map(|at| whole.subslice(at, 1).unwrap()).collect();
        write_at(&file, &parts, 0).unwrap();
        let mut written = vec![0; 5000];
        file.read_exact_at(&mut written, 0).unwrap();
        assert_eq!(written, expected);
    }
}
