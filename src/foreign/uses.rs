//! Who may still touch what a VMM has lent: it gets that back when nobody does.

use std::sync::Arc;

use crate::sync::{Condvar, Mutex, PoisonError};

/// How many views, and pieces of memory, the engine's threads may still touch.
#[derive(Debug)]
pub(crate) struct Uses {
    count: Mutex<usize>,
    changed: Condvar,
}

/// One of them.
#[derive(Debug)]
pub(crate) struct Use(Arc<Uses>);

impl Use {
    pub(crate) fn new(uses: &Arc<Uses>) -> Self {
        *uses.count.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Self(uses.clone())
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        *self.0.count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        self.0.changed.notify_all();
    }
}

impl Uses {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self {
            count: Mutex::new(0),
            changed: Condvar::new(),
        })
    }

    /// Waits until only `count` are left.
    pub(crate) fn wait_for(&self, count: usize) {
        let now = self.count.lock().unwrap_or_else(PoisonError::into_inner);
        drop(
            self.changed
                .wait_while(now, |now| *now > count)
                .unwrap_or_else(PoisonError::into_inner),
        );
    }
}
