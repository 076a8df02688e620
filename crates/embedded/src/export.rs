//! File operations on the served directory.
//!
//! Invariants: a file is reached by its handle or by one plain name below an open directory,
//! never by a path, and no symbolic link is ever followed; nothing on another mount is reached.
//! Descriptors live for one call, so their number is bounded by the calls under way. What changes
//! the name space is on disk before the answer, as RFC 1813 section 4.8 asks.
//!
//! Known limits: a file that the host's users move out of the directory can still be reached by
//! those who hold its handle, as with any NFS server without subtree checks; a mount below the
//! directory is refused with ACCES.

mod change;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use nfs3_types::nfs3::{
    ACCESS3_DELETE, ACCESS3_EXECUTE, ACCESS3_EXTEND, ACCESS3_LOOKUP, ACCESS3_MODIFY, ACCESS3_READ,
    fattr3, ftype3, nfs_fh3, nfsstat3, nfstime3, specdata3, stable_how,
};
use nfs3_types::xdr_codec::Opaque;
use rustix::fs::{
    Access, AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags, StatVfs, Statx, StatxFlags,
    StatxTimestamp,
};
use rustix::io::{Errno, ReadWriteFlags};

use super::handle::Key;
use super::identity::Acting;
use super::sys;
use super::xdr::Caller;

type Result<T> = std::result::Result<T, nfsstat3>;

/// The NFS status for an error of the file system (RFC 1813 section 2.6).
pub(super) fn status(error: Errno) -> nfsstat3 {
    match error {
        Errno::PERM => nfsstat3::NFS3ERR_PERM,
        Errno::NOENT => nfsstat3::NFS3ERR_NOENT,
        Errno::NXIO => nfsstat3::NFS3ERR_NXIO,
        // A mount below the directory (EXDEV from openat2) is nobody's to enter.
        Errno::ACCESS | Errno::XDEV => nfsstat3::NFS3ERR_ACCES,
        Errno::EXIST => nfsstat3::NFS3ERR_EXIST,
        Errno::NODEV => nfsstat3::NFS3ERR_NODEV,
        Errno::NOTDIR => nfsstat3::NFS3ERR_NOTDIR,
        Errno::ISDIR => nfsstat3::NFS3ERR_ISDIR,
        Errno::INVAL | Errno::LOOP => nfsstat3::NFS3ERR_INVAL,
        Errno::FBIG => nfsstat3::NFS3ERR_FBIG,
        Errno::NOSPC => nfsstat3::NFS3ERR_NOSPC,
        Errno::ROFS => nfsstat3::NFS3ERR_ROFS,
        Errno::MLINK => nfsstat3::NFS3ERR_MLINK,
        Errno::NAMETOOLONG => nfsstat3::NFS3ERR_NAMETOOLONG,
        Errno::NOTEMPTY => nfsstat3::NFS3ERR_NOTEMPTY,
        Errno::DQUOT => nfsstat3::NFS3ERR_DQUOT,
        Errno::STALE => nfsstat3::NFS3ERR_STALE,
        Errno::OPNOTSUPP | Errno::NOSYS => nfsstat3::NFS3ERR_NOTSUPP,
        // Out of descriptors or memory for the moment: the client tries again.
        Errno::MFILE | Errno::NFILE | Errno::NOMEM => nfsstat3::NFS3ERR_JUKEBOX,
        _ => nfsstat3::NFS3ERR_IO,
    }
}

fn io_status(error: &io::Error) -> nfsstat3 {
    Errno::from_io_error(error).map_or(nfsstat3::NFS3ERR_IO, status)
}

/// A plain name of a directory entry: neither empty, nor `.` or `..`, nor with a slash.
fn plain(name: &[u8]) -> Result<&[u8]> {
    match name {
        b"." | b".." => Err(nfsstat3::NFS3ERR_EXIST),
        _ if name.is_empty() || name.contains(&b'/') || name.contains(&0) => {
            Err(nfsstat3::NFS3ERR_INVAL)
        }
        _ => Ok(name),
    }
}

/// An open file of the directory (`O_PATH`: it names the file and grants nothing).
#[derive(Debug)]
pub(super) struct Node(OwnedFd);

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Node {
    /// A path to this very file for the calls that take no `O_PATH` descriptor.
    fn magic(&self) -> String {
        format!("/proc/self/fd/{}", self.0.as_raw_fd())
    }

    /// # Errors
    /// STALE for a file that has no name any more.
    pub(super) fn stat(&self) -> Result<Statx> {
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_SYNC_AS_STAT;
        let stat = rustix::fs::statx(&self.0, c"", flags, StatxFlags::BASIC_STATS);
        match stat.map_err(status)? {
            gone if gone.stx_nlink == 0 => Err(nfsstat3::NFS3ERR_STALE),
            stat => Ok(stat),
        }
    }

    /// Opens the file for data, with the rights of `acting`.
    fn open(&self, flags: OFlags) -> std::result::Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::open(self.magic(), flags, Mode::empty())
    }
}

fn kind(stat: &Statx) -> FileType {
    FileType::from_raw_mode(stat.stx_mode.into())
}

fn same(a: &Statx, b: &Statx) -> bool {
    (a.stx_ino, a.stx_dev_major, a.stx_dev_minor) == (b.stx_ino, b.stx_dev_major, b.stx_dev_minor)
}

/// NFSv3 times are unsigned 32-bit seconds: what lies outside is moved to the nearest bound.
fn time(stamp: StatxTimestamp) -> nfstime3 {
    nfstime3 {
        seconds: u32::try_from(stamp.tv_sec.max(0)).unwrap_or(u32::MAX),
        nseconds: stamp.tv_nsec,
    }
}

/// What a listing gives for one entry.
#[derive(Debug)]
pub(super) struct Entry<'a> {
    pub(super) name: &'a [u8],
    pub(super) fileid: u64,
    /// Where the listing goes on after this entry.
    pub(super) cookie: u64,
}

/// The served directory.
#[derive(Debug)]
pub(super) struct Export {
    root: OwnedFd,
    root_handle: nfs_fh3,
    root_stat: Statx,
    fsid: u64,
    key: Key,
    /// Changes at each start, and whenever a write that had been answered was lost.
    verifier: AtomicU64,
}

impl Export {
    /// Opens the directory.
    ///
    /// # Errors
    /// Those of open(2); `EOPNOTSUPP` when its file system has no handles; `EPERM` without
    /// CAP_DAC_READ_SEARCH.
    pub(super) fn open(dir: &Path, key: Key, verifier: u64) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = rustix::fs::open(dir, flags, Mode::empty())?;
        let handle = sys::handle_of(&root)?;
        sys::open_handle(&root, &handle)?;
        let node = Node(root.try_clone()?);
        let root_stat = node
            .stat()
            .map_err(|_| io::Error::from_raw_os_error(libc::ESTALE))?;
        Ok(Self {
            root_handle: wire(key, &handle),
            root_stat,
            fsid: rustix::fs::fstatvfs(&root)?.f_fsid,
            root,
            key,
            verifier: AtomicU64::new(verifier),
        })
    }

    pub(super) fn verifier(&self) -> [u8; 8] {
        self.verifier.load(Ordering::Acquire).to_be_bytes()
    }

    /// The file of a handle.
    ///
    /// # Errors
    /// BADHANDLE for one that was not given by this server, STALE when the file is gone.
    pub(super) fn node(&self, handle: &[u8]) -> Result<Node> {
        let handle = self.key.decode(handle).ok_or(nfsstat3::NFS3ERR_BADHANDLE)?;
        sys::open_handle(&self.root, &handle)
            .map(Node)
            .map_err(|error| io_status(&error))
    }

    pub(super) fn handle(&self, node: &Node) -> Result<nfs_fh3> {
        let handle = sys::handle_of(node).map_err(|error| io_status(&error))?;
        Ok(wire(self.key, &handle))
    }

    pub(super) fn attributes(&self, node: &Node) -> Result<fattr3> {
        let stat = node.stat()?;
        Ok(fattr3 {
            type_: match kind(&stat) {
                FileType::Directory => ftype3::NF3DIR,
                FileType::Symlink => ftype3::NF3LNK,
                FileType::BlockDevice => ftype3::NF3BLK,
                FileType::CharacterDevice => ftype3::NF3CHR,
                FileType::Fifo => ftype3::NF3FIFO,
                FileType::Socket => ftype3::NF3SOCK,
                _ => ftype3::NF3REG,
            },
            mode: u32::from(stat.stx_mode) & 0o7777,
            nlink: stat.stx_nlink,
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            size: stat.stx_size,
            used: stat.stx_blocks.saturating_mul(512),
            rdev: specdata3 {
                specdata1: stat.stx_rdev_major,
                specdata2: stat.stx_rdev_minor,
            },
            fsid: self.fsid,
            fileid: stat.stx_ino,
            atime: time(stat.stx_atime),
            mtime: time(stat.stx_mtime),
            ctime: time(stat.stx_ctime),
        })
    }

    /// # Errors
    /// NOENT, NOTDIR, ACCES.
    pub(super) fn lookup(&self, dir: &Node, name: &[u8], caller: &Caller) -> Result<Node> {
        if name != b"." && name != b".." {
            let name = plain(name)?;
            let _acting = Acting::caller(caller).map_err(status)?;
            return below(dir, name).map_err(status);
        }
        let stat = dir.stat()?;
        if kind(&stat) != FileType::Directory {
            return Err(nfsstat3::NFS3ERR_NOTDIR);
        }
        let up = name == b".." && !same(&stat, &self.root_stat);
        let path = if up { c".." } else { c"." };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let found = Node(rustix::fs::openat(dir, path, flags, Mode::empty()).map_err(status)?);
        // A directory that was moved out of the served one leads no further.
        if up && !self.holds(&found)? {
            return Err(nfsstat3::NFS3ERR_ACCES);
        }
        Ok(found)
    }

    /// Whether a directory is the served one or lies below it.
    fn holds(&self, dir: &Node) -> Result<bool> {
        let path = |fd: BorrowedFd<'_>| {
            std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
                .map_err(|error| io_status(&error))
        };
        Ok(path(dir.as_fd())?.starts_with(path(self.root.as_fd())?))
    }

    /// The directory at a path below the served one, for MOUNT.
    ///
    /// # Errors
    /// As [`Export::lookup`]; NOTDIR when it is none.
    pub(super) fn walk(&self, path: &[u8]) -> Result<nfs_fh3> {
        let root = Caller {
            uid: 0,
            gid: 0,
            groups: Vec::new(),
        };
        let mut node = self.node(&self.root_handle.data)?;
        for name in path
            .split(|&byte| byte == b'/')
            .filter(|name| !name.is_empty())
        {
            node = self.lookup(&node, plain(name)?, &root)?;
        }
        match kind(&node.stat()?) {
            FileType::Directory => self.handle(&node),
            _ => Err(nfsstat3::NFS3ERR_NOTDIR),
        }
    }

    /// Which of the rights in `wanted` the caller has.
    pub(super) fn access(&self, node: &Node, wanted: u32, caller: &Caller) -> Result<u32> {
        let directory = kind(&node.stat()?) == FileType::Directory;
        let (write, execute) = if directory {
            (
                ACCESS3_MODIFY | ACCESS3_EXTEND | ACCESS3_DELETE,
                ACCESS3_LOOKUP,
            )
        } else {
            (ACCESS3_MODIFY | ACCESS3_EXTEND, ACCESS3_EXECUTE)
        };
        let _acting = Acting::caller(caller).map_err(status)?;
        let path = node.magic();
        let mut granted = 0;
        for (rights, access) in [
            (ACCESS3_READ, Access::READ_OK),
            (write, Access::WRITE_OK),
            (execute, Access::EXEC_OK),
        ] {
            if wanted & rights != 0
                && rustix::fs::accessat(CWD, &path, access, AtFlags::EACCESS).is_ok()
            {
                granted |= wanted & rights;
            }
        }
        Ok(granted)
    }

    /// Opens a regular file for its data. The owner may always (a file is created with mode 0444
    /// and then written through the same descriptor: RFC 1813 section 4.4), and whoever may
    /// execute a file may read it.
    fn data(&self, node: &Node, flags: OFlags, caller: &Caller) -> Result<OwnedFd> {
        let stat = node.stat()?;
        match kind(&stat) {
            FileType::RegularFile => {}
            FileType::Directory => return Err(nfsstat3::NFS3ERR_ISDIR),
            _ => return Err(nfsstat3::NFS3ERR_INVAL),
        }
        if stat.stx_uid != caller.uid {
            let _acting = Acting::caller(caller).map_err(status)?;
            match node.open(flags) {
                Err(Errno::ACCESS) if flags == OFlags::RDONLY => {
                    let executes =
                        rustix::fs::accessat(CWD, node.magic(), Access::EXEC_OK, AtFlags::EACCESS);
                    executes.map_err(status)?;
                }
                opened => return opened.map_err(status),
            }
        }
        node.open(flags).map_err(status)
    }

    /// Reads into `into` at `offset`; gives the bytes read and whether the file ends there.
    pub(super) fn read(
        &self,
        node: &Node,
        offset: u64,
        into: &mut [u8],
        caller: &Caller,
    ) -> Result<(usize, bool)> {
        let file = self.data(node, OFlags::RDONLY, caller)?;
        let mut done = 0;
        while done < into.len() {
            match rustix::io::pread(&file, &mut into[done..], offset + done as u64) {
                Ok(0) => return Ok((done, true)),
                Ok(read) => done += read,
                Err(Errno::INTR) => {}
                Err(error) => return Err(status(error)),
            }
        }
        let size = rustix::fs::fstat(&file).map_err(status)?.st_size;
        Ok((done, offset + done as u64 >= size.cast_unsigned()))
    }

    /// Writes all of `from` at `offset`, as stable as `stable` asks.
    pub(super) fn write(
        &self,
        node: &Node,
        offset: u64,
        from: &[u8],
        stable: stable_how,
        caller: &Caller,
    ) -> Result<()> {
        let file = self.data(node, OFlags::WRONLY, caller)?;
        let flags = match stable {
            stable_how::UNSTABLE => ReadWriteFlags::empty(),
            stable_how::DATA_SYNC => ReadWriteFlags::DSYNC,
            stable_how::FILE_SYNC => ReadWriteFlags::SYNC,
        };
        // Not as root, for whom the kernel would leave set-id bits and take reserved blocks.
        let _acting = Acting::caller(caller).map_err(status)?;
        let mut done = 0;
        while done < from.len() {
            let rest = [io::IoSlice::new(&from[done..])];
            match rustix::io::pwritev2(&file, &rest, offset + done as u64, flags) {
                Ok(0) => return Err(nfsstat3::NFS3ERR_IO),
                Ok(written) => done += written,
                Err(Errno::INTR) => {}
                Err(error) => return Err(status(error)),
            }
        }
        Ok(())
    }

    /// Makes every write so far stable.
    ///
    /// When that fails the kernel may have dropped the data, so the verifier changes: clients
    /// send again whatever they have not yet seen committed.
    pub(super) fn commit(&self, node: &Node) -> Result<()> {
        if kind(&node.stat()?) != FileType::RegularFile {
            return Err(nfsstat3::NFS3ERR_INVAL);
        }
        let file = node.open(OFlags::RDONLY).map_err(status)?;
        rustix::fs::fsync(&file).map_err(|error| {
            self.verifier.fetch_add(1, Ordering::AcqRel);
            status(error)
        })
    }

    pub(super) fn readlink(&self, node: &Node) -> Result<Vec<u8>> {
        if kind(&node.stat()?) != FileType::Symlink {
            return Err(nfsstat3::NFS3ERR_INVAL);
        }
        rustix::fs::readlinkat(node, c"", Vec::new())
            .map(std::ffi::CString::into_bytes)
            .map_err(status)
    }

    /// Calls `each` for the entries from `cookie` on, until it says false. True when the
    /// directory's end was reached.
    ///
    /// Cookies are the file system's own positions, which stay good while entries come and go.
    pub(super) fn list(
        &self,
        dir: &Node,
        cookie: u64,
        caller: &Caller,
        mut each: impl FnMut(&Entry<'_>) -> bool,
    ) -> Result<bool> {
        let open = {
            let _acting = Acting::caller(caller).map_err(status)?;
            dir.open(OFlags::RDONLY | OFlags::DIRECTORY)
                .map_err(status)?
        };
        if cookie != 0 {
            rustix::fs::seek(&open, rustix::fs::SeekFrom::Start(cookie))
                .map_err(|_| nfsstat3::NFS3ERR_BAD_COOKIE)?;
        }
        let mut buffer = Vec::with_capacity(32 * 1024);
        let mut entries = rustix::fs::RawDir::new(&open, buffer.spare_capacity_mut());
        while let Some(entry) = entries.next() {
            let entry = entry.map_err(status)?;
            let entry = Entry {
                name: entry.file_name().to_bytes(),
                fileid: entry.ino(),
                cookie: entry.next_entry_cookie(),
            };
            if !each(&entry) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn space(&self, node: &Node) -> Result<StatVfs> {
        rustix::fs::fstatvfs(node).map_err(status)
    }
}

fn wire(key: Key, handle: &sys::KernelHandle) -> nfs_fh3 {
    nfs_fh3 {
        data: Opaque::owned(key.encode(handle)),
    }
}

/// Opens one entry of a directory, whatever it is, without following it or leaving the mount.
fn below(dir: &Node, name: &[u8]) -> std::result::Result<Node, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(dir, name, flags, Mode::empty(), resolve).map(Node)
}
