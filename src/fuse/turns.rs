//! Who changes the names of directories, and what waits for that.
//!
//! The kernel lets one program at a time change the names of a directory, and lets nobody look names up
//! that it does not know meanwhile. But it lets go when the program is killed, while its call may still be
//! on the way to the server. So for changes that go on without their program:
//!
//! Invariants:
//! - the names of a directory are changed one at a time, in the order of the requests ([`NamesTurn`]);
//! - a directory whose names are being changed is not forgotten: it would have another turn then;
//! - while they are changed for a program that was killed, names are not looked up in it or listed
//!   ([`names_settled`]): the kernel would believe for seconds what is not so a moment later;
//! - what was listed before a change is not told as known after it ([`has_changed_since`]).

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::{Notify, OwnedMutexGuard};

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;

use super::fs::Fs;
use super::inode::Inode;
use super::open::Opening;
use super::task;

/// The turn to change the names of a directory.
pub(super) type NamesTurn = OwnedMutexGuard<()>;

/// What is known of the changes of a directory's names.
#[derive(Debug, Default)]
pub(super) struct Changes {
    turn: Arc<tokio::sync::Mutex<()>>,
    /// Those under way whose programs were killed.
    orphans: AtomicUsize,
    /// The number of the moment when the last one took a name away.
    last: AtomicU64,
    settled: Notify,
}

/// Waits for the turn to change a directory's names.
pub(super) async fn names_turn(dir: &Inode) -> Option<NamesTurn> {
    if mutant::is_on(Mutant::KilledRenamesReplaceLater) {
        return None;
    }
    Some(Arc::clone(&dir.changes().turn).lock_owned().await)
}

/// Whether no change of a directory's names goes on without its program.
pub(super) fn are_names_settled(dir: &Inode) -> bool {
    let orphans = dir.known_changes().map(|c| &c.orphans);
    orphans.is_none_or(|orphans| orphans.load(Ordering::SeqCst) == 0)
        || mutant::is_on(Mutant::LooksPassKilledChanges)
}

/// Waits until that is so.
pub(super) async fn names_settled(dir: &Inode) {
    // Most directories have none to wait for, and nothing that tells of their end.
    if !are_names_settled(dir) {
        task::until(&dir.changes().settled, || are_names_settled(dir)).await;
    }
}

/// Whether a name of a directory was taken away after the call numbered `asked` was made.
pub(super) fn has_changed_since(dir: &Inode, asked: u64) -> bool {
    let last = dir.known_changes().map(|c| c.last.load(Ordering::SeqCst));
    last.is_some_and(|last| last > asked) && !mutant::is_on(Mutant::ListingsOutliveChanges)
}

/// A change of the names of directories, for the task that carries it out.
#[derive(Debug)]
pub(super) struct Change {
    fs: Arc<Fs>,
    dirs: Vec<Arc<Inode>>,
    /// Which keeps them known.
    _kept: Vec<Opening>,
    _turns: Vec<Option<NamesTurn>>,
    ends: Arc<Ends>,
}

/// The same for its caller, until that has its answer or is killed.
#[derive(Debug)]
pub(super) struct Caller {
    dirs: Vec<Arc<Inode>>,
    ends: Arc<Ends>,
}

/// Which of the two has ended.
#[derive(Debug, Default)]
struct Ends(Mutex<(bool, bool)>);

impl Ends {
    /// Whether the caller is gone, and whether the change is over.
    fn both(&self) -> MutexGuard<'_, (bool, bool)> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Change {
    /// Waits for the turns in one or two directories, in an order that all keep.
    pub(super) async fn begin(fs: &Arc<Fs>, cred: &Cred, dirs: [&Arc<Inode>; 2]) -> (Self, Caller) {
        let mut dirs: Vec<_> = dirs.into_iter().map(Arc::clone).collect();
        dirs.sort_by_key(|dir| dir.ino);
        dirs.dedup_by_key(|dir| dir.ino);
        let mut turns = Vec::new();
        for dir in &dirs {
            turns.push(names_turn(dir).await);
        }
        let ends = Arc::<Ends>::default();
        let kept = match mutant::is_on(Mutant::ChangedDirsAreForgotten) {
            true => &[],
            false => &*dirs,
        };
        let opened = |dir| Opening::new(fs, dir, cred);
        let change = Self {
            fs: Arc::clone(fs),
            dirs: dirs.clone(),
            _kept: kept.iter().map(opened).collect(),
            _turns: turns,
            ends: Arc::clone(&ends),
        };
        (change, Caller { dirs, ends })
    }
}

impl Drop for Change {
    fn drop(&mut self) {
        let (gone, over) = &mut *self.ends.both();
        *over = true;
        for dir in &self.dirs {
            let changes = dir.changes();
            changes.last.store(self.fs.tick(), Ordering::SeqCst);
            if *gone {
                changes.orphans.fetch_sub(1, Ordering::SeqCst);
                changes.settled.notify_waiters();
            }
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        let (gone, over) = &mut *self.ends.both();
        *gone = true;
        if !*over {
            for dir in &self.dirs {
                dir.changes().orphans.fetch_add(1, Ordering::SeqCst);
            }
        }
    }
}

/// Renames and unlinks under way, in all directories.
#[derive(Debug, Default)]
pub(super) struct Replacing {
    numbers: Mutex<Numbers>,
    ended: Notify,
}

#[derive(Debug, Default)]
struct Numbers {
    next: u64,
    under_way: BTreeSet<u64>,
}

impl Replacing {
    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.numbers.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// One begins, and is under way until this is dropped.
    pub(super) fn begin(&self) -> Replaces<'_> {
        let mut numbers = self.numbers();
        let number = numbers.next;
        numbers.next += 1;
        numbers.under_way.insert(number);
        Replaces(self, number)
    }

    /// Waits until all have ended that are under way now; those that begin later are not held up.
    pub(super) async fn those_under_way(&self) {
        let next = self.numbers().next;
        let are_over = || {
            let first = self.numbers().under_way.first().copied();
            first.is_none_or(|first| first >= next)
        };
        task::until(&self.ended, are_over).await;
    }
}

/// A rename or unlink under way.
#[derive(Debug)]
pub(super) struct Replaces<'a>(&'a Replacing, u64);

impl Drop for Replaces<'_> {
    fn drop(&mut self) {
        self.0.numbers().under_way.remove(&self.1);
        self.0.ended.notify_waiters();
    }
}
