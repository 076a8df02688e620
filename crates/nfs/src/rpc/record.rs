//! Record marking of RPC over a stream (RFC 5531, section 11), without I/O.
//!
//! A record is a chain of fragments, each behind a four-byte header: the length in the low 31
//! bits, and the top bit set on the last one. A record in one fragment, which is how servers
//! send nearly all replies, is a slice of the receive buffer; one in several is put together by
//! copying. Once [`RecordDecoder::next`] has failed, framing is lost and the connection with it.
//!
//! ```
//! use bytes::BytesMut;
//! use nfs::rpc::record::RecordDecoder;
//!
//! let mut records = RecordDecoder::new(100);
//! // Two fragments of one record, of which the second has not come to its end.
//! let mut stream = BytesMut::from(&b"\x00\x00\x00\x04four\x80\x00\x00\x03o"[..]);
//! assert_eq!(records.next(&mut stream), Ok(None));
//! stream.extend_from_slice(b"ne");
//! assert_eq!(records.next(&mut stream).unwrap().as_deref(), Some(&b"fourone"[..]));
//! // What would be too long is refused when it is announced, and by its xid told whose it is.
//! stream.extend_from_slice(b"\x80\x00\x00\x65\x00\x00\x00\x07");
//! assert_eq!(records.next(&mut stream).unwrap_err().xid, 7);
//! ```

use bytes::{Buf, Bytes, BytesMut};
use nfs3_types::rpc::fragment_header;

/// Bytes of a fragment header.
pub(crate) const HEADER: usize = 4;

/// A record that is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a record of at least {length} bytes, the limit is {limit}")]
pub struct RecordTooLong {
    pub length: usize,
    pub limit: usize,
    /// The first four bytes: the xid of the call that such a reply would answer.
    pub xid: u32,
}

/// Cuts a stream of bytes into records.
#[derive(Debug)]
pub struct RecordDecoder {
    limit: usize,
    /// What has come of a record in several fragments.
    joined: BytesMut,
    /// Bytes of the fragment at the front of the buffer that are still missing, when known.
    missing: usize,
}

impl RecordDecoder {
    /// Takes records of up to `limit` bytes.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            joined: BytesMut::new(),
            missing: 0,
        }
    }

    /// Takes the next whole record off the front of `buffer`; `None` when more bytes are needed.
    ///
    /// # Errors
    /// [`RecordTooLong`] as soon as the headers announce more than the limit.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, RecordTooLong> {
        loop {
            self.missing = 0;
            let Some(header) = buffer.first_chunk::<HEADER>() else {
                return Ok(None);
            };
            let header = fragment_header::from(*header);
            let length = header.fragment_length() as usize;
            if self.joined.len() + length > self.limit {
                let mut start = self.joined.iter().chain(&buffer[HEADER..]).copied();
                let mut xid = [0; 4];
                for byte in &mut xid {
                    match start.next() {
                        Some(first) => *byte = first,
                        // Ask for the xid, so that the call it belongs to can be told.
                        None => return Ok(None),
                    }
                }
                return Err(RecordTooLong {
                    length: self.joined.len() + length,
                    limit: self.limit,
                    xid: u32::from_be_bytes(xid),
                });
            }
            let have = buffer.len() - HEADER;
            if have < length {
                self.missing = length - have;
                return Ok(None);
            }
            buffer.advance(HEADER);
            let fragment = buffer.split_to(length);
            match (header.eof(), self.joined.is_empty()) {
                (true, true) => return Ok(Some(fragment.freeze())),
                (true, false) => {
                    self.joined.extend_from_slice(&fragment);
                    return Ok(Some(self.joined.split().freeze()));
                }
                //= 5531-11-fragments: “A record is composed of one or more record fragments.”
                (false, _) => self.joined.extend_from_slice(&fragment),
            }
        }
    }

    /// How many bytes complete the fragment at the front of the buffer: at least this many are
    /// to come. 0 when its header is not there yet.
    #[must_use]
    pub fn missing(&self) -> usize {
        self.missing
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(record: &[u8], cuts: &[usize]) -> Vec<u8> {
        let mut wire = Vec::new();
        let mut rest = record;
        for cut in cuts {
            let (now, later) = rest.split_at((*cut).min(rest.len()));
            wire.extend_from_slice(&u32::try_from(now.len()).unwrap().to_be_bytes());
            wire.extend_from_slice(now);
            rest = later;
        }
        let last = u32::try_from(rest.len()).unwrap() | 0x8000_0000;
        wire.extend_from_slice(&last.to_be_bytes());
        wire.extend_from_slice(rest);
        wire
    }

    proptest! {
        //= test 5531-11-fragments
        #[test]
        fn records_survive_any_fragments_and_any_reads(
            records in proptest::collection::vec(
                (proptest::collection::vec(any::<u8>(), 0..300),
                 proptest::collection::vec(0usize..200, 0..5)), 0..8),
            reads in proptest::collection::vec(1usize..100, 1..50),
        ) {
            let wire: Vec<u8> = records.iter().flat_map(|(r, cuts)| frame(r, cuts)).collect();
            let mut decoder = RecordDecoder::new(300);
            let mut buffer = BytesMut::new();
            let mut seen = Vec::new();
            let mut rest = &wire[..];
            for size in reads.iter().cycle() {
                if rest.is_empty() { break; }
                let (now, later) = rest.split_at((*size).min(rest.len()));
                buffer.extend_from_slice(now);
                rest = later;
                while let Some(record) = decoder.next(&mut buffer).unwrap() {
                    seen.push(record.to_vec());
                }
                prop_assert!(decoder.missing() <= rest.len());
            }
            let sent: Vec<_> = records.into_iter().map(|(record, _)| record).collect();
            prop_assert_eq!(seen, sent);
        }

        #[test]
        fn noise_is_an_error_or_a_record_within_the_limit(noise: Vec<u8>) {
            let mut decoder = RecordDecoder::new(64);
            let mut buffer = BytesMut::from(&noise[..]);
            while let Ok(Some(record)) = decoder.next(&mut buffer) {
                prop_assert!(record.len() <= 64);
            }
        }
    }

    #[test]
    fn a_record_over_the_limit_is_refused_with_its_xid_before_it_is_read() {
        let mut decoder = RecordDecoder::new(1000);
        let mut buffer = BytesMut::from(&[0xff, 0xff, 0xff, 0xff][..]);
        assert_eq!(decoder.next(&mut buffer), Ok(None));
        buffer.extend_from_slice(&[0, 0, 1, 2]);
        let refused = decoder.next(&mut buffer).unwrap_err();
        assert_eq!((refused.xid, refused.length), (258, 0x7fff_ffff));
    }

    #[test]
    fn fragments_that_add_up_to_more_than_the_limit_are_refused() {
        let mut decoder = RecordDecoder::new(10);
        let mut buffer = BytesMut::from(&frame(&[7; 12], &[6])[..]);
        assert_eq!(decoder.next(&mut buffer).unwrap_err().xid, 0x0707_0707);
    }

    #[test]
    fn a_whole_record_is_a_slice_of_the_buffer() {
        let mut buffer = BytesMut::from(&frame(b"payload", &[])[..]);
        let start = buffer.as_ptr();
        let record = RecordDecoder::new(10).next(&mut buffer).unwrap().unwrap();
        assert_eq!(record.as_ptr(), start.wrapping_add(HEADER));
    }
}
