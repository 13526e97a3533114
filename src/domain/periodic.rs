//! Checkpoints at an interval, as a domain's `<metadata>` asks for them.

use std::time::Duration;

use quick_xml::XmlVersion;
use quick_xml::events::{BytesStart, Event};
use quick_xml::name::{Namespace, NamespaceResolver, ResolveResult};
use quick_xml::reader::Reader;

use super::document::NAMESPACES_MAX;
use super::error::ValueError;
use super::metadata::inside_domain;
use super::{DomainConfig, HostPath};

/// The namespace of what livepoint itself reads in `<metadata>`.
pub const METADATA_NAMESPACE: &str = "urn:livepoint:1";

/// The element in it.
const ELEMENT: &str = "checkpoint";

/// Shortest interval: below it hardly any checkpoint of a large guest is done in time.
const EVERY_MIN: Duration = Duration::from_millis(100);
/// Longest interval.
const EVERY_MAX: Duration = Duration::from_hours(24 * 366);

/// Checkpoints that are taken while a domain runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Periodic {
    /// From the start of one to that of the next.
    pub every: Duration,
    /// How many images are kept; all where it is not given.
    pub keep: Option<u32>,
    /// Where images go; the domain's own directory where it is not given.
    pub directory: Option<HostPath>,
    /// The other attributes, which say how a checkpoint is taken.
    pub how: Vec<(String, String)>,
}

/// What is wrong with the element.
#[derive(Debug)]
pub(super) struct PeriodicError {
    /// Lines of the metadata before the element.
    pub(super) lines: u32,
    pub(super) attribute: &'static str,
    pub(super) error: ValueError,
}

impl DomainConfig {
    /// Returns the checkpoints at an interval that the domain's metadata asks for.
    ///
    /// # Errors
    ///
    /// It asks for them in a way that has no meaning. A document with that is not accepted, so that
    /// no domain that was read from one has it.
    pub fn periodic(&self) -> Result<Option<Periodic>, ValueError> {
        self.find_periodic().map_err(|found| found.error)
    }

    pub(super) fn find_periodic(&self) -> Result<Option<Periodic>, PeriodicError> {
        let Some(metadata) = &self.metadata else {
            return Ok(None);
        };
        find(&self.namespaces, metadata.as_xml())
    }
}

/// Returns what `<metadata>`, which is well-formed, asks for.
pub(super) fn find(
    namespaces: &[(String, String)],
    metadata: &str,
) -> Result<Option<Periodic>, PeriodicError> {
    let (document, start) = inside_domain(namespaces, metadata);
    let mut reader = Reader::from_str(&document);
    let mut scope = NamespaceResolver::default();
    scope.set_max_namespace_bindings(NAMESPACES_MAX);
    let mut found = None;
    let mut depth = 0;
    loop {
        let at = usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX);
        // The document was read before: neither error comes.
        let Ok(event) = reader.read_event() else {
            return Ok(found);
        };
        match event {
            Event::Start(tag) | Event::Empty(tag) if scope.push(&tag).is_err() => {
                log::debug!(
                    "<{}> declares a namespace too many",
                    tag.name().into_inner()
                );
                return Ok(found);
            }
            Event::Start(tag) => {
                if depth == 2 && is_ours(&scope, &tag) {
                    take(&tag, lines_before(&document, start, at), &mut found)?;
                }
                depth += 1;
            }
            Event::Empty(tag) => {
                if depth == 2 && is_ours(&scope, &tag) {
                    take(&tag, lines_before(&document, start, at), &mut found)?;
                }
                scope.pop();
            }
            Event::End(_) => {
                scope.pop();
                depth -= 1;
            }
            Event::Eof => return Ok(found),
            _ => {}
        }
    }
}

fn is_ours(scope: &NamespaceResolver, tag: &BytesStart<'_>) -> bool {
    let (namespace, name) = scope.resolve_element(tag.name());
    name.into_inner() == ELEMENT && namespace == ResolveResult::Bound(Namespace(METADATA_NAMESPACE))
}

fn lines_before(document: &str, start: usize, at: usize) -> u32 {
    let before = document.get(start..at).unwrap_or_default();
    u32::try_from(before.matches('\n').count()).unwrap_or(u32::MAX)
}

/// Reads one element; a second one that asks for an interval is refused.
fn take(
    tag: &BytesStart<'_>,
    lines: u32,
    found: &mut Option<Periodic>,
) -> Result<(), PeriodicError> {
    let refuse = |attribute: &'static str, value: &str, expected: &'static str| PeriodicError {
        lines,
        attribute,
        error: ValueError::new(value, expected),
    };
    let (mut every, mut keep, mut directory, mut how) = (None, None, None, Vec::new());
    for attribute in tag.attributes().flatten() {
        let Ok(value) = attribute.normalized_value(XmlVersion::Implicit1_0) else {
            continue;
        };
        match attribute.key.into_inner() {
            "xmlns" => {}
            name if name.starts_with("xmlns:") => {}
            "every" => {
                let expected = "a time from 100ms to 366 days, as in 5s";
                let time = parse_time(&value).ok_or_else(|| refuse("every", &value, expected))?;
                every = Some(time);
            }
            "keep" => {
                let count = value.parse().ok().filter(|count| *count > 0);
                keep = Some(count.ok_or_else(|| refuse("keep", &value, "a number from 1 on"))?);
            }
            "directory" => {
                let path = HostPath::new(&value);
                directory = Some(path.map_err(|error| PeriodicError {
                    lines,
                    attribute: "directory",
                    error,
                })?);
            }
            name => how.push((name.to_owned(), value.into_owned())),
        }
    }
    let Some(every) = every else {
        let useless = keep.map(|_: u32| "keep").or(directory.map(|_| "directory"));
        return match useless {
            Some(attribute) => Err(refuse(attribute, attribute, "of use without every")),
            None => Ok(()),
        };
    };
    let periodic = Periodic {
        every,
        keep,
        directory,
        how,
    };
    if found.replace(periodic).is_some() {
        return Err(refuse(
            "every",
            "a second one",
            "possible: there is one interval",
        ));
    }
    Ok(())
}

fn parse_time(text: &str) -> Option<Duration> {
    let time: jiff::SignedDuration = text.parse().ok()?;
    let time = Duration::try_from(time).ok()?;
    (EVERY_MIN..=EVERY_MAX).contains(&time).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(metadata: &str) -> Result<Option<Periodic>, PeriodicError> {
        let namespaces = [("lp".to_owned(), METADATA_NAMESPACE.to_owned())];
        find(&namespaces, metadata)
    }

    #[test]
    fn an_interval_is_found_whatever_its_prefix() {
        let expected = Periodic {
            every: Duration::from_millis(1500),
            keep: Some(3),
            directory: Some(HostPath::new("/a&b").unwrap()),
            how: vec![("protocol".to_owned(), "cow".to_owned())],
        };
        let rest = "every='1.5s' keep=\"3\" directory='/a&amp;b' protocol='cow'";
        for metadata in [
            format!("<metadata><lp:checkpoint {rest}/></metadata>"),
            format!(
                "<metadata><x/><checkpoint xmlns='{METADATA_NAMESPACE}' {rest}></checkpoint></metadata>"
            ),
            format!(
                "<metadata><q:checkpoint xmlns:q='{METADATA_NAMESPACE}' {rest}/><y a='1'/></metadata>"
            ),
        ] {
            assert_eq!(
                find_in(&metadata).unwrap(),
                Some(expected.clone()),
                "{metadata}"
            );
        }
    }

    #[test]
    fn what_is_not_ours_or_has_no_interval_asks_for_nothing() {
        for metadata in [
            "<metadata/>",
            "<metadata><checkpoint every='1s'/></metadata>",
            "<metadata><lp:checkpoint protocol='cow'/></metadata>",
            "<metadata><lp:other every='1s'/></metadata>",
            "<metadata><lp:other><lp:checkpoint every='1s'/></lp:other></metadata>",
            "<metadata><lp:checkpoint xmlns:lp='urn:other' every='1s'/></metadata>",
        ] {
            assert_eq!(find_in(metadata).unwrap(), None, "{metadata}");
        }
    }

    #[test]
    fn what_has_no_meaning_is_refused_with_its_line() {
        for (attributes, wrong) in [
            ("every='5'", "every"),
            ("every='99ms'", "every"),
            ("every='-1s'", "every"),
            ("every='9000h'", "every"),
            ("every='1s' keep='0'", "keep"),
            ("every='1s' keep='many'", "keep"),
            ("every='1s' directory='here'", "directory"),
            ("keep='3'", "keep"),
            ("directory='/x'", "directory"),
        ] {
            let metadata = format!("<metadata>\n\n<lp:checkpoint {attributes}/></metadata>");
            let error = find_in(&metadata).unwrap_err();
            assert_eq!((error.attribute, error.lines), (wrong, 2), "{attributes}");
        }
        let twice = "<metadata><lp:checkpoint every='1s'/>\n<lp:checkpoint every='1s'/></metadata>";
        assert_eq!(find_in(twice).unwrap_err().lines, 1);
    }
}
