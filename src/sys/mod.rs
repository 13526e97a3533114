//! System calls and ioctls that have no safe crate: the leaf of the tree.
//!
//! Everything here is safe to call; each file opts in to `unsafe` with its reason.

pub mod mapping;
