//! Section 3: a page for each function and type of the C library, and one about all of it.

use std::collections::BTreeSet;

use clap_mangen::roff::{Roff, bold, italic, roman};

use crate::header::{Header, Item, Kind, words};
use crate::markup::{Block, block, blocks, inlines, summary, verbatim};
use crate::{Edition, Page};

const SECTION: char = '3';

/// How sentences about threads and blocking begin in the header's comments.
const CONDITIONS: &[&str] = &["Blocks", "Does not block", "Thread-safe", "Not called from"];

pub(crate) fn pages(header: &Header, edition: &Edition) -> Vec<Page> {
    let mut pages = vec![overview(header, edition)];
    for item in &header.items {
        match item.kind {
            Kind::Function => pages.push(function(item, header, edition)),
            Kind::Type => pages.push(of_type(item, header, edition)),
            // Constants are on their types' pages, or on the overview.
            Kind::Macro => {}
        }
    }
    pages
}

fn title(name: &str, about: &str, edition: &Edition) -> Roff {
    let mut page = Roff::new();
    let title = name.to_uppercase();
    let first = [&title, "3", &edition.date, &edition.source, "liblivepoint"];
    page.control("TH", first);
    page.control("SH", ["NAME"]);
    page.text([roman(format!("{name} - {about}"))]);
    page
}

fn finish(name: &str, page: &Roff) -> Page {
    let mut text = String::new();
    let mut after_heading = false;
    for line in page.render().lines() {
        // A heading begins a paragraph by itself.
        if !(after_heading && line == ".PP") {
            text.push_str(line);
            text.push('\n');
        }
        after_heading = line.starts_with(".SH");
    }
    Page {
        name: name.to_owned(),
        section: SECTION,
        text,
    }
}

fn overview(header: &Header, edition: &Edition) -> Page {
    let mut paragraphs = blocks(&header.overview);
    // The licence of the header is not what a reader of the manual looks for.
    paragraphs.retain(
        |part| !matches!(part, Block::Paragraph(text) if text.starts_with("SPDX-License-Identifier")),
    );
    let about = header.overview.first().map(String::as_str);
    let about = about.and_then(|line| line.split_once(": "));
    let about = about.map_or("C library", |(_, about)| about.trim_end_matches('.'));
    let mut page = title("livepoint", about, edition);
    page.control("SH", ["SYNOPSIS"]);
    let compile = "cc program.c $(pkg-config --cflags --libs livepoint)";
    verbatim(&mut page, ["#include <livepoint.h>", "", compile]);
    page.control("SH", ["DESCRIPTION"]);
    for part in paragraphs.iter().skip(1) {
        block(&mut page, part, &[]);
    }
    for (heading, kind) in [("FUNCTIONS", Kind::Function), ("TYPES", Kind::Type)] {
        page.control("SH", [heading]);
        for item in header.items.iter().filter(|item| item.kind == kind) {
            page.control("TP", []);
            page.text([bold(&item.name), roman(format!("({SECTION})"))]);
            page.text(inlines(&summary(&item.doc), &[]));
        }
    }
    page.control("SH", ["CONSTANTS"]);
    let types: Vec<_> = header
        .items
        .iter()
        .filter(|i| i.kind == Kind::Type)
        .collect();
    for item in header.items.iter().filter(|item| item.kind == Kind::Macro) {
        if !types.iter().any(|of| is_value_of(item, of)) {
            constant(&mut page, item);
        }
    }
    page.control("SH", ["SEE ALSO"]);
    let others = [("livepoint", '1'), ("livepointd", '8')];
    references(&mut page, others);
    finish("livepoint", &page)
}

/// Returns whether a constant is a value of an integer type: lvp_codec has LVP_CODEC_.
fn is_value_of(constant: &Item, of: &Item) -> bool {
    let prefix = match of.name.as_str() {
        "lvp_status" => "LVP_E_".to_owned(),
        "lvp_machine_state" => "LVP_MACHINE_".to_owned(),
        name => format!("{}_", name.to_uppercase()),
    };
    let is_integer = of.fields.is_empty() && of.code.iter().any(|line| line.contains("int32_t"));
    let is_ok = constant.name == "LVP_OK" && of.name == "lvp_status";
    is_integer && (constant.name.starts_with(&prefix) || is_ok)
}

fn constant(page: &mut Roff, item: &Item) {
    let code = item.code.join(" ");
    let value = code.split_once(item.name.as_str()).map_or("", |(_, v)| v);
    page.control("TP", []);
    page.text([bold(&item.name), roman(format!(" ({})", value.trim()))]);
    for part in blocks(&item.doc) {
        if let Block::Paragraph(text) = part {
            page.text(inlines(&text, &[]));
        }
    }
}

fn synopsis(page: &mut Roff, item: &Item, parameters: &[String]) {
    page.control("SH", ["SYNOPSIS"]);
    page.control("nf", []);
    page.text([bold("#include <livepoint.h>")]);
    page.control("sp", []);
    for line in &item.code {
        let (mut parts, mut plain) = (Vec::new(), String::new());
        let mut rest = line.as_str();
        while let Some(name) = words(rest).next() {
            let start = rest.find(name).unwrap_or_default();
            plain.push_str(&rest[..start]);
            if parameters.iter().any(|parameter| parameter == name) {
                parts.extend([bold(std::mem::take(&mut plain)), italic(name)]);
            } else {
                plain.push_str(name);
            }
            rest = &rest[start + name.len()..];
        }
        parts.push(bold(plain + rest));
        page.text(parts);
    }
    page.control("fi", []);
}

/// Returns the names of a function's parameters: the last word of each.
fn parameters(item: &Item) -> Vec<String> {
    let code = item.code.join(" ");
    let inside = code.split_once('(').map_or("", |(_, inside)| inside);
    inside
        .split(',')
        .filter_map(|parameter| words(parameter).last())
        .filter(|name| *name != "void")
        .map(str::to_owned)
        .collect()
}

fn function(item: &Item, header: &Header, edition: &Edition) -> Page {
    let parameters = parameters(item);
    let mut page = title(&item.name, &summary(&item.doc), edition);
    synopsis(&mut page, item, &parameters);
    page.control("SH", ["DESCRIPTION"]);
    let mut parts = blocks(&item.doc).into_iter();
    let (mut described, mut returned, mut conditions) = (Vec::new(), Vec::new(), Vec::new());
    let mut since = None;
    described.extend(parts.next());
    for part in parts {
        match part {
            Block::Since(version) => since = Some(version),
            Block::Paragraph(text) if text.starts_with("Returns ") => {
                let (what, when) = split_conditions(&text);
                returned.push(Block::Paragraph(what));
                conditions.extend(when.map(Block::Paragraph));
            }
            Block::Paragraph(text) => {
                let (what, when) = split_conditions(&text);
                described.extend((!what.is_empty()).then_some(Block::Paragraph(what)));
                conditions.extend(when.map(Block::Paragraph));
            }
            other => described.push(other),
        }
    }
    let mut section = |heading: Option<&str>, parts: &[Block]| {
        if parts.is_empty() {
            return;
        }
        if let Some(heading) = heading {
            page.control("SH", [heading]);
        }
        for part in parts {
            block(&mut page, part, &parameters);
        }
    };
    section(None, &described);
    section(Some("RETURN VALUE"), &returned);
    section(Some("BLOCKING AND THREADS"), &conditions);
    if let Some(version) = since {
        section(Some("HISTORY"), &[Block::Since(version)]);
    }
    see_also(&mut page, item, header);
    finish(&item.name, &page)
}

/// Cuts what a text says of blocking and threads from its end.
fn split_conditions(text: &str) -> (String, Option<String>) {
    let mut starts = vec![0];
    starts.extend(text.match_indices(". ").map(|(at, end)| at + end.len()));
    let begins = |at: &&usize| CONDITIONS.iter().any(|c| text[**at..].starts_with(c));
    match starts.iter().find(begins) {
        Some(&at) => (
            text[..at].trim_end().to_owned(),
            Some(text[at..].to_owned()),
        ),
        None => (text.to_owned(), None),
    }
}

fn of_type(item: &Item, header: &Header, edition: &Edition) -> Page {
    let mut page = title(&item.name, &summary(&item.doc), edition);
    synopsis(&mut page, item, &[]);
    page.control("SH", ["DESCRIPTION"]);
    let mut since = None;
    for part in blocks(&item.doc) {
        match part {
            Block::Since(version) => since = Some(version),
            other => block(&mut page, &other, &[]),
        }
    }
    if !item.fields.is_empty() {
        page.control("SH", ["FIELDS"]);
        for field in &item.fields {
            page.control("TP", []);
            page.text([bold(field.code.trim_end_matches(';'))]);
            for part in blocks(&field.doc) {
                if let Block::Paragraph(text) = part {
                    page.text(inlines(&text, &[]));
                }
            }
        }
    }
    let values: Vec<_> = header
        .items
        .iter()
        .filter(|other| other.kind == Kind::Macro && is_value_of(other, item))
        .collect();
    if !values.is_empty() {
        page.control("SH", ["VALUES"]);
        for value in values {
            constant(&mut page, value);
        }
    }
    if let Some(version) = since {
        page.control("SH", ["HISTORY"]);
        block(&mut page, &Block::Since(version), &[]);
    }
    see_also(&mut page, item, header);
    finish(&item.name, &page)
}

/// Names the pages of what an item mentions, and for a type those of the functions that take it.
fn see_also(page: &mut Roff, item: &Item, header: &Header) {
    let text = |of: &Item| format!("{} {}", of.doc.join(" "), of.code.join(" "));
    let own = text(item);
    let mentioned: BTreeSet<_> = words(&own).collect();
    let takes = |other: &Item| {
        let code = other.code.join(" ");
        item.kind == Kind::Type
            && item.name != "lvp_status"
            && other.kind == Kind::Function
            && words(&code).any(|word| word == item.name)
    };
    let others = header
        .items
        .iter()
        .filter(|other| other.kind != Kind::Macro && other.name != item.name)
        .filter(|other| mentioned.contains(other.name.as_str()) || takes(other))
        .map(|other| (other.name.as_str(), SECTION));
    page.control("SH", ["SEE ALSO"]);
    references(page, std::iter::once(("livepoint", SECTION)).chain(others));
}

fn references<'a>(page: &mut Roff, pages: impl IntoIterator<Item = (&'a str, char)>) {
    let mut parts = Vec::new();
    for (name, section) in pages {
        if !parts.is_empty() {
            parts.push(roman(", "));
        }
        parts.push(bold(name));
        parts.push(roman(format!("({section})")));
    }
    page.text(parts);
}
