//! Compression of chunks, where it pays.

use std::fmt;
use std::str::FromStr;

use crate::page::PAGE_BYTES;
use crate::store::format::ChunkCodec;

/// A compressed chunk must save at least one part in this many, or it is stored as it is:
/// decompression costs every restore, and raw chunks can be mapped.
const GAIN_PARTS: usize = 16;

/// Pages of a chunk that are compressed first, to see whether the rest is worth the time.
const SAMPLE_PAGES: usize = 8;

/// zstd's own default: levels above it cost more time than a live checkpoint has.
const ZSTD_LEVEL_DEFAULT: i32 = 1;

/// How chunks are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Codec {
    /// Not at all.
    #[default]
    None,
    /// By LZ4: fast.
    Lz4,
    /// By Zstandard: smaller.
    Zstd {
        /// zstd's compression level, usually from 1 to 19.
        level: i32,
    },
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd { level } => write!(f, "zstd:{level}"),
        }
    }
}

/// Text that names no codec.
#[derive(Debug, thiserror::Error)]
#[error("{0:?} is no codec; there are none, lz4, zstd and zstd:LEVEL")]
pub struct UnknownCodec(String);

impl FromStr for Codec {
    type Err = UnknownCodec;

    fn from_str(text: &str) -> Result<Self, UnknownCodec> {
        let (name, level) = match text.split_once(':') {
            Some((name, level)) => (name, Some(level)),
            None => (text, None),
        };
        let parsed = match (name, level) {
            ("none", None) => Some(Self::None),
            ("lz4", None) => Some(Self::Lz4),
            ("zstd", None) => Some(Self::Zstd {
                level: ZSTD_LEVEL_DEFAULT,
            }),
            ("zstd", Some(level)) => level
                .parse()
                .ok()
                .filter(|level| zstd::compression_level_range().contains(level))
                .map(|level| Self::Zstd { level }),
            _ => None,
        };
        parsed.ok_or_else(|| UnknownCodec(text.to_owned()))
    }
}

/// Reusable memory of one compressing thread.
#[derive(Default)]
pub(crate) struct Compressor {
    sample: Vec<u8>,
    out: Vec<u8>,
    zstd: Option<(i32, zstd::bulk::Compressor<'static>)>,
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

impl Compressor {
    /// Compresses the pages `raw`; `None` where that does not pay.
    ///
    /// A compressor that fails is no error: the pages are then stored as they are.
    pub(crate) fn compress(&mut self, codec: Codec, raw: &[u8]) -> Option<(ChunkCodec, &[u8])> {
        let kind = match codec {
            Codec::None => return None,
            Codec::Lz4 => ChunkCodec::Lz4,
            Codec::Zstd { .. } => ChunkCodec::Zstd,
        };
        if raw.len() > 2 * SAMPLE_PAGES * PAGE_BYTES && !self.sample_shrinks(codec, raw) {
            return None;
        }
        let bytes = self.shrink(codec, raw)?;
        self.out.get(..bytes).map(|stored| (kind, stored))
    }

    /// Compresses some pages from all over `raw`.
    fn sample_shrinks(&mut self, codec: Codec, raw: &[u8]) -> bool {
        let step = raw.len() / PAGE_BYTES / SAMPLE_PAGES * PAGE_BYTES;
        let mut sample = std::mem::take(&mut self.sample);
        sample.clear();
        raw.chunks(step)
            .take(SAMPLE_PAGES)
            .filter_map(|part| part.first_chunk::<PAGE_BYTES>())
            .for_each(|page| sample.extend_from_slice(page));
        let shrinks = self.shrink(codec, &sample).is_some();
        self.sample = sample;
        shrinks
    }

    /// Compresses `raw` into `self.out`; the length, if it is enough smaller.
    fn shrink(&mut self, codec: Codec, raw: &[u8]) -> Option<usize> {
        let limit = raw.len() - raw.len() / GAIN_PARTS;
        let room = match codec {
            Codec::None => return None,
            // lz4_flex insists on room for the worst case.
            Codec::Lz4 => lz4_flex::block::get_maximum_output_size(raw.len()),
            Codec::Zstd { .. } => limit,
        };
        if self.out.len() < room {
            self.out.resize(room, 0);
        }
        let out = self.out.get_mut(..room)?;
        let bytes = match codec {
            Codec::None => return None,
            Codec::Lz4 => lz4_flex::block::compress_into(raw, out).ok()?,
            Codec::Zstd { level } => {
                if self
                    .zstd
                    .as_ref()
                    .is_none_or(|(made_for, _)| *made_for != level)
                {
                    self.zstd = Some((level, zstd::bulk::Compressor::new(level).ok()?));
                }
                let (_, zstd) = self.zstd.as_mut()?;
                zstd.compress_to_buffer(raw, out).ok()?
            }
        };
        (bytes > 0 && bytes <= limit).then_some(bytes)
    }
}

/// Reusable memory of one decompressing thread.
#[derive(Default)]
pub(crate) struct Decompressor {
    zstd: zstd::bulk::Decompressor<'static>,
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decompressor").finish_non_exhaustive()
    }
}

impl Decompressor {
    /// Decompresses `stored`, which must fill `raw` exactly.
    pub(crate) fn decompress(
        &mut self,
        codec: ChunkCodec,
        stored: &[u8],
        raw: &mut [u8],
    ) -> Result<(), String> {
        let expected = raw.len();
        let bytes = match codec {
            ChunkCodec::None => {
                if stored.len() == expected {
                    raw.copy_from_slice(stored);
                }
                stored.len()
            }
            ChunkCodec::Lz4 => lz4_flex::block::decompress_into(stored, raw)
                .map_err(|error| format!("does not decompress: {error}"))?,
            ChunkCodec::Zstd => self
                .zstd
                .decompress_to_buffer(stored, raw)
                .map_err(|error| format!("does not decompress: {error}"))?,
        };
        if bytes == expected {
            Ok(())
        } else {
            Err(format!(
                "decompresses to {bytes} bytes instead of {expected}"
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const CODECS: [Codec; 2] = [Codec::Lz4, Codec::Zstd { level: 1 }];

    fn noise(pages: usize) -> Vec<u8> {
        let mut state = 88_172_645_463_325_252_u64;
        std::iter::repeat_with(|| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .take(pages * PAGE_BYTES / 8)
        .flatten()
        .collect()
    }

    #[test]
    fn what_does_not_shrink_is_not_compressed() {
        for codec in CODECS {
            for pages in [1, 16, 17, 512] {
                assert!(
                    Compressor::default()
                        .compress(codec, &noise(pages))
                        .is_none(),
                    "{codec} of {pages} pages"
                );
            }
        }
    }

    #[test]
    fn codecs_have_names_that_read_back() {
        for codec in [Codec::None, Codec::Lz4, Codec::Zstd { level: 7 }] {
            assert_eq!(codec.to_string().parse::<Codec>().unwrap(), codec);
        }
        for text in ["", "gzip", "lz4:1", "zstd:", "zstd:999", "none:0"] {
            assert!(text.parse::<Codec>().is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn compressed_pages_come_back(
            seed in prop::collection::vec(any::<u8>(), 1..200), pages in 1_usize..40,
        ) {
            let raw: Vec<u8> = seed.iter().copied().cycle().take(pages * PAGE_BYTES).collect();
            let mut compressor = Compressor::default();
            for codec in CODECS {
                let (kind, stored) = compressor.compress(codec, &raw).expect("repeats shrink");
                let mut back = vec![0xee; raw.len()];
                Decompressor::default().decompress(kind, stored, &mut back).unwrap();
                prop_assert!(back == raw);
                let mut short = vec![0; raw.len() - PAGE_BYTES];
                prop_assert!(Decompressor::default().decompress(kind, stored, &mut short).is_err());
                let mut long = vec![0; raw.len() + PAGE_BYTES];
                prop_assert!(Decompressor::default().decompress(kind, stored, &mut long).is_err());
            }
        }

        #[test]
        fn noise_never_decompresses_by_panic(
            stored in prop::collection::vec(any::<u8>(), 0..300), pages in 1_usize..4,
        ) {
            let mut raw = vec![0; pages * PAGE_BYTES];
            for kind in [ChunkCodec::None, ChunkCodec::Lz4, ChunkCodec::Zstd] {
                drop(Decompressor::default().decompress(kind, &stored, &mut raw));
            }
        }
    }
}
