//! Operations that make something: files, directories, links, special files.
//!
//! Known limit: what a program makes that is killed meanwhile may appear later.

use std::sync::Arc;

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::{CreateOk, How, Node, SetAttr, SetTime, Wcc};

use super::attr::now;
use super::error::{Errno, Result};
use super::fs::{Change, Changing, Entry, Found, Fs, Opened, check_name};
use super::inode::Inode;
use super::open::{Opening, settled};
use super::turns::{NamesTurn, names_turn};

/// How often a file is made, or opened, whose name another host makes and takes away meanwhile.
const ATTEMPTS: usize = 10;

impl Fs {
    /// A directory whose names nothing of this host changes. The kernel sees to that, but a rename or
    /// unlink goes on when its program is killed, and would take away what was made meanwhile.
    async fn dir_to_make_in(&self, parent: u64) -> Result<(Arc<Inode>, Option<NamesTurn>)> {
        let dir = self.inode(parent)?;
        let turn = names_turn(&dir).await;
        Ok((dir, turn))
    }

    /// An own call has made this entry: a look that was asked for beside it may not have seen that yet.
    fn is_new(&self, dir: &Inode, name: &[u8], entry: Entry) -> Entry {
        self.inodes.add_name(dir.ino, name, entry.ino, self.tick());
        entry
    }

    /// Turns the answer of an operation that made something into an entry.
    async fn made(
        &self,
        cred: &Cred,
        (dir, changing): (&Inode, Changing<'_>),
        name: &[u8],
        made: CreateOk,
    ) -> Result<Entry> {
        let asked = changing.asked();
        changing.done(made.dir);
        let (handle, attr) = match (made.handle, made.attr) {
            (Some(handle), Some(attr)) => (handle, attr),
            (Some(handle), None) => (handle, self.nfs.getattr(cred, &handle).await?),
            (None, _) => {
                let found = self.nfs.lookup(cred, &dir.handle, name).await?;
                let attr = match found.attr {
                    Some(attr) => attr,
                    None => self.nfs.getattr(cred, &found.handle).await?,
                };
                (found.handle, attr)
            }
        };
        let entry = self.entry(dir, name, handle, attr, asked);
        Ok(self.is_new(dir, name, entry))
    }

    pub(super) async fn mkdir(
        &self,
        cred: &Cred,
        parent: u64,
        name: &[u8],
        mode: u32,
    ) -> Result<Entry> {
        check_name(name)?;
        let (dir, _turn) = self.dir_to_make_in(parent).await?;
        let changing = self.change(&dir);
        let made = self
            .nfs
            .mkdir(cred, &dir.handle, name, &with_mode(mode))
            .await?;
        self.made(cred, (&dir, changing), name, made).await
    }

    pub(super) async fn symlink(
        &self,
        cred: &Cred,
        parent: u64,
        name: &[u8],
        target: &[u8],
    ) -> Result<Entry> {
        check_name(name)?;
        let (dir, _turn) = self.dir_to_make_in(parent).await?;
        let changing = self.change(&dir);
        let set = with_mode(0o777);
        let made = self
            .nfs
            .symlink(cred, &dir.handle, name, target, &set)
            .await?;
        self.made(cred, (&dir, changing), name, made).await
    }

    /// `rdev` as the kernel encodes it (`new_encode_dev`).
    pub(super) async fn mknod(
        &self,
        cred: &Cred,
        parent: u64,
        name: &[u8],
        mode: u32,
        rdev: u32,
    ) -> Result<Entry> {
        check_name(name)?;
        let (dir, _turn) = self.dir_to_make_in(parent).await?;
        let changing = self.change(&dir);
        let (major, minor) = (
            (rdev >> 8) & 0xfff,
            (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00),
        );
        let node = match mode & libc::S_IFMT {
            libc::S_IFIFO => Node::Fifo,
            libc::S_IFSOCK => Node::Socket,
            libc::S_IFCHR => Node::CharDevice(major, minor),
            libc::S_IFBLK => Node::BlockDevice(major, minor),
            libc::S_IFREG => {
                let how = How::Guarded(with_mode(mode));
                let made = self.nfs.create(cred, &dir.handle, name, how).await?;
                return self.made(cred, (&dir, changing), name, made).await;
            }
            _ => return Err(Errno(libc::EINVAL)),
        };
        let made = self
            .nfs
            .mknod(cred, &dir.handle, name, node, &with_mode(mode))
            .await?;
        self.made(cred, (&dir, changing), name, made).await
    }

    pub(super) async fn create(
        self: &Arc<Self>,
        cred: &Cred,
        parent: u64,
        name: &[u8],
        mode: u32,
        flags: i32,
    ) -> Result<(Entry, Opened)> {
        check_name(name)?;
        let (dir, _turn) = self.dir_to_make_in(parent).await?;
        for _ in 0..ATTEMPTS {
            let changing = self.change(&dir);
            let set = with_mode(mode);
            let made = if flags & libc::O_EXCL != 0 {
                self.create_exclusive(cred, &dir, name, set).await?
            } else {
                // The kernel has found no such name. Only where another host made it since is it opened.
                let how = How::Guarded(set);
                match self.nfs.create(cred, &dir.handle, name, how).await {
                    Err(error) if error.errno() == libc::EEXIST => {
                        drop(changing);
                        match self.lookup(cred, parent, name).await? {
                            Found::Entry(entry) => {
                                return self.open_found(cred, entry, flags).await;
                            }
                            Found::Absent(_) => continue,
                        }
                    }
                    made => made?,
                }
            };
            // Who made the file may write to it, whatever its mode, and whoever the server says he is.
            let entry = self.made(cred, (&dir, changing), name, made).await?;
            let inode = self.inode(entry.ino)?;
            let opening = Opening::new(self, &inode, cred);
            return Ok((entry, self.opened(opening, flags)));
        }
        // The kernel begins anew, once.
        Err(Errno(libc::ESTALE))
    }

    /// Opens, instead of making it, what another host has made since the kernel found no such name.
    async fn open_found(
        self: &Arc<Self>,
        cred: &Cred,
        mut entry: Entry,
        flags: i32,
    ) -> Result<(Entry, Opened)> {
        let granted = Granted(self, entry.ino);
        let inode = self.inode(entry.ino)?;
        if !inode.is_file() {
            // The kernel looks it up anew, and sees what it is.
            return Err(Errno(libc::ESTALE));
        }
        let opening = Opening::new(self, &inode, cred);
        settled(&inode).await;
        self.check_access(cred, &inode, flags).await?;
        if flags & libc::O_TRUNC != 0 {
            // Not by a CREATE: nobody waits for one whose program was killed.
            let mut change = Change::default();
            change.set.size = Some(0);
            self.setattr(cred, entry.ino, change).await?;
        }
        if !mutant::is_on(Mutant::CreateTellsOldAttributes) {
            // The kernel is told what was heard last: another host may write at this moment.
            let state = inode.state();
            entry.attr = state.attr();
            entry.attr_trusted = state.cached.remaining(now());
        }
        std::mem::forget(granted);
        Ok((entry, self.opened(opening, flags)))
    }

    /// CREATE that a retransmission cannot make fail, then the attributes.
    async fn create_exclusive(
        &self,
        cred: &Cred,
        dir: &Inode,
        name: &[u8],
        set: SetAttr,
    ) -> Result<CreateOk> {
        let mut verifier = [0u8; 8];
        getrandom::fill(&mut verifier).map_err(|_| Errno(libc::EIO))?;
        let how = How::Exclusive(verifier);
        let mut made = match self.nfs.create(cred, &dir.handle, name, how).await {
            Err(error) if error.errno() == libc::EOPNOTSUPP => {
                let how = How::Guarded(set);
                return Ok(self.nfs.create(cred, &dir.handle, name, how).await?);
            }
            other => other?,
        };
        let handle = match made.handle {
            Some(handle) => handle,
            None => self.nfs.lookup(cred, &dir.handle, name).await?.handle,
        };
        // Servers keep the verifier in the times until they are set.
        let set = SetAttr {
            atime: SetTime::Server,
            mtime: SetTime::Server,
            ..set
        };
        //= 1813-3.3.8-setattr: “Once the client has performed a successful exclusive create, it
        //= must issue a SETATTR to set the correct file attributes.”
        let wcc = self.nfs.setattr(cred, &handle, &set, None).await?;
        made.handle = Some(handle);
        //= 1813-3.3.8-attributes: “Until it does so, it should not rely upon any of the file
        //= attributes”
        made.attr = wcc.after;
        Ok(made)
    }

    pub(super) async fn link(
        &self,
        cred: &Cred,
        ino: u64,
        parent: u64,
        name: &[u8],
    ) -> Result<Entry> {
        check_name(name)?;
        let inode = self.inode(ino)?;
        let (dir, _turn) = self.dir_to_make_in(parent).await?;
        let changing = (self.change(&inode), self.change(&dir));
        let linked = self
            .nfs
            .link(cred, &inode.handle, &dir.handle, name)
            .await?;
        changing.1.done(linked.dir);
        let attr = match linked.attr {
            Some(attr) => attr,
            None => self.nfs.getattr(cred, &inode.handle).await?,
        };
        let asked = changing.0.asked();
        changing.0.done(Wcc {
            before: None,
            after: Some(attr),
        });
        // One more lookup of the same node.
        let entry = self.entry(&dir, name, inode.handle, attr, asked);
        Ok(self.is_new(&dir, name, entry))
    }
}

/// A lookup that the kernel has not been told of yet.
struct Granted<'a>(&'a Fs, u64);

impl Drop for Granted<'_> {
    fn drop(&mut self) {
        self.0.forget(self.1, 1);
    }
}

fn with_mode(mode: u32) -> SetAttr {
    SetAttr {
        mode: Some(mode & 0o7777),
        ..SetAttr::default()
    }
}
