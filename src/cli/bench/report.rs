//! The report: JSON for programs, Markdown for people, and plots.

use std::fs;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

use super::super::output::bytes;
use super::contract::Contract;
use super::downtime::Downtime;
use super::full::Full;
use super::increments::Increments;
use super::lazy::Lazy;
use super::lost_work::LostWork;
use super::machine::Host;
use super::npb::Npb;
use super::plots::{Plot, lost_work_plots, npb_plots};
use super::rewind::Rewind;
use super::setup::Setup;
use super::sizes::Sizes;

/// Everything that one run of the command measured.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    host: Host,
    runs: u32,
    peer: Option<Peer>,
    suites: Suites,
}

/// A program that was measured beside.
#[derive(Debug, Serialize)]
struct Peer {
    version: String,
    cpu_model: &'static str,
}

/// The suites that were run.
#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Suites {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub downtime: Option<Downtime>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sizes: Option<Sizes>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_work: Option<LostWork>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full: Option<Full>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub contract: Option<Contract>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub increments: Option<Increments>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lazy: Option<Lazy>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rewind: Option<Rewind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub npb: Option<Npb>,
}

impl Report {
    pub fn new(setup: &Setup, suites: Suites) -> Self {
        Self {
            host: Host::look(),
            runs: setup.args.runs,
            peer: setup.qemu.as_ref().map(|qemu| Peer {
                version: qemu.version().to_owned(),
                cpu_model: qemu.cpu_model(),
            }),
            suites,
        }
    }

    /// Returns all tables, for a terminal.
    pub fn text(&self) -> String {
        let Suites {
            downtime,
            sizes,
            lost_work,
            full,
            contract,
            increments,
            lazy,
            rewind,
            npb,
        } = &self.suites;
        let parts = [
            downtime.as_ref().map(Downtime::markdown),
            sizes.as_ref().map(Sizes::markdown),
            lost_work.as_ref().map(LostWork::markdown),
            full.as_ref().map(Full::markdown),
            contract.as_ref().map(Contract::markdown),
            increments.as_ref().map(Increments::markdown),
            lazy.as_ref().map(Lazy::markdown),
            rewind.as_ref().map(Rewind::markdown),
            npb.as_ref().map(Npb::markdown),
        ];
        let parts: Vec<String> = parts.into_iter().flatten().collect();
        parts.join("\n")
    }

    /// Writes `report.md`, `report.json` and the plots.
    pub fn write(&self, dir: &Path) -> anyhow::Result<()> {
        fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
        let write = |name: &str, text: &str| {
            let file = dir.join(name);
            fs::write(&file, text).with_context(|| format!("could not write {}", file.display()))
        };
        let plots = self.plots();
        for plot in &plots {
            write(&plot.file, &plot.svg)?;
        }
        let json = serde_json::to_string_pretty(self)
            .expect("our own results are plain data with string keys");
        write("report.json", &(json + "\n"))?;
        write("report.md", &self.markdown(&plots))
    }

    fn plots(&self) -> Vec<Plot> {
        let lost_work = self.suites.lost_work.iter().flat_map(lost_work_plots);
        lost_work
            .chain(self.suites.npb.iter().flat_map(npb_plots))
            .collect()
    }

    fn markdown(&self, plots: &[Plot]) -> String {
        let host = &self.host;
        let mut text = format!(
            "# livepoint {}: measurements\n\n{} × {}, {} of memory, Linux {}, transparent huge \
             pages: {}. Runs: {}.",
            host.livepoint,
            host.cpus,
            host.cpu_model,
            bytes(host.memory_bytes),
            host.kernel,
            host.transparent_huge_pages,
            self.runs
        );
        if let Some(peer) = &self.peer {
            text += &format!(" {}, -cpu {}.", peer.version, peer.cpu_model);
        }
        text += "\n\nIn each run all that is compared takes turns; figures are the median of the \
                 runs, with minimum and maximum. They compare only within this report.\n\n";
        text += &self.text();
        if !plots.is_empty() {
            text += "\n### Plots\n\n";
        }
        for plot in plots {
            text += &format!("![{}]({})\n\n", plot.about, plot.file);
        }
        text
    }
}
