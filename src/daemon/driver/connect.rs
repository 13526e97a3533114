//! Opening a connection, and what clients ask of the driver as a whole.

use super::{Answer, DriverCall, Livepoint};
use crate::rpc::{Code, List, Procedure, RpcError, procedure};

pub(super) const TABLE: &[Procedure<Livepoint>] = &[
    procedure!(1, Early, open),
    procedure!(2, Early, close),
    procedure!(3, Quick, kind),
    procedure!(4, Quick, version),
    procedure!(60, Early, supports_feature),
    procedure!(66, Early, auth_list),
    procedure!(70, Early, auth_polkit),
    procedure!(110, Quick, uri),
    procedure!(149, Quick, is_secure),
    procedure!(157, Quick, library_version),
    procedure!(360, Quick, close_callback),
    procedure!(361, Quick, close_callback),
];

/// The scheme of our URIs.
const SCHEME: &str = "livepoint:";
/// Flag of an open: nothing may be changed. The others are the client's own.
const OPEN_READ_ONLY: u32 = 1;
/// The libvirt whose protocol this is; some clients look at it.
const LIBRARY_VERSION: u64 = 9_000_000;
/// Features (`virDrvFeature`) that are there: typed parameters with strings, keepalive, events
/// with callback ids, the close callback. Not file descriptors (8).
const FEATURE_KEEPALIVE: i32 = 10;
const FEATURES: [i32; 4] = [9, FEATURE_KEEPALIVE, 14, 15];

fn auth_list(_: &DriverCall<'_>, (): ()) -> Answer<List<i32, 20>> {
    const NONE: i32 = 0;
    Ok(List(vec![NONE]))
}

fn auth_polkit(_: &DriverCall<'_>, (): ()) -> Answer<i32> {
    // The socket's mode has let the client in already.
    Ok(1)
}

fn open(call: &DriverCall<'_>, (name, flags): (Option<String>, u32)) -> Answer<()> {
    let name = name.unwrap_or_default();
    let is_ours = name.is_empty()
        || name.strip_prefix(SCHEME).is_some_and(|rest| {
            let path = rest.split('?').next().unwrap_or_default();
            let path = path.strip_prefix("//").unwrap_or(path);
            ["", "/", "/system", "/session"].contains(&path)
        });
    if !is_ours {
        return Err(RpcError::new(Code::NoConnect, name));
    }
    call.client.open(flags & OPEN_READ_ONLY != 0)
}

fn close(call: &DriverCall<'_>, (): ()) -> Answer<()> {
    call.client.close_after_sending();
    Ok(())
}

fn supports_feature(call: &DriverCall<'_>, (feature,): (i32,)) -> Answer<i32> {
    if feature == FEATURE_KEEPALIVE {
        call.client.enable_keepalive();
    }
    Ok(i32::from(FEATURES.contains(&feature)))
}

fn uri(call: &DriverCall<'_>, (): ()) -> Answer<String> {
    Ok(if call.driver.is_session {
        "livepoint:///session".to_owned()
    } else {
        "livepoint:///system".to_owned()
    })
}

fn kind(_: &DriverCall<'_>, (): ()) -> Answer<&'static str> {
    Ok("LIVEPOINT")
}

fn version(_: &DriverCall<'_>, (): ()) -> Answer<u64> {
    let mut parts = env!("CARGO_PKG_VERSION")
        .split('.')
        .map(|part| part.parse::<u64>().unwrap_or(0));
    let mut next = || parts.next().unwrap_or(0);
    Ok(next() * 1_000_000 + next() * 1000 + next())
}

fn library_version(_: &DriverCall<'_>, (): ()) -> Answer<u64> {
    Ok(LIBRARY_VERSION)
}

fn is_secure(_: &DriverCall<'_>, (): ()) -> Answer<i32> {
    // A Unix socket cannot be listened in on.
    Ok(1)
}

fn close_callback(_: &DriverCall<'_>, (): ()) -> Answer<()> {
    Ok(())
}
