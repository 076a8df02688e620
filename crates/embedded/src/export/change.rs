//! What changes the name space and attributes: SETATTR, CREATE and its kin, REMOVE, RENAME, LINK.

use nfs3_types::nfs3::{
    createhow3, mknoddata3, nfsstat3, nfstime3, sattr3, set_atime, set_gid3, set_mode3, set_mtime,
    set_size3, set_uid3, specdata3,
};
use rustix::fs::{
    AtFlags, CWD, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid,
};
use rustix::io::Errno;

use super::{Export, Node, Result, below, kind, plain, status, time};
use crate::identity::Acting;
use crate::xdr::Caller;

/// How often a create is tried again while the name comes and goes under it.
const CREATE_RACES: usize = 8;

impl Export {
    pub(crate) fn set(&self, node: &Node, to: &sattr3, caller: &Caller) -> Result<()> {
        if let set_size3::Some(size) = to.size {
            let file = self.data(node, OFlags::WRONLY, caller)?;
            let _acting = Acting::caller(caller).map_err(status)?;
            rustix::fs::ftruncate(&file, size).map_err(status)?;
        }
        let _acting = Acting::caller(caller).map_err(status)?;
        set_metadata(node, to)
    }

    /// Makes a regular file.
    ///
    /// An exclusive create keeps its verifier in the file's times, which are there before the
    /// name is: a retransmission finds its own file, another verifier finds EXIST.
    pub(crate) fn create(
        &self,
        dir: &Node,
        name: &[u8],
        how: &createhow3,
        caller: &Caller,
    ) -> Result<Node> {
        let name = plain(name)?;
        let exclusive;
        let (set, verifier) = match how {
            createhow3::UNCHECKED(set) | createhow3::GUARDED(set) => (set, None),
            createhow3::EXCLUSIVE(verifier) => {
                let (atime, mtime) = verifier_times(verifier.0);
                exclusive = sattr3 {
                    mode: set_mode3::Some(0),
                    atime: set_atime::SET_TO_CLIENT_TIME(atime),
                    mtime: set_mtime::SET_TO_CLIENT_TIME(mtime),
                    ..sattr3::default()
                };
                (&exclusive, Some((atime, mtime)))
            }
        };
        for _ in 0..CREATE_RACES {
            match new_file(dir, name, set, caller) {
                Ok(node) => {
                    sync(dir)?;
                    return Ok(node);
                }
                Err(nfsstat3::NFS3ERR_EXIST) => {}
                Err(error) => return Err(error),
            }
            let found = match self.lookup(dir, name, caller) {
                Ok(found) => found,
                // Removed in between: it can be made now.
                Err(nfsstat3::NFS3ERR_NOENT) => continue,
                Err(error) => return Err(error),
            };
            let stat = found.stat()?;
            let regular = kind(&stat) == FileType::RegularFile;
            return match (how, verifier) {
                (createhow3::UNCHECKED(set), _) if regular => {
                    let size = sattr3 {
                        size: set.size,
                        ..sattr3::default()
                    };
                    self.set(&found, &size, caller)?;
                    Ok(found)
                }
                (_, Some(own))
                    if regular
                        && stat.stx_size == 0
                        && (time(stat.stx_atime), time(stat.stx_mtime)) == own =>
                {
                    Ok(found)
                }
                _ => Err(nfsstat3::NFS3ERR_EXIST),
            };
        }
        Err(nfsstat3::NFS3ERR_JUKEBOX)
    }

    pub(crate) fn mkdir(
        &self,
        dir: &Node,
        name: &[u8],
        set: &sattr3,
        caller: &Caller,
    ) -> Result<Node> {
        let mode = mode(set, 0o777);
        make(dir, name, set, caller, |name| {
            rustix::fs::mkdirat(dir, name, mode)
        })
    }

    pub(crate) fn symlink(
        &self,
        dir: &Node,
        name: &[u8],
        target: &[u8],
        set: &sattr3,
        caller: &Caller,
    ) -> Result<Node> {
        if target.is_empty() || target.contains(&0) {
            return Err(nfsstat3::NFS3ERR_INVAL);
        }
        // A link has no mode of its own on Linux.
        let set = sattr3 {
            mode: set_mode3::None,
            ..set.clone()
        };
        make(dir, name, &set, caller, |name| {
            rustix::fs::symlinkat(target, dir, name)
        })
    }

    pub(crate) fn mknod(
        &self,
        dir: &Node,
        name: &[u8],
        what: &mknoddata3,
        caller: &Caller,
    ) -> Result<Node> {
        let (kind, set, device) = match what {
            mknoddata3::NF3CHR(data) => {
                (FileType::CharacterDevice, &data.dev_attributes, &data.spec)
            }
            mknoddata3::NF3BLK(data) => (FileType::BlockDevice, &data.dev_attributes, &data.spec),
            mknoddata3::NF3SOCK(set) => (FileType::Socket, set, &specdata3::default()),
            mknoddata3::NF3FIFO(set) => (FileType::Fifo, set, &specdata3::default()),
            mknoddata3::default => return Err(nfsstat3::NFS3ERR_BADTYPE),
        };
        let device = rustix::fs::makedev(device.specdata1, device.specdata2);
        let mode = mode(set, 0o666);
        make(dir, name, set, caller, |name| {
            rustix::fs::mknodat(dir, name, kind, mode, device)
        })
    }

    /// Removes a file (`directory` false) or an empty directory (true).
    pub(crate) fn remove(
        &self,
        dir: &Node,
        name: &[u8],
        directory: bool,
        caller: &Caller,
    ) -> Result<()> {
        let name = match name {
            b"." => return Err(nfsstat3::NFS3ERR_INVAL),
            _ => plain(name)?,
        };
        let flags = if directory {
            AtFlags::REMOVEDIR
        } else {
            AtFlags::empty()
        };
        {
            let _acting = Acting::caller(caller).map_err(status)?;
            rustix::fs::unlinkat(dir, name, flags).map_err(status)?;
        }
        sync(dir)
    }

    pub(crate) fn rename(
        &self,
        from: (&Node, &[u8]),
        to: (&Node, &[u8]),
        caller: &Caller,
    ) -> Result<()> {
        let invalid = |_| nfsstat3::NFS3ERR_INVAL;
        let (old, new) = (
            plain(from.1).map_err(invalid)?,
            plain(to.1).map_err(invalid)?,
        );
        {
            let _acting = Acting::caller(caller).map_err(status)?;
            rustix::fs::renameat(from.0, old, to.0, new).map_err(|error| match error {
                Errno::XDEV => nfsstat3::NFS3ERR_XDEV,
                // A mount point.
                Errno::BUSY => nfsstat3::NFS3ERR_ACCES,
                error => status(error),
            })?;
        }
        sync(to.0)?;
        sync(from.0)
    }

    pub(crate) fn link(&self, file: &Node, dir: &Node, name: &[u8], caller: &Caller) -> Result<()> {
        let name = plain(name)?;
        if kind(&file.stat()?) == FileType::Directory {
            return Err(nfsstat3::NFS3ERR_ISDIR);
        }
        {
            let _acting = Acting::caller(caller).map_err(status)?;
            rustix::fs::linkat(CWD, file.magic(), dir, name, AtFlags::SYMLINK_FOLLOW).map_err(
                |error| match error {
                    Errno::XDEV => nfsstat3::NFS3ERR_XDEV,
                    error => status(error),
                },
            )?;
        }
        sync(dir)
    }
}

fn mode(set: &sattr3, default: u32) -> Mode {
    match set.mode {
        set_mode3::Some(mode) => Mode::from_raw_mode(mode & 0o7777),
        set_mode3::None => Mode::from_raw_mode(default),
    }
}

/// Makes a file that is complete (mode, owner, times, size) at the moment its name appears.
fn new_file(dir: &Node, name: &[u8], set: &sattr3, caller: &Caller) -> Result<Node> {
    let _acting = Acting::caller(caller).map_err(status)?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, c".", flags, mode(set, 0o666)).map_err(status)?;
    let file = Node(file);
    if let set_size3::Some(size) = set.size
        && size != 0
    {
        rustix::fs::ftruncate(&file, size).map_err(status)?;
    }
    set_metadata(&file, set)?;
    rustix::fs::linkat(CWD, file.magic(), dir, name, AtFlags::SYMLINK_FOLLOW).map_err(status)?;
    Ok(file)
}

/// Makes anything but a regular file, then gives it the attributes that making it could not.
fn make(
    dir: &Node,
    name: &[u8],
    set: &sattr3,
    caller: &Caller,
    make: impl FnOnce(&[u8]) -> std::result::Result<(), Errno>,
) -> Result<Node> {
    let name = plain(name)?;
    let node = {
        let _acting = Acting::caller(caller).map_err(status)?;
        make(name).map_err(status)?;
        let node = below(dir, name).map_err(status)?;
        let set = sattr3 {
            size: set_size3::None,
            ..set.clone()
        };
        set_metadata(&node, &set)?;
        node
    };
    sync(dir)?;
    Ok(node)
}

/// Sets owner, mode and times, in the order in which each leaves the others alone.
fn set_metadata(node: &Node, to: &sattr3) -> Result<()> {
    let uid = match to.uid {
        set_uid3::Some(uid) if uid != u32::MAX => Some(Uid::from_raw(uid)),
        set_uid3::Some(_) => return Err(nfsstat3::NFS3ERR_INVAL),
        set_uid3::None => None,
    };
    let gid = match to.gid {
        set_gid3::Some(gid) if gid != u32::MAX => Some(Gid::from_raw(gid)),
        set_gid3::Some(_) => return Err(nfsstat3::NFS3ERR_INVAL),
        set_gid3::None => None,
    };
    if uid.is_some() || gid.is_some() {
        rustix::fs::chownat(node, c"", uid, gid, AtFlags::EMPTY_PATH).map_err(status)?;
    }
    if let set_mode3::Some(mode) = to.mode {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        rustix::fs::chmodat(CWD, node.magic(), mode, AtFlags::empty()).map_err(status)?;
    }
    let omit = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_OMIT,
    };
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_NOW,
    };
    let at = |time: nfstime3| Timespec {
        tv_sec: time.seconds.into(),
        tv_nsec: time.nseconds.into(),
    };
    let times = Timestamps {
        last_access: match to.atime {
            set_atime::DONT_CHANGE => omit,
            set_atime::SET_TO_SERVER_TIME => now,
            set_atime::SET_TO_CLIENT_TIME(time) => at(time),
        },
        last_modification: match to.mtime {
            set_mtime::DONT_CHANGE => omit,
            set_mtime::SET_TO_SERVER_TIME => now,
            set_mtime::SET_TO_CLIENT_TIME(time) => at(time),
        },
    };
    if times.last_access.tv_nsec == UTIME_OMIT && times.last_modification.tv_nsec == UTIME_OMIT {
        return Ok(());
    }
    rustix::fs::utimensat(node, c"", &times, AtFlags::EMPTY_PATH).map_err(status)
}

/// The times that remember an exclusive create: the verifier's two halves as seconds, without
/// the top bit, which some file systems cannot store.
fn verifier_times(verifier: [u8; 8]) -> (nfstime3, nfstime3) {
    let [a, b, c, d, e, f, g, h] = verifier;
    let half = |bytes| nfstime3 {
        seconds: u32::from_be_bytes(bytes) & 0x7fff_ffff,
        nseconds: 0,
    };
    (half([a, b, c, d]), half([e, f, g, h]))
}

/// Makes the changes of a directory's entries durable.
fn sync(dir: &Node) -> Result<()> {
    let open = dir
        .open(OFlags::RDONLY | OFlags::DIRECTORY)
        .map_err(status)?;
    rustix::fs::fsync(&open).map_err(status)
}
