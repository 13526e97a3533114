//! Models of what the engine's threads share: every interleaving of a few of them is run.
//!
//! What is checked are the real files of `src/`, compiled into this program. They import atomics,
//! locks and channels from `crate::sync`, which is the model checker's here ([`sync`]), so that
//! each operation is a point where another thread may go on, and a relaxed load may return any
//! value that the memory model allows. Below and beside them are doubles that do what hardware,
//! the kernel and the disk do: guest memory, its dirty log and its protection ([`sys`], [`world`]).
//!
//! A model says what it checks, and its module which mutations of the real code make it fail.
//! [`TWINS`] are models with a bug in them, which must fail.
//!
//! This program has its own `main`, since the unit tests in the files that it includes must not
//! run here.

#![allow(
    dead_code,
    unused_imports,
    reason = "of the files that are included only parts are modelled"
)]
#![allow(
    unreachable_code,
    clippy::diverging_sub_expression,
    reason = "arms of `select!` may return"
)]
#![expect(clippy::unwrap_used, reason = "a model fails as a test does")]

mod checkpoint;
#[path = "../common/mod.rs"]
mod common;
mod foreign;
#[path = "../../src/guest/mod.rs"]
mod guest;
mod host;
mod imports;
#[path = "../../src/page.rs"]
mod page;
mod state;
mod store;
mod sync;
mod sys;
mod world;

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use libtest_mimic::{Arguments, Failed, Trial};

use checkpoint::cow::{arming, pieces};
use checkpoint::{commit_point, completion, last_set, lease, pool, tracking};
use foreign::lending;
use host::watching;
use store::newest_wins;

/// How many times a thread may be interrupted where it could go on. Most bugs need two at most
/// (Musuvathi and Qadeer, "Iterative context bounding", PLDI 2007).
type Bound = Option<usize>;

/// Every interleaving.
const ALL: Bound = None;

type Model = (&'static str, Bound, fn());

macro_rules! models {
    ($($module:ident::$model:ident: $bound:expr,)*) => {
        &[$((concat!(stringify!($module), "::", stringify!($model)), $bound, $module::$model)),*]
    };
}

const MODELS: &[Model] = models! {
    pieces::a_writer_races_the_sweep: Some(2),
    pieces::a_writer_races_a_thread_that_writes_through: Some(2),
    pieces::the_sweep_ends_without_a_hurry: Some(2),
    pieces::two_handlers_serve_one_writer: Some(2),
    pieces::the_sweep_lets_a_writer_go: ALL,
    pieces::a_discard_waits_for_the_copy: Some(3),
    pieces::the_end_is_told_once_and_after_every_copy: Some(2),
    arming::an_early_write_is_protected_again: Some(2),
    arming::a_handler_comes_late_to_an_early_write: Some(2),
    tracking::no_store_of_the_guest_is_lost: ALL,
    tracking::no_write_of_the_vmm_is_lost: ALL,
    tracking::a_harvest_that_is_put_back_is_not_lost: ALL,
    tracking::what_nobody_wrote_is_not_harvested: ALL,
    newest_wins::the_newest_epoch_wins: ALL,
    pool::the_sweep_leaves_the_reserve: ALL,
    pool::every_buffer_goes_round: Some(2),
    lease::a_pause_is_ended_once: ALL,
    lease::a_pause_that_is_dropped_is_ended_once: ALL,
    lease::a_session_that_hangs_is_resumed: ALL,
    commit_point::a_commit_and_a_cancel_exclude_each_other: ALL,
    commit_point::a_commit_or_a_cancel_wins: ALL,
    last_set::the_message_comes_after_every_copy: Some(2),
    completion::the_first_end_counts_for_everybody: Some(3),
    completion::the_sessions_thread_is_joined_by_one_who_waits: ALL,
    completion::who_is_woken_by_the_descriptor_finds_the_outcome: ALL,
    watching::a_reader_misses_nothing: ALL,
    watching::the_descriptor_is_readable_while_a_notice_waits: ALL,
    watching::a_watch_that_is_freed_calls_no_more: Some(3),
    watching::a_watch_that_begins_at_the_end_ends_too: ALL,
    lending::memory_is_given_back_after_the_last_use: ALL,
    lending::a_region_goes_when_its_uses_have_ended: ALL,
};

const TWINS: &[Model] = models! {
    pieces::a_discard_that_is_not_announced_is_in_the_copy: Some(2),
    arming::a_pause_that_waits_for_nobody_has_no_moment: Some(2),
    tracking::copying_before_rearming_loses_a_store: ALL,
    tracking::marking_before_writing_loses_the_write: ALL,
    pool::without_a_reserve_a_writer_waits_for_the_disk: ALL,
    watching::a_thread_that_is_not_waited_for_may_call_again: ALL,
    lending::a_use_that_ends_before_the_last_touch_is_none: ALL,
};

thread_local! {
    /// Whether a panic is what a test wants.
    static QUIET: Cell<bool> = const { Cell::new(false) };
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let default = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !QUIET.get() {
            default(info);
        }
    }));
    let models = MODELS.iter().map(|&model| {
        Trial::test(model.0, move || {
            explore(model);
            Ok(())
        })
    });
    let twins = TWINS
        .iter()
        .map(|&twin| Trial::test(format!("{} (must fail)", twin.0), move || must_fail(twin)));
    let imports = Trial::test("imports::included_files_share_by_crate_sync", || {
        imports::check().map_err(Failed::from)
    });
    let trials = models.chain(twins).chain([imports]).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Runs the interleavings of a model; the long form has one interruption more.
fn explore((name, bound, model): Model) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = bound.map(|bound| bound + usize::from(common::long()));
    builder.max_branches = 10_000;
    let count = Arc::new(AtomicU64::new(0));
    let counted = count.clone();
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        model();
    });
    println!("{name}: {} interleavings", count.load(Ordering::Relaxed));
}

fn must_fail(twin: Model) -> Result<(), Failed> {
    QUIET.set(true);
    let result = panic::catch_unwind(AssertUnwindSafe(|| explore(twin)));
    QUIET.set(false);
    match result {
        Ok(()) => Err("its bug was not found".into()),
        Err(_) => Ok(()),
    }
}
