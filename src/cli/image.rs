//! Subcommands that read images and built-in guests.

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use serde::Serialize;

use super::Context;
use super::args::{GcArgs, GuestsArgs, ImageArg, InspectArgs, RebaseArgs};
use super::output::{bytes, table};
use crate::guests;
use crate::host::{Image, ImageSummary, collect_garbage};

pub(super) fn inspect(context: &Context, args: &InspectArgs) -> anyhow::Result<()> {
    let image = Image::open(&args.image)?;
    if args.check_host {
        let lacks = image.host_lacks()?;
        context.output.print(&lacks, |lacks| {
            if lacks.is_empty() {
                "This host can run the image.".to_owned()
            } else {
                format!("This host cannot run the image:\n  {}", lacks.join("\n  "))
            }
        });
        return Ok(());
    }
    if args.manifest {
        context.output.line(image.manifest_json());
        return Ok(());
    }
    context.output.print(&image.summary(), |summary| {
        format!(
            "Image:    {} ({}){}\nDomain:   {} ({})\nTaken:    {}\nProtocol: {}\nMemory:   {}, {} \
             vCPUs\nData:     {} in {} chunks\nRoot:     {}",
            summary.image_uuid,
            bytes(summary.image_bytes),
            chain_text(summary),
            summary.name,
            summary.guest_uuid,
            summary.created,
            summary.protocol,
            bytes(summary.memory_bytes),
            summary.vcpu_count,
            bytes(summary.stored_bytes),
            summary.chunks.none + summary.chunks.lz4 + summary.chunks.zstd,
            summary.root_digest,
        )
    });
    Ok(())
}

/// Says which images this one continues and needs, on lines of their own.
fn chain_text(summary: &ImageSummary) -> String {
    let mut text = String::new();
    if let Some(parent) = &summary.parent {
        text += &format!("\nParent:   {} ({})", parent.image_uuid, parent.file);
    }
    if !summary.layers.is_empty() {
        let files: Vec<_> = summary
            .layers
            .iter()
            .map(|layer| layer.file.as_str())
            .collect();
        let pages = summary.inherited_pages;
        text += &format!("\nNeeds:    {} for {pages} pages", files.join(", "));
    }
    text
}

pub(super) fn verify(context: &Context, args: &ImageArg) -> anyhow::Result<ExitCode> {
    let report = Image::open(&args.image)?.verify()?;
    context.output.print(&report, |report| {
        format!(
            "{}: whole: every digest holds ({} chunks, {}{})",
            args.image.display(),
            report.chunk_count,
            bytes(report.image_bytes),
            match report.layer_count {
                0 => String::new(),
                layers => format!(", and of {layers} images that it needs"),
            }
        )
    });
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct Rebased {
    image: PathBuf,
}

pub(super) fn rebase(context: &Context, args: &RebaseArgs) -> anyhow::Result<()> {
    let image = Image::open(&args.image)?.fold(&args.out, args.codec.parse()?)?;
    context.output.print(&Rebased { image }, |rebased| {
        format!("{} needs no other image", rebased.image.display())
    });
    Ok(())
}

pub(super) fn gc(context: &Context, args: &GcArgs) -> anyhow::Result<()> {
    let garbage = collect_garbage(&args.directory, args.keep)?;
    context.output.print(&garbage, |garbage| {
        let mut text = format!(
            "{} images removed, {} freed",
            garbage.removed.len(),
            bytes(garbage.freed_bytes)
        );
        if !garbage.needed.is_empty() {
            text += &format!("; {} older ones are needed", garbage.needed.len());
        }
        if !garbage.in_use.is_empty() {
            text += &format!("; {} are in use", garbage.in_use.len());
        }
        text
    });
    Ok(())
}

#[derive(Serialize)]
struct GuestRow {
    name: &'static str,
    about: &'static str,
    elf_bytes: usize,
}

pub(super) fn guests(context: &Context, args: &GuestsArgs) -> anyhow::Result<()> {
    if let Some(dir) = &args.extract {
        fs::create_dir_all(dir).with_context(|| format!("could not make {}", dir.display()))?;
        for guest in guests::ALL {
            let path = dir.join(format!("{}.elf", guest.name));
            fs::write(&path, guest.elf)
                .with_context(|| format!("could not write {}", path.display()))?;
        }
    }
    let rows: Vec<_> = guests::ALL
        .iter()
        .map(|guest| GuestRow {
            name: guest.name,
            about: guest.about,
            elf_bytes: guest.elf.len(),
        })
        .collect();
    context.output.print(&rows, |rows| {
        let rows: Vec<_> = rows
            .iter()
            .map(|row| {
                vec![
                    row.name.to_owned(),
                    row.about.to_owned(),
                    row.elf_bytes.to_string(),
                ]
            })
            .collect();
        table(&["Guest", "What it does", "ELF bytes"], &rows)
    });
    Ok(())
}
