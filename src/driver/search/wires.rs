//! The ways of the hosts to the server, with the calls that wait for an answer, and the hosts' clocks.

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::disk::Disk;
use super::server::Call;
use crate::cluster::Env;
use nfs::admin::simulated;

/// A call of a host that was sent.

#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) call: Call,
    pub(super) reply: Option<io::Result<Vec<u8>>>,
    pub(super) waker: Waker,
}

/// The server, and the calls on their way to it.
#[derive(Debug)]
pub(super) struct Wires {
    pub(super) disk: Disk,
    pub(super) waiting: BTreeMap<u64, Waiting>,
    pub(super) next: u64,
    pub(super) dials: [u64; 3],
    /// The disk before each change, for a server that forgets.
    pub(super) before: Option<Vec<Disk>>,
}

pub(super) type Shared = Arc<Mutex<Wires>>;

/// The way of one host to the server.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) host: usize,
    pub(super) wires: Shared,
}

/// An answer that is waited for.
struct Answer<'a> {
    link: &'a Link,
    number: u64,
}

impl Future for Answer<'_> {
    type Output = io::Result<Vec<u8>>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut wires = self.link.wires.lock().unwrap();
        let waiting = wires.waiting.get_mut(&self.number).unwrap();
        match waiting.reply.take() {
            Some(reply) => {
                wires.waiting.remove(&self.number);
                wires.dials[self.link.host] += u64::from(reply.is_err());
                Poll::Ready(reply)
            }
            None => {
                waiting.waker = context.waker().clone();
                Poll::Pending
            }
        }
    }
}

impl Drop for Answer<'_> {
    fn drop(&mut self) {
        let mut wires = self.link.wires.lock().unwrap();
        if wires.waiting.remove(&self.number).is_some() {
            // Given up, and the connection with it.
            wires.dials[self.link.host] += 1;
        }
    }
}

impl simulated::Server for Link {
    fn call(&self, procedure: u32, args: Vec<u8>, walks: bool) -> simulated::Reply<'_> {
        let mut wires = self.wires.lock().unwrap();
        let number = wires.next;
        wires.next += 1;
        let host = self.host;
        let waiting = Waiting {
            call: Call {
                host,
                procedure,
                args,
                walks,
            },
            reply: None,
            waker: Waker::noop().clone(),
        };
        wires.waiting.insert(number, waiting);
        Box::pin(Answer { link: self, number })
    }

    fn dials(&self) -> u64 {
        self.wires.lock().unwrap().dials[self.host]
    }
}

/// A host's clock, which goes on only when the world says so.
#[derive(Debug, Clone, Default)]
pub(super) struct Clock(pub(super) Arc<AtomicU64>);

impl Clock {
    pub(super) fn pass(&self, time: Duration) {
        let millis = u64::try_from(time.as_millis()).unwrap();
        self.0.fetch_add(millis, Ordering::Relaxed);
    }
}

impl Env for Clock {
    fn now(&self) -> Duration {
        Duration::from_millis(1_000_000 + self.0.load(Ordering::Relaxed))
    }

    fn nonce(&self) -> String {
        format!("{:016x}", chance::bits().unwrap())
    }
}
