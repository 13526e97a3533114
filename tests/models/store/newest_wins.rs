//! The copy with the highest epoch is in the index, in whatever order copies arrive.
//!
//! A swap, or a load and a store, in place of `fetch_max` makes the model fail, and so does an
//! epoch below the location in a slot's bits.

use std::sync::Arc;

use loom::thread;

use super::format::{IndexRun, RunSource};
use super::index::PageTable;
use super::options::RegionLayout;
use crate::page::{Gfn, PageRun};

fn of_chunk(chunk: u32) -> RunSource {
    RunSource::Chunk {
        chunk,
        first_page: 0,
    }
}

/// The oldest copy has the highest chunk number. The newest of one page is in a chunk, of the
/// other it is zeros; which are the highest location, and are older there.
pub(crate) fn the_newest_epoch_wins() {
    let region = RegionLayout {
        slot: 0,
        start: Gfn(0),
        page_count: 2,
    };
    let run = |page, page_count| PageRun {
        start: Gfn(page),
        page_count,
    };
    let table = Arc::new(PageTable::new(&[region]));
    let oldest = table.clone();
    let oldest = thread::spawn(move || {
        oldest.record_zero_run(0, run(0, 1)).unwrap();
        oldest.record(0, [(Gfn(1), of_chunk(9))].into_iter());
    });
    let middle = table.clone();
    let middle = thread::spawn(move || {
        middle.record(
            1,
            [Gfn(0), Gfn(1)].map(|gfn| (gfn, of_chunk(5))).into_iter(),
        );
    });
    table.record(2, [(Gfn(0), of_chunk(1))].into_iter());
    table.record_zero_run(2, run(1, 1)).unwrap();
    oldest.join().unwrap();
    middle.join().unwrap();
    let expected =
        [(Gfn(0), of_chunk(1)), (Gfn(1), RunSource::Zero)].map(|(start, source)| IndexRun {
            start,
            page_count: 1,
            source,
        });
    assert_eq!(table.runs(None).unwrap(), expected);
}
