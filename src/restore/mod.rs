//! Bringing a saved guest back: first what this host lacks, then its memory.
//!
//! This fills the regions of a machine that somebody else has built; vCPU and device state go
//! from [`crate::store::ImageReader::sections`] to whoever can set them.

pub mod compat;
pub mod core;
pub mod disks;
pub mod eager;
pub mod lazy;
pub mod patch;
