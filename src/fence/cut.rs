//! Cutting this host's TCP connections to a server, so that nothing of what TCP still has is ever
//! delivered.
//!
//! The connections of the kernel's NFS client are those of no process: only sock_diag(7) reaches
//! them. `SOCK_DESTROY` ends one and throws away what it has not sent; the client then makes a new
//! one, over which other volumes of the server go on. A kernel without it (it is
//! `CONFIG_INET_DIAG_DESTROY`, which distributions have) gets a routing rule for each connection
//! that keeps its packets on this host until the connection has ended by itself.

use std::io::{self, Read};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

/// How long the kernel may take to answer; it does at once.
const ANSWER: Duration = Duration::from_secs(2);
/// Answers of a dump come in datagrams of at most 32 KiB.
const BUFFER: usize = 64 * 1024;

// linux/netlink.h, linux/sock_diag.h, linux/rtnetlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_DUMP: u16 = 0x300;
const NLM_F_CREATE: u16 = 0x400;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
/// Of a message's header, in bytes.
const HEADER: usize = 16;
/// `struct inet_diag_sockid`: ports, addresses, interface, cookie; in bytes.
const ID: usize = 48;
/// Where the id lies in `struct inet_diag_msg`.
const ID_AT: usize = 4;
/// All states of TCP but LISTEN (10), TIME_WAIT (6) and CLOSE (7), which send nothing.
const STATES: u32 = 0xfff & !(1 << 10 | 1 << 6 | 1 << 7);

/// A connection of this host's network namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Connection {
    family: u8,
    remote: SocketAddr,
    local_port: u16,
    /// With the cookie, which no other connection of this boot has.
    id: [u8; ID],
}

/// The connections to a server's port, also those that their owner has closed already.
///
/// # Errors
/// When the kernel has no sock_diag(7).
pub(super) fn connections(server: SocketAddr) -> io::Result<Vec<Connection>> {
    let netlink = Netlink::open(libc::NETLINK_SOCK_DIAG)?;
    let family = match server.ip() {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    let family = u8::try_from(family).unwrap_or_default();
    let mut request = vec![family, 6 /* IPPROTO_TCP */, 0, 0];
    request.extend(STATES.to_ne_bytes());
    request.extend([0; ID]);
    let found = netlink.dump(SOCK_DIAG_BY_FAMILY, &request)?;
    Ok(found
        .iter()
        .filter_map(|message| parse(message))
        .filter(|connection| connection.remote == server)
        .collect())
}

/// Reads a `struct inet_diag_msg`.
fn parse(message: &[u8]) -> Option<Connection> {
    let family = *message.first()?;
    let id: [u8; ID] = message.get(ID_AT..ID_AT + ID)?.try_into().ok()?;
    let port = |at: usize| Some(u16::from_be_bytes(id.get(at..at + 2)?.try_into().ok()?));
    let remote = if i32::from(family) == libc::AF_INET {
        let octets: [u8; 4] = id.get(20..24)?.try_into().ok()?;
        IpAddr::from(octets)
    } else {
        let octets: [u8; 16] = id.get(20..36)?.try_into().ok()?;
        IpAddr::from(octets)
    };
    Some(Connection {
        family,
        remote: SocketAddr::new(remote, port(2)?),
        local_port: port(0)?,
        id,
    })
}

impl Connection {
    /// Ends it; what it has not sent is thrown away.
    ///
    /// # Errors
    /// EOPNOTSUPP when the kernel cannot, EPERM without CAP_NET_ADMIN.
    pub(super) fn destroy(&self) -> io::Result<()> {
        let mut request = vec![self.family, 6, 0, 0];
        request.extend(STATES.to_ne_bytes());
        request.extend(self.id);
        match Netlink::open(libc::NETLINK_SOCK_DIAG)?.change(SOCK_DESTROY, 0, &request) {
            // It has ended meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
            ended => ended,
        }
    }

    /// `struct fib_rule_hdr` with its attributes: packets of this connection go nowhere.
    fn rule(&self) -> Vec<u8> {
        /// Who made it, as `ip rule` shows (`proto 110`); no routing daemon's number.
        const OURS: u8 = 110;
        const FRA_DST: u16 = 1;
        const FRA_PRIORITY: u16 = 6;
        const FRA_PROTOCOL: u16 = 21;
        const FRA_IP_PROTO: u16 = 22;
        const FRA_SPORT_RANGE: u16 = 23;
        const FRA_DPORT_RANGE: u16 = 24;
        const FR_ACT_BLACKHOLE: u8 = 6;
        let address = match self.remote.ip() {
            IpAddr::V4(ip) => ip.octets().to_vec(),
            IpAddr::V6(ip) => ip.octets().to_vec(),
        };
        let bits = u8::try_from(address.len() * 8).unwrap_or(u8::MAX);
        let mut rule = vec![
            self.family,
            bits,
            0,
            0,
            0,
            0,
            0,
            FR_ACT_BLACKHOLE,
            0,
            0,
            0,
            0,
        ];
        let range = |port: u16| [port.to_ne_bytes(), port.to_ne_bytes()].concat();
        for (kind, value) in [
            (FRA_DST, address),
            // Before all others but that of the host's own addresses.
            (FRA_PRIORITY, 1u32.to_ne_bytes().to_vec()),
            (FRA_PROTOCOL, vec![OURS]),
            (FRA_IP_PROTO, vec![6]),
            (FRA_SPORT_RANGE, range(self.local_port)),
            (FRA_DPORT_RANGE, range(self.remote.port())),
        ] {
            let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
            rule.extend(length.to_ne_bytes());
            rule.extend(kind.to_ne_bytes());
            rule.extend(&value);
            rule.resize(rule.len().next_multiple_of(4), 0);
        }
        rule
    }
}

/// Rules that keep the packets of connections on this host.
#[derive(Debug, Default)]
pub(super) struct Barrier(Vec<Connection>);

impl Barrier {
    /// # Errors
    /// When the kernel takes no such rule (Linux before 4.17).
    pub(super) fn raise(&mut self, connection: &Connection) -> io::Result<()> {
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        let netlink = Netlink::open(libc::NETLINK_ROUTE)?;
        match netlink.change(RTM_NEWRULE, flags, &connection.rule()) {
            Err(error) if error.raw_os_error() != Some(libc::EEXIST) => return Err(error),
            Ok(()) | Err(_) => {}
        }
        if !self.0.contains(connection) {
            self.0.push(connection.clone());
        }
        Ok(())
    }

    /// Takes the rules of connections away that have ended; whether none is left.
    pub(super) fn lower(&mut self) -> bool {
        self.0.retain(|connection| {
            let there = connections(connection.remote);
            if there.map_or(true, |there| there.contains(connection)) {
                return true;
            }
            let lowered = Netlink::open(libc::NETLINK_ROUTE)
                .and_then(|netlink| netlink.change(RTM_DELRULE, 0, &connection.rule()));
            if let Err(error) = lowered {
                tracing::warn!(%error, port = connection.local_port, "a rule stays: `ip rule`");
            }
            false
        });
        self.0.is_empty()
    }
}

/// Whether this kernel lets this process end connections, tried on one of its own.
///
/// # Errors
/// Why not.
pub(super) fn try_to_destroy() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let server = listener.local_addr()?;
    let client = TcpStream::connect(server)?;
    let local = client.local_addr()?.port();
    let found = connections(server)?;
    let own = found.iter().find(|found| found.local_port == local);
    own.ok_or(io::ErrorKind::NotFound)?.destroy()
}

struct Netlink(Socket);

impl Netlink {
    fn open(protocol: i32) -> io::Result<Self> {
        let domain = Domain::from(libc::AF_NETLINK);
        let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(protocol)))?;
        socket.set_read_timeout(Some(ANSWER))?;
        Ok(Self(socket))
    }

    fn send(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
        let mut message = length.to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        message.extend([0; 8]);
        message.extend(body);
        self.0.send(&message).map(drop)
    }

    /// Asks for a change, and waits until it is made.
    fn change(&self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.send(kind, flags | NLM_F_ACK, body)?;
        // An acknowledgement is an error whose number is 0.
        self.receive(|_, _| true)
    }

    fn dump(&self, kind: u16, body: &[u8]) -> io::Result<Vec<Vec<u8>>> {
        self.send(kind, NLM_F_DUMP, body)?;
        let mut found = Vec::new();
        self.receive(|kind, body| {
            if kind != NLMSG_DONE {
                found.push(body.to_vec());
            }
            kind == NLMSG_DONE
        })?;
        Ok(found)
    }

    /// Hands out messages until `is_last` says so, or the kernel acknowledges or refuses.
    fn receive(&self, mut is_last: impl FnMut(u16, &[u8]) -> bool) -> io::Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            let length = (&self.0).read(&mut buffer)?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some((header, _)) = rest.split_at_checked(HEADER) {
                let bytes = |at: usize, length: usize| header.get(at..at + length);
                let size = bytes(0, 4).and_then(|size| size.try_into().ok());
                let size = usize::try_from(size.map_or(0, u32::from_ne_bytes)).unwrap_or(0);
                let kind = bytes(4, 2).and_then(|kind| kind.try_into().ok());
                let kind = kind.map_or(0, u16::from_ne_bytes);
                let Some(body) = rest.get(HEADER..size) else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                if kind == NLMSG_ERROR {
                    let errno = body.get(..4).unwrap_or_default();
                    return match errno.try_into().map_or(-libc::EIO, i32::from_ne_bytes) {
                        0 => Ok(()),
                        errno => Err(io::Error::from_raw_os_error(-errno)),
                    };
                }
                if is_last(kind, body) {
                    return Ok(());
                }
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_connection_that_is_destroyed_delivers_no_more() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(server).unwrap();
        let (mut other, _) = listener.accept().unwrap();
        client.write_all(b"in time").unwrap();
        let mut got = [0; 7];
        other.read_exact(&mut got).unwrap();
        let port = client.local_addr().unwrap().port();
        let found = connections(server).unwrap();
        let ours = found.iter().find(|found| found.local_port == port).unwrap();
        match ours.destroy() {
            Ok(()) => {}
            // CI's unit tests may lack CAP_NET_ADMIN, or the kernel the function.
            Err(error) => {
                let errno = error.raw_os_error();
                assert!(
                    matches!(errno, Some(libc::EPERM | libc::EOPNOTSUPP)),
                    "{error}"
                );
                return;
            }
        }
        assert!(client.write_all(b"late").is_err());
        assert!(other.read(&mut got).is_err(), "it is told by a reset");
        assert!(connections(server).unwrap().is_empty());
        assert!(try_to_destroy().is_ok());
    }
}
