//! The ground under every way to a share: names to addresses, connections, RPC records.
//!
//! [`Wire`] carries one call of nfs3_client at a time. It guards that crate against what servers
//! do: the end of the stream is an error, a reply may come in fragments, no record grows beyond
//! [`MAX_RECORD`], memory beyond [`AHEAD`] is taken only for bytes that arrived, and no length
//! within a record goes beyond it ([`bounds`]). Any failed call makes the wire useless, so callers
//! drop it; there is no other recovery.

mod bounds;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use bytes::Bytes;
use nfs3_client::RpcError;
use nfs3_client::io::{AsyncRead, AsyncWrite};
use nfs3_client::rpc::RpcClient;
use nfs3_types::rpc::{auth_unix, opaque_auth};
use nfs3_types::xdr_codec::{Opaque, Pack, Unpack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::address::Server;
use crate::mutant::{self, Mutant};

/// The largest reply, in bytes: a READ of [`MAX_TRANSFER`] with room for its header.
const MAX_RECORD: usize = MAX_TRANSFER as usize + 64 * 1024;
/// The most data in one call, in bytes, whatever the server would take.
pub(crate) const MAX_TRANSFER: u32 = 1024 * 1024;
/// How much room is made for a record that is announced and has not arrived: for most of them at
/// once, so that they are read by one call.
const AHEAD: usize = 64 * 1024;
/// The most fragments of one record; servers use a handful, and empty ones must end somewhere.
const MAX_FRAGMENTS: u32 = 1024;
/// Source ports that an export with `secure` accepts, and that the kernel's own client takes
/// (/proc/sys/sunrpc/min_resvport, max_resvport).
const RESERVED_PORTS: std::ops::RangeInclusive<u16> = 665..=1023;
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
    /// What is left of the reply at hand, header first, as one unfragmented record.
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
            match reserved {
                true => connect_reserved(to).await,
                false => TcpStream::connect(to).await,
            }
        })
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            meter: meter.clone(),
            called: (0, 0, 0),
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

    /// Reads the next record, joins its fragments, and looks at its lengths.
    async fn receive(&mut self) -> io::Result<()> {
        let mut record = vec![0; 4];
        //= 5531-11-fragments: “A record is composed of one or more record fragments.”
        for _ in 0..MAX_FRAGMENTS {
            let header = self.stream.read_u32().await?;
            let length = (header & 0x7fff_ffff) as usize;
            let end = record.len() + length;
            if end > MAX_RECORD {
                return Err(invalid(format!("a reply of more than {MAX_RECORD} bytes")));
            }
            record.reserve(length.min(AHEAD));
            (&mut self.stream)
                .take(length as u64)
                .read_to_end(&mut record)
                .await?;
            if record.len() < end {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if header & 0x8000_0000 != 0 {
                let joined = u32::try_from(end - 4).unwrap_or(u32::MAX) | 0x8000_0000;
                record[..4].copy_from_slice(&joined.to_be_bytes());
                self.record = record.into();
                //= 4506-4.10-length: “It is an error to encode a length greater than the maximum
                //= described in the specification.”
                let checked = bounds::check(self.called, self.record.slice(4..));
                if let Err(error) = checked
                    && !mutant::is_on(Mutant::LengthsTrusted)
                {
                    return Err(invalid(error.to_string()));
                }
                return Ok(());
            }
        }
        Err(invalid(format!(
            "a reply of more than {MAX_FRAGMENTS} fragments"
        )))
    }
}

impl AsyncRead for &mut Wire {
    async fn async_read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.record.is_empty() {
            self.receive().await?;
        }
        let length = self.record.len().min(buffer.len());
        buffer[..length].copy_from_slice(&self.record.split_to(length));
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

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// Connects from a reserved port; from any port when this process may not bind one, or when all
/// are taken.
async fn connect_reserved(to: SocketAddr) -> io::Result<TcpStream> {
    let count = RESERVED_PORTS.end() - RESERVED_PORTS.start() + 1;
    // Another start each time, so that many connections do not all try the same ports.
    let start = getrandom::u32().unwrap_or(0) % u32::from(count);
    for step in 0..count {
        let offset = (start + u32::from(step)) % u32::from(count);
        let port = RESERVED_PORTS.start() + u16::try_from(offset).unwrap_or(0);
        let (socket, any): (_, IpAddr) = match to {
            SocketAddr::V4(_) => (TcpSocket::new_v4()?, Ipv4Addr::UNSPECIFIED.into()),
            SocketAddr::V6(_) => (TcpSocket::new_v6()?, Ipv6Addr::UNSPECIFIED.into()),
        };
        // A port in TIME_WAIT towards another server is free for this one.
        socket.set_reuseaddr(true)?;
        match socket.bind(SocketAddr::new(any, port)) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => continue,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => break,
            other => other?,
        }
        match socket.connect(to).await {
            // This port already has, or had a moment ago, a connection to the same service.
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable => {}
            other => return other,
        }
    }
    TcpStream::connect(to).await
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
