//! The part of a kernel that stands between programs and the file system: names, attributes, the
//! page cache, and the locks around requests, as in fs/fuse of three generations.
//!
//! Known limits: pages are small; one directory; no shared maps, no write-back cache.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Duration;

use tokio::sync::{Mutex as Lock, Notify, oneshot};
use tokio::time::Instant;

use crate::fuse::fs::{Entry, Fs, Kernel};
use crate::fuse::known::Forgetting;
use nfs::rpc::nfs3::Attr;

use super::{Seen, World};

/// A page: small, so that small files have many.
pub(super) type Page = [u8; 64];
/// Bytes of a page.
pub(super) const PAGE: u64 = 64;

/// How the kernel treats its pages when a write goes past them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Generation {
    /// Before 6.6: it does nothing.
    Old,
    /// 6.6 to 6.17: it drops them before the write.
    Middle,
    /// Since 6.18: also after it.
    New,
}

pub(super) const GENERATIONS: [Generation; 3] =
    [Generation::Old, Generation::Middle, Generation::New];

/// What the kernel knows of a file.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) ino: u64,
    /// The inode's lock: writes, fsync and changes of attributes take it.
    pub(super) lock: Lock<()>,
    state: Mutex<State>,
    unlocked: Notify,
}

#[derive(Debug)]
struct State {
    lookups: u64,
    size: u64,
    valid_until: Option<Instant>,
    attr_version: u64,
    /// A SETATTR of the size is under way (FUSE_I_SIZE_UNSTABLE).
    size_unstable: bool,
    /// Goes up when all pages are dropped: a READ that was begun before fills none.
    epoch: u64,
    /// A READ ended early and the size does not show it, because something overtook the answer:
    /// what is behind the end reads as zeros until the kernel hears of the size again.
    unsure: bool,
    /// Those that are up to date.
    pages: BTreeMap<u64, Page>,
    locked: BTreeSet<u64>,
    opens: u32,
}

#[derive(Debug, Clone)]
pub(super) struct Dentry {
    pub(super) ino: Option<u64>,
    until: Instant,
}

#[derive(Debug)]
pub(super) struct Host {
    pub(super) number: usize,
    pub(super) fs: Arc<Fs>,
    pub(super) generation: Generation,
    pub(super) world: Arc<World>,
    /// The directory's lock: changes of names take it.
    pub(super) dir: Lock<()>,
    pub(super) names: Mutex<BTreeMap<Vec<u8>, Dentry>>,
    nodes: Mutex<BTreeMap<u64, Arc<Node>>>,
    versions: AtomicU64,
}

impl Host {
    pub(super) fn new(
        number: usize,
        fs: Arc<Fs>,
        generation: Generation,
        world: Arc<World>,
    ) -> Arc<Self> {
        Arc::new(Self {
            number,
            fs,
            generation,
            world,
            dir: Lock::new(()),
            names: Mutex::default(),
            nodes: Mutex::default(),
            versions: AtomicU64::new(1),
        })
    }

    pub(super) fn version(&self) -> u64 {
        self.versions.load(Ordering::Relaxed)
    }

    fn next_version(&self) -> u64 {
        self.versions.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Takes in an entry that the file system answered with, asked for at a version.
    pub(super) fn node(&self, entry: &Entry, version: u64) -> Arc<Node> {
        let mut nodes = self.nodes.lock().unwrap();
        let node = nodes.entry(entry.ino).or_insert_with(|| {
            Arc::new(Node {
                ino: entry.ino,
                lock: Lock::new(()),
                state: Mutex::new(State {
                    lookups: 0,
                    size: entry.attr.size,
                    valid_until: None,
                    attr_version: 0,
                    size_unstable: false,
                    epoch: 0,
                    unsure: false,
                    pages: BTreeMap::new(),
                    locked: BTreeSet::new(),
                    opens: 0,
                }),
                unlocked: Notify::new(),
            })
        });
        let node = Arc::clone(node);
        drop(nodes);
        node.state.lock().unwrap().lookups += 1;
        self.attributes(&node, &entry.attr, entry.attr_trusted, version);
        node
    }

    pub(super) fn known(&self, ino: u64) -> Option<Arc<Node>> {
        self.nodes.lock().unwrap().get(&ino).cloned()
    }

    /// `fuse_change_attributes`.
    /// An answer that was overtaken by a change of this host's is not taken; says whether it was.
    pub(super) fn attributes(
        &self,
        node: &Node,
        attr: &Attr,
        trusted: Duration,
        version: u64,
    ) -> bool {
        let mut state = node.state.lock().unwrap();
        if state.size_unstable || state.attr_version > version {
            return false;
        }
        state.attr_version = self.next_version();
        state.valid_until = Some(Instant::now() + trusted);
        state.resize(attr.size);
        true
    }

    /// The inode's size is about to be set by a SETATTR.
    pub(super) fn begin_cut(node: &Node) {
        node.state.lock().unwrap().size_unstable = true;
    }

    /// `fuse_do_setattr` behind the answer.
    pub(super) fn cut(&self, node: &Node, answer: Option<(&Attr, Duration)>) {
        let mut state = node.state.lock().unwrap();
        state.size_unstable = false;
        match answer {
            Some((attr, trusted)) => {
                state.attr_version = self.next_version();
                state.valid_until = Some(Instant::now() + trusted);
                state.resize(attr.size);
            }
            None => state.valid_until = None,
        }
    }

    /// `fuse_write_update_attr`.
    pub(super) fn wrote(&self, node: &Node, end: u64) {
        let mut state = node.state.lock().unwrap();
        state.attr_version = self.next_version();
        state.valid_until = None;
        state.size = state.size.max(end);
    }

    /// `fuse_read_update_size`: a READ ended early.
    pub(super) fn short_read(&self, node: &Node, end: u64, version: u64) {
        let mut state = node.state.lock().unwrap();
        if version >= state.attr_version && end < state.size && !state.size_unstable {
            state.attr_version = self.next_version();
            state.size = end;
        } else if end < state.size {
            state.unsure = true;
        }
    }

    pub(super) fn look_up(&self, name: &[u8]) -> Option<Dentry> {
        let names = self.names.lock().unwrap();
        let found = names
            .get(name)
            .filter(|dentry| dentry.until > Instant::now());
        found.cloned()
    }

    pub(super) fn name(&self, name: &[u8], ino: Option<u64>, trusted: Duration) {
        let until = Instant::now() + trusted;
        let mut names = self.names.lock().unwrap();
        names.insert(name.to_vec(), Dentry { ino, until });
    }

    pub(super) fn unname(&self, name: &[u8]) -> Option<Dentry> {
        self.names.lock().unwrap().remove(name)
    }

    /// Memory is short: what nobody uses is forgotten, with its names.
    pub(super) fn shrink(&self, mut choose: impl FnMut() -> bool) {
        let mut gone = Vec::new();
        self.nodes.lock().unwrap().retain(|ino, node| {
            let state = node.state.lock().unwrap();
            let used = Arc::strong_count(node) > 1 || state.opens > 0;
            if used || !choose() {
                return true;
            }
            gone.push((*ino, state.lookups));
            false
        });
        for (ino, lookups) in gone {
            let mut names = self.names.lock().unwrap();
            names.retain(|_, dentry| dentry.ino != Some(ino));
            drop(names);
            self.fs.forget(ino, lookups);
            self.world.saw(Seen::Forgotten);
        }
    }
}

impl State {
    /// `truncate_pagecache` and `invalidate_inode_pages2`, which wait for pages that are locked.
    fn resize(&mut self, size: u64) {
        self.unsure = false;
        if self.size != size {
            self.size = size;
            self.epoch += 1;
            self.pages.clear();
        }
    }
}

impl Node {
    pub(super) fn is_unsure(&self) -> bool {
        self.state.lock().unwrap().unsure
    }

    pub(super) fn epoch(&self) -> u64 {
        self.state.lock().unwrap().epoch
    }

    pub(super) fn size(&self) -> u64 {
        self.state.lock().unwrap().size
    }

    pub(super) fn opened(&self) {
        self.state.lock().unwrap().opens += 1;
    }

    pub(super) fn closed(&self) {
        self.state.lock().unwrap().opens -= 1;
    }

    pub(super) fn is_valid(&self) -> bool {
        let state = self.state.lock().unwrap();
        state
            .valid_until
            .is_some_and(|until| until > Instant::now())
    }

    pub(super) fn invalidate(&self) {
        self.state.lock().unwrap().valid_until = None;
    }

    /// A page that is up to date.
    pub(super) fn page(&self, index: u64) -> Option<Page> {
        self.state.lock().unwrap().pages.get(&index).copied()
    }

    pub(super) fn has_pages(&self) -> bool {
        !self.state.lock().unwrap().pages.is_empty()
    }

    pub(super) fn set_page(&self, index: u64, page: Option<Page>) {
        let mut state = self.state.lock().unwrap();
        match page {
            Some(page) => state.pages.insert(index, page),
            None => state.pages.remove(&index),
        };
    }

    /// Waits until none of these pages is locked, and locks them.
    pub(super) async fn lock_pages(&self, pages: Range<u64>) -> PagesLock<'_> {
        loop {
            let unlocked = self.unlocked.notified();
            tokio::pin!(unlocked);
            unlocked.as_mut().enable();
            {
                let mut state = self.state.lock().unwrap();
                if state.locked.range(pages.clone()).next().is_none() {
                    state.locked.extend(pages.clone());
                    return PagesLock { node: self, pages };
                }
            }
            unlocked.await;
        }
    }

    /// `invalidate_inode_pages2_range`.
    pub(super) async fn drop_pages(&self, pages: Range<u64>) {
        let all: Vec<u64> = {
            let state = self.state.lock().unwrap();
            let cached = state.pages.range(pages.clone()).map(|(index, _)| *index);
            let locked = state.locked.range(pages).copied();
            let all: BTreeSet<u64> = cached.chain(locked).collect();
            all.into_iter().collect()
        };
        for index in all {
            let _lock = self.lock_pages(index..index + 1).await;
            self.set_page(index, None);
        }
    }
}

/// Pages under a lock; unlocked when it is dropped.
pub(super) struct PagesLock<'a> {
    node: &'a Node,
    pages: Range<u64>,
}

impl Drop for PagesLock<'_> {
    fn drop(&mut self) {
        let mut state = self.node.state.lock().unwrap();
        for index in self.pages.clone() {
            state.locked.remove(&index);
        }
        drop(state);
        self.node.unlocked.notify_waiters();
    }
}

/// The way from the file system to the kernel's caches.
#[derive(Debug, Default)]
pub(super) struct Caches {
    host: OnceLock<Weak<Host>>,
}

impl Caches {
    pub(super) fn connect(&self, host: &Arc<Host>) {
        let _ = self.host.set(Arc::downgrade(host));
    }

    fn find(&self, ino: u64) -> Option<(Arc<Host>, Arc<Node>)> {
        let host = self.host.get()?.upgrade()?;
        let node = host.known(ino)?;
        Some((host, node))
    }

    /// `fuse_reverse_inval_inode`, which waits for pages that are locked.
    fn drop(&self, ino: u64, pages: Range<u64>, done: Option<oneshot::Sender<()>>) {
        self.drop_attributes(ino);
        let found = self.find(ino);
        tokio::spawn(async move {
            if let Some((host, node)) = found {
                host.world.saw(Seen::PagesDropped);
                node.drop_pages(pages).await;
            }
            if let Some(done) = done {
                let _ = done.send(());
            }
        });
    }
}

impl Kernel for Caches {
    fn drop_attributes(&self, ino: u64) {
        if let Some((host, node)) = self.find(ino) {
            node.state.lock().unwrap().attr_version = host.next_version();
            node.invalidate();
        }
    }

    fn drop_pages(&self, ino: u64) {
        self.drop(ino, 0..u64::MAX, None);
    }

    fn drop_range(&self, ino: u64, offset: u64, len: u64, done: oneshot::Sender<()>) {
        let pages = offset / PAGE..(offset + len).div_ceil(PAGE);
        self.drop(ino, pages, Some(done));
    }

    fn forget_unused(&self, done: Forgetting) {
        let host = self.host.get().and_then(Weak::upgrade);
        tokio::spawn(async move {
            let _done = done;
            if let Some(host) = host {
                host.shrink(|| true);
            }
        });
    }
}
