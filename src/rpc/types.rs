//! What many procedures have in common.

use uuid::Uuid;

use super::xdr::{Decode, Decoder, Encode, Encoder, XdrError, xdr_structs};

xdr_structs! {
    /// A domain, as calls and answers name it.
    DomainRef {
        /// Its name.
        name: String,
        /// Its identity: what the server goes by, since a client's id and name may be old.
        uuid: Uuid,
        /// Its number among those that run; -1 for one that does not.
        id: i32,
    }

    /// A snapshot of a domain.
    SnapshotRef {
        /// Its name.
        name: String,
        /// Its domain.
        domain: DomainRef,
    }

    /// A named value whose type is named too.
    TypedParam {
        /// Its name.
        field: String,
        /// Its value.
        value: TypedValue,
    }
}

/// A value of one of libvirt's types (`virTypedParameterType`).
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "named after the type they hold")]
pub enum TypedValue {
    Int(i32),
    UInt(u32),
    Long(i64),
    ULong(u64),
    Double(f64),
    Bool(bool),
    Text(String),
}

impl Encode for TypedValue {
    fn encode(&self, out: &mut Encoder) {
        match self {
            Self::Int(value) => (1, *value).encode(out),
            Self::UInt(value) => (2, *value).encode(out),
            Self::Long(value) => (3, *value).encode(out),
            Self::ULong(value) => (4, *value).encode(out),
            Self::Double(value) => (5, *value).encode(out),
            Self::Bool(value) => (6, *value).encode(out),
            Self::Text(value) => (7, value.as_str()).encode(out),
        }
    }
}

impl Decode for TypedValue {
    fn decode(from: &mut Decoder<'_>) -> Result<Self, XdrError> {
        Ok(match u32::decode(from)? {
            1 => Self::Int(i32::decode(from)?),
            2 => Self::UInt(u32::decode(from)?),
            3 => Self::Long(i64::decode(from)?),
            4 => Self::ULong(u64::decode(from)?),
            5 => Self::Double(f64::decode(from)?),
            6 => Self::Bool(i32::decode(from)? != 0),
            7 => Self::Text(String::decode(from)?),
            found => {
                return Err(XdrError::Invalid {
                    what: "type of a parameter",
                    found,
                });
            }
        })
    }
}

impl TypedParam {
    /// Makes an unsigned number, which most parameters are.
    pub fn ulong(field: impl Into<String>, value: u64) -> Self {
        Self::new(field, TypedValue::ULong(value))
    }

    /// Makes a parameter.
    pub fn new(field: impl Into<String>, value: TypedValue) -> Self {
        Self {
            field: field.into(),
            value,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_type_of_value_comes_back() {
        for value in [
            TypedValue::Int(-1),
            TypedValue::UInt(2),
            TypedValue::Long(-3),
            TypedValue::ULong(4),
            TypedValue::Double(0.5),
            TypedValue::Bool(true),
            TypedValue::Text("six".to_owned()),
        ] {
            let param = TypedParam::new("p", value);
            assert_eq!(Decoder::first(&Encoder::of(&param)), Ok(param));
        }
        assert!(Decoder::first::<TypedValue>(&Encoder::of(&(8, 0))).is_err());
    }
}
