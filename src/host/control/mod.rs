//! The control protocol: how other processes reach a running domain.

mod client;
pub mod protocol;
mod server;

pub use client::ControlClient;
pub use server::{ControlServer, ControlSocket};
