//! The files that a domain needs of the host, for who gives up the right to open others.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{DomainOptions, HostError};
use crate::machine::spec::{
    self, DiskFormat, DiskSpec, MachineSpec, PciDevice, SerialBackend, Source,
};
use crate::qcow2;
use crate::store::ImageReader;

/// Files of the host that a domain may open again while it runs.
#[derive(Clone, Debug, Default)]
pub struct DomainFiles {
    /// The domain's name.
    pub name: String,
    /// Those that it only reads: kernel, initrd, disks that are not written, the image.
    pub read: Vec<PathBuf>,
    /// Those that it writes: disks, files of serial ports and consoles.
    pub write: Vec<PathBuf>,
    /// The directory of the images that it writes by itself, at an interval.
    pub images: Option<PathBuf>,
}

impl DomainFiles {
    /// Finds them in what a machine is made from, and in the image that it comes from.
    fn of(spec: &MachineSpec, image: Option<&ImageReader>) -> Self {
        let mut files = Self {
            name: spec.name.clone(),
            ..Self::default()
        };
        if let Some(boot) = &spec.boot {
            let sources = [Some(&boot.kernel), boot.initrd.as_ref()];
            for source in sources.into_iter().flatten() {
                if let Source::Path(path) = source {
                    files.read.push(path.clone());
                }
            }
        }
        for serial in &spec.serials {
            files.add_terminal(&serial.backend);
        }
        for device in &spec.pci {
            match &device.device {
                PciDevice::Disk(disk) => files.add_disk(disk),
                PciDevice::Rng(rng) => files.read.push(rng.source.clone()),
                PciDevice::Console(backend) => files.add_terminal(backend),
                PciDevice::Net(_) | PciDevice::Balloon(_) => {}
            }
        }
        if let Some(image) = image {
            let layers = image.layer_paths().map(Path::to_owned);
            files.read.extend(layers);
            files.read.push(image.path().to_owned());
        }
        files
    }

    fn add_terminal(&mut self, backend: &SerialBackend) {
        if let SerialBackend::File { path, .. } = backend {
            self.write.push(path.clone());
        }
    }

    fn add_disk(&mut self, disk: &DiskSpec) {
        let list = if disk.read_only {
            &mut self.read
        } else {
            &mut self.write
        };
        list.push(disk.path.clone());
        // Never of a raw disk: its guest could write a header that names any file.
        if let DiskFormat::Image(_) = disk.format {
            self.read.extend(qcow2::backing_files(&disk.path));
        }
    }
}

/// What is done with a domain's files.
type Action = dyn Fn(&DomainFiles) -> io::Result<()> + Send + Sync;

/// Something to do with a domain's files; an error ends the domain.
#[derive(Clone)]
pub struct WhenOpen(Arc<Action>);

impl WhenOpen {
    /// Makes it of a function.
    pub fn new(of: impl Fn(&DomainFiles) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(of))
    }
}

impl fmt::Debug for WhenOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WhenOpen")
    }
}

impl DomainOptions {
    /// Has a machine do what is to be done once it has opened everything. `images` is the directory
    /// that it writes images to by itself.
    pub(super) fn attach_when_open(
        &self,
        spec: &mut MachineSpec,
        image: Option<&ImageReader>,
        images: Option<&Path>,
    ) {
        if let Some(WhenOpen(then)) = self.when_open.clone() {
            let mut files = DomainFiles::of(spec, image);
            files.images = images.map(Path::to_owned);
            spec.when_open = Some(spec::WhenOpen(Arc::new(move || then(&files))));
        }
    }
}

/// Makes a directory for images, where there is none.
pub(super) fn make_images_directory(directory: &Path) -> Result<(), HostError> {
    std::fs::create_dir_all(directory)
        .map_err(|source| HostError::path("make the directory of images", directory, source))
}

/// Returns the directory of a domain's own images, which may not be there.
pub(super) fn images_directory(name: &str) -> Result<PathBuf, HostError> {
    let base = if rustix::process::geteuid().is_root() {
        PathBuf::from("/var/lib/livepoint")
    } else {
        let home = std::env::home_dir().ok_or_else(|| {
            let why = "no home directory to keep images in: say where to write";
            HostError::Invalid(why.to_owned())
        })?;
        home.join(".local/state/livepoint")
    };
    Ok(base.join("checkpoints").join(name))
}
