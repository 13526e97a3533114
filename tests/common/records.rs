//! The oracle of disks: what the `virtio` guest has on its disk fits what it has in memory.
//!
//! guests/virtio/blk.c says what the records are; this reads them as it says.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

const HEADER_MAGIC: u64 = 0x6b73_6964_7670_4c00;
const RECORD_MAGIC: u64 = 0x6472_6f63_6572_766c;
const RECORD_BYTES: usize = 4096;
const RECORD_WORDS: u64 = 509;

/// What the guest has in memory about its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskHeader {
    pub places: u64,
    pub batch: u64,
    pub acknowledged: u64,
    pub writing: bool,
}

/// Finds the address that the guest printed.
pub fn header_address(console: &str) -> u64 {
    let line = console
        .lines()
        .find(|line| line.starts_with("virtio: blk header="))
        .unwrap();
    let word = line.split("header=0x").nth(1).unwrap();
    let digits = word.split(' ').next().unwrap();
    u64::from_str_radix(digits, 16).unwrap()
}

impl DiskHeader {
    pub fn read(bytes: &[u8]) -> Self {
        let word = |at: usize| u64::from_le_bytes(bytes[at * 8..at * 8 + 8].try_into().unwrap());
        assert_eq!(word(0), HEADER_MAGIC, "not the guest's header");
        Self {
            places: word(1),
            batch: word(2),
            acknowledged: word(3),
            writing: word(4) == 1,
        }
    }

    /// Fails unless every place has what it must have when memory is as this says.
    ///
    /// Returns how many places had a record of the batch that was on its way.
    pub fn check(&self, disk: &Path) -> u64 {
        let file = File::open(disk).unwrap();
        let mut ahead = 0;
        for place in 0..self.places {
            let mut bytes = vec![0; RECORD_BYTES];
            file.read_exact_at(&mut bytes, place * RECORD_BYTES as u64)
                .unwrap();
            let found = number_of(&bytes, place);
            let expected = self.newest_in(place, self.acknowledged);
            let newer = self.newest_in(place, self.acknowledged + self.batch);
            if found == expected {
                continue;
            }
            assert!(
                self.writing && found == newer,
                "place {place} has record {found}, not {expected}: {self:?}"
            );
            ahead += 1;
        }
        ahead
    }

    fn newest_in(&self, place: u64, last: u64) -> u64 {
        if place == 0 {
            last - last % self.places
        } else if last < place {
            0
        } else {
            last - (last - place) % self.places
        }
    }
}

/// Returns the number of the newest whole record; every place has one, or was never written.
pub fn newest(disk: &Path) -> u64 {
    let bytes = std::fs::read(disk).unwrap();
    let places = bytes.chunks_exact(RECORD_BYTES).zip(0..);
    let numbers = places.map(|(record, place)| number_of(record, place));
    numbers.max().unwrap_or(0)
}

fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// Returns the number of a whole record; 0 where none was ever written.
fn number_of(bytes: &[u8], place: u64) -> u64 {
    let words: Vec<u64> = bytes
        .chunks(8)
        .map(|chunk| u64::from_le_bytes(chunk.try_into().unwrap()))
        .collect();
    let number = words[1];
    if words[0] == 0 {
        assert!(words.iter().all(|word| *word == 0), "place {place} is torn");
        return 0;
    }
    assert_eq!(words[0], RECORD_MAGIC, "place {place} is no record");
    let mut sum = number;
    for (word, at) in words[2..511].iter().zip(0..) {
        let expected = mix(number.wrapping_mul(RECORD_WORDS).wrapping_add(at));
        assert_eq!(
            *word, expected,
            "place {place} is torn: word {at} of {number}"
        );
        sum = mix(sum ^ word);
    }
    assert_eq!(
        words[511], sum,
        "place {place} is torn: checksum of {number}"
    );
    number
}
