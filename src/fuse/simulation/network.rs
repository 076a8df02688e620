//! Connections whose messages take time, are held back, and are lost with their connection.
//!
//! Whole RPC records travel: a task for each, which sleeps for as long as the message takes.
//! Calls of one connection arrive in the order in which they were sent.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;
use tokio::time::Instant;

use nfs::rpc::connector::Connector;

use super::server::Server;

/// The way between one host and the server.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) host: usize,
    server: Arc<Server>,
    /// Messages take up to this many milliseconds.
    latency: u64,
    /// Whether messages are held back.
    held: AtomicBool,
    freed: Notify,
}

impl Link {
    pub(super) fn new(host: usize, server: Arc<Server>, latency: u64) -> Arc<Self> {
        Arc::new(Self {
            host,
            server,
            latency,
            held: AtomicBool::new(false),
            freed: Notify::new(),
        })
    }

    pub(super) fn hold(&self, held: bool) {
        self.held.store(held, Ordering::Relaxed);
        self.freed.notify_waiters();
    }

    async fn free(&self) {
        while self.held.load(Ordering::Relaxed) {
            self.freed.notified().await;
        }
    }

    fn delay(&self) -> Duration {
        Duration::from_millis(self.server.roll(self.latency + 1))
    }
}

/// One connection.
#[derive(Debug)]
pub(super) struct Wire {
    pub(super) link: Arc<Link>,
    /// The server's life in which it was opened.
    pub(super) life: u64,
    open: AtomicBool,
    inbox: Mutex<Inbox>,
    next_arrival: Mutex<Instant>,
}

#[derive(Debug, Default)]
struct Inbox {
    bytes: VecDeque<u8>,
    waker: Option<Waker>,
}

impl Wire {
    pub(super) fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// Breaks the connection.
    pub(super) fn reset(&self) {
        self.open.store(false, Ordering::Relaxed);
        let waker = self.inbox.lock().unwrap().waker.take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// A call is on its way to the server.
    fn send(self: &Arc<Self>, call: Vec<u8>) {
        let at = {
            let mut next = self.next_arrival.lock().unwrap();
            *next = (*next).max(Instant::now() + self.link.delay());
            *next
        };
        let wire = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep_until(at).await;
            wire.link.free().await;
            let server = Arc::clone(&wire.link.server);
            server.receive(wire, call).await;
        });
    }

    /// A reply is on its way to the client.
    pub(super) async fn reply(&self, reply: &[u8]) {
        tokio::time::sleep(self.link.delay()).await;
        self.link.free().await;
        let mut inbox = self.inbox.lock().unwrap();
        let length = u32::try_from(reply.len()).unwrap() | 0x8000_0000;
        inbox.bytes.extend(length.to_be_bytes());
        inbox.bytes.extend(reply);
        if let Some(waker) = inbox.waker.take() {
            waker.wake();
        }
    }
}

/// Opens connections over a link.
#[derive(Debug)]
pub(super) struct Dialer(pub(super) Arc<Link>);

impl Connector for Dialer {
    type Reader = Reader;
    type Writer = Writer;

    async fn connect(&self, _: SocketAddr, _: usize) -> io::Result<(Reader, Writer)> {
        let link = &self.0;
        tokio::time::sleep(link.delay()).await;
        link.free().await;
        let life = link.server.life();
        let life = life.ok_or(io::ErrorKind::ConnectionRefused)?;
        let wire = Arc::new(Wire {
            link: Arc::clone(link),
            life,
            open: AtomicBool::new(true),
            inbox: Mutex::default(),
            next_arrival: Mutex::new(Instant::now()),
        });
        link.server.connected(&wire);
        let writer = Writer {
            wire: Arc::clone(&wire),
            buffer: BytesMut::new(),
        };
        Ok((Reader(wire), writer))
    }
}

#[derive(Debug)]
pub(super) struct Reader(Arc<Wire>);

impl AsyncRead for Reader {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inbox = self.0.inbox.lock().unwrap();
        if !self.0.is_open() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if inbox.bytes.is_empty() {
            inbox.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let (first, _) = inbox.bytes.as_slices();
        let count = first.len().min(buf.remaining());
        buf.put_slice(&first[..count]);
        inbox.bytes.drain(..count);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.0.reset();
    }
}

#[derive(Debug)]
pub(super) struct Writer {
    wire: Arc<Wire>,
    /// The beginning of a record.
    buffer: BytesMut,
}

impl AsyncWrite for Writer {
    fn poll_write(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if !self.wire.is_open() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        self.buffer.extend_from_slice(bytes);
        while let Some(mark) = self.buffer.first_chunk::<4>() {
            let length = (u32::from_be_bytes(*mark) & 0x7fff_ffff) as usize;
            if self.buffer.len() < 4 + length {
                break;
            }
            self.buffer.advance(4);
            let call = self.buffer.split_to(length).to_vec();
            self.wire.send(call);
        }
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
