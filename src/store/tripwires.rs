//! The format's constants once more: a change that would make old images unreadable must not
//! compile until this file and `docs/format.md` say the same.

use std::mem::{align_of, offset_of, size_of};

use crate::page::{PAGE_BYTES, PIECE_PAGES};
use crate::store::format::{
    CHUNK_BYTES_MAX, CHUNK_COUNT_MAX, CHUNK_PAGES_MAX, CHUNK_RECORD_BYTES, ChunkCodec, ChunkRecord,
    DIGEST_BYTES, EXTENT_ALIGN, FORMAT_MAJOR, FORMAT_MINOR, HEADER_BYTES, HEADER_BYTES_FIELD,
    HeaderRecord, IMAGE_BYTES_MAX, MAGIC, MANIFEST_BYTES_MAX, NO_CHUNK, PAGE_BYTES_FIELD,
    PAGES_MAX, REGION_COUNT_MAX, RUN_COUNT_MAX, RUN_RECORD_BYTES, RunRecord, SECTION_COUNT_MAX,
    SECTION_KIND_BYTES_MAX, STATE_BYTES_MAX,
};

const _: () = assert!(u64::from_le_bytes(MAGIC) == 0x0a1a_0a0d_4950_4c89);
const _: () = assert!(FORMAT_MAJOR == 0 && FORMAT_MINOR == 2);
const _: () = assert!(PAGE_BYTES == 4096 && PIECE_PAGES == 512);
const _: () = assert!(HEADER_BYTES == 4096 && EXTENT_ALIGN == 4096 && DIGEST_BYTES == 32);
const _: () = assert!(HEADER_BYTES_FIELD == 4096 && PAGE_BYTES_FIELD == 4096);

const _: () = assert!(size_of::<HeaderRecord>() == HEADER_BYTES && align_of::<HeaderRecord>() == 1);
const _: () = assert!(offset_of!(HeaderRecord, major) == 8);
const _: () = assert!(offset_of!(HeaderRecord, reader_major) == 12);
const _: () = assert!(offset_of!(HeaderRecord, header_bytes) == 16);
const _: () = assert!(offset_of!(HeaderRecord, page_bytes) == 20);
const _: () = assert!(offset_of!(HeaderRecord, image_uuid) == 24);
const _: () = assert!(offset_of!(HeaderRecord, guest_uuid) == 40);
const _: () = assert!(offset_of!(HeaderRecord, file_bytes) == 56);
const _: () = assert!(offset_of!(HeaderRecord, manifest_offset) == 64);
const _: () = assert!(offset_of!(HeaderRecord, manifest_bytes) == 72);
const _: () = assert!(offset_of!(HeaderRecord, root) == 80);
const _: () = assert!(offset_of!(HeaderRecord, reserved) == 112);
const _: () = assert!(offset_of!(HeaderRecord, crc) == 4092);

const _: () = assert!(CHUNK_RECORD_BYTES == 64 && size_of::<ChunkRecord>() == 64);
const _: () = assert!(offset_of!(ChunkRecord, stored_bytes) == 8);
const _: () = assert!(offset_of!(ChunkRecord, page_count) == 12);
const _: () = assert!(offset_of!(ChunkRecord, codec) == 14);
const _: () = assert!(offset_of!(ChunkRecord, digest) == 16);
const _: () = assert!(offset_of!(ChunkRecord, crc) == 60);
const _: () = assert!(ChunkCodec::None.code() == 0);
const _: () = assert!(ChunkCodec::Lz4.code() == 1);
const _: () = assert!(ChunkCodec::Zstd.code() == 2);
const _: () = assert!(CHUNK_PAGES_MAX == 512 && CHUNK_BYTES_MAX == 2 << 20);

const _: () = assert!(RUN_RECORD_BYTES == 24 && size_of::<RunRecord>() == 24);
const _: () = assert!(offset_of!(RunRecord, page_count) == 8);
const _: () = assert!(offset_of!(RunRecord, chunk) == 12);
const _: () = assert!(offset_of!(RunRecord, first_page) == 16);
const _: () = assert!(offset_of!(RunRecord, crc) == 20);
const _: () = assert!(NO_CHUNK == 0xffff_ffff);

// Limits may grow, never shrink: an image written under the old one must still open.
const _: () = assert!(CHUNK_COUNT_MAX >= (1 << 24) - 1 && RUN_COUNT_MAX >= 1 << 28);
const _: () = assert!(PAGES_MAX >= 1 << 32 && REGION_COUNT_MAX >= 32_764);
const _: () = assert!(SECTION_COUNT_MAX >= 16_384 && SECTION_KIND_BYTES_MAX >= 64);
const _: () = assert!(STATE_BYTES_MAX >= 512 << 20);
const _: () = assert!(MANIFEST_BYTES_MAX >= 4 << 20 && IMAGE_BYTES_MAX >= 64 << 40);
