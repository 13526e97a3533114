//! What a program's handles share with threads of the library's.

#[path = "../../../src/host/watch.rs"]
pub(crate) mod watch;

pub(crate) mod watching;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorCode {
    Cancelled,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FinalState;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MachineState {
    Created,
    Running,
}
