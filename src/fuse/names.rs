//! Deleting and renaming: what needs care because NFSv3 knows no open files and no flags.

use std::sync::Arc;

use tokio::sync::oneshot;

use crate::mutant::{self, Mutant};
use nfs::rpc::nfs3::{FileHandle, FileKind, SetAttr};
use nfs::rpc::{Cred, NfsError};

use super::error::{Errno, Result};
use super::fs::{Fs, check_name};
use super::inode::{Inode, Silly};
use super::open::Target;
use super::task;
use super::turns::Change;

/// How often a new `.nfs…` name is tried: each has 32 random bits.
const SILLY_ATTEMPTS: usize = 3;

/// A name in a directory.
type Place<'a> = (&'a FileHandle, &'a [u8]);

impl Fs {
    /// A name for a file that is deleted but open, of the form that the kernel's client uses.
    fn silly_name(inode: &Inode) -> Result<Vec<u8>> {
        let mut random = [0u8; 4];
        getrandom::fill(&mut random).map_err(|_| Errno(libc::EIO))?;
        let fileid = inode.state().cached.attr.fileid;
        Ok(format!(".nfs{fileid:016x}{:08x}", u32::from_be_bytes(random)).into_bytes())
    }

    /// Runs to its end what takes names of directories away, also when its caller is killed: until
    /// then opens of the file and other changes of the directories wait, and nothing is left half
    /// done. A caller that is killed before it has its turn has changed nothing.
    async fn to_its_end<F>(
        self: &Arc<Self>,
        cred: &Cred,
        dirs: [&Arc<Inode>; 2],
        operation: impl FnOnce(Arc<Self>, Cred) -> F,
    ) -> Result<()>
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let operation = operation(Arc::clone(self), cred.clone());
        if mutant::is_on(Mutant::KilledRenamesAreForgotten) {
            return operation.await;
        }
        let (change, _caller) = Change::begin(self, cred, dirs).await;
        let (done, is_done) = oneshot::channel();
        task::begin(&self.runtime, &self.nfs, async move {
            let ended = operation.await;
            drop(change);
            let _ = done.send(ended); // unless its caller was killed
        });
        is_done.await.unwrap_or(Err(Errno(libc::EIO)))
    }

    pub(super) async fn unlink(
        self: &Arc<Self>,
        cred: &Cred,
        parent: u64,
        name: &[u8],
    ) -> Result<()> {
        let dir = self.inode(parent)?;
        let (of, name) = (Arc::clone(&dir), name.to_owned());
        self.to_its_end(cred, [&dir, &dir], |fs, cred| async move {
            fs.unlink_now(&cred, &of, &name).await
        })
        .await
    }

    async fn unlink_now(self: &Arc<Self>, cred: &Cred, dir: &Inode, name: &[u8]) -> Result<()> {
        let _replaces = self.replacing.begin();
        let target = self.inodes.named(dir.ino, name);
        let _going = match target.clone().map(|inode| Target::of(self, inode, cred)) {
            Some(Target::Open(target)) => {
                //= 1813-3.3.12-open: “the client should take steps to make sure that the file will
                //= still be accessible”
                self.hide(cred, dir, name, &target.inode).await?;
                return Ok(());
            }
            going => going,
        };
        let changing = self.change(dir);
        // One link less, and a new ctime, which REMOVE does not tell.
        let _target = target.as_deref().map(|inode| self.change(inode));
        let wcc = self.nfs.remove(cred, &dir.handle, name).await?;
        changing.done(wcc);
        self.inodes.drop_name(dir.ino, name, self.tick());
        Ok(())
    }

    pub(super) async fn rmdir(
        self: &Arc<Self>,
        cred: &Cred,
        parent: u64,
        name: &[u8],
    ) -> Result<()> {
        let dir = self.inode(parent)?;
        let (of, name) = (Arc::clone(&dir), name.to_owned());
        self.to_its_end(cred, [&dir, &dir], |fs, cred| async move {
            let changing = fs.change(&of);
            let wcc = fs.nfs.rmdir(&cred, &of.handle, &name).await?;
            changing.done(wcc);
            fs.inodes.drop_name(of.ino, &name, fs.tick());
            Ok(())
        })
        .await
    }

    /// Renames an open file out of the way, until it is closed, and tells its hidden name.
    async fn hide(&self, cred: &Cred, dir: &Inode, name: &[u8], inode: &Inode) -> Result<Vec<u8>> {
        let known = inode.state().silly.clone();
        if known.is_some_and(|silly| silly.dir == dir.handle && silly.name == name) {
            return Err(Errno(libc::EBUSY));
        }
        let hidden = Self::silly_name(inode)?;
        self.hidden.add(&dir.handle, &hidden, cred);
        let changing = self.change(dir);
        let from = (&dir.handle, name);
        let to = (&dir.handle, hidden.as_slice());
        let done = match self.nfs.rename(cred, from, to, Some(&inode.handle)).await {
            Ok(done) => done,
            Err(error) => {
                self.hidden.remove(&dir.handle, &hidden);
                return Err(error.into());
            }
        };
        changing.done(done.to);
        let names = ((dir.ino, name), (dir.ino, &*hidden));
        self.inodes.rename(names.0, names.1, self.tick());
        self.hid(cred, dir, inode, hidden.clone()).await;
        Ok(hidden)
    }

    /// Gives a file its name back that was hidden for a rename of `source` which has failed. Where
    /// that cannot be done it stays under the hidden name, so that nothing is lost: only a rename
    /// that was carried out after all has replaced it.
    async fn unhide(
        &self,
        cred: &Cred,
        (dir, name): (&Inode, &[u8]),
        inode: &Inode,
        hidden: &[u8],
        source: Option<FileHandle>,
    ) {
        let why = match self.nfs.lookup(cred, &dir.handle, name).await {
            Ok(found) if Some(found.handle) == source => return,
            Ok(_) => "another file has its name".to_owned(),
            Err(error) if error.errno() == libc::ENOENT => {
                let changing = (self.change(dir), self.change(inode));
                let (from, to) = ((&dir.handle, hidden), (&dir.handle, name));
                match self.nfs.rename(cred, from, to, Some(&inode.handle)).await {
                    Ok(done) => {
                        changing.0.done(done.to);
                        let names = ((dir.ino, hidden), (dir.ino, name));
                        self.inodes.rename(names.0, names.1, self.tick());
                        self.unhidden(dir, inode, hidden);
                        return;
                    }
                    Err(error) => error.to_string(),
                }
            }
            Err(error) => error.to_string(),
        };
        tracing::warn!(
            name = %String::from_utf8_lossy(name),
            hidden = %String::from_utf8_lossy(hidden),
            "a rename failed, and its target keeps its hidden name: {why}"
        );
        if !mutant::is_on(Mutant::RenameOfUnknownOutcomeDeletes) {
            self.unhidden(dir, inode, hidden);
        }
    }

    /// A name is not removed at the last close any more.
    fn unhidden(&self, dir: &Inode, inode: &Inode, hidden: &[u8]) {
        self.hidden.remove(&dir.handle, hidden);
        let mut state = inode.state();
        state.silly.take_if(|silly| silly.name == hidden);
    }

    /// A file has got a hidden name.
    async fn hid(&self, cred: &Cred, dir: &Inode, inode: &Inode, name: Vec<u8>) {
        let silly = Silly {
            parent: dir.ino,
            dir: dir.handle,
            name,
        };
        let previous = {
            let mut state = inode.state();
            state.cached.expire(self.tick());
            state.silly.replace(Box::new(silly))
        };
        // Another of its names was hidden before; one is enough to keep it.
        if let Some(previous) = previous {
            self.remove_silly(cred, *previous).await;
        }
    }

    /// Gives an open file a second, hidden name, so that its own can be replaced in one step.
    async fn keep(&self, cred: &Cred, dir: &Inode, inode: &Inode) -> Result<Vec<u8>> {
        for _ in 0..SILLY_ATTEMPTS {
            let hidden = Self::silly_name(inode)?;
            self.hidden.add(&dir.handle, &hidden, cred);
            let linked = self
                .nfs
                .link(cred, &inode.handle, &dir.handle, &hidden)
                .await;
            let Err(error) = linked else {
                return Ok(hidden);
            };
            self.hidden.remove(&dir.handle, &hidden);
            if error.errno() != libc::EEXIST {
                return Err(error.into());
            }
        }
        Err(Errno(libc::EIO))
    }

    pub(super) async fn remove_silly(&self, cred: &Cred, silly: Silly) {
        // Another directory may have the node id by now.
        let dir = self.inodes.get(silly.parent);
        let dir = dir.filter(|dir| dir.handle == silly.dir);
        let changing = dir.as_deref().map(|dir| self.change(dir));
        match self.nfs.remove(cred, &silly.dir, &silly.name).await {
            Ok(wcc) => {
                self.hidden.remove(&silly.dir, &silly.name);
                if let Some(changing) = changing {
                    changing.done(wcc);
                }
            }
            Err(error) if matches!(error.errno(), libc::ENOENT | libc::ESTALE) => {
                self.hidden.remove(&silly.dir, &silly.name);
            }
            Err(error) => tracing::warn!(
                name = %String::from_utf8_lossy(&silly.name),
                "a deleted file could not be removed after its last close: {error}"
            ),
        }
        self.inodes
            .drop_name(silly.parent, &silly.name, self.tick());
    }

    pub(super) async fn rename(
        self: &Arc<Self>,
        cred: &Cred,
        (parent, name): (u64, &[u8]),
        (new_parent, new_name): (u64, &[u8]),
        flags: u32,
    ) -> Result<()> {
        check_name(new_name)?;
        // Nothing in NFSv3 exchanges two names in one step.
        if !matches!(flags, 0 | libc::RENAME_NOREPLACE) {
            return Err(Errno(libc::EINVAL));
        }
        let dirs = (self.inode(parent)?, self.inode(new_parent)?);
        let (name, new_name) = (name.to_owned(), new_name.to_owned());
        let (from, to) = (Arc::clone(&dirs.0), Arc::clone(&dirs.1));
        self.to_its_end(cred, [&dirs.0, &dirs.1], |fs, cred| async move {
            let (from, to) = ((&*from, &*name), (&*to, &*new_name));
            match flags {
                0 => fs.rename_replacing(&cred, from, to).await,
                _ => fs.rename_no_replace(&cred, from, to).await,
            }
        })
        .await
    }

    async fn rename_replacing(
        self: &Arc<Self>,
        cred: &Cred,
        from: (&Inode, &[u8]),
        to: (&Inode, &[u8]),
    ) -> Result<()> {
        let _replaces = self.replacing.begin();
        if self.is_shy() {
            self.open_shyly(cred, to.0.ino, to.1);
        }
        let source = self.inodes.named(from.0.ino, from.1);
        let target = self
            .inodes
            .named(to.0.ino, to.1)
            .filter(|target| source.is_none_or(|source| source.ino != target.ino));
        match target.map(|target| Target::of(self, target, cred)) {
            Some(Target::Open(target)) => self.rename_over(cred, from, to, &target.inode).await,
            _going => Ok(self.rename_now(cred, from, to).await?),
        }
    }

    async fn rename_now(
        &self,
        cred: &Cred,
        (from, name): (&Inode, &[u8]),
        (to, new_name): (&Inode, &[u8]),
    ) -> std::result::Result<(), NfsError> {
        let source = self.inodes.named(from.ino, name);
        let target = self.inodes.named(to.ino, new_name);
        let changing = (self.change(from), self.change(to));
        // New ctimes and one link less, which RENAME does not tell.
        let _source = source.as_deref().map(|inode| self.change(inode));
        let _target = target.as_deref().map(|inode| self.change(inode));
        let handle = source.as_ref().map(|inode| &inode.handle);
        let done = self
            .nfs
            .rename(cred, (&from.handle, name), (&to.handle, new_name), handle)
            .await?;
        changing.0.done(done.from);
        changing.1.done(done.to);
        let names = ((from.ino, name), (to.ino, new_name));
        self.inodes.rename(names.0, names.1, self.tick());
        Ok(())
    }

    /// Renames over a file that is open.
    async fn rename_over(
        &self,
        cred: &Cred,
        from: (&Inode, &[u8]),
        to: (&Inode, &[u8]),
        target: &Inode,
    ) -> Result<()> {
        let (dir, new_name) = to;
        //= 1813-3.3.14-atomic: “The RENAME operation must be atomic to the client.”
        let (hidden, linked) = match self.keep(cred, dir, target).await {
            Ok(hidden) => (hidden, true),
            // No hard links there: the name is free for a moment.
            Err(Errno(libc::EOPNOTSUPP | libc::EPERM | libc::EMLINK)) => {
                (self.hide(cred, dir, new_name, target).await?, false)
            }
            Err(error) => return Err(error),
        };
        let source = self.inodes.named(from.0.ino, from.1);
        let source = source.map(|inode| inode.handle);
        let renamed = self.rename_now(cred, from, to).await;
        match (&renamed, linked) {
            (Err(error), true) if is_refused(error) => {
                let (parent, name) = (dir.ino, hidden);
                let dir = dir.handle;
                self.remove_silly(cred, Silly { parent, dir, name }).await;
                target.state().cached.expire(self.tick());
            }
            // It has lost its name, or may have: the hidden one goes with the last close.
            (_, true) => {
                self.inodes
                    .add_name(dir.ino, &hidden, target.ino, self.tick());
                self.hid(cred, dir, target, hidden).await;
            }
            (Err(_), false) if !mutant::is_on(Mutant::FailedRenameDeletes) => {
                self.unhide(cred, to, target, &hidden, source).await;
            }
            (_, false) => {}
        }
        Ok(renamed?)
    }

    /// RENAME_NOREPLACE out of what NFSv3 does atomically: LINK and MKDIR fail when the name is
    /// taken. A file has both names for a moment; a directory takes the place of an empty one.
    async fn rename_no_replace(
        &self,
        cred: &Cred,
        (from, name): (&Inode, &[u8]),
        (to, new_name): (&Inode, &[u8]),
    ) -> Result<()> {
        let found = self.nfs.lookup(cred, &from.handle, name).await?;
        let attr = match found.attr {
            Some(attr) => attr,
            None => self.nfs.getattr(cred, &found.handle).await?,
        };
        let source = self.inodes.named(from.ino, name);
        // What two calls leave behind is asked for anew, whatever comes of them.
        let _dirs = (self.change(from), self.change(to));
        let _source = source.as_deref().map(|inode| self.change(inode));
        let way = ((&from.handle, name), (&to.handle, new_name));
        if attr.kind == FileKind::Directory {
            self.take_free_place(cred, &found.handle, way).await?;
        } else {
            self.take_free_name(cred, &found.handle, way).await?;
        }
        let names = ((from.ino, name), (to.ino, new_name));
        self.inodes.rename(names.0, names.1, self.tick());
        Ok(())
    }

    async fn take_free_place(
        &self,
        cred: &Cred,
        dir: &FileHandle,
        (from, to): (Place<'_>, Place<'_>),
    ) -> Result<()> {
        self.nfs
            .mkdir(cred, to.0, to.1, &SetAttr::default())
            .await?;
        if let Err(error) = self.nfs.rename(cred, from, to, Some(dir)).await {
            // What is there may be the renamed one by now, or soon.
            if is_refused(&error) {
                let _ = self.nfs.rmdir(cred, to.0, to.1).await;
            }
            return Err(error.into());
        }
        Ok(())
    }

    async fn take_free_name(
        &self,
        cred: &Cred,
        file: &FileHandle,
        (from, to): (Place<'_>, Place<'_>),
    ) -> Result<()> {
        match self.nfs.link(cred, file, to.0, to.1).await {
            Err(error) if error.errno() == libc::EOPNOTSUPP => return Err(Errno(libc::EINVAL)),
            other => other?,
        };
        if let Err(error) = self.nfs.remove(cred, from.0, from.1).await {
            // Refused for certain: the file keeps its old name, and only that.
            if is_refused(&error) {
                let _ = self.nfs.remove(cred, to.0, to.1).await;
            }
            return Err(error.into());
        }
        Ok(())
    }
}

/// Whether a call has certainly changed nothing, and never will.
fn is_refused(error: &NfsError) -> bool {
    matches!(error, NfsError::Status(_)) || mutant::is_on(Mutant::UnansweredRenamesAreRefused)
}
