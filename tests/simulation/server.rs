//! An NFS server over simulated TCP that reads and writes with `nfs3_types` alone, and fails in
//! the ways that servers do.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nfs3_types::nfs3::*;
use nfs3_types::rpc::opaque_auth;
use nfs3_types::xdr_codec::{List, Opaque, Pack, Unpack};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use turmoil::net::{TcpListener, TcpStream};

use crate::Dice;
use crate::disk::{Disk, Id};

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
            self.procedure(procedure, input, &mut reply);
        }
        if self.habits.remembers {
            let mut memory = self.memory.lock().unwrap();
            memory.insert((peer, xid), Some(reply.clone()));
        }
        (!self.chance(self.habits.break_after)).then_some(reply)
    }

    #[expect(clippy::too_many_lines, reason = "one arm for each procedure")]
    fn procedure(&self, procedure: u32, mut input: &[u8], out: &mut Vec<u8>) {
        let disk = &mut *self.disk.lock().unwrap();
        let input = &mut input;
        match NFS_PROGRAM::try_from(procedure).unwrap() {
            NFS_PROGRAM::NFSPROC3_NULL => {}
            NFS_PROGRAM::NFSPROC3_GETATTR => {
                let id = id(&take::<GETATTR3args>(input).object);
                let attr = disk.attr(id).ok_or(nfsstat3::NFS3ERR_STALE);
                put(
                    out,
                    attr.map(|obj_attributes| GETATTR3resok { obj_attributes }),
                    || nfs3_types::xdr_codec::Void,
                );
            }
            NFS_PROGRAM::NFSPROC3_SETATTR => {
                let args = take::<SETATTR3args>(input);
                let id = id(&args.object);
                let before = disk.wcc(id);
                let done = disk.set(id, &args.new_attributes);
                let wcc = || wcc(disk, id, before);
                put(out, done.map(|()| SETATTR3resok { obj_wcc: wcc() }), || {
                    SETATTR3resfail { obj_wcc: wcc() }
                });
            }
            NFS_PROGRAM::NFSPROC3_LOOKUP => {
                let what = take::<LOOKUP3args<'_>>(input).what;
                let dir = id(&what.dir);
                let found = disk.lookup(dir, what.name.as_ref());
                let found = found.map(|id| LOOKUP3resok {
                    object: handle(id),
                    obj_attributes: post(disk, id),
                    dir_attributes: post(disk, dir),
                });
                put(out, found, || LOOKUP3resfail {
                    dir_attributes: post(disk, dir),
                });
            }
            NFS_PROGRAM::NFSPROC3_READLINK => {
                let id = id(&take::<READLINK3args>(input).symlink);
                let target = disk.readlink(id).map(|target| READLINK3resok {
                    symlink_attributes: post(disk, id),
                    data: target.into(),
                });
                put(out, target, READLINK3resfail::default);
            }
            NFS_PROGRAM::NFSPROC3_READ => {
                let args = take::<READ3args>(input);
                let id = id(&args.file);
                let read = disk.read(id, args.offset, args.count);
                let read = read.map(|(data, eof)| READ3resok {
                    file_attributes: post(disk, id),
                    count: u32::try_from(data.len()).unwrap(),
                    eof,
                    data: Opaque::owned(data),
                });
                put(out, read, READ3resfail::default);
            }
            NFS_PROGRAM::NFSPROC3_WRITE => {
                let args = take::<WRITE3args<'_>>(input);
                let id = id(&args.file);
                assert_eq!(args.count as usize, args.data.len());
                let before = disk.wcc(id);
                let written = disk.write(id, args.offset, &args.data, args.stable);
                let written = written.map(|()| WRITE3resok {
                    file_wcc: wcc(disk, id, before),
                    count: args.count,
                    committed: args.stable,
                    verf: writeverf3(disk.verifier()),
                });
                put(out, written, WRITE3resfail::default);
            }
            NFS_PROGRAM::NFSPROC3_COMMIT => {
                let id = id(&take::<COMMIT3args>(input).file);
                let before = disk.wcc(id);
                let done = disk.commit(id).map(|()| COMMIT3resok {
                    file_wcc: wcc(disk, id, before),
                    verf: writeverf3(disk.verifier()),
                });
                put(out, done, || COMMIT3resfail {
                    file_wcc: wcc_data::default(),
                });
            }
            NFS_PROGRAM::NFSPROC3_CREATE => {
                let args = take::<CREATE3args<'_>>(input);
                let dir = id(&args.where_.dir);
                let made = disk.create(dir, args.where_.name.as_ref(), &args.how);
                made_reply(disk, dir, made, out);
            }
            NFS_PROGRAM::NFSPROC3_MKDIR => {
                let args = take::<MKDIR3args<'_>>(input);
                let dir = id(&args.where_.dir);
                let made = disk.mkdir(dir, args.where_.name.as_ref());
                made_reply(disk, dir, made, out);
            }
            NFS_PROGRAM::NFSPROC3_SYMLINK => {
                let args = take::<SYMLINK3args<'_>>(input);
                let dir = id(&args.where_.dir);
                let target = args.symlink.symlink_data.as_ref();
                let made = disk.symlink(dir, args.where_.name.as_ref(), target);
                made_reply(disk, dir, made, out);
            }
            NFS_PROGRAM::NFSPROC3_REMOVE => {
                let what = take::<REMOVE3args<'_>>(input).object;
                let dir = id(&what.dir);
                let before = disk.wcc(dir);
                let done = disk.remove(dir, what.name.as_ref());
                let wcc = || wcc(disk, dir, before);
                put(out, done.map(|()| REMOVE3resok { dir_wcc: wcc() }), || {
                    REMOVE3resfail { dir_wcc: wcc() }
                });
            }
            NFS_PROGRAM::NFSPROC3_RMDIR => {
                let what = take::<RMDIR3args<'_>>(input).object;
                let dir = id(&what.dir);
                let before = disk.wcc(dir);
                let done = disk.rmdir(dir, what.name.as_ref());
                let wcc = || wcc(disk, dir, before);
                put(out, done.map(|()| RMDIR3resok { dir_wcc: wcc() }), || {
                    RMDIR3resfail { dir_wcc: wcc() }
                });
            }
            NFS_PROGRAM::NFSPROC3_RENAME => {
                let args = take::<RENAME3args<'_, '_>>(input);
                let (from, to) = (id(&args.from.dir), id(&args.to.dir));
                let done =
                    disk.rename((from, args.from.name.as_ref()), (to, args.to.name.as_ref()));
                let done = done.map(|()| RENAME3resok {
                    fromdir_wcc: wcc(disk, from, None),
                    todir_wcc: wcc(disk, to, None),
                });
                put(out, done, RENAME3resfail::default);
            }
            NFS_PROGRAM::NFSPROC3_LINK => {
                let args = take::<LINK3args<'_>>(input);
                let (file, dir) = (id(&args.file), id(&args.link.dir));
                let done = disk.link(file, dir, args.link.name.as_ref());
                let done = done.map(|()| LINK3resok {
                    file_attributes: post(disk, file),
                    linkdir_wcc: wcc(disk, dir, None),
                });
                put(out, done, || LINK3resfail {
                    file_attributes: post(disk, file),
                    linkdir_wcc: wcc_data::default(),
                });
            }
            NFS_PROGRAM::NFSPROC3_READDIRPLUS => {
                let args = take::<READDIRPLUS3args>(input);
                let dir = id(&args.dir);
                let names = disk.names(dir);
                let listed = names.map(|names| {
                    let from = usize::try_from(args.cookie).unwrap();
                    let rest = names.into_iter().enumerate().skip(from);
                    let mut entries: Vec<_> = rest
                        .map(|(at, (name, id))| entryplus3 {
                            fileid: id,
                            name: name.into(),
                            cookie: at as u64 + 1,
                            name_attributes: post(disk, id),
                            name_handle: Nfs3Option::Some(handle(id)),
                        })
                        .collect();
                    let eof = entries.len() <= 3;
                    entries.truncate(3);
                    READDIRPLUS3resok {
                        dir_attributes: post(disk, dir),
                        cookieverf: cookieverf3([7; 8]),
                        reply: dirlistplus3 {
                            entries: List(entries),
                            eof,
                        },
                    }
                });
                put(out, listed, READDIRPLUS3resfail::default);
            }
            other => panic!("the simulation has no {other}"),
        }
    }
}

fn take<T: Unpack>(input: &mut &[u8]) -> T {
    let (value, _) = T::unpack(input).expect("the client sends what nfs3_types reads");
    value
}

fn put<T: Pack, E: Pack>(out: &mut Vec<u8>, done: Result<T, nfsstat3>, fail: impl Fn() -> E) {
    let result = match done {
        Ok(ok) => Nfs3Result::Ok(ok),
        Err(status) => Nfs3Result::Err((status, fail())),
    };
    result.pack(out).unwrap();
}

fn made_reply(disk: &Disk, dir: Id, made: Result<Id, nfsstat3>, out: &mut Vec<u8>) {
    let made = made.map(|id| CREATE3resok {
        obj: Nfs3Option::Some(handle(id)),
        obj_attributes: post(disk, id),
        dir_wcc: wcc(disk, dir, None),
    });
    put(out, made, CREATE3resfail::default);
}

fn id(handle: &nfs_fh3) -> Id {
    let bytes = handle.data.as_ref().try_into();
    Id::from_be_bytes(bytes.expect("the client uses handles of this server only"))
}

fn handle(id: Id) -> nfs_fh3 {
    nfs_fh3 {
        data: Opaque::owned(id.to_be_bytes().to_vec()),
    }
}

fn post(disk: &Disk, id: Id) -> post_op_attr {
    disk.attr(id).map_or(Nfs3Option::None, Nfs3Option::Some)
}

fn wcc(disk: &Disk, id: Id, before: Option<wcc_attr>) -> wcc_data {
    wcc_data {
        before: before.map_or(Nfs3Option::None, Nfs3Option::Some),
        after: post(disk, id),
    }
}
