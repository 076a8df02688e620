//! One operation's use of a connection: calls, what may be repeated, and the walk along a path.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use nfs3_client::RpcError;
use nfs3_types::nfs3::{
    self, GETATTR3args, GETATTR3resok, LOOKUP3args, LOOKUP3resfail, LOOKUP3resok, NFS_PROGRAM,
    NFS3_FHSIZE, Nfs3Option, Nfs3Result, diropargs3, fattr3, filename3, ftype3, nfs_fh3, nfsstat3,
    nfstime3,
};
use nfs3_types::xdr_codec::{Pack, Unpack, Void};
use rustix::io::Errno;
use tokio::time::sleep;

use super::{Outcome, Route, V3};
use crate::address::SharePath;
use crate::admin::{AdminErrorKind, Attr, Kind, ServerTime};
use crate::connect::Wire;
use crate::rpc::nfs3::status_errno;

/// The pause before a call is sent again that the server put off (JUKEBOX), doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What a call does to the server, which decides what happens when its reply is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Effect {
    /// Sent twice it does the same as sent once.
    Repeatable,
    /// Sent twice, the second may fail because the first succeeded.
    Once,
}

/// A call that was answered with an NFS error, or not at all.
#[derive(Debug)]
pub(super) enum Fault {
    Status(nfsstat3),
    Kind(AdminErrorKind),
}

impl From<AdminErrorKind> for Fault {
    fn from(kind: AdminErrorKind) -> Self {
        Self::Kind(kind)
    }
}

impl From<Fault> for AdminErrorKind {
    fn from(fault: Fault) -> Self {
        use nfsstat3 as S;
        let status = match fault {
            Fault::Kind(kind) => return kind,
            Fault::Status(status) => status,
        };
        match status {
            // The call may be made again.
            S::NFS3ERR_JUKEBOX => Self::Busy,
            // What nobody has asked for, or a fault of the server.
            S::NFS3_OK
            | S::NFS3ERR_NOT_SYNC
            | S::NFS3ERR_BAD_COOKIE
            | S::NFS3ERR_TOOSMALL
            | S::NFS3ERR_SERVERFAULT => Self::Protocol(status.to_string()),
            other => Self::from(Errno::from_raw_os_error(status_errno(other))),
        }
    }
}

/// A borrowed connection; it goes back to the pool unless a call on it failed or was given up.
#[derive(Debug)]
pub(in crate::admin) struct Session<'a> {
    pub(super) v3: &'a V3,
    pub(super) route: Arc<Route>,
    wire: Option<Wire>,
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if let Some(wire) = self.wire.take() {
            self.v3.give_back(&self.route, wire);
        }
    }
}

impl<'a> Session<'a> {
    pub(in crate::admin) async fn open(v3: &'a V3) -> Outcome<Self> {
        #[cfg(feature = "simulated")]
        if let Some(server) = &v3.shared.simulated {
            let (route, wire) = (server.route(), None);
            return Ok(Self { v3, route, wire });
        }
        let (route, wire) = v3.connect().await?;
        Ok(Self {
            v3,
            route,
            wire: Some(wire),
        })
    }

    /// One NFS call. Put-off calls are sent again; after a lost reply, only repeatable ones are.
    pub(super) async fn call<C, T, E>(
        &mut self,
        procedure: NFS_PROGRAM,
        args: &C,
        effect: Effect,
    ) -> Result<T, Fault>
    where
        C: Pack + Send + Sync,
        T: Unpack,
        E: Unpack,
    {
        let number = (nfs3::PROGRAM, nfs3::VERSION, procedure as u32);
        let mut pause = FIRST_PAUSE;
        let mut again = effect == Effect::Repeatable;
        loop {
            let reply = self.exchange::<_, Nfs3Result<T, E>>(number, args).await?;
            match reply {
                Ok(Nfs3Result::Ok(value)) => return Ok(value),
                //= 1813-2.6-jukebox: “The client should wait and then try the request with a new
                //= RPC transaction ID.”
                Ok(Nfs3Result::Err((nfsstat3::NFS3ERR_JUKEBOX, _))) => {
                    sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                Ok(Nfs3Result::Err((status, _))) => return Err(Fault::Status(status)),
                Err(RpcError::Io(error)) if error.kind() != io::ErrorKind::InvalidData => {
                    // What broke this connection has broken the others: a new one tells why.
                    self.v3.close_idle();
                    //= 1813-4.5-repeat: What failed when it was repeated may have been done the
                    //= first time: REMOVE, RENAME, LINK and CREATE are not idempotent.
                    if !again {
                        return Err(AdminErrorKind::Unknown.into());
                    }
                    again = false;
                }
                Err(error) => {
                    return Err(AdminErrorKind::Protocol(format!("{procedure}: {error}")).into());
                }
            }
        }
    }

    /// Sends a call and waits for its reply.
    async fn exchange<C, R>(
        &mut self,
        number: (u32, u32, u32),
        args: &C,
    ) -> Outcome<Result<R, RpcError>>
    where
        C: Pack + Send + Sync,
        R: Unpack,
    {
        #[cfg(feature = "simulated")]
        if let Some(server) = &self.v3.shared.simulated {
            return Ok(server.call(number.2, args).await.map_err(RpcError::Io));
        }
        // Taken out: when this future is dropped in the middle, so is the connection.
        let mut wire = match self.wire.take() {
            Some(wire) => wire,
            None => self.reconnect().await?,
        };
        let reply = wire.call(number, &self.v3.shared.credential, args).await;
        if reply.is_ok() {
            self.wire = Some(wire);
        }
        Ok(reply)
    }

    async fn reconnect(&mut self) -> Outcome<Wire> {
        let (route, wire) = self.v3.connect().await?;
        self.route = route;
        Ok(wire)
    }

    /// The handle of a directory.
    pub(super) async fn dir(&mut self, path: &SharePath) -> Outcome<nfs_fh3> {
        let (mut place, mut handle) = self
            .v3
            .kept_handle(path)
            .unwrap_or_else(|| (SharePath::root(), self.route.root.clone()));
        let known = place.components().count();
        for name in path.components().skip(known) {
            #[cfg(feature = "simulated")]
            self.v3.walks();
            let (below, attr) = self.lookup(&handle, name.as_bytes()).await?;
            match attr.kind {
                Kind::Dir => {}
                Kind::Symlink => return Err(AdminErrorKind::Symlink),
                Kind::File | Kind::Other => return Err(AdminErrorKind::NotADirectory),
            }
            handle = below;
            place = place.join(name);
            self.v3.keep_handle(&place, &handle);
        }
        Ok(handle)
    }

    /// The handle and the attributes of any object.
    pub(super) async fn object(&mut self, path: &SharePath) -> Outcome<(nfs_fh3, Attr)> {
        if path.is_root() {
            let root = self.route.root.clone();
            let attr = self.getattr(&root).await?;
            return Ok((root, attr));
        }
        let dir = self.dir(&path.parent()).await?;
        let found = self.lookup(&dir, path.name().as_bytes()).await?;
        match found.1.kind {
            Kind::Dir => self.v3.keep_handle(path, &found.0),
            // A file is often replaced, so only those that never are count.
            Kind::File => {
                self.v3.keep_in_frame(path, &found.0);
            }
            Kind::Symlink | Kind::Other => {}
        }
        Ok(found)
    }

    pub(super) async fn lookup(&mut self, dir: &nfs_fh3, name: &[u8]) -> Outcome<(nfs_fh3, Attr)> {
        let args = LOOKUP3args {
            what: entry(dir, name),
        };
        let lookup = NFS_PROGRAM::NFSPROC3_LOOKUP;
        let found: LOOKUP3resok = self
            .call::<_, _, LOOKUP3resfail>(lookup, &args, Effect::Repeatable)
            .await?;
        let handle = checked(found.object)?;
        let attr = self.attr_or_ask(found.obj_attributes, &handle).await?;
        Ok((handle, attr))
    }

    pub(super) async fn getattr(&mut self, handle: &nfs_fh3) -> Outcome<Attr> {
        let args = GETATTR3args::from(handle.clone());
        let getattr = NFS_PROGRAM::NFSPROC3_GETATTR;
        let found: GETATTR3resok = self
            .call::<_, _, Void>(getattr, &args, Effect::Repeatable)
            .await?;
        Ok(attr_of(&found.obj_attributes))
    }

    /// Servers may leave attributes out of any reply (RFC 1813 section 2.6, post_op_attr).
    pub(super) async fn attr_or_ask(
        &mut self,
        given: Nfs3Option<fattr3>,
        handle: &nfs_fh3,
    ) -> Outcome<Attr> {
        match given {
            Nfs3Option::Some(attr) => Ok(attr_of(&attr)),
            Nfs3Option::None => self.getattr(handle).await,
        }
    }
}

/// Refuses a handle that the protocol does not allow, before it is kept or sent back.
pub(super) fn checked(handle: nfs_fh3) -> Outcome<nfs_fh3> {
    match handle.data.len() {
        1..=NFS3_FHSIZE => Ok(handle),
        length => Err(AdminErrorKind::Protocol(format!(
            "a file handle of {length} bytes"
        ))),
    }
}

pub(super) fn entry<'n>(dir: &nfs_fh3, name: &'n [u8]) -> diropargs3<'n> {
    diropargs3 {
        dir: dir.clone(),
        name: filename3::from(name),
    }
}

pub(super) fn attr_of(attr: &fattr3) -> Attr {
    let time = |time: nfstime3| ServerTime {
        secs: time.seconds.into(),
        nanos: time.nseconds,
    };
    Attr {
        kind: match attr.type_ {
            ftype3::NF3DIR => Kind::Dir,
            ftype3::NF3REG => Kind::File,
            ftype3::NF3LNK => Kind::Symlink,
            ftype3::NF3BLK | ftype3::NF3CHR | ftype3::NF3SOCK | ftype3::NF3FIFO => Kind::Other,
        },
        mode: attr.mode & 0o7777,
        uid: attr.uid,
        gid: attr.gid,
        size: attr.size,
        fileid: attr.fileid,
        nlink: attr.nlink,
        mtime: time(attr.mtime),
        ctime: time(attr.ctime),
    }
}
