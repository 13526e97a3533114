//! Which pieces are captured, as the threads that capture them agree on it.

use crate::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

const TODO: u8 = 0;
const CAPTURED: u8 = 1;

/// One state a piece: still to capture, or captured by exactly one thread.
///
/// There is no state "being captured". Several threads may copy a piece at once, each into memory
/// of its own; the first to [finish](CapturedPieces::finish) has the copy that counts. So nobody
/// ever waits for another, and a thread that is stuck in the middle of a copy holds nobody up.
///
/// What makes the winner's copy right: a piece is write-protected from before the first copy
/// until it is captured, and only who finds it captured takes the protection away. A copy that
/// ends before that was made of memory that nobody could write.
#[derive(Debug)]
pub(crate) struct CapturedPieces {
    states: Box<[AtomicU8]>,
    left: AtomicUsize,
}

impl CapturedPieces {
    pub(crate) fn new(pieces: usize) -> Self {
        Self {
            states: (0..pieces).map(|_| AtomicU8::new(TODO)).collect(),
            left: AtomicUsize::new(pieces),
        }
    }

    /// Returns whether a piece is captured.
    ///
    /// Acquire: pairs with [`CapturedPieces::finish`], so that who takes the protection away does
    /// so after the copy.
    pub(crate) fn has(&self, piece: usize) -> bool {
        self.states[piece].load(Ordering::Acquire) == CAPTURED
    }

    /// Claims that the caller's copy of a piece, which is complete, is the one that counts.
    ///
    /// Release: the copy's loads stay before it, and so before any store that follows the
    /// un-protecting.
    pub(crate) fn finish(&self, piece: usize) -> Finish {
        let first = self.states[piece]
            .compare_exchange(TODO, CAPTURED, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if !first {
            return Finish::TooLate;
        }
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            Finish::Last
        } else {
            Finish::First
        }
    }
}

/// What became of a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finish {
    /// It counts.
    First,
    /// It counts, and every other piece is captured as well.
    Last,
    /// Another copy of the piece counts.
    TooLate,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_copy_of_each_piece_counts_and_the_last_piece_is_told_once() {
        const PIECES: usize = 100;
        let captured = CapturedPieces::new(PIECES);
        let (mut first, mut last) = (0, 0);
        std::thread::scope(|scope| {
            let run = || {
                let finishes = (0..PIECES).map(|piece| captured.finish(piece));
                let finishes: Vec<_> = finishes.collect();
                let count = |wanted| finishes.iter().filter(|&&seen| seen == wanted).count();
                (count(Finish::First), count(Finish::Last))
            };
            let threads: Vec<_> = (0..3).map(|_| scope.spawn(run)).collect();
            for thread in threads {
                let (firsts, lasts) = thread.join().unwrap();
                first += firsts;
                last += lasts;
            }
        });
        assert_eq!((first, last), (PIECES - 1, 1));
        assert!((0..PIECES).all(|piece| captured.has(piece)));
    }
}
