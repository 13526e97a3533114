//! `clone`: several domains from one image, which share its memory until they write it.

use std::ffi::OsString;
use std::fs;

use anyhow::{Context as _, bail};
use serde::Serialize;

use super::Context;
use super::args::CloneArgs;
use super::output::bytes;
use super::worker::{Detached, Started};
use crate::host::{Image, RestoreOptions, SharedMemory};

#[derive(Serialize)]
struct Clones {
    memory_bytes: u64,
    domains: Vec<Started>,
}

pub(super) fn run(context: &Context, args: &CloneArgs) -> anyhow::Result<()> {
    let image = Image::open(&args.image)?;
    image.check_host()?;
    if args.disks.is_none()
        && let Some(disk) = image.disk_names().first()
    {
        bail!("the image has a disk, {disk}, that the domains cannot share: say where by --disks");
    }
    let threads = args
        .restored
        .threads
        .unwrap_or(RestoreOptions::default().threads);
    let memory = SharedMemory::load(&image, threads)?;
    let base = args.name.as_deref().unwrap_or_else(|| image.name());
    let names: Vec<String> = (1..=args.count)
        .map(|number| format!("{base}-{number}"))
        .collect();
    let mut starting = Vec::new();
    for name in &names {
        match restore_args(args, &image, &memory, name)
            .and_then(|again| Detached::spawn(context, name, again))
        {
            Ok(detached) => starting.push(detached),
            Err(error) => return give_up(starting, error),
        }
    }
    let mut domains = Vec::new();
    let mut starting = starting.into_iter();
    while let Some(detached) = starting.next() {
        match detached.answer(context) {
            Ok(started) => domains.push(started),
            // Those that run already are left alone: they are named.
            Err(error) => {
                let running: Vec<_> = domains.iter().map(Started::text).collect();
                let error = error.context(format!("of the domains, these run: {running:?}"));
                return give_up(starting, error);
            }
        }
    }
    let memory_bytes = image.ranges().iter().map(|range| range.bytes).sum();
    let clones = Clones {
        memory_bytes,
        domains,
    };
    context.output.print(&clones, |clones| {
        let mut text = format!(
            "{} domains share {} of memory until they write it",
            clones.domains.len(),
            bytes(clones.memory_bytes)
        );
        for domain in &clones.domains {
            text += &format!("\n{}", domain.text());
        }
        text
    });
    Ok(())
}

/// Ends what was started and does not answer yet.
fn give_up(
    starting: impl IntoIterator<Item = Detached>,
    error: anyhow::Error,
) -> anyhow::Result<()> {
    starting.into_iter().for_each(Detached::kill);
    Err(error)
}

/// Returns the arguments of the process that runs one of the domains.
fn restore_args(
    args: &CloneArgs,
    image: &Image,
    memory: &SharedMemory,
    name: &str,
) -> anyhow::Result<Vec<OsString>> {
    // The image itself: the newest in a directory may be another one by then.
    let mut again: Vec<OsString> = vec!["restore".into(), image.path().into()];
    again.extend(["--new-identity".into(), "--name".into(), name.into()]);
    again.extend(["--shared-memory".into(), memory.path().into()]);
    again.extend(["--shared-root".into(), memory.root_digest().into()]);
    args.restored.repeat_in(&mut again);
    if let Some(dir) = &args.disks {
        let dir = std::path::absolute(dir)?.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("could not make {}", dir.display()))?;
        again.extend(["--disks".into(), dir.into_os_string()]);
    }
    Ok(again)
}
