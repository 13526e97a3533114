//! Network interfaces: what passed them.

use super::block::{signed, status_of};
use super::{Answer, DriverCall, Livepoint};
use crate::host::control::protocol::InterfaceUse;
use crate::rpc::{Code, DomainRef, Procedure, RpcError, TypedParam, TypedValue, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[procedure!(65, Slow, stats)];

/// Bytes, packets, errors and drops, first of what the guest received.
type Stats = (i64, i64, i64, i64, i64, i64, i64, i64);

/// Finds an interface by the host's name for it, or by its address.
fn stats(call: &DriverCall<'_>, (wanted, device): (DomainRef, String)) -> Answer<Stats> {
    let domain = call.driver.registry.find(&wanted)?;
    let name = {
        let state = domain.lock();
        state.active()?;
        state.name.clone()
    };
    let interfaces = status_of(call.driver, &name)?.interfaces;
    let found = interfaces.into_iter().find(|interface| {
        interface.tap.as_ref() == Some(&device) || interface.mac.eq_ignore_ascii_case(&device)
    });
    let found = found.ok_or_else(|| {
        RpcError::new(
            Code::InvalidArg,
            format!("invalid path, '{device}' is not a known interface"),
        )
    })?;
    Ok((
        signed(found.received_bytes),
        signed(found.received),
        0,
        signed(found.received_dropped),
        signed(found.sent_bytes),
        signed(found.sent),
        signed(found.sent_errors),
        signed(found.sent_dropped),
    ))
}

/// Adds what is known of a running domain's interfaces.
pub(super) fn add_stats(interfaces: &[InterfaceUse], params: &mut Vec<TypedParam>) {
    let count = u32::try_from(interfaces.len()).unwrap_or(u32::MAX);
    params.push(TypedParam::new("net.count", TypedValue::UInt(count)));
    for (at, interface) in interfaces.iter().enumerate() {
        let name = interface.tap.clone().unwrap_or_default();
        let field = format!("net.{at}.name");
        params.push(TypedParam::new(field, TypedValue::Text(name)));
        for (what, count) in [
            ("rx.bytes", interface.received_bytes),
            ("rx.pkts", interface.received),
            ("rx.errs", 0),
            ("rx.drop", interface.received_dropped),
            ("tx.bytes", interface.sent_bytes),
            ("tx.pkts", interface.sent),
            ("tx.errs", interface.sent_errors),
            ("tx.drop", interface.sent_dropped),
        ] {
            params.push(TypedParam::ulong(format!("net.{at}.{what}"), count));
        }
    }
}
