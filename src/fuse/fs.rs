//! The file system: one async function for each operation, without any FUSE types.
//!
//! Invariants:
//! - an operation that changes something returns after the server has answered, except WRITE,
//!   whose bytes are held ([`super::write`]) until close, fsync, or about a second has passed;
//! - what the server's answers tell is taken in by [`Fs::absorb`] (looks) and [`Changing`] (own
//!   calls that change something), the only places that decide whether another host changed a file;
//! - a file that is deleted while this host has it open is renamed to `.nfs…` and removed when it
//!   is closed, as the kernel's client does (NFSv3 has no open files).
//!
//! Known limits: unless the server is seen to decide otherwise ([`super::rights`]), rights are
//! checked twice, by the kernel from mode bits (`default_permissions`) and by the server; a directory that another host filled is seen late by up to
//! `acdirmax`.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::{Attr, FileHandle, FsStat, Nfs3, SetAttr, Wcc, access};

use super::attr::{Limits, Own, Verdict, now};
use super::error::{Errno, Result};
use super::hidden::Hidden;
use super::inode::{Inode, Inodes, State};
use super::known::{Forgetting, Known};
use super::options::{FuseOptions, MAX_IO};
use super::room::Room;
use super::turns::{Replacing, are_names_settled, names_settled};
use super::write::Bounds;

/// The longest name (NAME_MAX).
pub(super) const NAME_MAX: usize = 255;
/// How long the absence of a name is trusted at most. The kernel's client trusts it as long as
/// the directory's attributes (30 s and more); programs that wait for a file of another host
/// suffer from that more than others gain.
const ABSENCE_TRUSTED: Duration = Duration::from_secs(1);

/// What the file system asks of the kernel's caches.
pub(super) trait Kernel: Send + Sync + fmt::Debug {
    /// Drops the kernel's cached attributes of a node, at once.
    fn drop_attributes(&self, ino: u64);
    /// Drops the kernel's cached pages of a file, soon.
    fn drop_pages(&self, ino: u64);
    /// Drops those of a range, and says when it is done. It may wait for reads under way.
    fn drop_range(&self, ino: u64, offset: u64, len: u64, done: oneshot::Sender<()>);
    /// Forgets the files that nobody uses, soon, and says by dropping `done` when it has tried.
    fn forget_unused(&self, done: Forgetting);
}

/// How much the server takes in one call, in bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) read: u32,
    pub(super) write: u32,
    pub(super) list: u32,
}

/// An entry as the kernel is told.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) ino: u64,
    pub(super) attr: Attr,
    pub(super) attr_trusted: Duration,
    pub(super) name_trusted: Duration,
}

/// What a name led to.
#[derive(Debug, Clone, Copy)]
pub(super) enum Found {
    Entry(Entry),
    /// Nothing, which may be remembered for this long.
    Absent(Duration),
}

/// An open file.
#[derive(Debug)]
pub(super) struct OpenFile {
    pub(super) inode: Arc<Inode>,
    /// Whoever opened it: reads and writes are made on their behalf, as with the kernel's client.
    pub(super) cred: Cred,
    pub(super) flags: i32,
    /// The kernel was told to keep its page cache out of it.
    pub(super) direct: bool,
    /// The number of the last write error that was reported here.
    pub(super) reported: AtomicU64,
}

impl OpenFile {
    pub(super) fn writes(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }
}

/// The answer to an open.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opened {
    pub(super) fh: u64,
    /// The kernel's cached pages are still good.
    pub(super) keep_pages: bool,
    /// Past the kernel's page cache.
    pub(super) direct: bool,
    pub(super) writes: bool,
}

/// Attributes to set, as the kernel names them.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Change {
    pub(super) set: SetAttr,
    pub(super) fh: Option<u64>,
}

#[derive(Debug)]
pub(super) struct Fs {
    pub(super) nfs: Nfs3,
    pub(super) inodes: Inodes,
    pub(super) options: FuseOptions,
    pub(super) sizes: Sizes,
    pub(super) bounds: Bounds,
    pub(super) kernel: Arc<dyn Kernel>,
    pub(super) runtime: tokio::runtime::Handle,
    pub(super) hidden: Hidden,
    pub(super) files: Mutex<HashMap<u64, Arc<OpenFile>>>,
    pub(super) next_file: AtomicU64,
    known: Arc<Known>,
    /// Memory for what is held, over all files.
    pub(super) room: Arc<Room>,
    /// Files of which something is held that is not durable yet, by node id.
    dirty: Mutex<BTreeMap<u64, Arc<Inode>>>,
    clock: AtomicU64,
    /// When an open came too late; see [`super::open`].
    pub(super) missed: Mutex<Option<Instant>>,
    /// Each rename and unlink; an open that came too late waits for them.
    pub(super) replacing: Replacing,
    /// The kernel checks no mode bits; see [`super::rights`].
    server_decides: AtomicBool,
    /// The server has READDIR and no READDIRPLUS.
    pub(super) lists_names_only: AtomicBool,
    /// See [`Fs::needs_pages`].
    pub(super) needs_pages: AtomicBool,
    /// A name that cannot be shown was logged.
    pub(super) odd_name_told: AtomicBool,
    file_limits: Limits,
    dir_limits: Limits,
    root: FileHandle,
}

impl Fs {
    /// Asks the server for what has to be known before the first operation.
    ///
    /// # Errors
    /// What GETATTR or FSINFO of the root fails with.
    pub(super) async fn start(
        nfs: Nfs3,
        root: FileHandle,
        options: FuseOptions,
        kernel: Arc<dyn Kernel>,
        hidden: Hidden,
    ) -> std::result::Result<Arc<Self>, nfs::rpc::NfsError> {
        let cred = Cred::root();
        let attr = nfs.getattr(&cred, &root).await?;
        //= 1813-3.3.19-fsinfo: “The client should retrieve FSINFO information for each mount
        //= completed.”
        let info = nfs.fsinfo(&cred, &root).await?;
        let size = |asked: Option<u32>, preferred: u32, most: u32| {
            // A preference below the most is often a relic; a large one is a server's that
            // streams. One call carries what FUSE hands over, if the server takes it.
            let most = if most == 0 { preferred } else { most };
            asked.unwrap_or(MAX_IO).min(most).clamp(512, MAX_IO)
        };
        let sizes = Sizes {
            //= 1813-3.3.6-rtmax: “count must be less than or equal to the value of the rtmax
            //= field”
            read: size(options.rsize, info.rtpref, info.rtmax),
            //= 1813-3.3.7-wtmax: “The size of data must be less than or equal to the value of the
            //= wtmax field”
            write: size(options.wsize, info.wtpref, info.wtmax),
            list: info.dtpref.clamp(32 * 1024, 128 * 1024),
        };
        let server_decides = super::rights::beyond_mode_bits(&nfs, &root).await;
        let file_limits = Limits::of(&options, false);
        let dir_limits = Limits::of(&options, true);
        Ok(Arc::new(Self {
            nfs,
            inodes: Inodes::new(root, attr, dir_limits),
            options,
            sizes,
            bounds: Bounds::default(),
            kernel,
            runtime: tokio::runtime::Handle::current(),
            hidden,
            files: Mutex::default(),
            next_file: AtomicU64::new(1),
            known: Arc::default(),
            room: Arc::default(),
            dirty: Mutex::default(),
            clock: AtomicU64::new(1),
            missed: Mutex::default(),
            replacing: Replacing::default(),
            server_decides: AtomicBool::new(server_decides),
            lists_names_only: AtomicBool::default(),
            needs_pages: AtomicBool::default(),
            odd_name_told: AtomicBool::default(),
            file_limits,
            dir_limits,
            root,
        }))
    }

    pub(super) fn server_decides(&self) -> bool {
        self.server_decides.load(Ordering::Relaxed)
    }

    /// Before anything is mounted.
    pub(super) fn let_server_decide(&self) {
        self.server_decides.store(true, Ordering::Relaxed);
    }

    /// For how long the kernel may answer for a directory's names.
    fn names_trusted(&self, dir: &Inode) -> Duration {
        let state = dir.state();
        if self.server_decides() && state.cached.attr.mode & 0o001 == 0 {
            return Duration::ZERO;
        }
        state.cached.trust()
    }

    /// The number of a call about to be made; see [`super::attr::Cached`].
    pub(super) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::AcqRel)
    }

    pub(super) fn limits(&self, directory: bool) -> Limits {
        if directory {
            self.dir_limits
        } else {
            self.file_limits
        }
    }

    pub(super) fn dirty(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Inode>>> {
        self.dirty.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn inode(&self, ino: u64) -> Result<Arc<Inode>> {
        self.inodes.get(ino).ok_or(Errno(libc::ESTALE))
    }

    pub(super) fn file(&self, fh: u64) -> Result<Arc<OpenFile>> {
        let files = self.files.lock().unwrap_or_else(|e| e.into_inner());
        files.get(&fh).cloned().ok_or(Errno(libc::EBADF))
    }

    /// Takes in what a look told about a file.
    pub(super) fn absorb(&self, inode: &Inode, attr: Attr, asked: u64) {
        if attr.kind != inode.kind {
            return; // the handle means another file now; the next use of it shows that
        }
        let limits = self.limits(inode.is_directory());
        let mut state = inode.state();
        let at = self.tick();
        let verdict = state.cached.look(attr, (asked, at), limits, now());
        self.judged(inode, state, verdict);
    }

    fn judged(&self, inode: &Inode, mut state: MutexGuard<'_, State>, verdict: Verdict) {
        if verdict == Verdict::Theirs && inode.is_file() {
            state.version += 1;
            let open = state.opens > 0;
            drop(state);
            if open {
                self.kernel.drop_pages(inode.ino);
            } else if !mutant::is_on(Mutant::KernelMissesChanges) {
                // It takes no attributes from an answer that another one has overtaken, even if
                // that one is older.
                self.kernel.drop_attributes(inode.ino);
            }
        }
    }

    /// An own call that may change a file is about to be made.
    pub(super) fn change<'a>(&'a self, inode: &'a Inode) -> Changing<'a> {
        let mut state = inode.state();
        let asked = self.tick();
        state.cached.begin(asked);
        Changing {
            fs: self,
            inode,
            asked,
        }
    }

    /// Attributes that are fresh enough, asked anew if they are not.
    pub(super) async fn fresh(&self, cred: &Cred, inode: &Inode) -> Result<(Attr, Duration)> {
        {
            let state = inode.state();
            let remaining = state.cached.remaining(now());
            if !remaining.is_zero() {
                return Ok((state.attr(), remaining));
            }
        }
        let asked = self.tick();
        let attr = self.nfs.getattr(cred, &inode.handle).await?;
        self.absorb(inode, attr, asked);
        let state = inode.state();
        Ok((state.attr(), state.cached.remaining(now())))
    }

    pub(super) fn entry(
        &self,
        dir: &Inode,
        name: &[u8],
        handle: FileHandle,
        attr: Attr,
        asked: u64,
    ) -> Entry {
        let limits = self.limits(attr.kind == nfs::rpc::nfs3::FileKind::Directory);
        let (inode, known) = self.inodes.intern(handle, &attr, asked, limits);
        if known {
            self.absorb(&inode, attr, asked);
        } else if let Some(done) = self.known.added(self.inodes.len(), self.bounds.known) {
            self.kernel.forget_unused(done);
        }
        self.inodes.add_name(dir.ino, name, inode.ino, asked);
        self.entry_of(dir, &inode)
    }

    fn entry_of(&self, dir: &Inode, inode: &Inode) -> Entry {
        let name_trusted = self.names_trusted(dir);
        let state = inode.state();
        Entry {
            ino: inode.ino,
            attr: state.attr(),
            attr_trusted: state.cached.remaining(now()),
            name_trusted,
        }
    }

    pub(super) async fn lookup(&self, cred: &Cred, parent: u64, name: &[u8]) -> Result<Found> {
        check_name(name)?;
        let dir = self.inode(parent)?;
        let (asked, found) = loop {
            names_settled(&dir).await;
            let asked = self.tick();
            let found = self.nfs.lookup(cred, &dir.handle, name).await;
            if are_names_settled(&dir) {
                break (asked, found);
            }
        };
        let found = match found {
            Ok(found) => found,
            Err(error) if error.errno() == libc::ENOENT => {
                self.inodes.drop_name(parent, name, asked);
                let trusted = self.names_trusted(&dir).min(ABSENCE_TRUSTED);
                return Ok(Found::Absent(trusted));
            }
            Err(error) => return Err(error.into()),
        };
        if let Some(attr) = found.dir_attr {
            self.absorb(&dir, attr, asked);
        }
        let attr = match found.attr {
            Some(attr) => attr,
            None => self.nfs.getattr(cred, &found.handle).await?,
        };
        Ok(Found::Entry(self.entry(
            &dir,
            name,
            found.handle,
            attr,
            asked,
        )))
    }

    pub(super) fn forget(&self, ino: u64, count: u64) {
        self.inodes.forget(ino, count);
        self.known.fewer(self.inodes.len());
    }

    pub(super) async fn getattr(
        self: &Arc<Self>,
        cred: &Cred,
        ino: u64,
    ) -> Result<(Attr, Duration)> {
        let inode = self.inode(ino)?;
        if inode.is_file() {
            // Size and times as the server has them include what was written here.
            self.send_all(&inode).await?;
        }
        self.fresh(cred, &inode).await
    }

    pub(super) async fn readlink(&self, cred: &Cred, ino: u64) -> Result<bytes::Bytes> {
        let inode = self.inode(ino)?;
        Ok(self.nfs.readlink(cred, &inode.handle).await?.target)
    }

    pub(super) async fn access(&self, cred: &Cred, ino: u64, mask: u32) -> Result<()> {
        let inode = self.inode(ino)?;
        let directory = inode.is_directory();
        let mut wanted = 0;
        if mask & libc::R_OK as u32 != 0 {
            wanted |= access::READ;
        }
        if mask & libc::W_OK as u32 != 0 {
            wanted |= access::MODIFY | access::EXTEND;
        }
        if mask & libc::X_OK as u32 != 0 {
            wanted |= if directory {
                access::LOOKUP
            } else {
                access::EXECUTE
            };
        }
        if wanted == 0 {
            return self.fresh(cred, &inode).await.map(|_| ());
        }
        let asked = self.tick();
        let answer = self.nfs.access(cred, &inode.handle, wanted).await?;
        if let Some(attr) = answer.attr {
            self.absorb(&inode, attr, asked);
        }
        if answer.granted & wanted == wanted {
            Ok(())
        } else {
            Err(Errno(libc::EACCES))
        }
    }

    /// The last mount is gone: nothing more will come, also not for files that were open.
    pub(super) async fn finish(self: &Arc<Self>) {
        self.sync_everything().await;
        for inode in self.inodes.busy() {
            let silly = inode.state().silly.take();
            if let Some(silly) = silly {
                self.remove_silly(&Cred::root(), *silly).await;
            }
        }
    }

    pub(super) async fn statfs(&self, cred: &Cred) -> Result<FsStat> {
        Ok(self.nfs.fsstat(cred, &self.root).await?)
    }
}

/// An own call under way that may change a file. Dropped without an answer (it failed, or its
/// caller was killed), what is known of the file expires: the server may carry it out all the same.
#[derive(Debug)]
pub(super) struct Changing<'a> {
    fs: &'a Fs,
    inode: &'a Inode,
    asked: u64,
}

impl Changing<'_> {
    /// The number of the call.
    pub(super) fn asked(&self) -> u64 {
        self.asked
    }

    /// The answer to a WRITE or a COMMIT.
    pub(super) fn wrote(self, wcc: Wcc) {
        self.end(Own::Written, wcc);
    }

    /// Any other answer.
    pub(super) fn done(self, wcc: Wcc) {
        self.end(Own::Set, wcc);
    }

    fn end(self, call: Own, mut wcc: Wcc) {
        let (fs, inode, asked) = (self.fs, self.inode, self.asked);
        std::mem::forget(self);
        // Of another kind: the handle means another file now.
        wcc.after = wcc.after.filter(|attr| attr.kind == inode.kind);
        let limits = fs.limits(inode.is_directory());
        let mut state = inode.state();
        let at = fs.tick();
        let verdict = state.cached.end((asked, at), (call, wcc), limits, now());
        fs.judged(inode, state, verdict);
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        let mut state = self.inode.state();
        let verdict = state.cached.lost(self.asked, self.fs.tick());
        self.fs.judged(self.inode, state, verdict);
    }
}

pub(super) fn check_name(name: &[u8]) -> Result<()> {
    if name.len() > NAME_MAX {
        Err(Errno(libc::ENAMETOOLONG))
    } else {
        Ok(())
    }
}
