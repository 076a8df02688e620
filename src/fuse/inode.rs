//! The inode table: which file handle of the server stands behind a node id of the kernel.
//!
//! Invariants:
//! - one file handle is one inode, whatever names lead to it;
//! - answers overtake each other: what a name leads to is what the last one says that was asked for,
//!   and a change of this host's counts as asked for at its end;
//! - an inode lives as long as the kernel may name it (its lookup count) or a file of it is open;
//! - the node id is the server's file id without its highest bit, so that `st_ino` is the same
//!   after a new mount and in a listing; where two handles share one (several file systems below
//!   one export, or an id used again), the later one gets an id of its own with that bit set.
//!
//! There are as many inodes as the kernel knows files ([`super::known`]), so an inode has no part
//! inline that few files need, its handle is stored once, and its names as keys only.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use tokio::sync::Notify;

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::{Attr, FileHandle, FileKind};

use super::attr::{Cached, Limits, OwnSize, now};
use super::extents::Held;
use super::turns::Changes;

/// The node id of a file system's root (`FUSE_ROOT_ID`).
pub(super) const ROOT: u64 = 1;
/// Node ids that are not the server's file ids.
const OWN_IDS: u64 = 1 << 63;

/// The node id for a file id of the server. The kernel takes 0 and the root's for something else.
pub(super) fn node_id(fileid: u64) -> u64 {
    match fileid & !OWN_IDS {
        //= 1813-3.3.16-zero: “UNIX clients should be careful to map zero fileid values to some
        //= other value”
        low @ ..=ROOT => !OWN_IDS - low,
        id => id,
    }
}

/// An entry of a directory, the directory's node id and the name, hashed with a secret of this
/// process. Among a million names two have the same key once in thirty million times; a file may
/// then be taken for open when another one is deleted, which becomes a `.nfs…` file for a while.
type NameKey = u64;

/// The hidden name of a file that is deleted but open.
#[derive(Debug, Clone)]
pub(super) struct Silly {
    pub(super) parent: u64,
    pub(super) dir: FileHandle,
    pub(super) name: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Inode {
    pub(super) ino: u64,
    pub(super) handle: FileHandle,
    pub(super) kind: FileKind,
    state: Mutex<State>,
    waits: OnceLock<Box<Waits>>,
}

/// What is waited for with a file that is written.
#[derive(Debug, Default)]
struct Waits {
    progress: Notify,
    turn: tokio::sync::Mutex<()>,
    /// Of a directory.
    changes: OnceLock<Box<Changes>>,
}

/// What changes about an inode.
#[derive(Debug)]
pub(super) struct State {
    pub(super) cached: Cached,
    /// Goes up when another host changed the file's data.
    pub(super) version: u64,
    /// The version that the kernel's cached pages are of.
    pub(super) kernel_version: u64,
    lookups: u64,
    pub(super) opens: u32,
    /// Calls under way that take one of its names away.
    pub(super) going: u32,
    /// A task looks for changes of other hosts.
    pub(super) watched: bool,
    /// The name it has while it is deleted but open.
    pub(super) silly: Option<Box<Silly>>,
    pub(super) data: Option<Box<Data>>,
    /// The kernel may have pages of it in its cache: it has read or written through it since they
    /// were dropped last.
    pub(super) may_have_pages: bool,
    /// Names that lead here; each is a key of [`Maps::by_name`].
    names: Names,
}

/// Almost always one.
#[derive(Debug, Default)]
struct Names {
    one: Option<NameKey>,
    #[allow(
        clippy::box_collection,
        reason = "a third of the size where there are none"
    )]
    others: Option<Box<Vec<NameKey>>>,
}

impl Names {
    fn add(&mut self, name: NameKey) {
        match &mut self.one {
            None => self.one = Some(name),
            Some(_) => self.others.get_or_insert_default().push(name),
        }
    }

    fn drop(&mut self, name: NameKey) {
        self.one.take_if(|one| *one == name);
        if let Some(others) = &mut self.others {
            others.retain(|other| *other != name);
        }
    }

    fn take(&mut self) -> impl Iterator<Item = NameKey> {
        let others = self.others.take();
        self.one
            .take()
            .into_iter()
            .chain(others.into_iter().flat_map(|others| *others))
    }
}

/// What went wrong in writing back.
#[derive(Debug, Clone, Copy)]
pub(super) struct WriteError {
    /// Each open file compares it with the last one that it has reported.
    pub(super) number: u64,
    pub(super) errno: i32,
    /// Some open file has reported it.
    pub(super) told: bool,
}

/// What an open or written file has beyond its attributes.
#[derive(Debug, Default)]
pub(super) struct Data {
    pub(super) held: Held<Cred>,
    pub(super) own_size: OwnSize,
    /// What went wrong last in writing back.
    pub(super) error: Option<WriteError>,
    /// Everything up to this mark is to be sent even if it is small.
    pub(super) force: u64,
    /// Tasks that send WRITE calls.
    pub(super) senders: usize,
    pub(super) committing: bool,
    /// A task looks after what lies around unsent.
    pub(super) tended: bool,
    /// After an error writes wait for the server until one succeeds.
    pub(super) careful: bool,
    /// Memory is short: what is sent is committed without being asked for.
    pub(super) pressed: bool,
    /// The server has lost what the last COMMIT was for; to write it again moves nothing.
    pub(super) losing: bool,
    /// Counts what came nearer to the server's disk.
    pub(super) moved: u64,
}

impl Inode {
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        // A panic while it was held would leave it whole: every change is one assignment or is
        // made by `Held`, which checks before it changes.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn waits(&self) -> &Waits {
        self.waits.get_or_init(Box::default)
    }

    /// Something happened to the bytes that are held: a call came back.
    pub(super) fn progress(&self) -> &Notify {
        &self.waits().progress
    }

    /// Whose turn it is to wait for room. Requests of one append wait in their order.
    pub(super) fn turn(&self) -> &tokio::sync::Mutex<()> {
        &self.waits().turn
    }

    /// The changes of a directory's names.
    pub(super) fn changes(&self) -> &Changes {
        self.waits().changes.get_or_init(Box::default)
    }

    /// The same, if there were any.
    pub(super) fn known_changes(&self) -> Option<&Changes> {
        self.waits.get()?.changes.get().map(Box::as_ref)
    }

    pub(super) fn is_file(&self) -> bool {
        self.kind == FileKind::Regular
    }

    pub(super) fn is_directory(&self) -> bool {
        self.kind == FileKind::Directory
    }
}

impl State {
    pub(super) fn data(&mut self) -> &mut Data {
        self.data.get_or_insert_default()
    }

    /// The attributes as this host's programs see them: with what was written but not sent.
    pub(super) fn attr(&self) -> Attr {
        let mut attr = self.cached.attr;
        if self.silly.is_some() {
            // The hidden name is none.
            attr.nlink = attr.nlink.saturating_sub(1);
        }
        if let Some(data) = &self.data {
            let size = data.own_size.size(&self.cached);
            attr.size = size.max(data.held.end(None).unwrap_or(0));
        }
        attr
    }

    /// A WRITE up to `end` was acknowledged at the moment `at`.
    pub(super) fn note_written(&mut self, end: u64, at: u64) {
        let data = self.data.get_or_insert_default();
        data.own_size.wrote(end, at, &self.cached);
    }

    /// The number of the last write error that a new open file need not tell any more.
    pub(super) fn told(&self) -> u64 {
        let error = self.data.as_ref().and_then(|data| data.error);
        error.map_or(0, |error| {
            if error.told {
                error.number
            } else {
                error.number - 1
            }
        })
    }

    /// Whether nothing written is still on its way.
    pub(super) fn is_clean(&self) -> bool {
        self.data.as_ref().is_none_or(|d| d.held.is_clean())
    }
}

/// An inode as it is found by its handle.
#[derive(Debug)]
struct ByHandle(Arc<Inode>);

impl Borrow<FileHandle> for ByHandle {
    fn borrow(&self) -> &FileHandle {
        &self.0.handle
    }
}

impl Hash for ByHandle {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.handle.hash(state);
    }
}

impl PartialEq for ByHandle {
    fn eq(&self, other: &Self) -> bool {
        self.0.handle == other.0.handle
    }
}

impl Eq for ByHandle {}

/// Where a name leads.
#[derive(Debug, Clone, Copy)]
struct Led {
    ino: u64,
    /// The number of the call that told so.
    asked: u64,
}

#[derive(Debug, Default)]
struct Maps {
    by_ino: HashMap<u64, Arc<Inode>>,
    by_handle: HashSet<ByHandle>,
    /// Names that lead to known files, so that the deletion of an open one is noticed.
    by_name: HashMap<NameKey, Led>,
    next_own: u64,
    secret: RandomState,
}

#[derive(Debug)]
pub(super) struct Inodes {
    maps: Mutex<Maps>,
}

impl Inodes {
    /// A table with the root in it, which stays.
    pub(super) fn new(root: FileHandle, attr: Attr, limits: Limits) -> Self {
        let table = Self {
            maps: Mutex::default(),
        };
        {
            let mut maps = table.maps();
            let inode = make(ROOT, root, attr, 0, limits);
            inode.state().lookups = 1;
            maps.put(inode);
        }
        table
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        self.maps.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(super) fn get(&self, ino: u64) -> Option<Arc<Inode>> {
        let maps = self.maps();
        maps.by_ino.get(&ino).cloned()
    }

    /// The file that a name led to when it was last seen.
    pub(super) fn named(&self, parent: u64, name: &[u8]) -> Option<Arc<Inode>> {
        let maps = self.maps();
        let led = maps.by_name.get(&maps.key(parent, name))?;
        maps.by_ino.get(&led.ino).cloned()
    }

    /// A name leads to a node, or did when that was asked for as number `asked`.
    pub(super) fn add_name(&self, parent: u64, name: &[u8], ino: u64, asked: u64) {
        let mut maps = self.maps();
        let name = maps.key(parent, name);
        maps.add_name(name, ino, asked);
    }

    /// A name leads nowhere any more, or did not when that was asked for.
    pub(super) fn drop_name(&self, parent: u64, name: &[u8], asked: u64) {
        let mut maps = self.maps();
        let name = maps.key(parent, name);
        if !maps.is_overtaken(name, asked) {
            maps.drop_name(name);
        }
    }

    /// A name has become another one, as is known at the moment `at`.
    pub(super) fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), at: u64) {
        let mut maps = self.maps();
        let (from, to) = (maps.key(from.0, from.1), maps.key(to.0, to.1));
        let moved = maps.by_name.get(&from).map(|led| led.ino);
        maps.drop_name(from);
        maps.drop_name(to);
        if let Some(ino) = moved {
            maps.add_name(to, ino, at);
        }
    }

    pub(super) fn len(&self) -> usize {
        self.maps().by_ino.len()
    }

    #[cfg(test)]
    pub(super) fn all(&self) -> Vec<Arc<Inode>> {
        self.maps().by_ino.values().cloned().collect()
    }

    /// All inodes with something held or open.
    pub(super) fn busy(&self) -> Vec<Arc<Inode>> {
        let all: Vec<_> = self.maps().by_ino.values().cloned().collect();
        all.into_iter()
            .filter(|inode| {
                let state = inode.state();
                state.opens > 0 || state.silly.is_some() || !state.is_clean()
            })
            .collect()
    }

    /// The inode of a handle, made if it is new, with one more lookup counted. Says whether it
    /// was known: then `attr` still has to be taken in.
    pub(super) fn intern(
        &self,
        handle: FileHandle,
        attr: &Attr,
        asked: u64,
        limits: Limits,
    ) -> (Arc<Inode>, bool) {
        let mut maps = self.maps();
        if let Some(ByHandle(inode)) = maps.by_handle.get(&handle)
            && inode.kind == attr.kind
        {
            inode.state().lookups += 1;
            return (Arc::clone(inode), true);
        }
        let mut ino = node_id(attr.fileid);
        let own = mutant::is_on(Mutant::HighFileIdsAreOwn) && attr.fileid >= OWN_IDS;
        if own || maps.by_ino.contains_key(&ino) {
            maps.next_own += 1;
            ino = OWN_IDS | maps.next_own;
        }
        let inode = make(ino, handle, *attr, asked, limits);
        inode.state().lookups = 1;
        maps.put(Arc::clone(&inode));
        (inode, false)
    }

    /// The kernel gives up `count` lookups of a node, or an entry was not handed over after all.
    pub(super) fn forget(&self, ino: u64, count: u64) {
        if ino == ROOT {
            return;
        }
        let mut maps = self.maps();
        let Some(inode) = maps.by_ino.get(&ino) else {
            return;
        };
        let unused = {
            let mut state = inode.state();
            state.lookups = state.lookups.saturating_sub(count);
            state.lookups == 0 && state.opens == 0 && state.is_clean()
        };
        if unused {
            maps.remove(ino);
        }
    }

    /// Drops an inode that nothing names any more; called when its last file was closed.
    pub(super) fn release(&self, ino: u64) {
        self.forget(ino, 0);
    }
}

impl Maps {
    fn key(&self, parent: u64, name: &[u8]) -> NameKey {
        self.secret.hash_one((parent, name))
    }

    fn put(&mut self, inode: Arc<Inode>) {
        self.by_handle.replace(ByHandle(Arc::clone(&inode)));
        self.by_ino.insert(inode.ino, inode);
    }

    fn remove(&mut self, ino: u64) {
        let Some(inode) = self.by_ino.remove(&ino) else {
            return;
        };
        // Another one has the handle when its kind is another one.
        let current = self.by_handle.get(&inode.handle);
        if current.is_some_and(|current| current.0.ino == ino) {
            self.by_handle.remove(&inode.handle);
        }
        for name in inode.state().names.take() {
            self.by_name.remove(&name);
        }
    }

    /// Whether something later is known of a name than what was asked for as number `asked`.
    fn is_overtaken(&self, name: NameKey, asked: u64) -> bool {
        let later = self.by_name.get(&name).is_some_and(|led| led.asked > asked);
        later && !mutant::is_on(Mutant::OldAnswersName)
    }

    fn add_name(&mut self, name: NameKey, ino: u64, asked: u64) {
        if self.is_overtaken(name, asked) {
            return;
        }
        if let Some(led) = self.by_name.get_mut(&name)
            && led.ino == ino
            && !mutant::is_on(Mutant::NamesSeenAgainAreNew)
        {
            led.asked = asked;
            return;
        }
        self.drop_name(name);
        if let Some(inode) = self.by_ino.get(&ino) {
            inode.state().names.add(name);
            self.by_name.insert(name, Led { ino, asked });
        }
    }

    fn drop_name(&mut self, name: NameKey) {
        if let Some(led) = self.by_name.remove(&name)
            && let Some(inode) = self.by_ino.get(&led.ino)
        {
            inode.state().names.drop(name);
        }
    }
}

fn make(ino: u64, handle: FileHandle, attr: Attr, asked: u64, limits: Limits) -> Arc<Inode> {
    let kind = attr.kind;
    Arc::new(Inode {
        ino,
        handle,
        kind,
        state: Mutex::new(State {
            cached: Cached::new(attr, asked, limits, now()),
            version: 0,
            kernel_version: 0,
            lookups: 0,
            opens: 0,
            going: 0,
            watched: false,
            silly: None,
            data: None,
            may_have_pages: false,
            names: Names::default(),
        }),
        waits: OnceLock::new(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::attr::tests::attr as a_file;
    use crate::fuse::options::FuseOptions;
    use crate::mutant::put_back;

    fn attr(fileid: u64) -> Attr {
        Attr {
            fileid,
            ..a_file(0, 1)
        }
    }

    /// The node ids that a file has, each time it was forgotten in between.
    fn ids(fileid: u64) -> Vec<u64> {
        let limits = Limits::of(&FuseOptions::default(), false);
        let handle = |n: u64| FileHandle::new(&n.to_be_bytes()).unwrap();
        let inodes = Inodes::new(handle(0), attr(2), limits);
        let mut ids = Vec::new();
        for other in 1..=2 {
            // One that stays has taken an id of its own, if there are any.
            inodes.intern(handle(other), &attr(1 << 63 | 77), 1, limits);
            let (inode, known) = inodes.intern(handle(9), &attr(fileid), 1, limits);
            assert!(!known);
            ids.push(inode.ino);
            inodes.forget(inode.ino, 1);
        }
        ids
    }

    //= test 1813-3.3.16-zero
    #[test]
    fn no_file_has_the_id_of_nothing_or_of_the_root() {
        for fileid in [0, ROOT, OWN_IDS, OWN_IDS | ROOT] {
            assert!((ROOT + 1..OWN_IDS).contains(&node_id(fileid)), "{fileid}");
        }
        assert_ne!(node_id(0), node_id(ROOT));
    }

    /// The order of a file's names behind the first one, after the second of four was seen again.
    fn names_after_one_was_seen_again() -> Vec<usize> {
        let limits = Limits::of(&FuseOptions::default(), false);
        let handle = |n: u64| FileHandle::new(&n.to_be_bytes()).unwrap();
        let inodes = Inodes::new(handle(0), attr(2), limits);
        let (inode, _) = inodes.intern(handle(1), &attr(3), 1, limits);
        let names = ["a", "b", "c", "d"];
        for (name, asked) in names.into_iter().chain(["b"]).zip(1..) {
            inodes.add_name(ROOT, name.as_bytes(), inode.ino, asked);
        }
        let keys = names.map(|name| inodes.maps().key(ROOT, name.as_bytes()));
        let place = |name: &NameKey| keys.iter().position(|key| key == name).unwrap();
        let state = inode.state();
        state
            .names
            .others
            .iter()
            .flat_map(|others| others.iter().map(place))
            .collect()
    }

    #[test]
    fn a_name_that_is_seen_again_costs_no_walk_over_the_others() {
        assert_eq!(names_after_one_was_seen_again(), [1, 2, 3]);
        let _back = put_back(Mutant::NamesSeenAgainAreNew);
        assert_eq!(
            names_after_one_was_seen_again(),
            [2, 3, 1],
            "taken out and put in"
        );
    }

    #[test]
    fn a_forgotten_file_has_the_same_node_id_again() {
        for fileid in [0, 1, 2, 1 << 62, 1 << 63, u64::MAX] {
            let id = node_id(fileid);
            assert!(id > ROOT && id < OWN_IDS);
            assert_eq!(ids(fileid), [id, id]);
        }
        let _back = put_back(Mutant::HighFileIdsAreOwn);
        let ids = ids(u64::MAX);
        assert_ne!(ids[0], ids[1]);
    }
}
