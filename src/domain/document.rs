//! A small tree of elements that knows where each one stood.
//!
//! quick-xml finds the events; this file holds them to the rules of XML that
//! it leaves to its caller, and to our limits. `<metadata>` is checked like the
//! rest but stays text: what libvirt promises of it is that it comes back as it
//! was given.

use quick_xml::XmlVersion;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesDecl, BytesRef, BytesStart, Event};
use quick_xml::name::{NamespaceResolver, QName, ResolveResult};
use quick_xml::reader::Reader;

use super::error::{DomainError, Place, Quote};

/// Largest document, in bytes. libvirt's own RPC refuses strings over 4 MiB;
/// real definitions are a few KiB, and metadata rarely adds more than that.
pub const DOCUMENT_BYTES_MAX: usize = 1 << 20;
/// Deepest nesting. libvirt's format needs 8; the tree is dropped recursively.
pub const DEPTH_MAX: usize = 64;
/// Most elements, metadata included. Bounds the tree at a few MiB.
pub const ELEMENTS_MAX: usize = 16_384;
/// Most attributes of one element. Duplicates are found by comparing all pairs.
pub const ATTRIBUTES_MAX: usize = 64;
/// Longest name of an element or attribute, in bytes. Names go into messages.
pub const NAME_BYTES_MAX: usize = 128;
/// Longest attribute value, and longest text outside metadata, in bytes.
pub const TEXT_BYTES_MAX: usize = 64 << 10;
/// Most namespace declarations in scope. Each name is searched among them.
pub const NAMESPACES_MAX: usize = 64;

/// One element. Comparison ignores where it stood.
#[derive(Clone, Debug, Default)]
pub(super) struct Element {
    pub name: String,
    pub attributes: Vec<(String, String)>,
    pub children: Vec<Element>,
    /// All text directly inside, without what is only white space.
    pub text: String,
    /// The element as it was written, tags included; for metadata only.
    pub raw: Option<String>,
    pub line: u32,
    pub column: u32,
    /// Line and column of the first text that is not white space.
    pub text_at: (u32, u32),
}

impl PartialEq for Element {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
            && self.attributes == other.attributes
            && self.children == other.children
            && self.text == other.text
            && self.raw == other.raw
    }
}

impl Element {
    pub fn new(name: &str) -> Self {
        Element {
            name: name.to_owned(),
            ..Element::default()
        }
    }

    pub fn place(&self) -> Place {
        Place {
            line: self.line,
            column: self.column,
            element: self.name.clone(),
        }
    }

    pub fn attribute(&self, name: &str) -> Option<&str> {
        let found = self.attributes.iter().find(|(key, _)| key == name);
        found.map(|(_, value)| value.as_str())
    }

    pub fn child(&self, name: &str) -> Option<&Element> {
        self.children.iter().find(|child| child.name == name)
    }

    pub fn children_named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a Element> {
        self.children.iter().filter(move |child| child.name == name)
    }

    /// Drops text that is only white space, and the edges of text between
    /// elements: indentation must not make two documents different.
    fn settle_text(&mut self) {
        let trimmed = self.text.trim_matches(is_space);
        if trimmed.is_empty() {
            self.text.clear();
        } else if !self.children.is_empty() && trimmed.len() < self.text.len() {
            self.text = trimmed.to_owned();
        }
    }
}

/// White space as XML defines it.
pub(super) fn is_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r')
}

/// Whether XML 1.0 can carry the character at all, even as a reference.
pub(super) fn is_xml_char(c: char) -> bool {
    matches!(c, '\t' | '\n' | '\r' | '\u{20}'..='\u{d7ff}' | '\u{e000}'..='\u{fffd}' | '\u{10000}'..)
}

fn is_name_start(c: char) -> bool {
    matches!(c, 'A'..='Z' | '_' | 'a'..='z' | '\u{c0}'..='\u{d6}' | '\u{d8}'..='\u{f6}'
        | '\u{f8}'..='\u{2ff}' | '\u{370}'..='\u{37d}' | '\u{37f}'..='\u{1fff}'
        | '\u{200c}'..='\u{200d}' | '\u{2070}'..='\u{218f}' | '\u{2c00}'..='\u{2fef}'
        | '\u{3001}'..='\u{d7ff}' | '\u{f900}'..='\u{fdcf}' | '\u{fdf0}'..='\u{fffd}'
        | '\u{10000}'..='\u{effff}')
}

fn is_name_char(c: char) -> bool {
    is_name_start(c)
        || matches!(c, '-' | '.' | '0'..='9' | '\u{b7}' | '\u{300}'..='\u{36f}' | '\u{203f}'..='\u{2040}')
}

fn is_simple_name(name: &str) -> bool {
    name.starts_with(is_name_start) && name.chars().all(is_name_char)
}

/// Whether `name` is a name with at most one prefix.
fn is_qualified_name(name: &str) -> bool {
    match name.split_once(':') {
        Some((prefix, local)) => is_simple_name(prefix) && is_simple_name(local),
        None => is_simple_name(name),
    }
}

/// Turns byte offsets into lines and columns, each byte looked at once.
struct Lines<'a> {
    rest: &'a str,
    offset: usize,
    line: u32,
    column: u32,
}

impl<'a> Lines<'a> {
    fn new(text: &'a str) -> Self {
        Lines {
            rest: text,
            offset: 0,
            line: 1,
            column: 1,
        }
    }

    /// Moves to `offset`, which is not before the last one asked for.
    fn advance(&mut self, offset: usize) -> (u32, u32) {
        let step = offset.saturating_sub(self.offset).min(self.rest.len());
        if let Some((passed, rest)) = self.rest.split_at_checked(step) {
            for c in passed.chars() {
                if c == '\n' {
                    self.line += 1;
                    self.column = 1;
                } else {
                    self.column += 1;
                }
            }
            self.rest = rest;
            self.offset += step;
        }
        (self.line, self.column)
    }
}

/// Returns the line and column of a byte of `text`.
fn locate(text: &str, offset: usize) -> (u32, u32) {
    let mut floor = offset.min(text.len());
    while !text.is_char_boundary(floor) {
        floor -= 1;
    }
    Lines::new(text).advance(floor)
}

/// The error of a document over the size limit: it was not read, so its start
/// is the only place known.
pub(super) fn too_many_bytes() -> DomainError {
    DomainError::TooLarge {
        place: Place {
            line: 1,
            column: 1,
            element: String::new(),
        },
        what: "bytes",
        limit: DOCUMENT_BYTES_MAX,
    }
}

/// The error of a document that is UTF-8 only up to `valid_bytes`.
pub(super) fn bad_encoding(xml: &[u8], valid_bytes: usize) -> DomainError {
    let valid = xml.get(..valid_bytes).unwrap_or_default();
    let valid = String::from_utf8_lossy(valid);
    let (line, column) = locate(&valid, valid.len());
    DomainError::Encoding {
        place: Place {
            line,
            column,
            element: String::new(),
        },
    }
}

/// Reads a document into a tree whose root is its outermost element.
pub(super) fn read(xml: &str) -> Result<Element, DomainError> {
    if xml.len() > DOCUMENT_BYTES_MAX {
        return Err(too_many_bytes());
    }
    let source = xml.strip_prefix('\u{feff}').unwrap_or(xml);
    TreeBuilder::new(source).build()
}

struct TreeBuilder<'a> {
    source: &'a str,
    lines: Lines<'a>,
    namespaces: NamespaceResolver,
    open: Vec<Element>,
    root: Option<Element>,
    element_count: usize,
    /// Where `<metadata>` starts and how many elements are open inside it.
    metadata: Option<(usize, usize)>,
    /// Where the current event starts.
    at: usize,
}

impl<'a> TreeBuilder<'a> {
    fn new(source: &'a str) -> Self {
        let mut namespaces = NamespaceResolver::default();
        namespaces.set_max_namespace_bindings(NAMESPACES_MAX);
        TreeBuilder {
            source,
            lines: Lines::new(source),
            namespaces,
            open: Vec::new(),
            root: None,
            element_count: 0,
            metadata: None,
            at: 0,
        }
    }

    fn build(mut self) -> Result<Element, DomainError> {
        if let Some((offset, c)) = self.source.char_indices().find(|&(_, c)| !is_xml_char(c)) {
            let reason = format!("character U+{:04X} is not allowed", u32::from(c));
            return Err(self.syntax_at(offset, reason));
        }
        let mut reader = Reader::from_str(self.source);
        reader.config_mut().check_comments = true;
        loop {
            self.at = offset(reader.buffer_position());
            let event = reader
                .read_event()
                .map_err(|e| self.syntax_at(offset(reader.error_position()), describe(&e)))?;
            let end = offset(reader.buffer_position());
            match event {
                Event::Start(tag) => self.start(&tag)?,
                Event::Empty(tag) => {
                    self.start(&tag)?;
                    self.end(end);
                }
                Event::End(_) => self.end(end),
                Event::Text(text) => {
                    if text.contains("]]>") {
                        return Err(self.syntax("']]>' in text"));
                    }
                    self.text(&text.xml10_content())?;
                }
                Event::CData(data) => {
                    if self.open.is_empty() {
                        return Err(self.syntax("text outside of the document's element"));
                    }
                    self.text(&data.xml10_content())?;
                }
                Event::GeneralRef(reference) => self.reference(&reference)?,
                Event::Decl(declaration) => self.declaration(&declaration)?,
                Event::PI(instruction) => {
                    let target = instruction.target();
                    if !is_simple_name(target) || target.eq_ignore_ascii_case("xml") {
                        return Err(self.syntax("malformed processing instruction"));
                    }
                }
                Event::DocType(_) => {
                    return Err(DomainError::Doctype {
                        place: self.place_at(self.at),
                    });
                }
                Event::Comment(_) => {}
                Event::Eof => break,
            }
        }
        if let Some(open) = self.open.last() {
            let reason = format!("<{}> of line {} is not closed", open.name, open.line);
            return Err(self.syntax_at(self.source.len(), reason));
        }
        let missing = self.syntax_at(self.source.len(), "there is no element".to_owned());
        self.root.ok_or(missing)
    }

    fn start(&mut self, tag: &BytesStart<'_>) -> Result<(), DomainError> {
        if self.open.is_empty() && self.root.is_some() {
            return Err(self.syntax("a second element after the end of the first"));
        }
        self.element_count += 1;
        if self.element_count > ELEMENTS_MAX {
            return Err(self.too_large("elements", ELEMENTS_MAX));
        }
        let depth = self.open.len() + self.metadata.map_or(0, |(_, inside)| inside);
        if depth >= DEPTH_MAX {
            return Err(self.too_large("levels of elements", DEPTH_MAX));
        }
        if self.namespaces.push(tag).is_err() {
            return Err(self.syntax("a namespace declaration is malformed or one too many"));
        }
        self.check_name(tag.name())?;
        let attributes = self.attributes(tag)?;
        if let Some((_, inside)) = &mut self.metadata {
            *inside += 1;
            return Ok(());
        }
        let name = tag.name().into_inner();
        if self.open.len() == 1 && name == "metadata" {
            self.metadata = Some((self.at, 0));
        }
        let (line, column) = self.lines.advance(self.at);
        self.open.push(Element {
            attributes,
            line,
            column,
            ..Element::new(name)
        });
        Ok(())
    }

    /// Ends the innermost element; quick-xml has matched the tags.
    fn end(&mut self, end: usize) {
        self.namespaces.pop();
        let mut raw = None;
        match self.metadata {
            Some((start, 0)) => {
                raw = self.source.get(start..end).map(str::to_owned);
                self.metadata = None;
            }
            Some((start, inside)) => {
                self.metadata = Some((start, inside - 1));
                return;
            }
            None => {}
        }
        let Some(mut element) = self.open.pop() else {
            return;
        };
        element.raw = raw;
        element.settle_text();
        match self.open.last_mut() {
            Some(parent) => parent.children.push(element),
            None => self.root = Some(element),
        }
    }

    fn text(&mut self, text: &str) -> Result<(), DomainError> {
        if self.metadata.is_some() {
            return Ok(());
        }
        let Some(element) = self.open.last_mut() else {
            if text.chars().all(is_space) {
                return Ok(());
            }
            return Err(self.syntax("text outside of the document's element"));
        };
        if let Some(blank) = text.find(|c| !is_space(c))
            && element.text.chars().all(is_space)
        {
            element.text_at = self.lines.advance(self.at + blank);
        }
        element.text.push_str(text);
        if element.text.len() > TEXT_BYTES_MAX {
            return Err(self.too_large("bytes of text in one element", TEXT_BYTES_MAX));
        }
        Ok(())
    }

    fn reference(&mut self, reference: &BytesRef<'_>) -> Result<(), DomainError> {
        if self.open.is_empty() {
            return Err(self.syntax("text outside of the document's element"));
        }
        if let Some(text) = resolve_predefined_entity(reference) {
            return self.text(text);
        }
        match reference.resolve_char_ref() {
            Ok(Some(c)) if is_xml_char(c) => self.text(c.encode_utf8(&mut [0; 4])),
            Ok(None) => Err(self.syntax("an entity that XML does not predefine")),
            _ => Err(self.syntax("malformed character reference")),
        }
    }

    fn declaration(&self, declaration: &BytesDecl<'_>) -> Result<(), DomainError> {
        if self.at != 0 {
            return Err(self.syntax("an XML declaration that is not at the start"));
        }
        let attributes = self.attributes(&BytesStart::from_content(&**declaration, "xml".len()))?;
        if attributes.first().is_none_or(|(name, _)| name != "version") {
            return Err(self.syntax("an XML declaration without a version"));
        }
        let mut names = ["version", "encoding", "standalone"].into_iter();
        for (name, value) in &attributes {
            let value = value.to_ascii_lowercase();
            let reason = match names.find(|known| known == name) {
                Some("version") if value != "1.0" => "an XML version other than 1.0",
                // The text has been decoded already: another name could only be a lie.
                Some("encoding") if !["utf-8", "utf8", "us-ascii"].contains(&value.as_str()) => {
                    "an encoding other than UTF-8"
                }
                Some(_) => continue,
                None => "a malformed XML declaration",
            };
            return Err(self.syntax(reason));
        }
        Ok(())
    }

    fn attributes(&self, tag: &BytesStart<'_>) -> Result<Vec<(String, String)>, DomainError> {
        let raw = tag.attributes_raw();
        let mut attributes = Vec::new();
        for attribute in tag.attributes() {
            let attribute = attribute.map_err(|e| self.syntax(&describe(&e.into())))?;
            if attributes.len() == ATTRIBUTES_MAX {
                return Err(self.too_large("attributes in one element", ATTRIBUTES_MAX));
            }
            let key = attribute.key.into_inner();
            // quick-xml accepts a="1"b="2"; XML wants white space before b.
            let start = key.as_ptr().addr().checked_sub(raw.as_ptr().addr());
            let before = start.and_then(|start| raw.get(..start));
            if !before.is_some_and(|before| before.ends_with(is_space)) {
                return Err(self.syntax("no white space before an attribute"));
            }
            if key != "xmlns" {
                self.check_name(attribute.key)?;
            }
            if attribute.value.contains('<') {
                return Err(self.syntax("'<' in an attribute"));
            }
            let value = attribute
                .normalized_value(XmlVersion::Implicit1_0)
                .map_err(|e| self.syntax(&describe(&e)))?;
            if !value.chars().all(is_xml_char) {
                return Err(self.syntax("malformed character reference"));
            }
            if value.len() > TEXT_BYTES_MAX {
                return Err(self.too_large("bytes in one attribute", TEXT_BYTES_MAX));
            }
            if key.starts_with("xmlns:") && value.is_empty() {
                return Err(self.syntax("an empty namespace"));
            }
            attributes.push((key.to_owned(), value.into_owned()));
        }
        Ok(attributes)
    }

    /// Checks the form of a name and that its prefix is declared.
    fn check_name(&self, name: QName<'_>) -> Result<(), DomainError> {
        if name.as_ref().len() > NAME_BYTES_MAX {
            return Err(self.too_large("bytes in one name", NAME_BYTES_MAX));
        }
        if !is_qualified_name(name.as_ref()) {
            let reason = format!("{} is no name", Quote::new(name.as_ref()));
            return Err(self.syntax(&reason));
        }
        if let Some(prefix) = name.prefix()
            && let ResolveResult::Unknown(prefix) =
                self.namespaces.resolve_prefix(Some(prefix), false)
        {
            let reason = format!("namespace prefix {} is not declared", Quote::new(&prefix));
            return Err(self.syntax(&reason));
        }
        Ok(())
    }

    fn place_at(&self, offset: usize) -> Place {
        let (line, column) = locate(self.source, offset);
        Place {
            line,
            column,
            element: self
                .open
                .last()
                .map_or_else(String::new, |e| e.name.clone()),
        }
    }

    fn syntax(&self, reason: &str) -> DomainError {
        self.syntax_at(self.at, reason.to_owned())
    }

    fn syntax_at(&self, offset: usize, reason: String) -> DomainError {
        DomainError::Syntax {
            place: self.place_at(offset),
            reason,
        }
    }

    fn too_large(&self, what: &'static str, limit: usize) -> DomainError {
        DomainError::TooLarge {
            place: self.place_at(self.at),
            what,
            limit,
        }
    }
}

/// The document is below 1 MiB, so that its offsets fit.
fn offset(position: u64) -> usize {
    usize::try_from(position).unwrap_or(usize::MAX)
}

/// Says what quick-xml found, with no more of the document than a quote.
fn describe(error: &quick_xml::Error) -> String {
    use quick_xml::Error::{Escape, IllFormed, InvalidAttr, Namespace};
    use quick_xml::errors::IllFormedError::{MismatchedEndTag, UnmatchedEndTag};
    match error {
        IllFormed(MismatchedEndTag { expected, found }) => format!(
            "the end tag {} where {} is open",
            Quote::new(found),
            Quote::new(expected)
        ),
        IllFormed(UnmatchedEndTag(found)) => {
            format!("the end tag {} where nothing is open", Quote::new(found))
        }
        Escape(_) => "a malformed or undefined reference in an attribute".to_owned(),
        InvalidAttr(_) => "a malformed attribute, or one given twice".to_owned(),
        Namespace(_) => "a malformed namespace declaration".to_owned(),
        other => other.to_string(),
    }
}
