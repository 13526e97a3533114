//! The texts of a domain: title, description, and what programs keep in `<metadata>`.

use std::fmt::Write as _;

use super::error::ValueError;
use super::{Description, DomainConfig, Title};
use super::{document, periodic};

/// The `<metadata>` of a domain, as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Metadata(String);

impl Metadata {
    /// Takes what the reader of documents found well-formed.
    pub(super) fn checked(xml: String) -> Self {
        Self(xml)
    }

    /// Returns the element, its own tags included.
    pub fn as_xml(&self) -> &str {
        &self.0
    }
}

impl DomainConfig {
    /// Replaces title, description and metadata.
    ///
    /// # Errors
    ///
    /// One of them is not what a document can have; nothing changes then.
    pub fn set_texts(
        &mut self,
        title: Option<&str>,
        description: Option<&str>,
        metadata: Option<&str>,
    ) -> Result<(), ValueError> {
        let title = title.map(Title::new).transpose()?;
        let description = description.map(Description::new).transpose()?;
        let metadata = metadata.map(|xml| self.check_metadata(xml)).transpose()?;
        self.title = title;
        self.description = description;
        self.metadata = metadata;
        Ok(())
    }

    fn check_metadata(&self, xml: &str) -> Result<Metadata, ValueError> {
        let expected = "one well-formed <metadata> element whose prefixes are declared";
        let (document, _) = inside_domain(&self.namespaces, xml);
        let root = document::read(&document).map_err(|_| ValueError::new(xml, expected))?;
        match root.children.as_slice() {
            [only] if only.raw.as_deref() == Some(xml) => {}
            _ => return Err(ValueError::new(xml, expected)),
        }
        periodic::find(&self.namespaces, xml).map_err(|found| found.error)?;
        Ok(Metadata(xml.to_owned()))
    }
}

/// Returns a document with nothing but metadata, and where it starts in it.
pub(super) fn inside_domain(namespaces: &[(String, String)], metadata: &str) -> (String, usize) {
    let mut document = "<domain".to_owned();
    for (prefix, namespace) in namespaces {
        let namespace = namespace.replace('&', "&amp;").replace('<', "&lt;");
        let namespace = namespace.replace('\'', "&apos;");
        write!(document, " xmlns:{prefix}='{namespace}'").expect("a String takes all");
    }
    document.push('>');
    let start = document.len();
    document += metadata;
    document += "</domain>";
    (document, start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_replaced_only_by_what_a_document_can_have() {
        let xml = "<domain type='kvm' xmlns:a='urn:a'><name>d</name><memory>65536</memory>\
                   <os><type>hvm</type><kernel>/k</kernel></os></domain>";
        let mut config = DomainConfig::parse(xml).unwrap();
        let metadata = "<metadata><a:x>1</a:x></metadata>";
        config
            .set_texts(Some("t"), Some("d"), Some(metadata))
            .unwrap();
        let shown = config.to_xml(super::super::XmlView::Inactive);
        assert_eq!(DomainConfig::parse(&shown).unwrap(), config);
        for bad in [
            "<metadata>",
            "<metadata/><metadata/>",
            "</domain><metadata/>",
            "<other/>",
            "text<metadata/>",
            "<metadata><b:x/></metadata>",
        ] {
            let before = config.clone();
            assert!(config.set_texts(None, None, Some(bad)).is_err(), "{bad}");
            assert_eq!(config, before);
        }
    }
}
