//! From a mounted share to a volume's own mount of its data directory.
//!
//! The directory is opened one component at a time below the share, never through a symbolic
//! link and never into another file system, so no content of a share can lead a container
//! elsewhere. Before each component the directory above it is revalidated with the server: the
//! kernel trusts a cached name for up to a minute, and a volume that was removed and made again
//! on another host must not be bound to the directory that went to the trash.
//!
//! Limit: a data directory inside a file system that is nested in the export (a server's
//! `crossmnt`, a ZFS data set) is refused; such a file system is to be named as the share.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat, openat2, statat,
    statx,
};
use rustix::io::Errno;
use rustix::mount::{
    MountAttrFlags, MountFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount_bind,
    mount_remount, move_mount, open_tree, unmount,
};

use super::lane::Ticket;
use super::sys::mount_setattr;
use crate::sys::mountinfo::{DeviceId, MountEntry};
use nfs::address::SharePath;

/// More mounts on top of each other at one place than any accident makes.
const MAX_STACKED: usize = 16;

/// How often, and after what pause, a call that failed with EIO is repeated: together longer than
/// a session takes to come back.
pub(super) const SETTLE_TRIES: usize = 6;
pub(super) const SETTLE_PAUSE: Duration = Duration::from_millis(300);

/// A reference to a directory: no permission but to search is needed for it.
const PATH: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Why a directory could not be opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum WalkError {
    Symlink(SharePath),
    Nested(SharePath),
    Missing(SharePath),
    NotADirectory(SharePath),
    /// The share itself is stale.
    Stale,
    Other(SharePath, Errno),
}

/// Opens the root of a mount, and makes sure that it is this mount: between a look into
/// mountinfo and the open, the mount may have gone.
pub(super) fn open_root(entry: &MountEntry) -> Result<OwnedFd, Errno> {
    let root = openat(
        CWD,
        &entry.mountpoint,
        PATH | OFlags::NOFOLLOW,
        Mode::empty(),
    )?;
    let stat = statx(
        &root,
        "",
        AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC,
        StatxFlags::INO,
    )?;
    if device(&stat) == entry.device {
        Ok(root)
    } else {
        Err(Errno::NODEV)
    }
}

/// Asks the server for a directory's attributes, whatever the kernel has cached.
pub(super) fn revalidate(directory: impl AsFd) -> Result<Statx, Errno> {
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_FORCE_SYNC;
    statx(directory, "", flags, StatxFlags::BASIC_STATS)
}

fn device(stat: &Statx) -> DeviceId {
    DeviceId {
        major: stat.stx_dev_major,
        minor: stat.stx_dev_minor,
    }
}

/// Repeats a call that failed with EIO for a while: NFSv4 answers so while it gets a lost session
/// or lease back, after the server or the network was away.
fn settled<T>(deadline: Instant, mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    for _ in 0..SETTLE_TRIES {
        match call() {
            Err(Errno::IO) if Instant::now() + SETTLE_PAUSE < deadline => {
                std::thread::sleep(SETTLE_PAUSE);
            }
            result => return result,
        }
    }
    call()
}

/// Opens a data directory below a share's root.
pub(super) fn open_below(
    root: OwnedFd,
    path: &SharePath,
    deadline: Instant,
) -> Result<OwnedFd, WalkError> {
    let mut at = SharePath::root();
    let mut directory = root;
    let failed = |at: &SharePath, errno| match errno {
        Errno::STALE => WalkError::Stale,
        errno => WalkError::Other(at.clone(), errno),
    };
    settled(deadline, || revalidate(&directory)).map_err(|errno| failed(&at, errno))?;
    for (depth, component) in path.components().enumerate() {
        if depth > 0 {
            revalidate(&directory).map_err(|errno| failed(&at, errno))?;
        }
        at = at.join(component);
        directory = open_component(&directory, component).map_err(|errno| match errno {
            Errno::LOOP => WalkError::Symlink(at.clone()),
            Errno::XDEV => WalkError::Nested(at.clone()),
            Errno::NOENT => WalkError::Missing(path.clone()),
            Errno::NOTDIR => WalkError::NotADirectory(at.clone()),
            errno => failed(&at, errno),
        })?;
    }
    Ok(directory)
}

fn open_component(directory: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    match openat2(directory, name, PATH, Mode::empty(), resolve) {
        // Linux before 5.6, or a sandbox. One plain component that is not followed if it is a
        // link stays below as well; only the crossing of file systems must be seen here.
        Err(Errno::NOSYS | Errno::PERM) => open_component_by_openat(directory, name),
        result => result,
    }
}

fn open_component_by_openat(directory: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    let is_link = || {
        statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Symlink)
    };
    let opened =
        openat(directory, name, PATH | OFlags::NOFOLLOW, Mode::empty()).map_err(|errno| {
            if errno == Errno::NOTDIR && is_link() {
                Errno::LOOP
            } else {
                errno
            }
        })?;
    let dev = |fd: &OwnedFd| {
        statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::INO).map(|stat| device(&stat))
    };
    if dev(&opened)? == dev(directory)? {
        Ok(opened)
    } else {
        Err(Errno::XDEV)
    }
}

/// Whether an existing mount shows this directory with these attributes.
pub(super) fn shows(entry: &MountEntry, directory: &OwnedFd, attributes: MountAttrFlags) -> bool {
    let has = |name, flag| entry.has_option(name) == attributes.contains(flag);
    let same_attributes = has("ro", MountAttrFlags::MOUNT_ATTR_RDONLY)
        && has("nosuid", MountAttrFlags::MOUNT_ATTR_NOSUID)
        && has("nodev", MountAttrFlags::MOUNT_ATTR_NODEV)
        && has("noexec", MountAttrFlags::MOUNT_ATTR_NOEXEC);
    let identity = |stat: Statx| (device(&stat), stat.stx_ino);
    // A number can be that of a directory which has been removed since, and is stale then.
    let same_directory = || {
        let old = revalidate(open_root(entry)?)?;
        Ok::<_, Errno>(identity(old) == identity(revalidate(directory)?))
    };
    same_attributes && same_directory().unwrap_or(false)
}

/// Mounts an opened directory at a volume's mount point, which is made if need be.
///
/// # Errors
/// [`Errno::CANCELED`] when the caller no longer waits, and nothing is mounted then.
pub(super) fn place(
    directory: &OwnedFd,
    target: &Path,
    attributes: MountAttrFlags,
    ticket: &Ticket,
) -> Result<(), Errno> {
    match clone(directory, attributes) {
        Ok(mount) => {
            ticket.commit()?;
            make_directory(target)?;
            fail::fail_point!("mount.place", |_| crate::failpoint::die());
            move_mount(
                &mount,
                "",
                CWD,
                target,
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
            )
        }
        Err(Errno::NOSYS | Errno::PERM) => {
            ticket.commit()?;
            make_directory(target)?;
            place_by_mount2(directory, target, attributes)
        }
        Err(errno) => Err(errno),
    }
}

/// A detached mount of the directory, with its own attributes already set. It is in no peer group
/// with the share's mount, so that what is mounted in one volume shows nowhere else.
fn clone(directory: &OwnedFd, attributes: MountAttrFlags) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    let mount = open_tree(directory, "", flags)?;
    // The clone has the attributes of the share's mount: every one of them is decided anew.
    let all = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC
        | MountAttrFlags::MOUNT_ATTR_NODIRATIME;
    let clear = all.difference(attributes) | MountAttrFlags::MOUNT_ATTR__ATIME;
    mount_setattr(mount.as_fd(), attributes, clear)?;
    Ok(mount)
}

/// The same by mount(2), before Linux 5.12: for a moment the bind has the share's attributes,
/// but nobody has been told of it yet.
fn place_by_mount2(
    directory: &OwnedFd,
    target: &Path,
    attributes: MountAttrFlags,
) -> Result<(), Errno> {
    mount_bind(format!("/proc/self/fd/{}", directory.as_raw_fd()), target)?;
    let mut flags = MountFlags::BIND;
    for (attribute, flag) in [
        (MountAttrFlags::MOUNT_ATTR_RDONLY, MountFlags::RDONLY),
        (MountAttrFlags::MOUNT_ATTR_NOSUID, MountFlags::NOSUID),
        (MountAttrFlags::MOUNT_ATTR_NODEV, MountFlags::NODEV),
        (MountAttrFlags::MOUNT_ATTR_NOEXEC, MountFlags::NOEXEC),
        (MountAttrFlags::MOUNT_ATTR_NOATIME, MountFlags::NOATIME),
        (
            MountAttrFlags::MOUNT_ATTR_NODIRATIME,
            MountFlags::NODIRATIME,
        ),
    ] {
        if attributes.contains(attribute) {
            flags |= flag;
        }
    }
    mount_remount(target, flags, c"").inspect_err(|_| {
        let _ = unmount(target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
    })
}

pub(super) fn make_directory(path: &Path) -> Result<(), Errno> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        // Does not look into a mount that may be there.
        Err(Errno::EXIST) => Ok(()),
        result => result,
    }
}

/// Takes away all that is mounted at a place; a place where nothing is mounted is fine.
///
/// # Errors
/// What umount2(2) answered, [`Errno::BUSY`] among them when `lazily` is not given.
pub(super) fn take_away(target: &Path, lazily: bool) -> Result<(), Errno> {
    let flags = if lazily {
        UnmountFlags::DETACH | UnmountFlags::NOFOLLOW
    } else {
        UnmountFlags::NOFOLLOW
    };
    for _ in 0..MAX_STACKED {
        match unmount(target, flags) {
            Ok(()) => {}
            // EINVAL: not a mount point.
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn walk(root: &Path, path: &str) -> Result<OwnedFd, WalkError> {
        let root = openat(CWD, root, PATH, Mode::empty()).unwrap();
        open_below(root, &SharePath::parse(path).unwrap(), Instant::now())
    }

    #[test]
    fn a_directory_is_opened_and_a_link_to_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        std::fs::write(dir.path().join("a/file"), "").unwrap();
        symlink("b", dir.path().join("a/last")).unwrap();
        symlink("/etc", dir.path().join("first")).unwrap();
        let path = |text: &str| SharePath::parse(text).unwrap();

        let opened = walk(dir.path(), "a/b").unwrap();
        let (here, there) = (
            rustix::fs::fstat(&opened).unwrap(),
            rustix::fs::stat(dir.path().join("a/b")).unwrap(),
        );
        assert_eq!((here.st_dev, here.st_ino), (there.st_dev, there.st_ino));
        assert_eq!(
            walk(dir.path(), "a/last").unwrap_err(),
            WalkError::Symlink(path("a/last"))
        );
        assert_eq!(
            walk(dir.path(), "first/ssl").unwrap_err(),
            WalkError::Symlink(path("first"))
        );
        assert_eq!(
            walk(dir.path(), "a/no/x").unwrap_err(),
            WalkError::Missing(path("a/no/x"))
        );
        assert_eq!(
            walk(dir.path(), "a/file").unwrap_err(),
            WalkError::NotADirectory(path("a/file"))
        );
    }

    #[test]
    fn another_file_system_is_not_entered() {
        let nested = WalkError::Nested(SharePath::parse("proc").unwrap());
        assert_eq!(walk(Path::new("/"), "proc").unwrap_err(), nested);
        let root = openat(CWD, "/", PATH, Mode::empty()).unwrap();
        assert_eq!(
            open_component_by_openat(&root, "proc").unwrap_err(),
            Errno::XDEV
        );
    }

    #[test]
    fn older_kernels_refuse_links_as_well() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("b")).unwrap();
        symlink("b", dir.path().join("link")).unwrap();
        let root = openat(CWD, dir.path(), PATH, Mode::empty()).unwrap();
        assert!(open_component_by_openat(&root, "b").is_ok());
        assert_eq!(
            open_component_by_openat(&root, "link").unwrap_err(),
            Errno::LOOP
        );
    }
}
