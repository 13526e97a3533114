//! A small guest whose every byte is known, for tests of images.

use std::sync::Arc;

use livepoint::guest::{Backing, MemoryRegion};
use livepoint::page::{Gfn, PAGE_BYTES, PageRun};
use livepoint::state::{HostFacts, StateSection};
use livepoint::store::backend::forgetful::Noise;
use livepoint::store::{
    ChunkPages, ChunkScratch, ImageReader, ImageWriter, ManifestFacts, ReadScratch, RegionLayout,
    StoreError,
};
use livepoint::sys::mapping::GuestMapping;

/// Two regions of memory: pages of noise, of text that compresses, and of zeros.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SampleGuest {
    regions: Vec<(RegionLayout, Vec<u8>)>,
}

/// Frames of the sample guest's regions.
const REGIONS: [(u32, u64, u64); 2] = [(0, 0, 40), (3, 0x100, 24)];

impl SampleGuest {
    /// Makes a guest; different seeds make different memory.
    pub fn new(seed: u64) -> Self {
        let mut noise = Noise::new(seed);
        let regions = REGIONS.iter().map(|&(slot, start, page_count)| {
            let layout = RegionLayout {
                slot,
                start: Gfn(start),
                page_count,
            };
            let memory = (0..page_count).flat_map(|_| page(&mut noise)).collect();
            (layout, memory)
        });
        Self {
            regions: regions.collect(),
        }
    }

    /// Returns the layout of its memory.
    pub fn regions(&self) -> Vec<RegionLayout> {
        self.regions.iter().map(|(layout, _)| *layout).collect()
    }

    /// Returns each region's memory.
    pub fn memory(&self) -> impl Iterator<Item = (RegionLayout, &[u8])> {
        self.regions
            .iter()
            .map(|(layout, memory)| (*layout, memory.as_slice()))
    }

    /// Writes its memory in small chunks and two state sections; the first pages twice, an old
    /// copy after the new one.
    pub fn write_to(&self, writer: &ImageWriter) -> Result<(), StoreError> {
        let mut scratch = ChunkScratch::default();
        for (layout, memory) in self.memory() {
            let frames: Vec<Gfn> = (0..layout.page_count)
                .map(|page| Gfn(layout.start.0 + page))
                .collect();
            for (frames, data) in frames.chunks(18).zip(memory.chunks(18 * PAGE_BYTES)) {
                let pages = ChunkPages {
                    epoch: 5,
                    frames,
                    data,
                };
                writer.write_chunk(pages, &mut scratch)?;
            }
            let stale = ChunkPages {
                epoch: 4,
                frames: &frames[..2],
                data: &[0x5a; 2 * PAGE_BYTES],
            };
            writer.write_chunk(stale, &mut scratch)?;
            let run = PageRun {
                start: layout.start,
                page_count: layout.page_count,
            };
            writer.record_zero(0, run)?;
        }
        for instance in 0..2 {
            writer.add_section(section(instance))?;
        }
        Ok(())
    }

    /// Returns whether the image holds this guest's memory and state.
    pub fn equals(&self, reader: &ImageReader) -> bool {
        let mut scratch = ReadScratch::default();
        let mut page = [0; PAGE_BYTES];
        let same_memory = self.memory().all(|(layout, memory)| {
            (layout.start.0..)
                .zip(memory.chunks(PAGE_BYTES))
                .all(|(gfn, expected)| {
                    reader.read_page(Gfn(gfn), &mut scratch, &mut page).unwrap() && page == expected
                })
        });
        same_memory && self.regions() == reader.manifest().regions
    }

    /// Fails unless the image holds this guest's memory and state.
    pub fn assert_equals(&self, reader: &ImageReader) {
        assert!(self.equals(reader), "the image holds another guest");
        let mut set = reader.sections().unwrap();
        for instance in 0..2 {
            let payload: Vec<u8> = set.take::<Payload>(instance).unwrap().0;
            assert_eq!(payload, sample_payload(instance));
        }
        set.finish().unwrap();
    }
}

/// Payload of the sample guest's state sections.
#[derive(serde::Serialize, serde::Deserialize)]
struct Payload(Vec<u8>);

impl livepoint::state::SectionPayload for Payload {
    const KIND: &'static str = "sample";
    const VERSION: u16 = 1;
}

fn sample_payload(instance: u32) -> Vec<u8> {
    let byte = 0x40 + u8::try_from(instance).unwrap();
    vec![byte; 300 + 4000 * usize::try_from(instance).unwrap()]
}

fn section(instance: u32) -> StateSection {
    StateSection::encode(instance, &Payload(sample_payload(instance)))
}

/// Returns a page of zeros, of text, or of noise.
fn page(noise: &mut Noise) -> Vec<u8> {
    match noise.below(4) {
        0 => vec![0; PAGE_BYTES],
        1 | 2 => {
            let text = format!("the quick brown fox jumps over page {:x}; ", noise.bits());
            text.bytes().cycle().take(PAGE_BYTES).collect()
        }
        _ => (0..PAGE_BYTES / 8)
            .flat_map(|_| noise.bits().to_le_bytes())
            .collect(),
    }
}

/// Returns a manifest's facts.
pub fn facts() -> ManifestFacts {
    ManifestFacts {
        name: "sample".to_owned(),
        uuid: uuid::Uuid::from_u128(0x1234_5678),
        domain_xml: "<domain type='kvm'><name>sample</name></domain>".to_owned(),
        vcpu_count: 1,
        facts: HostFacts::default(),
        protocol: "stop".to_owned(),
        statistics: serde_json::json!({ "downtime_us": 1234 }),
        created: jiff::Timestamp::UNIX_EPOCH,
    }
}

/// Returns `page_count` pages of memory, filled with `byte`.
#[expect(
    unsafe_code,
    reason = "a mapping of memory that only the mapping reaches"
)]
pub fn mapping(page_count: u64, byte: u8) -> GuestMapping {
    let len = usize::try_from(page_count).unwrap() * PAGE_BYTES;
    let mut memory = vec![byte; len].into_boxed_slice();
    let hva = memory.as_mut_ptr() as usize;
    // SAFETY: the boxed slice lives as long as its owner and is reached only by the mapping.
    unsafe { GuestMapping::new(hva, len, Arc::new(memory)) }
}

/// Returns a machine's memory of this layout, filled with `byte`.
pub fn machine_memory(layout: &[RegionLayout], byte: u8) -> Vec<MemoryRegion> {
    let region = |region: &RegionLayout| MemoryRegion {
        slot: region.slot,
        start: region.start,
        page_count: region.page_count,
        mapping: mapping(region.page_count, byte),
        backing: Backing::Anonymous { huge: false },
    };
    layout.iter().map(region).collect()
}

/// Returns all bytes of a region.
pub fn bytes_of(region: &MemoryRegion) -> Vec<u8> {
    let mut bytes = vec![0; region.mapping.len()];
    region.mapping.copy_out(0, &mut bytes);
    bytes
}
