//! Who is measured beside each other.

use std::fmt;

use serde::{Serialize, Serializer};

use super::qemu::QemuMode;
use crate::host::Protocol;

/// One way to save a guest, or none at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Contender {
    /// No checkpoint: the noise of the measurement itself.
    Nothing,
    /// One of our protocols.
    Ours(Protocol, Staging),
    /// One of QEMU's ways.
    Qemu(QemuMode),
}

/// How much memory staged copies may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Staging {
    /// Enough for a working set of half of memory.
    Ample,
    /// What a user gets who does not ask.
    Default,
}

/// Share of memory that [`Staging::Ample`] is, in percent.
const AMPLE_PERCENT: u64 = 60;

impl Staging {
    /// Returns the most bytes, for a guest with so much memory.
    pub fn bytes(self, memory_bytes: u64) -> Option<u64> {
        match self {
            Self::Ample => Some(memory_bytes / 100 * AMPLE_PERCENT),
            Self::Default => None,
        }
    }
}

impl Contender {
    /// Returns the protocol of ours that it is.
    pub fn protocol(self) -> Option<Protocol> {
        match self {
            Self::Ours(protocol, _) => Some(protocol),
            Self::Nothing | Self::Qemu(_) => None,
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.pad("none"),
            Self::Ours(protocol, Staging::Ample) => f.pad(protocol.name()),
            Self::Ours(protocol, Staging::Default) => {
                f.pad(&format!("{}-default-staging", protocol.name()))
            }
            Self::Qemu(mode) => f.pad(mode.name()),
        }
    }
}

impl Serialize for Contender {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

/// Returns whether a protocol captures a working set while the guest runs, in bounded memory: all
/// but the traditional ones.
pub(super) fn is_live(protocol: Protocol) -> bool {
    !["stop", "precopy"].contains(&protocol.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_traditional_way_is_not_live() {
        assert!(is_live(Protocol::Threaded) && !is_live(Protocol::Stop));
    }

    #[test]
    fn names_tell_contenders_apart() {
        let names: Vec<_> = [
            Contender::Nothing,
            Contender::Ours(Protocol::Threaded, Staging::Ample),
            Contender::Ours(Protocol::Threaded, Staging::Default),
            Contender::Qemu(QemuMode::Stop),
        ]
        .iter()
        .map(ToString::to_string)
        .collect();
        let wanted = ["none", "threaded", "threaded-default-staging", "qemu-stop"];
        assert_eq!(names, wanted);
        assert_eq!(Staging::Ample.bytes(1000), Some(600));
    }
}
