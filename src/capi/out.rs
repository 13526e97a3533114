//! Result structs: extensible by `struct_size`, as option structs are.

use std::mem::size_of;

use super::status::Failure;

/// A plain struct that the caller has sized and we fill.
pub(super) trait SizedOut: Copy {
    /// The struct's size in the first release that had it.
    const SIZE_FIRST: usize;
    /// Puts the size that the caller gave back.
    fn set_size(&mut self, size: usize);
}

/// Checks what [`fill`] would, before anything is done that cannot be undone.
///
/// # Safety
/// `out` is null or points to `out->struct_size` readable bytes.
pub(super) unsafe fn check_size<T: SizedOut>(out: *const T, name: &str) -> Result<usize, Failure> {
    if out.is_null() {
        return Err(Failure::invalid(format!("{name} is NULL")));
    }
    // SAFETY: not null; every such struct starts with its size.
    let size = unsafe { out.cast::<usize>().read_unaligned() };
    if size < T::SIZE_FIRST {
        return Err(Failure::invalid(format!(
            "{name}->struct_size is {size}: set it to sizeof the struct before the call"
        )));
    }
    Ok(size)
}

/// Fills as much of the caller's struct as it has; what it has more is left alone.
///
/// # Safety
/// `out` is null or points to `out->struct_size` readable and writable bytes.
pub(super) unsafe fn fill<T: SizedOut>(
    out: *mut T,
    mut value: T,
    name: &str,
) -> Result<(), Failure> {
    // SAFETY: by the contract.
    let size = unsafe { check_size(out, name) }?;
    value.set_size(size);
    let shared = size.min(size_of::<T>());
    // SAFETY: `shared` bytes are ours to read, and the caller's to write by the contract.
    unsafe {
        std::ptr::copy_nonoverlapping((&raw const value).cast::<u8>(), out.cast(), shared);
    }
    Ok(())
}
