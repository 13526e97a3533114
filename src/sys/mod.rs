//! System calls and ioctls that have no safe crate: the leaf of the tree.
//!
//! Everything here is safe to call; each file opts in to `unsafe` with its reason.

pub mod anon;
pub mod event;
pub mod frozen;
pub mod kvm;
pub mod kvm_run;
pub mod lock;
pub mod mapping;
pub mod missing;
pub mod pagemap;
pub mod passed_fds;
pub mod priority;
pub mod reflink;
pub mod sigmask;
pub mod signal;
pub mod tap;
pub mod termination;
pub mod tsc;
pub mod userfault;
pub mod volatile_io;
pub mod whole_file;
pub mod writeback;
