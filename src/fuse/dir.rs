//! Listing directories.
//!
//! The server's cookies are the kernel's offsets, so a listing goes on at the same place whatever
//! happens to the directory meanwhile, and after a `seekdir`. Each open directory keeps one
//! answer of the server, from which the kernel takes as much as its buffer holds, and what the
//! program behind it had no room for once more.
//!
//! Nothing but the name and the file id is needed to list an entry. Where the server tells no
//! more (a mount point, a directory that may be read and not searched, a server that has READDIR
//! only) the kernel is told no more either, and looks the entry up by itself if a program asks.
//!
//! A server may refuse to go on from a cookie when the directory has changed (BAD_COOKIE). The
//! listing then begins anew and leaves out the names that it has handed out ([`given`]).
//!
//! Known limits: after a `seekdir`, or more names than are remembered, it cannot begin anew, and
//! such a refusal is EIO; so it is where the directory changes faster than it can be read. A name
//! that is longer than Linux has names, or that is none, is left out. A server whose cookies go in
//! circles is noticed after it has repeated itself, and the listing ends with ELOOP.

mod given;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::{
    Attr, DirEntryPlus, FileHandle, FileKind, Nfs3Status, NfsError, ReaddirPlusOk,
};

use super::error::{Errno, Result};
use super::fs::{Entry, Fs, NAME_MAX};
use super::inode::{Inode, node_id};
use super::turns::{has_changed_since, names_settled};
use given::Given;

/// How often a listing begins anew, without a new name in between, before it fails.
const BEGINNINGS: u32 = 32;
/// New names that are kept while one that began anew comes to where it was.
const ON_THE_WAY: usize = 4096;

/// An open directory.
#[derive(Debug)]
pub(super) struct OpenDir {
    pub(super) inode: Arc<Inode>,
    stream: tokio::sync::Mutex<Stream>,
}

/// Where a listing is, and the answer of the server that it is in.
#[derive(Debug, Default)]
struct Stream {
    verifier: [u8; 8],
    entries: Vec<Item>,
    /// How many of `entries` were handed out, and the offset that the kernel goes on at if it has
    /// taken them all.
    next: usize,
    at: u64,
    /// The cookie that what follows `entries` is asked for with.
    resume: u64,
    /// Nothing follows `entries`.
    end: bool,
    /// The number of the call that brought them.
    asked: u64,
    watch: Watch,
    /// What was handed out before `entries`, and whether it is to be left out.
    given: Given,
    anew: bool,
    /// The place where it was is still to come.
    behind: bool,
    beginnings: u32,
}

impl Stream {
    /// The entry that follows an offset, if it is in this answer or would be the next.
    fn place(&self, offset: u64) -> Option<usize> {
        if offset == self.at {
            return Some(self.next);
        }
        let before = |item: &Item| item.cookie == offset;
        self.entries.iter().position(before).map(|index| index + 1)
    }

    /// The kernel wants what follows `offset`, wherever that is.
    fn seek(&mut self, offset: u64) {
        let mut given = Given::default();
        if offset != 0 {
            given.lose();
        }
        *self = Self {
            verifier: self.verifier,
            at: offset,
            resume: offset,
            given,
            ..Self::default()
        };
    }

    /// Whether there is something to hand out. Files that others make all the time may be found on
    /// the way to where a listing was; they alone would never bring it there.
    fn is_ready(&self) -> bool {
        self.end || (self.next < self.entries.len() && !self.behind)
    }

    /// The kernel has taken all that is there.
    fn turn(&mut self) {
        for item in self.entries.drain(..) {
            self.given.add(&item.name);
        }
        self.next = 0;
    }

    fn may_begin_anew(&self) -> bool {
        self.resume != 0
            && self.given.is_whole()
            && self.beginnings < BEGINNINGS
            && !mutant::is_on(Mutant::BadCookieEnds)
    }

    /// The server does not know the cookie any more.
    fn begin_anew(&mut self) {
        self.entries.clear();
        self.resume = 0;
        (self.anew, self.behind) = (true, true);
        self.beginnings += 1;
        self.watch = Watch::default();
    }
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

/// An entry, with what the server told of it.
#[derive(Debug, Clone)]
pub(super) struct Item {
    pub(super) name: bytes::Bytes,
    pub(super) cookie: u64,
    /// The node id that it has, or will have.
    pub(super) ino: u64,
    pub(super) attr: Option<Attr>,
    pub(super) handle: Option<FileHandle>,
}

impl Item {
    fn new(entry: DirEntryPlus, dir: &Inode) -> Self {
        let ino = match &*entry.name {
            b"." => dir.ino,
            _ => node_id(entry.fileid),
        };
        Self {
            name: entry.name,
            cookie: entry.cookie,
            ino,
            attr: entry.attr,
            handle: entry.handle,
        }
    }

    pub(super) fn is_dots(&self) -> bool {
        matches!(&*self.name, b"." | b"..")
    }

    /// There is no node for it.
    fn is_bare(&self) -> bool {
        //= 1813-3.3.17-bare: An entry may come without attributes, and without a handle.
        !self.is_dots() && self.handle.zip(self.attr).is_none()
    }

    pub(super) fn kind(&self) -> Option<FileKind> {
        if self.is_dots() {
            return Some(FileKind::Directory);
        }
        self.attr.map(|attr| attr.kind)
    }
}

impl OpenDir {
    pub(super) fn new(inode: Arc<Inode>) -> Self {
        Self {
            inode,
            stream: tokio::sync::Mutex::default(),
        }
    }

    /// Whether the kernel cannot be told a node for an entry of the call numbered `asked`, or is not
    /// to be told, because it would believe that the name leads there still.
    pub(super) fn is_bare(&self, item: &Item, asked: u64) -> bool {
        item.is_bare() || (has_changed_since(&self.inode, asked) && !item.is_dots())
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
        let stream = &mut *dir.stream.lock().await;
        names_settled(&dir.inode).await;
        // At the start always anew: it may be a rewinddir.
        match stream.place(offset).filter(|_| offset != 0) {
            Some(place) => (stream.at, stream.next) = (offset, place),
            None => stream.seek(offset),
        }
        while !stream.is_ready() {
            if !stream.behind {
                stream.turn();
            }
            self.fill(cred, &dir.inode, stream).await?;
        }
        stream.beginnings = 0;
        let asked = stream.asked;
        while let Some(item) = stream.entries.get(stream.next) {
            if !sink(item, asked) {
                break;
            }
            stream.at = item.cookie;
            stream.next += 1;
        }
        Ok(())
    }

    /// Asks for the next answer, of which nothing may be left to show.
    async fn fill(&self, cred: &Cred, dir: &Inode, stream: &mut Stream) -> Result<()> {
        let asked = self.tick();
        let answer = match self.go_on(cred, dir, stream).await {
            Err(error) if is_bad_cookie(&error) && stream.may_begin_anew() => {
                stream.begin_anew();
                return Ok(());
            }
            answer => answer?,
        };
        stream.verifier = answer.verf;
        if stream.entries.is_empty() {
            stream.asked = asked;
        }
        if let Some(attr) = answer.dir_attr {
            self.absorb(dir, attr, asked);
        }
        match answer.entries.last() {
            Some(last) => {
                let repeats = last.cookie == stream.resume || stream.watch.repeats(last.cookie);
                if repeats && !answer.eof {
                    return Err(Errno(libc::ELOOP));
                }
                stream.resume = last.cookie;
                stream.end = answer.eof;
            }
            //= 1813-3.3.16-end: Only eof says that a directory has no more entries.
            None if answer.eof || mutant::is_on(Mutant::EmptyAnswersEnd) => stream.end = true,
            // Nothing tells where to go on, and there is more.
            None => return Err(Errno(libc::EIO)),
        }
        let mut any_known = false;
        for entry in answer.entries {
            let known = stream.anew && stream.given.has(&entry.name);
            any_known |= known;
            if !known && self.is_name(&entry.name) {
                stream.entries.push(Item::new(entry, dir));
            }
        }
        stream.behind &= any_known && stream.entries.len() < ON_THE_WAY;
        Ok(())
    }

    /// What follows the place of a listing.
    async fn go_on(
        &self,
        cred: &Cred,
        dir: &Inode,
        stream: &Stream,
    ) -> std::result::Result<ReaddirPlusOk, NfsError> {
        let cookie = stream.resume;
        //= 1813-3.3.16-cookie: “For subsequent READDIRs, the client must present both the cookie
        //= and the corresponding cookie verifier.”
        let verifier = if cookie == 0 { [0; 8] } else { stream.verifier };
        let answer = self.read_dir(cred, dir, cookie, verifier).await;
        if verifier != [0; 8] && answer.as_ref().is_err_and(is_bad_cookie) {
            // The directory changed, for a server that is strict about it. Most take the cookie
            // with a verifier of zero.
            return self.read_dir(cred, dir, cookie, [0; 8]).await;
        }
        answer
    }

    /// READDIRPLUS, or READDIR if that is all there is.
    async fn read_dir(
        &self,
        cred: &Cred,
        dir: &Inode,
        cookie: u64,
        verifier: [u8; 8],
    ) -> std::result::Result<ReaddirPlusOk, NfsError> {
        let size = self.sizes.list;
        if !self.lists_names_only.load(Ordering::Relaxed) {
            let plus = self
                .nfs
                .readdirplus(cred, &dir.handle, cookie, verifier, size, size)
                .await;
            match plus {
                Err(error)
                    if error.errno() == libc::EOPNOTSUPP
                        && !mutant::is_on(Mutant::ReaddirplusOnly) =>
                {
                    self.lists_names_only.store(true, Ordering::Relaxed);
                }
                plus => return plus,
            }
        }
        let names = self.nfs.readdir(cred, &dir.handle, cookie, verifier, size);
        names.await.map(ReaddirPlusOk::from)
    }

    /// Whether programs can have such a name.
    fn is_name(&self, name: &[u8]) -> bool {
        let sound =
            (1..=NAME_MAX).contains(&name.len()) && !name.iter().any(|b| b"/\0".contains(b));
        if !sound && !self.odd_name_told.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                length = name.len(),
                "a directory has a name that Linux cannot have; it is not shown, and neither are \
                 others like it"
            );
        }
        sound
    }

    /// Counts a lookup for an entry that the kernel is told with its attributes.
    pub(super) fn grant(
        &self,
        dir: &OpenDir,
        name: &[u8],
        (handle, attr): (FileHandle, Attr),
        asked: u64,
    ) -> Entry {
        self.entry(&dir.inode, name, handle, attr, asked)
    }
}

fn is_bad_cookie(error: &NfsError) -> bool {
    error.status() == Some(Nfs3Status::NFS3ERR_BAD_COOKIE)
}
