//! Writes the man pages and the shell completions, for `make install`; is not installed itself.
//!
//! Sections 1 and 8 are from the commands' own argument parsers, section 3 is from the comments of
//! the C header.

mod commands;
mod header;
mod library;
mod markup;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{CommandFactory as _, Parser};
use clap_complete::Shell;

/// Writes the man pages and the shell completions of livepoint.
#[derive(Debug, Parser)]
#[command(name = "livepoint-manual", version)]
struct Arguments {
    /// Directory to write to: man/man1 and so on, and completions.
    out: PathBuf,
}

/// What the first line of each page says.
struct Edition {
    /// The day, as in 2026-11-26.
    date: String,
    /// The program with its version.
    source: String,
}

impl Edition {
    /// Takes the day from SOURCE_DATE_EPOCH, so that packages can be built twice and be the same.
    fn of_today() -> anyhow::Result<Self> {
        let moment = match std::env::var("SOURCE_DATE_EPOCH") {
            Ok(seconds) => {
                let seconds = seconds
                    .parse()
                    .context("SOURCE_DATE_EPOCH is not a number")?;
                jiff::Timestamp::from_second(seconds).context("SOURCE_DATE_EPOCH is no time")?
            }
            Err(_) => jiff::Timestamp::now(),
        };
        Ok(Self {
            date: moment.strftime("%Y-%m-%d").to_string(),
            source: concat!("livepoint ", env!("CARGO_PKG_VERSION")).to_owned(),
        })
    }
}

fn main() -> ExitCode {
    match write(&Arguments::parse().out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error:#}", Arguments::command().get_name());
            ExitCode::FAILURE
        }
    }
}

fn write(out: &Path) -> anyhow::Result<()> {
    let edition = Edition::of_today()?;
    let header = header::parse(include_str!("../../../include/livepoint.h"))
        .context("could not read livepoint.h")?;
    let mut pages = commands::pages(&edition)?;
    pages.extend(library::pages(&header, &edition));
    for page in &pages {
        put(&out.join("man").join(page.path()), page.text.as_bytes())?;
    }
    let completions = out.join("completions");
    fs::create_dir_all(&completions).with_context(|| completions.display().to_string())?;
    for command in [livepoint::cli::command, livepoint::daemon::command] {
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let mut command = command();
            let name = command.get_name().to_owned();
            clap_complete::generate_to(shell, &mut command, name, &completions)
                .with_context(|| completions.display().to_string())?;
        }
    }
    Ok(())
}

/// A man page.
struct Page {
    name: String,
    section: char,
    text: String,
}

impl Page {
    /// Returns where it goes below a directory of man pages.
    fn path(&self) -> PathBuf {
        let section = self.section;
        PathBuf::from(format!("man{section}/{}.{section}", self.name))
    }
}

fn put(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let parent = path.parent().context("no directory to write to")?;
    fs::create_dir_all(parent).with_context(|| parent.display().to_string())?;
    fs::write(path, bytes).with_context(|| path.display().to_string())
}
