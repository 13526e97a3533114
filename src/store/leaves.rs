//! Digests of the leaves of chunks: a few pages of a chunk are checked without the rest of it.
//!
//! A chunk's digest is the root of BLAKE3's tree over its bytes. The digest of a leaf is a node of
//! that tree, and is kept only where the leaves together make the chunk's digest: it says of its
//! leaf what the chunk's says of the whole. They are in memory alone; the image has none.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use blake3::hazmat::{
    ChainingValue, HasherExt as _, Mode, merge_subtrees_non_root, merge_subtrees_root,
};

use crate::page::PAGE_BYTES;
use crate::store::format::{Chunk, ChunkCodec, Digest, wide};

/// Pages of a leaf. BLAKE3 hashes sixteen KiB side by side where the CPU has AVX-512; smaller leaves
/// would be hashed at half its speed.
pub(crate) const LEAF_PAGES: usize = 4;

/// Bytes of a leaf; the last one of a chunk may be shorter.
pub(crate) const LEAF_BYTES: usize = LEAF_PAGES * PAGE_BYTES;

/// More chunks than this many times those of the chain's last image are not remembered.
const SPARE_FACTOR: usize = 2;

/// Remembers the digests of the leaves of chunks, by the digests of the chunks.
///
/// Takes 32 bytes for 16 KiB of chunk. May be used from any thread.
#[derive(Debug, Default)]
pub struct LeafDigests {
    chunks: Mutex<HashMap<Digest, Arc<[ChainingValue]>>>,
}

/// The digest of a chunk's bytes, and those of their leaves.
#[derive(Debug)]
pub(crate) struct Split {
    pub(crate) digest: Digest,
    leaves: Vec<ChainingValue>,
}

impl Split {
    /// Digests `bytes`, as [`Digest::of`] does.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        let leaves: Vec<_> = (0..)
            .zip(bytes.chunks(LEAF_BYTES))
            .map(|(number, leaf)| digest_leaf(number, leaf))
            .collect();
        match root(&leaves) {
            Some(digest) => Self { digest, leaves },
            // A single leaf is the root itself.
            None => Self {
                digest: Digest::of(bytes),
                leaves: Vec::new(),
            },
        }
    }
}

impl LeafDigests {
    /// Remembers the leaves of a chunk, which has this digest.
    pub(crate) fn keep(&self, split: Split) {
        if !split.leaves.is_empty() {
            self.lock().insert(split.digest, split.leaves.into());
        }
    }

    /// Returns the digests of a chunk's leaves, where they are known and the pages are stored as
    /// they are.
    pub(crate) fn of(&self, chunk: &Chunk) -> Option<Arc<[ChainingValue]>> {
        let plain = chunk.codec == ChunkCodec::None;
        plain.then(|| self.lock().get(&chunk.digest).cloned())?
    }

    /// Forgets others than `chunks` where there are many of them.
    pub(crate) fn forget_others(&self, chunks: &[Chunk]) {
        let mut known = self.lock();
        if known.len() > chunks.len().saturating_mul(SPARE_FACTOR) {
            let kept: HashSet<&Digest> = chunks.iter().map(|chunk| &chunk.digest).collect();
            known.retain(|digest, _| kept.contains(digest));
        }
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        *self.lock() = HashMap::new();
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Arc<[ChainingValue]>>> {
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the digest of leaf `number` of a chunk of more than one.
pub(crate) fn digest_leaf(number: usize, bytes: &[u8]) -> ChainingValue {
    let mut hasher = blake3::Hasher::new();
    hasher.set_input_offset(wide(number * LEAF_BYTES));
    hasher.update(bytes);
    hasher.finalize_non_root()
}

/// Returns the digest of a chunk with these leaves; `None` for one leaf, which has no node of its own.
fn root(leaves: &[ChainingValue]) -> Option<Digest> {
    let (left, right) = halves(leaves)?;
    let root = merge_subtrees_root(&node(left), &node(right), Mode::Hash);
    Some(Digest(*root.as_bytes()))
}

/// Returns the node of BLAKE3's tree over these leaves.
fn node(leaves: &[ChainingValue]) -> ChainingValue {
    match (halves(leaves), leaves) {
        (Some((left, right)), _) => merge_subtrees_non_root(&node(left), &node(right), Mode::Hash),
        (None, [leaf]) => *leaf,
        (None, _) => unreachable!("only one leaf, or none, is not halved"),
    }
}

/// Returns the leaves of the left subtree, which is the largest full one that leaves something to
/// the right, and those of the right one.
fn halves(leaves: &[ChainingValue]) -> Option<(&[ChainingValue], &[ChainingValue])> {
    let left = leaves.len().next_power_of_two() / 2;
    (leaves.len() > 1).then(|| leaves.split_at(left))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::format::CHUNK_PAGES_MAX;

    fn pages(count: usize) -> Vec<u8> {
        let byte = |number: usize, at: usize| u8::try_from((number * 31 + at / 7) % 251).unwrap();
        let page = |number: usize| (0..PAGE_BYTES).map(move |at| byte(number, at));
        (0..count).flat_map(page).collect()
    }

    fn chunk_of(bytes: &[u8], codec: ChunkCodec) -> Chunk {
        Chunk {
            offset: 4096,
            stored_bytes: u32::try_from(bytes.len()).unwrap(),
            page_count: u16::try_from(bytes.len() / PAGE_BYTES).unwrap(),
            codec,
            digest: Digest::of(bytes),
        }
    }

    #[test]
    fn leaves_of_a_chunk_of_any_length_make_its_digest() {
        for count in (1..40).chain([63, 64, 65, 127, 128, 129, 511, CHUNK_PAGES_MAX]) {
            let bytes = pages(count);
            let split = Split::of(&bytes);
            assert_eq!(split.digest, Digest::of(&bytes), "{count} pages");
            let known = LeafDigests::default();
            known.keep(split);
            let chunk = chunk_of(&bytes, ChunkCodec::None);
            assert_eq!(known.of(&chunk).is_some(), count > LEAF_PAGES, "{count}");
            assert!(known.of(&chunk_of(&bytes, ChunkCodec::Lz4)).is_none());
        }
    }

    #[test]
    fn a_leaf_has_its_digest_only_in_its_place_and_whole() {
        let bytes = vec![7; 6 * LEAF_BYTES - PAGE_BYTES];
        let known = LeafDigests::default();
        known.keep(Split::of(&bytes));
        let leaves = known.of(&chunk_of(&bytes, ChunkCodec::None)).unwrap();
        assert_eq!(leaves.len(), 6);
        for (number, leaf) in bytes.chunks(LEAF_BYTES).enumerate() {
            assert_eq!(digest_leaf(number, leaf), leaves[number]);
            assert_ne!(digest_leaf(number + 1, leaf), leaves[number]);
            let mut flipped = leaf.to_vec();
            *flipped.last_mut().unwrap() ^= 1;
            assert_ne!(digest_leaf(number, &flipped), leaves[number]);
        }
    }

    #[test]
    fn what_no_image_has_is_forgotten_once_there_is_much_of_it() {
        let known = LeafDigests::default();
        let chunks: Vec<_> = (5..11)
            .map(|count| {
                let bytes = pages(count);
                known.keep(Split::of(&bytes));
                chunk_of(&bytes, ChunkCodec::None)
            })
            .collect();
        known.forget_others(&chunks[..3]);
        assert!(chunks.iter().all(|chunk| known.of(chunk).is_some()));
        known.forget_others(&chunks[..2]);
        let left = chunks.iter().filter(|chunk| known.of(chunk).is_some());
        assert_eq!(left.count(), 2);
        known.clear();
        assert!(known.of(&chunks[0]).is_none());
    }
}
