//! XDR (RFC 4506) as libvirt uses it: big-endian, every item padded to four bytes.
//!
//! Everything that is decoded comes from outside: each list and string has a limit, and nothing
//! is allocated for elements whose bytes have not arrived.

use uuid::Uuid;

/// Longest string of the protocol, in bytes (`REMOTE_STRING_MAX`).
pub const STRING_BYTES_MAX: usize = 4 << 20;

/// Why bytes are not what was expected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum XdrError {
    /// The bytes end within an item.
    #[error("the payload ends too early")]
    Short,
    /// A list or string is longer than it may be.
    #[error("a list or string of {found} is longer than {limit}")]
    TooLong {
        /// Its length.
        found: usize,
        /// Its limit.
        limit: usize,
    },
    /// A string is not UTF-8, or has a zero byte.
    #[error("a string is not text")]
    NotText,
    /// A value that its type does not have.
    #[error("{found} is no valid {what}")]
    Invalid {
        /// What was decoded.
        what: &'static str,
        /// The value.
        found: u32,
    },
}

/// What can be put on the wire.
pub trait Encode {
    /// Appends the item to `out`.
    fn encode(&self, out: &mut Encoder);
}

/// What can be taken off the wire.
pub trait Decode: Sized {
    /// Takes the item off the front of `from`.
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError>;
}

/// Bytes that grow item by item.
#[derive(Debug, Default)]
pub struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    /// Returns what was encoded.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Returns the encoding of one item.
    pub fn of(item: &impl Encode) -> Vec<u8> {
        let mut out = Self::default();
        item.encode(&mut out);
        out.bytes
    }

    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn length(&mut self, length: usize) {
        let length = u32::try_from(length).expect("what this server sends is below 4 GiB");
        self.put(&length.to_be_bytes());
    }

    fn opaque(&mut self, bytes: &[u8]) {
        self.length(bytes.len());
        self.put(bytes);
        let padding = bytes.len().next_multiple_of(4) - bytes.len();
        self.bytes.resize(self.bytes.len() + padding, 0);
    }
}

/// The rest of a payload.
#[derive(Clone, Copy, Debug)]
pub struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    /// Reads `payload` from its start.
    pub fn new(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    /// Decodes one item at the front of `payload`. What follows it is ignored, as libvirtd does:
    /// some clients append bytes.
    pub fn first<T: Decode>(payload: &'a [u8]) -> Result<T, XdrError> {
        T::decode(&mut Self::new(payload))
    }

    /// Returns how many bytes are left.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// Returns the bytes that are left.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], XdrError> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(XdrError::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], XdrError> {
        Ok(self.take(N)?.try_into().expect("as many as were taken"))
    }

    fn length(&mut self, limit: usize) -> Result<usize, XdrError> {
        let found = u32::from_be_bytes(self.array()?) as usize;
        if found > limit {
            return Err(XdrError::TooLong { found, limit });
        }
        Ok(found)
    }

    fn opaque(&mut self, limit: usize) -> Result<&'a [u8], XdrError> {
        let length = self.length(limit)?;
        let padded = self.take(length.next_multiple_of(4))?;
        padded.get(..length).ok_or(XdrError::Short)
    }
}

macro_rules! number {
    ($($type:ty),*) => {$(
        impl Encode for $type {
            fn encode(&self, out: &mut Encoder) {
                out.put(&self.to_be_bytes());
            }
        }

        impl Decode for $type {
            fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
                Ok(Self::from_be_bytes(from.array()?))
            }
        }
    )*};
}

number!(i32, u32, i64, u64, f64);

impl Encode for bool {
    fn encode(&self, out: &mut Encoder) {
        i32::from(*self).encode(out);
    }
}

impl Encode for str {
    fn encode(&self, out: &mut Encoder) {
        out.opaque(self.as_bytes());
    }
}

impl<T: Encode + ?Sized> Encode for &T {
    fn encode(&self, out: &mut Encoder) {
        (**self).encode(out);
    }
}

impl Encode for String {
    fn encode(&self, out: &mut Encoder) {
        self.as_str().encode(out);
    }
}

impl Decode for String {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let bytes = from.opaque(STRING_BYTES_MAX)?;
        let text = std::str::from_utf8(bytes).map_err(|_| XdrError::NotText)?;
        if text.contains('\0') {
            return Err(XdrError::NotText);
        }
        Ok(text.to_owned())
    }
}

impl Encode for Uuid {
    fn encode(&self, out: &mut Encoder) {
        out.put(self.as_bytes());
    }
}

impl Decode for Uuid {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(Self::from_bytes(from.array()?))
    }
}

impl<T: Encode> Encode for Option<T> {
    fn encode(&self, out: &mut Encoder) {
        u32::from(self.is_some()).encode(out);
        if let Some(item) = self {
            item.encode(out);
        }
    }
}

impl<T: Decode> Decode for Option<T> {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        match u32::decode(from)? {
            0 => Ok(None),
            1 => T::decode(from).map(Some),
            found => Err(XdrError::Invalid {
                what: "optional item",
                found,
            }),
        }
    }
}

/// A list of at most `N` items, with its length before it.
#[derive(Clone, Debug, PartialEq, Default)]
pub struct List<T, const N: usize>(pub Vec<T>);

impl<T: Encode, const N: usize> Encode for List<T, N> {
    fn encode(&self, out: &mut Encoder) {
        // More would make the client give up the whole connection.
        let sent = self.0.get(..N).unwrap_or(&self.0);
        out.length(sent.len());
        for item in sent {
            item.encode(out);
        }
    }
}

impl<T: Decode, const N: usize> Decode for List<T, N> {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        let length = from.length(N)?;
        // Each item takes four bytes or more.
        let mut items = Vec::with_capacity(length.min(from.remaining() / 4));
        for _ in 0..length {
            items.push(T::decode(from)?);
        }
        Ok(Self(items))
    }
}

/// At most `N` bytes, with their number before them.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Bytes<const N: usize>(pub Vec<u8>);

impl<const N: usize> Encode for Bytes<N> {
    fn encode(&self, out: &mut Encoder) {
        out.opaque(self.0.get(..N).unwrap_or(&self.0));
    }
}

impl<const N: usize> Decode for Bytes<N> {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(Self(from.opaque(N)?.to_vec()))
    }
}

/// A C string in a fixed array of `N` characters, each of which takes four bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FixedChars<const N: usize>(pub String);

impl<const N: usize> Encode for FixedChars<N> {
    fn encode(&self, out: &mut Encoder) {
        // The last one is the terminating zero.
        let text = self.0.bytes().filter(u8::is_ascii).take(N - 1);
        for byte in text.chain(std::iter::repeat(0)).take(N) {
            i32::from(byte).encode(out);
        }
    }
}

/// A C string as a list of characters, its zero included, each of which takes four bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CharList(pub String);

impl Encode for CharList {
    fn encode(&self, out: &mut Encoder) {
        let text: Vec<u8> = self.0.bytes().filter(u8::is_ascii).take(256).collect();
        out.length(text.len() + 1);
        for byte in text.into_iter().chain([0]) {
            i32::from(byte).encode(out);
        }
    }
}

impl Encode for () {
    fn encode(&self, _out: &mut Encoder) {}
}

impl Decode for () {
    fn decode(_from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(())
    }
}

// A struct of the protocol is its fields one after the other, and so is a tuple.
macro_rules! tuple {
    ($($name:ident),*) => {
        impl<$($name: Encode),*> Encode for ($($name,)*) {
            #[expect(non_snake_case, reason = "the fields are named after their types")]
            fn encode(&self, out: &mut Encoder) {
                let ($($name,)*) = self;
                $($name.encode(out);)*
            }
        }

        impl<$($name: Decode),*> Decode for ($($name,)*) {
            fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
                Ok(($($name::decode(from)?,)*))
            }
        }
    };
}

tuple!(A);
tuple!(A, B);
tuple!(A, B, C);
tuple!(A, B, C, D);
tuple!(A, B, C, D, E);
tuple!(A, B, C, D, E, F);
tuple!(A, B, C, D, E, F, G, H);

/// Declares structs of the protocol: the table of their fields is their encoding.
macro_rules! xdr_structs {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq)]
        pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

        impl $crate::rpc::xdr::Encode for $name {
            fn encode(&self, out: &mut $crate::rpc::xdr::Encoder) {
                $(self.$field.encode(out);)*
            }
        }

        impl $crate::rpc::xdr::Decode for $name {
            fn decode(
                from: &mut $crate::rpc::xdr::Decoder<'_>,
            ) -> Result<Self, $crate::rpc::xdr::XdrError> {
                Ok(Self { $($field: <$type>::decode(from)?,)* })
            }
        }
    )*};
}

pub(super) use xdr_structs;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn items_are_padded_to_four_bytes() {
        assert_eq!(Encoder::of(&"abcde"), b"\0\0\0\x05abcde\0\0\0");
        assert_eq!(Encoder::of(&Some(7_i32)), [0, 0, 0, 1, 0, 0, 0, 7]);
        assert_eq!(Encoder::of(&None::<i32>), [0, 0, 0, 0]);
        assert_eq!(Encoder::of(&FixedChars::<32>("x".into())).len(), 128);
        assert_eq!(Encoder::of(&CharList("ab".into())).len(), 16);
    }

    #[test]
    fn a_list_that_claims_more_than_its_limit_or_its_bytes_is_refused() {
        let long = Encoder::of(&5_u32);
        let found = Decoder::first::<List<i32, 4>>(&long);
        assert_eq!(found, Err(XdrError::TooLong { found: 5, limit: 4 }));
        let found = Decoder::first::<List<i32, 16>>(&long);
        assert_eq!(found, Err(XdrError::Short));
        let huge = Encoder::of(&(u32::MAX, 0_u32));
        assert!(Decoder::first::<String>(&huge).is_err());
    }

    #[test]
    fn a_string_with_a_zero_or_of_no_text_is_refused() {
        assert_eq!(
            Decoder::first::<String>(b"\0\0\0\x01\0\0\0\0"),
            Err(XdrError::NotText)
        );
        assert_eq!(
            Decoder::first::<String>(b"\0\0\0\x01\xff\0\0\0"),
            Err(XdrError::NotText)
        );
    }

    proptest! {
        #[test]
        fn what_is_encoded_is_decoded_again(
            text in "[^\0]{0,40}",
            number: i64,
            maybe: Option<u32>,
            bytes in proptest::collection::vec(any::<u8>(), 0..40),
            numbers in proptest::collection::vec(any::<i32>(), 0..9),
        ) {
            let item = (text, number, maybe, Bytes::<40>(bytes), List::<i32, 9>(numbers));
            let wire = Encoder::of(&item);
            prop_assert_eq!(wire.len() % 4, 0);
            prop_assert_eq!(Decoder::first(&wire), Ok(item));
        }

        #[test]
        fn any_bytes_are_decoded_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            type Item = (List<(String, Option<u64>), 50>, Bytes<20>, Option<Uuid>);
            drop(Decoder::first::<Item>(&bytes));
        }
    }
}
