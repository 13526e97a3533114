//! Images, as edges look at them.

use std::path::Path;

use crate::host::{HostError, machine_facts};
use crate::restore::{compat, core};
use crate::store::{FileStorage, ImageReader, ImageSummary, VerifyReport};

/// Most threads that check an image: beyond it the disk is the limit.
const VERIFY_THREADS_MAX: usize = 8;

/// An image that is open for reading; nobody replaces or removes it meanwhile.
#[derive(Debug)]
pub struct Image {
    reader: ImageReader,
}

impl Image {
    /// Opens the image at `path`, or the newest one in the directory at `path`.
    ///
    /// Checks the header, the manifest, the chunk table and the page index; not yet the memory.
    pub fn open(path: &Path) -> Result<Self, HostError> {
        Ok(Self {
            reader: ImageReader::open(&FileStorage, path)?,
        })
    }

    pub(super) fn reader(&self) -> &ImageReader {
        &self.reader
    }

    /// Returns the name of the domain that was saved.
    pub fn name(&self) -> &str {
        &self.reader.manifest().guest.name
    }

    /// Returns the document of the domain that was saved.
    pub fn domain_xml(&self) -> &str {
        &self.reader.manifest().guest.domain_xml
    }

    /// Returns the image in figures.
    pub fn summary(&self) -> ImageSummary {
        self.reader.summary()
    }

    /// Returns the whole manifest, as JSON.
    pub fn manifest_json(&self) -> String {
        serde_json::to_string_pretty(self.reader.manifest())
            .expect("a manifest was read from JSON and is plain data")
    }

    /// Returns what this host lacks to run the image; nothing where it can.
    pub fn host_lacks(&self) -> Result<Vec<String>, HostError> {
        let host = machine_facts()?;
        let lacks = compat::check(&self.reader.manifest().guest.facts, &host);
        Ok(lacks.iter().map(ToString::to_string).collect())
    }

    /// Writes the guest's memory and registers as an ELF core file, for debuggers. Replaces `out`;
    /// on an error it is gone.
    pub fn write_core(&self, out: &Path) -> Result<(), HostError> {
        let file =
            std::fs::File::create(out).map_err(|source| HostError::path("write", out, source))?;
        let written = core::write(&self.reader, &file, default_threads(VERIFY_THREADS_MAX));
        written.map_err(|error| {
            // Half a core file would only mislead.
            drop(std::fs::remove_file(out));
            HostError::from(error)
        })
    }

    /// Reads every byte that a restore would use, and checks every digest.
    pub fn verify(&self) -> Result<VerifyReport, HostError> {
        Ok(self.reader.verify(default_threads(VERIFY_THREADS_MAX))?)
    }
}

/// Returns the number of CPUs that this process may use, but no more than `most`.
pub(super) fn default_threads(most: usize) -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(most))
}
