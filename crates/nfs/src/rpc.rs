//! The RPC transport of the FUSE data path, and the NFSv3 client on top of it.
//!
//! The protocol is kept apart from the I/O: what decides (record marking, the call table, the
//! decoding of replies) is told the time and handed bytes, so the same code runs over a socket,
//! in a simulated network and under a fuzzer. Only [`transport`] and [`connector`] touch sockets
//! and clocks.
//!
//! | module | job | I/O |
//! |---|---|---|
//! | [`xdr`] | decoding within the bounds of a record, encoding | none |
//! | [`record`] | record marking of RPC over TCP | none |
//! | [`message`] | headers of calls and replies | none |
//! | [`auth`] | AUTH_UNIX credentials | none |
//! | [`table`] | calls in flight: deadlines, retransmission, a silent server | none |
//! | [`connector`] | opening a connection | sockets |
//! | [`transport`] | many calls in flight over several connections | sockets, clock |
//! | [`nfs3`] | the procedures of RFC 1813 as async functions | through the transport |
//! | [`mountd`] | MOUNT and the port mapper | through the transport |
//!
//! Nothing that a server sends makes this code panic, or hold more memory than one capped record
//! for each connection and for each reply that the caller still keeps.

mod auth;
pub mod connector;
pub mod message;
pub mod mountd;
pub mod nfs3;
pub mod record;
mod table;
mod transport;
pub mod xdr;

use std::net::SocketAddr;

pub use auth::Cred;
pub use nfs3::{Nfs3, NfsError};
pub use table::Traffic;
pub use transport::Settings;

/// Why a call got no answer that could be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RpcError {
    /// The deadline passed. The server may or may not have done what was asked.
    #[error("no answer from {addr} before the deadline{}", last(.reason))]
    TimedOut {
        addr: SocketAddr,
        /// What the last attempt to connect said, if the connection was down.
        reason: Option<String>,
    },
    /// The client was closed.
    #[error("the connection to {0} was closed on this host")]
    Closed(SocketAddr),
    /// The answer breaks the protocol.
    #[error("{addr} answered against the protocol: {source}")]
    Protocol {
        addr: SocketAddr,
        source: xdr::DecodeError,
    },
    /// The server refused the call before it reached the program.
    #[error("{addr} refused the call: {refusal}")]
    Refused {
        addr: SocketAddr,
        refusal: message::Refusal,
    },
    /// A setting is out of range.
    #[error("{0}")]
    Settings(&'static str),
}

fn last(reason: &Option<String>) -> String {
    reason
        .as_ref()
        .map_or_else(String::new, |reason| format!(" (last attempt: {reason})"))
}

impl RpcError {
    /// The errno (a positive `libc` constant) that an application should see.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::TimedOut { .. } => libc::ETIMEDOUT,
            Self::Closed(_) => libc::ENOTCONN,
            Self::Protocol { .. } => libc::EIO,
            Self::Refused { refusal, .. } => refusal.errno(),
            Self::Settings(_) => libc::EINVAL,
        }
    }
}
