//! Images, as edges look at them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::domain::{DomainConfig, XmlView};
use crate::host::domain::parse;
use crate::host::{HostError, machine_facts};
use crate::page::{Gfn, PAGE_BYTES, PIECE_BYTES, PIECE_PAGES, PageRun};
use crate::restore::{compat, core};
use crate::store::{
    self, Codec, FileStorage, Garbage, ImageReader, ImageSummary, LeafDigests, ReadScratch,
    SectionSummary, Storage, VerifyReport, WriteOptions,
};

/// Most threads that check an image: beyond it the disk is the limit.
const VERIFY_THREADS_MAX: usize = 8;

/// Up to so many pages are found one by one: each costs the reading of a chunk.
const READ_BY_PAGE_MAX: u64 = 4;

/// An image that is open for reading; nobody replaces or removes it meanwhile.
#[derive(Debug)]
pub struct Image {
    reader: ImageReader,
}

/// A range of guest memory in an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRange {
    /// Number of the memory slot.
    pub slot: u32,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub bytes: u64,
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

    /// Has the digests of the leaves of chunks that are read kept, and used.
    pub(super) fn keep_leaves(&mut self, leaves: &Arc<LeafDigests>) {
        self.reader.keep_leaves(leaves.clone());
    }

    pub(super) fn into_reader(self) -> ImageReader {
        self.reader
    }

    /// Returns the path of the image's file.
    pub fn path(&self) -> &Path {
        self.reader.path()
    }

    /// Returns the names of the disks whose content is in the image.
    pub fn disk_names(&self) -> Vec<&str> {
        let disks = self.reader.manifest().disks.iter();
        disks.map(|disk| disk.name.as_str()).collect()
    }

    /// Returns the name of the domain that was saved.
    pub fn name(&self) -> &str {
        &self.reader.manifest().guest.name
    }

    /// Returns the document of the domain that was saved.
    pub fn domain_xml(&self) -> &str {
        &self.reader.manifest().guest.domain_xml
    }

    /// Has the image file at `path` restore as the document `xml` says, by [`Image::check_document`]:
    /// whole or not at all. `prepare` is called with the path of the new file before it takes the name.
    ///
    /// Nobody may read the image, and none may be based on it. Blocks while it is copied.
    pub fn replace_document(
        path: &Path,
        xml: &str,
        prepare: impl FnOnce(&Path) -> io::Result<()>,
    ) -> Result<(), HostError> {
        let config = Self::open(path)?.check_document(xml)?;
        let xml = config.to_xml(XmlView::Inactive);
        store::replace_domain_xml(&FileStorage, path, &xml, prepare)?;
        Ok(())
    }

    /// Returns the domain that `xml` describes, which must be the one that was saved, and the same
    /// machine to its guest; where its disks, consoles and networks are on the host may differ.
    pub fn check_document(&self, xml: &str) -> Result<DomainConfig, HostError> {
        let config = parse(xml)?;
        parse(self.domain_xml())?.check_same_guest(&config)?;
        Ok(config)
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

    /// Returns the image in figures, as JSON.
    pub fn summary_json(&self) -> String {
        serde_json::to_string_pretty(&self.summary()).expect("a summary is plain data")
    }

    /// Returns what its VMM said of the guest; domain XML where that was us.
    pub fn description(&self) -> &str {
        &self.reader.manifest().guest.domain_xml
    }

    /// Returns the ranges of guest memory, sorted.
    pub fn ranges(&self) -> Vec<MemoryRange> {
        let regions = self.reader.manifest().regions.iter();
        regions
            .map(|region| MemoryRange {
                slot: region.slot,
                gpa: region.start.gpa(),
                bytes: region.run().bytes(),
            })
            .collect()
    }

    /// Returns the state sections, without reading them.
    pub fn sections(&self) -> Vec<SectionSummary> {
        self.reader.summary().sections
    }

    /// Fails where this host cannot run the image, and says what it lacks.
    pub fn check_host(&self) -> Result<(), HostError> {
        check_host_for(&self.reader)
    }

    /// Reads `bytes` of guest memory from `gpa` on, and hands them out part by part, each with its
    /// offset from `gpa`, each once. No byte is handed out before its digest was checked, and none
    /// where a part of the range is in no region.
    pub fn read(
        &self,
        gpa: u64,
        bytes: u64,
        mut hand_out: impl FnMut(usize, &[u8]),
    ) -> Result<(), HostError> {
        let end = gpa.checked_add(bytes).ok_or_else(|| {
            HostError::Invalid(format!("{bytes:#x} bytes at {gpa:#x} go past the end"))
        })?;
        self.check_covered(gpa, end)?;
        // Gives the part of `run` that is wanted, whose bytes are `content`.
        let mut give = |run: PageRun, content: &[u8]| {
            let (first, last) = (run.start.gpa().max(gpa), run.end().gpa().min(end));
            if first < last {
                let inside = narrow(first - run.start.gpa())..narrow(last - run.start.gpa());
                hand_out(narrow(first - gpa), &content[inside]);
            }
        };
        let wanted = PageRun::touching(gpa, bytes);
        let mut scratch = ReadScratch::default();
        if wanted.page_count <= READ_BY_PAGE_MAX {
            let mut page = [0; PAGE_BYTES];
            for gfn in wanted.start.0..wanted.end().0 {
                let start = Gfn(gfn);
                if !self.reader.read_page(start, &mut scratch, &mut page)? {
                    return Err(HostError::NoMemoryAt { gpa: start.gpa() });
                }
                let page_count = 1;
                give(PageRun { start, page_count }, &page);
            }
            return Ok(());
        }
        for zeros in self.reader.zero_runs() {
            for piece in zeros.intersection(wanted).into_iter().flat_map(pieces) {
                give(piece, &[0; PIECE_BYTES][..narrow(piece.bytes())]);
            }
        }
        for chunk in 0..self.reader.chunk_count() {
            let runs = || self.reader.runs_of_chunk(chunk);
            if runs().any(|part| part.run.intersection(wanted).is_some()) {
                let raw = self.reader.read_chunk(chunk, &mut scratch)?;
                runs().for_each(|part| give(part.run, part.bytes_in(raw)));
            }
        }
        Ok(())
    }

    /// Fails where a byte of a range is in no region.
    fn check_covered(&self, gpa: u64, end: u64) -> Result<(), HostError> {
        let mut covered = gpa;
        for range in self.ranges() {
            if range.gpa <= covered && covered < range.gpa + range.bytes {
                covered = range.gpa + range.bytes;
            }
        }
        if covered < end {
            return Err(HostError::NoMemoryAt { gpa: covered });
        }
        Ok(())
    }

    /// Writes guest memory to a flat file, in which offsets are guest physical addresses. Zeros
    /// become holes.
    pub fn export(&self, path: &Path) -> Result<(), HostError> {
        let failed = |action| move |source| HostError::path(action, path, source);
        let file = File::create(path).map_err(failed("create"))?;
        let end = self.ranges().last().map_or(0, |last| last.gpa + last.bytes);
        file.set_len(end).map_err(failed("set the length of"))?;
        let chunks = self.reader.live_chunks();
        let written = Mutex::new(Ok(()));
        let threads = default_threads(VERIFY_THREADS_MAX);
        self.reader.for_each_chunk(&chunks, threads, |chunk, raw| {
            for part in self.reader.runs_of_chunk(chunk) {
                let result = file.write_all_at(part.bytes_in(raw), part.run.start.gpa());
                if let Err(error) = result {
                    *written.lock().unwrap_or_else(PoisonError::into_inner) = Err(error);
                    return;
                }
            }
        })?;
        let written = written.into_inner().unwrap_or_else(PoisonError::into_inner);
        written.map_err(failed("write"))
    }

    /// Writes an image that holds the same and needs no other, to `out`, or into the directory there;
    /// returns its path. Blocks while it is written.
    pub fn fold(self, out: &Path, codec: Codec) -> Result<PathBuf, HostError> {
        let options = WriteOptions {
            codec,
            ..WriteOptions::default()
        };
        let storage: Arc<dyn Storage> = Arc::new(FileStorage);
        let folded = store::fold(&storage, &Arc::new(self.reader), out, &options)?;
        Ok(folded.path)
    }

    /// Reads every byte that a restore would use, and checks every digest.
    pub fn verify(&self) -> Result<VerifyReport, HostError> {
        Ok(self.reader.verify(default_threads(VERIFY_THREADS_MAX))?)
    }
}

fn host_lacks(image: &ImageReader) -> Result<Vec<String>, HostError> {
    let lacks = compat::check(&image.manifest().guest.facts, &machine_facts()?);
    Ok(lacks.iter().map(ToString::to_string).collect())
}

/// Fails where this host cannot run the image, and says what it lacks.
pub(super) fn check_host_for(image: &ImageReader) -> Result<(), HostError> {
    let lacks = host_lacks(image)?;
    if lacks.is_empty() {
        Ok(())
    } else {
        Err(HostError::Incompatible(lacks))
    }
}

/// Cuts a run into parts of a piece at most.
fn pieces(run: PageRun) -> impl Iterator<Item = PageRun> {
    let starts = (run.start.0..run.end().0).step_by(narrow(PIECE_PAGES));
    starts.map(move |start| PageRun {
        start: Gfn(start),
        page_count: PIECE_PAGES.min(run.end().0 - start),
    })
}

/// Narrows an offset in memory that the caller has room for.
fn narrow(value: u64) -> usize {
    usize::try_from(value).expect("a range that is in memory fits the address space")
}

/// Removes images from the directory `dir` that are older than the newest `keep` of their domain, as
/// far as no kept one needs them and nobody reads them.
pub fn collect_garbage(dir: &Path, keep: u32) -> Result<Garbage, HostError> {
    if keep == 0 {
        let why = "at least one image is kept: to remove all of them, remove the directory";
        return Err(HostError::Invalid(why.to_owned()));
    }
    let keep = usize::try_from(keep).unwrap_or(usize::MAX);
    Ok(store::collect_garbage(&FileStorage, dir, keep)?)
}

/// Returns the number of CPUs that this process may use, but no more than `most`.
pub(super) fn default_threads(most: usize) -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get().min(most))
}
