//! Network interfaces: what passed them, and the addresses that the host has heard of.

use std::fs;

use super::block::{signed, status_of};
use super::{Answer, DriverCall, Livepoint, check_flags};
use crate::daemon::error::DaemonError;
use crate::host::control::protocol::InterfaceUse;
use crate::rpc::{Code, DomainRef, List, Procedure, RpcError, TypedParam, TypedValue, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(65, Slow, stats),
    procedure!(353, Slow, addresses),
];

/// Where addresses are found out (`virDomainInterfaceAddressesSource`).
const FROM_LEASES: u32 = 0;
const FROM_AGENT: u32 = 1;
const FROM_ARP: u32 = 2;

/// The host's table of hardware addresses (proc(5)).
const ARP_TABLE: &str = "/proc/net/arp";

/// Bytes, packets, errors and drops, first of what the guest received.
type Stats = (i64, i64, i64, i64, i64, i64, i64, i64);

/// Returns the interfaces of a running domain.
fn interfaces_of(call: &DriverCall<'_>, wanted: &DomainRef) -> Answer<Vec<InterfaceUse>> {
    let domain = call.driver.registry.find(wanted)?;
    let name = {
        let state = domain.lock();
        state.active()?;
        state.name.clone()
    };
    Ok(status_of(call.driver, &name)?.interfaces)
}

/// An address: its family (`virIPAddrType`), itself, and how many bits of it are the network's.
type Address = (i32, String, u32);
/// An interface: its name, its hardware address, and its addresses.
type Addresses = (String, Option<String>, List<Address, 2048>);

fn addresses(
    call: &DriverCall<'_>,
    (wanted, source, flags): (DomainRef, u32, u32),
) -> Answer<(List<Addresses, 2048>,)> {
    check_flags(flags, 0, "virDomainInterfaceAddresses")?;
    let interfaces = interfaces_of(call, &wanted)?;
    match source {
        // Of networks of libvirt's own, of which there are none.
        FROM_LEASES => return Ok((List(Vec::new()),)),
        FROM_ARP => {}
        FROM_AGENT => {
            return Err(RpcError::new(
                Code::ArgumentUnsupported,
                "QEMU guest agent is not configured",
            ));
        }
        _ => {
            return Err(RpcError::new(
                Code::ArgumentUnsupported,
                format!("Unknown IP address data source {source}"),
            ));
        }
    }
    let table = fs::read_to_string(ARP_TABLE)
        .map_err(|error| DaemonError::path("read", ARP_TABLE.as_ref(), error))?;
    let found = interfaces.into_iter().filter_map(|interface| {
        let addresses = heard_of(&table, &interface.mac);
        let name = interface.tap.unwrap_or_default();
        (!addresses.is_empty()).then_some((name, Some(interface.mac), List(addresses)))
    });
    Ok((List(found.collect()),))
}

/// Returns the IPv4 addresses that the host's table has for a hardware address.
fn heard_of(table: &str, mac: &str) -> Vec<Address> {
    const IPV4: i32 = 0;
    const COMPLETE: u32 = 2;
    let lines = table.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (address, _kind) = (fields.next()?, fields.next()?);
        let flags = u32::from_str_radix(fields.next()?.strip_prefix("0x")?, 16).ok()?;
        let is_it = flags & COMPLETE != 0 && fields.next()?.eq_ignore_ascii_case(mac);
        // What part of it is the network's, nobody has told.
        is_it.then(|| (IPV4, address.to_owned(), 0))
    });
    lines.collect()
}

/// Finds an interface by the host's name for it, or by its address.
fn stats(call: &DriverCall<'_>, (wanted, device): (DomainRef, String)) -> Answer<Stats> {
    let interfaces = interfaces_of(call, &wanted)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_that_the_host_is_sure_of() {
        let table = "IP address       HW type     Flags       HW address            Mask     Device\n\
            10.0.0.7         0x1         0x2         52:54:00:AB:cd:ef     *        br0\n\
            10.0.0.8         0x1         0x0         52:54:00:ab:cd:ef     *        br0\n\
            10.0.0.9         0x1         0x6         52:54:00:ab:cd:ef     *        br1\n\
            10.0.0.10        0x1         0x2         52:54:00:00:00:01     *        br0\n\
            nonsense\n";
        let found = heard_of(table, "52:54:00:ab:cd:ef");
        let found: Vec<_> = found
            .iter()
            .map(|(_, address, _)| address.as_str())
            .collect();
        assert_eq!(found, ["10.0.0.7", "10.0.0.9"]);
        assert!(heard_of("", "52:54:00:ab:cd:ef").is_empty());
    }
}
