//! VMs of other VMMs: when a VMM gets back what it has lent.

#[path = "../../../src/foreign/uses.rs"]
pub(crate) mod uses;

pub(crate) mod lending;
