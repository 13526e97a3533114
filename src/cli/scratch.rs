//! A directory of one run's own.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use uuid::Uuid;

/// A fresh directory below the system's temporary one, removed with all it holds when dropped.
#[derive(Debug)]
pub(super) struct Scratch {
    path: PathBuf,
}

impl Scratch {
    pub fn new(prefix: &str) -> anyhow::Result<Self> {
        Self::inside(&std::env::temp_dir(), prefix)
    }

    /// Makes the directory inside `parent`, whose disk then holds what is put there.
    pub fn inside(parent: &Path, prefix: &str) -> anyhow::Result<Self> {
        let path = parent.join(format!("{prefix}-{}", Uuid::new_v4().simple()));
        fs::create_dir_all(&path).with_context(|| format!("could not make {}", path.display()))?;
        Ok(Self { path })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            log::warn!("could not remove {}: {error}", self.path.display());
        }
    }
}
