//! Streams: data in both directions that belongs to a call, such as a console.

use std::fmt;
use std::sync::Arc;

use super::RpcError;
use super::client::{Client, OUTBOX_BYTES_HIGH};
use super::frame::{Header, Kind, STREAM_BYTES_MAX, Status, packet};
use super::xdr::Encoder;

/// What takes a stream's data on the server. Called from the client's own thread: nothing here
/// may wait.
pub trait StreamEnd: fmt::Debug + Send + Sync {
    /// Data from the client; `false` where it cannot be taken, which ends the stream.
    fn receive(&self, data: &[u8]) -> bool;
    /// The client has sent everything, and wants no more.
    fn finish(&self);
    /// The client gave the stream up, or is gone.
    fn abort(&self);
}

/// The server's half of a stream: sends to the client. Dropping it says nothing to the client.
#[derive(Clone, Debug)]
pub struct StreamSender {
    client: Arc<Client>,
    header: Header,
}

impl StreamSender {
    pub(super) fn new(client: Arc<Client>, call: &Header) -> Self {
        Self {
            client,
            header: call.clone(),
        }
    }

    /// Opens the stream: what the client sends goes to `end` from now on.
    pub fn open(&self, end: Arc<dyn StreamEnd>) -> Result<(), RpcError> {
        self.client.add_stream(self.header.serial, end)
    }

    /// Returns whether the client has taken enough of what it was sent to be sent more.
    pub fn has_room(&self) -> bool {
        self.client.outbox_bytes() < OUTBOX_BYTES_HIGH
    }

    /// Sends data, in as many packets as it takes.
    pub fn data(&self, data: &[u8]) {
        for piece in data.chunks(STREAM_BYTES_MAX) {
            self.piece(Status::Continue, piece);
        }
    }

    /// Ends the stream. The client is told that all is well.
    pub fn finish(&self) {
        self.client.remove_stream(self.header.serial);
        self.piece(Status::Ok, &[]);
    }

    /// Ends the stream. The client is told why.
    pub fn fail(&self, error: &RpcError) {
        self.client.remove_stream(self.header.serial);
        self.piece(Status::Error, &Encoder::of(error));
    }

    fn piece(&self, status: Status, payload: &[u8]) {
        let header = self.header.answer(Kind::Stream, status);
        self.client.send(packet(&header, payload));
    }
}
