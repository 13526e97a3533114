//! Either the image appears or the cancel counts: never both, never neither.
//!
//! Each of these makes a model here fail: a load and a store in place of either compare-and-swap,
//! a gate that lets a commit through once it is closed, or a cancel once it is passed.

use std::io;
use std::path::Path;
use std::sync::Arc;

use loom::sync::atomic::{AtomicU32, Ordering};
use loom::thread;

use crate::checkpoint::commit::GatedStorage;
use crate::checkpoint::control::Control;
use crate::checkpoint::error::CheckpointError;
use crate::store::Storage;

/// Storage that counts renames.
#[derive(Debug)]
struct Renames(AtomicU32);

impl Storage for Renames {
    fn rename(&self, _: &Path, _: &Path) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

/// A commit, a cancel and a failure at a time.
pub(crate) fn a_commit_and_a_cancel_exclude_each_other() {
    let control = Arc::new(Control::new());
    let renames = Arc::new(Renames(AtomicU32::new(0)));
    let storage = GatedStorage::new(renames.clone(), control.gate.clone());
    let commit = thread::spawn(move || storage.rename(Path::new("a"), Path::new("b")).is_ok());
    let failing = control.clone();
    let failed = thread::spawn(move || failing.fail(CheckpointError::Busy));
    let cancelled = control.cancel();
    // Once a cancel was accepted no image appears any more.
    let before = renames.0.load(Ordering::Relaxed);
    let committed = commit.join().unwrap();
    failed.join().unwrap();
    assert!(!(committed && cancelled), "committed and cancelled");
    assert!(!cancelled || before == 0);
    assert_eq!(renames.0.load(Ordering::Relaxed), u32::from(committed));
    assert!(control.reason().is_some());
}

/// A commit and a cancel alone: one of them comes through.
pub(crate) fn a_commit_or_a_cancel_wins() {
    let control = Arc::new(Control::new());
    let renames = Arc::new(Renames(AtomicU32::new(0)));
    let storage = GatedStorage::new(renames.clone(), control.gate.clone());
    let commit = thread::spawn(move || storage.rename(Path::new("a"), Path::new("b")).is_ok());
    let cancelled = control.cancel();
    let committed = commit.join().unwrap();
    assert!(committed != cancelled);
    assert_eq!(renames.0.load(Ordering::Relaxed), u32::from(committed));
    assert_eq!(control.reason().is_some(), cancelled);
}
