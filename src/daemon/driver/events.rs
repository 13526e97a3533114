//! Asking for events.

use super::{Answer, DriverCall, Livepoint};
use crate::rpc::{Code, DomainRef, Event, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(316, Quick, register),
    procedure!(317, Quick, deregister),
];

fn register(call: &DriverCall<'_>, (event, domain): (i32, Option<DomainRef>)) -> Answer<i32> {
    if !Event::is_known(event) {
        return Err(RpcError::new(
            Code::InternalError,
            format!("unsupported event ID {event}"),
        ));
    }
    if let Some(domain) = &domain {
        call.driver.registry.find(domain)?;
    }
    call.client
        .subscribe(event, domain.map(|domain| domain.uuid))
}

fn deregister(call: &DriverCall<'_>, (id,): (i32,)) -> Answer<()> {
    call.client.unsubscribe(id)
}
