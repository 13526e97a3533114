//! Atomics, locks and channels, from one place: `tests/models` has another of the same names.
//!
//! The parts of the engine that threads share without a lock, or with a subtle one, import what
//! they are made of from here. The models compile those very files against a module of this name
//! whose operations a model checker schedules (`tests/models/sync.rs`).

pub(crate) use std::sync::{
    Condvar, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard,
};

pub(crate) mod atomic {
    pub(crate) use std::sync::atomic::{
        AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
    };
}

pub(crate) mod thread {
    pub(crate) use std::thread::JoinHandle;
}

pub(crate) mod channel {
    pub(crate) use crossbeam_channel::{Receiver, Sender, bounded, select};
}
