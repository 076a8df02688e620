//! Between the kernel's FUSE requests and the file system.
//!
//! Requests arrive on fuser's thread. What can be answered at once (a write that is held, the
//! release of a reference) is answered there; everything else begins there ([`task`]), and
//! becomes a task that answers later.
//! A request whose caller has been killed is answered with EINTR after about a second, whatever
//! the server does: fuser does not pass FUSE_INTERRUPT on, and the kernel does not let a process
//! die before its request is answered.

mod listing;
mod reply;

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::future::Future;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, FileHandle, Filesystem, FopenFlags, INodeNo, InitFlags, KernelConfig, LockOwner,
    OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, TimeOrNow,
    WriteFlags,
};

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::SetAttr;

use self::listing::{Page, Reply};
use self::reply::{Answer, set_time};
use super::dir::OpenDir;
use super::error::{Errno, Result};
use super::fs::{Change, Entry, Found, Fs};
use super::process::{Processes, Watched};
use super::room::Copies;
use super::task;
use super::write::{Quick, WriteTo};

/// How long a request may take before its caller's death is looked for, and how often after that.
const PATIENCE: Duration = Duration::from_secs(1);
/// Requests that the kernel may have under way in the background (read-ahead, asynchronous direct
/// I/O): 64 MiB of reads at 1 MiB each.
const BACKGROUND: u16 = 64;
/// Bytes that requests may wait with to be held; beyond it no further request is read until one of
/// them is, so that more than sixteen large writes that wait delay everybody.
const COPIES: usize = 16 << 20;

/// Counts what is under way, for the status.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) requests: AtomicU64,
    pub(super) under_way: AtomicU64,
    pub(super) interrupted: AtomicU64,
    pub(super) reads: AtomicU64,
    pub(super) read_bytes: AtomicU64,
    pub(super) writes: AtomicU64,
    pub(super) written_bytes: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl Load {
    pub(super) fn last_error(&self) -> Option<String> {
        self.last_error
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .clone()
    }

    /// Remembers an error that tells about the server rather than about the request.
    fn note(&self, pid: u32, errno: Errno) {
        if matches!(
            errno.0,
            libc::EIO | libc::ETIMEDOUT | libc::ENOTCONN | libc::ENOSPC
        ) {
            let error = std::io::Error::from_raw_os_error(errno.0);
            *self.last_error.lock().unwrap_or_else(|e| e.into_inner()) =
                Some(format!("a request of process {pid} failed: {error}"));
        }
    }
}

pub(super) struct Glue {
    fs: Arc<Fs>,
    processes: Processes,
    copies: Arc<Copies>,
    dirs: Mutex<HashMap<u64, Arc<OpenDir>>>,
    next_dir: AtomicU64,
    load: Arc<Load>,
    /// Where answers go that fuser cannot give; see [`listing`].
    device: Arc<File>,
}

impl Glue {
    pub(super) fn new(fs: Arc<Fs>, load: Arc<Load>, device: File) -> Self {
        Self {
            fs,
            processes: Processes::default(),
            copies: Arc::default(),
            dirs: Mutex::default(),
            next_dir: AtomicU64::new(1),
            load,
            device: Arc::new(device),
        }
    }

    fn cred(&self, req: &Request) -> Cred {
        self.processes.cred(req.uid(), req.gid(), req.pid())
    }

    fn dir(&self, fh: FileHandle) -> Option<Arc<OpenDir>> {
        self.dirs
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .get(&fh.0)
            .cloned()
    }

    /// Runs an operation on what a name has led to, not a descriptor: where that is gone the kernel
    /// looks the name up again, once.
    fn run_by_name<T, R, F>(&self, req: &Request, reply: R, operation: impl FnOnce(Arc<Fs>) -> F)
    where
        T: Send,
        R: Answer<T>,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.run(req, reply, |fs| {
            let operation = operation(Arc::clone(&fs));
            async move { fs.too_late(operation.await).await }
        });
    }

    /// Runs an operation and answers with what it comes to.
    fn run<T, R, F>(&self, req: &Request, reply: R, operation: impl FnOnce(Arc<Fs>) -> F)
    where
        T: Send,
        R: Answer<T>,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let operation = operation(Arc::clone(&self.fs));
        let load = Arc::clone(&self.load);
        let pid = req.pid();
        task::begin(&self.fs.runtime, &self.fs.nfs, async move {
            match until_killed(pid, operation, &load).await {
                Ok(value) => reply.done(value),
                Err(errno) => reply.failed(fuser::Errno::from_i32(errno.0)),
            }
        });
    }

    /// The same for an operation that answers by itself; dropped unanswered, its reply is EIO.
    fn task<F>(&self, req: &Request, operation: impl FnOnce(Arc<Fs>) -> F)
    where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        let operation = operation(Arc::clone(&self.fs));
        let load = Arc::clone(&self.load);
        let pid = req.pid();
        task::begin(&self.fs.runtime, &self.fs.nfs, async move {
            // It has answered.
            let _ = until_killed(pid, operation, &load).await;
        });
    }

    fn list(&self, req: &Request, fh: FileHandle, offset: u64, reply: Reply) {
        let Some(dir) = self.dir(fh) else {
            return reply.failed(Errno(libc::EBADF));
        };
        let cred = self.cred(req);
        let mut page = Page::new(reply, req.unique().0, Arc::clone(&self.device));
        self.task(req, |fs| async move {
            let listed = fs
                .list(&cred, &dir, offset, |item, asked| {
                    page.take(&fs, &dir, item, asked)
                })
                .await;
            page.answer(listed);
            Ok(())
        });
    }
}

impl std::fmt::Debug for Glue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Glue")
            .field("load", &self.load)
            .finish_non_exhaustive()
    }
}

/// A request under way.
struct Counted<'a>(&'a Load);

impl<'a> Counted<'a> {
    fn new(load: &'a Load) -> Self {
        load.requests.fetch_add(1, Ordering::Relaxed);
        load.under_way.fetch_add(1, Ordering::Relaxed);
        Self(load)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn until_killed<T>(
    pid: u32,
    operation: impl Future<Output = Result<T>>,
    load: &Load,
) -> Result<T> {
    let _counted = Counted::new(load);
    let mut operation = pin!(operation);
    let mut caller = Watched::new(pid);
    loop {
        match tokio::time::timeout(PATIENCE, &mut operation).await {
            Ok(result) => return result.inspect_err(|errno| load.note(pid, *errno)),
            Err(_) if caller.is_killed() && !mutant::is_on(Mutant::DeafToKills) => {
                load.interrupted.fetch_add(1, Ordering::Relaxed);
                return Err(Errno(libc::EINTR));
            }
            Err(_) => {}
        }
    }
}

impl Filesystem for Glue {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let wanted = [
            InitFlags::FUSE_ASYNC_READ,
            InitFlags::FUSE_BIG_WRITES,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_DO_READDIRPLUS,
            InitFlags::FUSE_READDIRPLUS_AUTO,
            InitFlags::FUSE_CACHE_SYMLINKS,
        ];
        for flag in wanted {
            // An older kernel does without.
            let _ = config.add_capabilities(flag);
        }
        let maps_past_pages = config
            .add_capabilities(InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP)
            .is_ok();
        if self.fs.needs_pages(maps_past_pages) {
            // Not otherwise: it drops the pages that this host has just written itself.
            let _ = config.add_capabilities(InitFlags::FUSE_AUTO_INVAL_DATA);
        }
        // The server clears set-id bits; the kernel would do it by a chmod in the writer's name.
        if config
            .add_capabilities(InitFlags::FUSE_HANDLE_KILLPRIV_V2)
            .is_err()
        {
            let _ = config.add_capabilities(InitFlags::FUSE_HANDLE_KILLPRIV);
        }
        // Both are clamped by the kernel; neither is refused.
        let _ = config.set_max_write(super::options::MAX_IO);
        let _ = config.set_max_background(BACKGROUND);
        let _ = config.set_time_granularity(Duration::from_nanos(1));
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (cred, name) = (self.cred(req), name.to_owned());
        self.run_by_name::<Found, _, _>(req, reply, |fs| async move {
            fs.lookup(&cred, parent.0, name.as_bytes()).await
        });
    }

    fn forget(&self, _req: &Request, ino: INodeNo, nlookup: u64) {
        self.fs.forget(ino.0, nlookup);
    }

    fn getattr(&self, req: &Request, ino: INodeNo, fh: Option<FileHandle>, reply: ReplyAttr) {
        let cred = self.cred(req);
        let operation = |fs: Arc<Fs>| async move {
            let (attr, trusted) = fs.getattr(&cred, ino.0).await?;
            Ok((ino.0, attr, trusted))
        };
        match fh {
            Some(_) => self.run(req, reply, operation),
            None => self.run_by_name(req, reply, operation),
        }
    }

    fn setattr(
        &self,
        req: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        fh: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<fuser::BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let cred = self.cred(req);
        let set = SetAttr {
            mode: mode.map(|mode| mode & 0o7777),
            uid,
            gid,
            size,
            atime: set_time(atime),
            mtime: set_time(mtime),
        };
        let fh = fh.map(|fh| fh.0);
        let operation = move |fs: Arc<Fs>| async move {
            let (attr, trusted) = fs.setattr(&cred, ino.0, Change { set, fh }).await?;
            Ok((ino.0, attr, trusted))
        };
        match fh {
            Some(_) => self.run(req, reply, operation),
            None => self.run_by_name(req, reply, operation),
        }
    }

    fn readlink(&self, req: &Request, ino: INodeNo, reply: ReplyData) {
        let cred = self.cred(req);
        self.run_by_name(
            req,
            reply,
            |fs| async move { fs.readlink(&cred, ino.0).await },
        );
    }

    fn mknod(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        rdev: u32,
        reply: ReplyEntry,
    ) {
        let (cred, name) = (self.cred(req), name.to_owned());
        self.run::<Entry, _, _>(req, reply, |fs| async move {
            fs.mknod(&cred, parent.0, name.as_bytes(), mode, rdev).await
        });
    }

    fn mkdir(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        let (cred, name) = (self.cred(req), name.to_owned());
        self.run::<Entry, _, _>(req, reply, |fs| async move {
            fs.mkdir(&cred, parent.0, name.as_bytes(), mode).await
        });
    }

    fn unlink(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (cred, name) = (self.cred(req), name.to_owned());
        self.run(req, reply, |fs| async move {
            fs.unlink(&cred, parent.0, name.as_bytes()).await
        });
    }

    fn rmdir(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        let (cred, name) = (self.cred(req), name.to_owned());
        self.run(req, reply, |fs| async move {
            fs.rmdir(&cred, parent.0, name.as_bytes()).await
        });
    }

    fn symlink(
        &self,
        req: &Request,
        parent: INodeNo,
        link_name: &OsStr,
        target: &Path,
        reply: ReplyEntry,
    ) {
        let (cred, name) = (self.cred(req), link_name.to_owned());
        let target = target.as_os_str().to_owned();
        self.run::<Entry, _, _>(req, reply, |fs| async move {
            fs.symlink(&cred, parent.0, name.as_bytes(), target.as_bytes())
                .await
        });
    }

    fn rename(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (cred, name, new_name) = (self.cred(req), name.to_owned(), newname.to_owned());
        self.run(req, reply, |fs| async move {
            let from = (parent.0, name.as_bytes());
            let to = (newparent.0, new_name.as_bytes());
            fs.rename(&cred, from, to, flags.bits()).await
        });
    }

    fn link(
        &self,
        req: &Request,
        ino: INodeNo,
        newparent: INodeNo,
        newname: &OsStr,
        reply: ReplyEntry,
    ) {
        let (cred, name) = (self.cred(req), newname.to_owned());
        self.run::<Entry, _, _>(req, reply, |fs| async move {
            fs.link(&cred, ino.0, newparent.0, name.as_bytes()).await
        });
    }

    fn open(&self, req: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let cred = self.cred(req);
        self.run_by_name(req, reply, |fs| async move {
            fs.open(&cred, ino.0, flags.0).await
        });
    }

    fn read(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.load.reads.fetch_add(1, Ordering::Relaxed);
        let load = Arc::clone(&self.load);
        self.run(req, reply, |fs| async move {
            let file = fs.file(fh.0)?;
            let data = fs.read(&file, offset, size).await?;
            load.read_bytes
                .fetch_add(data.len() as u64, Ordering::Relaxed);
            Ok(data)
        });
    }

    fn write(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let file = match self.fs.file(fh.0) {
            Ok(file) => file,
            Err(errno) => return reply.error(fuser::Errno::from_i32(errno.0)),
        };
        let count = u32::try_from(data.len()).unwrap_or(0);
        let to = WriteTo {
            offset,
            flags: flags.0,
            from_pages: write_flags.contains(WriteFlags::FUSE_WRITE_CACHE),
        };
        self.load.writes.fetch_add(1, Ordering::Relaxed);
        self.load
            .written_bytes
            .fetch_add(count.into(), Ordering::Relaxed);
        match self.fs.write_quick(&file, to, data) {
            Quick::Done => {
                self.load.requests.fetch_add(1, Ordering::Relaxed);
                reply.written(count);
            }
            Quick::Failed(errno) => {
                self.load.requests.fetch_add(1, Ordering::Relaxed);
                reply.error(fuser::Errno::from_i32(errno.0));
            }
            Quick::Wait => {
                // What makes room is done by other threads, so this one may wait.
                let data = self.copies.of(data, COPIES);
                self.run(req, reply, |fs| async move {
                    fs.write(&file, to, data).await.map(|()| count)
                });
            }
        }
    }

    fn flush(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _lock_owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.run(req, reply, |fs| async move { fs.flush(fh.0).await });
    }

    fn release(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        // Nobody waits for it; what is left to do is done whoever dies. It begins here like the
        // requests that follow, so that none of them finds the hidden name of a closed file.
        let fs = Arc::clone(&self.fs);
        task::begin(&self.fs.runtime, &self.fs.nfs, async move {
            fs.release(fh.0).await;
        });
        reply.ok();
    }

    fn fsync(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        self.run(req, reply, |fs| async move { fs.fsync(fh.0).await });
    }

    fn opendir(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        match self.fs.inode(ino.0) {
            Ok(inode) => {
                let fh = self.next_dir.fetch_add(1, Ordering::Relaxed);
                let dir = Arc::new(OpenDir::new(inode));
                self.dirs
                    .lock()
                    .unwrap_or_else(|e| e.into_inner())
                    .insert(fh, dir);
                reply.opened(FileHandle(fh), FopenFlags::empty());
            }
            Err(errno) => reply.error(fuser::Errno::from_i32(errno.0)),
        }
    }

    fn readdir(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.list(req, fh, offset, Reply::Names(reply));
    }

    fn readdirplus(
        &self,
        req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.list(req, fh, offset, Reply::Plus(reply));
    }

    fn releasedir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        fh: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.dirs
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .remove(&fh.0);
        reply.ok();
    }

    fn fsyncdir(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        _datasync: bool,
        reply: ReplyEmpty,
    ) {
        // The server answers to a change of a directory when it is durable (RFC 1813, 4.8).
        reply.ok();
    }

    fn statfs(&self, req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        let cred = self.cred(req);
        self.run(req, reply, |fs| async move { fs.statfs(&cred).await });
    }

    fn access(&self, req: &Request, ino: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        let cred = self.cred(req);
        let mask = u32::try_from(mask.bits()).unwrap_or(0);
        self.run_by_name(req, reply, |fs| async move {
            fs.access(&cred, ino.0, mask).await
        });
    }

    fn create(
        &self,
        req: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _umask: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        let (cred, name) = (self.cred(req), name.to_owned());
        self.run(req, reply, |fs| async move {
            fs.create(&cred, parent.0, name.as_bytes(), mode, flags)
                .await
        });
    }

    // NFSv3 has no extended attributes, no holes to ask for and no space to reserve. ENOSYS makes
    // the kernel say so by itself from then on (EOPNOTSUPP, or its own way of doing it).

    fn getxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, reply: ReplyXattr) {
        reply.error(fuser::Errno::ENOSYS);
    }

    fn listxattr(&self, _: &Request, _: INodeNo, _: u32, reply: ReplyXattr) {
        reply.error(fuser::Errno::ENOSYS);
    }
}
