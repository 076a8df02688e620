//! Headers of calls and replies (RFC 5531, section 9).

use std::fmt;

use bytes::{Bytes, BytesMut};
use nfs3_types::rpc::{RPC_VERSION_2, auth_flavor, fragment_header};

use super::auth::{Cred, Machine};
use super::xdr::{DecodeError, Decoder, Encoder, padding};

/// Where a program's calls go: its number and version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) number: u32,
    pub(crate) version: u32,
}

/// The record mark and the xid stand first in a call.
const XID_AT: usize = 4;
/// Room for the head of most calls: header, credential with 16 groups, two handles, a name.
const HEAD_CAPACITY: usize = 512;
/// The longest verifier in a reply, in bytes (RFC 5531, section 8.2).
const MAX_VERIFIER: usize = 400;

/// A call as it goes over the wire: record mark, header and arguments, then the payload of a
/// WRITE, which is never copied.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    head: Bytes,
    payload: Bytes,
    expected: usize,
}

/// The zero bytes behind a payload.
static ZEROES: [u8; 3] = [0; 3];

impl Request {
    /// All bytes, in order, as slices that share their memory.
    pub(crate) fn chunks(&self) -> impl Iterator<Item = Bytes> {
        //= 4506-3-padding: “the n bytes are followed by enough (0 to 3) residual zero bytes, r,
        //= to make the total byte count a multiple of 4”
        let padding = Bytes::from_static(&ZEROES[..padding(self.payload.len())]);
        [self.head.clone(), self.payload.clone(), padding]
            .into_iter()
            .filter(|chunk| !chunk.is_empty())
    }

    /// Bytes on the wire.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.head.len() + self.payload.len() + padding(self.payload.len())
    }

    /// Bytes on the wire in both directions, about.
    #[must_use]
    pub(crate) fn weight(&self) -> usize {
        self.len() + self.expected
    }
}

/// A [`Request`] that has no xid yet.
#[derive(Debug)]
pub(crate) struct Draft {
    head: BytesMut,
    payload: Bytes,
    expected: usize,
}

impl Draft {
    /// A call of `procedure` whose arguments `arguments` writes.
    pub(super) fn new(
        program: Program,
        procedure: u32,
        auth: Option<(&Machine, &Cred)>,
        arguments: impl FnOnce(&mut Encoder),
    ) -> Self {
        let mut out = Encoder {
            buf: BytesMut::with_capacity(HEAD_CAPACITY),
        };
        //= 5531-9-rpcvers: “In version 2 of the RPC protocol specification, rpcvers MUST be equal
        //= to 2.”
        // The record mark and the xid are filled in later.
        out.u32(0).u32(0).u32(0).u32(RPC_VERSION_2);
        out.u32(program.number).u32(program.version).u32(procedure);
        match auth {
            Some((machine, cred)) => machine.encode(cred, &mut out),
            None => {
                let none = auth_flavor::AUTH_NULL as u32;
                out.u32(none).u32(0).u32(none).u32(0);
            }
        }
        arguments(&mut out);
        Self {
            head: out.buf,
            payload: Bytes::new(),
            expected: 0,
        }
    }

    /// Data at the end of the arguments, padded here; its length stands in the arguments.
    #[must_use]
    pub(super) fn with_payload(mut self, payload: Bytes) -> Self {
        self.payload = payload;
        self
    }

    /// How many bytes of data the reply will bring, about.
    #[must_use]
    pub(super) fn expecting(mut self, bytes: usize) -> Self {
        self.expected = bytes;
        self
    }

    /// Bytes on the wire.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.head.len() + self.payload.len() + padding(self.payload.len())
    }

    /// Bytes of data that go along, in either direction.
    #[must_use]
    pub(super) fn data(&self) -> usize {
        self.payload.len() + self.expected
    }

    /// Gives the call its xid, which it keeps however often it is sent.
    #[must_use]
    pub(crate) fn seal(mut self, xid: u32) -> Request {
        let length = u32::try_from(self.len() - 4).unwrap_or(fragment_header::MASK);
        //= 5531-11-one-record: “One RPC message fits into one RM record.”
        let mark = fragment_header::new(length & fragment_header::MASK, true);
        self.head[..XID_AT].copy_from_slice(&mark.into_xdr_buf());
        self.head[XID_AT..XID_AT + 4].copy_from_slice(&xid.to_be_bytes());
        Request {
            head: self.head.freeze(),
            payload: self.payload,
            expected: self.expected,
        }
    }
}

/// Why a server refused a call before the program saw it (RFC 5531, section 9).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// The program is not there; NFSv3 may be switched off on the server.
    ProgramUnavailable,
    /// The program speaks other versions only.
    Version { low: u32, high: u32 },
    /// The procedure is not there.
    ProcedureUnavailable,
    /// The server could not read the arguments.
    Arguments,
    /// The server ran out of something.
    System,
    /// The server speaks another version of RPC.
    RpcVersion,
    /// The credential was refused; the number is an `auth_stat`.
    Auth(u32),
}

impl Refusal {
    /// The errno (a positive `libc` constant) that an application should see.
    #[must_use]
    pub fn errno(self) -> i32 {
        match self {
            Self::ProgramUnavailable | Self::Version { .. } | Self::RpcVersion => {
                libc::EPROTONOSUPPORT
            }
            Self::ProcedureUnavailable => libc::EOPNOTSUPP,
            Self::Arguments | Self::System => libc::EIO,
            Self::Auth(_) => libc::EACCES,
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ProgramUnavailable => f.write_str("it does not offer the program"),
            Self::Version { low, high } => {
                write!(f, "it offers versions {low} to {high} of the program only")
            }
            Self::ProcedureUnavailable => f.write_str("it does not offer the procedure"),
            Self::Arguments => f.write_str("it could not read the arguments"),
            Self::System => f.write_str("it reports an internal error"),
            Self::RpcVersion => f.write_str("it does not speak version 2 of RPC"),
            Self::Auth(5) => f.write_str(
                "AUTH_UNIX is too weak for it (the export may ask for Kerberos, or for a source port below 1024)",
            ),
            Self::Auth(number) => write!(f, "it does not accept the credential (auth_stat {number})"),
        }
    }
}

/// The xid of a reply, or `None` for a record that cannot be one: the stream is out of step.
#[must_use]
pub fn reply_xid(record: &Bytes) -> Option<u32> {
    const REPLY: u32 = 1;
    let mut decoder = Decoder::new(record.clone());
    let xid = decoder.u32().ok()?;
    //= 5531-9-reply: What is no reply is not taken for one.
    (decoder.u32() == Ok(REPLY)).then_some(xid)
}

/// Reads the header of a reply and leaves the decoder at the results.
///
/// # Errors
/// [`DecodeError`] for a malformed header; a refusal is the inner error.
pub fn reply_results(record: Bytes) -> Result<Result<Decoder, Refusal>, DecodeError> {
    const ACCEPTED: u32 = 0;
    const DENIED: u32 = 1;
    let mut decoder = Decoder::new(record);
    let _xid = decoder.u32()?;
    let _reply = decoder.u32()?;
    match decoder.u32()? {
        ACCEPTED => {}
        DENIED => {
            return match decoder.u32()? {
                0 => Ok(Err(Refusal::RpcVersion)),
                1 => Ok(Err(Refusal::Auth(decoder.u32()?))),
                value => Err(DecodeError::Value {
                    what: "reject_stat",
                    value,
                }),
            };
        }
        value => {
            return Err(DecodeError::Value {
                what: "reply_stat",
                value,
            });
        }
    }
    let _flavor = decoder.u32()?;
    //= 5531-8.2-verifier: The body of a verifier is at most 400 bytes long.
    decoder.opaque("the verifier", MAX_VERIFIER)?;
    match decoder.u32()? {
        //= 5531-9-refused: A reply tells why a call was not carried out (rejected, or one of five
        //= reasons); each is told apart from a result.
        0 => Ok(Ok(decoder)),
        1 => Ok(Err(Refusal::ProgramUnavailable)),
        2 => Ok(Err(Refusal::Version {
            low: decoder.u32()?,
            high: decoder.u32()?,
        })),
        3 => Ok(Err(Refusal::ProcedureUnavailable)),
        4 => Ok(Err(Refusal::Arguments)),
        5 => Ok(Err(Refusal::System)),
        value => Err(DecodeError::Value {
            what: "accept_stat",
            value,
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a reply comes to whose header ends in these words.
    fn read(words: &[u32]) -> Result<Result<usize, Refusal>, DecodeError> {
        let header = [7, 1].iter().chain(words);
        let bytes: Vec<u8> = header.flat_map(|word| word.to_be_bytes()).collect();
        let results = reply_results(bytes.into())?;
        Ok(results.map(|results| results.remaining()))
    }

    //= test 5531-9-refused
    #[test]
    fn each_refusal_is_told_apart() {
        assert_eq!(read(&[0, 0, 0, 0, 9]), Ok(Ok(4)));
        let accepted = [
            Refusal::ProgramUnavailable,
            Refusal::Version { low: 4, high: 5 },
            Refusal::ProcedureUnavailable,
            Refusal::Arguments,
            Refusal::System,
        ];
        for (stat, refusal) in (1..).zip(accepted) {
            assert_eq!(read(&[0, 0, 0, stat, 4, 5]), Ok(Err(refusal)));
        }
        assert_eq!(read(&[1, 0, 2, 2]), Ok(Err(Refusal::RpcVersion)));
        assert_eq!(read(&[1, 1, 5]), Ok(Err(Refusal::Auth(5))));
        for (words, what, value) in [
            (&[2][..], "reply_stat", 2),
            (&[0, 0, 0, 6], "accept_stat", 6),
            (&[1, 2], "reject_stat", 2),
        ] {
            assert_eq!(read(words), Err(DecodeError::Value { what, value }));
        }
    }
}
