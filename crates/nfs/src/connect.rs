//! The ground under every way to a share: names to addresses, connections, RPC records.
//!
//! [`Wire`] carries one call of nfs3_client at a time. It guards that crate against what servers
//! do: the end of the stream is an error, a reply may come in fragments, no record grows beyond
//! [`MAX_RECORD`], memory beyond [`AHEAD`] is taken only for bytes that arrived, and no length
//! within a record goes beyond it ([`bounds`]). Any failed call makes the wire useless, so callers
//! drop it; there is no other recovery.

mod bounds;
mod dial;

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use nfs3_client::RpcError;
use nfs3_client::io::{AsyncRead, AsyncWrite};
use nfs3_client::rpc::RpcClient;
use nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_types::xdr_codec::{Opaque, Pack, Unpack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::oneshot;
use tokio::time::timeout;

pub(crate) use self::dial::{ANY, dial, reserved_ports};
use super::address::Server;
use crate::mutant::{self, Mutant};
use crate::rpc::record::{HEADER, RecordDecoder};

/// The largest reply, in bytes: a READ of [`MAX_TRANSFER`] with room for its header.
const MAX_RECORD: usize = MAX_TRANSFER as usize + 64 * 1024;
/// The most data in one call, in bytes, whatever the server would take.
pub(crate) const MAX_TRANSFER: u32 = 1024 * 1024;
/// How much room is made for a record that is announced and has not arrived: for most of them at
/// once, so that they are read by one call.
const AHEAD: usize = 64 * 1024;
/// Marks a record's last fragment, in its header (RFC 5531, section 11).
const LAST: u32 = 1 << 31;
/// The most addresses of one name that are tried.
const MAX_ADDRESSES: usize = 8;

/// Runs `work` on a thread of its own and gives what it returns.
///
/// Not tokio's blocking pool: the runtime waits for that one when it shuts down, and a thread
/// that hangs in a dead NFS mount or in the resolver would keep the process from ending.
pub fn detached<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<oneshot::Receiver<T>> {
    let (done, result) = oneshot::channel();
    thread::Builder::new()
        .name("nfsvol-blocking".to_owned())
        .spawn(move || {
            // Nobody waits any more when the deadline has passed: the result is then dropped.
            let _ = done.send(work());
        })?;
    Ok(result)
}

/// Counts the RPCs sent, for the figures of load per host.
#[derive(Debug, Clone, Default)]
pub(crate) struct Meter(Arc<AtomicU64>);

impl Meter {
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The addresses of a server, in the resolver's order of preference, without doubles.
///
/// # Errors
/// The resolver's error, or `TimedOut`.
pub async fn resolve(server: &Server, within: Duration) -> io::Result<Vec<IpAddr>> {
    let name = match server {
        Server::Ip(ip) => return Ok(vec![*ip]),
        Server::Embedded => return Ok(vec![Ipv4Addr::LOCALHOST.into()]),
        Server::Name(name) => name.clone(),
    };
    let found = detached(move || (name.as_str(), 0).to_socket_addrs())?;
    let found = timeout(within, found)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        .map_err(|_| io::Error::from(io::ErrorKind::Interrupted))??;
    let mut addresses = Vec::new();
    for address in found.map(|address| address.ip()) {
        if !addresses.contains(&address) && addresses.len() < MAX_ADDRESSES {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

/// A connection that carries one RPC at a time.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: TcpStream,
    meter: Meter,
    /// What was called last: program, version, procedure.
    called: (u32, u32, u32),
    /// What is left of the reply at hand: as one fragment, whose header it is, and the record.
    header: Bytes,
    record: Bytes,
}

impl Wire {
    /// Connects; from a reserved source port when asked for and when this process may.
    ///
    /// # Errors
    /// Those of connect(2), and `TimedOut`.
    pub(crate) async fn dial(
        to: SocketAddr,
        reserved: bool,
        within: Duration,
        meter: &Meter,
    ) -> io::Result<Self> {
        let stream = timeout(within, async {
            let reserved = reserved.then(reserved_ports);
            dial(to, reserved.into_iter().flatten().chain([ANY])).await
        })
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            meter: meter.clone(),
            called: (0, 0, 0),
            header: Bytes::new(),
            record: Bytes::new(),
        })
    }

    /// Whether an idle connection is still good: neither closed by the server nor holding bytes
    /// that nobody asked for.
    pub(crate) fn is_quiet(&self) -> bool {
        let byte = self.stream.try_read(&mut [0]);
        byte.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Lets go of the memory of the last reply.
    pub(crate) fn rest(&mut self) {
        self.record = Bytes::new();
    }

    /// Makes one call. After an error the wire must be dropped, and so must it when the future
    /// is dropped before its end.
    ///
    /// # Errors
    /// Those of the connection, of decoding, and refusals by the RPC layer.
    pub(crate) async fn call<C, R>(
        &mut self,
        called: (u32, u32, u32),
        credential: &opaque_auth<'static>,
        args: &C,
    ) -> Result<R, RpcError>
    where
        C: Pack + Send + Sync,
        R: Unpack,
    {
        self.meter.0.fetch_add(1, Ordering::Relaxed);
        self.called = called;
        let (program, version, procedure) = called;
        let mut client = RpcClient::new_with_auth(self, credential.clone(), opaque_auth::default());
        client.call(program, version, procedure, args).await
    }

    /// Reads the next record and looks at its lengths.
    async fn receive(&mut self) -> io::Result<()> {
        let mut records = RecordDecoder::new(MAX_RECORD);
        let mut buffer = BytesMut::new();
        let record = loop {
            if let Some(record) = records.next(&mut buffer).map_err(invalid)? {
                break record;
            }
            // To the end of a header or of a fragment, so that nothing of the next record is read.
            let wanted = match records.missing() {
                0 => HEADER.saturating_sub(buffer.len()).max(1),
                missing => missing.min(AHEAD),
            };
            buffer.reserve(wanted);
            if self
                .stream
                .read_buf(&mut (&mut buffer).limit(wanted))
                .await?
                == 0
            {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        };
        //= 4506-4.10-length: “It is an error to encode a length greater than the maximum
        //= described in the specification.”
        let checked = bounds::check(self.called, record.clone());
        if let Err(error) = checked
            && !mutant::is_on(Mutant::LengthsTrusted)
        {
            return Err(invalid(error));
        }
        let length = u32::try_from(record.len()).unwrap_or(u32::MAX);
        self.header = Bytes::copy_from_slice(&(length | LAST).to_be_bytes());
        self.record = record;
        Ok(())
    }
}

impl AsyncRead for &mut Wire {
    async fn async_read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.header.is_empty() && self.record.is_empty() {
            self.receive().await?;
        }
        let rest = match self.header.is_empty() {
            true => &mut self.record,
            false => &mut self.header,
        };
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest.split_to(length));
        Ok(length)
    }
}

impl AsyncWrite for &mut Wire {
    async fn async_write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self.stream.write(buffer).await? {
            0 if !buffer.is_empty() => Err(io::ErrorKind::WriteZero.into()),
            length => Ok(length),
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// AUTH_UNIX as root of this host (RFC 5531 appendix A).
pub(crate) fn credential() -> opaque_auth<'static> {
    let name = rustix::system::uname();
    //= 5531-A-machine: The machine name of a credential has at most 255 bytes.
    // The RFC's limit for a machine name.
    let name = name
        .nodename()
        .to_bytes()
        .iter()
        .copied()
        .take(255)
        .collect();
    opaque_auth::auth_unix(&auth_unix {
        stamp: 0,
        machinename: Opaque::owned(name),
        uid: 0,
        gid: 0,
        gids: Vec::new(),
    })
}
