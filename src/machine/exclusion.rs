//! Keeps the engine's pauses and the machine's own changes apart.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Who may change the machine now.
///
/// Between an engine's pause and its resume nothing may change: no reset happens then. Nor does a
/// pause begin while a guest's request (a reset, a power-off) is not carried out: the guest would
/// be saved behind the instruction that made it, and never make it again.
#[derive(Debug, Default)]
pub(super) struct Exclusion {
    inner: Mutex<Inner>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Inner {
    pauses: u32,
    resetting: bool,
    requests: u32,
}

impl Exclusion {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, inner: MutexGuard<'a, Inner>) -> MutexGuard<'a, Inner> {
        self.changed
            .wait(inner)
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a pause as soon as no reset and no request is under way.
    pub(super) fn begin_pause(&self) {
        let mut inner = self.lock();
        while inner.resetting || inner.requests > 0 {
            inner = self.wait(inner);
        }
        inner.pauses += 1;
    }

    /// Returns whether a request has come since the pause began: it is then given up.
    pub(super) fn has_request(&self) -> bool {
        self.lock().requests > 0
    }

    pub(super) fn end_pause(&self) {
        let mut inner = self.lock();
        inner.pauses -= 1;
        self.changed.notify_all();
    }

    /// Begins a reset as soon as no pause is in force.
    pub(super) fn begin_reset(&self) {
        let mut inner = self.lock();
        while inner.resetting || inner.pauses > 0 {
            inner = self.wait(inner);
        }
        inner.resetting = true;
    }

    pub(super) fn end_reset(&self) {
        self.lock().resetting = false;
        self.changed.notify_all();
    }

    /// Notes a guest's request, before its vCPU counts as stopped.
    pub(super) fn add_request(&self) {
        self.lock().requests += 1;
    }

    pub(super) fn end_request(&self) {
        self.lock().requests -= 1;
        self.changed.notify_all();
    }
}
