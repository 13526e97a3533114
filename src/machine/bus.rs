//! Which device answers at which port or address.

use std::fmt;
use std::sync::Arc;

/// What a device's register may ask of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestRequest {
    /// Power off.
    PowerOff,
    /// Start over.
    Reset,
}

/// The registers of a device. Called by vCPU threads, by several at once.
pub trait Registers: Send + Sync {
    /// Answers one read of `data.len()` bytes (1, 2, 4 or 8) at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes one write of `data.len()` bytes at `offset`.
    fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest>;

    /// Follows the last write of one exit: a string instruction makes many, and a device passes
    /// them on together.
    fn flush(&self) {}
}

struct Range {
    start: u64,
    len: u64,
    registers: Arc<dyn Registers>,
}

/// Ports or addresses, and whose registers they are.
///
/// Where nothing is, reads give all ones and writes are ignored, as on a PC: guests probe.
#[derive(Default)]
pub struct Bus {
    ranges: Vec<Range>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(
                self.ranges
                    .iter()
                    .map(|range| (range.start, range.start + range.len)),
            )
            .finish()
    }
}

impl Bus {
    /// Puts `registers` at `len` ports or bytes from `start` on.
    ///
    /// # Panics
    /// When something is there already: the machine's layout is fixed.
    pub fn insert(&mut self, start: u64, len: u64, registers: Arc<dyn Registers>) {
        let overlaps = |range: &Range| start < range.start + range.len && range.start < start + len;
        assert!(
            !self.ranges.iter().any(overlaps),
            "two devices at {start:#x}"
        );
        self.ranges.push(Range {
            start,
            len,
            registers,
        });
    }

    fn find(&self, at: u64) -> Option<(&Range, u64)> {
        let holds = |range: &&Range| (range.start..range.start + range.len).contains(&at);
        let range = self.ranges.iter().find(holds)?;
        Some((range, at - range.start))
    }

    /// Answers a read of units of `unit_bytes`, all of them at `at`.
    pub fn read(&self, at: u64, unit_bytes: usize, data: &mut [u8]) {
        let Some((range, offset)) = self.find(at) else {
            data.fill(0xff);
            return;
        };
        for unit in data.chunks_mut(unit_bytes.max(1)) {
            range.registers.read(offset, unit);
        }
    }

    /// Passes on a write of units of `unit_bytes`, all of them at `at`.
    pub fn write(&self, at: u64, unit_bytes: usize, data: &[u8]) -> Option<GuestRequest> {
        let (range, offset) = self.find(at)?;
        let mut request = None;
        for unit in data.chunks(unit_bytes.max(1)) {
            request = request.or(range.registers.write(offset, unit));
        }
        range.registers.flush();
        request
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Log(Mutex<Vec<(u64, Vec<u8>)>>);

    impl Registers for Log {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }

        fn write(&self, offset: u64, data: &[u8]) -> Option<GuestRequest> {
            self.0.lock().unwrap().push((offset, data.to_vec()));
            (data == [9]).then_some(GuestRequest::Reset)
        }

        fn flush(&self) {
            self.0.lock().unwrap().push((99, Vec::new()));
        }
    }

    #[test]
    fn string_writes_are_single_writes_and_one_flush() {
        let log = Arc::new(Log::default());
        let mut bus = Bus::default();
        bus.insert(0x10, 4, log.clone());
        assert_eq!(bus.write(0x12, 1, &[1, 9, 3]), Some(GuestRequest::Reset));
        assert_eq!(bus.write(0x10, 2, &[1, 2, 3, 4]), None);
        assert_eq!(
            *log.0.lock().unwrap(),
            [
                (2, vec![1]),
                (2, vec![9]),
                (2, vec![3]),
                (99, vec![]),
                (0, vec![1, 2]),
                (0, vec![3, 4]),
                (99, vec![])
            ]
        );
    }

    #[test]
    fn where_nothing_is_all_ones_are_read() {
        let mut bus = Bus::default();
        bus.insert(0x10, 4, Arc::new(Log::default()));
        let mut data = [0; 2];
        bus.read(0x14, 1, &mut data);
        assert_eq!(data, [0xff; 2]);
        bus.read(0x13, 1, &mut data);
        assert_eq!(data, [3; 2]);
        assert_eq!(bus.write(0xf, 1, &[9]), None);
    }
}
