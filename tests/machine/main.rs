//! Machines on real KVM.

#![expect(clippy::unwrap_used, reason = "a test's helpers fail as tests do")]

mod boot;
#[path = "../common/mod.rs"]
mod common;
mod dirty_log;
mod firmware;
mod guest_code;
mod lifecycle;
mod pause;
mod save_restore;
mod serial;
