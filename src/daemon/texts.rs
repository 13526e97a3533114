//! Metadata of domains: elements that programs keep in `<metadata>`, one for each namespace.

use super::xml::{self, Element, escape};
use crate::host::DomainConfig;
use crate::rpc::{Code, RpcError};

fn metadata_of(config: &DomainConfig) -> Option<(String, Element)> {
    let raw = config.metadata.as_ref()?.as_xml().to_owned();
    let tree = xml::read(&raw, "metadata").ok()?;
    Some((raw, tree))
}

/// Returns the namespace of an element by what it declares itself, and its prefix.
fn own_namespace(element: &Element) -> Option<(&str, Option<&str>)> {
    match element.name.split_once(':') {
        Some((prefix, _)) => {
            let declared = element.attribute(&format!("xmlns:{prefix}"))?;
            Some((declared, Some(prefix)))
        }
        None => Some((element.attribute("xmlns")?, None)),
    }
}

fn find<'a>(tree: &'a Element, uri: &str) -> Option<&'a Element> {
    let has_uri =
        |child: &&Element| own_namespace(child).is_some_and(|(declared, _)| declared == uri);
    tree.children.iter().find(has_uri)
}

/// Returns the element of a namespace, as it was given to [`with_element`].
pub(super) fn element(config: &DomainConfig, uri: &str) -> Result<String, RpcError> {
    let missing = || {
        RpcError::new(
            Code::NoDomainMetadata,
            "Requested metadata element is not present",
        )
    };
    let (_, tree) = metadata_of(config).ok_or_else(missing)?;
    let found = find(&tree, uri).ok_or_else(missing)?;
    let mut out = String::new();
    let prefix = own_namespace(found).and_then(|(_, prefix)| prefix);
    let strip = prefix.map(|prefix| format!("{prefix}:"));
    write(
        &mut out,
        found,
        &|name| match &strip {
            Some(strip) => name.strip_prefix(strip.as_str()).unwrap_or(name).to_owned(),
            None => name.to_owned(),
        },
        |key| key != "xmlns" && prefix.is_none_or(|prefix| key != format!("xmlns:{prefix}")),
    );
    Ok(out)
}

/// Returns the `<metadata>` in which a namespace has this element, or none.
pub(super) fn with_element(
    config: &DomainConfig,
    key: Option<&str>,
    uri: &str,
    new: Option<&str>,
) -> Result<Option<String>, RpcError> {
    let (raw, tree) = metadata_of(config).unwrap_or_default();
    let mut inside = String::new();
    for child in &tree.children {
        let is_replaced = find(&tree, uri).is_some_and(|found| found == child);
        if !is_replaced {
            inside += raw.get(child.start..child.end).unwrap_or_default();
        }
    }
    if let Some(new) = new {
        let key = key.ok_or_else(|| {
            RpcError::new(
                Code::InvalidArg,
                "a metadata element needs a key for its namespace",
            )
        })?;
        let root = xml::root_name(new)?;
        let element = xml::read(new, &root)?;
        let mut out = String::new();
        write(
            &mut out,
            &element,
            &|name| {
                if name.contains(':') {
                    name.to_owned()
                } else {
                    format!("{key}:{name}")
                }
            },
            |_| true,
        );
        // The namespace is declared in the first tag, behind its name.
        let at = out.find([' ', '>', '/']).unwrap_or(out.len());
        out.insert_str(at, &format!(" xmlns:{key}=\"{}\"", escape(uri)));
        inside += &out;
    }
    if inside.is_empty() {
        return Ok(None);
    }
    Ok(Some(format!("<metadata>{inside}</metadata>")))
}

/// Writes an element with other names, and the attributes that are kept.
fn write(
    out: &mut String,
    element: &Element,
    rename: &impl Fn(&str) -> String,
    keep: impl Fn(&str) -> bool + Copy,
) {
    let name = rename(&element.name);
    out.push('<');
    out.push_str(&name);
    for (key, value) in element.attributes.iter().filter(|(key, _)| keep(key)) {
        *out += &format!(" {key}=\"{}\"", escape(value));
    }
    if element.children.is_empty() && element.text.is_empty() {
        out.push_str("/>");
        return;
    }
    out.push('>');
    if element.children.is_empty() {
        out.push_str(&escape(&element.text));
    }
    for child in &element.children {
        write(out, child, rename, keep);
    }
    *out += &format!("</{name}>");
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domain() -> DomainConfig {
        DomainConfig::parse(
            "<domain type='kvm'><name>d</name><memory>65536</memory><os><type>hvm</type>\
             <kernel>/k</kernel></os></domain>",
        )
        .unwrap()
    }

    #[test]
    fn an_element_comes_back_as_it_was_set_and_replaces_the_one_before() {
        let mut config = domain();
        for (key, uri, xml) in [
            ("a", "urn:a", "<app><x y=\"1\">one &amp; two</x></app>"),
            ("b", "urn:b", "<other/>"),
            ("a", "urn:a", "<app>new</app>"),
        ] {
            let metadata = with_element(&config, Some(key), uri, Some(xml)).unwrap();
            config.set_texts(None, None, metadata.as_deref()).unwrap();
            assert_eq!(element(&config, uri).unwrap(), xml);
        }
        assert_eq!(element(&config, "urn:b").unwrap(), "<other/>");
        let without = with_element(&config, None, "urn:a", None).unwrap();
        config.set_texts(None, None, without.as_deref()).unwrap();
        let error = element(&config, "urn:a").unwrap_err();
        assert_eq!(error.code, Code::NoDomainMetadata);
        assert_eq!(with_element(&config, None, "urn:b", None).unwrap(), None);
        assert!(with_element(&config, Some("a"), "urn:a", Some("text")).is_err());
    }
}
