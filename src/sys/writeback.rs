//! Starting to write dirty pages of a file to its disk, without waiting.
#![expect(
    unsafe_code,
    reason = "sync_file_range(2) has no safe wrapper in rustix"
)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// Starts the write-back of `bytes` bytes of `file` at `offset`.
///
/// Makes nothing durable: it only keeps a later sync short. May block while the disk's queue is
/// full.
pub fn start(file: &File, offset: u64, bytes: u64) -> io::Result<()> {
    let out_of_range = |_| io::Error::from(io::ErrorKind::InvalidInput);
    let offset = i64::try_from(offset).map_err(out_of_range)?;
    let bytes = i64::try_from(bytes).map_err(out_of_range)?;
    let fd = file.as_raw_fd();
    // SAFETY: the call takes no pointer, and `fd` is open for as long as `file` is borrowed.
    let rc = unsafe { libc::sync_file_range(fd, offset, bytes, libc::SYNC_FILE_RANGE_WRITE) };
    if rc == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_file_takes_it_and_a_range_of_no_file_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        start(&file, 0, 8192).unwrap();
        assert!(start(&file, u64::MAX, 1).is_err());
    }
}
