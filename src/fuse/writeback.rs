//! How bytes that are held reach the server: by parallel unstable WRITE calls, made durable by
//! COMMIT.
//!
//! Invariants:
//! - what a program wrote stays in memory until the server has it durably, so that it can be sent
//!   again when the write verifier says that the server lost it;
//! - a call on the wire is the worker's, not its caller's: a caller waits for it and may be killed,
//!   and then nothing else is sent in the call's place before it was answered or has failed;
//! - whoever waits is woken by each answer.
//!
//! When bytes are sent: a full chunk at once; the rest at fsync, close, stat and truncate, or
//! after [`LINGER`].

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::{NfsError, Stable, WriteOk};

use super::error::Result;
use super::extents::{Flight, Held};
use super::fs::Fs;
use super::inode::{Inode, State, WriteError};
use super::task;

/// WRITE calls of one file at a time.
const SENDERS: usize = 16;
/// How long written bytes may lie unsent, and sent ones uncommitted. The kernel's client lets them
/// lie for up to 30 s.
const LINGER: Duration = Duration::from_secs(1);

impl Fs {
    /// Sends and commits what lies around, until nothing does. Until then the file is one of
    /// [`Fs::dirty`].
    pub(super) fn tend(self: &Arc<Self>, inode: &Arc<Inode>) {
        self.dirty().insert(inode.ino, Arc::clone(inode));
        let (fs, inode) = (Arc::clone(self), Arc::clone(inode));
        self.runtime.spawn(async move {
            loop {
                tokio::time::sleep(LINGER).await;
                {
                    let mut state = inode.state();
                    let data = state.data();
                    if data.held.is_clean() {
                        data.tended = false;
                        fs.tended(&inode);
                        break;
                    }
                }
                // What does not end is tried again as long as it is held.
                let _ = fs.sync(&inode).await;
            }
            fs.inodes.release(inode.ino);
        });
    }

    /// It was forgotten perhaps, and another one of its node id is tended by now.
    fn tended(&self, inode: &Arc<Inode>) {
        let mut dirty = self.dirty();
        let known = dirty.get(&inode.ino);
        if known.is_some_and(|known| Arc::ptr_eq(known, inode))
            || mutant::is_on(Mutant::DirtyByNodeId)
        {
            dirty.remove(&inode.ino);
        }
    }

    fn all_dirty(&self) -> Vec<Arc<Inode>> {
        self.dirty().values().map(Arc::clone).collect()
    }

    /// Memory is short: sends and commits whatever is held, of this file and of all others.
    pub(super) fn relieve(self: &Arc<Self>, inode: &Arc<Inode>) {
        let mut dirty = vec![Arc::clone(inode)];
        if self.room.cost() > self.bounds.all / 2 {
            dirty = match mutant::is_on(Mutant::WaitersWalkAllFiles) {
                true => self.inodes.busy(),
                false => self.all_dirty(),
            };
        }
        for inode in dirty {
            {
                let mut state = inode.state();
                let data = state.data();
                data.force = data.held.mark();
                data.pressed = true;
            }
            self.send(&inode);
            self.commit_if_due(&inode);
        }
    }

    /// Starts as many senders as there are calls to make.
    pub(super) fn send(self: &Arc<Self>, inode: &Arc<Inode>) {
        while let Some(flight) = self.next_flight(inode) {
            let (fs, inode) = (Arc::clone(self), Arc::clone(inode));
            self.runtime
                .spawn(async move { fs.sender(&inode, flight, Stable::Unstable).await });
        }
    }

    fn next_flight(&self, inode: &Inode) -> Option<Flight<Cred>> {
        let mut state = inode.state();
        let data = state.data();
        if data.senders >= SENDERS {
            return None;
        }
        let flight = data.held.take(data.force)?;
        data.senders += 1;
        Some(flight)
    }

    async fn sender(self: &Arc<Self>, inode: &Arc<Inode>, first: Flight<Cred>, mut stable: Stable) {
        let mut next = Some(first);
        while let Some(flight) = next {
            self.fly(inode, flight, stable).await;
            stable = Stable::Unstable;
            {
                let mut state = inode.state();
                let data = state.data();
                next = data.held.take(data.force);
                if next.is_none() {
                    data.senders -= 1;
                }
            }
            self.commit_if_due(inode);
        }
        inode.progress().notify_waiters();
    }

    /// Makes one WRITE call and notes what it came to.
    async fn fly(&self, inode: &Inode, flight: Flight<Cred>, stable: Stable) {
        let (id, offset) = (flight.id, flight.offset);
        let changing = self.change(inode);
        let (cred, data) = (&flight.owner, flight.data);
        let handle = &inode.handle;
        let answer = self.nfs.write(cred, handle, offset, data, stable).await;
        match &answer {
            Ok(ok) => changing.wrote(ok.wcc),
            Err(_) => drop(changing),
        }
        self.landed(inode, (id, offset), answer);
    }

    fn landed(
        &self,
        inode: &Inode,
        (id, offset): (u64, u64),
        answer: std::result::Result<WriteOk, NfsError>,
    ) {
        let mut state = inode.state();
        let known = state.data();
        let failed = match answer {
            Ok(ok) => {
                //= 1813-3.3.7-committed: “If stable was FILE_SYNC, then committed must also be
                //= FILE_SYNC: anything else constitutes a protocol violation.”
                let durable = ok.committed != Stable::Unstable;
                known.held.sent(id, ok.count as usize, ok.verf, durable);
                known.careful = false;
                if durable || !known.losing {
                    known.moved += 1;
                }
                let end = offset + u64::from(ok.count);
                state.note_written(end, self.tick());
                false
            }
            Err(error) => {
                // Of a file that goes on to fail, the first.
                if !known.careful {
                    tracing::warn!(ino = inode.ino, "WRITE failed: {error}");
                }
                known.held.failed(id);
                self.note_error(&mut state, error.errno());
                true
            }
        };
        drop(state);
        inode.progress().notify_waiters();
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
        state.cached.expire(number);
        state.version += 1;
    }

    /// Commits when much waits for it, or memory is short and nothing is left to send before.
    fn commit_if_due(self: &Arc<Self>, inode: &Arc<Inode>) {
        let due = {
            let mut state = inode.state();
            let data = state.data();
            let all_sent = !data.held.unsent_upto(data.force);
            let due = data.held.written() >= self.bounds.commit || (data.pressed && all_sent);
            // That COMMIT relieves; one under way began too early for it.
            data.pressed &= !due || data.committing;
            due
        };
        if due {
            self.commit_soon(inode);
        }
    }

    fn commit_soon(self: &Arc<Self>, inode: &Arc<Inode>) {
        {
            let mut state = inode.state();
            let data = state.data();
            if data.committing || !data.held.needs_commit() {
                return;
            }
            data.committing = true;
        }
        let (fs, inode) = (Arc::clone(self), Arc::clone(inode));
        self.runtime.spawn(async move {
            fs.commit(&inode).await;
            inode.state().data().committing = false;
            inode.progress().notify_waiters();
            fs.send(&inode);
            fs.commit_if_due(&inode);
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
        let failed = match answer {
            Ok(ok) => {
                data.losing = data.held.committed(begun, ok.verf);
                if !data.losing {
                    data.moved += 1;
                }
                // What was lost has to go out again, however small.
                data.force = data.force.max(data.held.mark());
                false
            }
            Err(error) => {
                if !data.careful {
                    tracing::warn!(ino = inode.ino, "COMMIT failed: {error}");
                }
                data.held.commit_failed(begun);
                self.note_error(&mut state, error.errno());
                true
            }
        };
        drop(state);
        inode.progress().notify_waiters();
        if failed {
            self.kernel.drop_pages(inode.ino);
        }
    }

    /// Brings everything written so far into the server's memory. What fails is noted for the
    /// open files.
    ///
    /// # Errors
    /// ETIMEDOUT, when nothing moves; the bytes stay held.
    pub(super) async fn send_all(self: &Arc<Self>, inode: &Arc<Inode>) -> Result<()> {
        match self.force(inode) {
            Some(mark) => self.until(inode, mark, Held::unsent_upto).await,
            None => Ok(()),
        }
    }

    /// Makes everything written so far durable. What fails is noted for the open files.
    ///
    /// # Errors
    /// ETIMEDOUT, when nothing moves; the bytes stay held.
    pub(super) async fn sync(self: &Arc<Self>, inode: &Arc<Inode>) -> Result<()> {
        self.sync_in_one_call(inode);
        let Some(mark) = self.force(inode) else {
            return Ok(());
        };
        let taken_back = mutant::is_on(Mutant::KilledCallsAreTakenBack).then(|| TakenBack(inode));
        let ended = self.until(inode, mark, Held::pending).await;
        if let Some(taken_back) = taken_back {
            std::mem::forget(taken_back);
        }
        ended
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

    /// Sends, and then commits, until nothing is owed any more of what was written up to a mark.
    async fn until(
        self: &Arc<Self>,
        inode: &Arc<Inode>,
        mark: u64,
        owed: fn(&Held<Cred>, u64) -> bool,
    ) -> Result<()> {
        let settled = task::until(inode.progress(), || {
            let unsent = {
                let mut state = inode.state();
                let held = &state.data().held;
                if !owed(held, mark) {
                    return true;
                }
                held.unsent_upto(mark)
            };
            if unsent {
                self.send(inode);
            } else {
                self.commit_soon(inode);
            }
            false
        });
        self.patiently(|| inode.state().data().moved, settled).await
    }

    /// One small write and then fsync or close, the common case: one stable WRITE does both. It
    /// goes out from the thread that asks, and belongs to nobody.
    fn sync_in_one_call(self: &Arc<Self>, inode: &Arc<Inode>) {
        let flight = {
            let mut state = inode.state();
            let Some(data) = state.data.as_mut() else {
                return;
            };
            if !data.held.is_one_call() || data.committing {
                return;
            }
            let Some(flight) = data.held.take(u64::MAX) else {
                return;
            };
            data.senders += 1;
            flight
        };
        let (fs, inode) = (Arc::clone(self), Arc::clone(inode));
        task::begin(&self.runtime, &self.nfs, async move {
            fs.sender(&inode, flight, Stable::FileSync).await;
        });
    }

    /// Makes everything of all files durable.
    pub(super) async fn sync_everything(self: &Arc<Self>) {
        let mut files = JoinSet::new();
        for inode in self.all_dirty() {
            let fs = Arc::clone(self);
            files.spawn(async move { fs.sync(&inode).await });
        }
        files.join_all().await;
    }
}

/// Takes back what is on the wire when its caller is killed: a fault that tests put back.
struct TakenBack<'a>(&'a Inode);

impl Drop for TakenBack<'_> {
    fn drop(&mut self) {
        self.0.state().data().held.take_back();
    }
}
