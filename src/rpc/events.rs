//! Events of domains, as clients receive them.

use super::types::{DomainRef, TypedParam};
use super::xdr::{Encode, Encoder, List};

/// Something that happened to a domain.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// It was defined, started, paused and so on (`virDomainEventType`, and its detail).
    Lifecycle {
        /// What happened.
        event: i32,
        /// In what way.
        detail: i32,
    },
    /// The guest rebooted.
    Reboot,
    /// The guest has another amount of memory now, in KiB.
    BalloonChange {
        /// How much.
        kib: u64,
    },
    /// A live copy of memory went on to its next round.
    MigrationIteration {
        /// Which one, from 1.
        iteration: i32,
    },
    /// A job has ended.
    JobCompleted {
        /// Its figures.
        params: Vec<TypedParam>,
    },
    /// Title, description or metadata changed.
    MetadataChange {
        /// Which of them (`virDomainMetadataType`).
        kind: i32,
        /// The metadata's namespace.
        uri: Option<String>,
    },
}

/// The number of the last event that a client of libvirt 12 may ask for. Those that never happen
/// here can be asked for all the same, since clients ask for all.
const EVENT_ID_MAX: i32 = 29;

impl Event {
    /// Returns whether a client may ask for events with this number.
    pub fn is_known(id: i32) -> bool {
        (0..=EVENT_ID_MAX).contains(&id)
    }

    /// Returns what a client asks for it by (`virDomainEventID`).
    pub fn id(&self) -> i32 {
        match self {
            Self::Lifecycle { .. } => 0,
            Self::Reboot => 1,
            Self::BalloonChange { .. } => 13,
            Self::MigrationIteration { .. } => 20,
            Self::JobCompleted { .. } => 21,
            Self::MetadataChange { .. } => 23,
        }
    }

    /// Returns the procedure that carries it.
    pub fn procedure(&self) -> i32 {
        match self {
            Self::Lifecycle { .. } => 318,
            Self::Reboot => 319,
            Self::BalloonChange { .. } => 331,
            Self::MigrationIteration { .. } => 359,
            Self::JobCompleted { .. } => 363,
            Self::MetadataChange { .. } => 379,
        }
    }

    pub(super) fn payload(&self, callback: i32, domain: &DomainRef) -> Vec<u8> {
        let mut out = Encoder::default();
        callback.encode(&mut out);
        domain.encode(&mut out);
        match self {
            Self::Lifecycle { event, detail } => (*event, *detail).encode(&mut out),
            Self::Reboot => {}
            Self::BalloonChange { kib } => kib.encode(&mut out),
            Self::MigrationIteration { iteration } => iteration.encode(&mut out),
            Self::JobCompleted { params } => List::<_, 64>(params.clone()).encode(&mut out),
            Self::MetadataChange { kind, uri } => (*kind, uri.clone()).encode(&mut out),
        }
        out.into_bytes()
    }
}
