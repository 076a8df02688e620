//! Copying a tree with all that it says of itself: owners, modes, times, links, extended
//! attributes, holes.
//!
//! Invariants:
//! - A file has its name in the copy only once it is complete and on the server, so a copy that
//!   was interrupted goes on where it ended: what has the name, size, time, owner and mode of the
//!   source is complete.
//! - The source is only read.
//!
//! Limits: sockets are left out, as they live no longer than their program; access times are
//! copied, but reading for the comparison changes them on the source.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fd::AsFd;
use rustix::fs::{
    self, Advice, AtFlags, FileType, Gid, Mode, OFlags, SeekFrom, Stat, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;

use super::tree::{
    CopyError, Place, kind, mode, names, open_dir, open_root, size, stat, stat_if_there,
};

/// One read and one write; large enough that a server's round trip does not matter.
pub(super) const BLOCK: usize = 1 << 20;
/// A file that is not complete yet.
pub(super) const PART: &CStr = c".nfsvol-migrate.part";
/// What says of a volume that a copy into it has begun, and of what.
pub(super) const MARKER: &CStr = c".nfsvol-migrate.json";
/// The kernel's limit for a list of names and for a value (XATTR_LIST_MAX, XATTR_SIZE_MAX).
const XATTR_MAX: usize = 64 << 10;
/// Belongs to the host, which labels files by its own policy.
const HOST_LABEL: &[u8] = b"security.selinux";

/// What was copied.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Files and other entries that were copied now.
    pub(crate) entries: u64,
    /// Those that an earlier run had copied.
    pub(crate) found: u64,
    /// Sockets, which are left out.
    pub(crate) sockets: u64,
    /// Extended attributes that the share does not take, and one of them.
    pub(crate) xattrs_left: u64,
    pub(crate) xattr_left: Option<String>,
    /// Hard links that the share does not make, so that each name got a file of its own.
    pub(crate) links_left: u64,
}

/// A copy under way.
pub(crate) struct Copier<'a> {
    /// Told how many bytes are done.
    pub(crate) progress: &'a (dyn Fn(u64) + Sync),
    pub(crate) stop: &'a AtomicBool,
}

struct Walk<'a> {
    copier: &'a Copier<'a>,
    /// The source's file system.
    device: u64,
    root: OwnedFd,
    /// Files with several names: the first of them in the copy.
    links: HashMap<u64, PathBuf>,
    done: Copied,
    block: Vec<u8>,
}

impl Copier<'_> {
    /// Says in the directory `to`, which is empty, that a copy of `source` into it has begun; or
    /// finds that said.
    ///
    /// # Errors
    /// [`CopyError::NotEmpty`] and [`CopyError::Another`] where the directory is somebody else's.
    pub(crate) fn begin(&self, to: &Path, source: &str) -> Result<(), CopyError> {
        let (to, place) = (open_root(to)?, Place::default());
        if stat_if_there(&to, MARKER)
            .map_err(place.failed("cannot look at"))?
            .is_some()
        {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let marker = fs::openat(&to, MARKER, flags, Mode::empty())
                .map_err(place.failed("cannot open"))?;
            let begun = std::io::read_to_string(std::fs::File::from(marker)).unwrap_or_default();
            return match begun == marked(source) {
                true => Ok(()),
                false => Err(CopyError::Another { begun }),
            };
        }
        if let Some(name) = names(&to).map_err(place.failed("cannot list"))?.first() {
            let path = place.join(name).show();
            return Err(CopyError::NotEmpty { path });
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let marker = fs::openat(&to, PART, flags, Mode::RUSR | Mode::WUSR)
            .map_err(place.failed("cannot make a file in"))?;
        write_all(&marker, marked(source).as_bytes(), 0)
            .map_err(place.failed("cannot write to"))?;
        fs::fsync(&marker).map_err(place.failed("cannot bring to the server"))?;
        fs::renameat(&to, PART, &to, MARKER).map_err(place.failed("cannot make a file in"))
    }

    /// Takes away what [`Self::begin`] made: the copy is complete.
    ///
    /// # Errors
    /// What the share answered.
    pub(crate) fn finish(&self, from: &Path, to: &Path) -> Result<(), CopyError> {
        let (from, to, place) = (open_root(from)?, open_root(to)?, Place::default());
        remove(&to, MARKER).map_err(place.failed("cannot clean up in"))?;
        let source = fs::fstat(&from).map_err(place.failed("cannot look at"))?;
        fs::futimens(&to, &times(&source)).map_err(place.failed("cannot set the times of"))
    }

    /// Copies what is in the directory `from` into `to`, and what `from` itself says to `to`.
    ///
    /// # Errors
    /// [`CopyError`] for the first entry that cannot be copied; the same call goes on from there.
    pub(crate) fn copy(&self, from: &Path, to: &Path) -> Result<Copied, CopyError> {
        let (from, root) = (open_root(from)?, open_root(to)?);
        let place = Place::default();
        let source = fs::fstat(&from).map_err(place.failed("cannot look at"))?;
        let mut walk = Walk {
            copier: self,
            device: source.st_dev,
            root: open_root(to)?,
            links: HashMap::new(),
            done: Copied::default(),
            block: vec![0; BLOCK],
        };
        walk.directory(&from, &root, &place)?;
        walk.describe(&from, &root, &source, &place)?;
        Ok(walk.done)
    }
}

impl Walk<'_> {
    fn directory(&mut self, from: &OwnedFd, to: &OwnedFd, at: &Place) -> Result<(), CopyError> {
        for name in names(from).map_err(at.failed("cannot list"))? {
            let place = at.join(&name);
            self.running()?;
            if *name == *PART || *name == *MARKER {
                let path = place.show();
                return Err(CopyError::OwnName { path });
            }
            let source = stat(from, &name).map_err(place.failed("cannot look at"))?;
            let there =
                stat_if_there(to, &name).map_err(place.failed("cannot look at the copy of"))?;
            match kind(&source) {
                FileType::Directory => self.below(from, to, &name, &source, &place)?,
                FileType::Socket => self.done.sockets += 1,
                FileType::RegularFile => {
                    self.file(from, to, &name, (&source, there.as_ref()), &place)?;
                }
                FileType::Symlink => {
                    self.symlink(from, to, &name, (&source, there.as_ref()), &place)?
                }
                _ => self.special(to, &name, (&source, there.as_ref()), &place)?,
            }
        }
        // Left by a run that was interrupted in the middle of a file that has gone since.
        remove(to, PART).map_err(at.failed("cannot clean up in the copy of"))
    }

    fn running(&self) -> Result<(), CopyError> {
        match self.copier.stop.load(Ordering::Relaxed) {
            true => Err(CopyError::Interrupted),
            false => Ok(()),
        }
    }

    fn below(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        source: &Stat,
        place: &Place,
    ) -> Result<(), CopyError> {
        if source.st_dev != self.device {
            let path = place.show();
            return Err(CopyError::OtherFileSystem { path });
        }
        match fs::mkdirat(to, name, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(place.failed("cannot make the directory")(errno)),
        }
        let from = open_dir(from, name).map_err(place.failed("cannot open"))?;
        let to = open_dir(to, name).map_err(place.failed("cannot open the copy of"))?;
        self.directory(&from, &to, place)?;
        self.describe(&from, &to, source, place)
    }

    /// Gives an open copy its owner, mode, attributes and, last, its times.
    fn describe(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        source: &Stat,
        place: &Place,
    ) -> Result<(), CopyError> {
        fs::fchown(
            to,
            Some(Uid::from_raw(source.st_uid)),
            Some(Gid::from_raw(source.st_gid)),
        )
        .map_err(|errno| owner_refused(errno, source, place))?;
        // After the owner, whose change takes set-user-ID away.
        fs::fchmod(to, mode(source)).map_err(place.failed("cannot set the mode of the copy of"))?;
        self.xattrs(from, to, place)?;
        fs::fsync(to).map_err(place.failed("cannot bring to the server"))?;
        fs::futimens(to, &times(source))
            .map_err(place.failed("cannot set the times of the copy of"))
    }

    fn xattrs(&mut self, from: &OwnedFd, to: &OwnedFd, place: &Place) -> Result<(), CopyError> {
        let mut list = vec![0; XATTR_MAX];
        let length = match fs::flistxattr(from, &mut list) {
            Ok(length) => length,
            Err(Errno::OPNOTSUPP) => return Ok(()),
            Err(errno) => return Err(place.failed("cannot list the attributes of")(errno)),
        };
        for name in list[..length].split(|byte| *byte == 0) {
            if name.is_empty() || name == HOST_LABEL {
                continue;
            }
            let mut value = vec![0; XATTR_MAX];
            let length = fs::fgetxattr(from, name, &mut value)
                .map_err(place.failed("cannot read an attribute of"))?;
            match fs::fsetxattr(to, name, &value[..length], XattrFlags::empty()) {
                Ok(()) => {}
                Err(Errno::OPNOTSUPP | Errno::PERM | Errno::ACCESS | Errno::INVAL) => {
                    let name = String::from_utf8_lossy(name).into_owned();
                    self.done.xattrs_left += 1;
                    self.done.xattr_left.get_or_insert(name);
                }
                Err(errno) => {
                    return Err(place.failed("cannot set an attribute of the copy of")(
                        errno,
                    ));
                }
            }
        }
        Ok(())
    }

    fn file(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        (source, there): (&Stat, Option<&Stat>),
        place: &Place,
    ) -> Result<(), CopyError> {
        let first = match source.st_nlink {
            1 => None,
            _ => self.links.get(&source.st_ino).cloned(),
        };
        if let Some(first) = first
            && self.link(&first, to, name, place)?
        {
            (self.copier.progress)(size(source));
            return Ok(());
        }
        match there {
            Some(there) if is_complete(source, there) => {
                self.done.found += 1;
                (self.copier.progress)(size(source));
            }
            _ => {
                self.contents(from, to, name, source, place)?;
                self.done.entries += 1;
            }
        }
        if source.st_nlink > 1 {
            self.links.insert(source.st_ino, place.path().to_owned());
        }
        Ok(())
    }

    /// Makes `name` another name of `first`; whether it is one now.
    fn link(
        &mut self,
        first: &Path,
        to: &OwnedFd,
        name: &CStr,
        place: &Place,
    ) -> Result<bool, CopyError> {
        let of = fs::statat(&self.root, first, AtFlags::SYMLINK_NOFOLLOW);
        let of = of.map_err(place.failed("cannot look at the first name of"))?;
        let there = stat_if_there(to, name).map_err(place.failed("cannot look at the copy of"))?;
        if there.is_some_and(|there| there.st_ino == of.st_ino) {
            self.done.found += 1;
            return Ok(true);
        }
        // Beside it first: a share that makes no links keeps what is there.
        remove(to, PART).map_err(place.failed("cannot clean up beside the copy of"))?;
        match fs::linkat(&self.root, first, to, PART, AtFlags::empty()) {
            Ok(()) => {
                fs::renameat(to, PART, to, name)
                    .map_err(place.failed("cannot name the copy of"))?;
                self.done.entries += 1;
                Ok(true)
            }
            Err(Errno::OPNOTSUPP | Errno::PERM | Errno::MLINK) => {
                self.done.links_left += 1;
                Ok(false)
            }
            Err(errno) => Err(place.failed("cannot link")(errno)),
        }
    }

    fn contents(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        source: &Stat,
        place: &Place,
    ) -> Result<(), CopyError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            fs::openat(from, name, flags, Mode::empty()).map_err(place.failed("cannot open"))?;
        remove(to, PART).map_err(place.failed("cannot clean up beside the copy of"))?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let copy = fs::openat(to, PART, flags, Mode::RUSR | Mode::WUSR)
            .map_err(place.failed("cannot make the copy of"))?;
        let length = size(source);
        let mut done = 0;
        while let Some((begin, end)) =
            data_from(&file, done).map_err(place.failed("cannot read"))?
        {
            (self.copier.progress)(begin - done);
            done = begin;
            while done < end {
                self.running()?;
                let wanted = usize::try_from(end - done).unwrap_or(BLOCK).min(BLOCK);
                let block = &mut self.block[..wanted];
                let read = rustix::io::pread(&file, &mut *block, done);
                let read = read.map_err(place.failed("cannot read"))?;
                if read == 0 {
                    return Err(place.differs("it became shorter meanwhile"));
                }
                write_all(&copy, &block[..read], done).map_err(place.failed("cannot write"))?;
                done += read as u64;
                (self.copier.progress)(read as u64);
            }
        }
        (self.copier.progress)(length.saturating_sub(done));
        fs::ftruncate(&copy, length)
            .map_err(place.failed("cannot set the length of the copy of"))?;
        self.describe(&file, &copy, source, place)?;
        // So that the comparison reads what the server has.
        let _ = fs::fadvise(&copy, 0, None, Advice::DontNeed);
        drop(copy);
        fs::renameat(to, PART, to, name).map_err(place.failed("cannot name the copy of"))
    }

    fn symlink(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        (source, there): (&Stat, Option<&Stat>),
        place: &Place,
    ) -> Result<(), CopyError> {
        let read = |at| fs::readlinkat(at, name, Vec::new());
        let target = read(from).map_err(place.failed("cannot read the link"))?;
        let same = there.is_some_and(|there| kind(there) == FileType::Symlink)
            && read(to).is_ok_and(|there| there == target);
        if same {
            self.done.found += 1;
        } else {
            remove(to, name).map_err(place.failed("cannot replace the copy of"))?;
            fs::symlinkat(&*target, to, name).map_err(place.failed("cannot make the link"))?;
            self.done.entries += 1;
        }
        describe_by_name(to, name, source, place)
    }

    /// A pipe or a device.
    fn special(
        &mut self,
        to: &OwnedFd,
        name: &CStr,
        (source, there): (&Stat, Option<&Stat>),
        place: &Place,
    ) -> Result<(), CopyError> {
        let same = |there: &Stat| kind(there) == kind(source) && there.st_rdev == source.st_rdev;
        if there.is_some_and(same) {
            self.done.found += 1;
        } else {
            remove(to, name).map_err(place.failed("cannot replace the copy of"))?;
            fs::mknodat(to, name, kind(source), mode(source), source.st_rdev)
                .map_err(place.failed("cannot make the pipe or device"))?;
            self.done.entries += 1;
        }
        describe_by_name(to, name, source, place)?;
        fs::chmodat(to, name, mode(source), AtFlags::empty())
            .map_err(place.failed("cannot set the mode of the copy of"))?;
        set_times(to, name, source, place)
    }
}

/// What the marker of a copy holds.
fn marked(source: &str) -> String {
    format!(
        "{:#}\n",
        serde_json::json!({ "nfsvol_migrate": "not finished", "copy_of": source })
    )
}

/// Whether a copy by an earlier run is complete: it got its name, and then its time, last.
fn is_complete(source: &Stat, there: &Stat) -> bool {
    kind(there) == FileType::RegularFile
        && size(there) == size(source)
        && (there.st_mtime, there.st_mtime_nsec) == (source.st_mtime, source.st_mtime_nsec)
        && (there.st_uid, there.st_gid) == (source.st_uid, source.st_gid)
        && mode(there) == mode(source)
}

fn owner_refused(errno: Errno, source: &Stat, place: &Place) -> CopyError {
    match errno {
        Errno::PERM | Errno::ACCESS => CopyError::Owner {
            path: place.show(),
            uid: source.st_uid,
            gid: source.st_gid,
        },
        errno => place.failed("cannot set the owner of the copy of")(errno),
    }
}

/// Owner and times of what cannot be opened.
fn describe_by_name(
    to: &OwnedFd,
    name: &CStr,
    source: &Stat,
    place: &Place,
) -> Result<(), CopyError> {
    let owner = (Uid::from_raw(source.st_uid), Gid::from_raw(source.st_gid));
    fs::chownat(
        to,
        name,
        Some(owner.0),
        Some(owner.1),
        AtFlags::SYMLINK_NOFOLLOW,
    )
    .map_err(|errno| owner_refused(errno, source, place))?;
    set_times(to, name, source, place)
}

fn set_times(to: &OwnedFd, name: &CStr, source: &Stat, place: &Place) -> Result<(), CopyError> {
    match fs::utimensat(to, name, &times(source), AtFlags::SYMLINK_NOFOLLOW) {
        // Not every server has times of links.
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::INVAL) => Ok(()),
        Err(errno) => Err(place.failed("cannot set the times of the copy of")(errno)),
    }
}

fn times(source: &Stat) -> Timestamps {
    // The nanoseconds are below 10^9, whatever type the platform has for them.
    Timestamps {
        last_access: Timespec {
            tv_sec: source.st_atime,
            tv_nsec: source.st_atime_nsec as _,
        },
        last_modification: Timespec {
            tv_sec: source.st_mtime,
            tv_nsec: source.st_mtime_nsec as _,
        },
    }
}

/// Removes what has this name and is no directory.
pub(super) fn remove(at: impl AsFd, name: &CStr) -> Result<(), Errno> {
    match fs::unlinkat(at, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// The next stretch of a file, from `offset` on, that is no hole.
fn data_from(file: &OwnedFd, offset: u64) -> Result<Option<(u64, u64)>, Errno> {
    let begin = match fs::seek(file, SeekFrom::Data(offset)) {
        Ok(begin) => begin,
        // Nothing but a hole, or the end.
        Err(Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    Ok(Some((begin, fs::seek(file, SeekFrom::Hole(begin))?)))
}

fn write_all(file: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        let written = rustix::io::pwrite(file, bytes, offset)?;
        offset += written as u64;
        bytes = &bytes[written..];
    }
    Ok(())
}
