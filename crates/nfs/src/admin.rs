//! Directory operations on a share.
//!
//! The catalog, subdirectories and sessions are kept with these operations. [`Admin::v3`] speaks
//! NFSv3 in user space and needs no mount; [`Admin::mounted`] does the same on a directory where
//! the share is mounted, for a server that only speaks NFSv4.
//!
//! Invariants:
//! - every operation ends within [`AdminSettings::op_deadline`], whatever the server does
//!   ([`Admin::remove_tree`]: each of its steps);
//! - "absent" (`None`, `false`) is said only when the server said so, never on doubt;
//! - no symbolic link is ever followed, neither on the way nor at the end of a path;
//! - what returned `Ok` is on stable storage.
//!
//! A change whose answer did not come ([`AdminErrorKind::TimedOut`], [`AdminErrorKind::Unknown`])
//! may or may not have happened, and may still happen. Such a call is never repeated in here
//! when a repetition could be taken for another caller's: the caller looks and decides.

mod error;
mod mounted;
#[cfg(test)]
mod scenarios;
mod tree;
mod v3;
#[cfg(feature = "simulated")]
pub use self::v3::simulated;

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::error::{AdminError, AdminErrorKind, Refusal};
use self::mounted::Mounted;
use self::v3::{V3, on_session};
use crate::address::{Share, SharePath};
use crate::probe::Breaker;

/// How temporary files of [`Admin::write`] begin; 16 hex digits follow.
const TEMPORARY_PREFIX: &str = ".nfsvol-tmp-";
/// Permission bits of files that we make: records are there for people to read.
const FILE_MODE: u32 = 0o644;
/// The longest directory that [`Admin::list`] returns, in entries: bounds memory to some 200 MB.
const MAX_ENTRIES: usize = 1_000_000;

/// A time stamp that the server set.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
pub struct ServerTime {
    /// Seconds since 1970.
    pub secs: u64,
    /// Nanoseconds of the second, below 1,000,000,000.
    pub nanos: u32,
}

/// What a directory entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Dir,
    File,
    Symlink,
    /// A device, a socket or a FIFO.
    Other,
}

/// The attributes of an object (fattr3, RFC 1813 section 2.6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attr {
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky: at most 0o7777.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// The inode number on the server.
    pub fileid: u64,
    pub nlink: u32,
    pub mtime: ServerTime,
    pub ctime: ServerTime,
}

/// One entry of a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// As the server holds it: any bytes but `/` and NUL.
    pub name: OsString,
    /// None when the server did not tell, or when the object went away meanwhile.
    pub attr: Option<Attr>,
}

/// Room on the share's file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    pub total: u64,
    pub free: u64,
    /// What a user without privileges can still take.
    pub available: u64,
}

/// What became of making something that must not exist yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// This call made it.
    New(Attr),
    /// It was there already, made by somebody else.
    Exists,
}

/// How far [`Admin::remove_tree`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Removal {
    /// Files and directories that this call removed.
    pub removed: u64,
    /// Whether nothing is left; false when `keep_going` said stop.
    pub finished: bool,
}

/// Settings of the admin path to one share.
#[derive(Debug, Clone)]
pub struct AdminSettings {
    /// The longest time one operation may take, from the call to its result.
    pub op_deadline: Duration,
    /// The server's NFS port; None asks the portmapper and falls back to 2049.
    pub nfs_port: Option<u16>,
    /// The port of the server's MOUNT service; None asks the portmapper.
    pub mount_port: Option<u16>,
    /// The most connections (or blocking threads) at a time. Operations beyond wait in line.
    pub max_connections: usize,
}

impl Default for AdminSettings {
    fn default() -> Self {
        Self {
            // Ten times what a loaded server takes for a few small synchronous calls, and short
            // enough to leave room for an answer within Docker's patience.
            op_deadline: Duration::from_secs(5),
            nfs_port: None,
            mount_port: None,
            // Reserved source ports are scarce: about 720 for all clients of this host.
            max_connections: 4,
        }
    }
}

/// Directory operations on one share. Cheap to clone; clones share connections and limits.
#[derive(Debug, Clone)]
pub struct Admin(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    share: Share,
    way: Way,
    /// The way for renewals, once it is used; without one this is it.
    renewals: Option<Arc<OnceLock<Admin>>>,
}

impl Inner {
    fn new(share: Share, way: Way) -> Arc<Self> {
        Arc::new(Self {
            share,
            way,
            renewals: Some(Arc::default()),
        })
    }
}

#[derive(Debug)]
enum Way {
    V3(Box<V3>),
    Mounted(Mounted),
}

/// Calls the same method on whichever way the share is reached: a session, or the mount.
macro_rules! on_share {
    ($self:ident, $op:literal, $path:expr, $way:ident => $call:expr) => {
        match &$self.0.way {
            Way::V3(v3) => on_session!(v3, $way => $call),
            Way::Mounted($way) => $call.await,
        }
        .map_err($self.failed($op, $path))
    };
}

impl Admin {
    /// The share over NFSv3. Nothing is sent before the first operation.
    #[must_use]
    pub fn v3(share: Share, settings: AdminSettings) -> Self {
        Self::v3_with(share, settings, Breaker::default())
    }

    /// As [`v3`](Self::v3), with the breaker that the share's server has already.
    #[must_use]
    pub fn v3_with(share: Share, settings: AdminSettings, breaker: Breaker) -> Self {
        let way = Way::V3(Box::new(V3::new(share.clone(), settings, breaker)));
        Self(Inner::new(share, way))
    }

    /// The share as mounted at `dir`.
    ///
    /// A mount of the kernel's NFS client must have been made with [`MOUNT_OPTIONS`], or else
    /// cached attributes and names would be taken for the server's word.
    #[must_use]
    pub fn mounted(share: Share, dir: PathBuf, settings: AdminSettings) -> Self {
        let way = Way::Mounted(Mounted::new(dir, &settings));
        Self(Inner::new(share, way))
    }

    /// The same, for one call of a user: the directories that it comes to are looked up once, and
    /// stay what they were when they are renamed meanwhile (over NFSv3). So it is for calls that
    /// notice what other hosts did by what they find *in* a directory, and it lives no longer.
    #[must_use]
    pub fn scoped(&self) -> Self {
        self.looking_up(V3::scoped)
    }

    /// The same, for what a call of a user does that renames directories which others rename as well: each
    /// is looked up whenever it is needed.
    #[must_use]
    pub fn unscoped(&self) -> Self {
        self.looking_up(V3::unscoped)
    }

    fn looking_up(&self, how: impl FnOnce(&V3) -> V3) -> Self {
        let Way::V3(v3) = &self.0.way else {
            return self.clone();
        };
        Self(Arc::new(Inner {
            share: self.0.share.clone(),
            way: Way::V3(Box::new(how(v3))),
            renewals: self.0.renewals.clone(),
        }))
    }

    /// The same share by a connection of its own, the same one each time: what is done by it waits
    /// for no other operation, and each ends within `answer`.
    #[must_use]
    pub fn for_renewals(&self, answer: Duration) -> Self {
        let Some(renewals) = &self.0.renewals else {
            return self.clone();
        };
        let apart = renewals.get_or_init(|| {
            let way = match &self.0.way {
                Way::V3(v3) => Way::V3(Box::new(v3.apart(answer))),
                Way::Mounted(mounted) => Way::Mounted(mounted.apart(answer)),
            };
            Self(Arc::new(Inner {
                share: self.0.share.clone(),
                way,
                renewals: None,
            }))
        });
        apart.clone()
    }

    /// The connections made so far over NFSv3: a new one may follow a time when the server was
    /// away. On a mount the kernel makes them, and this is 0.
    #[must_use]
    pub fn dials(&self) -> u64 {
        match &self.0.way {
            Way::V3(v3) => v3.dials(),
            Way::Mounted(_) => 0,
        }
    }

    /// Whether both share connections, as clones do.
    #[must_use]
    pub fn is_same_way(&self, other: &Self) -> bool {
        match (&self.0.way, &other.0.way) {
            (Way::V3(v3), Way::V3(other)) => v3.is_same(other),
            _ => Arc::ptr_eq(&self.0, &other.0),
        }
    }

    #[must_use]
    pub fn share(&self) -> &Share {
        &self.0.share
    }

    /// Whether what the operations work on is not the share any more, for as long as it is not
    /// mounted anew.
    #[must_use]
    pub fn is_stale(&self) -> bool {
        match &self.0.way {
            Way::V3(_) => false,
            Way::Mounted(mounted) => mounted.is_stale(),
        }
    }

    /// Names directories and files that nobody renames or replaces, such as those of the catalog's
    /// frame. Their handles are kept, which saves looking them up each time (over NFSv3).
    pub fn keep_handles(&self, places: &[SharePath]) {
        if let Way::V3(v3) = &self.0.way {
            v3.keep_handles(places);
        }
    }

    /// The RPCs sent so far over NFSv3; 0 on a mount, where the kernel sends them.
    #[must_use]
    pub fn rpc_count(&self) -> u64 {
        match &self.0.way {
            Way::V3(v3) => v3.rpc_count(),
            Way::Mounted(_) => 0,
        }
    }

    /// The object's own attributes (of a symbolic link, not of its target). None when it, or a
    /// directory on the way, is known to be absent.
    ///
    /// # Errors
    /// [`AdminErrorKind::NotADirectory`] and [`AdminErrorKind::Symlink`] for what is on the way.
    pub async fn attr(&self, path: &SharePath) -> Result<Option<Attr>, AdminError> {
        on_share!(self, "look up", path, way => way.attr(path))
    }

    /// Makes a directory; its parent must exist. Atomic: of several callers on any hosts, one
    /// gets [`Made::New`].
    ///
    /// # Errors
    /// [`AdminErrorKind::NotFound`] without the parent. [`AdminErrorKind::Unknown`] when the
    /// connection broke: a directory that is then there may be anybody's.
    pub async fn mkdir(&self, path: &SharePath, mode: u32) -> Result<Made, AdminError> {
        on_share!(self, "make directory", path, way => way.mkdir(path, mode))
    }

    /// Changes owner, then mode, of a file or directory, and skips what is so already.
    ///
    /// # Errors
    /// [`AdminErrorKind::Access`] on an export with root_squash.
    pub async fn set_owner(
        &self,
        path: &SharePath,
        uid: u32,
        gid: u32,
        mode: u32,
    ) -> Result<Attr, AdminError> {
        on_share!(self, "set the owner of", path, way => way.set_owner(path, uid, gid, mode))
    }

    /// Makes a file that must not exist yet, then fills it. Atomic in making, not in filling:
    /// another reader may see it empty, and after a crash it may stay so.
    ///
    /// # Errors
    /// [`AdminErrorKind::NotFound`] without the parent.
    pub async fn create_new(&self, path: &SharePath, contents: &[u8]) -> Result<Made, AdminError> {
        match &self.0.way {
            Way::V3(v3) => v3.create_new(path, contents).await,
            Way::Mounted(mounted) => mounted.create_new(path, contents).await,
        }
        .map_err(self.failed("create", path))
    }

    /// Makes a file in a directory that nobody else uses, such as one that is being made aside.
    ///
    /// # Errors
    /// [`AdminErrorKind::NotFound`] without the parent.
    pub async fn draft(&self, path: &SharePath, contents: &[u8]) -> Result<(), AdminError> {
        on_share!(self, "create", path, way => way.draft(path, contents))
    }

    /// Makes a file or replaces it as a whole: readers see the old contents or the new, also
    /// after a crash, which may leave a temporary file (see [`is_temporary`]) beside it.
    ///
    /// # Errors
    /// [`AdminErrorKind::NotFound`] without the parent, [`AdminErrorKind::Exists`] when a
    /// directory has the name.
    pub async fn write(&self, path: &SharePath, contents: &[u8]) -> Result<Attr, AdminError> {
        on_share!(self, "write", path, way => way.write(path, contents))
    }

    /// A file's contents; None when it is known to be absent.
    ///
    /// # Errors
    /// [`AdminErrorKind::TooLarge`] beyond `limit` bytes.
    pub async fn read(
        &self,
        path: &SharePath,
        limit: usize,
    ) -> Result<Option<Vec<u8>>, AdminError> {
        on_share!(self, "read", path, way => way.read(path, limit))
    }

    /// Renames a file or directory atomically. A file takes the place of a file, and a directory
    /// that of an empty directory, as rename(2) has it.
    ///
    /// # Errors
    /// [`AdminErrorKind::NotFound`]; [`AdminErrorKind::Exists`] when the target is a directory
    /// that is not empty, or of the other kind; [`AdminErrorKind::CrossDevice`].
    pub async fn rename(&self, from: &SharePath, to: &SharePath) -> Result<(), AdminError> {
        on_share!(self, "rename", from, way => way.rename(from, to))
    }

    /// Renames an entry of a directory within it; the directory's attributes afterwards, whose
    /// mtime is the server's time of the change.
    ///
    /// # Errors
    /// As [`rename`](Self::rename).
    pub async fn rename_within(
        &self,
        dir: &SharePath,
        from: &str,
        to: &str,
    ) -> Result<Attr, AdminError> {
        on_share!(self, "rename in", dir, way => way.rename_within(dir, from, to))
    }

    /// Removes a file, symbolic link or special file. False when it was absent.
    ///
    /// # Errors
    /// `EISDIR` in [`AdminErrorKind::Other`] for a directory.
    pub async fn remove_file(&self, path: &SharePath) -> Result<bool, AdminError> {
        on_share!(self, "remove", path, way => way.remove_file(path))
    }

    /// As [`remove_file`](Self::remove_file) for what is known to be no directory, without a look:
    /// some servers let root remove a directory so.
    ///
    /// # Errors
    /// Those of reaching the share.
    pub async fn unlink(&self, path: &SharePath) -> Result<bool, AdminError> {
        on_share!(self, "remove", path, way => way.unlink_file(path))
    }

    /// Removes an empty directory. False when it was absent.
    ///
    /// # Errors
    /// [`AdminErrorKind::NotEmpty`], [`AdminErrorKind::NotADirectory`].
    pub async fn remove_dir(&self, path: &SharePath) -> Result<bool, AdminError> {
        on_share!(self, "remove directory", path, way => way.remove_dir(path))
    }

    /// The entries of a directory, in the server's order, without `.` and `..`; None when it is
    /// known to be absent.
    ///
    /// # Errors
    /// [`AdminErrorKind::TooLarge`] beyond 1,000,000 entries.
    pub async fn list(&self, path: &SharePath) -> Result<Option<Vec<DirEntry>>, AdminError> {
        on_share!(self, "list", path, way => way.list(path))
    }

    /// Sets the modification time to the server's clock.
    ///
    /// # Errors
    /// [`AdminErrorKind::NotFound`].
    pub async fn touch(&self, path: &SharePath) -> Result<Attr, AdminError> {
        on_share!(self, "touch", path, way => way.touch(path))
    }

    /// Room on the file system that holds the export.
    ///
    /// # Errors
    /// Those of reaching the share.
    pub async fn space(&self) -> Result<Space, AdminError> {
        on_share!(self, "ask for the space of", &SharePath::root(), way => way.space())
    }

    /// Removes a file or a directory with all that is in it, without following links, as long
    /// as `keep_going` says so. What is absent counts as removed, so a run that was stopped or
    /// failed is simply started again. The deadline holds for each step, not for the whole.
    ///
    /// # Errors
    /// `EBUSY` for the export itself; [`AdminErrorKind::TooLarge`] below 512 levels.
    pub async fn remove_tree(
        &self,
        path: &SharePath,
        keep_going: &(dyn Fn() -> bool + Sync),
    ) -> Result<Removal, AdminError> {
        let removed = match &self.0.way {
            _ if path.is_root() => Err(AdminErrorKind::Busy),
            Way::V3(v3) => tree::remove(v3.as_ref(), path, keep_going).await,
            Way::Mounted(mounted) => tree::remove(mounted, path, keep_going).await,
        };
        removed.map_err(self.failed("remove all of", path))
    }

    /// Puts the operation's name, the share and the path to why it failed.
    fn failed(
        &self,
        op: &'static str,
        path: &SharePath,
    ) -> impl FnOnce(AdminErrorKind) -> AdminError {
        move |kind| AdminError {
            op,
            share: self.0.share.to_string(),
            path: path.clone(),
            kind,
        }
    }
}

/// Options for a kernel mount that [`Admin::mounted`] works on: without them the client's caches
/// would answer for the server (nfs(5), "Data and metadata coherence").
pub const MOUNT_OPTIONS: &str = "actimeo=0,lookupcache=none";

/// Whether a name is that of a temporary file of [`Admin::write`], left by a crash when old.
#[must_use]
pub fn is_temporary(name: &OsStr) -> bool {
    name.as_encoded_bytes()
        .strip_prefix(TEMPORARY_PREFIX.as_bytes())
        .is_some_and(|rest| rest.len() == 16 && rest.iter().all(u8::is_ascii_hexdigit))
}

/// A name for a temporary file that nobody else uses: 64 random bits.
fn temporary_name() -> Result<String, AdminErrorKind> {
    Ok(format!("{TEMPORARY_PREFIX}{:016x}", random()?))
}

fn random() -> Result<u64, AdminErrorKind> {
    chance::bits().map_err(|error| {
        AdminErrorKind::Other(
            error
                .raw_os_error()
                .unwrap_or(rustix::io::Errno::IO.raw_os_error()),
        )
    })
}

/// Turns "no such file" into None.
fn present<T>(result: Result<T, AdminErrorKind>) -> Result<Option<T>, AdminErrorKind> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(AdminErrorKind::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}
