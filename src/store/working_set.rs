//! The working set that an image records: what its guest wrote last, for who restores it lazily.

use std::cmp::Reverse;

use crate::page::PageRun;
use crate::store::error::{Damage, Place};
use crate::store::options::RegionLayout;

/// Most runs that are recorded: a hint need not be whole, and a manifest stays small.
pub(crate) const WORKING_SET_RUNS_MAX: usize = 4096;

/// Returns the pieces that were captured in epoch `since` or later, those of the last epoch first.
///
/// A page is captured again for as long as the guest writes it. Each run is inside one of `regions`,
/// which may touch: a reader takes no others.
pub(crate) fn newest_first(
    pieces: impl Iterator<Item = (PageRun, Option<u32>)>,
    since: u32,
    regions: &[RegionLayout],
) -> Vec<PageRun> {
    let mut found: Vec<(u32, PageRun)> = pieces
        .filter_map(|(run, epoch)| epoch.filter(|epoch| *epoch >= since).zip(Some(run)))
        .collect();
    // Stable: pieces of one epoch stay in the order of memory.
    found.sort_by_key(|(epoch, _)| Reverse(*epoch));
    let mut runs: Vec<PageRun> = Vec::new();
    for (_, run) in found {
        let begins_region = |run: PageRun| regions.iter().any(|it| it.start == run.start);
        let is_full = runs.len() == WORKING_SET_RUNS_MAX;
        match runs.last_mut() {
            Some(last) if last.end() == run.start && !begins_region(run) => {
                last.page_count += run.page_count;
            }
            _ if is_full => break,
            _ => runs.push(run),
        }
    }
    runs
}

/// Fails where a recorded working set is too long, or not of memory. All of it together is no more
/// than memory has, so that whoever goes through it comes to an end.
pub(crate) fn check(runs: &[PageRun], regions: &[RegionLayout]) -> Result<(), Damage> {
    let damaged = |reason: String| Err(Damage::new(Place::Manifest, reason));
    if runs.len() > WORKING_SET_RUNS_MAX {
        return damaged(format!("has a working set of {} runs", runs.len()));
    }
    let mut left: u64 = regions.iter().map(|region| region.page_count).sum();
    for run in runs {
        let end = run.start.0.checked_add(run.page_count);
        let inside = |region: &RegionLayout| {
            region.start <= run.start && end.is_some_and(|end| end <= region.run().end().0)
        };
        let rest = left.checked_sub(run.page_count);
        left = rest.unwrap_or_default();
        if run.page_count == 0 || rest.is_none() || !regions.iter().any(inside) {
            return damaged(format!(
                "has {} pages from {} in its working set, which are not memory, or there twice",
                run.page_count, run.start
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::Gfn;

    fn run(start: u64, page_count: u64) -> PageRun {
        PageRun {
            start: Gfn(start),
            page_count,
        }
    }

    #[test]
    fn what_was_written_last_comes_first() {
        let epochs = [Some(0), Some(1), Some(3), Some(3), None, Some(3), Some(1)];
        let pieces: Vec<_> = (0..)
            .map(|number| run(number * 512, 512))
            .zip(epochs)
            .collect();
        let written = newest_first(pieces.iter().copied(), 1, &[]);
        assert_eq!(
            written,
            [
                run(1024, 1024),
                run(2560, 512),
                run(512, 512),
                run(3072, 512)
            ]
        );
        let all = newest_first(pieces.into_iter(), 0, &[]);
        assert_eq!(all.last(), Some(&run(0, 512)));
    }

    #[test]
    fn a_run_that_is_recorded_is_inside_one_region() {
        // A machine's memory is in slots that touch.
        let regions: Vec<_> = (0..3)
            .map(|slot| RegionLayout {
                slot,
                start: Gfn(u64::from(slot) * 1024),
                page_count: 1024,
            })
            .collect();
        let pieces = || (0..6).map(|number| (run(number * 512, 512), Some(1)));
        let runs = newest_first(pieces(), 1, &regions);
        assert_eq!(runs, [run(0, 1024), run(1024, 1024), run(2048, 1024)]);
        check(&runs, &regions).unwrap();
    }

    #[test]
    fn no_more_is_recorded_than_a_reader_takes() {
        let pieces = (0..10_000).map(|number| (run(number * 1024, 512), Some(5)));
        let runs = newest_first(pieces, 1, &[]);
        assert_eq!(runs.len(), WORKING_SET_RUNS_MAX);
        let region = RegionLayout {
            slot: 0,
            start: Gfn(0),
            page_count: 10_000 * 1024,
        };
        check(&runs, &[region]).unwrap();
        let mut long = runs.clone();
        long.push(run(0, 1));
        check(&long, &[region]).unwrap_err();
        for bad in [run(0, 0), run(10_000 * 1024 - 1, 2), run(u64::MAX, 2)] {
            check(&[bad], &[region]).unwrap_err();
        }
        check(&[run(0, 10_000 * 1024)], &[region]).unwrap();
        check(&[run(0, 10_000 * 1024), run(0, 1)], &[region]).unwrap_err();
    }
}
