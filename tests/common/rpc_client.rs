//! A client of libvirt's protocol that also sends what no client of libvirt would.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use livepoint::rpc::{
    Decode, Decoder, DomainRef, Encode, Encoder, FrameReader, Header, Kind, List, PROGRAM_REMOTE,
};

/// Longest that an answer may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

pub struct RpcClient {
    socket: UnixStream,
    reader: FrameReader,
    serial: u32,
}

/// Returns the bytes of a packet.
pub fn packet(header: &Header, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(28 + payload.len()).unwrap();
    [
        length.to_be_bytes().to_vec(),
        Encoder::of(header),
        payload.to_vec(),
    ]
    .concat()
}

/// Returns the header of a call.
pub fn call_header(procedure: i32, serial: u32) -> Header {
    Header {
        program: PROGRAM_REMOTE,
        version: 1,
        procedure,
        kind: Kind::Call as i32,
        serial,
        status: 0,
    }
}

impl RpcClient {
    /// Connects, without a word.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(socket)?;
        socket.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        socket.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(Self {
            socket,
            reader: FrameReader::default(),
            serial: 0,
        })
    }

    /// Connects and opens the hypervisor.
    pub fn open(socket: &Path) -> Self {
        let mut client = Self::connect(socket).unwrap();
        let (uri, flags) = (Some("livepoint:///system"), 0_u32);
        client.call(1, &(uri, flags)).unwrap().unwrap();
        client
    }

    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Makes a call; returns the answer's payload, or the error's code. The outer error: the
    /// connection is gone.
    pub fn call(
        &mut self,
        procedure: i32,
        arguments: &impl Encode,
    ) -> io::Result<Result<Vec<u8>, i32>> {
        self.serial += 1;
        let header = call_header(procedure, self.serial);
        let bytes = packet(&header, &Encoder::of(arguments));
        self.socket.write_all(&bytes)?;
        loop {
            let (answer, payload) = self.receive()?;
            if answer.kind == Kind::Reply as i32 && answer.serial == self.serial {
                return Ok(match answer.status {
                    0 => Ok(payload),
                    _ => Err(Decoder::first::<i32>(&payload).unwrap()),
                });
            }
        }
    }

    /// Waits for a packet of the server.
    pub fn receive(&mut self) -> io::Result<(Header, Vec<u8>)> {
        let mut bytes = [0; 64 << 10];
        loop {
            if let Some(packet) = self.reader.next(64 << 20).unwrap() {
                return Ok(packet);
            }
            match self.socket.read(&mut bytes)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => self.reader.push(&bytes[..count]),
            }
        }
    }

    /// Lists all domains.
    pub fn domains(&mut self) -> Vec<DomainRef> {
        let payload = self.call(273, &(1_i32, 0_u32)).unwrap().unwrap();
        let (list, _): (List<DomainRef, 16_384>, u32) = decode(&payload);
        list.0
    }
}

pub fn decode<T: Decode>(payload: &[u8]) -> T {
    Decoder::first(payload).unwrap()
}
