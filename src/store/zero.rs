//! Finding pages of zeros, at the speed of memory.

use zerocopy::FromBytes;

use crate::page::PAGE_BYTES;

/// Bytes looked at between two decisions: wide enough for any vector unit, small enough that a
/// page with data at its start costs four cache lines.
const STRIDE_BYTES: usize = 256;

/// Returns whether every byte of `page` is zero.
///
/// # Panics
/// When `page` is not one page long.
pub fn is_zero(page: &[u8]) -> bool {
    assert_eq!(page.len(), PAGE_BYTES, "zero pages are whole pages");
    page.chunks_exact(STRIDE_BYTES).all(stride_is_zero)
}

#[inline]
fn stride_is_zero(stride: &[u8]) -> bool {
    let words = <[[u8; 8]; STRIDE_BYTES / 8]>::ref_from_bytes(stride)
        .expect("strides are of one length and bytes have no alignment");
    // No exit inside the stride: the OR of independent words is what vectorises.
    words
        .iter()
        .fold(0, |seen, word| seen | u64::from_ne_bytes(*word))
        == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_makes_a_page_not_zero() {
        let mut page = vec![0_u8; PAGE_BYTES + 1];
        assert!(is_zero(&page[..PAGE_BYTES]));
        assert!(is_zero(&page[1..]), "alignment does not matter");
        for at in 0..PAGE_BYTES {
            page[at] = 1 << (at % 8);
            assert!(!is_zero(&page[..PAGE_BYTES]), "byte {at}");
            page[at] = 0;
        }
    }
}
