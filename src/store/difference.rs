//! Where two images of one guest differ, told from their indexes alone.

use crate::page::{Gfn, PageRun};
use crate::store::error::StoreError;
use crate::store::format::{Digest, IndexRun, RunSource, narrow};
use crate::store::reader::ImageReader;

/// Where a page's bytes are, whatever image names them.
#[derive(PartialEq, Eq)]
enum Bytes {
    Zeros,
    /// In a page of a chunk of the file with this root digest.
    In(Digest, usize, u64),
}

impl ImageReader {
    /// Returns the pages of memory that the two images do not have from the same place, sorted.
    ///
    /// All others have the same bytes in both. No chunk is read: pages that were written again with
    /// the same bytes are among those returned. Fails where the images have other regions of memory.
    pub fn differing_runs(&self, other: &ImageReader) -> Result<Vec<PageRun>, StoreError> {
        if self.manifest().regions != other.manifest().regions {
            return Err(StoreError::Unwritable {
                reason: format!("{} has other regions of memory", other.path().display()),
            });
        }
        let mut found: Vec<PageRun> = Vec::new();
        let (mut ours, mut theirs) = (self.index().runs().iter(), other.index().runs().iter());
        let (mut a, mut b) = (ours.next(), theirs.next());
        for region in &self.manifest().regions {
            let (mut at, end) = (region.start, region.run().end());
            while at < end {
                // Each index covers every page of every region.
                let (Some(here), Some(there)) = (a, b) else {
                    return Ok(found);
                };
                let next = here.end().min(there.end()).min(end);
                if self.place(here, at) != other.place(there, at) {
                    let page_count = next.0 - at.0;
                    PageRun {
                        start: at,
                        page_count,
                    }
                    .append_to(&mut found);
                }
                at = next;
                a = if here.end() <= at { ours.next() } else { a };
                b = if there.end() <= at { theirs.next() } else { b };
            }
        }
        Ok(found)
    }

    fn place(&self, run: &IndexRun, gfn: Gfn) -> Bytes {
        match run.source {
            RunSource::Zero => Bytes::Zeros,
            RunSource::Chunk { chunk, first_page } => {
                let (file, number) = self.file_of(narrow(u64::from(chunk)));
                let page = u64::from(first_page) + (gfn.0 - run.start.0);
                Bytes::In(file.header.root, number, page)
            }
        }
    }
}
