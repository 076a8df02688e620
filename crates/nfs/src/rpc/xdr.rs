//! XDR (RFC 4506) within the bounds of one record.
//!
//! Fixed-size types are those of `nfs3_types`. Whatever carries a length is read here instead:
//! the length is checked against a limit and against the bytes that are there before anything
//! is allocated, and opaque data is a slice of the record, not a copy.

use bytes::{Buf, BufMut, Bytes, BytesMut};
use nfs3_types::nfs3::{fattr3, nfstime3, wcc_attr};
use nfs3_types::xdr_codec::{Error as CodecError, Pack, Unpack};

/// Why bytes from the server could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("the reply ends in the middle of a value")]
    Truncated,
    #[error("{what} is {length} bytes long, the limit is {limit}")]
    TooLong {
        what: &'static str,
        length: usize,
        limit: usize,
    },
    #[error("{value} is no {what}")]
    Value { what: &'static str, value: u32 },
    #[error("{0}")]
    Content(&'static str),
}

/// Types whose encoding has a fixed size, so that decoding them allocates nothing.
pub(crate) trait Fixed: Unpack {
    const NAME: &'static str;
}
impl Fixed for fattr3 {
    const NAME: &'static str = "attribute value";
}
impl Fixed for wcc_attr {
    const NAME: &'static str = "attribute value";
}
impl Fixed for nfstime3 {
    const NAME: &'static str = "time";
}

/// Reads values from a record.
#[derive(Debug, Clone)]
pub struct Decoder {
    rest: Bytes,
}

impl Decoder {
    #[must_use]
    pub fn new(bytes: Bytes) -> Self {
        Self { rest: bytes }
    }

    /// The bytes not yet read.
    #[cfg(test)]
    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// What is not yet read.
    #[cfg(test)]
    pub(crate) fn take(self) -> Bytes {
        self.rest
    }

    /// # Errors
    /// [`DecodeError::Truncated`] at the end of the record.
    pub(crate) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.rest.try_get_u32().map_err(|_| DecodeError::Truncated)
    }

    /// # Errors
    /// [`DecodeError::Truncated`] at the end of the record.
    pub(crate) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.rest.try_get_u64().map_err(|_| DecodeError::Truncated)
    }

    /// # Errors
    /// [`DecodeError::Value`] for anything but 0 and 1.
    pub(crate) fn bool(&mut self) -> Result<bool, DecodeError> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            //= 4506-4.4-bool: A boolean is 0 or 1.
            value => Err(DecodeError::Value {
                what: "boolean",
                value,
            }),
        }
    }

    /// Eight opaque bytes: a write, create or cookie verifier.
    ///
    /// # Errors
    /// [`DecodeError::Truncated`] at the end of the record.
    pub(crate) fn verifier(&mut self) -> Result<[u8; 8], DecodeError> {
        Ok(self.u64()?.to_be_bytes())
    }

    /// # Errors
    /// [`DecodeError`] when the value is cut off or out of its range.
    pub(crate) fn fixed<T: Fixed>(&mut self) -> Result<T, DecodeError> {
        let mut slice = self.rest.as_ref();
        match T::unpack(&mut slice) {
            Ok((value, _)) => {
                let left = slice.len();
                self.rest.advance(self.rest.len() - left);
                Ok(value)
            }
            //= 4506-4.3-enum: “It is an error to encode as an enum any integer other than those
            //= that have been given assignments in the enum declaration.”
            Err(CodecError::InvalidEnumValue(value)) => Err(DecodeError::Value {
                what: T::NAME,
                value,
            }),
            Err(_) => Err(DecodeError::Truncated),
        }
    }

    /// A value behind a boolean that says whether it is there.
    ///
    /// # Errors
    /// Those of `read`.
    pub(crate) fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, DecodeError>,
    ) -> Result<Option<T>, DecodeError> {
        //= 4506-4.15-union: Behind a discriminant stands the arm that it selects, and only that.
        if self.bool()? {
            Ok(Some(read(self)?))
        } else {
            Ok(None)
        }
    }

    /// Variable-length opaque data of at most `limit` bytes, as a slice of the record.
    ///
    /// # Errors
    /// [`DecodeError::TooLong`] beyond the limit, [`DecodeError::Truncated`] beyond the record.
    pub(crate) fn opaque(
        &mut self,
        what: &'static str,
        limit: usize,
    ) -> Result<Bytes, DecodeError> {
        let length = self.u32()? as usize;
        //= 4506-4.10-length: “It is an error to encode a length greater than the maximum
        //= described in the specification.”
        if length > limit {
            return Err(DecodeError::TooLong {
                what,
                length,
                limit,
            });
        }
        if length > self.rest.len() {
            return Err(DecodeError::Truncated);
        }
        let data = self.rest.split_to(length);
        // Some servers leave out the padding of what stands last in a record.
        let padding = (length.wrapping_neg() & 3).min(self.rest.len());
        self.rest.advance(padding);
        Ok(data)
    }
}

/// Writes values; never fails.
#[derive(Debug)]
pub(crate) struct Encoder {
    pub(super) buf: BytesMut,
}

impl Encoder {
    pub(crate) fn u32(&mut self, value: u32) -> &mut Self {
        self.buf.put_u32(value);
        self
    }

    pub(crate) fn u64(&mut self, value: u64) -> &mut Self {
        self.buf.put_u64(value);
        self
    }

    /// Eight opaque bytes: a write, create or cookie verifier.
    pub(crate) fn verifier(&mut self, value: [u8; 8]) -> &mut Self {
        self.buf.put_slice(&value);
        self
    }

    /// Variable-length opaque data with its length and padding.
    pub(crate) fn opaque(&mut self, data: &[u8]) -> &mut Self {
        // Names, handles and paths: nothing near 4 GiB gets here.
        self.buf
            .put_u32(u32::try_from(data.len()).unwrap_or(u32::MAX));
        self.buf.put_slice(data);
        //= 4506-3-padding: “the n bytes are followed by enough (0 to 3) residual zero bytes, r,
        //= to make the total byte count a multiple of 4”
        self.buf.put_bytes(0, padding(data.len()));
        self
    }

    /// A value of `nfs3_types`.
    pub(crate) fn pack(&mut self, value: &impl Pack) -> &mut Self {
        value
            .pack(&mut (&mut self.buf).writer())
            .expect("a BytesMut grows, and no value built here is without an encoding");
        self
    }
}

/// The zero bytes after opaque data of `length` bytes.
#[must_use]
pub(crate) fn padding(length: usize) -> usize {
    length.wrapping_neg() & 3
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    //= test 4506-4.10-length
    #[test]
    fn opaque_data_is_bounded_by_its_limit_and_by_the_record() {
        let mut huge = Decoder::new(Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 1, 2, 3, 4]));
        assert!(matches!(
            huge.clone().opaque("a name", 255),
            Err(DecodeError::TooLong {
                length: 0xffff_ffff,
                ..
            })
        ));
        assert_eq!(
            huge.opaque("a name", usize::MAX),
            Err(DecodeError::Truncated)
        );
    }

    //= test 4506-4.3-enum
    //= test 4506-4.4-bool
    //= test 4506-4.15-union
    #[test]
    fn what_no_type_has_is_refused() {
        let decoder = |word: u32| Decoder::new(Bytes::copy_from_slice(&word.to_be_bytes()));
        let refused = |what, value| DecodeError::Value { what, value };
        assert_eq!(decoder(2).bool(), Err(refused("boolean", 2)));
        let arm = decoder(2).option(Decoder::u32);
        assert_eq!(arm, Err(refused("boolean", 2)));
        assert_eq!(decoder(0).option(Decoder::u32), Ok(None));
        assert_eq!(decoder(1).option(Decoder::u32), Err(DecodeError::Truncated));
        let kind = decoder(8).fixed::<fattr3>().map(drop);
        assert_eq!(kind, Err(refused(fattr3::NAME, 8)));
    }

    #[test]
    fn opaque_data_shares_the_records_memory() {
        let record = Bytes::from_static(&[0, 0, 0, 5, b'h', b'e', b'l', b'l', b'o', 0, 0, 0, 9]);
        let mut decoder = Decoder::new(record.clone());
        let data = decoder.opaque("data", 100).unwrap();
        assert_eq!(data.as_ref(), b"hello");
        assert_eq!(data.as_ptr(), record[4..].as_ptr());
    }

    proptest! {
        //= test 4506-3-padding
        #[test]
        fn opaque_data_comes_back(data in proptest::collection::vec(any::<u8>(), 0..70), after: u32) {
            let mut encoder = Encoder { buf: BytesMut::new() };
            encoder.opaque(&data).u32(after);
            prop_assert_eq!(encoder.buf.len() % 4, 0);
            let mut decoder = Decoder::new(encoder.buf.freeze());
            let read = decoder.opaque("data", 70).unwrap();
            prop_assert_eq!(read, data);
            prop_assert_eq!(decoder.u32().unwrap(), after);
            prop_assert_eq!(decoder.u32(), Err(DecodeError::Truncated));
        }
    }
}
