//! MSI-X: a table of messages in a BAR, each of which is an interrupt.

use std::sync::Arc;

use super::Platform;
use crate::state::virtio::MsixVectorV1;

/// No vector.
pub const NO_VECTOR: u16 = 0xffff;

/// Bytes of one vector in the table: address, data, control.
pub const VECTOR_BYTES: u64 = 16;

/// Vector control: masked.
const MASKED: u32 = 1;

/// The vectors of one function.
#[derive(Debug)]
pub struct Msix {
    platform: Arc<dyn Platform>,
    vectors: Vec<MsixVectorV1>,
    enabled: bool,
    masked: bool,
}

impl Msix {
    /// Makes `count` vectors, each masked, as after a reset.
    pub fn new(platform: Arc<dyn Platform>, count: u16) -> Self {
        let mut msix = Self {
            platform,
            vectors: vec![MsixVectorV1::default(); count.into()],
            enabled: false,
            masked: false,
        };
        msix.reset();
        msix
    }

    /// Puts everything back to where it was.
    pub fn reset(&mut self) {
        let masked = MsixVectorV1 {
            masked: true,
            ..MsixVectorV1::default()
        };
        self.vectors.fill(masked);
        (self.enabled, self.masked) = (false, false);
    }

    /// Returns how many vectors there are.
    pub fn count(&self) -> u16 {
        u16::try_from(self.vectors.len()).expect("made from a u16")
    }

    /// Returns whether the guest uses MSI-X.
    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// Returns whether all vectors are masked.
    pub fn is_masked(&self) -> bool {
        self.masked
    }

    /// Takes the bits of the capability's control register.
    pub fn set_control(&mut self, enabled: bool, masked: bool) {
        (self.enabled, self.masked) = (enabled, masked);
        self.send_pending();
    }

    /// Returns the vectors.
    pub fn vectors(&self) -> &[MsixVectorV1] {
        &self.vectors
    }

    /// Takes a saved state; false where it has more vectors than there are.
    pub fn restore(&mut self, vectors: &[MsixVectorV1], enabled: bool, masked: bool) -> bool {
        let Some(known) = self.vectors.get_mut(..vectors.len()) else {
            return false;
        };
        known.copy_from_slice(vectors);
        (self.enabled, self.masked) = (enabled, masked);
        true
    }

    /// Sends a vector's message, or notes it while the vector is masked.
    pub fn signal(&mut self, vector: u16) {
        let masked = self.masked;
        let Some(entry) = self.vectors.get_mut(usize::from(vector)) else {
            return;
        };
        if !self.enabled {
            return;
        }
        if masked || entry.masked {
            entry.pending = true;
        } else {
            self.platform.send_msi(entry.address, entry.data);
        }
    }

    fn send_pending(&mut self) {
        if !self.enabled || self.masked {
            return;
        }
        for entry in &mut self.vectors {
            if entry.pending && !entry.masked {
                entry.pending = false;
                self.platform.send_msi(entry.address, entry.data);
            }
        }
    }

    /// Reads the table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let entry = usize::try_from(at / VECTOR_BYTES).unwrap_or(usize::MAX);
            *byte = self.vectors.get(entry).map_or(0xff, |entry| {
                let bytes = encode(entry).to_le_bytes();
                bytes[usize::try_from(at % VECTOR_BYTES).expect("less than 16")]
            });
        }
    }

    /// Writes the table; the access is of 4 or 8 aligned bytes, as the specification asks.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let index = usize::try_from(offset / VECTOR_BYTES).unwrap_or(usize::MAX);
        let at = usize::try_from(offset % VECTOR_BYTES).expect("less than 16");
        let Some(entry) = self.vectors.get_mut(index) else {
            return;
        };
        if ![4, 8].contains(&data.len()) || at % data.len() != 0 {
            return;
        }
        let mut bytes = encode(entry).to_le_bytes();
        bytes[at..at + data.len()].copy_from_slice(data);
        let long = |at: usize| {
            let part = bytes[at..at + 4].try_into().expect("4 bytes");
            u32::from_le_bytes(part)
        };
        *entry = MsixVectorV1 {
            address: u64::from(long(4)) << 32 | u64::from(long(0)),
            data: long(8),
            masked: long(12) & MASKED != 0,
            pending: entry.pending,
        };
        self.send_pending();
    }

    /// Reads the bits of pending vectors.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let first = usize::try_from(at).unwrap_or(usize::MAX).saturating_mul(8);
            let bits = self.vectors.iter().skip(first).take(8).enumerate();
            *byte = bits.fold(0, |byte, (bit, entry)| {
                byte | u8::from(entry.pending) << bit
            });
        }
    }
}

fn encode(entry: &MsixVectorV1) -> u128 {
    u128::from(entry.address)
        | u128::from(entry.data) << 64
        | u128::from(u32::from(entry.masked) * MASKED) << 96
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine::pci::testing::Recorder;

    fn programmed() -> (Arc<Recorder>, Msix) {
        let recorder = Arc::new(Recorder::default());
        let mut msix = Msix::new(recorder.clone(), 3);
        for vector in 0..3_u64 {
            let base = vector * VECTOR_BYTES;
            msix.write_table(base, &0xfee0_0000_u64.to_le_bytes());
            msix.write_table(base + 8, &(0x30 + vector).to_le_bytes());
        }
        (recorder, msix)
    }

    #[test]
    fn a_message_is_sent_once_and_only_while_msix_is_on() {
        let (recorder, mut msix) = programmed();
        msix.signal(1);
        assert_eq!(recorder.messages(), []);
        msix.set_control(true, false);
        msix.signal(1);
        msix.signal(NO_VECTOR);
        msix.signal(3);
        assert_eq!(recorder.messages(), [(0xfee0_0000, 0x31)]);
    }

    #[test]
    fn what_came_while_masked_is_pending_and_sent_at_the_unmask() {
        let (recorder, mut msix) = programmed();
        msix.set_control(true, false);
        msix.write_table(2 * VECTOR_BYTES + 12, &1_u32.to_le_bytes());
        msix.signal(2);
        msix.set_control(true, true);
        msix.signal(0);
        let mut pending = [0; 8];
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0b101);
        msix.set_control(true, false);
        assert_eq!(recorder.messages(), [(0xfee0_0000, 0x30)]);
        msix.write_table(2 * VECTOR_BYTES + 12, &0_u32.to_le_bytes());
        assert_eq!(recorder.messages().len(), 2);
        msix.read_pending(0, &mut pending);
        assert_eq!(pending[0], 0);
    }

    #[test]
    fn accesses_that_fit_no_vector_change_nothing() {
        let (_, mut msix) = programmed();
        let before = msix.vectors().to_vec();
        msix.write_table(1, &[0; 4]);
        msix.write_table(0, &[0; 2]);
        msix.write_table(48, &[0; 4]);
        msix.write_table(u64::MAX, &[0; 1]);
        assert_eq!(msix.vectors(), before);
        let mut data = [0; 4];
        msix.read_table(48, &mut data);
        assert_eq!(data, [0xff; 4]);
        msix.read_table(8, &mut data);
        assert_eq!(data, [0x30, 0, 0, 0]);
    }
}
