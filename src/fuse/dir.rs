//! Listing directories.
//!
//! The server's cookies are the kernel's offsets, so a listing goes on at the same place whatever
//! happens to the directory meanwhile, and after a `seekdir`. Each open directory keeps one
//! answer of READDIRPLUS, from which the kernel takes as much as its buffer holds.
//!
//! Known limit: a server whose cookies go in circles is noticed after it has repeated itself, and
//! the listing ends with ELOOP.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::nfs::rpc::Cred;
use crate::nfs::rpc::nfs3::{Attr, DirEntryPlus, FileHandle, Nfs3Status};

use super::error::{Errno, Result};
use super::fs::{Entry, Fs};
use super::inode::Inode;

/// An open directory.
#[derive(Debug)]
pub(super) struct OpenDir {
    pub(super) inode: Arc<Inode>,
    stream: tokio::sync::Mutex<Stream>,
}

#[derive(Debug, Default)]
struct Stream {
    verifier: [u8; 8],
    /// The offset that the kernel asks for to get the first of `entries`.
    at: u64,
    entries: VecDeque<Item>,
    /// Nothing follows `entries`.
    end: bool,
    /// The number of the call that brought them.
    asked: u64,
    watch: Watch,
}

/// Notices cookies that come again (Brent's algorithm: one cookie is remembered, a later one each
/// time as many answers again have come).
#[derive(Debug, Default)]
struct Watch {
    cookie: Option<u64>,
    answers: u32,
    until: u32,
}

impl Watch {
    fn repeats(&mut self, cookie: u64) -> bool {
        if self.cookie == Some(cookie) {
            return true;
        }
        self.answers += 1;
        if self.answers > self.until {
            self.cookie = Some(cookie);
            self.until = self.until.saturating_mul(2).max(1);
            self.answers = 0;
        }
        false
    }
}

#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) name: bytes::Bytes,
    pub(super) cookie: u64,
    pub(super) attr: Attr,
    pub(super) handle: FileHandle,
}

impl Item {
    pub(super) fn is_dots(&self) -> bool {
        matches!(&*self.name, b"." | b"..")
    }
}

impl OpenDir {
    pub(super) fn new(inode: Arc<Inode>) -> Self {
        Self {
            inode,
            stream: tokio::sync::Mutex::default(),
        }
    }
}

impl Fs {
    /// Hands entries behind `offset` to `sink` until it has enough (and returns false for one
    /// that it did not take), or one answer of the server is used up.
    pub(super) async fn list(
        &self,
        cred: &Cred,
        dir: &OpenDir,
        offset: u64,
        mut sink: impl FnMut(&Item, u64) -> bool + Send,
    ) -> Result<()> {
        let mut stream = dir.stream.lock().await;
        if stream.at != offset || (stream.entries.is_empty() && !stream.end) {
            if stream.at != offset || offset == 0 {
                stream.watch = Watch::default();
            }
            self.fill(cred, dir, &mut stream, offset).await?;
        } else if offset == 0 && stream.end {
            // rewinddir: from the start anew.
            self.fill(cred, dir, &mut stream, 0).await?;
        }
        let asked = stream.asked;
        while let Some(item) = stream.entries.front() {
            if !sink(item, asked) {
                break;
            }
            stream.at = item.cookie;
            stream.entries.pop_front();
        }
        Ok(())
    }

    async fn fill(
        &self,
        cred: &Cred,
        dir: &OpenDir,
        stream: &mut Stream,
        offset: u64,
    ) -> Result<()> {
        let inode = &dir.inode;
        stream.entries.clear();
        stream.end = false;
        stream.at = offset;
        let mut verifier = if offset == 0 { [0; 8] } else { stream.verifier };
        let size = self.sizes.list;
        let asked = self.tick();
        let mut answer = self
            .nfs
            .readdirplus(cred, &inode.handle, offset, verifier, size, size)
            .await;
        if offset != 0
            && answer
                .as_ref()
                .is_err_and(|e| e.status() == Some(Nfs3Status::NFS3ERR_BAD_COOKIE))
        {
            // The directory changed, for a server that is strict about it. Most take the cookie
            // with a verifier of zero.
            verifier = [0; 8];
            answer = self
                .nfs
                .readdirplus(cred, &inode.handle, offset, verifier, size, size)
                .await;
        }
        let answer = answer?;
        stream.verifier = answer.verf;
        stream.end = answer.eof;
        stream.asked = asked;
        if let Some(attr) = answer.dir_attr {
            self.absorb(inode, attr, asked);
        }
        if let Some(last) = answer.entries.last()
            && !answer.eof
            && (last.cookie == offset || stream.watch.repeats(last.cookie))
        {
            return Err(Errno(libc::ELOOP));
        }
        if answer.entries.is_empty() {
            stream.end = true;
        }
        for entry in answer.entries {
            if let Some(item) = self.complete(cred, inode, entry).await? {
                stream.entries.push_back(item);
            }
        }
        Ok(())
    }

    /// An entry with its handle and attributes, asked for if the server left them out; `None` if
    /// it is gone meanwhile.
    async fn complete(
        &self,
        cred: &Cred,
        dir: &Inode,
        entry: DirEntryPlus,
    ) -> Result<Option<Item>> {
        let item = |handle, attr| Item {
            name: entry.name.clone(),
            cookie: entry.cookie,
            attr,
            handle,
        };
        if let (Some(handle), Some(attr)) = (entry.handle, entry.attr) {
            return Ok(Some(item(handle, attr)));
        }
        if matches!(&*entry.name, b"." | b"..") {
            let mut attr = dir.state().attr();
            attr.fileid = entry.fileid;
            return Ok(Some(item(dir.handle, attr)));
        }
        let found = match self.nfs.lookup(cred, &dir.handle, &entry.name).await {
            Err(error) if matches!(error.errno(), libc::ENOENT | libc::ESTALE) => return Ok(None),
            other => other?,
        };
        let attr = match found.attr {
            Some(attr) => attr,
            None => self.nfs.getattr(cred, &found.handle).await?,
        };
        Ok(Some(item(found.handle, attr)))
    }

    /// Counts a lookup for an entry that the kernel is told with its attributes.
    pub(super) fn grant(&self, dir: &OpenDir, item: &Item, asked: u64) -> Entry {
        self.list_entry(&dir.inode, &item.name, item.handle, item.attr, asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_in_circles_are_noticed() {
        for (lead, cycle) in [(0u64, 1u64), (3, 5), (100, 17)] {
            let mut watch = Watch::default();
            let noticed = (0..10_000u64)
                .map(|i| {
                    if i < lead {
                        i
                    } else {
                        lead + (i - lead) % cycle
                    }
                })
                .position(|cookie| watch.repeats(cookie));
            assert!(
                noticed.is_some_and(|n| n < 1000),
                "{lead} {cycle} {noticed:?}"
            );
        }
    }

    #[test]
    fn cookies_that_only_go_on_are_fine() {
        let mut watch = Watch::default();
        assert!((0..100_000).all(|cookie| !watch.repeats(cookie)));
    }
}
