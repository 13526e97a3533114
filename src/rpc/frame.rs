//! Packets: a length, a header of 24 bytes, and a payload.

use super::error::RpcError;
use super::xdr::{Decode, Encode, Encoder, xdr_structs};

/// The program of the hypervisor's procedures (`REMOTE_PROGRAM`).
pub const PROGRAM_REMOTE: u32 = 0x2000_8086;
/// The program of what belongs to QEMU in libvirt; the hatch for our own commands.
pub const PROGRAM_QEMU: u32 = 0x2000_8087;
/// The program of keepalive messages.
pub const PROGRAM_KEEPALIVE: u32 = 0x6b65_6570;
/// The version of all of them.
pub const PROGRAM_VERSION: u32 = 1;

/// Bytes of the length and the header.
pub const HEADER_BYTES: usize = 28;
/// Longest packet, its length included (`VIR_NET_MESSAGE_MAX` and the length).
pub const PACKET_BYTES_MAX: usize = (32 << 20) + 4;
/// Longest packet of a client that has not opened a connection yet: nothing that it may say then
/// is as long.
pub const EARLY_PACKET_BYTES_MAX: usize = 256 << 10;
/// Most payload of a stream packet that clients expect.
pub const STREAM_BYTES_MAX: usize = 262_120;

/// What a packet is (`virNetMessageType`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Kind {
    /// A call.
    Call = 0,
    /// Its answer.
    Reply = 1,
    /// An event, or a keepalive message.
    Message = 2,
    /// Data of a stream.
    Stream = 3,
}

/// How a reply or a piece of a stream came about (`virNetMessageStatus`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Status {
    /// Done; for streams: the end.
    Ok = 0,
    /// Failed, with an error as payload.
    Error = 1,
    /// More of a stream follows.
    Continue = 2,
}

xdr_structs! {
    /// The header of a packet.
    Header {
        /// Which set of procedures.
        program: u32,
        /// Its version.
        version: u32,
        /// Which procedure.
        procedure: i32,
        /// A [`Kind`], if it is one.
        kind: i32,
        /// Chosen by the client; comes back with the answer.
        serial: u32,
        /// A [`Status`], if it is one.
        status: i32,
    }
}

impl Header {
    /// Returns the header of the answer to a call, or of its stream.
    pub fn answer(&self, kind: Kind, status: Status) -> Self {
        Self {
            kind: kind as i32,
            status: status as i32,
            ..self.clone()
        }
    }

    /// Returns the header of a message of the server's own.
    pub fn message(program: u32, procedure: i32, serial: u32) -> Self {
        Self {
            program,
            version: PROGRAM_VERSION,
            procedure,
            kind: Kind::Message as i32,
            serial,
            status: Status::Ok as i32,
        }
    }
}

/// Returns the bytes of a packet. A payload that no packet can hold becomes an error.
pub fn packet(header: &Header, payload: &[u8]) -> Vec<u8> {
    let length = HEADER_BYTES + payload.len();
    if length > PACKET_BYTES_MAX {
        let error = RpcError::protocol(
            super::Code::Rpc,
            "the answer is longer than a packet can be",
        );
        let failed = header.answer(Kind::Reply, Status::Error);
        return packet(&failed, &Encoder::of(&error));
    }
    let mut out = Encoder::default();
    u32::try_from(length)
        .expect("below the limit")
        .encode(&mut out);
    header.encode(&mut out);
    out.put(payload);
    out.into_bytes()
}

/// A stream of bytes that is no stream of packets: the connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a packet of {length} bytes: from {HEADER_BYTES} to {limit} are allowed")]
pub struct FrameError {
    length: usize,
    limit: usize,
}

/// Puts packets together from the pieces that arrive.
#[derive(Debug, Default)]
pub struct FrameReader {
    buffer: Vec<u8>,
    /// Bytes at the start of the buffer that have been handed out.
    taken: usize,
}

impl FrameReader {
    /// Adds bytes that have arrived.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.buffer.drain(..self.taken);
            self.taken = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Returns the next whole packet of at most `limit` bytes, if there is one.
    pub fn next(&mut self, limit: usize) -> Result<Option<(Header, Vec<u8>)>, FrameError> {
        let rest = self.buffer.get(self.taken..).unwrap_or_default();
        let Some(length) = rest.first_chunk::<4>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*length) as usize;
        if !(HEADER_BYTES..=limit).contains(&length) {
            return Err(FrameError { length, limit });
        }
        let Some(packet) = rest.get(4..length) else {
            return Ok(None);
        };
        let mut packet = super::xdr::Decoder::new(packet);
        let header = Header::decode(&mut packet).expect("as many bytes as a header has");
        let payload = packet.rest().to_vec();
        self.taken += length;
        if self.taken == self.buffer.len() {
            // A buffer that one long packet needed is not kept for short ones.
            self.buffer = Vec::new();
            self.taken = 0;
        }
        Ok(Some((header, payload)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_are_found_however_their_bytes_arrive() {
        let header = Header::message(PROGRAM_REMOTE, 7, 9);
        let wire = [packet(&header, b"abcd"), packet(&header, b"")].concat();
        for step in 1..wire.len() {
            let mut reader = FrameReader::default();
            let mut found = Vec::new();
            for piece in wire.chunks(step) {
                reader.push(piece);
                while let Some((header, payload)) = reader.next(PACKET_BYTES_MAX).unwrap() {
                    assert_eq!((header.procedure, header.serial), (7, 9));
                    found.push(payload);
                }
            }
            assert_eq!(found, [b"abcd".to_vec(), Vec::new()]);
        }
    }

    #[test]
    fn a_length_that_no_packet_has_is_an_error() {
        for length in [0_u32, 27, 0x0200_0005, u32::MAX] {
            let mut reader = FrameReader::default();
            reader.push(&length.to_be_bytes());
            assert!(reader.next(PACKET_BYTES_MAX).is_err(), "{length}");
        }
    }
}
