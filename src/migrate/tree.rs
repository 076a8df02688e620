//! Walking directory trees by descriptors, so that no name in them leads elsewhere.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fd::AsFd;
use rustix::fs::{self, AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// What may go wrong with one entry.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CopyError {
    #[error("{what} {path}: {source}")]
    Io {
        what: &'static str,
        path: String,
        source: io::Error,
    },
    #[error(
        "the share does not let root give {path} to user {uid}, group {gid} (root_squash?); export it \
         with no_root_squash for as long as the copy takes, then run the same command again"
    )]
    Owner { path: String, uid: u32, gid: u32 },
    #[error(
        "{path} is a mount of another file system, which does not belong to the volume; unmount it \
         first"
    )]
    OtherFileSystem { path: String },
    #[error("{path} has a name that nfsvol uses itself while it copies; rename it first")]
    OwnName { path: String },
    #[error("{path} is not what it was copied from ({difference}); run the same command again")]
    Differs {
        path: String,
        difference: &'static str,
    },
    #[error(
        "the new volume holds files already ({path}), and no copy into it was begun; choose another \
         name for it (--as)"
    )]
    NotEmpty { path: String },
    #[error(
        "the new volume holds another copy that was not finished ({begun}); finish that one, or \
         choose another name (--as)"
    )]
    Another { begun: String },
    #[error("interrupted; run the same command again to go on where it ended")]
    Interrupted,
}

/// Where the walk is, for messages: relative to the volume.
#[derive(Debug, Clone, Default)]
pub(super) struct Place(PathBuf);

impl Place {
    pub(super) fn join(&self, name: &CStr) -> Self {
        use std::os::unix::ffi::OsStrExt;
        Self(self.0.join(std::ffi::OsStr::from_bytes(name.to_bytes())))
    }

    pub(super) fn path(&self) -> &std::path::Path {
        &self.0
    }

    pub(super) fn show(&self) -> String {
        match self.0.as_os_str().is_empty() {
            true => "the volume's root".to_owned(),
            false => self.0.display().to_string(),
        }
    }

    /// Puts the place to an error of the kernel.
    pub(super) fn failed(&self, what: &'static str) -> impl FnOnce(Errno) -> CopyError {
        move |errno| CopyError::Io {
            what,
            path: self.show(),
            source: errno.into(),
        }
    }

    pub(super) fn differs(&self, difference: &'static str) -> CopyError {
        CopyError::Differs {
            path: self.show(),
            difference,
        }
    }
}

/// Opens a tree's root.
pub(super) fn open_root(path: &std::path::Path) -> Result<OwnedFd, CopyError> {
    open_dir(CWD, path).map_err(|errno| CopyError::Io {
        what: "cannot open",
        path: path.display().to_string(),
        source: errno.into(),
    })
}

pub(super) fn open_dir<P: rustix::path::Arg>(at: impl AsFd, name: P) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    fs::openat(at, name, flags, Mode::empty())
}

pub(super) fn stat(at: impl AsFd, name: &CStr) -> Result<Stat, Errno> {
    fs::statat(at, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// As [`stat`]; `None` for what is not there.
pub(super) fn stat_if_there(at: impl AsFd, name: &CStr) -> Result<Option<Stat>, Errno> {
    match stat(at, name) {
        Ok(found) => Ok(Some(found)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// The names in a directory, sorted, so that every walk meets them in the same order.
pub(super) fn names(directory: impl AsFd) -> Result<Vec<CString>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

pub(super) fn kind(stat: &Stat) -> FileType {
    FileType::from_raw_mode(stat.st_mode)
}

pub(super) fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

/// The size in bytes, which no kernel gives as a negative number.
pub(super) fn size(stat: &Stat) -> u64 {
    u64::try_from(stat.st_size).unwrap_or_default()
}

/// How many files a tree has, and how many bytes they are long.
pub(crate) fn measure(root: &std::path::Path) -> Result<(u64, u64), CopyError> {
    let mut total = (0, 0);
    measure_below(&open_root(root)?, &Place::default(), &mut total)?;
    Ok(total)
}

fn measure_below(dir: &OwnedFd, at: &Place, total: &mut (u64, u64)) -> Result<(), CopyError> {
    for name in names(dir).map_err(at.failed("cannot list"))? {
        let place = at.join(&name);
        let found = stat(dir, &name).map_err(place.failed("cannot look at"))?;
        match kind(&found) {
            FileType::Directory => {
                let below = open_dir(dir, &*name).map_err(place.failed("cannot open"))?;
                measure_below(&below, &place, total)?;
            }
            FileType::RegularFile => {
                total.0 += 1;
                total.1 += size(&found);
            }
            _ => total.0 += 1,
        }
    }
    Ok(())
}
