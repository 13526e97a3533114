//! PCI: one bus, reached by configuration mechanism 1.

pub mod layout;
