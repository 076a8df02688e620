//! Opening a TCP connection from a source port that servers trust.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::RangeInclusive;

use tokio::net::{TcpSocket, TcpStream};

/// Source ports that an export with `secure` accepts (exports(5)), as the kernel's own client takes
/// them (`sunrpc.min_resvport` and `max_resvport`): below 665 live well-known services.
const RESERVED_PORTS: RangeInclusive<u16> = 665..=1023;
/// Lets the kernel choose.
pub(crate) const ANY: u16 = 0;

/// Every reserved port, from one that chance chooses, so that many connections do not all try the
/// same ports.
pub(crate) fn reserved_ports() -> impl Iterator<Item = u16> {
    let count = RESERVED_PORTS.end() - RESERVED_PORTS.start() + 1;
    // Without random numbers all begin with the same port, which is only slower.
    let mut seed = [0; 2];
    let _ = getrandom::fill(&mut seed);
    let start = u16::from_ne_bytes(seed) % count;
    (0..count).map(move |n| RESERVED_PORTS.start() + (start + n) % count)
}

/// Connects from the first of `ports` that can be had. Reserved ones are left out when this process
/// may not have one: the server may still take others (exports(5), `insecure`).
///
/// # Errors
/// Those of connect(2); `AddrInUse` when none can be had.
pub(crate) async fn dial(
    to: SocketAddr,
    ports: impl IntoIterator<Item = u16>,
) -> io::Result<TcpStream> {
    let mut skip_reserved = false;
    for port in ports {
        if skip_reserved && RESERVED_PORTS.contains(&port) {
            continue;
        }
        let socket = match bound_socket(to, port) {
            Ok(socket) => socket,
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => continue,
            Err(e) if e.kind() == io::ErrorKind::PermissionDenied && port != ANY => {
                skip_reserved = true;
                continue;
            }
            Err(e) => return Err(e),
        };
        match socket.connect(to).await {
            // This pair of ports is still taken (TIME_WAIT, or another process).
            Err(e)
                if port != ANY
                    && matches!(
                        e.kind(),
                        io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
                    ) => {}
            outcome => return outcome,
        }
    }
    Err(io::ErrorKind::AddrInUse.into())
}

fn bound_socket(to: SocketAddr, port: u16) -> io::Result<TcpSocket> {
    let (socket, here): (_, SocketAddr) = match to {
        SocketAddr::V4(_) => (TcpSocket::new_v4()?, (Ipv4Addr::UNSPECIFIED, port).into()),
        SocketAddr::V6(_) => (TcpSocket::new_v6()?, (Ipv6Addr::UNSPECIFIED, port).into()),
    };
    if port != ANY {
        // A port in TIME_WAIT towards another server is free for this one.
        socket.set_reuseaddr(true)?;
        socket.bind(here)?;
    }
    Ok(socket)
}
