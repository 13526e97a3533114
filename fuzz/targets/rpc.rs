//! Packets of libvirt's remote protocol, as a hostile client may send them.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use livepoint::rpc::{
    Bytes, Decode, Decoder, DomainRef, Encode, Encoder, FrameReader, List, SnapshotRef, TypedParam,
};

/// Longest packet tried: the fuzzer's inputs are shorter.
const PACKET_BYTES_MAX: usize = 1 << 20;

// The first byte says how the rest arrives: in pieces of so many bytes.
fuzz_target!(|input: &[u8]| {
    let Some((&step, wire)) = input.split_first() else {
        return;
    };
    let mut reader = FrameReader::default();
    for piece in wire.chunks(usize::from(step) + 1) {
        reader.push(piece);
        loop {
            match reader.next(PACKET_BYTES_MAX) {
                Ok(Some((header, payload))) => {
                    check::<livepoint::rpc::Header>(&Encoder::of(&header));
                    decode_as_everything(&payload);
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
});

/// Whatever a payload is meant to be: each decoder must bear it.
fn decode_as_everything(payload: &[u8]) {
    check::<(DomainRef, u32, Option<String>)>(payload);
    check::<(SnapshotRef, u32)>(payload);
    check::<(DomainRef, List<TypedParam, 64>, u32)>(payload);
    check::<(List<DomainRef, 16>, u32)>(payload);
    check::<(List<String, 16>, Bytes<256>, i64)>(payload);
    check::<(Option<DomainRef>, i32, u64, Option<Bytes<64>>)>(payload);
}

/// What is decoded is encoded to what decodes to the same.
fn check<T: Decode + Encode + Debug>(payload: &[u8]) {
    if let Ok(item) = Decoder::first::<T>(payload) {
        let again = Decoder::first::<T>(&Encoder::of(&item));
        // Compared by text: a number may be NaN.
        let again = again.expect("what was encoded is well-formed");
        assert_eq!(format!("{again:?}"), format!("{item:?}"));
    }
}
