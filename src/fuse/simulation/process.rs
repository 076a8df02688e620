//! A program's system calls: what the kernel makes of them, and what the worker is asked.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use crate::fuse::error::{Errno, Result};
use crate::fuse::fs::{Change, Entry, Found, OpenFile, Opened};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::SetAttr;

use super::kernel::{Host, Node};
use super::model::{Moment, View, WORD};
use super::{ENDS_IN_TIMEOUTS, Seen};

/// How long a request may take before its caller's death is looked for, and how often after that.
const PATIENCE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
pub(super) struct Process {
    pub(super) host: Arc<Host>,
    pub(super) killed: Arc<AtomicBool>,
    pub(super) cred: Cred,
}

/// An open file.
#[derive(Debug)]
pub(super) struct Descriptor {
    pub(super) node: Arc<Node>,
    pub(super) file: Arc<OpenFile>,
    pub(super) opened: Opened,
    pub(super) flags: i32,
    /// When the open began.
    pub(super) begun: Moment,
    /// Up to when errors may have been told before, or here, and how many were told here.
    heard: AtomicU64,
    told: AtomicU64,
}

impl Descriptor {
    pub(super) fn has(&self, flag: i32) -> bool {
        self.flags & flag == flag
    }

    pub(super) fn writes(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_RDONLY
    }

    pub(super) fn reads(&self) -> bool {
        self.flags & libc::O_ACCMODE != libc::O_WRONLY
    }
}

impl Process {
    pub(super) fn new(host: &Arc<Host>) -> Self {
        Self {
            host: Arc::clone(host),
            killed: Arc::default(),
            cred: Cred::root(),
        }
    }

    pub(super) fn is_killed(&self) -> bool {
        self.killed.load(Ordering::Relaxed)
    }

    /// A request to the worker; as there, a killed caller's ends after a while.
    pub(super) async fn request<T>(&self, operation: impl Future<Output = Result<T>>) -> Result<T> {
        let (fs, world) = (&self.host.fs, &self.host.world);
        let what = std::any::type_name_of_val(&operation);
        let mut operation = std::pin::pin!(async { fs.too_late(operation.await).await });
        let begun = Instant::now();
        let timeout = u64::from(fs.options.io_timeout);
        let ends = Duration::from_secs(timeout * ENDS_IN_TIMEOUTS);
        let answer = loop {
            match tokio::time::timeout(PATIENCE, &mut operation).await {
                Ok(answer) => break answer,
                Err(_) if self.is_killed() => {
                    world.saw(Seen::Killed);
                    break Err(Errno(libc::EINTR));
                }
                Err(_) if timeout > 0 && begun.elapsed() > ends => {
                    world.fail(format!("{what} takes {:?}", begun.elapsed()));
                    break Err(Errno(libc::EINTR));
                }
                Err(_) => {}
            }
        };
        if matches!(answer, Err(Errno(libc::ETIMEDOUT))) {
            world.saw(Seen::TimedOut);
        }
        self.host.world.check_held(&self.host);
        answer
    }

    pub(super) async fn look_up(&self, name: &[u8], anew: bool) -> Result<Arc<Node>> {
        let host = &self.host;
        if !anew && let Some(dentry) = host.look_up(name) {
            let ino = dentry.ino.ok_or(Errno(libc::ENOENT))?;
            if let Some(node) = host.known(ino) {
                return Ok(node);
            }
        }
        let version = host.version();
        match self.request(host.fs.lookup(&self.cred, 1, name)).await? {
            Found::Entry(entry) => Ok(self.entry(name, &entry, version)),
            Found::Absent(trusted) => {
                host.name(name, None, trusted);
                Err(Errno(libc::ENOENT))
            }
        }
    }

    pub(super) fn entry(&self, name: &[u8], entry: &Entry, version: u64) -> Arc<Node> {
        let node = self.host.node(entry, version);
        self.host.name(name, Some(entry.ino), entry.name_trusted);
        node
    }

    /// An operation on what a name leads to; once more from the server if that is gone, as the
    /// kernel does (LOOKUP_REVAL).
    async fn at<T, F: Future<Output = Result<T>>>(
        &self,
        name: &[u8],
        operation: impl Fn(Arc<Node>) -> F,
    ) -> Result<T> {
        let first = match self.look_up(name, false).await {
            Ok(node) => operation(node).await,
            Err(errno) => Err(errno),
        };
        if first.as_ref().is_err_and(|errno| errno.0 == libc::ESTALE) {
            return operation(self.look_up(name, true).await?).await;
        }
        first
    }

    pub(super) async fn open(&self, name: &[u8], flags: i32) -> Result<Descriptor> {
        let begun = self.host.world.model.now();
        if flags & libc::O_EXCL != 0 {
            let _dir = self.host.dir.lock().await;
            return match self.look_up(name, false).await {
                Ok(_) => Err(Errno(libc::EEXIST)),
                Err(Errno(libc::ENOENT)) => self.create(name, flags, begun).await,
                Err(errno) => Err(errno),
            };
        }
        let opened = self
            .at(name, |node| self.open_node(node, flags, begun))
            .await;
        match opened {
            Err(Errno(libc::ENOENT)) if flags & libc::O_CREAT != 0 => {
                let dir = self.host.dir.lock().await;
                let made = self.host.look_up(name).and_then(|dentry| dentry.ino);
                match made.and_then(|ino| self.host.known(ino)) {
                    Some(node) => {
                        drop(dir);
                        self.open_node(node, flags, begun).await
                    }
                    None => self.create(name, flags, begun).await,
                }
            }
            other => other,
        }
    }

    async fn open_node(&self, node: Arc<Node>, flags: i32, begun: Moment) -> Result<Descriptor> {
        let sent = flags & !(libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC);
        let fs = &self.host.fs;
        node.opened();
        let opened = self.request(fs.open(&self.cred, node.ino, sent)).await;
        let descriptor = match opened {
            Ok(opened) => self.descriptor(node, opened, flags, begun).await?,
            Err(errno) => {
                node.closed();
                return Err(errno);
            }
        };
        if flags & libc::O_TRUNC != 0 {
            let cut = self
                .truncate_node(&descriptor.node, 0, Some(&descriptor))
                .await;
            if let Err(errno) = cut {
                let _ = self.close(descriptor).await;
                return Err(errno);
            }
        }
        Ok(descriptor)
    }

    async fn descriptor(
        &self,
        node: Arc<Node>,
        opened: Opened,
        flags: i32,
        begun: Moment,
    ) -> Result<Descriptor> {
        if opened.keep_pages {
            if node.has_pages() {
                self.host.world.saw(Seen::PagesKept);
            }
        } else {
            node.drop_pages(0..u64::MAX).await;
        }
        Ok(Descriptor {
            node,
            file: self.host.fs.file(opened.fh)?,
            opened,
            flags,
            begun,
            heard: AtomicU64::new(self.host.world.model.now()),
            told: AtomicU64::new(0),
        })
    }

    pub(super) async fn create(
        &self,
        name: &[u8],
        flags: i32,
        begun: Moment,
    ) -> Result<Descriptor> {
        let fs = &self.host.fs;
        let created = self
            .request(fs.create(&self.cred, 1, name, 0o644, flags))
            .await;
        let (entry, opened) = created?;
        let node = self.entry(name, &entry, u64::MAX);
        node.opened();
        self.descriptor(node, opened, flags, begun).await
    }

    /// A write, fsync or close has told of an error of an earlier write, or of none.
    pub(super) fn hears(&self, descriptor: &Descriptor, outcome: &Result<()>) {
        let world = &self.host.world;
        let Err(Errno(errno)) = outcome else { return };
        descriptor.heard.store(world.model.now(), Ordering::Relaxed);
        if matches!(*errno, libc::ENOSPC | libc::EIO) {
            world.saw(Seen::ErrorTold);
            let times = descriptor.told.fetch_add(1, Ordering::Relaxed) + 1;
            let (file, host) = (descriptor.node.ino, self.host.number);
            let checked = world.model.check_told(file, host, times);
            world.demand(checked, || format!("errors of file {file} on host {host}"));
        }
    }

    fn synced(&self, descriptor: &Descriptor, begun: Moment) {
        let heard = descriptor.heard.load(Ordering::Relaxed);
        let (file, host) = (descriptor.node.ino, self.host.number);
        self.host.world.model.synced(file, host, begun, heard);
    }

    /// Whatever it comes to, the descriptor is gone.
    pub(super) async fn close(&self, descriptor: Descriptor) -> Result<()> {
        let model = &self.host.world.model;
        let (fs, fh) = (&self.host.fs, descriptor.opened.fh);
        let begun = model.now();
        let flushed = if descriptor.opened.writes {
            self.request(fs.flush(fh)).await
        } else {
            Ok(())
        };
        self.hears(&descriptor, &flushed);
        if flushed.is_ok() && descriptor.opened.writes {
            self.synced(&descriptor, begun);
        }
        let fs = Arc::clone(fs);
        tokio::spawn(async move { fs.release(fh).await });
        descriptor.node.closed();
        flushed
    }

    pub(super) async fn fsync(&self, descriptor: &Descriptor) -> Result<()> {
        let model = &self.host.world.model;
        let begun = model.now();
        let _lock = descriptor.node.lock.lock().await;
        let synced = self.request(self.host.fs.fsync(descriptor.opened.fh)).await;
        self.hears(descriptor, &synced);
        synced?;
        self.synced(descriptor, begun);
        if !descriptor.writes() {
            self.host.world.saw(Seen::SyncedByReader);
        }
        Ok(())
    }

    /// Asks for the attributes; says the size, and whether the kernel took them.
    pub(super) async fn refresh(&self, node: &Node) -> Result<(u64, bool)> {
        let version = self.host.version();
        let fs = &self.host.fs;
        let (attr, trusted) = self.request(fs.getattr(&self.cred, node.ino)).await?;
        let taken = self.host.attributes(node, &attr, trusted, version);
        Ok((attr.size, taken))
    }

    pub(super) fn view(&self, opened: Moment) -> View {
        View::Program {
            host: self.host.number,
            opened,
            from: self.host.world.model.now(),
        }
    }

    /// stat of an open file.
    pub(super) async fn stat(&self, descriptor: &Descriptor) -> Result<()> {
        let view = self.view(descriptor.begun);
        if !descriptor.node.is_valid() {
            let (size, _) = self.refresh(&descriptor.node).await?;
            let file = descriptor.node.ino;
            let checked = self.host.world.model.check_size(file, view, size / WORD);
            self.host
                .world
                .demand(checked, || format!("stat of file {file}"));
        }
        Ok(())
    }

    pub(super) async fn stat_name(&self, name: &[u8]) -> Result<()> {
        self.at(name, |node| async move {
            if node.is_valid() {
                Ok(())
            } else {
                self.refresh(&node).await.map(|_| ())
            }
        })
        .await
    }

    async fn set(&self, node: &Node, set: SetAttr, fh: Option<u64>) -> Result<()> {
        let (host, cuts) = (&self.host, set.size.is_some());
        let _lock = node.lock.lock().await;
        let version = host.version();
        if cuts {
            Host::begin_cut(node);
        }
        let change = Change { set, fh };
        let answer = self
            .request(host.fs.setattr(&self.cred, node.ino, change))
            .await;
        match &answer {
            Ok((attr, trusted)) if !cuts => {
                host.attributes(node, attr, *trusted, version);
            }
            Ok((attr, trusted)) => host.cut(node, Some((attr, *trusted))),
            Err(_) => host.cut(node, None),
        }
        answer.map(|_| ())
    }

    async fn truncate_node(
        &self,
        node: &Arc<Node>,
        size: u64,
        descriptor: Option<&Descriptor>,
    ) -> Result<()> {
        let (file, number, model) = (node.ino, self.host.number, &self.host.world.model);
        let cut = model.cut(file, number, size);
        self.host
            .world
            .note(|| format!("host {number} cuts {cut} file {file} to {size}"));
        let set = SetAttr {
            size: Some(size * WORD),
            ..SetAttr::default()
        };
        let done = self.set(node, set, descriptor.map(|d| d.opened.fh)).await;
        model.over(file, cut, done.is_ok(), true);
        done
    }

    pub(super) async fn truncate(&self, name: &[u8], size: u64) -> Result<()> {
        self.at(name, |node| async move {
            self.truncate_node(&node, size, None).await
        })
        .await
    }

    pub(super) async fn chmod(&self, name: &[u8], mode: u32) -> Result<()> {
        let set = SetAttr {
            mode: Some(mode),
            ..SetAttr::default()
        };
        self.at(name, |node| async move { self.set(&node, set, None).await })
            .await
    }

    pub(super) async fn link(&self, name: &[u8], new_name: &[u8]) -> Result<()> {
        self.at(name, |node| async move {
            let host = &self.host;
            let _dir = host.dir.lock().await;
            let _lock = node.lock.lock().await;
            let version = host.version();
            let linked = self
                .request(host.fs.link(&self.cred, node.ino, 1, new_name))
                .await;
            if linked.is_err() {
                node.invalidate();
            }
            self.entry(new_name, &linked?, version);
            Ok(())
        })
        .await
    }

    pub(super) async fn unlink(&self, name: &[u8]) -> Result<()> {
        let host = &self.host;
        let _dir = host.dir.lock().await;
        let node = self.look_up(name, false).await?;
        let _lock = node.lock.lock().await;
        let done = self.request(host.fs.unlink(&self.cred, 1, name)).await;
        if done.is_ok() || done == Err(Errno(libc::EINTR)) {
            host.unname(name);
        }
        node.invalidate();
        done
    }

    pub(super) async fn rename(&self, name: &[u8], new_name: &[u8]) -> Result<()> {
        let host = &self.host;
        let _dir = host.dir.lock().await;
        let source = self.look_up(name, false).await?;
        let target = self.look_up(new_name, false).await.ok();
        let _lock = source.lock.lock().await;
        let _target = match &target {
            Some(target) if target.ino != source.ino => Some(target.lock.lock().await),
            _ => None,
        };
        let before = host.world.names(&[name, new_name]);
        let from = (1, name);
        let done = self
            .request(host.fs.rename(&self.cred, from, (1, new_name), 0))
            .await;
        match done {
            Ok(()) => {
                host.unname(name);
                host.name(new_name, Some(source.ino), PATIENCE);
            }
            // Without links the target was put out of the way; it stays so when the calls time out
            // that would have brought it back.
            Err(Errno(libc::ENOSPC))
                if host.world.has_no_links() && host.world.model.is_in_doubt() =>
            {
                host.unname(name);
                host.unname(new_name);
            }
            Err(Errno(libc::ENOSPC)) => {
                let after = host.world.names(&[name, new_name]);
                host.world.saw(Seen::RenameRefused);
                host.world.demand(
                    if before == after {
                        Ok(())
                    } else {
                        Err(format!("{before:?} became {after:?}"))
                    },
                    || "a rename that failed changed names".to_owned(),
                );
            }
            Err(_) => {
                host.unname(name);
                host.unname(new_name);
            }
        }
        source.invalidate();
        if let Some(target) = target.as_ref() {
            target.invalidate();
        }
        done
    }
}
