//! `livepoint bench`: the whole evaluation, reproduced on the machine that it runs on.
//!
//! A suite compares contenders: our protocols, peers, and plain copies or writes of the same
//! bytes. In each run all contenders take turns, so that a machine whose speed drifts disturbs all
//! alike. Figures are minimum, median and maximum of the runs; ratios are of medians, and only
//! within one run of the command.

mod contender;
mod contract;
mod downtime;
mod full;
mod huge_pages;
mod increments;
mod lazy;
mod loss;
mod lost_work;
mod machine;
mod npb;
mod plots;
mod qemu;
mod qmp;
mod report;
mod rewind;
mod sample;
mod setup;
mod sizes;
mod spread;
mod svg;
mod ticks;
mod vm;
mod yardstick;

use clap::ValueEnum as _;

use super::Context;
use super::args::{BenchArgs, Suite};
use report::{Report, Suites};
use setup::Setup;

pub(super) fn bench(context: &Context, args: &BenchArgs) -> anyhow::Result<()> {
    let setup = Setup::new(context.output, args)?;
    let mut suites = Suites::default();
    for &suite in Suite::value_variants() {
        if args.suite.is_empty() || args.suite.contains(&suite) {
            match suite {
                Suite::Downtime => suites.downtime = Some(downtime::run(&setup)?),
                Suite::Sizes => suites.sizes = Some(sizes::run(&setup)?),
                Suite::LostWork => suites.lost_work = Some(lost_work::run(&setup)?),
                Suite::Full => suites.full = Some(full::run(&setup)?),
                Suite::Contract => suites.contract = Some(contract::run(&setup)?),
                Suite::Increments => suites.increments = Some(increments::run(&setup)?),
                Suite::Lazy => suites.lazy = Some(lazy::run(&setup)?),
                Suite::Rewind => suites.rewind = Some(rewind::run(&setup)?),
                Suite::Npb => suites.npb = Some(npb::run(&setup)?),
            }
        }
    }
    let report = Report::new(&setup, suites);
    if let Some(dir) = &args.out {
        report.write(dir)?;
    }
    context.output.print(&report, Report::text);
    Ok(())
}
