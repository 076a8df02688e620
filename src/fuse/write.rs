//! Writing: bytes are gathered, sent by parallel unstable WRITE calls, and made durable by COMMIT.
//!
//! Invariants:
//! - what a program wrote stays in memory until the server has it durably, so that it can be sent
//!   again when the write verifier says that the server lost it;
//! - bytes in memory are bounded, per file and in all; beyond it writers wait;
//! - an error is told to every open file once: by the next write, fsync or close; if none was open
//!   or asked, to the next that is opened (the kernel's `errseq_t`). The bytes that could not be
//!   written are dropped then, also from the kernel's page cache;
//! - an append goes to the end as it is when its bytes are taken.
//!
//! When bytes are sent: a full chunk at once; the rest at fsync, close, stat and truncate, or
//! after [`LINGER`].

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::mutant::{self, Mutant};
use crate::nfs::rpc::Cred;
use crate::nfs::rpc::nfs3::{NfsError, Stable, WriteOk};

use super::error::{Errno, Result};
use super::extents::Flight;
use super::fs::{Fs, OpenFile};
use super::inode::{Inode, State, WriteError};

/// How much is held in memory, in bytes. A simulation sets less.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Of one file before its writers wait.
    pub(super) file: usize,
    /// Over all files before writers wait.
    pub(super) all: usize,
    /// What waits for a COMMIT before one is made without being asked for.
    pub(super) commit: usize,
}

impl Default for Bounds {
    /// Of one file: what is on its way at 300 MB/s while the server's disk takes 100 ms for a
    /// COMMIT. Over all: a worker is to stay below 96 MiB.
    fn default() -> Self {
        Self {
            file: 32 << 20,
            all: 48 << 20,
            commit: 8 << 20,
        }
    }
}

/// WRITE calls of one file at a time.
const SENDERS: usize = 16;
/// How long written bytes may lie unsent, and sent ones uncommitted. The kernel's client lets them
/// lie for up to 30 s.
const LINGER: Duration = Duration::from_secs(1);
/// How often one fsync looks for bytes to send again, which come back when the server restarts;
/// each look waits for something to happen.
const ROUNDS: usize = 10_000;

/// What a WRITE request asks for beside its bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct WriteTo {
    /// Where; of an append, where the kernel believes the end to be.
    pub(super) offset: u64,
    /// The request's own `O_…` flags: those of the open may have been changed by fcntl since, and
    /// `RWF_DSYNC` is of one write only.
    pub(super) flags: i32,
    /// Written back from the kernel's page cache: nobody's write(2).
    pub(super) from_pages: bool,
}

impl WriteTo {
    fn appends(&self, file: &OpenFile) -> bool {
        let flags = if mutant::is_on(Mutant::FlagsOfTheOpen) {
            file.flags
        } else {
            self.flags
        };
        !self.from_pages && flags & libc::O_APPEND != 0
    }

    /// Whether the write ends only when its bytes are durable.
    fn syncs(&self, file: &OpenFile) -> bool {
        let (flags, durable) = if mutant::is_on(Mutant::FlagsOfTheOpen) {
            (file.flags, libc::O_DIRECT)
        } else {
            (self.flags, libc::O_DIRECT | libc::O_DSYNC | libc::O_SYNC)
        };
        !self.from_pages && flags & durable != 0
    }
}

/// What a write that needs no waiting came to.
#[derive(Debug)]
pub(super) enum Quick {
    Done,
    Failed(Errno),
    /// It has to wait; see [`Fs::write`].
    Wait,
}

impl Fs {
    /// Takes bytes if that needs no waiting, which is the common case.
    pub(super) fn write_quick(
        self: &Arc<Self>,
        file: &OpenFile,
        to: WriteTo,
        data: &[u8],
    ) -> Quick {
        if let Some(errno) = told_to_writer(file, to) {
            return Quick::Failed(errno);
        }
        if self.options.sync || to.syncs(file) {
            return Quick::Wait;
        }
        let mut state = file.inode.state();
        let held = state.data().held.bytes();
        let all = self.held.load(Ordering::Relaxed);
        if state.data().careful
            || (held > 0 && held + data.len() > self.bounds.file)
            || (all > 0 && all + data.len() > self.bounds.all)
        {
            return Quick::Wait;
        }
        let at = self.hold(&mut state, file, to, data);
        drop(state);
        self.placed(&file.inode, to, at);
        self.send(&file.inode);
        Quick::Done
    }

    /// Takes bytes, when there is room; in careful mode, or with `sync`, after the server has.
    pub(super) async fn write(
        self: &Arc<Self>,
        file: &OpenFile,
        to: WriteTo,
        data: &[u8],
    ) -> Result<()> {
        let inode = &file.inode;
        let at = loop {
            let progress = inode.progress.notified();
            let room = self.room.notified();
            tokio::pin!(progress, room);
            progress.as_mut().enable();
            room.as_mut().enable();
            if let Some(errno) = told_to_writer(file, to) {
                return Err(errno);
            }
            {
                let mut state = inode.state();
                let held = state.data().held.bytes();
                let all = self.held.load(Ordering::Relaxed);
                let fits = held == 0 || held + data.len() <= self.bounds.file;
                if fits && (all == 0 || all + data.len() <= self.bounds.all) {
                    break self.hold(&mut state, file, to, data);
                }
            }
            self.relieve(inode);
            tokio::select! {
                () = &mut progress => {}
                () = &mut room => {}
            }
        };
        self.placed(inode, to, at);
        let careful = inode.state().data().careful;
        if to.syncs(file) || self.options.sync {
            self.sync(inode).await;
        } else if careful {
            self.send_all(inode).await;
        } else {
            self.send(inode);
        }
        told_to_writer(file, to).map_or(Ok(()), Err)
    }

    /// Holds bytes, and says where: an append goes to the end as it is at this moment, not to the
    /// one that the kernel knows of.
    fn hold(self: &Arc<Self>, state: &mut State, file: &OpenFile, to: WriteTo, data: &[u8]) -> u64 {
        let chunk = self.sizes.write as usize;
        let offset = if to.appends(file) {
            state.attr().size
        } else {
            to.offset
        };
        let known = state.data();
        let before = known.held.bytes();
        known.held.write(offset, data, &file.cred, chunk);
        let after = known.held.bytes();
        let tend = !std::mem::replace(&mut known.tended, true);
        // It may also have shrunk: nothing is held twice.
        self.held.fetch_add(after, Ordering::Relaxed);
        self.held.fetch_sub(before, Ordering::Relaxed);
        if tend {
            let fs = Arc::clone(self);
            let inode = Arc::clone(&file.inode);
            self.runtime.spawn(async move { fs.tend(&inode).await });
        }
        offset
    }

    /// A write went where the kernel does not know of: what it has cached is of another size.
    fn placed(&self, inode: &Inode, to: WriteTo, at: u64) {
        if at != to.offset {
            self.kernel.drop_attributes(inode.ino);
            self.kernel.drop_pages(inode.ino);
        }
    }

    /// Sends and commits what lies around, until nothing does.
    async fn tend(self: &Arc<Self>, inode: &Arc<Inode>) {
        loop {
            tokio::time::sleep(LINGER).await;
            {
                let mut state = inode.state();
                let data = state.data();
                if data.held.is_clean() {
                    data.tended = false;
                    break;
                }
            }
            self.sync(inode).await;
        }
        self.inodes.release(inode.ino);
    }

    /// Memory is short: sends and commits whatever is held, of this file and of all others.
    fn relieve(self: &Arc<Self>, inode: &Arc<Inode>) {
        let mut busy = vec![Arc::clone(inode)];
        if self.held.load(Ordering::Relaxed) > self.bounds.all / 2 {
            busy = self.inodes.busy();
        }
        for inode in busy {
            {
                let mut state = inode.state();
                let data = state.data();
                data.force = data.held.mark();
            }
            self.send(&inode);
            self.commit_soon(&inode);
        }
    }

    /// Starts as many senders as there are calls to make.
    fn send(self: &Arc<Self>, inode: &Arc<Inode>) {
        loop {
            let flight = {
                let mut state = inode.state();
                let data = state.data();
                if data.senders >= SENDERS {
                    return;
                }
                let Some(flight) = data.held.take(self.sizes.write as usize, data.force) else {
                    return;
                };
                data.senders += 1;
                flight
            };
            let fs = Arc::clone(self);
            let inode = Arc::clone(inode);
            self.runtime
                .spawn(async move { fs.sender(&inode, flight).await });
        }
    }

    async fn sender(self: &Arc<Self>, inode: &Arc<Inode>, first: Flight<Cred>) {
        let mut next = Some(first);
        while let Some(flight) = next {
            self.fly(inode, flight, Stable::Unstable).await;
            let mut state = inode.state();
            let data = state.data();
            next = data.held.take(self.sizes.write as usize, data.force);
            if next.is_none() {
                data.senders -= 1;
            }
            let due = data.held.written() >= self.bounds.commit;
            drop(state);
            if due {
                self.commit_soon(inode);
            }
        }
        inode.progress.notify_waiters();
    }

    /// Makes one WRITE call and notes what it came to.
    async fn fly(&self, inode: &Inode, flight: Flight<Cred>, stable: Stable) {
        let landing = Landing {
            fs: self,
            inode,
            id: flight.id,
            offset: flight.offset,
        };
        let changing = self.change(inode);
        let answer = self
            .nfs
            .write(
                &flight.owner,
                &inode.handle,
                flight.offset,
                flight.data,
                stable,
            )
            .await;
        match &answer {
            Ok(ok) => changing.wrote(ok.wcc),
            Err(_) => drop(changing),
        }
        landing.land(answer);
    }

    fn landed(
        &self,
        inode: &Inode,
        (id, offset): (u64, u64),
        answer: std::result::Result<WriteOk, NfsError>,
    ) {
        let mut state = inode.state();
        let known = state.data();
        let before = known.held.bytes();
        let failed = match answer {
            Ok(ok) => {
                known.held.sent(
                    id,
                    ok.count as usize,
                    ok.verf,
                    ok.committed != Stable::Unstable,
                );
                known.careful = false;
                let end = offset + u64::from(ok.count);
                state.note_written(end, self.tick());
                false
            }
            Err(error) => {
                tracing::warn!(ino = inode.ino, "WRITE failed: {error}");
                known.held.failed(id);
                self.note_error(&mut state, error.errno());
                true
            }
        };
        let freed = before - state.data().held.bytes();
        drop(state);
        self.freed(inode, freed);
        if failed {
            self.kernel.drop_pages(inode.ino);
        }
    }

    fn note_error(&self, state: &mut State, errno: i32) {
        let number = self.tick();
        let data = state.data();
        data.error = Some(WriteError {
            number,
            errno,
            told: false,
        });
        data.careful = true;
        state.cached.expire();
        state.version += 1;
    }

    fn freed(&self, inode: &Inode, bytes: usize) {
        self.held.fetch_sub(bytes, Ordering::Relaxed);
        if bytes > 0 {
            self.room.notify_waiters();
        }
        inode.progress.notify_waiters();
    }

    fn commit_soon(self: &Arc<Self>, inode: &Arc<Inode>) {
        {
            let mut state = inode.state();
            let data = state.data();
            if data.committing || data.held.written() == 0 {
                return;
            }
            data.committing = true;
        }
        let fs = Arc::clone(self);
        let inode = Arc::clone(inode);
        self.runtime.spawn(async move {
            fs.commit(&inode).await;
            inode.state().data().committing = false;
            inode.progress.notify_waiters();
            fs.send(&inode);
        });
    }

    /// Makes one COMMIT call for all that was written so far.
    async fn commit(&self, inode: &Inode) {
        let (begun, cred) = {
            let mut state = inode.state();
            let data = state.data();
            let Some(cred) = data.held.writer() else {
                return;
            };
            (data.held.begin_commit(), cred)
        };
        let changing = self.change(inode);
        let answer = self.nfs.commit(&cred, &inode.handle, 0, 0).await;
        match &answer {
            Ok(ok) => changing.wrote(ok.wcc),
            Err(_) => drop(changing),
        }
        let mut state = inode.state();
        let data = state.data();
        let before = data.held.bytes();
        let failed = match answer {
            Ok(ok) => {
                data.held.committed(begun, ok.verf);
                // What was lost has to go out again, however small.
                data.force = data.force.max(data.held.mark());
                false
            }
            Err(error) => {
                tracing::warn!(ino = inode.ino, "COMMIT failed: {error}");
                data.held.commit_failed(begun);
                self.note_error(&mut state, error.errno());
                true
            }
        };
        let freed = before - state.data().held.bytes();
        drop(state);
        self.freed(inode, freed);
        if failed {
            self.kernel.drop_pages(inode.ino);
        }
    }

    /// Brings everything written so far into the server's memory. What fails is noted for the
    /// open files.
    pub(super) async fn send_all(self: &Arc<Self>, inode: &Arc<Inode>) {
        let Some(mark) = self.force(inode) else {
            return;
        };
        loop {
            let progress = inode.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            if !inode.state().data().held.unsent_upto(mark) {
                return;
            }
            self.send(inode);
            progress.await;
        }
    }

    /// Marks all that is held to be sent; `None` if nothing is.
    fn force(&self, inode: &Inode) -> Option<u64> {
        let mut state = inode.state();
        let data = state.data.as_mut()?;
        if data.held.is_clean() {
            return None;
        }
        data.force = data.held.mark();
        Some(data.force)
    }

    /// Makes everything written so far durable. What fails is noted for the open files.
    pub(super) async fn sync(self: &Arc<Self>, inode: &Arc<Inode>) {
        if self.sync_in_one_call(inode).await {
            return;
        }
        let Some(mark) = self.force(inode) else {
            return;
        };
        for _ in 0..ROUNDS {
            self.send_all(inode).await;
            let progress = inode.progress.notified();
            tokio::pin!(progress);
            progress.as_mut().enable();
            if !inode.state().data().held.pending(mark) {
                return;
            }
            self.commit_soon(inode);
            progress.await;
        }
        // A server that restarts all the time.
        self.note_error(&mut inode.state(), libc::EIO);
    }

    /// One small write and then fsync or close, the common case: one stable WRITE does both.
    async fn sync_in_one_call(&self, inode: &Inode) -> bool {
        let flight = {
            let mut state = inode.state();
            let Some(data) = state.data.as_mut() else {
                return true;
            };
            let chunk = self.sizes.write as usize;
            if !data.held.is_one_call(chunk) || data.committing {
                return false;
            }
            let Some(flight) = data.held.take(chunk, u64::MAX) else {
                return false;
            };
            flight
        };
        self.fly(inode, flight, Stable::FileSync).await;
        inode.state().is_clean()
    }

    /// fsync and fdatasync: about the file, so through a descriptor for reading as well.
    pub(super) async fn fsync(self: &Arc<Self>, fh: u64) -> Result<()> {
        let file = self.file(fh)?;
        if file.writes() || !mutant::is_on(Mutant::FsyncOfWritersOnly) {
            self.sync(&file.inode).await;
        }
        take_error(&file).map_or(Ok(()), Err)
    }

    /// One descriptor of an open file is closed. One for reading has nothing to wait for.
    pub(super) async fn flush(self: &Arc<Self>, fh: u64) -> Result<()> {
        let file = self.file(fh)?;
        if !file.writes() {
            return Ok(());
        }
        self.sync(&file.inode).await;
        take_error(&file).map_or(Ok(()), Err)
    }

    /// Makes everything of all files durable.
    pub(super) async fn sync_everything(self: &Arc<Self>) {
        for inode in self.inodes.busy() {
            self.sync(&inode).await;
        }
    }
}

/// The file's write error, if this open file has not reported it yet.
fn take_error(file: &OpenFile) -> Option<Errno> {
    let mut state = file.inode.state();
    let error = state.data.as_mut()?.error.as_mut()?;
    let reported = file.reported.fetch_max(error.number, Ordering::Relaxed);
    if reported >= error.number {
        return None;
    }
    error.told = true;
    Some(Errno(error.errno))
}

/// The error that a write is answered with. One that comes from the page cache has no caller: an
/// earlier error would end there, and its own bytes with it.
fn told_to_writer(file: &OpenFile, to: WriteTo) -> Option<Errno> {
    (!to.from_pages).then(|| take_error(file))?
}

/// A WRITE call under way: if its future is dropped, its bytes are unsent again.
struct Landing<'a> {
    fs: &'a Fs,
    inode: &'a Inode,
    id: u64,
    offset: u64,
}

impl Landing<'_> {
    fn land(self, answer: std::result::Result<WriteOk, NfsError>) {
        let of = (self.id, self.offset);
        self.fs.landed(self.inode, of, answer);
        std::mem::forget(self);
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.inode.state().data().held.returned(self.id);
        self.inode.progress.notify_waiters();
    }
}
