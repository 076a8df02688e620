//! Calls over TCP: many in flight, over one or several connections.
//!
//! Each connection (lane) has a [`CallTable`](super::table::CallTable) behind a lock, and a task
//! that connects when there is something to send, writes what is queued in batches, hands replies
//! to those who wait, and begins again with a back-off when the connection is lost. A call goes to
//! the lane with the least work ahead. Dropping the future of a call forgets the call and nothing
//! else. A thread outside the runtime can send its calls by itself ([`Transport::gather`]).
//!
//! Known limits: a call that was given up may still be carried out by the server; a READ reply
//! keeps its receive buffer (16 KiB for a small one) alive as long as its data is kept.

mod lane;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use tokio::sync::{AcquireError, Semaphore, SemaphorePermit, oneshot};
use tokio::task::JoinHandle;

use super::RpcError;
use super::connector::Connector;
use super::message::{Draft, Program, reply_results};
use super::table::Traffic;
use super::xdr::{DecodeError, Decoder};
use lane::{Driver, Gathering, Lane, Outcome, now};

/// The most connections of a client, as with the kernel's `nconnect`.
pub(crate) const MAX_CONNECTIONS: usize = 16;
/// The most data in one READ or WRITE, in bytes: what FUSE asks for at most.
pub(crate) const MAX_IO: u32 = 1 << 20;
/// The longest record that is taken, in bytes: the data and ample room for headers.
pub(crate) const MAX_RECORD: usize = MAX_IO as usize + 64 * 1024;
/// Deadline of a call unless set otherwise: what the kernel's client waits before its first
/// major timeout is of the same order, and users see an error rather than a hang.
pub(crate) const IO_TIMEOUT: Duration = Duration::from_secs(600);
/// Calls in flight of a client unless set otherwise: enough to fill a link of 10 Gb/s at 1 ms
/// with calls of 64 KiB, and below the 256 that some servers take.
pub(crate) const MAX_INFLIGHT: usize = 128;
/// Data of READs and WRITEs in flight of a client, in bytes: fills a link of 10 Gb/s at 25 ms, and
/// bounds both what a client holds in memory and how long a small call waits behind large ones.
const MAX_INFLIGHT_BYTES: u32 = 32 << 20;

/// How to reach a server.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The server's address and the program's port.
    pub addr: SocketAddr,
    /// Parallel connections, 1 to [`MAX_CONNECTIONS`]; further ones open as the load asks.
    pub nconnect: usize,
    /// Deadline of each call; `None` waits for ever.
    pub io_timeout: Option<Duration>,
    /// Calls in flight over all connections; further ones wait their turn, first come first
    /// served.
    pub max_inflight: usize,
    /// The name of this host in credentials.
    pub machine_name: String,
    /// From a source port below 1024 where this process may use one.
    pub reserved_port: bool,
}

impl Settings {
    /// The defaults for a server.
    #[must_use]
    pub fn new(addr: SocketAddr) -> Self {
        Self {
            addr,
            nconnect: 1,
            io_timeout: Some(IO_TIMEOUT),
            max_inflight: MAX_INFLIGHT,
            machine_name: "nfsvol".to_owned(),
            reserved_port: true,
        }
    }
}

/// The reply to a call.
#[derive(Debug)]
pub(crate) struct Reply {
    /// At the results.
    pub(crate) results: Decoder,
    /// The call went out more than once, so this may answer a repetition of what was done before.
    pub(crate) retransmitted: bool,
}

/// A client of one program on one server. See the module.
#[derive(Debug)]
pub(crate) struct Transport {
    addr: SocketAddr,
    program: Program,
    io_timeout: Option<Duration>,
    lanes: Vec<Arc<Lane>>,
    tasks: Vec<JoinHandle<()>>,
    slots: Semaphore,
    /// Bytes of data that may be in flight. Those who wait for these hold no slot, so that bulk
    /// transfers do not keep small calls out.
    data: Semaphore,
    xids: Arc<AtomicU32>,
}

impl Transport {
    /// Starts the tasks; nothing is sent before the first call.
    ///
    /// # Errors
    /// [`RpcError::Settings`] for a number out of its range.
    pub(crate) fn new<C: Connector>(
        settings: &Settings,
        program: Program,
        connector: C,
    ) -> Result<Self, RpcError> {
        if !(1..=MAX_CONNECTIONS).contains(&settings.nconnect) {
            return Err(RpcError::Settings("nconnect is a number from 1 to 16"));
        }
        if !(1..=Semaphore::MAX_PERMITS).contains(&settings.max_inflight) {
            return Err(RpcError::Settings("at least one call must be in flight"));
        }
        let mut seed = [0; 4];
        // The xids of an earlier process may still be in the server's duplicate request cache.
        getrandom::fill(&mut seed)
            .map_err(|_| RpcError::Settings("this host gives no random numbers"))?;
        let xids = Arc::new(AtomicU32::new(u32::from_ne_bytes(seed)));
        let connector = Arc::new(connector);
        let lanes: Vec<_> = (0..settings.nconnect)
            .map(|_| Arc::new(Lane::new()))
            .collect();
        let tasks = lanes
            .iter()
            .enumerate()
            .map(|(index, lane)| {
                let driver = Driver {
                    lane: Arc::clone(lane),
                    connector: Arc::clone(&connector),
                    xids: Arc::clone(&xids),
                    addr: settings.addr,
                    program,
                    index,
                };
                tokio::spawn(driver.run())
            })
            .collect();
        Ok(Self {
            addr: settings.addr,
            program,
            io_timeout: settings.io_timeout,
            lanes,
            tasks,
            slots: Semaphore::new(settings.max_inflight),
            data: Semaphore::new(MAX_INFLIGHT_BYTES as usize),
            xids,
        })
    }

    #[must_use]
    pub(crate) fn addr(&self) -> SocketAddr {
        self.addr
    }

    #[must_use]
    pub(crate) fn program(&self) -> Program {
        self.program
    }

    /// What has gone out over all connections.
    #[must_use]
    pub(crate) fn traffic(&self) -> Traffic {
        let each = self.lanes.iter().map(|lane| lane.traffic());
        each.fold(Traffic::default(), std::ops::Add::add)
    }

    /// The deadline of a call made now.
    #[must_use]
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.io_timeout.map(|timeout| now() + timeout)
    }

    /// Sends a call and waits for its reply.
    ///
    /// # Errors
    /// [`RpcError`]; after [`RpcError::TimedOut`] and [`RpcError::Closed`] it is not known
    /// whether the server has done what was asked.
    pub(crate) async fn call(
        &self,
        draft: Draft,
        deadline: Option<Instant>,
    ) -> Result<Reply, RpcError> {
        let _data = match draft.data() {
            0 => None,
            bytes => {
                let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
                let some = self.data.acquire_many(bytes.min(MAX_INFLIGHT_BYTES));
                Some(self.turn(deadline, some).await?)
            }
        };
        let _slot = self.turn(deadline, self.slots.acquire()).await?;
        let lane = self.lane();
        let (slot, outcome) = oneshot::channel();
        let xid = lane.submit(&self.xids, draft, deadline, slot);
        // `close` may have emptied the table just before the call went in.
        if self.slots.is_closed() {
            lane.forget(xid);
            return Err(RpcError::Closed(self.addr));
        }
        let waiting = Waiting { lane, xid };
        let outcome = outcome.await;
        std::mem::forget(waiting);
        match outcome {
            Ok(Outcome::Reply {
                record,
                retransmitted,
            }) => match reply_results(record) {
                Ok(Ok(results)) => Ok(Reply {
                    results,
                    retransmitted,
                }),
                Ok(Err(refusal)) => Err(RpcError::Refused {
                    addr: self.addr,
                    refusal,
                }),
                Err(source) => Err(self.malformed(source)),
            },
            Ok(Outcome::Malformed(source)) => Err(self.malformed(source)),
            Ok(Outcome::TimedOut) => Err(self.timed_out(lane)),
            Ok(Outcome::Closed) | Err(_) => Err(RpcError::Closed(self.addr)),
        }
    }

    /// Runs `work`, which polls calls, and then sends from this thread what they queued: that
    /// spares waking the thread of the tasks. For threads outside the runtime, whose context has
    /// been entered; on its own threads, tasks send more in one go.
    pub(crate) fn gather<R>(&self, work: impl FnOnce() -> R) -> R {
        let gathering = Gathering::start();
        let done = work();
        drop(gathering);
        for lane in &self.lanes {
            lane.flush();
        }
        done
    }

    /// Waits for one of the semaphores.
    async fn turn<'a>(
        &self,
        deadline: Option<Instant>,
        permit: impl Future<Output = Result<SemaphorePermit<'a>, AcquireError>>,
    ) -> Result<SemaphorePermit<'a>, RpcError> {
        let permit = match deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.into(), permit).await.ok(),
            None => Some(permit.await),
        };
        match permit {
            Some(Ok(permit)) => Ok(permit),
            Some(Err(_)) => Err(RpcError::Closed(self.addr)),
            None => Err(self.timed_out(self.lane())),
        }
    }

    /// Fails all calls, and all later ones, with [`RpcError::Closed`], at once.
    pub(crate) fn close(&self) {
        self.slots.close();
        self.data.close();
        for task in &self.tasks {
            task.abort();
        }
        for lane in &self.lanes {
            lane.close();
        }
    }

    pub(super) fn malformed(&self, source: DecodeError) -> RpcError {
        RpcError::Protocol {
            addr: self.addr,
            source,
        }
    }

    fn timed_out(&self, lane: &Lane) -> RpcError {
        RpcError::TimedOut {
            addr: self.addr,
            reason: lane.error(),
        }
    }

    /// The lane with the least work ahead; one that cannot connect only if none can.
    fn lane(&self) -> &Arc<Lane> {
        let mut best = &self.lanes[0];
        if self.lanes.len() > 1 {
            let mut least = best.load();
            for lane in &self.lanes[1..] {
                let this = lane.load();
                if this < least {
                    (best, least) = (lane, this);
                }
            }
        }
        best
    }
}

impl Drop for Transport {
    fn drop(&mut self) {
        self.close();
    }
}

/// Forgets a call when its future is dropped.
struct Waiting<'a> {
    lane: &'a Lane,
    xid: u32,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.lane.forget(self.xid);
    }
}
