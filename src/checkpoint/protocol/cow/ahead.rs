//! Write-protecting memory: in the pause where that is quick, ahead of it where it is not.

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::capture::{CopyOnWrite, Moment, pieces_in};
use super::{page_map_failed, protection_failed};
use crate::checkpoint::capture::UntouchedPages;
use crate::checkpoint::error::Halt;
use crate::checkpoint::stats::micros;
use crate::page::AtomicPageBitmap;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{PoisonError, RwLock};

/// Pieces that are protected by one call at most: the call's own cost does not show any more.
const RUN_PIECES_MAX: usize = 16;

/// Calls from which the cost is learned.
const SAMPLES: usize = 5;

/// How memory was write-protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct ArmingStatistics {
    /// Whether most of it was done before the pause, while the guest ran.
    pub ahead: bool,
    /// What protecting all of memory was estimated to take, from a sample.
    pub estimated_us: u64,
    /// Pieces that were written after they were protected ahead; they were protected again in the
    /// pause.
    pub written_ahead_pieces: u64,
    /// Writes that waited until they were let through, before the pause.
    pub early_writes: u64,
}

/// Who writes a protected piece before the pause is let through, and the piece is remembered.
#[derive(Debug)]
pub(super) struct EarlyWrites {
    /// Held shared while somebody is let through, so that none of it is left when the pause has
    /// switched over. Whoever holds it touches no guest memory.
    phase: RwLock<Phase>,
    written: AtomicPageBitmap,
    count: AtomicU64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Before the captured moment.
    Ahead,
    /// From the captured moment on: a piece is copied before it is written.
    Armed,
}

impl EarlyWrites {
    pub(super) fn new(pieces: usize) -> Self {
        Self {
            phase: RwLock::new(Phase::Ahead),
            written: AtomicPageBitmap::new(pieces as u64),
            count: AtomicU64::new(0),
        }
    }

    /// Lets a writer through if the moment has not come; returns whether it did.
    ///
    /// The mark comes first: once un-protected, the piece may be written at once.
    pub(super) fn let_through(
        &self,
        piece: usize,
        unprotect: impl FnOnce() -> Result<(), Halt>,
    ) -> Result<bool, Halt> {
        let phase = self.phase.read().unwrap_or_else(PoisonError::into_inner);
        if *phase == Phase::Armed {
            return Ok(false);
        }
        self.written.set(piece as u64);
        self.count.fetch_add(1, Ordering::Relaxed);
        unprotect()?;
        Ok(true)
    }

    /// Ends the letting through, in the pause; returns the pieces that are not protected any more.
    fn end(&self) -> Vec<usize> {
        *self.phase.write().unwrap_or_else(PoisonError::into_inner) = Phase::Armed;
        pieces_in(&self.written)
    }
}

/// The protection of memory, from before the pause until the moment is fixed.
pub(super) struct Ahead {
    cow: Arc<CopyOnWrite>,
    /// Taken at the moment.
    untouched: Option<UntouchedPages>,
    budget: Duration,
    statistics: ArmingStatistics,
}

impl Ahead {
    /// `budget` is what protecting memory may take in the pause.
    pub(super) fn new(cow: Arc<CopyOnWrite>, untouched: UntouchedPages, budget: Duration) -> Self {
        Self {
            cow,
            untouched: Some(untouched),
            budget,
            statistics: ArmingStatistics::default(),
        }
    }

    /// Protects a sample, and all the rest if that would take too long in the pause.
    pub(super) fn arm(&mut self) -> Result<(), Halt> {
        let touched = self.touched_pieces();
        let runs: Vec<_> = self.runs(&touched).collect();
        let estimate = self.estimate(&runs)?;
        self.statistics.estimated_us = micros(estimate);
        if estimate > self.budget {
            self.statistics.ahead = true;
            for run in &runs {
                self.cow.control().check()?;
                self.protect_run(run)?;
            }
        }
        Ok(())
    }

    /// Protects some of `runs`; returns what all of them would take. The median of the samples:
    /// the host may have run somebody else meanwhile.
    fn estimate(&self, runs: &[Range<usize>]) -> Result<Duration, Halt> {
        let mut each_ns = Vec::with_capacity(SAMPLES);
        for run in runs
            .iter()
            .step_by((runs.len() / SAMPLES).max(1))
            .take(SAMPLES)
        {
            let began = Instant::now();
            self.protect_run(run)?;
            each_ns.push(began.elapsed().as_nanos() / run.len().max(1) as u128);
        }
        each_ns.sort_unstable();
        let median = each_ns.get(each_ns.len() / 2).copied().unwrap_or(0);
        let pieces: usize = runs.iter().map(Range::len).sum();
        let all = median * pieces as u128;
        Ok(Duration::from_nanos(u64::try_from(all).unwrap_or(u64::MAX)))
    }

    /// Protects what is not protected yet, while nobody runs, and fixes the moment.
    ///
    /// `wanted` has the pages to capture, by piece, where it is not all of them.
    pub(super) fn finish_in_pause(&mut self, wanted: Option<Vec<u64>>) -> Result<(), Halt> {
        let mut untouched = self.untouched.take().expect("a checkpoint has one moment");
        let given_back = self.cow.given_back();
        let touched_since = untouched
            .look_again(self.cow.layout(), &given_back)
            .map_err(page_map_failed)?;
        // Before the switch: from it on, a handler that comes late captures its piece.
        self.cow.set_moment(Moment { untouched, wanted });
        let written = self.cow.early_writes().end();
        self.statistics.written_ahead_pieces = written.len() as u64;
        if self.statistics.ahead {
            self.protect(&touched_since)?;
            self.protect(&written)
        } else {
            let protection = self.cow.protection();
            Ok(protection.protect_all().map_err(protection_failed)?)
        }
    }

    pub(super) fn statistics(&self) -> ArmingStatistics {
        ArmingStatistics {
            early_writes: self.cow.early_writes().count.load(Ordering::Relaxed),
            ..self.statistics
        }
    }

    fn touched_pieces(&self) -> Vec<usize> {
        let untouched = self.untouched.as_ref().expect("the moment is to come");
        let pieces = self.cow.pieces().iter().enumerate();
        pieces
            .filter(|(number, piece)| untouched.count(*number) < piece.page_count)
            .map(|(number, _)| number)
            .collect()
    }

    fn protect(&self, pieces: &[usize]) -> Result<(), Halt> {
        self.runs(pieces).try_for_each(|run| self.protect_run(&run))
    }

    fn protect_run(&self, run: &Range<usize>) -> Result<(), Halt> {
        let protected = self
            .cow
            .protection()
            .protect(&self.cow.pieces()[run.clone()]);
        Ok(protected.map_err(protection_failed)?)
    }

    /// Returns the stretches of `numbers`, which are in order, that one call can protect.
    fn runs<'a>(&'a self, numbers: &'a [usize]) -> impl Iterator<Item = Range<usize>> + 'a {
        let pieces = self.cow.pieces();
        let follows = |before: &usize, next: &usize| {
            *next == before + 1 && pieces[*next].region == pieces[*before].region
        };
        numbers
            .chunk_by(follows)
            .flat_map(|stretch| stretch.chunks(RUN_PIECES_MAX))
            .map(|run| run[0]..run[0] + run.len())
    }
}
