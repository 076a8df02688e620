//! Deleting and renaming: what needs care because NFSv3 knows no open files and no flags.

use std::sync::Arc;

use crate::nfs::rpc::Cred;

use super::error::{Errno, Result};
use super::fs::{Fs, check_name};
use super::inode::{Inode, Silly};

/// How often a new `.nfs…` name is tried: each has 32 random bits.
const SILLY_ATTEMPTS: usize = 3;

impl Fs {
    /// The open file behind a name, if this host has it open.
    fn open_target(&self, parent: u64, name: &[u8]) -> Option<Arc<Inode>> {
        self.inodes
            .named(parent, name)
            .filter(|inode| !inode.is_directory() && inode.state().opens > 0)
    }

    /// A name for a file that is deleted but open, of the form that the kernel's client uses.
    fn silly_name(inode: &Inode) -> Result<Vec<u8>> {
        let mut random = [0u8; 4];
        getrandom::fill(&mut random).map_err(|_| Errno(libc::EIO))?;
        let fileid = inode.state().cached.attr.fileid;
        Ok(format!(".nfs{fileid:016x}{:08x}", u32::from_be_bytes(random)).into_bytes())
    }

    pub(super) async fn unlink(&self, cred: &Cred, parent: u64, name: &[u8]) -> Result<()> {
        let dir = self.inode(parent)?;
        if let Some(inode) = self.open_target(parent, name) {
            return self.hide(cred, &dir, name, &inode).await;
        }
        let changing = self.change(&dir);
        let target = self.inodes.named(parent, name);
        // One link less, and a new ctime, which REMOVE does not tell.
        let _target = target.as_deref().map(|inode| self.change(inode));
        let wcc = self.nfs.remove(cred, &dir.handle, name).await?;
        changing.done(wcc);
        self.inodes.drop_name(parent, name);
        Ok(())
    }

    /// Renames an open file out of the way, until it is closed.
    async fn hide(&self, cred: &Cred, dir: &Inode, name: &[u8], inode: &Inode) -> Result<()> {
        let known = inode.state().silly.clone();
        if known.is_some_and(|silly| silly.parent == dir.ino && silly.name == name) {
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
        self.inodes.rename((dir.ino, name), (dir.ino, &hidden));
        self.hid(cred, dir, inode, hidden).await;
        Ok(())
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
            state.cached.expire();
            state.silly.replace(silly)
        };
        // Another of its names was hidden before; one is enough to keep it.
        if let Some(previous) = previous {
            self.remove_silly(cred, previous).await;
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
        let dir = self.inodes.get(silly.parent);
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
        self.inodes.drop_name(silly.parent, &silly.name);
    }

    pub(super) async fn rename(
        &self,
        cred: &Cred,
        (parent, name): (u64, &[u8]),
        (new_parent, new_name): (u64, &[u8]),
        flags: u32,
    ) -> Result<()> {
        check_name(new_name)?;
        let from = self.inode(parent)?;
        let to = self.inode(new_parent)?;
        match flags {
            0 => {}
            libc::RENAME_NOREPLACE => {
                return self
                    .rename_no_replace(cred, (&from, name), (&to, new_name))
                    .await;
            }
            // Nothing in NFSv3 exchanges two names in one step.
            _ => return Err(Errno(libc::EINVAL)),
        }
        let source = self.inodes.named(parent, name);
        let target = self
            .open_target(new_parent, new_name)
            .filter(|target| source.as_ref().is_none_or(|s| s.ino != target.ino));
        let kept = match &target {
            Some(inode) => match self.keep(cred, &to, inode).await {
                Ok(kept) => Some(kept),
                // No hard links there: the name is free for a moment.
                Err(Errno(libc::EOPNOTSUPP | libc::EPERM | libc::EMLINK)) => {
                    self.hide(cred, &to, new_name, inode).await?;
                    None
                }
                Err(error) => return Err(error),
            },
            None => None,
        };
        let changing = (self.change(&from), self.change(&to));
        // A new ctime, which RENAME does not tell.
        let _source = source.as_deref().map(|inode| self.change(inode));
        let handle = source.as_ref().map(|inode| &inode.handle);
        let done = self
            .nfs
            .rename(cred, (&from.handle, name), (&to.handle, new_name), handle)
            .await;
        let done = match done {
            Ok(done) => done,
            Err(error) => {
                if let Some(name) = kept {
                    let (parent, dir) = (new_parent, to.handle);
                    self.remove_silly(cred, Silly { parent, dir, name }).await;
                }
                return Err(error.into());
            }
        };
        changing.0.done(done.from);
        changing.1.done(done.to);
        self.inodes.rename((parent, name), (new_parent, new_name));
        if let (Some(inode), Some(kept)) = (target, kept) {
            self.inodes.add_name(new_parent, &kept, inode.ino);
            self.hid(cred, &to, &inode, kept).await;
        }
        Ok(())
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
        if attr.kind == crate::nfs::rpc::nfs3::FileKind::Directory {
            let set = crate::nfs::rpc::nfs3::SetAttr::default();
            self.nfs.mkdir(cred, &to.handle, new_name, &set).await?;
            let source = (&from.handle, name);
            let target = (&to.handle, new_name);
            if let Err(error) = self
                .nfs
                .rename(cred, source, target, Some(&found.handle))
                .await
            {
                let _ = self.nfs.rmdir(cred, &to.handle, new_name).await;
                return Err(error.into());
            }
        } else {
            match self
                .nfs
                .link(cred, &found.handle, &to.handle, new_name)
                .await
            {
                Err(error) if error.errno() == libc::EOPNOTSUPP => {
                    return Err(Errno(libc::EINVAL));
                }
                other => other?,
            };
            self.nfs.remove(cred, &from.handle, name).await?;
        }
        self.inodes.rename((from.ino, name), (to.ino, new_name));
        from.state().cached.expire();
        to.state().cached.expire();
        if let Some(inode) = self.inodes.named(to.ino, new_name) {
            inode.state().cached.expire();
        }
        Ok(())
    }
}
