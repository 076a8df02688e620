//! Opening a TCP connection to a server.
//!
//! The source port lies below 1024 where that is permitted, because servers trust no other by
//! default (exports(5), `secure`). A connection that replaces another takes the same source port
//! if it can, because servers know a client in their duplicate request cache by its port. When that
//! port gets no answer, it may be a firewall or a balancer that still has the old connection in its
//! tables, so the next attempt comes from another port; and if that is not answered either, it is
//! the server that is silent, and the remembered port's turn again.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use socket2::TcpKeepalive;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use crate::connect::{ANY, dial, reserved_ports};
use crate::mutant::{self, Mutant};

/// Idle time before TCP asks the peer for a sign of life, between two such, and how many go
/// unanswered: a peer that vanished is noticed after 60 + 6 * 10 s even when no call waits.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_PROBES: u32 = 6;

/// Opens connections; what the transport knows of the network.
pub trait Connector: Send + Sync + 'static {
    type Reader: AsyncRead + Unpin + Send + 'static;
    type Writer: AsyncWrite + Unpin + Send + 'static;

    /// Opens the `lane`-th of a client's parallel connections. The caller bounds the time.
    fn connect(
        &self,
        addr: SocketAddr,
        lane: usize,
    ) -> impl Future<Output = io::Result<(Self::Reader, Self::Writer)>> + Send;
}

/// Connects over the host's TCP.
#[derive(Debug)]
pub struct TcpConnector {
    reserved: bool,
    /// By lane.
    ports: Mutex<Vec<Port>>,
}

/// The source port that a lane had last.
#[derive(Debug, Clone, Copy, Default)]
struct Port {
    /// 0 for none.
    number: u16,
    /// The last attempt from it got no answer.
    silent: bool,
}

impl TcpConnector {
    /// `reserved`: from a source port below 1024 where the process may use one.
    #[must_use]
    pub fn new(reserved: bool) -> Self {
        Self {
            reserved,
            ports: Mutex::new(Vec::new()),
        }
    }

    fn change(&self, lane: usize, change: impl FnOnce(&mut Port)) {
        let mut ports = self.ports.lock().unwrap_or_else(|e| e.into_inner());
        if ports.len() <= lane {
            ports.resize(lane + 1, Port::default());
        }
        change(&mut ports[lane]);
    }

    fn remember(&self, lane: usize, number: u16) {
        let silent = false;
        self.change(lane, |port| *port = Port { number, silent });
    }

    /// The port for the next attempt, which counts as silent until there is an answer: whoever
    /// loses patience drops the attempt.
    fn recall(&self, lane: usize) -> u16 {
        let mut number = 0;
        self.change(lane, |port| {
            if !port.silent {
                number = port.number;
            }
            port.silent = !port.silent && !mutant::is_on(Mutant::SilentPortKept);
        });
        number
    }

    /// The source ports to try, in order; 0 lets the kernel choose.
    fn candidates(&self, lane: usize) -> Vec<u16> {
        let mut ports = Vec::new();
        let last = self.recall(lane);
        if last != ANY {
            ports.push(last);
        }
        if self.reserved {
            ports.extend(reserved_ports());
        }
        ports.push(ANY);
        ports
    }
}

impl Connector for TcpConnector {
    type Reader = OwnedReadHalf;
    type Writer = OwnedWriteHalf;

    async fn connect(
        &self,
        addr: SocketAddr,
        lane: usize,
    ) -> io::Result<(OwnedReadHalf, OwnedWriteHalf)> {
        match dial(addr, self.candidates(lane)).await {
            Ok(stream) => {
                self.remember(lane, stream.local_addr()?.port());
                prepare(stream).map(TcpStream::into_split)
            }
            Err(e) => {
                if e.kind() != io::ErrorKind::TimedOut {
                    self.change(lane, |port| port.silent = false);
                }
                Err(e)
            }
        }
    }
}

fn prepare(stream: TcpStream) -> io::Result<TcpStream> {
    stream.set_nodelay(true)?;
    let socket = socket2::SockRef::from(&stream);
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_PROBES),
    )?;
    // A connection is only closed when it has failed or its client is gone. Closed with a reset,
    // it leaves no TIME_WAIT behind, so that the source port is free for the next one.
    socket.set_linger(Some(Duration::ZERO))?;
    Ok(stream)
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_new_connection_comes_from_the_port_of_the_one_it_replaces() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        for reserved in [false, true] {
            let connector = TcpConnector::new(reserved);
            let mut ports = Vec::new();
            for lane in [0, 0, 1, 0] {
                let mut known = Port::default();
                connector.change(lane, |port| known = *port);
                let last = ports.iter().rev().find(|(of, _)| *of == lane);
                assert_eq!(known.number, last.map_or(0, |(_, port)| *port), "{ports:?}");
                let connection = connector.connect(addr, lane).await.unwrap();
                let (mut served, peer) = listener.accept().await.unwrap();
                ports.push((lane, peer.port()));
                drop(connection);
                // Until the server has seen the end, the port is in use.
                while served.read(&mut [0; 1]).await.is_ok_and(|read| read > 0) {}
            }
            let of_lane = |lane| ports.iter().filter(move |port| port.0 == lane);
            // Any other process may have taken the port in between, and has it then.
            let is_taken = |port: u16| std::net::TcpListener::bind(("0.0.0.0", port)).is_err();
            for (before, after) in of_lane(0).zip(of_lane(0).skip(1)) {
                assert!(before == after || is_taken(before.1), "{ports:?}");
            }
            if reserved && rustix::process::geteuid().is_root() {
                let mut reserved = reserved_ports();
                assert!(reserved.any(|port| port == ports[0].1), "{ports:?}");
            }
        }
    }

    #[test]
    fn a_port_without_an_answer_and_another_take_turns() {
        // Each attempt is given up from outside, as the transport does.
        let attempts = || {
            let connector = TcpConnector::new(false);
            connector.remember(0, 700);
            [(); 4].map(|()| connector.candidates(0)[0])
        };
        assert_eq!(attempts(), [700, 0, 700, 0]);
        let _back = mutant::put_back(Mutant::SilentPortKept);
        assert_eq!(attempts(), [700; 4], "as it was");
    }

    #[tokio::test]
    async fn a_server_that_is_not_up_yet_does_not_cost_the_port() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        drop(listener);
        let connector = TcpConnector::new(false);
        connector.remember(0, 700);
        for _ in 0..3 {
            connector.connect(addr, 0).await.unwrap_err();
        }
        assert_eq!(connector.recall(0), 700);
    }

    #[tokio::test]
    async fn a_port_that_another_holds_is_passed_over() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let (first, second) = (TcpConnector::new(false), TcpConnector::new(false));
        let held = first.connect(addr, 0).await.unwrap();
        let port = held.0.local_addr().unwrap().port();
        second.remember(0, port);
        let other = second.connect(addr, 0).await.unwrap();
        assert_ne!(other.0.local_addr().unwrap().port(), port);
    }
}
