//! Writing: who may put bytes into memory, when, and how an error is told.
//!
//! Invariants:
//! - bytes in memory are bounded, per file and in all; beyond it writers wait, in turn. What is
//!   counted is at least half of the memory that is taken ([`super::extents`]);
//! - an append goes to the end as it is when its bytes are taken;
//! - an error is told to every open file once: by the next write, fsync or close; if none was open
//!   or asked, to the next that is opened (the kernel's `errseq_t`). The bytes that could not be
//!   written are dropped then, also from the kernel's page cache;
//! - every wait ends: with ETIMEDOUT when nothing has moved for `io_timeout`.
//!
//! How the bytes reach the server: [`super::writeback`].

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::{MutexGuard, oneshot};

use crate::mutant::{self, Mutant};
use nfs::rpc::nfs3::MAX_FILE;

use super::error::{Errno, Result};
use super::fs::{Fs, OpenFile};
use super::inode::{Inode, State};
use super::read::Pages;
use super::room::Room;

/// How much is held in memory, in bytes. A simulation sets less.
#[derive(Debug, Clone, Copy)]
pub(super) struct Bounds {
    /// Of one file before its writers wait.
    pub(super) file: usize,
    /// Over all files before writers wait.
    pub(super) all: usize,
    /// What waits for a COMMIT before one is made without being asked for.
    pub(super) commit: usize,
    /// Files that the kernel may know before it is made to forget those that nobody uses; not
    /// bytes. One takes about 400 bytes ([`super::inode`]). A tenth in tests.
    pub(super) known: usize,
}

impl Default for Bounds {
    /// Of one file: what is on its way at 300 MB/s while the server's disk takes 100 ms for a
    /// COMMIT. Over all: a worker is to stay below 96 MiB.
    fn default() -> Self {
        Self {
            file: 32 << 20,
            all: 48 << 20,
            commit: 8 << 20,
            known: if cfg!(feature = "failpoints") {
                5000
            } else {
                50_000
            },
        }
    }
}

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

    /// Whether the kernel appends without its page cache. A descriptor that was opened without
    /// O_APPEND and has got it since appends through it: the page that it writes to stays locked
    /// until the request is answered.
    fn appends_past_pages(&self, file: &OpenFile) -> bool {
        self.appends(file) && (file.direct || mutant::is_on(Mutant::AppendsWaitForTheirPage))
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

/// The turn of one file's writer, and among the files that of the one that waits for memory.
type Turns<'a> = (MutexGuard<'a, ()>, MutexGuard<'a, ()>);

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
        let inode = &file.inode;
        if self.options.sync
            || to.syncs(file)
            || inode.turn().try_lock().is_err()
            || self.room.is_waited_for()
        {
            return Quick::Wait;
        }
        let mut state = inode.state();
        if state.data().careful
            || (to.appends(file) && state.cached.is_expired())
            || (to.appends_past_pages(file) && state.may_have_pages)
            || !self.fits_file(&mut state, data.len())
            || !self.fits(data.len())
        {
            return Quick::Wait;
        }
        let at = match self.hold(&mut state, file, to, data) {
            Ok(at) => at,
            Err(errno) => return Quick::Failed(errno),
        };
        drop(state);
        self.placed(inode, to, at);
        self.send(inode);
        Quick::Done
    }

    /// Takes bytes, when there is room; in careful mode, or with `sync`, after the server has.
    pub(super) async fn write(
        self: &Arc<Self>,
        file: &OpenFile,
        to: WriteTo,
        data: impl AsRef<[u8]> + Send,
    ) -> Result<()> {
        let len = data.as_ref().len();
        let inode = &file.inode;
        if mutant::is_on(Mutant::AppendsAskBeforeTheirTurn) {
            self.know_end(file, to).await?;
        }
        if let Some(errno) = told_to_writer(file, to) {
            return Err(errno);
        }
        let (at, careful, may_have_pages) = {
            let turns = self.turns(file, to, len);
            let _turns = self.patiently(|| self.room.given_back(), turns).await??;
            let mut state = inode.state();
            let at = self.hold(&mut state, file, to, data.as_ref())?;
            drop(data);
            let careful = state.data().careful;
            let past = to.appends_past_pages(file);
            let pages = past && std::mem::take(&mut state.may_have_pages);
            (at, careful, pages)
        };
        self.placed(inode, to, at);
        if may_have_pages && !mutant::is_on(Mutant::AppendsKeepPages) {
            self.drop_pages_of(inode, at, len).await?;
        }
        let ended = if to.syncs(file) || self.options.sync {
            self.sync(inode).await
        } else if careful {
            self.send_all(inode).await
        } else {
            self.send(inode);
            Ok(())
        };
        told_to_writer(file, to).map_or(ended, Err)
    }

    fn fits(&self, len: usize) -> bool {
        Room::fits(self.room.cost(), len, self.bounds.all)
    }

    fn fits_file(&self, state: &mut State, len: usize) -> bool {
        Room::fits(state.data().held.cost(), len, self.bounds.file)
    }

    /// A call of unknown outcome may have cut the file; an append needs its end.
    async fn know_end(&self, file: &OpenFile, to: WriteTo) -> Result<()> {
        if to.appends(file) && file.inode.state().cached.is_expired() {
            self.fresh(&file.cred, &file.inode).await?;
        }
        Ok(())
    }

    /// Waits until a write of this length may be held, which it may be while this is kept: first
    /// for the file's own bound, then for that of all files. The turn comes before anything that
    /// may take longer for one request than for the next.
    async fn turns<'a>(
        self: &'a Arc<Self>,
        file: &'a OpenFile,
        to: WriteTo,
        len: usize,
    ) -> Result<Turns<'a>> {
        let inode = &file.inode;
        let of_file = inode.turn().lock().await;
        self.know_end(file, to).await?;
        if !self.fits_file(&mut inode.state(), len) {
            self.relieve(inode);
            let fits = || self.fits_file(&mut inode.state(), len);
            self.room.until(fits).await;
        }
        let of_all = self.room.turn().await;
        if !self.fits(len) {
            self.relieve(inode);
            self.room.until(|| self.fits(len)).await;
        }
        Ok((of_file, of_all))
    }

    /// Waits for something until nothing has moved for `io_timeout`, and a little: calls have that
    /// time as well, and what they fail with says more.
    pub(super) async fn patiently<T>(
        &self,
        moved: impl Fn() -> u64,
        something: impl Future<Output = T>,
    ) -> Result<T> {
        /// How often it is looked whether anything has moved.
        const LOOKS: u32 = 8;
        let mut something = pin!(something);
        let patience = self.options.deadline();
        let Some(patience) = patience.filter(|_| !mutant::is_on(Mutant::WaitsNeverEnd)) else {
            return Ok(something.await);
        };
        let (mut before, mut idle) = (moved(), 0);
        while idle <= LOOKS {
            let look = tokio::time::timeout(patience / LOOKS, &mut something);
            if let Ok(done) = look.await {
                return Ok(done);
            }
            idle = if moved() == before { idle + 1 } else { 0 };
            before = moved();
        }
        Err(Errno(libc::ETIMEDOUT))
    }

    /// Holds bytes, and says where: an append goes to the end as it is at this moment, not to the
    /// one that the kernel knows of.
    ///
    /// # Errors
    /// EFBIG: no file can be that long.
    fn hold(
        self: &Arc<Self>,
        state: &mut State,
        file: &OpenFile,
        to: WriteTo,
        data: &[u8],
    ) -> Result<u64> {
        let chunk = self.sizes.write as usize;
        let offset = if to.appends(file) {
            state.attr().size
        } else {
            to.offset
        };
        if offset > MAX_FILE - data.len() as u64 {
            return Err(Errno(libc::EFBIG));
        }
        // The kernel keeps what it writes, if it writes through its page cache.
        state.may_have_pages |= !to.appends_past_pages(file);
        let known = state.data();
        let share = self.room.take(data.len());
        known.held.write(offset, data, &file.cred, chunk, share);
        if !std::mem::replace(&mut known.tended, true) {
            self.tend(&file.inode);
        }
        Ok(offset)
    }

    /// A write went where the kernel does not know of: what it has cached is of another size.
    fn placed(&self, inode: &Inode, to: WriteTo, at: u64) {
        if at != to.offset {
            self.kernel.drop_attributes(inode.ino);
            self.kernel.drop_pages(inode.ino);
        }
    }

    /// An append goes past the page cache. The last page there may hold zeros in its place, and
    /// kernels before 6.18 keep it; it is dropped before the append's answer makes the file longer.
    async fn drop_pages_of(&self, inode: &Inode, at: u64, len: usize) -> Result<()> {
        // Who gives up has dropped none.
        let may_have_some = Pages(inode);
        let (done, is_done) = oneshot::channel();
        self.kernel.drop_range(inode.ino, at, len as u64, done);
        // Whoever was to do it is gone only when all of this ends.
        let _ = self.patiently(|| 0, is_done).await?;
        std::mem::forget(may_have_some);
        Ok(())
    }

    /// fsync and fdatasync: about the file, so through a descriptor for reading as well.
    pub(super) async fn fsync(self: &Arc<Self>, fh: u64) -> Result<()> {
        let file = self.file(fh)?;
        let ended = if file.writes() || !mutant::is_on(Mutant::FsyncOfWritersOnly) {
            self.sync(&file.inode).await
        } else {
            Ok(())
        };
        if !file.writes() && mutant::is_on(Mutant::ErrorsForWritersOnly) {
            return ended;
        }
        take_error(&file).map_or(ended, Err)
    }

    /// One descriptor of an open file is closed. One for reading has nothing to wait for.
    pub(super) async fn flush(self: &Arc<Self>, fh: u64) -> Result<()> {
        let file = self.file(fh)?;
        if !file.writes() {
            return Ok(());
        }
        let ended = self.sync(&file.inode).await;
        take_error(&file).map_or(ended, Err)
    }

    /// Whether what is counted is what the files hold, and nothing is held that nobody would sync.
    #[cfg(test)]
    pub(super) fn check_held(&self) -> std::result::Result<(), String> {
        let (mut bytes, mut shares) = (0, 0);
        for inode in self.inodes.all() {
            let state = inode.state();
            if let Some(data) = &state.data {
                bytes += data.held.bytes();
                shares += data.held.segments();
            }
            let known = self.dirty().get(&inode.ino).map(Arc::as_ptr);
            if !state.is_clean() && known != Some(Arc::as_ptr(&inode)) {
                return Err(format!("nobody tends to the dirty node {}", inode.ino));
            }
        }
        let counted = (self.room.bytes(), self.room.shares());
        if counted == (bytes, shares) {
            Ok(())
        } else {
            Err(format!(
                "counted (bytes, segments) {counted:?}, held ({bytes}, {shares})"
            ))
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
