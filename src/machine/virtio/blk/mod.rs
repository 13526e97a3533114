//! A virtio disk.

mod disk;
mod raw;
mod request;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use super::{Backend, Fault, Kind, Work};
use crate::guest::GuestDisk;
use crate::state::virtio::VirtioBlkV1;
use crate::state::{SectionPayload, StateError, StateSection, StateSet};

pub use disk::{Disk, DiskCounters, DiskError, SECTOR_BYTES};

/// Descriptors of the queue.
const QUEUE_SIZE: u16 = 256;
/// The most buffers of one request, besides header and status.
const SEGMENTS_MAX: u32 = 254;
/// The most ranges of one discard.
const RANGES_MAX: u32 = 32;
/// The most sectors of one range of a discard: 1 GiB.
const RANGE_SECTORS_MAX: u32 = 1 << 21;

/// A disk as its driver sees it.
#[derive(Debug)]
pub struct Blk {
    disk: Arc<Disk>,
}

impl Blk {
    /// Shows `disk` to the guest.
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk }
    }

    /// Returns the configuration, up to and including `write_zeroes_may_unmap`.
    fn config(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(60);
        let mut put = |field: &[u8]| bytes.extend_from_slice(field);
        put(&self.disk.sectors().to_le_bytes());
        // size_max is not offered.
        put(&0_u32.to_le_bytes());
        put(&SEGMENTS_MAX.to_le_bytes());
        // No geometry.
        put(&[0; 4]);
        put(&self.disk.block_bytes().to_le_bytes());
        // No topology; one queue.
        put(&[0; 8]);
        put(&[1, 0]);
        put(&1_u16.to_le_bytes());
        let block_sectors = self.disk.block_bytes() / SECTOR_BYTES;
        // Discards, then zeroes: sectors of a range, ranges of a request.
        put(&RANGE_SECTORS_MAX.to_le_bytes());
        put(&RANGES_MAX.to_le_bytes());
        put(&block_sectors.to_le_bytes());
        put(&RANGE_SECTORS_MAX.to_le_bytes());
        put(&RANGES_MAX.to_le_bytes());
        put(&[1, 0, 0, 0]);
        bytes
    }
}

impl Backend for Blk {
    fn kind(&self) -> Kind {
        Kind {
            device_type: u16::try_from(VIRTIO_ID_BLOCK).expect("a small number"),
            class: 0x01_0000,
            name: "blk",
        }
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE;
        if self.disk.is_read_only() {
            features |= 1 << VIRTIO_BLK_F_RO;
        } else {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
            if self.disk.can_discard() {
                features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
            }
        }
        features
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_from(&self.config(), offset, data);
    }

    fn process(&self, work: &mut Work<'_>) -> Result<(), Fault> {
        // A driver that took no flush cannot ask for one: each write is then made to last.
        let write_through = work.features & 1 << VIRTIO_BLK_F_FLUSH == 0;
        let Some(Some(queue)) = work.queues.first_mut() else {
            return Ok(());
        };
        while !work.stop.is_set()
            && let Some(chain) = queue.pop(work.memory)?
        {
            let written = request::carry_out(&self.disk, &chain, write_through)
                .map_err(|what| queue.fault(what))?;
            queue.complete(work.memory, &chain, written)?;
        }
        Ok(())
    }

    fn disk(&self) -> Option<Arc<dyn GuestDisk>> {
        Some(self.disk.clone())
    }

    fn save(&self, instance: u32) -> Option<StateSection> {
        let sectors = self.disk.sectors();
        Some(StateSection::encode(instance, &VirtioBlkV1 { sectors }))
    }

    fn restore(&self, instance: u32, state: &mut StateSet) -> Result<(), StateError> {
        let saved: VirtioBlkV1 = state.take(instance)?;
        if saved.sectors == self.disk.sectors() {
            return Ok(());
        }
        log::warn!(
            "disk {} has {} sectors, and the image's has {}",
            self.disk.name(),
            self.disk.sectors(),
            saved.sectors
        );
        Err(StateError::Malformed {
            kind: VirtioBlkV1::KIND,
            instance,
            source: None,
        })
    }
}
