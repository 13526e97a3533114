//! Networks, storage and the rest of libvirt that is not here: there are none of them, which
//! clients take better than an error.

use uuid::Uuid;

use super::{Answer, DriverCall, Livepoint};
use crate::rpc::{Code, List, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(36, Quick, no_names),
    procedure!(38, Quick, no_names),
    procedure!(50, Quick, none),
    procedure!(52, Quick, none),
    procedure!(71, Quick, none),
    procedure!(72, Quick, no_names),
    procedure!(73, Quick, none),
    procedure!(74, Quick, no_names),
    procedure!(111, Quick, no_devices),
    procedure!(126, Quick, none),
    procedure!(139, Quick, none),
    procedure!(178, Quick, none),
    procedure!(179, Quick, no_names),
    procedure!(281, Quick, empty_list),
    procedure!(283, Quick, empty_list),
    procedure!(284, Quick, empty_list),
    procedure!(285, Quick, empty_list),
    procedure!(286, Quick, empty_list),
    procedure!(287, Quick, empty_list),
    // What they would tell of does not happen here, and who asks is not held up by it.
    procedure!(313, Quick, register_events),
    procedure!(368, Quick, register_events),
    procedure!(374, Quick, register_events),
];

fn none(_: &DriverCall<'_>, (): ()) -> Answer<i32> {
    Ok(0)
}

fn no_names(_: &DriverCall<'_>, (_most,): (i32,)) -> Answer<List<String, 16_384>> {
    Ok(List(Vec::new()))
}

fn no_devices(_: &DriverCall<'_>, (_kind, _flags): (Option<String>, u32)) -> Answer<i32> {
    Ok(0)
}

fn empty_list(_: &DriverCall<'_>, (_need, _flags): (i32, u32)) -> Answer<(List<Uuid, 1>, u32)> {
    Ok((List(Vec::new()), 0))
}

fn register_events(_: &DriverCall<'_>, (_event,): (i32,)) -> Answer<i32> {
    Err(RpcError::new(
        Code::NoSupport,
        "there are no networks, storage pools and node devices",
    ))
}
