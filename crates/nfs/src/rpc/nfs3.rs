//! The procedures of NFSv3 (RFC 1813 section 3.3) as async functions.
//!
//! JUKEBOX ("try later") is retried within the deadline of the call. A call that is repeated
//! after a lost connection goes out under its old xid, and a server that remembers it answers as
//! it did the first time. One that does not may answer EXIST or NOENT to what it has itself just
//! done; where the outcome can be found out it is (REMOVE, RMDIR, RENAME, LINK, SYMLINK), and
//! else the error is [`NfsError::Uncertain`].
//!
//! Known limit, of NFSv3 as such: a server that still holds the first copy of a call when it
//! answers the repeated one may carry it out late, after calls that followed the answer.

pub mod decode;
pub mod error;
pub mod types;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nfs3_types::nfs3::{
    NFS_PROGRAM as Proc, PROGRAM, VERSION, createmode3, nfsstat3, nfstime3, sattr3,
};

pub(crate) use error::status_errno;
pub use error::{Nfs3Status, NfsError};
pub use types::*;

use super::auth::{Cred, Machine};
use super::connector::{Connector, TcpConnector};
use super::message::{Draft, Program};
use super::table::Traffic;
use super::transport::{MAX_IO, Settings, Transport};
use super::xdr::{DecodeError, Decoder, Encoder};
use super::{RpcError, auth};
use crate::mutant::{self, Mutant};

/// Pause after the first JUKEBOX; doubles up to [`JUKEBOX_AT_MOST`].
const JUKEBOX: Duration = Duration::from_millis(100);
/// What the kernel's client always waits (`NFS_JUKEBOX_RETRY_TIME`).
const JUKEBOX_AT_MOST: Duration = Duration::from_secs(5);

type Result<T> = std::result::Result<T, NfsError>;

/// A client of one NFS server; clones share the connections.
#[derive(Clone, Debug)]
pub struct Nfs3 {
    transport: Arc<Transport>,
    machine: Arc<Machine>,
}

/// What came back: a status, and the results or the failure's attributes behind it.
struct Answer {
    status: u32,
    body: Decoder,
    retransmitted: bool,
}

impl Nfs3 {
    /// A client over TCP. Connections open with the first calls, and again whenever they are
    /// lost; that a server cannot be reached shows in the calls.
    ///
    /// # Errors
    /// [`RpcError::Settings`] for a setting out of its range.
    #[expect(
        clippy::unused_async,
        reason = "it starts tasks, so it needs a runtime around it"
    )]
    pub async fn connect(settings: Settings) -> std::result::Result<Self, RpcError> {
        let connector = TcpConnector::new(settings.reserved_port);
        Self::over(&settings, connector)
    }

    /// A client over any kind of stream; to be called within a runtime.
    ///
    /// # Errors
    /// [`RpcError::Settings`] for a setting out of its range.
    pub fn over<C: Connector>(
        settings: &Settings,
        connector: C,
    ) -> std::result::Result<Self, RpcError> {
        let program = Program {
            number: PROGRAM,
            version: VERSION,
        };
        Ok(Self {
            transport: Arc::new(Transport::new(settings, program, connector)?),
            machine: Arc::new(Machine::new(&settings.machine_name, auth::stamp())),
        })
    }

    /// What all clones have sent so far.
    #[must_use]
    pub fn traffic(&self) -> Traffic {
        self.transport.traffic()
    }

    /// Fails all calls of all clones, present and later ones, with [`RpcError::Closed`].
    pub fn close(&self) {
        self.transport.close();
    }

    /// See [`Transport::gather`].
    pub fn gather<R>(&self, work: impl FnOnce() -> R) -> R {
        self.transport.gather(work)
    }

    async fn call(
        &self,
        cred: &Cred,
        procedure: Proc,
        arguments: impl Fn(&mut Encoder),
    ) -> Result<Answer> {
        self.exchange(cred, procedure, arguments, Bytes::new(), 0)
            .await
    }

    /// Makes a call, again as long as the answer is JUKEBOX.
    async fn exchange(
        &self,
        cred: &Cred,
        procedure: Proc,
        arguments: impl Fn(&mut Encoder),
        payload: Bytes,
        expected: usize,
    ) -> Result<Answer> {
        let deadline = self.transport.deadline();
        let mut pause = JUKEBOX;
        let mut retransmitted = false;
        loop {
            let auth = Some((&*self.machine, cred));
            let draft = Draft::new(self.transport.program(), procedure as u32, auth, &arguments)
                .with_payload(payload.clone())
                .expecting(expected);
            let reply = self.transport.call(draft, deadline).await?;
            retransmitted |= reply.retransmitted;
            let mut body = reply.results;
            let status = body.u32().map_err(|e| self.malformed(e))?;
            let again = tokio::time::Instant::now() + pause;
            //= 1813-2.6-jukebox: “The client should wait and then try the request with a new RPC
            //= transaction ID.”
            if status == nfsstat3::NFS3ERR_JUKEBOX as u32
                && deadline.is_none_or(|deadline| again.into_std() < deadline)
            {
                tokio::time::sleep_until(again).await;
                pause = (pause * 2).min(JUKEBOX_AT_MOST);
                continue;
            }
            return Ok(Answer {
                status,
                body,
                retransmitted,
            });
        }
    }

    fn malformed(&self, source: DecodeError) -> NfsError {
        self.transport.malformed(source).into()
    }

    /// Reads the results of a call that succeeded.
    fn results<T>(
        &self,
        mut answer: Answer,
        decode: impl FnOnce(&mut Decoder) -> std::result::Result<T, DecodeError>,
    ) -> Result<T> {
        match answer.status {
            0 => decode(&mut answer.body).map_err(|e| self.malformed(e)),
            status => Err(failure(status)),
        }
    }

    /// Whether the server is there.
    ///
    /// # Errors
    /// [`NfsError::Rpc`].
    pub async fn null(&self) -> Result<()> {
        let draft = Draft::new(self.transport.program(), 0, None, |_| {});
        let deadline = self.transport.deadline();
        self.transport.call(draft, deadline).await?;
        Ok(())
    }

    /// # Errors
    /// [`NfsError`].
    pub async fn getattr(&self, cred: &Cred, file: &FileHandle) -> Result<Attr> {
        let answer = self
            .call(cred, Proc::NFSPROC3_GETATTR, |out| handle(out, file))
            .await?;
        self.results(answer, decode::getattr)
    }

    /// Sets attributes; with `guard`, only while the file has that ctime (NOT_SYNC otherwise).
    ///
    /// # Errors
    /// [`NfsError`]. `Uncertain(NOT_SYNC)`: the first call may have set them.
    pub async fn setattr(
        &self,
        cred: &Cred,
        file: &FileHandle,
        set: &SetAttr,
        guard: Option<Time>,
    ) -> Result<Wcc> {
        let answer = self
            .call(cred, Proc::NFSPROC3_SETATTR, |out| {
                handle(out, file);
                out.pack(&sattr3::from(set));
                out.pack(&wire_option(guard.map(nfstime3::from)));
            })
            .await?;
        if answer.doubtful(nfsstat3::NFS3ERR_NOT_SYNC) {
            return Err(NfsError::Uncertain(nfsstat3::NFS3ERR_NOT_SYNC));
        }
        self.results(answer, decode::wcc)
    }

    /// # Errors
    /// [`NfsError`].
    pub async fn lookup(&self, cred: &Cred, dir: &FileHandle, name: &[u8]) -> Result<LookupOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_LOOKUP, |out| entry(out, dir, name))
            .await?;
        self.results(answer, decode::lookup)
    }

    /// Which of the bits of [`types::access`] in `mask` the server grants.
    ///
    /// # Errors
    /// [`NfsError`].
    pub async fn access(&self, cred: &Cred, file: &FileHandle, mask: u32) -> Result<AccessOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_ACCESS, |out| {
                handle(out, file);
                out.u32(mask);
            })
            .await?;
        self.results(answer, decode::access)
    }

    /// # Errors
    /// [`NfsError`].
    pub async fn readlink(&self, cred: &Cred, link: &FileHandle) -> Result<ReadlinkOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_READLINK, |out| handle(out, link))
            .await?;
        self.results(answer, decode::readlink)
    }

    /// Reads at most `count` bytes (and at most [`MAX_IO`]) at `offset`; less is no error, and
    /// says nothing about the end of the file unless `eof` is set.
    ///
    /// # Errors
    /// [`NfsError`].
    pub async fn read(
        &self,
        cred: &Cred,
        file: &FileHandle,
        offset: u64,
        count: u32,
    ) -> Result<ReadOk> {
        let count = count.min(MAX_IO);
        let arguments = |out: &mut Encoder| {
            handle(out, file);
            out.u64(offset).u32(count);
        };
        let answer = self
            .exchange(
                cred,
                Proc::NFSPROC3_READ,
                arguments,
                Bytes::new(),
                count as usize,
            )
            .await?;
        self.results(answer, |d| decode::read(d, count))
    }

    /// Writes `data` (of which at most [`MAX_IO`] bytes) at `offset`; the server may take less.
    /// More than the `wtmax` of FSINFO makes some servers (knfsd) break the connection each time,
    /// until the deadline.
    ///
    /// # Errors
    /// [`NfsError`].
    pub async fn write(
        &self,
        cred: &Cred,
        file: &FileHandle,
        offset: u64,
        mut data: Bytes,
        stable: Stable,
    ) -> Result<WriteOk> {
        data.truncate(MAX_IO as usize);
        let sent = u32::try_from(data.len()).unwrap_or(MAX_IO);
        let arguments = |out: &mut Encoder| {
            handle(out, file);
            out.u64(offset).u32(sent).u32(stable.wire()).u32(sent);
        };
        let answer = self
            .exchange(cred, Proc::NFSPROC3_WRITE, arguments, data, 0)
            .await?;
        self.results(answer, |d| decode::write(d, sent))
    }

    /// Makes a regular file.
    ///
    /// # Errors
    /// [`NfsError`]. `Uncertain(EXIST)`, with [`How::Guarded`] only: the first call may have made
    /// the file. [`How::Exclusive`] is never in doubt.
    pub async fn create(
        &self,
        cred: &Cred,
        dir: &FileHandle,
        name: &[u8],
        how: How,
    ) -> Result<CreateOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_CREATE, |out| {
                entry(out, dir, name);
                match &how {
                    How::Unchecked(set) => {
                        out.u32(createmode3::UNCHECKED as u32);
                        out.pack(&sattr3::from(set));
                    }
                    How::Guarded(set) => {
                        out.u32(createmode3::GUARDED as u32);
                        out.pack(&sattr3::from(set));
                    }
                    How::Exclusive(verf) => {
                        out.u32(createmode3::EXCLUSIVE as u32);
                        out.verifier(*verf);
                    }
                }
            })
            .await?;
        match how {
            How::Guarded(_) => self.created(answer),
            How::Unchecked(_) | How::Exclusive(_) => self.results(answer, decode::create),
        }
    }

    /// # Errors
    /// [`NfsError`]. `Uncertain(EXIST)`: the first call may have made the directory.
    pub async fn mkdir(
        &self,
        cred: &Cred,
        dir: &FileHandle,
        name: &[u8],
        set: &SetAttr,
    ) -> Result<CreateOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_MKDIR, |out| {
                entry(out, dir, name);
                out.pack(&sattr3::from(set));
            })
            .await?;
        self.created(answer)
    }

    /// Makes a symlink. If it is there in answer to a repeated call and leads to `target`, the
    /// first call has made it.
    ///
    /// # Errors
    /// [`NfsError`]. `Uncertain(EXIST)`: what is there could not be looked at.
    pub async fn symlink(
        &self,
        cred: &Cred,
        dir: &FileHandle,
        name: &[u8],
        target: &[u8],
        set: &SetAttr,
    ) -> Result<CreateOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_SYMLINK, |out| {
                entry(out, dir, name);
                out.pack(&sattr3::from(set)).opaque(target);
            })
            .await?;
        if !answer.doubtful(nfsstat3::NFS3ERR_EXIST) {
            return self.results(answer, decode::create);
        }
        let uncertain = |_| NfsError::Uncertain(nfsstat3::NFS3ERR_EXIST);
        let found = self.lookup(cred, dir, name).await.map_err(uncertain)?;
        match self.readlink(cred, &found.handle).await {
            Ok(link) if link.target == target => Ok(CreateOk {
                handle: Some(found.handle),
                attr: found.attr.or(link.attr),
                dir: Wcc {
                    before: None,
                    after: found.dir_attr,
                },
            }),
            // Another symlink, or none at all.
            Ok(_) | Err(NfsError::Status(nfsstat3::NFS3ERR_INVAL)) => {
                Err(NfsError::Status(nfsstat3::NFS3ERR_EXIST))
            }
            Err(e) => Err(uncertain(e)),
        }
    }

    /// Makes a FIFO, a socket or a device.
    ///
    /// # Errors
    /// [`NfsError`]. `Uncertain(EXIST)`: the first call may have made it.
    pub async fn mknod(
        &self,
        cred: &Cred,
        dir: &FileHandle,
        name: &[u8],
        node: Node,
        set: &SetAttr,
    ) -> Result<CreateOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_MKNOD, |out| {
                entry(out, dir, name);
                out.pack(&node.wire(set));
            })
            .await?;
        self.created(answer)
    }

    /// Removes a name of anything but a directory. NOENT in answer to a repeated call is success:
    /// the name is gone.
    ///
    /// # Errors
    /// [`NfsError`].
    pub async fn remove(&self, cred: &Cred, dir: &FileHandle, name: &[u8]) -> Result<Wcc> {
        let answer = self
            .call(cred, Proc::NFSPROC3_REMOVE, |out| entry(out, dir, name))
            .await?;
        self.removed(answer)
    }

    /// Removes an empty directory. NOENT in answer to a repeated call is success.
    ///
    /// # Errors
    /// [`NfsError`].
    pub async fn rmdir(&self, cred: &Cred, dir: &FileHandle, name: &[u8]) -> Result<Wcc> {
        let answer = self
            .call(cred, Proc::NFSPROC3_RMDIR, |out| entry(out, dir, name))
            .await?;
        self.removed(answer)
    }

    /// Renames, replacing what may be at the new name. `source`, the handle of what is renamed if
    /// the caller knows it, settles NOENT in answer to a repeated call: if it is found at the new
    /// name, the first call has moved it.
    ///
    /// # Errors
    /// [`NfsError`]. `Uncertain(NOENT)`: the first call may have renamed it.
    pub async fn rename(
        &self,
        cred: &Cred,
        (from_dir, from_name): (&FileHandle, &[u8]),
        (to_dir, to_name): (&FileHandle, &[u8]),
        source: Option<&FileHandle>,
    ) -> Result<RenameOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_RENAME, |out| {
                entry(out, from_dir, from_name);
                entry(out, to_dir, to_name);
            })
            .await?;
        if !answer.doubtful(nfsstat3::NFS3ERR_NOENT) {
            return self.results(answer, decode::rename);
        }
        let mut body = answer.body;
        let wccs = decode::rename(&mut body).unwrap_or_default();
        let uncertain = |_| NfsError::Uncertain(nfsstat3::NFS3ERR_NOENT);
        let found = self
            .lookup(cred, to_dir, to_name)
            .await
            .map_err(uncertain)?;
        let moved = match source {
            Some(source) => self
                .is_same(cred, source, &found)
                .await
                .map_err(uncertain)?,
            None => false,
        };
        // Had it been moved, it would be there, unless somebody has moved it on.
        moved
            .then_some(wccs)
            .ok_or(NfsError::Uncertain(nfsstat3::NFS3ERR_NOENT))
    }

    /// Gives `file` another name. If that name leads to `file` in answer to a repeated call, the
    /// first call has made it.
    ///
    /// # Errors
    /// [`NfsError`]. `Uncertain(EXIST)`: what is there could not be looked at.
    pub async fn link(
        &self,
        cred: &Cred,
        file: &FileHandle,
        dir: &FileHandle,
        name: &[u8],
    ) -> Result<LinkOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_LINK, |out| {
                handle(out, file);
                entry(out, dir, name);
            })
            .await?;
        if !answer.doubtful(nfsstat3::NFS3ERR_EXIST) {
            return self.results(answer, decode::link);
        }
        let uncertain = |_| NfsError::Uncertain(nfsstat3::NFS3ERR_EXIST);
        let found = self.lookup(cred, dir, name).await.map_err(uncertain)?;
        if !self.is_same(cred, file, &found).await.map_err(uncertain)? {
            return Err(NfsError::Status(nfsstat3::NFS3ERR_EXIST));
        }
        Ok(LinkOk {
            attr: found.attr,
            dir: Wcc {
                before: None,
                after: found.dir_attr,
            },
        })
    }

    /// Whether a name led to this file. One file may have several handles: that of a server with
    /// `subtree_check` names the directory too.
    async fn is_same(&self, cred: &Cred, file: &FileHandle, found: &LookupOk) -> Result<bool> {
        //= 1813-2.6-handles: Two handles that differ may be of one file.
        if found.handle == *file || mutant::is_on(Mutant::HandlesAreFiles) {
            return Ok(found.handle == *file);
        }
        let there = match found.attr {
            Some(attr) => attr,
            None => self.getattr(cred, &found.handle).await?,
        };
        let ours = self.getattr(cred, file).await?;
        Ok((ours.fsid, ours.fileid) == (there.fsid, there.fileid))
    }

    /// Lists names from behind `cookie` (0 at first, with a zero `verf`); at most `count` bytes
    /// of reply.
    ///
    /// # Errors
    /// [`NfsError`]; BAD_COOKIE when the directory has to be listed from its start.
    pub async fn readdir(
        &self,
        cred: &Cred,
        dir: &FileHandle,
        cookie: u64,
        verf: [u8; 8],
        count: u32,
    ) -> Result<ReaddirOk> {
        let count = count.min(MAX_IO);
        let answer = self
            .call(cred, Proc::NFSPROC3_READDIR, |out| {
                handle(out, dir);
                out.u64(cookie).verifier(verf).u32(count);
            })
            .await?;
        self.results(answer, decode::readdir)
    }

    /// Lists names with handles and attributes, as [`Self::readdir`]; `dircount` bounds the bytes
    /// of names, `maxcount` those of the reply.
    ///
    /// # Errors
    /// [`NfsError`]; BAD_COOKIE when the directory has to be listed from its start, NOTSUPP where
    /// only [`Self::readdir`] is offered.
    pub async fn readdirplus(
        &self,
        cred: &Cred,
        dir: &FileHandle,
        cookie: u64,
        verf: [u8; 8],
        dircount: u32,
        maxcount: u32,
    ) -> Result<ReaddirPlusOk> {
        let maxcount = maxcount.min(MAX_IO);
        let answer = self
            .call(cred, Proc::NFSPROC3_READDIRPLUS, |out| {
                handle(out, dir);
                out.u64(cookie).verifier(verf).u32(dircount).u32(maxcount);
            })
            .await?;
        self.results(answer, decode::readdirplus)
    }

    /// # Errors
    /// [`NfsError`].
    pub async fn fsstat(&self, cred: &Cred, root: &FileHandle) -> Result<FsStat> {
        let answer = self
            .call(cred, Proc::NFSPROC3_FSSTAT, |out| handle(out, root))
            .await?;
        self.results(answer, decode::fsstat)
    }

    /// # Errors
    /// [`NfsError`].
    pub async fn fsinfo(&self, cred: &Cred, root: &FileHandle) -> Result<FsInfo> {
        let answer = self
            .call(cred, Proc::NFSPROC3_FSINFO, |out| handle(out, root))
            .await?;
        self.results(answer, decode::fsinfo)
    }

    /// # Errors
    /// [`NfsError`].
    pub async fn pathconf(&self, cred: &Cred, file: &FileHandle) -> Result<PathConf> {
        let answer = self
            .call(cred, Proc::NFSPROC3_PATHCONF, |out| handle(out, file))
            .await?;
        self.results(answer, decode::pathconf)
    }

    /// Makes unstable writes durable; a count of 0 means from `offset` to the end of the file.
    ///
    /// # Errors
    /// [`NfsError`].
    pub async fn commit(
        &self,
        cred: &Cred,
        file: &FileHandle,
        offset: u64,
        count: u32,
    ) -> Result<CommitOk> {
        let answer = self
            .call(cred, Proc::NFSPROC3_COMMIT, |out| {
                handle(out, file);
                out.u64(offset).u32(count);
            })
            .await?;
        self.results(answer, decode::commit)
    }

    fn created(&self, answer: Answer) -> Result<CreateOk> {
        if answer.doubtful(nfsstat3::NFS3ERR_EXIST) {
            return Err(NfsError::Uncertain(nfsstat3::NFS3ERR_EXIST));
        }
        self.results(answer, decode::create)
    }

    fn removed(&self, mut answer: Answer) -> Result<Wcc> {
        if answer.doubtful(nfsstat3::NFS3ERR_NOENT) {
            return Ok(decode::wcc(&mut answer.body).unwrap_or_default());
        }
        self.results(answer, decode::wcc)
    }
}

impl Answer {
    /// Whether this status may be the consequence of the call's own first execution.
    fn doubtful(&self, consequence: Nfs3Status) -> bool {
        //= 1813-4.5-repeat: What failed when it was repeated may have been done the first time:
        //= REMOVE, RENAME, LINK and CREATE are not idempotent.
        self.retransmitted && self.status == consequence as u32
    }
}

fn failure(number: u32) -> NfsError {
    error::status(number).map_or(NfsError::UnknownStatus(number), NfsError::Status)
}

fn handle(out: &mut Encoder, handle: &FileHandle) {
    out.opaque(handle.as_bytes());
}

fn entry(out: &mut Encoder, dir: &FileHandle, name: &[u8]) {
    handle(out, dir);
    out.opaque(name);
}
