//! The operations on a local directory where the share is mounted.
//!
//! System calls on a dead NFS mount may never return and cannot be taken back. So each operation
//! runs on a thread of its own, a few at a time; its caller waits until the deadline and leaves
//! the thread behind. While one is overdue, further operations fail at once instead of piling up
//! behind the same dead server; when it comes back, all is well again. A mount that has become stale,
//! or that somebody took away, is never worked on: what is below it is not the share's.

mod calls;

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{self, AtFlags, Gid, Mode, OFlags, StatxFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use tokio::sync::Semaphore;
use tokio::time::timeout_at;

use self::calls::{
    PLACE, READ_DIR, attr_of, create, fill, names, open, open_dir, read, rename_error, stat,
    stat_at, unlink,
};
use super::tree::Tree;
use super::{
    AdminErrorKind, AdminSettings, Attr, DirEntry, Kind, MAX_ENTRIES, Made, Space, present,
    temporary_name,
};
use crate::address::SharePath;
use crate::connect::detached;

type Outcome<T> = Result<T, AdminErrorKind>;

#[derive(Debug)]
pub(super) struct Mounted {
    dir: Arc<PathBuf>,
    deadline: Duration,
    slots: Arc<Semaphore>,
    running: Arc<Running>,
    /// What was mounted at the beginning.
    device: Option<(u32, u32)>,
    stale: Arc<AtomicBool>,
}

/// The device number of a directory, without a word to the server.
fn device(dir: &Path) -> Option<(u32, u32)> {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let stat = fs::statx(fs::CWD, dir, flags, StatxFlags::empty()).ok()?;
    Some((stat.stx_dev_major, stat.stx_dev_minor))
}

/// When the operations that have not come back were begun.
#[derive(Debug, Default)]
struct Running(Mutex<(u64, BTreeMap<u64, Instant>)>);

impl Running {
    fn begin(&self) -> u64 {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        running.0 += 1;
        let id = running.0;
        running.1.insert(id, Instant::now());
        id
    }

    fn end(&self, id: u64) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .1
            .remove(&id);
    }

    fn any_older_than(&self, age: Duration) -> bool {
        let running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        running.1.values().any(|begun| begun.elapsed() >= age)
    }
}

impl Mounted {
    pub(super) fn new(dir: PathBuf, settings: &AdminSettings) -> Self {
        Self {
            device: device(&dir),
            stale: Arc::default(),
            dir: Arc::new(dir),
            deadline: settings.op_deadline,
            slots: Arc::new(Semaphore::new(settings.max_connections.max(1))),
            running: Arc::default(),
        }
    }

    /// The same mount, with a thread and a deadline of its own.
    pub(super) fn apart(&self, deadline: Duration) -> Self {
        Self {
            device: self.device,
            stale: Arc::clone(&self.stale),
            dir: Arc::clone(&self.dir),
            deadline,
            slots: Arc::new(Semaphore::new(1)),
            running: Arc::default(),
        }
    }

    /// Whether the share has to be mounted anew.
    pub(super) fn is_stale(&self) -> bool {
        self.stale.load(Ordering::Relaxed)
    }

    async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Path) -> Outcome<T> + Send + 'static,
    ) -> Outcome<T> {
        if self.running.any_older_than(self.deadline) {
            return Err(AdminErrorKind::Busy);
        }
        let late = || AdminErrorKind::TimedOut(self.deadline);
        let deadline = tokio::time::Instant::now() + self.deadline;
        let slot = timeout_at(deadline, Arc::clone(&self.slots).acquire_owned())
            .await
            .map_err(|_| late())?
            .map_err(|_| AdminErrorKind::Busy)?;
        let (dir, running) = (Arc::clone(&self.dir), Arc::clone(&self.running));
        let (mounted, stale) = (self.device, Arc::clone(&self.stale));
        let id = running.begin();
        let result = detached(move || {
            let result = if device(&dir) == mounted {
                work(&dir)
            } else {
                Err(AdminErrorKind::Stale)
            };
            if matches!(result, Err(AdminErrorKind::Stale)) {
                stale.store(true, Ordering::Relaxed);
            }
            running.end(id);
            drop(slot);
            result
        })
        .map_err(|error| {
            self.running.end(id);
            AdminErrorKind::from(Errno::from_io_error(&error).unwrap_or(Errno::AGAIN))
        })?;
        timeout_at(deadline, result)
            .await
            .map_err(|_| late())?
            .unwrap_or(Err(AdminErrorKind::Other(Errno::IO.raw_os_error())))
    }

    pub(super) async fn attr(&self, path: &SharePath) -> Outcome<Option<Attr>> {
        let path = path.clone();
        self.run(move |root| present(stat(root, &path))).await
    }

    pub(super) async fn mkdir(&self, path: &SharePath, mode: u32) -> Outcome<Made> {
        let path = path.clone();
        self.run(move |root| {
            if path.is_root() {
                return Ok(Made::Exists);
            }
            let dir = open_dir(root, &path.parent(), PLACE)?;
            match fs::mkdirat(&dir, path.name(), Mode::from_raw_mode(mode & 0o7777)) {
                Err(Errno::EXIST) => return Ok(Made::Exists),
                other => other?,
            }
            let attr = stat_at(&dir, path.name())?;
            let masked = mode & 0o7777 & !attr.mode;
            if masked == 0 {
                return Ok(Made::New(attr));
            }
            // This process's umask took bits away; over NFSv3 none applies.
            let made = fs::openat(
                &dir,
                path.name(),
                READ_DIR | OFlags::NOFOLLOW,
                Mode::empty(),
            )?;
            fs::fchmod(&made, Mode::from_raw_mode(attr.mode | masked))?;
            Ok(Made::New(attr_of(&fs::fstat(&made)?)))
        })
        .await
    }

    pub(super) async fn set_owner(
        &self,
        path: &SharePath,
        uid: u32,
        gid: u32,
        mode: u32,
    ) -> Outcome<Attr> {
        let path = path.clone();
        self.run(move |root| {
            match stat(root, &path)?.kind {
                Kind::Dir | Kind::File => {}
                Kind::Symlink => return Err(AdminErrorKind::Symlink),
                Kind::Other => return Err(Errno::INVAL.into()),
            }
            let object = open(
                root,
                &path,
                OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
            )?;
            let mut attr = attr_of(&fs::fstat(&object)?);
            if (attr.uid, attr.gid) != (uid, gid) {
                fs::fchown(&object, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
                attr = attr_of(&fs::fstat(&object)?);
            }
            if attr.mode != mode & 0o7777 {
                fs::fchmod(&object, Mode::from_raw_mode(mode & 0o7777))?;
                attr = attr_of(&fs::fstat(&object)?);
            }
            Ok(attr)
        })
        .await
    }

    pub(super) async fn create_new(&self, path: &SharePath, contents: &[u8]) -> Outcome<Made> {
        let (path, contents) = (path.clone(), contents.to_vec());
        self.run(move |root| {
            if path.is_root() {
                return Ok(Made::Exists);
            }
            let dir = open_dir(root, &path.parent(), READ_DIR)?;
            let mut file = match create(&dir, path.name()) {
                Err(AdminErrorKind::Exists) => return Ok(Made::Exists),
                other => other?,
            };
            let filled = fill(&mut file, &contents).and_then(|()| Ok(fs::fsync(&dir)?));
            if let Err(error) = filled {
                // It is ours, and without its contents it is of no use to anybody.
                let _ = fs::unlinkat(&dir, path.name(), AtFlags::empty());
                return Err(error);
            }
            Ok(Made::New(attr_of(&fs::fstat(&file)?)))
        })
        .await
    }

    pub(super) async fn draft(&self, path: &SharePath, contents: &[u8]) -> Outcome<()> {
        match self.create_new(path, contents).await? {
            Made::New(_) => Ok(()),
            Made::Exists => Err(AdminErrorKind::Exists),
        }
    }

    pub(super) async fn write(&self, path: &SharePath, contents: &[u8]) -> Outcome<Attr> {
        let (path, contents) = (path.clone(), contents.to_vec());
        self.run(move |root| {
            if path.is_root() {
                return Err(AdminErrorKind::Exists);
            }
            let dir = open_dir(root, &path.parent(), READ_DIR)?;
            let temporary = temporary_name()?;
            let mut file = create(&dir, &temporary)?;
            let written = fill(&mut file, &contents).and_then(|()| {
                fs::renameat(&dir, &temporary, &dir, path.name()).map_err(rename_error)
            });
            if let Err(error) = written {
                let _ = fs::unlinkat(&dir, &temporary, AtFlags::empty());
                return Err(error);
            }
            fs::fsync(&dir)?;
            Ok(attr_of(&fs::fstat(&file)?))
        })
        .await
    }

    pub(super) async fn read(&self, path: &SharePath, limit: usize) -> Outcome<Option<Vec<u8>>> {
        let path = path.clone();
        self.run(move |root| present(read(root, &path, limit)))
            .await
    }

    pub(super) async fn rename(&self, from: &SharePath, to: &SharePath) -> Outcome<()> {
        let (from, to) = (from.clone(), to.clone());
        self.run(move |root| {
            if from.is_root() || to.is_root() {
                return Err(AdminErrorKind::Busy);
            }
            let from_dir = open_dir(root, &from.parent(), READ_DIR)?;
            let to_dir = open_dir(root, &to.parent(), READ_DIR)?;
            fs::renameat(&from_dir, from.name(), &to_dir, to.name()).map_err(rename_error)?;
            fs::fsync(&to_dir)?;
            Ok(fs::fsync(&from_dir)?)
        })
        .await
    }

    pub(super) async fn rename_within(
        &self,
        dir: &SharePath,
        from: &str,
        to: &str,
    ) -> Outcome<Attr> {
        let (dir, from, to) = (dir.clone(), from.to_owned(), to.to_owned());
        self.run(move |root| {
            let dir = open_dir(root, &dir, READ_DIR)?;
            fs::renameat(&dir, from, &dir, to).map_err(rename_error)?;
            fs::fsync(&dir)?;
            Ok(attr_of(&fs::fstat(&dir)?))
        })
        .await
    }

    pub(super) async fn remove_file(&self, path: &SharePath) -> Outcome<bool> {
        self.remove(path, AtFlags::empty()).await
    }

    pub(super) async fn unlink_file(&self, path: &SharePath) -> Outcome<bool> {
        self.remove_file(path).await
    }

    pub(super) async fn remove_dir(&self, path: &SharePath) -> Outcome<bool> {
        self.remove(path, AtFlags::REMOVEDIR).await
    }

    async fn remove(&self, path: &SharePath, flags: AtFlags) -> Outcome<bool> {
        let path = path.clone();
        self.run(move |root| {
            if path.is_root() {
                return Err(AdminErrorKind::Busy);
            }
            let removed = present(open_dir(root, &path.parent(), READ_DIR).and_then(|dir| {
                unlink(&dir, path.name(), flags)?;
                Ok(fs::fsync(&dir)?)
            }))?;
            Ok(removed.is_some())
        })
        .await
    }

    pub(super) async fn list(&self, path: &SharePath) -> Outcome<Option<Vec<DirEntry>>> {
        let path = path.clone();
        self.run(move |root| {
            present(open_dir(root, &path, READ_DIR).and_then(|dir| {
                let mut entries = Vec::new();
                for name in names(&dir)? {
                    if entries.len() == MAX_ENTRIES {
                        return Err(AdminErrorKind::TooLarge(MAX_ENTRIES));
                    }
                    let name = name?;
                    let attr = present(stat_at(&dir, &name))?;
                    entries.push(DirEntry { name, attr });
                }
                Ok(entries)
            }))
        })
        .await
    }

    pub(super) async fn touch(&self, path: &SharePath) -> Outcome<Attr> {
        let path = path.clone();
        self.run(move |root| {
            let now = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
            // UTIME_NOW goes over the wire as "the server's time" (nfs_setattr, RFC 1813 3.3.2).
            let times = Timestamps {
                last_access: now(fs::UTIME_OMIT),
                last_modification: now(fs::UTIME_NOW),
            };
            if path.is_root() {
                let dir = open_dir(root, &path, READ_DIR)?;
                fs::futimens(&dir, &times)?;
                return Ok(attr_of(&fs::fstat(&dir)?));
            }
            let dir = open_dir(root, &path.parent(), PLACE)?;
            fs::utimensat(&dir, path.name(), &times, AtFlags::SYMLINK_NOFOLLOW)?;
            stat_at(&dir, path.name())
        })
        .await
    }

    pub(super) async fn space(&self) -> Outcome<Space> {
        self.run(|root| {
            let stat = fs::fstatvfs(open_dir(root, &SharePath::root(), PLACE)?)?;
            let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
            Ok(Space {
                total: bytes(stat.f_blocks),
                free: bytes(stat.f_bfree),
                available: bytes(stat.f_bavail),
            })
        })
        .await
    }
}

impl Tree for Mounted {
    type Dir = Arc<OwnedFd>;

    async fn parent(&self, path: &SharePath) -> Outcome<Option<Self::Dir>> {
        let parent = path.parent();
        self.run(move |root| Ok(present(open_dir(root, &parent, READ_DIR))?.map(Arc::new)))
            .await
    }

    async fn enter(&self, dir: &Self::Dir, name: &OsStr) -> Outcome<Option<Self::Dir>> {
        let (dir, name) = (Arc::clone(dir), name.to_owned());
        self.run(move |_| {
            match fs::openat(&dir, &name, READ_DIR | OFlags::NOFOLLOW, Mode::empty()) {
                Ok(below) => Ok(Some(Arc::new(below))),
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }

    async fn page(&self, dir: &Self::Dir, limit: usize) -> Outcome<Vec<(OsString, Kind)>> {
        let dir = Arc::clone(dir);
        self.run(move |_| {
            let mut page = Vec::new();
            for name in names(&dir)?.take(limit) {
                let name = name?;
                if let Some(attr) = present(stat_at(&dir, &name))? {
                    page.push((name, attr.kind));
                }
            }
            Ok(page)
        })
        .await
    }

    async fn unlink(&self, dir: &Self::Dir, name: &OsStr) -> Outcome<bool> {
        let (dir, name) = (Arc::clone(dir), name.to_owned());
        self.run(move |_| Ok(present(unlink(&dir, &name, AtFlags::empty()))?.is_some()))
            .await
    }

    async fn rmdir(&self, dir: &Self::Dir, name: &OsStr) -> Outcome<bool> {
        let (dir, name) = (Arc::clone(dir), name.to_owned());
        self.run(move |_| Ok(present(unlink(&dir, &name, AtFlags::REMOVEDIR))?.is_some()))
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::admin::{Admin, scenarios};

    fn share(dir: &tempfile::TempDir) -> Admin {
        let dir = dir.path().to_owned();
        Admin::mounted(
            "nas:/export".parse().unwrap(),
            dir,
            AdminSettings::default(),
        )
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_mounted_share_does_what_every_share_does() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("links")).unwrap();
        symlink("/etc", dir.path().join("links/out")).unwrap();
        scenarios::all(&share(&dir)).await;
    }

    #[tokio::test]
    async fn names_that_no_share_path_can_hold_are_removed_with_their_tree() {
        let dir = tempfile::tempdir().unwrap();
        let mut deep = dir.path().join("data");
        for _ in 0..12 {
            deep.push("n".repeat(200));
        }
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::write(deep.join(OsStr::from_bytes(b"\xff\n")), b"x").unwrap();
        symlink(dir.path(), deep.join("loop")).unwrap();
        std::fs::write(dir.path().join("kept"), b"x").unwrap();
        let data = SharePath::parse("data").unwrap();
        let removal = share(&dir).remove_tree(&data, &|| true).await.unwrap();
        assert_eq!((removal.removed, removal.finished), (15, true));
        assert!(!dir.path().join("data").exists());
        assert!(dir.path().join("kept").exists());
    }

    #[tokio::test]
    async fn a_stuck_share_costs_one_deadline_then_fails_at_once_until_it_is_back() {
        let dir = tempfile::tempdir().unwrap();
        let settings = AdminSettings {
            op_deadline: Duration::from_millis(50),
            ..AdminSettings::default()
        };
        let mounted = Mounted::new(dir.path().to_owned(), &settings);
        let (release, stuck) = std::sync::mpsc::channel::<()>();
        let error = mounted
            .run(move |_| {
                let _ = stuck.recv();
                Ok(())
            })
            .await
            .unwrap_err();
        assert_eq!(error, AdminErrorKind::TimedOut(Duration::from_millis(50)));
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(
            mounted.attr(&SharePath::root()).await,
            Err(AdminErrorKind::Busy)
        );
        drop(release);
        for _ in 0..200 {
            if !mounted.running.any_older_than(Duration::ZERO) {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(mounted.attr(&SharePath::root()).await.unwrap().is_some());
    }
}
