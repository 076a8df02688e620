//! The transport and the client against servers whose every byte the test decides, in memory and
//! with the clock of the test.

use std::collections::HashSet;
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use nfs3_types::nfs3::nfsstat3;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf, ReadHalf, WriteHalf, duplex,
    split,
};
use tokio::sync::mpsc;

use super::*;
use crate::mutant::{self, Mutant};
use crate::rpc::nfs3::{FileHandle, How, Nfs3, NfsError, SetAttr, Stable};
use crate::rpc::xdr::Encoder;
use crate::rpc::{Cred, RpcError};

/// Hands the other end of each connection to the test, which is the server.
struct InMemory(mpsc::UnboundedSender<DuplexStream>);

impl Connector for InMemory {
    type Reader = ReadHalf<DuplexStream>;
    type Writer = WriteHalf<DuplexStream>;

    async fn connect(&self, _: SocketAddr, _: usize) -> io::Result<(Self::Reader, Self::Writer)> {
        let (client, server) = duplex(64 * 1024);
        let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
        self.0.send(server).map_err(refused)?;
        Ok(split(client))
    }
}

struct Server(mpsc::UnboundedReceiver<DuplexStream>);

impl Server {
    async fn accept(&mut self) -> Peer {
        Peer(self.0.recv().await.expect("the client holds the sender"))
    }
}

/// A call as the server sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    xid: u32,
    procedure: u32,
    /// All behind the credential and the verifier.
    arguments: Bytes,
}

/// The server's end of a connection.
struct Peer(DuplexStream);

impl Peer {
    /// The next call; `None` when the client has gone.
    async fn next(&mut self) -> Option<Seen> {
        let mark = self.0.read_u32().await.ok()?;
        //= test 5531-11-one-record
        assert!(mark & 0x8000_0000 != 0, "calls come in one fragment");
        let mut record = vec![0; (mark & 0x7fff_ffff) as usize];
        self.0.read_exact(&mut record).await.ok()?;
        let mut d = Decoder::new(record.into());
        let xid = d.u32().unwrap();
        //= test 5531-9-rpcvers
        let header = [(); 4].map(|()| d.u32().unwrap());
        assert_eq!(header, [0, 2, 100_003, 3]);
        let procedure = d.u32().unwrap();
        for _ in ["credential", "verifier"] {
            d.u32().unwrap();
            d.opaque("auth", 400).unwrap();
        }
        let arguments = d.take();
        Some(Seen {
            xid,
            procedure,
            arguments,
        })
    }

    async fn call(&mut self) -> Seen {
        self.next().await.expect("a call")
    }

    /// Answers with a status and what follows it.
    async fn answer(&mut self, call: &Seen, status: u32, results: &[u8]) {
        let mut record = accepted(call.xid);
        record.extend_from_slice(&status.to_be_bytes());
        record.extend_from_slice(results);
        self.fragments(&record, &[]).await;
    }

    /// Sends a record, cut at the given lengths.
    async fn fragments(&mut self, mut record: &[u8], cuts: &[usize]) {
        for cut in cuts {
            let (now, later) = record.split_at(*cut);
            self.raw(&u32::try_from(now.len()).unwrap().to_be_bytes())
                .await;
            self.raw(now).await;
            record = later;
        }
        let mark = u32::try_from(record.len()).unwrap() | 0x8000_0000;
        self.raw(&mark.to_be_bytes()).await;
        self.raw(record).await;
    }

    async fn raw(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).await.expect("the client reads");
    }
}

/// The header of a reply that was accepted, up to the results.
fn accepted(xid: u32) -> Vec<u8> {
    [xid, 1, 0, 0, 0, 0]
        .iter()
        .flat_map(|n| n.to_be_bytes())
        .collect()
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|n| n.to_be_bytes()).collect()
}

fn start(change: impl FnOnce(&mut Settings)) -> (Nfs3, Server) {
    let mut settings = Settings::new(([192, 0, 2, 1], 2049).into());
    change(&mut settings);
    let (sender, receiver) = mpsc::unbounded_channel();
    let client = Nfs3::over(&settings, InMemory(sender)).unwrap();
    (client, Server(receiver))
}

fn file() -> FileHandle {
    FileHandle::new(b"a file").unwrap()
}

/// READLINK, as a small call whose answer is easy to tell from others.
fn readlink(nfs: &Nfs3) -> JoinHandle<Result<Bytes, NfsError>> {
    let nfs = nfs.clone();
    tokio::spawn(async move {
        let link = nfs.readlink(&Cred::root(), &file()).await?;
        Ok(link.target)
    })
}

/// The results of READLINK.
fn target(number: u8) -> Vec<u8> {
    let mut results = words(&[0, 1]);
    results.extend_from_slice(&[number, 0, 0, 0]);
    results
}

//= test 5531-9-xid
#[tokio::test(start_paused = true)]
async fn replies_find_their_callers_in_any_order() {
    let (nfs, mut server) = start(|_| {});
    let calls = [readlink(&nfs), readlink(&nfs), readlink(&nfs)];
    let mut peer = server.accept().await;
    let seen = [peer.call().await, peer.call().await, peer.call().await];
    for n in [2, 0, 1] {
        peer.answer(&seen[usize::from(n)], 0, &target(n)).await;
    }
    for (n, call) in (0u8..).zip(calls) {
        assert_eq!(call.await.unwrap().unwrap().as_ref(), [n]);
    }
}

#[tokio::test(start_paused = true)]
async fn dropping_a_call_forgets_that_call_only() {
    let (nfs, mut server) = start(|_| {});
    let (dropped, kept) = (readlink(&nfs), readlink(&nfs));
    let mut peer = server.accept().await;
    let seen = [peer.call().await, peer.call().await];
    dropped.abort();
    assert!(dropped.await.unwrap_err().is_cancelled());
    peer.answer(&seen[0], 0, &target(1)).await;
    peer.answer(&seen[1], 0, &target(2)).await;
    assert_eq!(kept.await.unwrap().unwrap().as_ref(), [2]);
    let next = readlink(&nfs);
    let call = peer.call().await;
    peer.answer(&call, 0, &target(3)).await;
    assert_eq!(next.await.unwrap().unwrap().as_ref(), [3]);
}

//= test 5531-5-repeat
#[tokio::test(start_paused = true)]
async fn after_a_lost_connection_calls_are_repeated_under_their_xids() {
    let (nfs, mut server) = start(|_| {});
    let calls = [readlink(&nfs), readlink(&nfs)];
    let mut peer = server.accept().await;
    let first = [peer.call().await, peer.call().await];
    drop(peer);
    let mut peer = server.accept().await;
    let second = [peer.call().await, peer.call().await];
    assert_eq!(first, second);
    for (n, call) in (0..).zip(&second) {
        peer.answer(call, 0, &target(n)).await;
    }
    for (n, call) in (0u8..).zip(calls) {
        assert_eq!(call.await.unwrap().unwrap().as_ref(), [n]);
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_answered_when_a_connection_takes_no_more_calls_is_not_asked_again() {
    for fault in [None, Some(Mutant::WriteErrorsLoseReplies)] {
        let _back = fault.map(mutant::put_back);
        let (nfs, mut server) = start(|_| {});
        let answered = readlink(&nfs);
        let mut peer = server.accept().await;
        let first = peer.call().await;
        // The client's task sees all of this at once: an answer, another call, and nobody to take it.
        peer.answer(&first, 0, &target(1)).await;
        drop(peer);
        let (cred, link) = (Cred::root(), file());
        let mut other = pin!(nfs.readlink(&cred, &link));
        begin(other.as_mut());
        let mut peer = server.accept().await;
        let next = peer.call().await;
        assert_eq!(next.xid == first.xid, fault.is_some());
        peer.answer(&next, 0, &target(1)).await;
        assert_eq!(answered.await.unwrap().unwrap().as_ref(), [1]);
    }
}

#[tokio::test(start_paused = true)]
async fn a_connection_without_calls_is_closed_and_the_next_call_opens_another() {
    let answered = async |nfs: &Nfs3, peer: &mut Peer| {
        let call = readlink(nfs);
        let seen = peer.call().await;
        peer.answer(&seen, 0, &target(1)).await;
        assert_eq!(call.await.unwrap().unwrap().as_ref(), [1]);
    };
    let (nfs, mut server) = start(|_| {});
    let first = readlink(&nfs);
    let mut peer = server.accept().await;
    let seen = peer.call().await;
    peer.answer(&seen, 0, &target(2)).await;
    assert_eq!(first.await.unwrap().unwrap().as_ref(), [2]);
    for _ in 0..4 {
        tokio::time::sleep(Duration::from_secs(14)).await;
        answered(&nfs, &mut peer).await;
    }
    tokio::time::sleep(Duration::from_secs(31)).await;
    assert_eq!(peer.next().await, None, "closed");
    let call = readlink(&nfs);
    let mut peer = server.accept().await;
    let seen = peer.call().await;
    peer.answer(&seen, 0, &target(3)).await;
    assert_eq!(call.await.unwrap().unwrap().as_ref(), [3]);
    assert_eq!(nfs.traffic().repeated, 0);

    let _back = mutant::put_back(Mutant::IdleStaysOpen);
    tokio::time::sleep(Duration::from_secs(100)).await;
    answered(&nfs, &mut peer).await;
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_costs_its_connection_and_the_call_its_deadline() {
    let (nfs, mut server) = start(|s| s.io_timeout = Some(Duration::from_secs(20)));
    let begin = tokio::time::Instant::now();
    let call = readlink(&nfs);
    let mut silent = server.accept().await;
    let first = silent.call().await;
    assert_eq!(silent.call().await.procedure, 0, "a probe");
    let mut next = server.accept().await;
    assert_eq!(begin.elapsed().as_secs(), 15);
    assert_eq!(next.call().await, first);
    assert_eq!(silent.call().await.procedure, 0, "the second probe");
    assert_eq!(silent.next().await, None, "the client gave it up");
    let error = call.await.unwrap().unwrap_err();
    assert!(matches!(error, NfsError::Rpc(RpcError::TimedOut { .. })));
    assert_eq!(error.errno(), libc::ETIMEDOUT);
    assert_eq!(begin.elapsed().as_secs(), 20);
}

#[tokio::test(start_paused = true)]
async fn without_a_server_a_call_ends_at_its_deadline_and_says_why() {
    let (nfs, server) = start(|s| s.io_timeout = Some(Duration::from_secs(3)));
    drop(server);
    let begin = tokio::time::Instant::now();
    let error = readlink(&nfs).await.unwrap().unwrap_err();
    assert_eq!(begin.elapsed().as_secs(), 3);
    assert!(error.to_string().contains("connection refused"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn without_a_deadline_a_call_outlasts_any_outage() {
    let (nfs, mut server) = start(|s| s.io_timeout = None);
    let call = readlink(&nfs);
    for _ in 0..50 {
        let mut peer = server.accept().await;
        peer.call().await;
    }
    tokio::time::sleep(Duration::from_secs(10_000)).await;
    while let Ok(peer) = server.0.try_recv() {
        drop(peer);
    }
    let mut peer = server.accept().await;
    let seen = peer.call().await;
    peer.answer(&seen, 0, &target(4)).await;
    assert_eq!(call.await.unwrap().unwrap().as_ref(), [4]);
}

#[tokio::test(start_paused = true)]
async fn a_record_over_the_cap_fails_its_call_and_loses_the_connection_for_the_others() {
    let (nfs, mut server) = start(|_| {});
    let (bad, good) = (readlink(&nfs), readlink(&nfs));
    let mut peer = server.accept().await;
    let seen = [peer.call().await, peer.call().await];
    peer.raw(&0xffff_ffff_u32.to_be_bytes()).await;
    peer.raw(&seen[0].xid.to_be_bytes()).await;
    let error = bad.await.unwrap().unwrap_err();
    assert!(matches!(error, NfsError::Rpc(RpcError::Protocol { .. })));
    assert_eq!(error.errno(), libc::EIO);
    let mut peer = server.accept().await;
    assert_eq!(peer.call().await, seen[1]);
    peer.answer(&seen[1], 0, &target(9)).await;
    assert_eq!(good.await.unwrap().unwrap().as_ref(), [9]);
}

//= test 5531-9-reply
#[tokio::test(start_paused = true)]
async fn what_is_no_reply_loses_the_connection() {
    let (nfs, mut server) = start(|_| {});
    let call = readlink(&nfs);
    let mut peer = server.accept().await;
    let seen = peer.call().await;
    peer.fragments(&words(&[seen.xid, 0, 2, 100_003]), &[])
        .await;
    let mut peer = server.accept().await;
    assert_eq!(peer.call().await, seen);
    peer.answer(&seen, 0, &target(1)).await;
    assert!(call.await.unwrap().is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_malformed_reply_fails_its_call_and_keeps_the_connection() {
    let (nfs, mut server) = start(|_| {});
    let mut peer = {
        let call = readlink(&nfs);
        let mut peer = server.accept().await;
        let seen = peer.call().await;
        // A target of 4 GiB in a record of a few bytes.
        peer.answer(&seen, 0, &words(&[0, u32::MAX])).await;
        assert_eq!(call.await.unwrap().unwrap_err().errno(), libc::EIO);
        peer
    };
    for (status, errno) in [(2, libc::ENOENT), (70, libc::ESTALE), (4711, libc::EIO)] {
        let call = readlink(&nfs);
        let seen = peer.call().await;
        peer.answer(&seen, status, &words(&[0])).await;
        assert_eq!(call.await.unwrap().unwrap_err().errno(), errno);
    }
    let call = readlink(&nfs);
    let seen = peer.call().await;
    let denied = words(&[seen.xid, 1, 1, 1, 5]);
    peer.fragments(&denied, &[]).await;
    assert_eq!(call.await.unwrap().unwrap_err().errno(), libc::EACCES);
}

//= test 4506-3-padding
#[tokio::test(start_paused = true)]
async fn data_arrives_whole_in_both_directions() {
    let (nfs, mut server) = start(|_| {});
    let data: Bytes = (0u32..300_001).map(|n| (n % 251) as u8).collect();
    let writing = tokio::spawn({
        let (nfs, data) = (nfs.clone(), data.clone());
        async move {
            let cred = Cred::root();
            nfs.write(&cred, &file(), 7, data, Stable::Unstable).await
        }
    });
    let mut peer = server.accept().await;
    let call = peer.call().await;
    let mut arguments = Decoder::new(call.arguments.clone());
    assert_eq!(arguments.opaque("handle", 64).unwrap(), file().as_bytes());
    assert_eq!(arguments.u64(), Ok(7));
    assert_eq!(arguments.u32(), Ok(300_001));
    assert_eq!(arguments.u32(), Ok(0));
    assert_eq!(arguments.opaque("data", usize::MAX).unwrap(), data);
    assert_eq!(arguments.remaining(), 0);
    peer.answer(&call, 0, &words(&[0, 0, 300_001, 2, 5, 6]))
        .await;
    let written = writing.await.unwrap().unwrap();
    assert_eq!(written.committed, Stable::FileSync);
    assert_eq!(written.verf, [0, 0, 0, 5, 0, 0, 0, 6]);

    for cuts in [&[][..], &[1, 4, 30, 100_000, 0, 65_536]] {
        let reading = tokio::spawn({
            let nfs = nfs.clone();
            async move { nfs.read(&Cred::root(), &file(), 7, 1 << 20).await }
        });
        let call = peer.call().await;
        let mut record = accepted(call.xid);
        record.extend(words(&[0, 0, 300_001, 1, 300_001]));
        record.extend_from_slice(&data);
        record.extend_from_slice(&[0; 3]);
        peer.fragments(&record, cuts).await;
        let read = reading.await.unwrap().unwrap();
        assert!(read.eof && read.data == data);
    }
}

#[tokio::test(start_paused = true)]
async fn more_data_than_was_asked_for_is_refused() {
    let (nfs, mut server) = start(|_| {});
    let reading = tokio::spawn(async move { nfs.read(&Cred::root(), &file(), 0, 4).await });
    let mut peer = server.accept().await;
    let call = peer.call().await;
    peer.answer(&call, 0, &words(&[0, 8, 1, 8, 1, 2])).await;
    assert_eq!(reading.await.unwrap().unwrap_err().errno(), libc::EIO);
}

//= test 1813-2.6-jukebox
#[tokio::test(start_paused = true)]
async fn jukebox_is_tried_again_as_a_new_call_until_the_deadline() {
    const JUKEBOX: u32 = 10_008;
    let (nfs, mut server) = start(|s| s.io_timeout = Some(Duration::from_secs(30)));
    let call = readlink(&nfs);
    let mut peer = server.accept().await;
    let mut xids = HashSet::new();
    for _ in 0..4 {
        let seen = peer.call().await;
        assert!(xids.insert(seen.xid), "the old answer would come back");
        peer.answer(&seen, JUKEBOX, &words(&[0])).await;
    }
    let seen = peer.call().await;
    peer.answer(&seen, 0, &target(5)).await;
    assert_eq!(call.await.unwrap().unwrap().as_ref(), [5]);

    let begin = tokio::time::Instant::now();
    let call = readlink(&nfs);
    let answers = tokio::spawn(async move {
        while let Some(seen) = peer.next().await {
            peer.answer(&seen, JUKEBOX, &words(&[0])).await;
        }
    });
    assert_eq!(call.await.unwrap().unwrap_err().errno(), libc::ETIMEDOUT);
    assert!((20..=30).contains(&begin.elapsed().as_secs()));
    answers.abort();
}

#[tokio::test(start_paused = true)]
async fn calls_in_flight_are_capped_and_served_in_turn() {
    let (nfs, mut server) = start(|s| s.max_inflight = 3);
    let calls: Vec<_> = (0..10).map(|_| readlink(&nfs)).collect();
    let mut peer = server.accept().await;
    let mut waiting = Vec::new();
    for n in 0..10 {
        while let Ok(Some(seen)) =
            tokio::time::timeout(Duration::from_millis(10), peer.next()).await
        {
            waiting.push(seen);
        }
        assert_eq!(waiting.len(), 3.min(10 - usize::from(n)));
        peer.answer(&waiting.remove(0), 0, &target(n)).await;
    }
    for (n, call) in (0u8..).zip(calls) {
        assert_eq!(call.await.unwrap().unwrap().as_ref(), [n]);
    }
}

#[tokio::test(start_paused = true)]
async fn closing_ends_all_calls_at_once() {
    let (nfs, mut server) = start(|s| {
        s.io_timeout = None;
        s.max_inflight = 1;
    });
    let (sent, waiting) = (readlink(&nfs), readlink(&nfs));
    let mut peer = server.accept().await;
    peer.call().await;
    nfs.close();
    for call in [sent, waiting, readlink(&nfs)] {
        assert_eq!(call.await.unwrap().unwrap_err().errno(), libc::ENOTCONN);
    }
    assert_eq!(peer.next().await, None);
}

#[tokio::test(start_paused = true)]
async fn several_connections_share_the_load_and_one_suffices_for_little() {
    let (nfs, mut server) = start(|s| s.nconnect = 4);
    for n in 0..3 {
        let call = readlink(&nfs);
        let mut peer = server.accept().await;
        let seen = peer.call().await;
        peer.answer(&seen, 0, &target(n)).await;
        call.await.unwrap().unwrap();
        drop(peer);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(server.0.try_recv().is_err(), "one connection is enough");
    }
    let reads: Vec<_> = (0..4)
        .map(|n| {
            let nfs = nfs.clone();
            tokio::spawn(async move { nfs.read(&Cred::root(), &file(), n, 1 << 20).await })
        })
        .collect();
    for _ in 0..4 {
        let mut peer = server.accept().await;
        let call = peer.call().await;
        peer.answer(&call, 0, &words(&[0, 4, 1, 4, 1])).await;
        tokio::spawn(async move { peer.next().await });
    }
    for read in reads {
        assert_eq!(read.await.unwrap().unwrap().data.len(), 4);
    }
}

/// Polls a call once, as a thread outside the runtime does; it has to wait.
fn begin<F: Future>(call: Pin<&mut F>) {
    let polled = call.poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending());
}

/// A client whose first connection stands, and its server's end.
async fn connected() -> (Nfs3, Peer) {
    let (nfs, mut server) = start(|_| {});
    let call = readlink(&nfs);
    let mut peer = server.accept().await;
    let seen = peer.call().await;
    peer.answer(&seen, 0, &target(0)).await;
    call.await.unwrap().unwrap();
    (nfs, peer)
}

#[tokio::test(start_paused = true)]
async fn gathered_calls_are_sent_before_any_task_runs() {
    let (nfs, mut peer) = connected().await;
    let (cred, link) = (Cred::root(), file());
    let mut calls = [(); 3].map(|()| Box::pin(nfs.readlink(&cred, &link)));
    nfs.gather(|| {
        for call in &mut calls {
            begin(call.as_mut());
        }
    });
    // Nothing was awaited in between.
    let mut bytes = [0; 4096];
    let mut sent = ReadBuf::new(&mut bytes);
    let mut context = Context::from_waker(Waker::noop());
    let read = Pin::new(&mut peer.0).poll_read(&mut context, &mut sent);
    assert!(matches!(read, Poll::Ready(Ok(()))));
    let length = sent.filled().len() / calls.len();
    for (n, record) in (0u8..).zip(sent.filled().chunks(length)) {
        let seen = Seen {
            xid: u32::from_be_bytes(record[4..8].try_into().unwrap()),
            procedure: 5,
            arguments: Bytes::new(),
        };
        peer.answer(&seen, 0, &target(n)).await;
    }
    for (n, call) in (0u8..).zip(calls) {
        assert_eq!(call.await.unwrap().target.as_ref(), [n]);
    }
}

#[tokio::test(start_paused = true)]
async fn gathered_calls_that_do_not_fit_are_sent_when_they_do() {
    let (nfs, mut peer) = connected().await;
    let start = tokio::time::Instant::now();
    let (cred, file) = (Cred::root(), file());
    let data = Bytes::from(vec![7; MAX_IO as usize]);
    let mut large = pin!(nfs.write(&cred, &file, 0, data.clone(), Stable::Unstable));
    let mut small = [(); 2].map(|()| Box::pin(nfs.readlink(&cred, &file)));
    nfs.gather(|| begin(large.as_mut()));
    for call in &mut small {
        // The connection is full.
        nfs.gather(|| begin(call.as_mut()));
    }
    let seen = peer.call().await;
    assert!(seen.arguments.ends_with(&data));
    let mut written = words(&[0, 0, MAX_IO, 0]);
    written.extend_from_slice(&[1; 8]);
    peer.answer(&seen, 0, &written).await;
    assert_eq!(large.await.unwrap().count, MAX_IO);
    for (n, call) in (0u8..).zip(small) {
        let seen = peer.call().await;
        peer.answer(&seen, 0, &target(n)).await;
        assert_eq!(call.await.unwrap().target.as_ref(), [n]);
    }
    assert!(start.elapsed().is_zero(), "only a timer sent them");
}

#[tokio::test(start_paused = true)]
async fn gathered_calls_wait_for_a_connection_like_others() {
    let (nfs, mut server) = start(|_| {});
    let (cred, link) = (Cred::root(), file());
    let mut call = pin!(nfs.readlink(&cred, &link));
    nfs.gather(|| begin(call.as_mut()));
    for lost in [true, false] {
        let mut peer = server.accept().await;
        let seen = peer.call().await;
        if !lost {
            peer.answer(&seen, 0, &target(9)).await;
            assert_eq!(call.as_mut().await.unwrap().target.as_ref(), [9]);
            return;
        }
    }
}

/// Answers a call whose first copy is lost with its connection: the second copy by the first of
/// `answers` (procedure, status, results), what the client asks then by the others.
async fn after_a_loss<T>(
    call: impl AsyncFnOnce(&Nfs3) -> Result<T, NfsError>,
    answers: &[(u32, nfsstat3, Vec<u8>)],
) -> Result<T, NfsError> {
    let (nfs, mut server) = start(|_| {});
    let serve = async {
        server.accept().await.call().await;
        let mut peer = server.accept().await;
        for (procedure, status, results) in answers {
            let seen = peer.call().await;
            assert_eq!(seen.procedure, *procedure);
            peer.answer(&seen, *status as u32, results).await;
        }
    };
    tokio::join!(call(&nfs), serve).0
}

/// The results of LOOKUP: a handle, and no attributes.
fn found(handle: &FileHandle) -> Vec<u8> {
    let mut encoder = Encoder {
        buf: BytesMut::new(),
    };
    encoder.opaque(handle.as_bytes()).u32(0).u32(0);
    encoder.buf.to_vec()
}

/// The answer to GETATTR of a file with this number.
fn numbered(fileid: u32) -> (u32, nfsstat3, Vec<u8>) {
    let mut attributes = [0; 21];
    (attributes[0], attributes[14]) = (1, fileid);
    (1, nfsstat3::NFS3_OK, words(&attributes))
}

//= test 1813-4.5-repeat
#[tokio::test(start_paused = true)]
async fn a_repeated_removal_that_finds_nothing_has_succeeded() {
    use nfsstat3::{NFS3ERR_NOENT, NFS3ERR_NOTEMPTY};
    let cred = Cred::root();
    let no_wcc = words(&[0, 0]);
    let gone = [(12, NFS3ERR_NOENT, no_wcc.clone())];
    let removed = after_a_loss(async |nfs| nfs.remove(&cred, &file(), b"x").await, &gone);
    assert!(removed.await.is_ok());
    let gone = [(13, NFS3ERR_NOENT, no_wcc.clone())];
    let removed = after_a_loss(async |nfs| nfs.rmdir(&cred, &file(), b"x").await, &gone);
    assert!(removed.await.is_ok());
    let full = [(13, NFS3ERR_NOTEMPTY, no_wcc)];
    let removed = after_a_loss(async |nfs| nfs.rmdir(&cred, &file(), b"x").await, &full);
    assert_eq!(
        removed.await,
        Err(NfsError::Status(NFS3ERR_NOTEMPTY)),
        "this is no consequence of the first call"
    );
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_finds_nothing_at_once_has_failed() {
    let (nfs, mut server) = start(|_| {});
    let removing = tokio::spawn(async move { nfs.remove(&Cred::root(), &file(), b"x").await });
    let mut peer = server.accept().await;
    let seen = peer.call().await;
    peer.answer(&seen, 2, &words(&[0, 0])).await;
    assert_eq!(
        removing.await.unwrap(),
        Err(NfsError::Status(nfsstat3::NFS3ERR_NOENT))
    );
}

//= test 1813-4.5-repeat
#[tokio::test(start_paused = true)]
async fn a_repeated_rename_is_settled_by_what_stands_at_the_new_name() {
    use nfsstat3::{NFS3_OK, NFS3ERR_NOENT};
    let cred = Cred::root();
    let (dir, moved, other) = (file(), FileHandle::new(b"moved"), FileHandle::new(b"other"));
    let rename = async |nfs: &Nfs3| {
        nfs.rename(&cred, (&dir, b"a"), (&dir, b"b"), moved.as_ref())
            .await
    };
    let first = (14, NFS3ERR_NOENT, words(&[0, 0, 0, 0]));
    let there = (3, NFS3_OK, found(&moved.unwrap()));
    assert!(after_a_loss(rename, &[first.clone(), there]).await.is_ok());
    let another = vec![
        (3, NFS3_OK, found(&other.unwrap())),
        numbered(8),
        numbered(7),
    ];
    let nothing = vec![(3, NFS3ERR_NOENT, words(&[0]))];
    for stands in [another, nothing] {
        let answers = [vec![first.clone()], stands].concat();
        let outcome = after_a_loss(rename, &answers).await;
        assert_eq!(outcome, Err(NfsError::Uncertain(NFS3ERR_NOENT)));
    }
}

//= test 1813-2.6-handles
#[tokio::test(start_paused = true)]
async fn a_file_with_two_handles_is_known_by_its_number() {
    use nfsstat3::{NFS3_OK, NFS3ERR_EXIST, NFS3ERR_NOENT};
    let cred = Cred::root();
    let (dir, object, again) = (
        file(),
        FileHandle::new(b"object"),
        FileHandle::new(b"again"),
    );
    let (object, again) = (object.unwrap(), again.unwrap());
    let there = [(3, NFS3_OK, found(&again)), numbered(7), numbered(7)];
    let link = async |nfs: &Nfs3| nfs.link(&cred, &object, &dir, b"n").await.map(drop);
    let linked = [&[(15, NFS3ERR_EXIST, words(&[0, 0, 0]))][..], &there].concat();
    let rename = async |nfs: &Nfs3| {
        let (from, to) = ((&dir, &b"a"[..]), (&dir, &b"b"[..]));
        nfs.rename(&cred, from, to, Some(&object)).await.map(drop)
    };
    let renamed = [&[(14, NFS3ERR_NOENT, words(&[0, 0, 0, 0]))][..], &there].concat();
    assert_eq!(after_a_loss(link, &linked).await, Ok(()));
    assert_eq!(after_a_loss(rename, &renamed).await, Ok(()));

    let _back = mutant::put_back(Mutant::HandlesAreFiles);
    let outcome = after_a_loss(link, &linked[..2]).await;
    assert_eq!(outcome, Err(NfsError::Status(NFS3ERR_EXIST)));
    let outcome = after_a_loss(rename, &renamed[..2]).await;
    assert_eq!(outcome, Err(NfsError::Uncertain(NFS3ERR_NOENT)));
}

//= test 1813-4.5-repeat
#[tokio::test(start_paused = true)]
async fn a_repeated_creation_is_settled_where_that_is_possible() {
    use nfsstat3::{NFS3_OK, NFS3ERR_EXIST};
    let cred = Cred::root();
    let (dir, object) = (file(), FileHandle::new(b"object").unwrap());
    let set = SetAttr::default();
    let exists = |procedure| (procedure, NFS3ERR_EXIST, words(&[0, 0]));
    let lookup = |handle| (3, NFS3_OK, found(handle));

    let link = async |nfs: &Nfs3| nfs.link(&cred, &object, &dir, b"n").await;
    let linked = (15, NFS3ERR_EXIST, words(&[0, 0, 0]));
    let outcome = after_a_loss(link, &[linked.clone(), lookup(&object)]).await;
    assert!(outcome.is_ok());
    let another = [linked, lookup(&dir), numbered(8), numbered(7)];
    let outcome = after_a_loss(link, &another).await;
    assert_eq!(outcome, Err(NfsError::Status(NFS3ERR_EXIST)));

    let symlink = async |nfs: &Nfs3| nfs.symlink(&cred, &dir, b"n", &[7], &set).await;
    for (stands, expected) in [
        (7, Ok(Some(object))),
        (8, Err(NfsError::Status(NFS3ERR_EXIST))),
    ] {
        let answers = [exists(10), lookup(&object), (5, NFS3_OK, target(stands))];
        let outcome = after_a_loss(symlink, &answers).await;
        assert_eq!(outcome.map(|made| made.handle), expected);
    }

    let uncertain = Err(NfsError::Uncertain(NFS3ERR_EXIST));
    let mkdir = async |nfs: &Nfs3| nfs.mkdir(&cred, &dir, b"n", &set).await;
    assert_eq!(after_a_loss(mkdir, &[exists(9)]).await, uncertain);
    let guarded = async |nfs: &Nfs3| nfs.create(&cred, &dir, b"n", How::Guarded(set)).await;
    assert_eq!(after_a_loss(guarded, &[exists(8)]).await, uncertain);
    let exclusive = async |nfs: &Nfs3| nfs.create(&cred, &dir, b"n", How::Exclusive([1; 8])).await;
    assert_eq!(
        after_a_loss(exclusive, &[exists(8)]).await,
        Err(NfsError::Status(NFS3ERR_EXIST)),
        "the server knows our verifier, so the file is another's"
    );
}

/// Replies to calls that nobody made, as fast as they are read.
struct Flood(usize);

impl AsyncRead for Flood {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let turn = std::task::ready!(tokio::task::coop::poll_proceed(cx));
        let record = words(&[0x8000_0018, u32::MAX, 1, 0, 0, 0, 0]);
        let part = &record[self.0 % record.len()..];
        let length = part.len().min(buf.remaining());
        buf.put_slice(&part[..length]);
        self.0 += length;
        turn.made_progress();
        Poll::Ready(Ok(()))
    }
}

struct Flooded(mpsc::UnboundedSender<DuplexStream>);

impl Connector for Flooded {
    type Reader = Flood;
    type Writer = DuplexStream;

    async fn connect(&self, _: SocketAddr, _: usize) -> io::Result<(Flood, DuplexStream)> {
        let (client, server) = duplex(64 * 1024);
        self.0.send(server).map_err(io::Error::other)?;
        Ok((Flood(0), client))
    }
}

#[tokio::test]
async fn a_flood_of_replies_lets_calls_out() {
    let settings = Settings::new(([192, 0, 2, 1], 2049).into());
    let (sender, mut receiver) = mpsc::unbounded_channel();
    let nfs = Nfs3::over(&settings, Flooded(sender)).unwrap();
    let _call = readlink(&nfs);
    let mut peer = Peer(receiver.recv().await.unwrap());
    let seen = tokio::spawn(async move { peer.call().await });
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    assert!(seen.is_finished(), "the call waits behind the replies");
}
