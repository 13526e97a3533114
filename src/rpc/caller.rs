//! A client of the protocol, for the daemon's own commands: one call at a time, and no events.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::frame::{
    FrameError, FrameReader, Header, Kind, PACKET_BYTES_MAX, PROGRAM_REMOTE, PROGRAM_VERSION,
    Status, packet,
};
use super::xdr::{Decode, Decoder, Encode, Encoder, XdrError};

/// Why a call was not answered, or not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The connection failed.
    #[error("the connection to the daemon failed")]
    Io(#[from] io::Error),
    /// The server refused it.
    #[error("{message}")]
    Refused {
        /// Its number of the error.
        code: i32,
        /// Its words.
        message: String,
    },
    /// The answer makes no sense.
    #[error("the daemon's answer cannot be read")]
    Frame(#[from] FrameError),
    /// Nor does this.
    #[error("the daemon's answer cannot be read")]
    Xdr(#[from] XdrError),
}

/// A connection. Calls block until they are answered, however long that takes.
#[derive(Debug)]
pub struct Caller {
    socket: UnixStream,
    reader: FrameReader,
    serial: u32,
}

impl Caller {
    /// Connects to the daemon at `socket`, and opens the hypervisor `uri`.
    pub fn open(socket: &Path, uri: &str) -> Result<Self, CallError> {
        /// Number of CONNECT_OPEN.
        const OPEN: i32 = 1;
        let mut caller = Self {
            socket: UnixStream::connect(socket)?,
            reader: FrameReader::default(),
            serial: 0,
        };
        let flags = 0_u32;
        caller.call::<()>(OPEN, &(Some(uri), flags))?;
        Ok(caller)
    }

    /// Makes a call, and returns what it is answered with.
    pub fn call<T: Decode>(
        &mut self,
        procedure: i32,
        arguments: &impl Encode,
    ) -> Result<T, CallError> {
        self.serial += 1;
        let header = Header {
            program: PROGRAM_REMOTE,
            version: PROGRAM_VERSION,
            procedure,
            kind: Kind::Call as i32,
            serial: self.serial,
            status: Status::Ok as i32,
        };
        let call = packet(&header, &Encoder::of(arguments));
        self.socket.write_all(&call)?;
        let mut bytes = [0; 16 << 10];
        loop {
            while let Some((answer, payload)) = self.reader.next(PACKET_BYTES_MAX)? {
                if answer.kind != Kind::Reply as i32 || answer.serial != self.serial {
                    continue;
                }
                if answer.status == Status::Ok as i32 {
                    return Ok(Decoder::first(&payload)?);
                }
                let (code, _, message): (i32, i32, Option<String>) = Decoder::first(&payload)?;
                let message = message.unwrap_or_else(|| format!("error {code}"));
                return Err(CallError::Refused { code, message });
            }
            let count = self.socket.read(&mut bytes)?;
            if count == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            self.reader.push(bytes.get(..count).unwrap_or_default());
        }
    }
}
