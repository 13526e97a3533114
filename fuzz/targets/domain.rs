//! Domain XML, as anybody may pass it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use livepoint::domain::{DomainConfig, XmlView};

// What is accepted has a canonical form, which is accepted, and is its own canonical form.
fuzz_target!(|xml: &[u8]| {
    let Ok(domain) = DomainConfig::parse_bytes(xml) else {
        return;
    };
    let canonical = domain.to_xml(XmlView::Inactive);
    let again = DomainConfig::parse(&canonical).expect("a canonical form is accepted");
    assert_eq!(again.to_xml(XmlView::Inactive), canonical);
});
