//! Domain XML, and what this host can run.

use std::ffi::c_char;

use super::image::give_text;
use super::out::{SizedOut, fill};
use super::status::{guard, lvp_status};
use super::str_argument;
use crate::host::{DomainConfig, HostError, XmlView, check_host};

symbol_versions!("0.1":
    lvp_domain_check,
    lvp_host_check,
);

/// Room for the name of an element, with the zero byte that ends it.
pub const LVP_XML_ELEMENT_SIZE: usize = 64;

/// A place in a document. Set struct_size before the call.
///
/// Since: 0.1
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct lvp_xml_place {
    /// sizeof(lvp_xml_place), as the caller was compiled.
    pub struct_size: usize,
    /// Line, from 1.
    pub line: u32,
    /// Column in characters, from 1.
    pub column: u32,
    /// The element there, ended by a zero byte; empty where none is open. Cut where it is longer.
    pub element: [c_char; LVP_XML_ELEMENT_SIZE],
}

impl SizedOut for lvp_xml_place {
    const SIZE_FIRST: usize = 80;
    fn set_size(&mut self, size: usize) {
        self.struct_size = size;
    }
}

/// Checks domain XML without a machine, and returns it in its canonical form: what
/// lvp_machine_new() would make of it, with every default.
///
/// @param xml            zero-terminated UTF-8, borrowed for the call
/// @param canonical_out  receives the canonical form; release it with lvp_string_free(). May be
///                       NULL.
/// @param place_out      receives the place of the error where the XML is refused, and only then:
///                       set place_out->struct_size first. May be NULL.
///
/// Returns LVP_OK; LVP_E_INVALID (NULL, or the XML is malformed), LVP_E_UNSUPPORTED (it asks for
/// what no machine of this library has); the message names line and element. Opens no file. Does
/// not block. Thread-safe.
///
/// Since: 0.1
///
/// # Safety
/// As the text says of each argument.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn lvp_domain_check(
    xml: *const c_char,
    canonical_out: *mut *mut c_char,
    place_out: *mut lvp_xml_place,
) -> lvp_status {
    guard(|| {
        // SAFETY: the caller's contract.
        let xml = unsafe { str_argument(xml, "xml") }?;
        let config = match DomainConfig::parse(xml) {
            Ok(config) => config,
            Err(error) => {
                let place = error.place();
                let mut element = [0; LVP_XML_ELEMENT_SIZE];
                let room = element.iter_mut().take(LVP_XML_ELEMENT_SIZE - 1);
                for (to, &from) in room.zip(place.element.as_bytes()) {
                    *to = c_char::from_ne_bytes([from]);
                }
                if !place_out.is_null() {
                    let value = lvp_xml_place {
                        struct_size: 0,
                        line: place.line,
                        column: place.column,
                        element,
                    };
                    // SAFETY: the caller's contract.
                    unsafe { fill(place_out, value, "place_out") }?;
                }
                let source = Box::new(error);
                return Err(HostError::Domain { path: None, source }.into());
            }
        };
        if canonical_out.is_null() {
            return Ok(());
        }
        let canonical = config.to_xml(XmlView::Inactive);
        // SAFETY: the caller's contract.
        unsafe { give_text(canonical_out, canonical, "canonical_out") }
    })
}

/// Asks whether this host can run machines: /dev/kvm with all that they need.
///
/// Returns LVP_OK; LVP_E_HOST (the message says what is missing, and what may help). Makes and
/// drops an empty VM. Thread-safe.
///
/// Since: 0.1
#[unsafe(no_mangle)]
pub extern "C" fn lvp_host_check() -> lvp_status {
    guard(|| Ok(check_host()?))
}
