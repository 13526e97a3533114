//! From a packet to the procedure that it calls.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::client::Client;
use super::frame::{Header, PROGRAM_QEMU, PROGRAM_REMOTE, PROGRAM_VERSION, Status};
use super::procedures::known;
use super::stream::StreamSender;
use super::xdr::{Decode, Decoder, Encode, Encoder};
use super::{Code, RpcError};

/// What carries out the calls of clients.
pub trait Driver: Send + Sync + Sized + 'static {
    /// Returns how to carry out a procedure of a program; `None` where the driver cannot.
    fn procedure(program: u32, number: i32) -> Option<&'static Procedure<Self>>;

    /// A client is gone.
    fn disconnected(&self, client: &Client);
}

/// Whether a call may hold up those that follow it on its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// It never waits for a hypervisor, a guest or a disk for long: done in the client's thread.
    Quick,
    /// It may: done in a thread of its own.
    Slow,
    /// As `Quick`, and allowed before the connection is open.
    Early,
}

/// How to carry out a procedure.
#[derive(Debug)]
pub struct Procedure<D: 'static> {
    /// Its number.
    pub number: i32,
    /// Where it runs.
    pub pace: Pace,
    /// Does it.
    pub run: fn(&Call<'_, D>) -> Result<Reply, RpcError>,
}

/// A call of a client.
#[derive(Debug)]
pub struct Call<'a, D> {
    /// What carries it out.
    pub driver: &'a Arc<D>,
    /// Who calls.
    pub client: &'a Arc<Client>,
    pub(super) header: &'a Header,
    pub(super) payload: &'a [u8],
}

impl<D> Call<'_, D> {
    /// Decodes the arguments.
    pub fn arguments<T: Decode>(&self) -> Result<T, RpcError> {
        Decoder::first(self.payload).map_err(|error| {
            log::debug!("client {}: {error}", self.client.id());
            RpcError::protocol(Code::Rpc, "Unable to decode message payload")
        })
    }

    /// Returns the server's half of the stream that the call may open.
    pub fn stream(&self) -> StreamSender {
        StreamSender::new(self.client.clone(), self.header)
    }
}

/// What a call is answered with.
pub struct Reply {
    payload: Vec<u8>,
    after: Option<Box<dyn FnOnce() + Send>>,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl Reply {
    /// Makes a reply that carries `item`.
    pub fn of(item: &impl Encode) -> Self {
        Self {
            payload: Encoder::of(item),
            after: None,
        }
    }

    /// Does something once the reply is on its way: a stream's data comes after it.
    pub fn then(mut self, after: impl FnOnce() + Send + 'static) -> Self {
        self.after = Some(Box::new(after));
        self
    }
}

/// Makes a [`Procedure`] of a function of a call and its decoded arguments.
macro_rules! procedure {
    ($number:expr, $pace:ident, $function:path) => {
        $crate::rpc::Procedure {
            number: $number,
            pace: $crate::rpc::Pace::$pace,
            run: |call| {
                let arguments = call.arguments()?;
                $function(call, arguments).map(|result| $crate::rpc::Reply::of(&result))
            },
        }
    };
}

pub(crate) use procedure;

/// Finds the procedure that `header` calls, as far as `client` may call it.
pub(super) fn find<D: Driver>(
    client: &Client,
    header: &Header,
) -> Result<&'static Procedure<D>, RpcError> {
    let (program, version, number) = (header.program, header.version, header.procedure);
    if ![PROGRAM_REMOTE, PROGRAM_QEMU].contains(&program) || version != PROGRAM_VERSION {
        let message = format!("Cannot find program {program} version {version}");
        return Err(RpcError::protocol(Code::Rpc, message));
    }
    if header.status != Status::Ok as i32 {
        let message = format!("Unexpected message status {}", header.status);
        return Err(RpcError::protocol(Code::Rpc, message));
    }
    let known = known(number).filter(|_| program == PROGRAM_REMOTE);
    let found = D::procedure(program, number);
    if found.is_none() && known.is_none() {
        let message = format!("unknown procedure: {number}");
        return Err(RpcError::protocol(Code::Rpc, message));
    }
    if !client.is_open() && found.is_none_or(|found| found.pace != Pace::Early) {
        return Err(RpcError::new(
            Code::InternalError,
            "hypervisor connection not open",
        ));
    }
    // What is not of the remote program is a hatch, which can change anything.
    if client.is_read_only() && known.is_none_or(|known| known.writes) {
        let function =
            known.map_or_else(|| "virDomainQemuMonitorCommand".into(), |it| it.function());
        return Err(RpcError::new(
            Code::OperationDenied,
            format!("read only access prevents {function}"),
        ));
    }
    found.ok_or_else(|| {
        let function = known.map_or_else(String::new, super::procedures::Known::function);
        RpcError::new(Code::NoSupport, function)
    })
}

/// Runs a procedure and queues its reply.
pub(super) fn run<D: Driver>(procedure: &Procedure<D>, call: &Call<'_, D>) {
    let done = catch_unwind(AssertUnwindSafe(|| (procedure.run)(call))).unwrap_or_else(|_| {
        log::error!("procedure {} panicked", procedure.number);
        Err(RpcError::new(
            Code::InternalError,
            format!("procedure {} failed by a bug", procedure.number),
        ))
    });
    match done {
        Ok(reply) => {
            call.client.answer(call.header, Ok(reply.payload));
            if let Some(after) = reply.after {
                after();
            }
        }
        Err(error) => call.client.answer(call.header, Err(error)),
    }
}
