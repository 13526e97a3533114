//! What becomes of every element and attribute of libvirt's domain format.
//!
//! One table decides it, and everything else reads the table: this walk, which
//! runs before anything is interpreted; the reference in `docs/domain-xml.md`,
//! which a test compares with it; and the command line's list. What the table
//! does not name is refused, so that no wish of a user is dropped in silence.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::sync::LazyLock;

use super::document::Element;
use super::error::{DomainError, Note, Quote};
use super::{table, table_devices, table_pci};

/// What becomes of an element or attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disposition {
    /// The machine or its lifecycle depends on it.
    Honoured,
    /// It changes nothing; the document keeps it.
    Accepted,
    /// A document that has it is refused.
    Refused,
}

impl fmt::Display for Disposition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Disposition::Honoured => "honoured",
            Disposition::Accepted => "accepted",
            Disposition::Refused => "refused",
        })
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Elements from the root on, `/` between them, `@` before an attribute.
    ///
    /// `timer[tsc]` is a `<timer>` whose name, and `controller[pci]` a
    /// `<controller>` whose type, is the word in brackets.
    pub path: &'static str,
    /// What becomes of it.
    pub disposition: Disposition,
    /// The reason, or what to write instead; goes into error messages.
    pub note: &'static str,
    /// Values that are accepted; empty where the table does not limit them.
    pub values: &'static [&'static str],
    /// Attributes that the element must have.
    pub needs: &'static [&'static str],
    pub(super) text: bool,
    pub(super) many: bool,
    pub(super) subtree: bool,
    pub(super) kept: bool,
    pub(super) told: bool,
}

impl Rule {
    const fn new(path: &'static str, disposition: Disposition, note: &'static str) -> Self {
        Rule {
            path,
            disposition,
            note,
            values: &[],
            needs: &[],
            text: false,
            many: false,
            subtree: false,
            kept: matches!(disposition, Disposition::Accepted),
            told: false,
        }
    }

    pub(super) const fn honoured(path: &'static str, note: &'static str) -> Self {
        Rule::new(path, Disposition::Honoured, note)
    }

    pub(super) const fn accepted(path: &'static str, note: &'static str) -> Self {
        Rule::new(path, Disposition::Accepted, note)
    }

    pub(super) const fn refused(path: &'static str, note: &'static str) -> Self {
        Rule::new(path, Disposition::Refused, note)
    }

    /// Only these values; of a text, or of an attribute.
    pub(super) const fn only(self, values: &'static [&'static str]) -> Self {
        Rule { values, ..self }
    }

    /// The element must have these attributes.
    pub(super) const fn needs(self, needs: &'static [&'static str]) -> Self {
        Rule { needs, ..self }
    }

    /// The element holds text.
    pub(super) const fn text(self) -> Self {
        Rule { text: true, ..self }
    }

    /// The element may stand more than once.
    pub(super) const fn many(self) -> Self {
        Rule { many: true, ..self }
    }

    /// Whatever the element holds shares its fate.
    pub(super) const fn subtree(self) -> Self {
        Rule {
            subtree: true,
            text: true,
            ..self
        }
    }

    /// Accepted, but not shown again.
    pub(super) const fn dropped(self) -> Self {
        Rule {
            kept: false,
            ..self
        }
    }

    /// Whoever uses it is told the note.
    pub(super) const fn told(self) -> Self {
        Rule { told: true, ..self }
    }

    /// Returns what the reference says of the row besides its disposition.
    pub fn remark(&self) -> String {
        let mut parts = Vec::new();
        let quoted = |words: &[&str]| format!("`{}`", words.join("`, `"));
        if !self.values.is_empty() {
            parts.push(format!("only {}", quoted(self.values)));
        }
        if !self.note.is_empty() {
            parts.push(self.note.to_owned());
        }
        if !self.needs.is_empty() {
            parts.push(format!("needs {}", quoted(self.needs)));
        }
        if self.many {
            parts.push("may be repeated".to_owned());
        }
        if self.subtree {
            parts.push("with all that it holds".to_owned());
        }
        parts.join("; ")
    }
}

/// Returns the table, in the order of the reference.
pub fn rules() -> impl Iterator<Item = &'static Rule> {
    let tables = [
        table::DOMAIN,
        table_devices::DEVICES,
        table_pci::PCI,
        table_pci::DISK_PLACE,
        table_pci::INTERFACE,
        table_pci::INTERFACE_PLACE,
        table_pci::RNG,
        table_pci::RNG_PLACE,
        table_devices::REST,
        table_pci::BALLOON,
        table_pci::BALLOON_PLACE,
        table::SECURITY,
    ];
    tables.into_iter().flatten()
}

/// Sections of the reference, by the row each starts with.
const SECTIONS: [(&str, &str); 10] = [
    ("domain", "General"),
    ("domain/memory", "Memory"),
    ("domain/vcpu", "vCPUs and tuning"),
    ("domain/os", "Boot"),
    ("domain/features", "Features"),
    ("domain/cpu", "CPU"),
    ("domain/clock", "Clock"),
    ("domain/on_poweroff", "Lifecycle"),
    ("domain/devices", "Devices"),
    ("domain/seclabel", "Security"),
];

/// Returns the table as Markdown, a section at a time.
pub fn reference() -> String {
    let mut text = String::new();
    for rule in rules() {
        if let Some((_, title)) = SECTIONS.iter().find(|(first, _)| *first == rule.path) {
            let blank = if text.is_empty() { "" } else { "\n" };
            text.push_str(blank);
            text.push_str("### ");
            text.push_str(title);
            text.push_str("\n\n| element or attribute | is | how, or why |\n|---|---|---|\n");
        }
        let remark = rule.remark().replace('<', "&lt;");
        text.push_str(&format!(
            "| `{}` | {} | {remark} |\n",
            rule.path, rule.disposition
        ));
    }
    text
}

/// Elements of one name that are different things by one of their attributes.
const KEYED: [(&str, &str); 2] = [
    ("domain/clock/timer", "name"),
    ("domain/devices/controller", "type"),
];

/// Each row and its position, by path.
static INDEX: LazyLock<BTreeMap<&'static str, (usize, &'static Rule)>> = LazyLock::new(|| {
    let numbered = rules().enumerate();
    numbered
        .map(|(index, rule)| (rule.path, (index, rule)))
        .collect()
});

/// What was accepted and is shown again, though nothing depends on it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Kept {
    /// Path of the element that has the attribute, its name, its value.
    pub attributes: Vec<(String, String, String)>,
    /// Path of the element that holds it, and the element.
    pub elements: Vec<(String, Element)>,
}

/// What the walk learns.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub kept: Kept,
    pub notes: Vec<Note>,
    /// Namespace declarations of the root.
    pub namespaces: Vec<(String, String)>,
}

impl Survey {
    pub fn tell(&mut self, element: &Element, text: &'static str) {
        self.notes.push(Note {
            place: element.place(),
            text,
        });
    }
}

/// Holds a whole document to the table.
pub(super) fn survey(root: &Element) -> Result<Survey, DomainError> {
    if root.name != "domain" {
        return Err(DomainError::NotADomain {
            place: root.place(),
        });
    }
    let mut survey = Survey::default();
    let rule = lookup("domain").ok_or_else(|| unknown(root, ""))?;
    visit(root, "domain", rule, false, &mut survey)?;
    // In the order of the canonical form: that of the document must not show.
    survey.kept.attributes.sort();
    let place = |(parent, element): &(String, Element)| (parent.clone(), rank(parent, element));
    survey.kept.elements.sort_by_cached_key(place);
    Ok(survey)
}

fn lookup(path: &str) -> Option<&'static Rule> {
    INDEX.get(path).map(|(_, rule)| *rule)
}

/// Returns where an element stands among its siblings in the canonical form.
pub(super) fn rank(parent: &str, element: &Element) -> usize {
    let row = INDEX.get(path_of(parent, element).as_str());
    row.map_or(usize::MAX, |(index, _)| *index)
}

/// Whether the element at this path is interpreted, and not kept as it is.
pub(super) fn is_honoured(path: &str) -> bool {
    lookup(path).is_some_and(|rule| rule.disposition == Disposition::Honoured)
}

fn unknown(element: &Element, parent: &str) -> DomainError {
    if element.name.contains(':') {
        return DomainError::ForeignNamespace {
            place: element.place(),
            name: Quote::new(&element.name),
        };
    }
    DomainError::UnknownElement {
        place: element.place(),
        parent: parent.to_owned(),
    }
}

/// Walks one element that `rule` lets in; `inside_kept` says that an element
/// around it is kept whole already. Recursion is bounded by the depth limit.
fn visit(
    element: &Element,
    path: &str,
    rule: &Rule,
    inside_kept: bool,
    survey: &mut Survey,
) -> Result<(), DomainError> {
    if rule.told {
        survey.tell(element, rule.note);
    }
    if rule.subtree || element.raw.is_some() {
        return refuse_foreign(element);
    }
    check_text(element, rule)?;
    let mut needs = rule.needs.iter();
    if let Some(what) = needs.find(|name| element.attribute(name).is_none()) {
        return Err(DomainError::Missing {
            place: element.place(),
            what,
            hint: "",
        });
    }
    for (name, value) in &element.attributes {
        visit_attribute(
            element,
            path,
            (name.as_str(), value.as_str()),
            inside_kept,
            survey,
        )?;
    }
    let mut seen = HashSet::new();
    for child in &element.children {
        let child_path = path_of(path, child);
        let rule = lookup(&child_path).ok_or_else(|| unknown_child(child, path, element))?;
        if rule.disposition == Disposition::Refused {
            return Err(DomainError::Unsupported {
                place: child.place(),
                reason: rule.note,
            });
        }
        if !seen.insert(child_path.clone()) && !rule.many {
            return Err(DomainError::Duplicate {
                place: child.place(),
                parent: element.name.clone(),
            });
        }
        let keep = !inside_kept && rule.disposition == Disposition::Accepted;
        if keep && rule.kept {
            let entry = (path.to_owned(), child.clone());
            survey.kept.elements.push(entry);
        }
        visit(child, &child_path, rule, inside_kept || keep, survey)?;
    }
    Ok(())
}

/// Returns the path of `child` in the table.
fn path_of(parent: &str, child: &Element) -> String {
    let path = format!("{parent}/{}", child.name);
    let key = KEYED.iter().find(|(keyed, _)| *keyed == path);
    match key.and_then(|(_, attribute)| child.attribute(attribute)) {
        Some(value) => format!("{path}[{value}]"),
        None => path,
    }
}

/// Says what is wrong with a child that the table does not have.
fn unknown_child(child: &Element, parent_path: &str, parent: &Element) -> DomainError {
    let path = format!("{parent_path}/{}", child.name);
    let Some((_, what)) = KEYED.into_iter().find(|(keyed, _)| *keyed == path) else {
        return unknown(child, &parent.name);
    };
    match child.attribute(what) {
        None => DomainError::Missing {
            place: child.place(),
            what,
            hint: "",
        },
        Some(value) => DomainError::Invalid {
            place: child.place(),
            what,
            value: Quote::new(value),
            expected: "one that the domain format defines",
        },
    }
}

/// Whether the attribute is the one that tells elements of this path apart.
fn is_key(path: &str, name: &str) -> bool {
    let mut keys = KEYED.iter().filter(|(_, attribute)| *attribute == name);
    keys.any(|(keyed, _)| path.strip_prefix(keyed).is_some_and(|p| p.starts_with('[')))
}

fn visit_attribute(
    element: &Element,
    path: &str,
    (name, value): (&str, &str),
    inside_kept: bool,
    survey: &mut Survey,
) -> Result<(), DomainError> {
    if path == "domain"
        && let Some(prefix) = name.strip_prefix("xmlns:")
    {
        let entry = (prefix.to_owned(), value.to_owned());
        survey.namespaces.push(entry);
        return Ok(());
    }
    if is_key(path, name) {
        return Ok(());
    }
    if name == "xmlns" || name.contains(':') {
        return Err(DomainError::ForeignNamespace {
            place: element.place(),
            name: Quote::new(name),
        });
    }
    let rule = lookup(&format!("{path}@{name}")).ok_or_else(|| DomainError::UnknownAttribute {
        place: element.place(),
        attribute: Quote::new(name),
    })?;
    let attribute = rule.path.rsplit('@').next().unwrap_or(rule.path);
    if rule.disposition == Disposition::Refused {
        return Err(DomainError::UnsupportedAttribute {
            place: element.place(),
            attribute,
            reason: rule.note,
        });
    }
    check_values(element, attribute, value, rule)?;
    if rule.told {
        survey.tell(element, rule.note);
    }
    if rule.kept && !inside_kept {
        let entry = (path.to_owned(), name.to_owned(), value.to_owned());
        survey.kept.attributes.push(entry);
    }
    Ok(())
}

fn check_text(element: &Element, rule: &Rule) -> Result<(), DomainError> {
    if rule.text {
        return check_values(element, "value", &element.text, rule);
    }
    if element.text.is_empty() {
        return Ok(());
    }
    let mut place = element.place();
    (place.line, place.column) = element.text_at;
    Err(DomainError::UnexpectedText {
        place,
        text: Quote::new(&element.text),
    })
}

fn check_values(
    element: &Element,
    what: &'static str,
    value: &str,
    rule: &Rule,
) -> Result<(), DomainError> {
    if rule.values.is_empty() || rule.values.contains(&value) {
        return Ok(());
    }
    Err(DomainError::UnsupportedValue {
        place: element.place(),
        what,
        value: Quote::new(value),
        values: rule.values,
        reason: rule.note,
    })
}

/// Refuses other namespaces below an element that is kept unread.
fn refuse_foreign(element: &Element) -> Result<(), DomainError> {
    if element.raw.is_some() {
        return Ok(());
    }
    let mut names = element.attributes.iter().map(|(name, _)| name);
    if let Some(name) = names.find(|name| *name == "xmlns" || name.contains(':')) {
        return Err(DomainError::ForeignNamespace {
            place: element.place(),
            name: Quote::new(name),
        });
    }
    for child in &element.children {
        if child.name.contains(':') {
            return Err(unknown(child, &element.name));
        }
        refuse_foreign(child)?;
    }
    Ok(())
}
