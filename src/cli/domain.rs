//! Subcommands that drive a running domain through its control socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::args::{CheckpointArgs, RewindArgs};
use super::output::{bytes, duration, micros, table};
use super::{Context, periodic};
use crate::host::control::ControlClient;
use crate::host::control::protocol::{Method, Status};
use crate::host::{
    CheckpointRequest, CheckpointSummary, JobProgress, PeriodicStatus, Series, ThreadCount,
};

/// What can be done to a domain with no further argument.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    Pause,
    Resume,
    Shutdown,
    Reset,
    Destroy,
}

#[derive(Serialize)]
struct Done<'a> {
    name: &'a str,
    done: &'static str,
}

pub(super) fn act(context: &Context, name: &str, action: Action) -> anyhow::Result<()> {
    let (method, done) = match action {
        Action::Pause => (Method::Pause, "paused"),
        Action::Resume => (Method::Resume, "resumed"),
        Action::Shutdown => (Method::Shutdown, "asked to shut down"),
        Action::Reset => (Method::Reset, "reset"),
        Action::Destroy => (Method::Destroy, "destroyed"),
    };
    ControlClient::connect(&context.runtime()?, name)?.run(method)?;
    context.output.print(&Done { name, done }, |said| {
        format!("Domain {name} {}", said.done)
    });
    Ok(())
}

pub(super) fn dump_xml(context: &Context, name: &str) -> anyhow::Result<()> {
    let xml: String = ControlClient::connect(&context.runtime()?, name)?.call(Method::DumpXml)?;
    context.output.print(&xml, |xml| xml.trim_end().to_owned());
    Ok(())
}

pub(super) fn status(context: &Context, name: &str) -> anyhow::Result<()> {
    let status = ControlClient::connect(&context.runtime()?, name)?.status()?;
    context.output.print(&status, |status| {
        let mut text = format!(
            "Name:    {}\nUUID:    {}\nState:   {}\nProcess: {}\nvCPUs:   {}\nMemory:  {}",
            status.name,
            status.uuid,
            status.state,
            status.pid,
            status.vcpus,
            bytes(status.memory_bytes)
        );
        for console in &status.consoles {
            text += &format!("\nConsole: {}", console.display());
        }
        if let Some(periodic) = &status.periodic {
            text += &periodic_text(periodic);
        }
        text
    });
    Ok(())
}

/// Says what came of the checkpoints that the domain's document asks for.
fn periodic_text(periodic: &PeriodicStatus) -> String {
    let every = duration(Duration::from_millis(periodic.every_ms));
    let Series {
        taken,
        failed,
        missed,
        late,
    } = periodic.series;
    let mut text = format!(
        "\nCheckpoints every {every}: {taken} taken, {failed} failed, {missed} missed, {late} late"
    );
    if let Some(image) = &periodic.last_image {
        text += &format!("\nLast:    {}", image.display());
    }
    if let Some(error) = &periodic.last_error {
        text += &format!("\nTrouble: {error}");
    }
    text
}

pub(super) fn list(context: &Context) -> anyhow::Result<()> {
    let mut found: Vec<Status> = Vec::new();
    for (name, socket) in context.runtime()?.sockets()? {
        match ControlClient::connect_to(&socket).and_then(|mut client| client.status()) {
            Ok(status) => found.push(status),
            // Left over by a process that was killed.
            Err(error) => log::info!("no domain answers at {name}: {}", error.full_message()),
        }
    }
    context.output.print(&found, |found| {
        let rows: Vec<_> = found
            .iter()
            .map(|status| {
                vec![
                    status.name.clone(),
                    status.state.to_string(),
                    status.pid.to_string(),
                    status.vcpus.to_string(),
                    bytes(status.memory_bytes),
                    status.uuid.to_string(),
                ]
            })
            .collect();
        table(
            &["Name", "State", "Process", "vCPUs", "Memory", "UUID"],
            &rows,
        )
    });
    Ok(())
}

pub(super) fn checkpoint(context: &Context, args: &CheckpointArgs) -> anyhow::Result<()> {
    let mut request = request(args)?;
    if let Some(every) = args.every {
        request.incremental = true;
        return periodic::run(context, args, every, &request);
    }
    let mut client = ControlClient::connect(&context.runtime()?, &args.name)?;
    let job = client.start_checkpoint(request)?;
    let bar = progress_bar();
    let summary = client.wait(job, |progress| show(&bar, progress));
    bar.finish_and_clear();
    context.output.print(&summary?, summary_text);
    Ok(())
}

pub(super) fn rewind(context: &Context, args: &RewindArgs) -> anyhow::Result<()> {
    let image = args.to.as_deref().map(absolute).transpose()?;
    let summary = ControlClient::connect(&context.runtime()?, &args.name)?.rewind(image)?;
    context.output.print(&summary, |summary| {
        format!(
            "Domain {} is back at {} after {}: {} of {} pages put back",
            args.name,
            summary.image.display(),
            micros(summary.total_us),
            summary.pages,
            summary.memory_pages
        )
    });
    Ok(())
}

fn request(args: &CheckpointArgs) -> anyhow::Result<CheckpointRequest> {
    let mut request = CheckpointRequest::new(args.protocol.into());
    // The domain's process has a working directory of its own.
    request.out = args.out.as_deref().map(absolute).transpose()?;
    request.codec = args.codec.parse()?;
    request.threads = args.threads.map(ThreadCount::new).transpose()?;
    request.interval_ms = args.interval;
    request.max_staging_bytes = args.max_staging;
    request.max_downtime_us = args.max_downtime.map(to_micros);
    request.deadline_ms = args.deadline.map(|time| to_micros(time).div_ceil(1000));
    request.max_bandwidth = args.max_bandwidth;
    request.pause_limit_ms = args.pause_limit.map(|time| to_micros(time) / 1000);
    request.downtime_budget_us = args.downtime_budget;
    request.spare = args.spare.as_deref().map(absolute).transpose()?;
    request.durable = !args.no_sync;
    request.incremental = args.incremental;
    request.keep = args.keep;
    Ok(request)
}

fn to_micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn absolute(path: &Path) -> anyhow::Result<PathBuf> {
    std::path::absolute(path).with_context(|| format!("{} is not a path", path.display()))
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:20} [{wide_bar}] {bytes}/{total_bytes} {eta}")
        .expect("the template is a constant that the test below has parsed")
        .progress_chars("=> ");
    let bar = ProgressBar::new(0).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

fn show(bar: &ProgressBar, progress: &JobProgress) {
    bar.set_length(progress.total_bytes);
    bar.set_position(progress.scanned_bytes);
    bar.set_message(progress.phase.clone());
}

pub(super) fn summary_text(summary: &CheckpointSummary) -> String {
    let figures = &summary.figures;
    format!(
        "{}\n{} protocol: downtime {}, {} in all, {} written",
        summary.image.display(),
        summary.protocol,
        micros(figures.downtime_us),
        duration(Duration::from_micros(figures.total_us)),
        bytes(summary.image_bytes),
    )
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_progress_template_parses() {
        drop(super::progress_bar());
    }
}
