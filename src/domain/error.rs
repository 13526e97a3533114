//! What can be wrong with a domain document, and where.

use std::fmt;

/// Longest piece of a document that an error message quotes, in characters.
///
/// Messages go to terminals, logs and RPC packets; the document is not ours.
const QUOTE_CHARS_MAX: usize = 64;

/// A place in a domain document.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Line, counted from 1.
    pub line: u32,
    /// Column in characters, counted from 1.
    pub column: u32,
    /// Element at this place, or an empty string where no element is open.
    pub element: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: ", self.line)?;
        if self.element.is_empty() {
            Ok(())
        } else {
            write!(f, "<{}>: ", self.element)
        }
    }
}

/// Text of a document, cut and escaped so that a message can carry it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quote(String);

impl Quote {
    pub(super) fn new(text: &str) -> Self {
        let mut quote: String = text.chars().take(QUOTE_CHARS_MAX).collect();
        if text.chars().nth(QUOTE_CHARS_MAX).is_some() {
            quote.push('…');
        }
        Quote(quote.escape_debug().to_string().replace("\\'", "'"))
    }
}

impl fmt::Display for Quote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "'{}'", self.0)
    }
}

/// A value that the machine cannot have, refused by the type that holds it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{value} is not {expected}")]
pub struct ValueError {
    /// The value that was refused.
    pub value: Quote,
    /// What would have been accepted.
    pub expected: &'static str,
}

impl ValueError {
    pub(super) fn new(value: &str, expected: &'static str) -> Self {
        ValueError {
            value: Quote::new(value),
            expected,
        }
    }
}

/// Returns a reason as the end of a message; not every row of the table has one.
fn because(reason: &str) -> String {
    if reason.is_empty() {
        String::new()
    } else {
        format!(": {reason}")
    }
}

/// Why a domain document was not accepted.
///
/// Every variant knows its place: [`DomainError::line`] and
/// [`DomainError::element`] give it to callers that report it themselves.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DomainError {
    /// The document is not well-formed XML.
    #[error("{place}the document is not well-formed XML: {reason}")]
    Syntax {
        /// Where reading stopped.
        place: Place,
        /// What is wrong there.
        reason: String,
    },
    /// The document exceeds a limit.
    #[error("{place}the document has more than {limit} {what}")]
    TooLarge {
        /// Where the limit was crossed.
        place: Place,
        /// What is counted.
        what: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The document is not encoded in UTF-8.
    #[error("{place}the document is not UTF-8")]
    Encoding {
        /// The first byte that is not UTF-8.
        place: Place,
    },
    /// The document has a DOCTYPE, which can define entities.
    #[error("{place}a document type declaration is not accepted")]
    Doctype {
        /// Where it stands.
        place: Place,
    },
    /// The outermost element is something else than a domain.
    #[error("{place}expected a <domain> document")]
    NotADomain {
        /// The outermost element.
        place: Place,
    },
    /// An element that libvirt's domain format does not have here.
    #[error("{place}unknown element in <{parent}>")]
    UnknownElement {
        /// The element.
        place: Place,
        /// Element that holds it.
        parent: String,
    },
    /// An attribute that libvirt's domain format does not have here.
    #[error("{place}unknown attribute {attribute}")]
    UnknownAttribute {
        /// The element that has the attribute.
        place: Place,
        /// Name of the attribute.
        attribute: Quote,
    },
    /// An element or attribute of another namespace, outside `<metadata>`.
    #[error("{place}{name} belongs to another namespace; only <metadata> may hold such content")]
    ForeignNamespace {
        /// The element, or the element that has the attribute.
        place: Place,
        /// Qualified name of the element or attribute.
        name: Quote,
    },
    /// A part of the format that this program does not carry out.
    #[error("{place}{reason}")]
    Unsupported {
        /// The element, or the element that has the attribute.
        place: Place,
        /// Why, and what to write instead.
        reason: &'static str,
    },
    /// An attribute that this program does not carry out.
    #[error("{place}attribute {attribute}: {reason}")]
    UnsupportedAttribute {
        /// The element that has the attribute.
        place: Place,
        /// Name of the attribute.
        attribute: &'static str,
        /// Why, and what to write instead.
        reason: &'static str,
    },
    /// A value that this program does not carry out.
    #[error("{place}{what} {value} is not supported, only {}{}", values.join(", "), because(reason))]
    UnsupportedValue {
        /// The element, or the element that has the attribute.
        place: Place,
        /// What has the value: an attribute's name, or `value`.
        what: &'static str,
        /// The value.
        value: Quote,
        /// The values that are.
        values: &'static [&'static str],
        /// Why, and what to write instead.
        reason: &'static str,
    },
    /// A value that is malformed or out of range.
    #[error("{place}{what} {value} is not {expected}")]
    Invalid {
        /// The element, or the element that has the attribute.
        place: Place,
        /// What has the value: an attribute's name, or `value`.
        what: &'static str,
        /// The value.
        value: Quote,
        /// What would have been accepted.
        expected: &'static str,
    },
    /// Something that the machine cannot do without.
    #[error("{place}{what} is missing{hint}")]
    Missing {
        /// The element that should have held it.
        place: Place,
        /// What is missing.
        what: &'static str,
        /// What to do about it; starts with its own punctuation, or is empty.
        hint: &'static str,
    },
    /// An element that may stand only once stands again.
    #[error("{place}given twice in <{parent}>")]
    Duplicate {
        /// The second one.
        place: Place,
        /// Element that holds both.
        parent: String,
    },
    /// Text where only elements may stand.
    #[error("{place}unexpected text {text}")]
    UnexpectedText {
        /// The element that holds the text.
        place: Place,
        /// The text.
        text: Quote,
    },
    /// Two parts of the document contradict each other.
    #[error("{place}{reason}")]
    Conflict {
        /// The later part.
        place: Place,
        /// The contradiction, with its operands.
        reason: String,
    },
}

impl DomainError {
    /// Returns where the document is wrong.
    pub fn place(&self) -> &Place {
        match self {
            DomainError::Syntax { place, .. }
            | DomainError::TooLarge { place, .. }
            | DomainError::Encoding { place }
            | DomainError::Doctype { place }
            | DomainError::NotADomain { place }
            | DomainError::UnknownElement { place, .. }
            | DomainError::UnknownAttribute { place, .. }
            | DomainError::ForeignNamespace { place, .. }
            | DomainError::Unsupported { place, .. }
            | DomainError::UnsupportedAttribute { place, .. }
            | DomainError::UnsupportedValue { place, .. }
            | DomainError::Invalid { place, .. }
            | DomainError::Missing { place, .. }
            | DomainError::Duplicate { place, .. }
            | DomainError::UnexpectedText { place, .. }
            | DomainError::Conflict { place, .. } => place,
        }
    }

    /// Returns the line, counted from 1.
    pub fn line(&self) -> u32 {
        self.place().line
    }

    /// Returns the element that is wrong, or `None` where none was open.
    pub fn element(&self) -> Option<&str> {
        let element = self.place().element.as_str();
        (!element.is_empty()).then_some(element)
    }

    /// Whether the document is correct libvirt XML that asks for something
    /// this program does not do, as opposed to a document that is wrong.
    pub fn is_unsupported(&self) -> bool {
        matches!(
            self,
            DomainError::Unsupported { .. }
                | DomainError::UnsupportedAttribute { .. }
                | DomainError::UnsupportedValue { .. }
                | DomainError::ForeignNamespace { .. }
        )
    }
}

/// Something a user should know about a document that was accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The element the note is about.
    pub place: Place,
    /// What the machine does with it.
    pub text: &'static str,
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.place, self.text)
    }
}
