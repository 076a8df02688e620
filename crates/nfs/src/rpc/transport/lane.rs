//! One connection: its calls, and the task that keeps it open.
//!
//! Queued calls are written by the task, or by the thread that made them ([`Lane::flush`]), one of
//! them at a time: whoever holds the outlet looks for queued calls again after letting go of it,
//! so that those who find it held can leave. A connection that takes no more is left to the task.
//! One that has nothing to do is closed; the next call opens another.

use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::sync::{Notify, oneshot};

use super::MAX_RECORD;
use crate::mutant::{self, Mutant};
use crate::rpc::connector::Connector;
use crate::rpc::message::{Draft, Program, Request, reply_xid};
use crate::rpc::record::RecordDecoder;
use crate::rpc::table::{CallTable, Health, Traffic};
use crate::rpc::xdr::DecodeError;

/// How long to wait for a TCP connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after a failed connection; doubles up to [`BACK_OFF_AT_MOST`].
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_AT_MOST: Duration = Duration::from_secs(5);
/// How long a connection without calls is kept, at least; twice that at most. It holds one of some
/// 360 source ports that a host has for a server, and a host may have more volumes than that.
const IDLE: Duration = Duration::from_secs(15);
/// What one read asks for at least. What it holds of the next large record has to be copied, so
/// it stays far below a megabyte; many small replies still come in with one system call.
const READ_AHEAD: usize = 16 * 1024;
/// What one write gathers at most: beyond this, system calls cost little in comparison.
const BATCH_BYTES: usize = 1 << 20;
const BATCH_CHUNKS: usize = 64;

/// What ends a call in the table.
#[derive(Debug)]
pub(super) enum Outcome {
    Reply { record: Bytes, retransmitted: bool },
    TimedOut,
    Closed,
    Malformed(DecodeError),
}

type Table = CallTable<oneshot::Sender<Outcome>>;

thread_local! {
    /// Calls made on this thread are sent by it, a little later.
    static GATHERING: Cell<bool> = const { Cell::new(false) };
}

/// While it lives, the calls that this thread makes stay queued until [`Lane::flush`].
pub(super) struct Gathering(());

impl Gathering {
    pub(super) fn start() -> Self {
        GATHERING.set(true);
        Self(())
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        GATHERING.set(false);
    }
}

/// The part of a connection that its callers and its task share.
#[derive(Debug)]
pub(super) struct Lane {
    table: Mutex<Table>,
    /// While a connection stands.
    outlet: Mutex<Option<Outlet>>,
    /// Something was queued.
    work: Notify,
    /// The timer would fire too late.
    timer: Notify,
    /// The connection is to be given up.
    reset: Notify,
    /// A NULL call is to be sent.
    probe: AtomicBool,
    /// Connecting fails at present.
    troubled: AtomicBool,
    /// What ended the last connection, or the last attempt at one.
    last_error: Mutex<Option<String>>,
}

impl Lane {
    pub(super) fn new() -> Self {
        Self {
            table: Mutex::new(CallTable::new(now())),
            outlet: Mutex::new(None),
            work: Notify::new(),
            timer: Notify::new(),
            reset: Notify::new(),
            probe: AtomicBool::new(false),
            troubled: AtomicBool::new(false),
            last_error: Mutex::new(None),
        }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // No code that holds the lock panics; if it did, the table would still be whole.
        self.table.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Queues a call and returns the xid under which it will be known.
    pub(super) fn submit(
        &self,
        xids: &AtomicU32,
        draft: Draft,
        deadline: Option<Instant>,
        slot: oneshot::Sender<Outcome>,
    ) -> u32 {
        let mut table = self.table();
        let mut xid = xids.fetch_add(1, Ordering::Relaxed);
        while table.contains(xid) {
            xid = xids.fetch_add(1, Ordering::Relaxed);
        }
        let sooner = table.insert(xid, draft, deadline, slot);
        drop(table);
        if sooner {
            self.timer.notify_one();
        }
        if !GATHERING.get() {
            self.work.notify_one();
        }
        xid
    }

    fn outlet(&self) -> MutexGuard<'_, Option<Outlet>> {
        self.outlet.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Sends what is queued from this thread, if that needs no waiting; else the task will.
    pub(super) fn flush(&self) {
        while self.table().has_queued() {
            let mut outlet = match self.outlet.try_lock() {
                Ok(outlet) => outlet,
                Err(TryLockError::Poisoned(e)) => e.into_inner(),
                // Whoever holds it looks for queued calls again.
                Err(TryLockError::WouldBlock) => return,
            };
            match outlet.as_mut() {
                Some(outlet) if outlet.left_to_task => return,
                Some(outlet) => {
                    let mut nobody = Context::from_waker(Waker::noop());
                    match outlet.poll_send(&self.table, &mut nobody) {
                        Poll::Ready(Ok(())) => continue,
                        Poll::Ready(Err(e)) => outlet.failed = Some(e),
                        Poll::Pending => {}
                    }
                    outlet.left_to_task = true;
                }
                None => {}
            }
            drop(outlet);
            self.work.notify_one();
            return;
        }
    }

    /// Sends what is queued; pending while the connection takes no more.
    fn poll_send(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            {
                let mut outlet = self.outlet();
                let Some(outlet) = outlet.as_mut() else {
                    return Poll::Pending;
                };
                if let Some(e) = outlet.failed.take() {
                    return Poll::Ready(Err(e));
                }
                outlet.left_to_task = true;
                ready!(outlet.poll_send(&self.table, cx))?;
                outlet.left_to_task = false;
            }
            if !self.table().has_queued() {
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// Forgets one call, whose caller has gone.
    pub(super) fn forget(&self, xid: u32) {
        let _ = self.table().forget(xid);
    }

    /// Whether connecting fails at present, and the work ahead in bytes: the less the better.
    pub(super) fn load(&self) -> (bool, usize) {
        (self.troubled.load(Ordering::Relaxed), self.table().weight())
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.table().traffic()
    }

    /// Ends all calls.
    pub(super) fn close(&self) {
        let waiting = self.table().drain();
        for slot in waiting {
            let _ = slot.send(Outcome::Closed);
        }
    }

    fn set_error(&self, error: Option<String>) {
        *self.last_error.lock().unwrap_or_else(|e| e.into_inner()) = error;
    }

    pub(super) fn error(&self) -> Option<String> {
        let last = self.last_error.lock().unwrap_or_else(|e| e.into_inner());
        last.clone()
    }
}

/// The clock of the runtime, which a simulation sets.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// The task of a lane.
pub(super) struct Driver<C> {
    pub(super) lane: Arc<Lane>,
    pub(super) connector: Arc<C>,
    pub(super) xids: Arc<AtomicU32>,
    pub(super) addr: SocketAddr,
    pub(super) program: Program,
    pub(super) index: usize,
}

impl<C: Connector> Driver<C> {
    pub(super) async fn run(self) {
        tokio::join!(self.clock(), self.connections());
    }

    /// Enforces deadlines, whatever the connection does.
    async fn clock(&self) {
        loop {
            let wake = self.lane.table().wake_at(now());
            match wake {
                None => self.lane.timer.notified().await,
                Some(at) => {
                    tokio::select! {
                        biased;
                        () = self.lane.timer.notified() => {}
                        () = tokio::time::sleep_until(at.into()) => {}
                    }
                }
            }
            let (late, health) = self.lane.table().poll(now());
            for slot in late {
                let _ = slot.send(Outcome::TimedOut);
            }
            match health {
                Health::Good if self.lane.table().has_queued() => self.lane.work.notify_one(),
                Health::Good => {}
                Health::Probe => {
                    self.lane.probe.store(true, Ordering::Relaxed);
                    self.lane.work.notify_one();
                }
                Health::Dead => self.lane.reset.notify_waiters(),
            }
        }
    }

    /// Connects while there are calls, again and again.
    async fn connections(&self) {
        let mut pause = Duration::ZERO;
        loop {
            while self.lane.table().is_empty() {
                self.lane.work.notified().await;
            }
            tokio::time::sleep(pause).await;
            let connecting = self.connector.connect(self.addr, self.index);
            let end = match tokio::time::timeout(CONNECT_TIMEOUT, connecting).await {
                Ok(Ok((reader, writer))) => {
                    self.lane.troubled.store(false, Ordering::Relaxed);
                    let end = self.serve(reader, writer).await;
                    let mut table = self.lane.table();
                    if table.disconnected() || table.is_empty() {
                        pause = Duration::ZERO;
                        continue;
                    }
                    end
                }
                Ok(Err(e)) => e,
                Err(_) => io::Error::new(io::ErrorKind::TimedOut, "no answer to the connection"),
            };
            tracing::debug!(server = %self.addr, lane = self.index, error = %end, "no connection");
            self.lane.troubled.store(true, Ordering::Relaxed);
            self.lane.set_error(Some(end.to_string()));
            pause = (pause * 2).clamp(BACK_OFF, BACK_OFF_AT_MOST);
        }
    }

    /// Runs a connection until it ends, and says why it did.
    async fn serve(&self, reader: C::Reader, writer: C::Writer) -> io::Error {
        self.lane.probe.store(false, Ordering::Relaxed);
        self.lane.table().connected(now());
        let _open = Open::new(&self.lane, writer);
        // In this order, so that simulations repeat themselves, and with writing first: a task may do so
        // much I/O before it has to give way, and replies without end would use that up each time.
        // Calls do not, since their callers wait for the replies.
        let mut reading = pin!(self.read(reader));
        let end = tokio::select! {
            biased;
            end = self.write() => {
                if !mutant::is_on(Mutant::WriteErrorsLoseReplies) {
                    // What is answered already is not to be asked again: a RENAME would find nothing.
                    // Reads what has arrived, as far as a turn of its own goes.
                    tokio::task::yield_now().await;
                    let _ = poll_fn(|cx| Poll::Ready(reading.as_mut().poll(cx))).await;
                }
                end
            }
            end = &mut reading => end,
            () = self.idle() => {
                Err(io::Error::new(io::ErrorKind::ConnectionAborted, "nothing to do"))
            }
            () = self.lane.reset.notified() => {
                Err(io::Error::new(io::ErrorKind::TimedOut, "the server has gone silent"))
            }
        };
        match end {
            Ok(never) => match never {},
            Err(e) => e,
        }
    }

    /// Ends when there has been nothing to do for a while; nothing is sent any more then.
    async fn idle(&self) {
        loop {
            let made = self.lane.table().made();
            tokio::time::sleep(IDLE).await;
            // Whoever sends holds the outlet, so no call goes out between this look and the end.
            let mut outlet = self.lane.outlet();
            let table = self.lane.table();
            if table.is_empty() && table.made() == made && !mutant::is_on(Mutant::IdleStaysOpen) {
                *outlet = None;
                return;
            }
        }
    }

    async fn write(&self) -> io::Result<Infallible> {
        loop {
            if self.lane.probe.swap(false, Ordering::Relaxed)
                && let Some(outlet) = self.lane.outlet().as_mut()
            {
                let xid = self.xids.fetch_add(1, Ordering::Relaxed);
                let null = Draft::new(self.program, 0, None, |_| {}).seal(xid);
                outlet.batch.push(&null);
            }
            poll_fn(|cx| self.lane.poll_send(cx)).await?;
            self.lane.work.notified().await;
        }
    }

    async fn read(&self, mut reader: C::Reader) -> io::Result<Infallible> {
        let mut buffer = BytesMut::new();
        let mut decoder = RecordDecoder::new(MAX_RECORD);
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(record)) => self.deliver(record)?,
                Ok(None) => {
                    // A large record is read exactly to its end, so that nothing of the next one
                    // has to move.
                    let wanted = match decoder.missing() {
                        missing if missing > READ_AHEAD => missing,
                        _ => READ_AHEAD,
                    };
                    buffer.reserve(wanted);
                    let mut room = (&mut buffer).limit(wanted);
                    if reader.read_buf(&mut room).await? == 0 {
                        return Err(io::Error::new(
                            io::ErrorKind::UnexpectedEof,
                            "the server closed the connection",
                        ));
                    }
                    self.lane.table().heard(now());
                }
                Err(e) => {
                    let waiting = self.lane.table().reply(e.xid);
                    if let Some(call) = waiting {
                        let _ = call.slot.send(Outcome::Malformed(DecodeError::TooLong {
                            what: "a record",
                            length: e.length,
                            limit: e.limit,
                        }));
                    }
                    return Err(io::Error::new(io::ErrorKind::InvalidData, e));
                }
            }
        }
    }

    fn deliver(&self, record: Bytes) -> io::Result<()> {
        let Some(xid) = reply_xid(&record) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the server sent something that is no reply",
            ));
        };
        //= 5531-9-xid: “The xid of a REPLY message always matches that of the initiating CALL
        //= message.”
        let waiting = self.lane.table().reply(xid);
        if let Some(call) = waiting {
            let _ = call.slot.send(Outcome::Reply {
                record,
                retransmitted: call.retransmitted,
            });
        }
        Ok(())
    }
}

/// The sending end of a connection.
struct Outlet {
    writer: Pin<Box<dyn AsyncWrite + Send>>,
    batch: Batch,
    /// The task waits until the connection takes more, or has to see why it failed.
    left_to_task: bool,
    failed: Option<io::Error>,
}

impl std::fmt::Debug for Outlet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outlet")
            .field("left_to_task", &self.left_to_task)
            .finish_non_exhaustive()
    }
}

impl Outlet {
    fn poll_send(&mut self, table: &Mutex<Table>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            {
                let mut table = table.lock().unwrap_or_else(|e| e.into_inner());
                let now = now();
                while self.batch.has_room()
                    && let Some(request) = table.next_to_send(now)
                {
                    self.batch.push(&request);
                }
            }
            if !self.batch.has_remaining() {
                return Poll::Ready(Ok(()));
            }
            let mut slices = [IoSlice::new(&[]); BATCH_CHUNKS];
            let filled = self.batch.chunks_vectored(&mut slices);
            let writing = self.writer.as_mut();
            let written = ready!(writing.poll_write_vectored(cx, &slices[..filled]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.batch.advance(written);
        }
    }
}

/// Keeps the outlet in its lane; the connection closes with it.
struct Open<'a>(&'a Lane);

impl<'a> Open<'a> {
    fn new(lane: &'a Lane, writer: impl AsyncWrite + Send + 'static) -> Self {
        *lane.outlet() = Some(Outlet {
            writer: Box::pin(writer),
            batch: Batch::default(),
            left_to_task: false,
            failed: None,
        });
        Self(lane)
    }
}

impl Drop for Open<'_> {
    fn drop(&mut self) {
        let outlet = self.0.outlet().take();
        drop(outlet);
    }
}

/// Calls on their way to the socket, as slices of their own memory.
#[derive(Debug, Default)]
struct Batch {
    chunks: VecDeque<Bytes>,
    bytes: usize,
}

impl Batch {
    fn push(&mut self, request: &Request) {
        self.bytes += request.len();
        self.chunks.extend(request.chunks());
    }

    fn has_room(&self) -> bool {
        self.bytes < BATCH_BYTES && self.chunks.len() < BATCH_CHUNKS
    }
}

impl Buf for Batch {
    fn remaining(&self) -> usize {
        self.bytes
    }

    fn chunk(&self) -> &[u8] {
        self.chunks.front().map_or(&[], AsRef::as_ref)
    }

    fn advance(&mut self, mut count: usize) {
        self.bytes -= count;
        while let Some(first) = self.chunks.front_mut() {
            if count < first.len() {
                first.advance(count);
                return;
            }
            count -= first.len();
            self.chunks.pop_front();
        }
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for (slice, chunk) in slices.iter_mut().zip(&self.chunks) {
            *slice = IoSlice::new(chunk);
            filled += 1;
        }
        filled
    }
}
