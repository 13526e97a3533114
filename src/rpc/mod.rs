//! libvirt's remote protocol, the server's side: what travels between livepointd and stock
//! clients, and no meaning of it.
//!
//! `xdr` is the encoding, `frame` the packets, `dispatch` finds the [`Procedure`] of a [`Driver`]
//! that a packet calls. A client has one thread (`connection`), which does quick calls itself and
//! gives slow ones a thread each, so that a job is asked after, or cancelled, on the connection
//! that waits for it. Nobody waits for a client: what it does not take is queued (`client`), and
//! one that lets too much pile up is cut off.

#![warn(clippy::indexing_slicing)]

mod caller;
mod client;
mod connection;
mod dispatch;
mod error;
mod events;
mod frame;
mod procedures;
mod server;
mod stream;
mod types;
mod xdr;

pub use caller::{CallError, Caller};
pub use client::{Client, Peer};
pub(crate) use dispatch::procedure;
pub use dispatch::{Call, Driver, Pace, Procedure, Reply};
pub use error::{Code, Origin, RpcError};
pub use events::Event;
pub use frame::{FrameError, FrameReader, Header, Kind, PROGRAM_QEMU, PROGRAM_REMOTE, Status};
pub use procedures::{KNOWN, Known, known};
pub use server::{Clients, serve};
pub use stream::{StreamEnd, StreamSender};
pub use types::{DomainRef, SnapshotRef, TypedParam, TypedValue};
pub use xdr::{Bytes, CharList, Decode, Decoder, Encode, Encoder, FixedChars, List, XdrError};
