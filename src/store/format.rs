//! The bytes of an image: header, chunk records, index records and their limits.
//!
//! Everything is little-endian. `docs/format.md` is the same in words; `tripwires.rs` repeats the
//! constants so that none changes by accident.

use std::fmt;

use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::page::{Gfn, PAGE_BYTES};
use crate::store::error::{Damage, Place};

/// First bytes of every image.
///
/// A byte with the top bit set, a name, CR LF, end-of-file and LF: a transfer that strips bits or
/// translates line ends breaks the magic rather than the data.
pub(crate) const MAGIC: [u8; 8] = *b"\x89LPI\r\n\x1a\n";

/// Format version before the first release; a reader opens only the minors that it knows.
pub const FORMAT_MAJOR: u16 = 0;

/// Minor version of the format.
pub const FORMAT_MINOR: u16 = 2;

/// Version of the format that an image is written in.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
pub(crate) struct FormatVersion {
    pub(crate) major: u16,
    pub(crate) minor: u16,
}

impl FormatVersion {
    /// What this build writes.
    pub(crate) const CURRENT: Self = Self {
        major: FORMAT_MAJOR,
        minor: FORMAT_MINOR,
    };

    /// The first that has layers; an image without them is for older readers too.
    pub(crate) const FIRST_WITH_LAYERS: Self = Self { major: 0, minor: 2 };

    /// The first of all.
    pub(crate) const FIRST: Self = Self { major: 0, minor: 1 };
}

/// Name suffix of an image in a chain.
pub const IMAGE_SUFFIX: &str = ".lpi";

/// Bytes of the header: one page.
pub(crate) const HEADER_BYTES: usize = PAGE_BYTES;

/// [`HEADER_BYTES`] as the header says it.
pub(crate) const HEADER_BYTES_FIELD: u32 = 4096;

/// [`PAGE_BYTES`] as header and manifest say it.
pub(crate) const PAGE_BYTES_FIELD: u32 = 4096;

/// Everything in an image starts at a multiple of this.
pub(crate) const EXTENT_ALIGN: u64 = PAGE_BYTES as u64;

/// Bytes of a digest (BLAKE3).
pub(crate) const DIGEST_BYTES: usize = 32;

/// Bytes of a chunk record.
pub(crate) const CHUNK_RECORD_BYTES: usize = 64;

/// Bytes of an index record.
pub(crate) const RUN_RECORD_BYTES: usize = 24;

/// Most pages in a chunk: one piece.
pub(crate) const CHUNK_PAGES_MAX: usize = 512;

/// Most bytes that a chunk may hold, raw or stored: compression never makes a chunk larger.
pub(crate) const CHUNK_BYTES_MAX: usize = CHUNK_PAGES_MAX * PAGE_BYTES;

/// Most chunks: the writer's page table has 24 bits for one, all ones meaning none; 32 TiB of
/// whole pieces.
pub(crate) const CHUNK_COUNT_MAX: usize = (1 << 24) - 1;

/// Most layers: each is an open file of every reader.
pub const LAYER_COUNT_MAX: usize = 64;

/// Most pages of guest memory: 16 TiB, more than KVM on x86-64 maps in practice.
pub const PAGES_MAX: u64 = 1 << 32;

/// Most index records: 1 TiB of memory in which no two neighbours are in the same run.
pub(crate) const RUN_COUNT_MAX: usize = 1 << 28;

/// Most regions: KVM has 32764 memslots.
pub(crate) const REGION_COUNT_MAX: usize = 32_764;

/// Most state sections: 4096 vCPUs with a few devices each would be 8192.
pub(crate) const SECTION_COUNT_MAX: usize = 16_384;

/// Most bytes of all state sections together: they are in memory at once.
pub(crate) const STATE_BYTES_MAX: u64 = 512 << 20;

/// Longest name of a section's kind.
pub(crate) const SECTION_KIND_BYTES_MAX: usize = 64;

/// Most bytes of manifest: the domain XML and a CPUID table take some ten KiB.
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// Largest image: 64 TiB keeps every sum of offsets far from overflow.
pub const IMAGE_BYTES_MAX: u64 = 64 << 40;

/// In an index record: the run has no data, its pages are zeros.
pub(crate) const NO_CHUNK: u32 = u32::MAX;

/// Rounds up to the next extent boundary.
pub(crate) const fn extent_end(offset: u64, bytes: u64) -> u64 {
    (offset + bytes).next_multiple_of(EXTENT_ALIGN)
}

/// Widens a length or index that is in memory.
pub(crate) const fn wide(value: usize) -> u64 {
    value as u64
}

/// Narrows a value that a limit keeps far below `usize::MAX`.
pub(crate) fn narrow(value: u64) -> usize {
    usize::try_from(value).expect("limits keep lengths inside the address space")
}

/// A BLAKE3 digest; lower-case hexadecimal in text.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Digest(pub(crate) [u8; DIGEST_BYTES]);

impl Digest {
    /// Digests `bytes`.
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = String::deserialize(deserializer)?;
        let bytes = text.as_bytes();
        if bytes.len() != DIGEST_BYTES * 2 {
            return Err(D::Error::custom("a digest has 64 hexadecimal digits"));
        }
        let mut digest = [0; DIGEST_BYTES];
        for (out, pair) in digest.iter_mut().zip(bytes.chunks_exact(2)) {
            for digit in pair {
                let value = match digit {
                    b'0'..=b'9' => digit - b'0',
                    b'a'..=b'f' => digit - b'a' + 10,
                    _ => return Err(D::Error::custom("a digest has 64 hexadecimal digits")),
                };
                *out = *out << 4 | value;
            }
        }
        Ok(Self(digest))
    }
}

/// The header as it is on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct HeaderRecord {
    pub(crate) magic: [u8; 8],
    pub(crate) major: U16,
    pub(crate) minor: U16,
    pub(crate) reader_major: U16,
    pub(crate) reader_minor: U16,
    pub(crate) header_bytes: U32,
    pub(crate) page_bytes: U32,
    pub(crate) image_uuid: [u8; 16],
    pub(crate) guest_uuid: [u8; 16],
    pub(crate) file_bytes: U64,
    pub(crate) manifest_offset: U64,
    pub(crate) manifest_bytes: U64,
    pub(crate) root: [u8; DIGEST_BYTES],
    pub(crate) reserved: [u8; 3980],
    pub(crate) crc: U32,
}

/// A decoded and checked header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) format: FormatVersion,
    /// The oldest reader that may open the image.
    pub(crate) oldest_reader: FormatVersion,
    pub(crate) image_uuid: uuid::Uuid,
    pub(crate) guest_uuid: uuid::Uuid,
    pub(crate) file_bytes: u64,
    pub(crate) manifest_offset: u64,
    pub(crate) manifest_bytes: u64,
    pub(crate) root: Digest,
}

impl Header {
    /// Encodes the header.
    pub(crate) fn encode(&self) -> HeaderRecord {
        let mut record = HeaderRecord {
            magic: MAGIC,
            major: self.format.major.into(),
            minor: self.format.minor.into(),
            reader_major: self.oldest_reader.major.into(),
            reader_minor: self.oldest_reader.minor.into(),
            header_bytes: HEADER_BYTES_FIELD.into(),
            page_bytes: PAGE_BYTES_FIELD.into(),
            image_uuid: self.image_uuid.into_bytes(),
            guest_uuid: self.guest_uuid.into_bytes(),
            file_bytes: self.file_bytes.into(),
            manifest_offset: self.manifest_offset.into(),
            manifest_bytes: self.manifest_bytes.into(),
            root: self.root.0,
            reserved: [0; 3980],
            crc: U32::ZERO,
        };
        record.crc = record_crc(record.as_bytes()).into();
        record
    }

    /// Decodes a header. Nothing after it has been looked at yet.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let damaged = |reason: String| Damage::new(Place::Header, reason);
        let Ok(record) = HeaderRecord::ref_from_bytes(bytes) else {
            return Err(damaged(format!("has {} bytes", bytes.len())));
        };
        if record.magic != MAGIC {
            return Err(damaged("is not that of a livepoint image".to_owned()));
        }
        // Versions come before the checksum: a later format may place it elsewhere.
        let reader = (record.reader_major.get(), record.reader_minor.get());
        if reader > (FORMAT_MAJOR, FORMAT_MINOR) || record.major.get() != FORMAT_MAJOR {
            return Err(damaged(format!(
                "says format {}.{}, to be read by format {}.{} or later; this build reads {FORMAT_MAJOR}.{FORMAT_MINOR}",
                record.major, record.minor, reader.0, reader.1
            )));
        }
        check_crc(record.as_bytes(), record.crc.get(), Place::Header)?;
        let sizes = (record.header_bytes.get(), record.page_bytes.get());
        if sizes != (HEADER_BYTES_FIELD, PAGE_BYTES_FIELD) {
            return Err(damaged(format!(
                "says {} bytes of header and {} of page",
                sizes.0, sizes.1
            )));
        }
        if record.reserved.iter().any(|&byte| byte != 0) {
            return Err(damaged("has bytes that must be zeros".to_owned()));
        }
        Ok(Self {
            format: FormatVersion {
                major: record.major.get(),
                minor: record.minor.get(),
            },
            oldest_reader: FormatVersion {
                major: reader.0,
                minor: reader.1,
            },
            image_uuid: uuid::Uuid::from_bytes(record.image_uuid),
            guest_uuid: uuid::Uuid::from_bytes(record.guest_uuid),
            file_bytes: record.file_bytes.get(),
            manifest_offset: record.manifest_offset.get(),
            manifest_bytes: record.manifest_bytes.get(),
            root: Digest(record.root),
        })
    }
}

/// How a chunk's payload is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ChunkCodec {
    None,
    Lz4,
    Zstd,
}

impl ChunkCodec {
    pub(crate) const fn code(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::None, Self::Lz4, Self::Zstd]
            .into_iter()
            .find(|codec| codec.code() == code)
    }
}

/// A chunk record as it is on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct ChunkRecord {
    pub(crate) offset: U64,
    pub(crate) stored_bytes: U32,
    pub(crate) page_count: U16,
    pub(crate) codec: u8,
    pub(crate) reserved_a: u8,
    pub(crate) digest: [u8; DIGEST_BYTES],
    pub(crate) reserved_b: [u8; 12],
    pub(crate) crc: U32,
}

/// A chunk: where its payload is and what it decodes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Chunk {
    pub(crate) offset: u64,
    pub(crate) stored_bytes: u32,
    pub(crate) page_count: u16,
    pub(crate) codec: ChunkCodec,
    pub(crate) digest: Digest,
}

impl Chunk {
    /// Returns the bytes of its pages.
    pub(crate) fn raw_bytes(&self) -> usize {
        usize::from(self.page_count) * PAGE_BYTES
    }

    pub(crate) fn encode(&self) -> ChunkRecord {
        let mut record = ChunkRecord {
            offset: self.offset.into(),
            stored_bytes: self.stored_bytes.into(),
            page_count: self.page_count.into(),
            codec: self.codec.code(),
            reserved_a: 0,
            digest: self.digest.0,
            reserved_b: [0; 12],
            crc: U32::ZERO,
        };
        record.crc = record_crc(record.as_bytes()).into();
        record
    }

    /// Decodes record `at` of the chunk table; where the payload may be is the caller's check.
    pub(crate) fn decode(record: &ChunkRecord, at: usize) -> Result<Self, Damage> {
        let place = Place::ChunkRecord { chunk: at };
        check_crc(record.as_bytes(), record.crc.get(), place)?;
        let codec = ChunkCodec::from_code(record.codec)
            .ok_or_else(|| Damage::new(place, format!("names unknown codec {}", record.codec)))?;
        if record.reserved_a != 0 || record.reserved_b != [0; 12] {
            return Err(Damage::new(place, "has bytes that must be zeros"));
        }
        let chunk = Self {
            offset: record.offset.get(),
            stored_bytes: record.stored_bytes.get(),
            page_count: record.page_count.get(),
            codec,
            digest: Digest(record.digest),
        };
        let raw = chunk.raw_bytes();
        let stored = narrow(u64::from(chunk.stored_bytes));
        let fits = match codec {
            ChunkCodec::None => stored == raw,
            ChunkCodec::Lz4 | ChunkCodec::Zstd => stored > 0 && stored < raw,
        };
        if raw == 0 || raw > CHUNK_BYTES_MAX || !fits {
            return Err(Damage::new(
                place,
                format!("stores {} pages in {stored} bytes", chunk.page_count),
            ));
        }
        Ok(chunk)
    }
}

/// An index record as it is on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(crate) struct RunRecord {
    pub(crate) start: U64,
    pub(crate) page_count: U32,
    pub(crate) chunk: U32,
    pub(crate) first_page: U16,
    pub(crate) reserved: U16,
    pub(crate) crc: U32,
}

/// A run of guest frames and where their bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IndexRun {
    pub(crate) start: Gfn,
    pub(crate) page_count: u32,
    pub(crate) source: RunSource,
}

/// Where the bytes of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RunSource {
    /// Nowhere: the pages are zeros.
    Zero,
    /// In consecutive pages of a chunk.
    Chunk { chunk: u32, first_page: u16 },
}

impl IndexRun {
    /// Returns the frame after the last one; decoded runs are inside a region, so it exists.
    pub(crate) fn end(&self) -> Gfn {
        Gfn(self.start.0 + u64::from(self.page_count))
    }

    pub(crate) fn encode(&self) -> RunRecord {
        let (chunk, first_page) = match self.source {
            RunSource::Zero => (NO_CHUNK, 0),
            RunSource::Chunk { chunk, first_page } => (chunk, first_page),
        };
        let mut record = RunRecord {
            start: self.start.0.into(),
            page_count: self.page_count.into(),
            chunk: chunk.into(),
            first_page: first_page.into(),
            reserved: U16::ZERO,
            crc: U32::ZERO,
        };
        record.crc = record_crc(record.as_bytes()).into();
        record
    }

    /// Decodes record `at` of the page index; coverage and chunks are the caller's checks.
    pub(crate) fn decode(record: &RunRecord, at: usize) -> Result<Self, Damage> {
        let place = Place::Run { run: at };
        check_crc(record.as_bytes(), record.crc.get(), place)?;
        let first_page = record.first_page.get();
        let source = match record.chunk.get() {
            NO_CHUNK if first_page == 0 => RunSource::Zero,
            NO_CHUNK => return Err(Damage::new(place, "is of zeros and names a page")),
            chunk => RunSource::Chunk { chunk, first_page },
        };
        if record.reserved.get() != 0 {
            return Err(Damage::new(place, "has bytes that must be zeros"));
        }
        Ok(Self {
            start: Gfn(record.start.get()),
            page_count: record.page_count.get(),
            source,
        })
    }
}

/// Returns the CRC32C of a record without its last four bytes, which hold it.
pub(crate) fn record_crc(record: &[u8]) -> u32 {
    let (body, _) = record
        .split_last_chunk::<4>()
        .expect("records end in a four-byte checksum");
    crc32c::crc32c(body)
}

fn check_crc(record: &[u8], found: u32, place: Place) -> Result<(), Damage> {
    let expected = record_crc(record);
    if found == expected {
        Ok(())
    } else {
        Err(Damage::new(
            place,
            format!("has checksum {found:#010x}, its bytes make {expected:#010x}"),
        ))
    }
}
