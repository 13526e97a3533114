//! livepoint saves a KVM virtual machine while it keeps running.
//!
//! Read the modules in the order of the data path: `domain` turns libvirt
//! domain XML into a machine configuration, `machine` runs it on KVM,
//! `checkpoint` captures it live through the [`guest::Guest`] seam,
//! `store` keeps the image, `restore` brings it back. `host` is the
//! facade that every edge (CLI, C ABI) uses. `docs/architecture.md` is the map.

pub mod capi;
pub mod checkpoint;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "cli")]
pub mod daemon;
pub mod domain;
pub mod foreign;
pub mod guest;
#[cfg(feature = "cli")]
pub mod guests;
pub mod host;
pub mod kvmstate;
pub mod machine;
pub mod page;
pub mod qcow2;
pub mod restore;
#[cfg(feature = "cli")]
pub mod rpc;
pub mod state;
pub mod store;
mod sync;
pub mod sys;
