//! Removing a whole tree, over whatever way the share is reached.
//!
//! Depth first, never through a symbolic link. Each directory is read one page at a time and
//! each page is removed before the next is read, so memory is bounded by depth, not by the
//! number of files. Nothing needs to be remembered between runs: what is left is found again.

use std::ffi::{OsStr, OsString};

use super::{AdminErrorKind, Kind, Removal};
use crate::address::SharePath;

/// Entries read and removed at a time.
const PAGE: usize = 256;
/// The deepest nesting that is removed; each level holds one open directory.
const MAX_DEPTH: usize = 512;
/// How often in a row nothing may vanish although something is there, before giving up: a
/// server that hides entries, or lists what is gone, must not keep us busy for ever.
const MAX_STALLS: u32 = 8;

/// What removing a tree needs from a way to reach the share. A missing object is never an
/// error here: somebody else may be removing the same tree.
pub(super) trait Tree {
    /// A directory that stays the same one when it is renamed.
    type Dir;
    /// The directory that holds `path`, or None when there is none.
    async fn parent(&self, path: &SharePath) -> Result<Option<Self::Dir>, AdminErrorKind>;
    /// The directory `name` in `dir`; None when it is gone or is no directory (a link is none).
    async fn enter(
        &self,
        dir: &Self::Dir,
        name: &OsStr,
    ) -> Result<Option<Self::Dir>, AdminErrorKind>;
    /// Up to `limit` entries from the beginning, each with its kind.
    async fn page(
        &self,
        dir: &Self::Dir,
        limit: usize,
    ) -> Result<Vec<(OsString, Kind)>, AdminErrorKind>;
    /// Removes what is no directory.
    async fn unlink(&self, dir: &Self::Dir, name: &OsStr) -> Result<bool, AdminErrorKind>;
    /// Removes an empty directory.
    async fn rmdir(&self, dir: &Self::Dir, name: &OsStr) -> Result<bool, AdminErrorKind>;
}

struct Level<D> {
    dir: D,
    name: OsString,
    /// Directories of the page that were not entered yet.
    below: Vec<OsString>,
    /// What was removed in all when the last page was read.
    removed_before: Option<u64>,
    stalls: u32,
}

impl<D> Level<D> {
    fn new(dir: D, name: OsString) -> Self {
        Self {
            dir,
            name,
            below: Vec::new(),
            removed_before: None,
            stalls: 0,
        }
    }
}

pub(super) async fn remove<T: Tree>(
    tree: &T,
    path: &SharePath,
    keep_going: &(dyn Fn() -> bool + Sync),
) -> Result<Removal, AdminErrorKind> {
    let mut done = Removal {
        removed: 0,
        finished: true,
    };
    let Some(parent) = tree.parent(path).await? else {
        return Ok(done);
    };
    let top = OsStr::new(path.name());
    let Some(dir) = tree.enter(&parent, top).await? else {
        done.removed += u64::from(tree.unlink(&parent, top).await?);
        return Ok(done);
    };
    let mut levels = vec![Level::new(dir, top.to_owned())];
    while let Some(level) = levels.last_mut() {
        if !keep_going() {
            done.finished = false;
            return Ok(done);
        }
        if let Some(name) = level.below.pop() {
            if let Some(dir) = tree.enter(&level.dir, &name).await? {
                if levels.len() == MAX_DEPTH {
                    return Err(AdminErrorKind::TooLarge(MAX_DEPTH));
                }
                levels.push(Level::new(dir, name));
            }
            continue;
        }
        if level.removed_before.replace(done.removed) == Some(done.removed) {
            level.stalls += 1;
            if level.stalls > MAX_STALLS {
                return Err(AdminErrorKind::NotEmpty);
            }
        }
        let page = tree.page(&level.dir, PAGE).await?;
        if page.is_empty() {
            let Some(empty) = levels.pop() else { break };
            let holder = levels.last().map_or(&parent, |above| &above.dir);
            match tree.rmdir(holder, &empty.name).await {
                Ok(removed) => done.removed += u64::from(removed),
                // Somebody put a file in since the page was read: go through it again.
                Err(AdminErrorKind::NotEmpty) => levels.push(empty),
                Err(error) => return Err(error),
            }
            continue;
        }
        for (name, kind) in page {
            if kind == Kind::Dir {
                level.below.push(name);
                continue;
            }
            if !keep_going() {
                done.finished = false;
                return Ok(done);
            }
            done.removed += u64::from(tree.unlink(&level.dir, &name).await?);
        }
    }
    Ok(done)
}
