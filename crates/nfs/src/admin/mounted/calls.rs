//! The system calls, each below a directory that the caller holds and never through a link.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{self, AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use super::Outcome;
use crate::address::SharePath;
use crate::admin::{AdminErrorKind, Attr, FILE_MODE, Kind, ServerTime};

/// How directories are opened to work in them: as a place only, which needs no permission to
/// read them and costs an NFSv4 server no state.
pub(super) const PLACE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
pub(super) const READ_DIR: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::CLOEXEC);
/// Never leave the share, never follow a link on it.
const WITHIN: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS);

pub(super) fn open_dir(root: &Path, path: &SharePath, flags: OFlags) -> Outcome<OwnedFd> {
    if path.is_root() {
        return Ok(fs::open(root, flags, Mode::empty())?);
    }
    open(root, path, flags)
}

pub(super) fn open(root: &Path, path: &SharePath, flags: OFlags) -> Outcome<OwnedFd> {
    if path.is_root() {
        return Ok(fs::open(root, flags, Mode::empty())?);
    }
    let root = fs::open(root, PLACE, Mode::empty())?;
    Ok(fs::openat2(
        &root,
        path.as_str(),
        flags,
        Mode::empty(),
        WITHIN,
    )?)
}

pub(super) fn stat(root: &Path, path: &SharePath) -> Outcome<Attr> {
    if path.is_root() {
        return Ok(attr_of(&fs::fstat(open_dir(root, path, PLACE)?)?));
    }
    stat_at(&open_dir(root, &path.parent(), PLACE)?, path.name())
}

pub(super) fn stat_at(dir: &OwnedFd, name: impl AsRef<OsStr>) -> Outcome<Attr> {
    let stat = fs::statat(dir, name.as_ref(), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(attr_of(&stat))
}

pub(super) fn create(dir: &OwnedFd, name: &str) -> Outcome<File> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(FILE_MODE);
    let file = fs::openat(dir, name, flags, mode)?;
    fs::fchmod(&file, mode)?;
    Ok(file.into())
}

pub(super) fn fill(file: &mut File, contents: &[u8]) -> Outcome<()> {
    file.write_all(contents)
        .and_then(|()| file.sync_all())
        .map_err(io_error)
}

pub(super) fn read(root: &Path, path: &SharePath, limit: usize) -> Outcome<Vec<u8>> {
    match stat(root, path)?.kind {
        Kind::File => {}
        Kind::Symlink => return Err(AdminErrorKind::Symlink),
        Kind::Dir => return Err(Errno::ISDIR.into()),
        Kind::Other => return Err(Errno::INVAL.into()),
    }
    let file = open(
        root,
        path,
        OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC,
    )?;
    let mut contents = Vec::new();
    let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
    File::from(file)
        .take(most)
        .read_to_end(&mut contents)
        .map_err(io_error)?;
    if contents.len() > limit {
        return Err(AdminErrorKind::TooLarge(limit));
    }
    Ok(contents)
}

pub(super) fn unlink(dir: &OwnedFd, name: impl AsRef<OsStr>, flags: AtFlags) -> Outcome<()> {
    Ok(fs::unlinkat(dir, name.as_ref(), flags)?)
}

/// Both directories were opened before, so these errors speak of the target alone.
pub(super) fn rename_error(errno: Errno) -> AdminErrorKind {
    match errno {
        Errno::EXIST | Errno::NOTEMPTY | Errno::ISDIR | Errno::NOTDIR => AdminErrorKind::Exists,
        other => other.into(),
    }
}

pub(super) fn io_error(error: io::Error) -> AdminErrorKind {
    Errno::from_io_error(&error).unwrap_or(Errno::IO).into()
}

pub(super) fn names(dir: &OwnedFd) -> Outcome<impl Iterator<Item = Outcome<OsString>>> {
    let entries = Dir::read_from(dir)?;
    Ok(entries.filter_map(|entry| match entry {
        Ok(entry) => {
            let name = entry.file_name().to_bytes();
            (name != b"." && name != b"..").then(|| Ok(OsStr::from_bytes(name).to_owned()))
        }
        Err(error) => Some(Err(error.into())),
    }))
}

pub(super) fn attr_of(stat: &Stat) -> Attr {
    let time = |secs: i64, nanos: u64| ServerTime {
        secs: u64::try_from(secs).unwrap_or(0),
        nanos: u32::try_from(nanos).unwrap_or(0),
    };
    Attr {
        kind: match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Dir,
            FileType::RegularFile => Kind::File,
            FileType::Symlink => Kind::Symlink,
            _ => Kind::Other,
        },
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        fileid: stat.st_ino,
        nlink: u32::try_from(stat.st_nlink).unwrap_or(u32::MAX),
        mtime: time(stat.st_mtime, stat.st_mtime_nsec),
        ctime: time(stat.st_ctime, stat.st_ctime_nsec),
    }
}
