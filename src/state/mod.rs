//! Saved-state types: plain data, never the runtime types.
//!
//! Each is versioned (`V1`, `V2` ..) and describes the device or CPU that is modelled, not our
//! structs. A section that is unknown, newer than this build, missing, or left over fails a
//! restore by name; nothing falls back to defaults.

pub mod board;
pub mod device;
pub mod vcpu;
pub mod virtio;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The longest payload of one section. A vCPU's state is about 8 KiB.
pub const SECTION_BYTES_MAX: usize = 16 << 20;

/// One named, versioned piece of a guest's state other than its memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateSection {
    /// What it describes: `vcpu`, `irqchip`, `serial` and so on.
    pub kind: String,
    /// Which one of its kind, from 0.
    pub instance: u32,
    /// Version of the payload's layout.
    pub version: u16,
    /// The state, encoded by postcard (or opaque, for a foreign VMM's own state).
    pub payload: Vec<u8>,
}

/// A type that is stored as the payload of a section.
pub trait SectionPayload: Serialize + DeserializeOwned {
    /// The section's kind.
    const KIND: &'static str;
    /// The layout's version; a new field is a new type with the next version.
    const VERSION: u16;
}

/// A section that cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StateError {
    /// A section of this kind and instance is needed and missing.
    #[error("section {kind}.{instance} is missing")]
    Missing {
        /// Kind that was looked for.
        kind: &'static str,
        /// Instance that was looked for.
        instance: u32,
    },
    /// A section of this kind and instance is there twice.
    #[error("section {kind}.{instance} is there twice")]
    Duplicate {
        /// Kind of both.
        kind: String,
        /// Instance of both.
        instance: u32,
    },
    /// Nothing in this build reads the section.
    #[error("section {kind}.{instance} is unknown to this build")]
    Unused {
        /// Kind of the section.
        kind: String,
        /// Instance of the section.
        instance: u32,
    },
    /// The section was written by a newer build.
    #[error("section {kind}.{instance} has version {found}; this build reads {known}")]
    Version {
        /// Kind of the section.
        kind: &'static str,
        /// Instance of the section.
        instance: u32,
        /// Version in the image.
        found: u16,
        /// Version that this build reads.
        known: u16,
    },
    /// The payload does not decode, or bytes are left over.
    #[error("section {kind}.{instance} does not decode")]
    Malformed {
        /// Kind of the section.
        kind: &'static str,
        /// Instance of the section.
        instance: u32,
        /// The decoder's reason.
        #[source]
        source: Option<postcard::Error>,
    },
}

impl StateSection {
    /// Encodes `payload` as instance `instance` of its kind.
    pub fn encode<T: SectionPayload>(instance: u32, payload: &T) -> Self {
        Self {
            kind: T::KIND.to_owned(),
            instance,
            version: T::VERSION,
            payload: postcard::to_stdvec(payload).expect("plain data encodes into memory"),
        }
    }
}

/// The sections of one saved guest; each is taken once, and none may be left over.
#[derive(Clone, Debug, Default)]
pub struct StateSet {
    sections: Vec<StateSection>,
}

impl StateSet {
    /// Makes a set of `sections`; the same kind and instance twice is an error.
    pub fn new(sections: Vec<StateSection>) -> Result<Self, StateError> {
        for (at, section) in sections.iter().enumerate() {
            let twin = |other: &&StateSection| {
                (&other.kind, other.instance) == (&section.kind, section.instance)
            };
            if sections.iter().take(at).any(|other| twin(&other)) {
                return Err(StateError::Duplicate {
                    kind: section.kind.clone(),
                    instance: section.instance,
                });
            }
        }
        Ok(Self { sections })
    }

    /// Takes and decodes instance `instance` of `T`'s kind.
    pub fn take<T: SectionPayload>(&mut self, instance: u32) -> Result<T, StateError> {
        let kind = T::KIND;
        let at = self
            .sections
            .iter()
            .position(|section| section.kind == kind && section.instance == instance)
            .ok_or(StateError::Missing { kind, instance })?;
        let section = self.sections.swap_remove(at);
        if section.version != T::VERSION {
            return Err(StateError::Version {
                kind,
                instance,
                found: section.version,
                known: T::VERSION,
            });
        }
        let (payload, rest) = postcard::take_from_bytes(&section.payload).map_err(|source| {
            StateError::Malformed {
                kind,
                instance,
                source: Some(source),
            }
        })?;
        if rest.is_empty() {
            Ok(payload)
        } else {
            Err(StateError::Malformed {
                kind,
                instance,
                source: None,
            })
        }
    }

    /// Returns the sections that nobody has taken.
    pub fn sections(&self) -> &[StateSection] {
        &self.sections
    }

    /// Returns whether instance `instance` of `T`'s kind is there and was not taken.
    pub fn has<T: SectionPayload>(&self, instance: u32) -> bool {
        self.sections
            .iter()
            .any(|section| section.kind == T::KIND && section.instance == instance)
    }

    /// Ends the reading: a section that nobody took is an error.
    pub fn finish(self) -> Result<(), StateError> {
        self.sections.into_iter().next().map_or(Ok(()), |section| {
            Err(StateError::Unused {
                kind: section.kind,
                instance: section.instance,
            })
        })
    }
}

/// What a host offers, and what a guest was built on: compared before a restore.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// CPUID leaf 0's vendor string.
    pub cpu_vendor: String,
    /// CPUID brand string, for people.
    pub cpu_brand: String,
    /// CPUID entries that KVM supports (on a host) or that the guest saw (in an image).
    pub cpuid: Vec<CpuidEntry>,
    /// TSC frequency in kHz; 0 where unknown.
    pub tsc_khz: u32,
    /// Whether the guest's TSC can be scaled to another frequency.
    pub tsc_scaling: bool,
    /// Bytes of XSAVE state that KVM saves.
    pub xsave_bytes: u32,
    /// MSRs that KVM saves and restores.
    pub msrs: Vec<u32>,
    /// Host kernel release, for people.
    pub kernel_release: String,
}

/// One CPUID leaf.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// EAX input.
    pub function: u32,
    /// ECX input, where it matters.
    pub index: u32,
    /// KVM's entry flags (bit 0: index matters).
    pub flags: u32,
    /// EAX output.
    pub eax: u32,
    /// EBX output.
    pub ebx: u32,
    /// ECX output.
    pub ecx: u32,
    /// EDX output.
    pub edx: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct SampleV2 {
        value: u32,
    }
    impl SectionPayload for SampleV2 {
        const KIND: &'static str = "sample";
        const VERSION: u16 = 2;
    }

    fn sample() -> StateSection {
        StateSection::encode(0, &SampleV2 { value: 7 })
    }

    #[test]
    fn a_section_is_taken_once_and_none_is_left_over() {
        let mut set = StateSet::new(vec![sample()]).unwrap();
        assert_eq!(set.take::<SampleV2>(0).unwrap(), SampleV2 { value: 7 });
        assert!(matches!(
            set.take::<SampleV2>(0),
            Err(StateError::Missing { .. })
        ));
        set.finish().unwrap();
        let left_over = StateSet::new(vec![sample()]).unwrap();
        assert!(matches!(left_over.finish(), Err(StateError::Unused { .. })));
    }

    #[test]
    fn another_version_trailing_bytes_and_twins_are_refused() {
        let mut newer = sample();
        newer.version = 3;
        let mut set = StateSet::new(vec![newer]).unwrap();
        assert!(matches!(
            set.take::<SampleV2>(0),
            Err(StateError::Version {
                found: 3,
                known: 2,
                ..
            })
        ));
        let mut longer = sample();
        longer.payload.push(0);
        let mut set = StateSet::new(vec![longer]).unwrap();
        assert!(matches!(
            set.take::<SampleV2>(0),
            Err(StateError::Malformed { .. })
        ));
        assert!(matches!(
            StateSet::new(vec![sample(), sample()]),
            Err(StateError::Duplicate { .. })
        ));
    }
}
