//! Setting attributes: sizes, modes, owners and times.
//!
//! Invariants:
//! - what is written before is on the server by then, and what is written after it is sent after it;
//! - one call at a time changes a file's attributes, in the order of the requests;
//! - it goes on when its program is killed, and until it has ended nobody on this host writes to the
//!   file: the server may carry it out later than a program's end, and a cut would take with it what
//!   others have written since.
//!
//! Known limits: of two hosts either may be first; a call that was given up after `io_timeout` may
//! still be carried out.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::{Attr, SetAttr};

use super::error::{Errno, Result};
use super::fs::{Change, Fs};
use super::inode::Inode;
use super::open::Opening;
use super::task;

impl Fs {
    pub(super) async fn setattr(
        self: &Arc<Self>,
        cred: &Cred,
        ino: u64,
        change: Change,
    ) -> Result<(Attr, Duration)> {
        let inode = self.inode(ino)?;
        // Who opened the file may cut it, whatever has become of its mode since.
        let file = change.fh.and_then(|fh| self.file(fh).ok());
        let cred = match &file {
            Some(file) if change.set.size.is_some() && file.writes() => &file.cred,
            _ => cred,
        };
        if mutant::is_on(Mutant::KilledCutsComeLater) {
            self.set(cred, &inode, &change.set, || false).await?;
        } else {
            self.set_in_turn(cred, &inode, change.set).await?;
        }
        self.fresh(cred, &inode).await
    }

    /// Sets attributes when it is the file's turn. A caller that is killed before that has changed
    /// nothing.
    async fn set_in_turn(
        self: &Arc<Self>,
        cred: &Cred,
        inode: &Arc<Inode>,
        set: SetAttr,
    ) -> Result<()> {
        // It keeps the file known: another one of its handle would have another turn.
        let (fs, opening) = (Arc::clone(self), Opening::new(self, inode, cred));
        let (cred, inode) = (cred.clone(), Arc::clone(inode));
        let (done, is_done) = oneshot::channel();
        task::begin(&self.runtime, &self.nfs, async move {
            let turn = inode.turn().lock().await;
            let ended = fs.set(&cred, &inode, &set, || done.is_closed()).await;
            // Before the caller goes on: it may write next, or take the name away.
            drop((turn, opening));
            let _ = done.send(ended); // unless it was killed
        });
        is_done.await.unwrap_or(Err(Errno(libc::EIO)))
    }

    async fn set(
        self: &Arc<Self>,
        cred: &Cred,
        inode: &Arc<Inode>,
        set: &SetAttr,
        is_given_up: impl Fn() -> bool + Send,
    ) -> Result<()> {
        if inode.is_file() && !is_given_up() {
            // What is written later must not undo the new size or times, nor be refused because
            // of the new owner.
            self.sync(inode).await?;
        }
        if is_given_up() {
            return Err(Errno(libc::EINTR));
        }
        let changing = self.change(inode);
        let wcc = self.nfs.setattr(cred, &inode.handle, set, None).await?;
        if let Some(size) = set.size {
            let mut state = inode.state();
            let data = state.data();
            //= 1813-3.3.2-size: “A client must account for this as size changes can result in
            //= data deletion.”
            data.held.cut(size);
            data.own_size.cut(size, self.tick());
        }
        changing.done(wcc);
        Ok(())
    }
}
