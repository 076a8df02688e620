//! What the file system answers, in the kernel's terms.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use fuser::{
    FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate,
    ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs, ReplyWrite, TimeOrNow,
};

use crate::fuse::fs::{Entry, Found, Opened};
use nfs::rpc::nfs3::{Attr, FileKind, FsStat, SetTime, Time};

/// What `stat` recommends as size of reads and writes, in bytes: large enough for programs that
/// copy, small enough for those that seek with buffered reads.
const BLOCK: u32 = 128 * 1024;
/// The unit of `statfs`, in bytes.
const STATFS_BLOCK: u32 = 4096;

/// The replies of fuser, alike.
pub(super) trait Answer<T>: Send + 'static {
    fn done(self, value: T);
    fn failed(self, errno: fuser::Errno);
}

macro_rules! answer {
    ($reply:ty, $value:ty, |$self:ident, $v:ident| $done:expr) => {
        impl Answer<$value> for $reply {
            fn done($self, $v: $value) {
                $done;
            }

            fn failed(self, errno: fuser::Errno) {
                self.error(errno);
            }
        }
    };
}

answer!(ReplyEmpty, (), |self, _v| self.ok());
answer!(ReplyData, Bytes, |self, v| self.data(&v));
answer!(ReplyWrite, u32, |self, v| self.written(v));
answer!(ReplyAttr, (u64, Attr, Duration), |self, v| {
    self.attr(&v.2, &file_attr(v.0, &v.1))
});
answer!(ReplyEntry, Entry, |self, v| self.entry_with_ttls(
    &v.attr_trusted,
    &v.name_trusted,
    &file_attr(v.ino, &v.attr),
    Generation(0)
));
answer!(ReplyEntry, Found, |self, v| match v {
    Found::Entry(entry) => Answer::<Entry>::done(self, entry),
    Found::Absent(trusted) if trusted.is_zero() => self.error(fuser::Errno::ENOENT),
    Found::Absent(trusted) => self.entry(&trusted, &absent(), Generation(0)),
});
answer!(ReplyOpen, Opened, |self, v| self
    .opened(FileHandle(v.fh), open_flags(v)));
answer!(ReplyCreate, (Entry, Opened), |self, v| self.created(
    &v.0.attr_trusted.min(v.0.name_trusted),
    &file_attr(v.0.ino, &v.0.attr),
    Generation(0),
    FileHandle(v.1.fh),
    open_flags(v.1)
));
answer!(ReplyStatfs, FsStat, |self, v| {
    let block = u64::from(STATFS_BLOCK);
    self.statfs(
        v.total_bytes / block,
        v.free_bytes / block,
        v.available_bytes / block,
        v.total_files,
        v.available_files,
        STATFS_BLOCK,
        255,
        STATFS_BLOCK,
    )
});

fn open_flags(opened: Opened) -> FopenFlags {
    let mut flags = FopenFlags::empty();
    if opened.keep_pages {
        flags |= FopenFlags::FOPEN_KEEP_CACHE;
    }
    if opened.direct {
        flags |= FopenFlags::FOPEN_DIRECT_IO;
    }
    if !opened.writes {
        flags |= FopenFlags::FOPEN_NOFLUSH;
    }
    flags
}

fn system_time(time: Time) -> SystemTime {
    UNIX_EPOCH + Duration::new(time.secs.into(), time.nanos.min(999_999_999))
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::Regular => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::BlockDevice => FileType::BlockDevice,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Socket => FileType::Socket,
        FileKind::Fifo => FileType::NamedPipe,
    }
}

pub(super) fn file_attr(ino: u64, attr: &Attr) -> FileAttr {
    let (major, minor) = attr.rdev;
    FileAttr {
        ino: INodeNo(ino),
        size: attr.size,
        blocks: attr.used.div_ceil(512),
        atime: system_time(attr.atime),
        mtime: system_time(attr.mtime),
        ctime: system_time(attr.ctime),
        crtime: UNIX_EPOCH,
        kind: file_type(attr.kind),
        // Cut to the permission bits, which fit.
        perm: u16::try_from(attr.mode & 0o7777).unwrap_or(0),
        nlink: attr.nlink,
        uid: attr.uid,
        gid: attr.gid,
        rdev: (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12),
        blksize: BLOCK,
        flags: 0,
    }
}

/// The entry that says that there is none: node 0.
fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

/// Times before 1970 or after 2106 do not fit NFSv3 and become the nearest that does.
pub(super) fn set_time(time: Option<TimeOrNow>) -> SetTime {
    match time {
        None => SetTime::Keep,
        Some(TimeOrNow::Now) => SetTime::Server,
        Some(TimeOrNow::SpecificTime(time)) => {
            let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
            SetTime::To(Time {
                secs: u32::try_from(since.as_secs()).unwrap_or(u32::MAX),
                nanos: since.subsec_nanos(),
            })
        }
    }
}
