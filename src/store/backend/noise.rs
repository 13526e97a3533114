//! Noise that is the same each time, for tests.

/// A small generator of repeatable noise (xorshift64).
#[derive(Clone, Debug)]
pub struct Noise(u64);

impl Noise {
    /// Makes a generator; different seeds make different sequences.
    pub fn new(seed: u64) -> Self {
        // Seeds that differ little must not start alike, and the state must not be 0.
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x2545_f491_4f6c_dd1d | 1)
    }

    /// Returns the next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns a number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.bits() >> 11) % limit
    }

    /// Returns true once in `times` calls, on average.
    pub fn one_in(&mut self, times: u64) -> bool {
        self.below(times) == 0
    }
}
