//! An NFS server over simulated TCP that reads and writes with `nfs3_types` alone, and fails in
//! the ways that servers do.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nfs3_types::nfs3::{PROGRAM, VERSION, nfsstat3};
use nfs3_types::rpc::opaque_auth;
use nfs3_types::xdr_codec::{Pack, Unpack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use turmoil::net::{TcpListener, TcpStream};

use crate::dice::Dice;
use crate::disk::Disk;
use crate::procedures::{carry_out, take};

pub(crate) const PORT: u16 = 2049;

/// How often the server does what, in calls of 1,000.
#[derive(Debug, Clone)]
pub(crate) struct Habits {
    /// The connection breaks before the call is carried out, or after it was, before the reply.
    pub(crate) break_before: u64,
    pub(crate) break_after: u64,
    pub(crate) jukebox: u64,
    pub(crate) answer_twice: u64,
    pub(crate) fragments: u64,
    /// What a call takes at most.
    pub(crate) slowness: Duration,
    /// Calls are remembered across connections by client and xid, and repetitions answered from
    /// memory, until the server restarts.
    pub(crate) remembers: bool,
}

/// The reply to a call; `None` while it is being carried out.
type Memory = Option<Vec<u8>>;

pub(crate) struct Server {
    pub(crate) disk: Mutex<Disk>,
    pub(crate) dice: Mutex<Dice>,
    pub(crate) habits: Habits,
    memory: Mutex<HashMap<(IpAddr, u32), Memory>>,
    pub(crate) served: Mutex<u64>,
}

impl Server {
    pub(crate) fn new(habits: Habits, dice: Dice) -> Self {
        Self {
            disk: Mutex::new(Disk::new()),
            dice: Mutex::new(dice),
            habits,
            memory: Mutex::new(HashMap::new()),
            served: Mutex::new(0),
        }
    }

    pub(crate) fn crash(&self) {
        self.disk.lock().unwrap().crash();
        self.memory.lock().unwrap().clear();
    }

    fn chance(&self, in_1000: u64) -> bool {
        self.dice.lock().unwrap().below(1000) < in_1000
    }

    pub(crate) async fn run(self: Arc<Self>) -> turmoil::Result {
        let listener = TcpListener::bind(("0.0.0.0", PORT)).await?;
        loop {
            let (stream, peer) = listener.accept().await?;
            let server = Arc::clone(&self);
            tokio::spawn(async move {
                // A connection ends in an error when the client or the network ends it.
                let _ = server.connection(stream, peer.ip()).await;
            });
        }
    }

    async fn connection(self: Arc<Self>, stream: TcpStream, peer: IpAddr) -> io::Result<()> {
        let (mut reader, mut writer) = stream.into_split();
        let (replies, mut outgoing) = mpsc::unbounded_channel::<Option<Vec<u8>>>();
        // Dropped with the connection: a server without memory must not act later on, which no
        // client could guard against.
        let mut calls = JoinSet::new();
        let mut mark = [0; 4];
        let mut have = 0;
        loop {
            tokio::select! {
                read = reader.read(&mut mark[have..]) => {
                    let read = read?;
                    if read == 0 {
                        return Ok(());
                    }
                    have += read;
                    if have < 4 {
                        continue;
                    }
                    have = 0;
                    let length = u32::from_be_bytes(mark) & 0x7fff_ffff;
                    let mut call = vec![0; length as usize];
                    reader.read_exact(&mut call).await?;
                    let (server, replies) = (Arc::clone(&self), replies.clone());
                    let work = async move {
                        let reply = server.call(peer, &call).await;
                        let _ = replies.send(reply);
                    };
                    if self.habits.remembers {
                        tokio::spawn(work);
                    } else {
                        calls.spawn(work);
                    }
                }
                reply = outgoing.recv() => match reply {
                    Some(Some(reply)) => {
                        let times = if self.chance(self.habits.answer_twice) { 2 } else { 1 };
                        for _ in 0..times {
                            writer.write_all(&self.framed(&reply)).await?;
                        }
                    }
                    _ => return Ok(()),
                },
            }
        }
    }

    fn framed(&self, mut reply: &[u8]) -> Vec<u8> {
        let mut wire = Vec::new();
        let mut fragment = |bytes: &[u8], last: u32| {
            let length = u32::try_from(bytes.len()).unwrap();
            wire.extend_from_slice(&(length | last).to_be_bytes());
            wire.extend_from_slice(bytes);
        };
        while reply.len() > 1 && self.chance(self.habits.fragments) {
            let cut = self.dice.lock().unwrap().below(reply.len() as u64);
            let (now, later) = reply.split_at(usize::try_from(cut).unwrap());
            fragment(now, 0);
            reply = later;
        }
        fragment(reply, 0x8000_0000);
        wire
    }

    /// Carries out a call; `None` breaks the connection.
    async fn call(&self, peer: IpAddr, call: &[u8]) -> Option<Vec<u8>> {
        let mut input = call;
        let header: [u32; 6] = std::array::from_fn(|_| take(&mut input));
        let [xid, 0, 2, PROGRAM, VERSION, procedure] = header else {
            panic!("the client sent {header:?}");
        };
        for _ in ["credential", "verifier"] {
            opaque_auth::unpack(&mut input).unwrap();
        }
        let slow = u64::try_from(self.habits.slowness.as_millis()).unwrap();
        let delay = self.dice.lock().unwrap().below(slow + 1);
        if self.habits.remembers {
            let key = (peer, xid);
            let known = {
                let mut memory = self.memory.lock().unwrap();
                let known = memory.get(&key).cloned();
                memory.entry(key).or_insert(None);
                known
            };
            match known {
                Some(Some(reply)) => return Some(reply),
                // Being carried out for another connection: dropped, as knfsd does.
                Some(None) => std::future::pending().await,
                None => {}
            }
        }
        tokio::time::sleep(Duration::from_millis(delay)).await;
        if self.chance(self.habits.break_before) {
            self.memory.lock().unwrap().remove(&(peer, xid));
            return None;
        }
        *self.served.lock().unwrap() += 1;
        let mut reply = Vec::new();
        for word in [xid, 1, 0, 0, 0, 0] {
            word.pack(&mut reply).unwrap();
        }
        if procedure != 0 && self.chance(self.habits.jukebox) {
            // Longer than what any failure holds; what is left over is ignored.
            for word in [nfsstat3::NFS3ERR_JUKEBOX as u32, 0, 0, 0, 0] {
                word.pack(&mut reply).unwrap();
            }
        } else {
            carry_out(&mut self.disk.lock().unwrap(), procedure, input, &mut reply);
        }
        if self.habits.remembers {
            let mut memory = self.memory.lock().unwrap();
            memory.insert((peer, xid), Some(reply.clone()));
        }
        (!self.chance(self.habits.break_after)).then_some(reply)
    }
}
