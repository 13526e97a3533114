//! The memory of an image, once for all domains that start from it.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::domain::DomainConfig;
use crate::host::{HostError, Image};
use crate::machine::memory::to_be_shared;
use crate::machine::spec::MachineSpec;
use crate::machine::{MachineError, UnfilledMachine};
use crate::restore::eager::{self, FillOptions};
use crate::store::ImageReader;
use crate::sys::frozen::FrozenMemory;

/// Memory of an image that was read and checked once, and that nobody can change any more. Domains
/// that start from it share its pages until they write them.
///
/// Clones are the same memory. It lives as long as a domain uses it, or this does.
#[derive(Clone, Debug)]
pub struct SharedMemory {
    memory: Arc<FrozenMemory>,
    root_digest: String,
}

impl SharedMemory {
    /// Reads the memory of an image, by up to `threads` threads, and checks every byte of it. Blocks
    /// until all of it is there.
    pub fn load(image: &Image, threads: usize) -> Result<Self, HostError> {
        let reader = image.reader();
        let config = super::domain::parse(&reader.manifest().guest.domain_xml)?;
        check(&config)?;
        let bytes = config.machine.memory.size().bytes();
        let (freezer, regions) = to_be_shared(bytes).map_err(MachineError::from)?;
        let options = FillOptions {
            threads,
            memory_is_fresh: true,
        };
        eager::fill(reader, &regions, &options)?;
        drop(regions);
        let frozen = freezer.freeze().map_err(|source| HostError::Resource {
            what: "memory that nobody can change",
            source,
        })?;
        Ok(Self {
            memory: Arc::new(frozen),
            root_digest: reader.root_digest(),
        })
    }

    /// Takes memory of another process of this user's, by the path that its [`SharedMemory::path`]
    /// returned. It must be that of the image with this root digest, which that process knows.
    pub fn open(path: &Path, root_digest: &str) -> Result<Self, HostError> {
        let opened = FrozenMemory::open(path);
        let memory =
            opened.map_err(|source| HostError::path("take the memory at", path, source))?;
        Ok(Self {
            memory: Arc::new(memory),
            root_digest: root_digest.to_owned(),
        })
    }

    /// Returns where other processes of this user's find it, while this process has it.
    pub fn path(&self) -> PathBuf {
        let number = self.memory.as_fd().as_raw_fd();
        PathBuf::from(format!("/proc/{}/fd/{number}", std::process::id()))
    }

    /// Returns the root digest of the image whose memory it is.
    pub fn root_digest(&self) -> &str {
        &self.root_digest
    }

    /// Makes a machine from the image that this is the memory of.
    pub(super) fn build(
        &self,
        image: &ImageReader,
        config: &DomainConfig,
        mut spec: MachineSpec,
    ) -> Result<UnfilledMachine, HostError> {
        check(config)?;
        if image.root_digest() != self.root_digest {
            let path = image.path().display();
            return Err(HostError::Invalid(format!(
                "{path} is another image than the one whose memory is shared"
            )));
        }
        // It would give the machine a copy of each page.
        spec.memory.preallocate = false;
        spec.memory.shared = Some(self.memory.clone());
        let unfilled = crate::machine::Machine::build_for_restore(spec)?;
        eager::check_layout(&image.manifest().regions, unfilled.regions())?;
        Ok(unfilled)
    }
}

/// Fails where a domain's memory is of a kind that cannot be shared.
fn check(config: &DomainConfig) -> Result<(), HostError> {
    let memory = &config.machine.memory;
    let why = if memory.locked {
        "it is locked, so that each domain must have its own"
    } else if memory.huge_pages().is_some() {
        "it is in hugetlb pages"
    } else {
        return Ok(());
    };
    let name = config.name.as_str();
    Err(HostError::Unsupported(format!(
        "the memory of {name} cannot be shared: {why}"
    )))
}
