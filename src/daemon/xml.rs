//! A small reader for the documents that are no domains, such as `<domainsnapshot>`, and the
//! writing of text into documents.

use quick_xml::Reader;
use quick_xml::XmlVersion;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesStart, Event};

use crate::rpc::{Code, RpcError};

/// Longest document.
const BYTES_MAX: usize = 2 << 20;
/// Most levels of elements.
const DEPTH_MAX: usize = 64;
/// Most elements.
const ELEMENTS_MAX: usize = 32_768;

/// An element with what it holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Element {
    /// Its name, prefix included.
    pub(super) name: String,
    pub(super) attributes: Vec<(String, String)>,
    pub(super) text: String,
    pub(super) children: Vec<Element>,
    /// Where it stands in the document.
    pub(super) start: usize,
    pub(super) end: usize,
}

impl Element {
    pub(super) fn attribute(&self, name: &str) -> Option<&str> {
        let found = self.attributes.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub(super) fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    /// Returns the trimmed text of a child that has some.
    pub(super) fn child_text(&self, name: &str) -> Option<&str> {
        let text = self.child(name)?.text.trim();
        (!text.is_empty()).then_some(text)
    }
}

fn malformed(why: impl std::fmt::Display) -> RpcError {
    RpcError::new(Code::XmlError, format!("the document is malformed: {why}"))
}

/// Returns the name of a document's outermost element.
pub(super) fn root_name(document: &str) -> Result<String, RpcError> {
    let start = document.find('<').map_or(0, |at| at + 1);
    let rest = document.get(start..).unwrap_or_default();
    let end = rest.find(|c: char| c.is_whitespace() || "/>".contains(c));
    match rest.get(..end.unwrap_or(0)) {
        Some(name) if !name.is_empty() && !name.starts_with(['?', '!']) => Ok(name.to_owned()),
        _ => Err(malformed("it must be one element")),
    }
}

/// Reads a document whose outermost element must be called `root`.
pub(super) fn read(document: &str, root: &str) -> Result<Element, RpcError> {
    if document.len() > BYTES_MAX {
        return Err(malformed(format_args!(
            "it has more than {BYTES_MAX} bytes"
        )));
    }
    let mut reader = Reader::from_str(document);
    let mut open: Vec<Element> = Vec::new();
    let mut count = 0;
    loop {
        let start = position(&reader);
        let event = reader.read_event().map_err(malformed)?;
        let end = position(&reader);
        let is_empty = matches!(event, Event::Empty(_));
        match event {
            Event::Start(tag) | Event::Empty(tag) => {
                count += 1;
                if count > ELEMENTS_MAX || open.len() >= DEPTH_MAX {
                    return Err(malformed("it has too many elements, or too many levels"));
                }
                let element = element(&tag, start, end)?;
                if open.is_empty() && element.name != root {
                    return Err(RpcError::new(
                        Code::XmlError,
                        format!(
                            "unexpected root element <{}>, expecting <{root}>",
                            element.name
                        ),
                    ));
                }
                open.push(element);
                if is_empty && let Some(done) = close(&mut open, end) {
                    return Ok(done);
                }
            }
            Event::End(_) => {
                if let Some(done) = close(&mut open, end) {
                    return Ok(done);
                }
            }
            Event::Text(text) => push(&mut open, &text.xml10_content()),
            Event::CData(data) => push(&mut open, &data.xml10_content()),
            Event::GeneralRef(reference) => {
                if let Some(text) = resolve_predefined_entity(&reference) {
                    push(&mut open, text);
                } else if let Ok(Some(c)) = reference.resolve_char_ref() {
                    push(&mut open, c.encode_utf8(&mut [0; 4]));
                } else {
                    return Err(malformed("an entity that XML does not predefine"));
                }
            }
            Event::DocType(_) => return Err(malformed("a document type declaration")),
            Event::Eof => return Err(malformed("it ends too early")),
            _ => {}
        }
    }
}

fn position(reader: &Reader<&[u8]>) -> usize {
    usize::try_from(reader.buffer_position()).unwrap_or(usize::MAX)
}

fn element(tag: &BytesStart<'_>, start: usize, end: usize) -> Result<Element, RpcError> {
    let mut attributes = Vec::new();
    for attribute in tag.attributes() {
        let attribute = attribute.map_err(malformed)?;
        let value = attribute
            .normalized_value(XmlVersion::Implicit1_0)
            .map_err(malformed)?;
        attributes.push((attribute.key.into_inner().to_owned(), value.into_owned()));
    }
    Ok(Element {
        name: tag.name().into_inner().to_owned(),
        attributes,
        start,
        end,
        ..Element::default()
    })
}

/// Ends the innermost element; returns it where it is the outermost, too.
fn close(open: &mut Vec<Element>, end: usize) -> Option<Element> {
    let mut element = open.pop()?;
    element.end = end;
    match open.last_mut() {
        Some(parent) => {
            parent.children.push(element);
            None
        }
        None => Some(element),
    }
}

fn push(open: &mut [Element], text: &str) {
    if let Some(element) = open.last_mut() {
        element.text.push_str(text);
    }
}

/// Returns text as it stands between tags or in an attribute.
pub(super) fn escape(text: &str) -> String {
    quick_xml::escape::escape(text).into_owned()
}
